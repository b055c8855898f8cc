"""Sizes that cannot fit are refused before memory is allocated; sizes that fit are never
refused."""

import numpy as np
import pytest
import torch
from small_models import SMALL, ids, model_in
from util import DEVICE

from gpt2 import Config, Model, memory
from gpt2.cli import main
from gpt2.data import prepare
from gpt2.data.tokenizer import byte
from gpt2.errors import InputError
from gpt2.evaluate import scoring
from gpt2.evaluate.scoring import Window
from gpt2.generate import completion

pytestmark = pytest.mark.usefixtures("without_the_interpreter")

CPU = torch.device("cpu")
TRAINING = {"batch_size": 8, "grad_accum": 3, "fast": True, "dtype": torch.float32, "device": CPU}
BYTES = Config(block_size=16, vocab_size=256, n_layer=2, n_head=2, n_embd=16)


@pytest.fixture
def free(monkeypatch):
    """Sets the bytes of free memory."""
    return lambda n: monkeypatch.setattr(memory, "available", lambda device: n)


@pytest.mark.parametrize("config", [SMALL, BYTES, Config(5, 7, 1, 1, 3), Config(7, 5, 3, 2, 4)])
def test_parameters_are_the_model_s(config):
    assert memory.parameters(config) == Model(config).num_params(non_embedding=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fast", [False, True])
def test_activations_are_no_more_than_what_a_step_keeps(fast, dtype):
    """An estimate above the real use would refuse models that fit."""
    model, kept = model_in(SMALL, fast=fast), {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def note(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = x  # kept alive, so that no address is reused
        return x

    x = ids(3, SMALL.block_size)
    autocast = torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x), autocast:
        model(x, x)
    measured = sum(x.untyped_storage().nbytes() for x in kept.values())
    assert 0 < 3 * memory.activations(SMALL, fast=fast, itemsize=dtype.itemsize) <= measured


def test_a_run_is_refused_at_the_byte(free):
    P = memory.parameters(BYTES)
    kept = 8 * memory.activations(BYTES, fast=True, itemsize=4)
    assert 12 * P + kept > 16 * P > 24 * 16 * 24
    free(12 * P + kept)
    memory.check_training(BYTES, **TRAINING)
    free(12 * P + kept - 1)
    with pytest.raises(InputError, match="batch_size must be smaller, got 8: a step over 8 wind"):
        memory.check_training(BYTES, **TRAINING)
    free(16 * P - 1)
    with pytest.raises(
        InputError, match=r"n_layer and n_embd must be smaller, got 2 and 16: .* 0.0"
    ):
        memory.check_training(BYTES, **TRAINING)
    free(10**9)
    with pytest.raises(InputError, match=r"grad_accum .* a batch of 8,000,000,000 .* has 1.0 GB$"):
        memory.check_training(BYTES, **{**TRAINING, "grad_accum": 10**9})
    for name in ("block_size", "vocab_size"):
        with pytest.raises(
            InputError, match=f"{name} must be smaller, got 1000000000, at n_embd 16"
        ):
            memory.check_training(Config(**{**vars(BYTES), name: 10**9}), **TRAINING)


def test_where_memory_is_not_known_nothing_is_refused(free):
    free(None)
    memory.check_training(BYTES, **{**TRAINING, "batch_size": 10**12})


@pytest.mark.parametrize("fast", [False, True])
def test_more_texts_than_fit_are_refused_before_any(fast, free):
    model = model_in(BYTES, fast=fast).eval()
    free(2 * 2 * 16 * 2 * 16 * 4 if fast else 2 * 16 * 5 * 16 * 4)  # two texts
    prompts = ["a"] * 10
    assert len(list(completion.complete(model, byte(), prompts[:2], 99, batch_size=2))) > 2
    assert next(completion.complete(model, byte(), prompts, 99, batch_size=2)) is not None
    with pytest.raises(InputError, match="batch_size must be smaller, got 3: "):
        completion.complete(model, byte(), prompts, 99, batch_size=3)
    with pytest.raises(InputError, match="batch_size must be smaller, got 3: "):
        model.generate(ids(3, 4), 99)


def test_more_windows_than_fit_are_refused_before_any(free):
    model = model_in(BYTES).eval()
    free(2 * 16 * 5 * 16 * 4)
    text = byte().encode("x" * 100)
    scoring.perplexity(model, text, batch_size=2)
    for n in (2, 17, 18, 25):  # no more than two windows
        assert len(list(scoring.windows(text[:n], 16, 8))) <= 2
        scoring.perplexity(model, text[:n], batch_size=10**9)
    for score in (
        lambda: scoring.perplexity(model, text, batch_size=3),
        lambda: scoring.score_all(model, [Window(text[:17], 1)] * 9, 3),
    ):
        with pytest.raises(InputError, match="batch_size must be smaller, got 3: a forward pass"):
            score()


# ---- the free memory


def test_this_machine():
    there = memory.available(torch.device(DEVICE))
    assert there is None or there > 2**20
    assert memory.available(torch.device("meta")) is None


@pytest.fixture
def machine(tmp_path, monkeypatch):
    (tmp_path / "meminfo").write_text(
        "MemTotal:  900 kB\nMemAvailable:   800 kB\nSwapFree:  10 kB\nHugePages_Total:  0\n"
    )
    (tmp_path / "cgroup").write_text("0::/outer/inner\n")
    for name, path in (("_MEMINFO", "meminfo"), ("_CGROUP", "cgroup"), ("_CGROUPS", "fs")):
        monkeypatch.setattr(memory, name, tmp_path / path)
    return tmp_path


def group(folder, limit, usage, most, used, stat):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / limit).write_text(f"{most}\n")
    (folder / usage).write_text(f"{used}\n")
    (folder / "memory.stat").write_text("".join(f"{k} {v}\n" for k, v in stat.items()))


def test_swap_counts(machine):
    assert memory.available(CPU) == 810 * 1024


def test_the_limit_of_a_container_counts(machine):
    names = ("memory.max", "memory.current")
    stat = {"anon": 90_000, "active_file": 1000, "inactive_file": 2000}
    group(machine / "fs/outer/inner", *names, "max", 5, stat)
    assert memory.available(CPU) == 810 * 1024
    group(machine / "fs/outer", *names, 100_000, 96_000, stat)
    assert memory.available(CPU) == 100_000 - 96_000 + 3000 + 10 * 1024
    group(machine / "fs/outer/inner", *names, 99_000, 99_500, {})
    assert memory.available(CPU) == 10 * 1024


def test_the_limit_of_an_older_container_counts(machine):
    (machine / "cgroup").write_text("5:cpu:/x\n4:memory:/not-seen-in-here\n0::/\n")
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    stat = {"active_file": 1, "total_active_file": 1000, "total_inactive_file": 2000}
    group(machine / "fs/memory", *names, 50_000, 49_000, stat)
    assert memory.available(CPU) == 50_000 - 49_000 + 3000 + 10 * 1024


def test_other_systems_have_their_memory(machine, monkeypatch):
    (machine / "meminfo").unlink()
    monkeypatch.setattr(memory.os, "sysconf", lambda name: {"SC_PHYS_PAGES": 3}.get(name, 4096))
    assert memory.available(CPU) == 3 * 4096
    monkeypatch.delattr(memory.os, "sysconf")
    assert memory.available(CPU) is None


def test_a_gpu_has_what_pytorch_keeps_unused_too(monkeypatch):
    for name, n in (("memory_reserved", 30), ("memory_allocated", 20)):
        monkeypatch.setattr(torch.cuda, name, lambda device, n=n: n)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (500, 1000))
    assert memory.available(torch.device("cuda")) == 510


def test_the_limit_on_addresses_counts(machine, monkeypatch):
    """With ulimit -v, standard input was read until a MemoryError."""
    resource = pytest.importorskip("resource")
    (machine / "statm").write_text("2 1 1 1 0 1 0\n")
    monkeypatch.setattr(memory, "_PAGES", machine / "statm")
    limit = 2 * resource.getpagesize() + 100
    monkeypatch.setattr(resource, "getrlimit", lambda which: (limit, -1))
    assert memory.free() == 100
    (machine / "statm").write_text("99 1 1 1 0 1 0\n")
    assert memory.free() == 0


def array_memory_error():
    with pytest.raises(MemoryError) as found:
        np.empty(2**62, dtype=np.uint8)
    return found.value


def test_memory_that_ends_is_one_line(monkeypatch, capsys):
    """Out of memory in Python, NumPy and PyTorch; each raises another error."""
    errors = [
        (MemoryError(), ""),
        (array_memory_error(), " (Unable to allocate "),
        (RuntimeError("[…] DefaultCPUAllocator: can't allocate memory"), " ([…] DefaultCPU"),
        (torch.OutOfMemoryError("CUDA out of memory."), " (CUDA out of memory.)"),
    ]
    for error, reason in errors:

        def fail(*args, error=error, **kwargs):
            raise error

        monkeypatch.setattr(prepare, "prepare", fail)
        assert main(["prepare", "x", "--out", "y"]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"gpt2: error: out of memory{reason}")
    monkeypatch.setattr(prepare, "prepare", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["prepare", "x", "--out", "y"])
