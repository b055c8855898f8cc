"""The command line: an error is one line and exit code 2, and changes no file."""

import io
import os
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest

import gpt2
from gpt2.checkpoints import checkpoint
from gpt2.cli import main
from gpt2.data import shards
from gpt2.data.tokenizer import char

pytestmark = pytest.mark.usefixtures("without_the_interpreter")

TEXT = "the cat sat on the mat, and the dog sat on the cat. " * 60
TINY = [
    *("--block-size", "16", "--n-layer", "1", "--n-head", "2", "--n-embd", "16"),
    *("--batch-size", "4", "--steps", "6", "--eval-interval", "3", "--sample-tokens", "5"),
    *("--device", "cpu"),
]
ROOT = str(Path(gpt2.__file__).parent.parent)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a text, a finished run, shards, and every kind of broken file."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "text.txt").write_text(TEXT)
    (folder / "empty.txt").touch()
    (folder / "short.txt").write_text("short")
    (folder / "latin1.txt").write_bytes(TEXT.encode() + b"\xe9")
    (folder / "empty").mkdir()
    (folder / "full").mkdir()
    (folder / "full" / "mine").write_text("precious")
    (folder / "ids.bin").write_bytes(np.arange(1000, dtype="<u2").tobytes())
    (folder / "odd.bin").write_bytes(b"\0" * 999)
    header = np.zeros(256, dtype="<i4")
    header[:3] = shards.MAGIC, 2, 100
    (folder / "version.bin").write_bytes(header.tobytes() + bytes(200))
    header[:3] = shards.MAGIC, 1, 101
    (folder / "count.bin").write_bytes(header.tobytes() + bytes(200))
    (folder / "ranks").write_text("not ranks")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["train", "--data", "text.txt", "--out", "run", *TINY]) == 0
        for name in ("broken", "renamed"):
            (folder / name).mkdir()
            for path in (folder / "run").iterdir():
                (folder / name / path.name).write_bytes(path.read_bytes())
        weights = folder / "broken" / checkpoint.FILE
        weights.write_bytes(weights.read_bytes()[:-100])
        (folder / "renamed" / "tokenizer.json").write_text(char("abc").to_json())
    return folder


def everything(folder: Path) -> dict:
    """Every file below folder, with its content and modification time."""
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in sorted(folder.rglob("*"))
    }


WRONG = {
    # a command line expected text in the message
    "frobnicate": "invalid choice: 'frobnicate'",
    "train --frobnicate": "unrecognized arguments: --frobnicate",
    "train --step 5": "unrecognized arguments: --step 5",
    "train --steps many": "--steps: invalid int value: 'many'",
    "train --steps 0": "steps must be at least 1, got 0",
    "train --batch-size -1": "batch_size must be at least 1, got -1",
    "train --lr nan": "lr must be finite, got nan",
    "train --lr 0": "lr must be above 0, got 0",
    "train --lr 1e-4 --min-lr 1e-3": "min_lr must be at most lr, got min_lr=0.001, lr=0.0001",
    "train --dropout 1": "dropout must be below 1, got 1",
    "train --beta2 1": "beta2 must be below 1, got 1",
    "train --val-fraction 0": "val_fraction must be above 0, got 0",
    "train --seed -1": "seed must be at least 0, got -1",
    "train --dtype int8": "dtype must be auto or float32 or bfloat16, got 'int8'",
    "train --device warp": "device must be auto or one that works here, got 'warp'",
    "train --device cuda:99": "device must be auto or one that works here, got 'cuda:99'",
    "train --n-embd 130": "n_embd must be divisible by n_head, got n_embd=130, n_head=4",
    "train --n-embd 200000": "n_layer and n_embd must be smaller, got 3 and 200000: training "
    r"1,440,0\d\d,\d+,\d+ parameters takes at least 23,04\d.\d GB of memory, cpu has ",
    "train --n-layer 1000000000000": "n_layer and n_embd must be smaller, got 1000000000000 and",
    "train --block-size 1000000000000": "block_size must be smaller, got 1000000000000, at n_embd",
    "train --batch-size 100000000": "batch_size must be smaller, got 100000000: a step over "
    r"100,000,000 windows of 64 tokens takes at least [\d,.]+ GB of memory, (cpu|cuda) has ",
    "train --grad-accum 1000000000": "grad_accum must be smaller, got 1000000000, at batch_size 16",
    "train --data none.txt": "data must be a file, .* got 'none.txt'",
    "train --data none*": "data must be a file, .* got 'none\\*'",
    "train --data empty": "data must be a file, .* got 'empty'",
    "train --data empty.txt": "data 'empty.txt' is empty",
    "train --data short.txt": "data 'short.txt' must give more than block_size 64 training tokens",
    "train --data text.txt --block-size 3000": "training tokens .* got 2808 and 312",
    "train --data latin1.txt": "data 'latin1.txt' must be UTF-8, got 0xe9 at byte 3120",
    "train --data ids.bin --tokenizer byte": "below vocab_size 256, got 256 at position 256",
    "train --data ids.bin --tokenizer char": "tokenizer must be byte, gpt2, a file",
    "train --data odd.bin --tokenizer byte": "'odd.bin' must hold uint16 ids, got an odd size",
    "train --data version.bin --tokenizer byte": "'version.bin' must have version 1, got 2",
    "train --data count.bin --tokenizer byte": "its header says, 101, got 100",
    "train --tokenizer gpt5": "tokenizer must be byte, gpt2, a file, .* got 'gpt5'",
    "train --tokenizer ranks": "tokenizer 'ranks': line 1 must be",
    "train --tokenizer gpt2 --tokenizer-dir empty": "tokenizer-dir 'empty': .*encoder.json",
    "train --out full": "out must be a new or empty folder, got 'full'",
    "train --out text.txt": "out must be a folder that can be written, got 'text.txt'",
    "train --out text.txt/run": "out must be a folder that can be written, got 'text.txt/run'",
    "train --data text.txt --out /proc/run": "out must be a folder that can be written, .*/proc",
    "train --resume none": "resume must be the folder of a run, got 'none'",
    "train --resume run": "steps must be above the 6 done, got 6",
    "train --resume run --n-head 4": "n_head cannot be changed by --resume, got 4",
    "train --resume run --steps 9 --data x": "data must be a file, .* got 'x'",
    "train --resume broken --steps 9": "checkpoint 'broken/checkpoint.safetensors' cannot be read",
    "train --resume renamed --steps 9": "tokenizer .* must have the model's 14 ids, got 3",
    "train --init none": "model must be gpt2, .* got 'none'",
    "train --init broken": "checkpoint 'broken/checkpoint.safetensors' cannot be read",
    "train --init run --n-layer 3": "n_layer must be that of init 'run', 1, got 3",
    "train --init run --n-embd 32 --n-head 2": "n_embd must be that of init 'run', 16, got 32",
    "train --init run --block-size 17": "block_size must be at most that of init 'run', 16, got 17",
    "train --init run --tokenizer byte": "tokenizer must be that of init 'run', got 'byte'",
    "train --init run --tokenizer char": "tokenizer must be that of init 'run', got 'char'",
    "train --init run --data ids.bin": "must hold ids below vocab_size 14, got 14 at position 14",
    "train --init renamed --data text.txt": "tokenizer must fit .*14, got 3 ids",
    "train --init run": "character .* is not among the 14 characters",
    "train --init run --data text.txt --lr 1e-6 --min-lr 1e-5": "min_lr must be at most lr",
    "train --resume run --steps 9 --init run": "init cannot be changed by --resume, got 'run'",
    "convert": "required: MODEL, DEST, --to",
    "convert run new": "required: --to",
    "convert run new --to onnx": "to must be one of hf, run, nanogpt, llmc, got 'onnx'",
    "convert none new --to hf": "model must be gpt2, .* got 'none'",
    "convert text.txt new --to hf": "model must be gpt2, .* got 'text.txt'",
    "convert empty new --to hf": "'empty/config.json' cannot be read",
    "convert broken new --to hf": "checkpoint 'broken/checkpoint.safetensors' cannot be read",
    "convert run full --to hf": "dest must be a new or empty folder, got 'full'",
    "convert run text.txt --to llmc": "dest must be new, got .*text.txt', which exists",
    "convert run new --to run --tokenizer gpt2": "vocab_size 14, got 50257 ids",
    "convert run new --to hf --vocab-size 15": "vocab_size must be 1 to 14, .* got 15",
    "convert run new --to hf --dtype int8": "dtype must be one of float32, .* got 'int8'",
    "convert run new --to hf --max-shard-size 5": "max_shard_size must be a number of bytes",
    "sample": "required: MODEL",
    "sample none": "model must be gpt2, .* or llm.c's model.bin, got 'none'",
    "sample broken": "checkpoint 'broken/checkpoint.safetensors' cannot be read",
    "sample renamed": "'renamed': the tokenizer must fit its vocab_size 14, got 3 ids",
    "sample run --prompt Q": r"character 'Q' \(U\+0051\) is not among the 14 characters",
    "sample run --temperature -1": "temperature must be finite and at least 0, got -1",
    "sample run --top-k 0": "top_k must be at least 1, got 0",
    "sample run --top-p 1.5": "top_p must be above 0 and at most 1, got 1.5",
    "sample run --max-new-tokens -1": "max_new_tokens must be at least 0, got -1",
    "sample run --num-samples 0": "num_samples must be at least 1, got 0",
    "sample run --num-samples 100000000000": "num_samples must be smaller, got 100000000000: ",
    "sample run --device warp": "device must be auto or one that works here, got 'warp'",
    "prepare text.txt": "required: --out",
    "prepare none.txt --out new --tokenizer byte": "data must be a file",
    "prepare ids.bin --out new --tokenizer byte": "data must be text, got shards",
    "prepare latin1.txt --out new --tokenizer byte": "must be UTF-8, got 0xe9 at byte 3120",
    "prepare text.txt --out full --tokenizer byte": "out must be new, .*full'",
    "prepare text.txt --out text.txt --tokenizer byte": "out must be new, got .*text.txt', which",
    "prepare text.txt --out new --tokenizer gpt5": "tokenizer must be .* got 'gpt5'",
    "prepare text.txt --out new --tokenizer byte --shard-tokens 0": "shard_tokens must be",
    "tokenizer text.txt --out new": "required: --vocab-size",
    "tokenizer text.txt --vocab-size 256 --out new": "vocab_size must be at least 257 .* got 256",
    "tokenizer text.txt --vocab-size 300 --out ids.bin": "out must be new, .*ids.bin'",
    "tokenizer text.txt --vocab-size 300 --out text.txt/x": "out must be a folder that can",
    "tokenizer none.txt --vocab-size 300 --out new": "data must be a file",
    "tokenizer latin1.txt --vocab-size 300 --out new": "must be UTF-8, got 0xe9",
}


@pytest.mark.parametrize(("command", "message"), WRONG.items(), ids=WRONG)
def test_what_is_wrong_is_one_line_and_nothing_is_touched(
    command, message, made, monkeypatch, capsys
):
    monkeypatch.chdir(made)
    before = everything(made)
    assert main(command.split()) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    errors = [line for line in printed.err.splitlines() if line and "tokenizing" not in line]
    assert len(errors) == 1, printed.err
    assert re.match(rf"gpt2: error: .*{message}", errors[0])
    assert everything(made) == before


def test_a_line_stays_one_line(capsys):
    assert main(["train", "--a\nb"]) == 2
    assert capsys.readouterr().err == "gpt2: error: unrecognized arguments: --a b\n"


def test_no_network_is_one_line(made, monkeypatch, capsys):
    import requests

    def no_network(*args, **kwargs):
        raise requests.ConnectionError("no route to host")

    import tiktoken.registry

    monkeypatch.chdir(made)
    monkeypatch.setattr(requests, "get", no_network)
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(made / "empty"))
    assert main(["train", "--data", "ids.bin"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("gpt2: error: tokenizer 'gpt2': its two files can be neither found nor")


def test_a_bug_keeps_its_traceback(made, monkeypatch):
    monkeypatch.setattr("gpt2.loading.load", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["sample", str(made / "run")])


def test_a_loss_that_is_not_finite_is_one_line(made, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(made)
    out = str(tmp_path / "run")
    assert main(["train", "--data", "text.txt", "--out", out, *TINY, "--lr", "1e30"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.match(r"gpt2: error: step \d+ \(batch \d+ of seed 1337\) has loss (nan|inf)", last)


# What works


def test_sample_streams_the_prompt_and_what_follows(made, capsys):
    arguments = ["sample", str(made / "run"), "--prompt", "the cat", "--max-new-tokens", "9"]
    assert main([*arguments, "--seed", "7"]) == 0
    first = capsys.readouterr().out
    assert first.startswith("the cat") and len(first) == len("the cat") + 9 + 1
    assert main([*arguments, "--seed", "7", "--num-samples", "2"]) == 0
    both = capsys.readouterr().out
    assert both.startswith(first) and both.count("the cat") >= 2
    assert main([*arguments, "--temperature", "0", "--top-k", "3", "--top-p", "0.9"]) == 0
    assert main(["sample", str(made / "run"), "--max-new-tokens", "0"]) == 0


def test_prepare_then_train_then_sample(made, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    text = str(made / "text.txt")
    assert main(["tokenizer", text, "--vocab-size", "270", "--out", "ranks"]) == 0
    assert main(["prepare", text, "--tokenizer", "ranks", "--out", "shards"]) == 0
    assert "tokenizing: 100%" in capsys.readouterr().err
    assert main(["train", "--data", "shards", "--out", "run", *TINY]) == 0
    assert "nats per token" in capsys.readouterr().err
    assert main(["sample", "run", "--prompt", "日本 é", "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out.startswith("日本 é")


def test_train_from_standard_input(monkeypatch, tmp_path):
    stdin = types.SimpleNamespace(buffer=io.BytesIO(TEXT.encode()))
    monkeypatch.setattr(sys, "stdin", stdin)
    assert main(["train", "--data", "-", "--out", str(tmp_path / "run"), *TINY]) == 0


def test_default_folder_is_named_after_the_time(made, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--data", str(made / "text.txt"), *TINY]) == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"\d{8}-\d{6}", run.name)


def test_every_option_has_a_flag_and_help_says_its_default(capsys):
    from dataclasses import fields

    from gpt2.train.config import TrainConfig

    with pytest.raises(SystemExit) as end:
        main(["train", "--help"])
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in fields(TrainConfig):
        assert f"--{field.name.replace('_', '-')}" in text
    for expected in ("[default: 0.004]", "[default: 0.0]", "[default: lr / 10]", "[default: no]"):
        assert expected in text
    assert text.count("[default: ") == len(fields(TrainConfig))


def run_python(*arguments, **options):
    environment = {**os.environ, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=environment,
        text=True,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        **options,
    )


def test_help_needs_no_torch():
    """The commands import torch; gpt2/__init__.py is not imported here."""
    code = (
        "import sys, types; package = types.ModuleType('gpt2'); "
        f"package.__path__ = [{os.path.dirname(gpt2.__file__)!r}]; sys.modules['gpt2'] = package\n"
        "from gpt2.cli import main\n"
        "try: main(['train', '--help'])\n"
        "except SystemExit: print(sorted({'torch', 'numpy', 'matplotlib'} & set(sys.modules)))\n"
        "import os; print(os.environ['OMP_WAIT_POLICY'])"
    )
    out, err = run_python("-c", code).communicate(timeout=60)
    assert out.endswith("[]\nPASSIVE\n"), err


def test_ctrl_c_leaves_a_checkpoint_and_says_how_to_go_on(made, tmp_path):
    """The whole command in another process, interrupted as a user would."""
    arguments = [*TINY, "--steps", "1000000", "--out", "run", "--data", str(made / "text.txt")]
    process = run_python("-m", "gpt2", "train", *arguments, cwd=tmp_path)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert err.splitlines()[-1].endswith("of 1000000; continue with: gpt2 train --resume run")
    step = checkpoint.read(tmp_path / "run" / checkpoint.FILE)[1]["step"]
    assert main(["sample", str(tmp_path / "run"), "--max-new-tokens", "3"]) == 0
    assert main(["train", "--resume", str(tmp_path / "run"), "--steps", str(step + 2)]) == 0


def test_a_reader_that_leaves_early_is_no_error(made):
    process = run_python(
        "-m", "gpt2", "sample", str(made / "run"), "--max-new-tokens", "3000", "--no-fast"
    )
    process.stdout.read(5)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == 128 + signal.SIGPIPE
