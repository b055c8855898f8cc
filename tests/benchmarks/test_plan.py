"""The plan of run_all.py, its options, and contenders on a GPU."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import run_all
import torch
from bench import (
    clock,
    contenders,
    environment,
    options,
    result_file,
)
from bench.run import (
    plan,
)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: --out"),
        (["--out", "/etc/passwd/out"], "'/etc/passwd/out' cannot be written"),
        (["--out", "{out}", "--only", "softmax"], "'softmax' is not one of attention, layer_norm"),
        (["--out", "{out}", "--minutes", "-1"], "'-1' is not a positive number"),
        (["--out", "{out}", "--minutes", "soon"], "'soon' is not a positive number"),
        (["--out", "{out}", "--threads", "0"], "'0' is not a positive integer"),
        (["--out", "{out}", "--device", "tpu"], "invalid choice: 'tpu'"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, list) else "",
)
def test_bad_options_are_one_line(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as exit:
        run_all.main([a.format(out=out) for a in arguments])
    error = capsys.readouterr().err
    assert exit.value.code == 2 and message in error and error.count("\n") == 1
    assert not out.exists(), "nothing is written"


def test_interpreted_kernels_are_not_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit):
        run_all.main(["--out", str(tmp_path / "out")])
    assert "TRITON_INTERPRET=1" in capsys.readouterr().err


def test_a_lost_context_is_noticed(monkeypatch):
    def lost(device):
        raise RuntimeError("CUDA error: an illegal memory access\nwas encountered")

    contenders.still_alive(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(contenders.ContextLost, match="an illegal memory access was encountered"):
        contenders.still_alive(torch.device("cuda"))


def test_on_a_gpu_each_has_it_to_itself(monkeypatch, tmp_path):
    """Each is checked, timed, and released before the next one; here with a GPU that does
    nothing."""
    did = []
    gpu = SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: did.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: did.append("release"))

    def check(contender):
        did.append(f"check {contender.name}")
        if contender.name == "large":
            raise torch.OutOfMemoryError("no room")
        return 0.0

    def timed(step, group):
        did.append(f"time {step} {','.join(c.name for c in group)}")
        return {c: {"median_ms": 2.0, "p20_ms": 2.0, "p80_ms": 2.0} for c in group}

    kept = result_file.Record(
        tmp_path / "out.json", "gelu", {}, only={"backend": None, "peer": None}
    )
    case = result_file.Case("gelu", {"N": 1}, "bfloat16", ("forward", "backward"))
    ours, large = (contenders.Contender(n, len, kind="backend") for n in ("triton", "large"))
    work = clock.Work(2e9, clock.BYTE)
    three = [ours, large, contenders.Contender("eager", len)]
    limit = {"GB/s": 4000.0}
    contenders.check_and_time(kept, case, three, gpu, limit, lambda s, c: work, check, timed)
    assert did == [
        "check triton", "synchronize", "time forward triton", "time backward triton", "release",
        "check large", "synchronize", "release",
        "check eager", "synchronize", "time forward eager", "time backward eager", "release",
    ]  # fmt: skip
    rows = {(r.contender, r.step): r for r in kept.settle(case)}
    assert rows["triton", "forward"].percent_of_limit == pytest.approx(25)
    assert rows["triton", "backward"].times_faster_than == {"eager": 1.0}
    assert rows["large", "forward"].reason == "OutOfMemoryError: no room"
    document = result_file.read(tmp_path / "out.json")
    assert len(document["results"]) == 6 and "running" not in document


@pytest.mark.parametrize(
    ("name", "device", "expected"),
    [
        ("NVIDIA H200", "cuda", "h200"),
        ("NVIDIA H100 80GB HBM3", "cuda", "h100"),
        ("NVIDIA A100-SXM4-80GB", "cuda", "a100"),
        ("NVIDIA RTX A6000", "cuda", "a6000"),
        ("AMD EPYC", "cpu", "epyc-avx512-2thread"),
        ("Intel(R) Xeon(R) Platinum 8480+", "cpu", "xeon-avx512-2thread"),
    ],
)
def test_names_of_machines(name, device, expected):
    about = {"device": device, "device_name": name, "threads": 2, "cpu_capability": "AVX512"}
    assert environment.slug(about) == expected


def test_report_of_this_machine(monkeypatch):
    about = environment.report(torch.device("cpu"))
    assert about["cores"] and about["peers"]["flash-attn-3"] and about["nvidia_smi"]
    json.dumps(about)
    answer = ", ".join(["NVIDIA H200", "580.1", *map(str, range(len(environment.SMI) - 2))])
    monkeypatch.setattr(environment.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(environment, "_output", lambda *command: f"{answer}\n")
    assert environment.nvidia_smi()["driver_version"] == "580.1"


@pytest.mark.parametrize("quick", [False, True], ids=["whole", "quick"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_plan(device, quick, tmp_path):
    """Every job is a valid command of its script, and the most important is first."""
    planned = plan.planned(device, quick, None, tmp_path, "abacus")
    benches = planned.benches
    first = benches[: len(run_all.SCRIPTS)]
    assert [job.name.rpartition("-")[0] for job in first] == list(run_all.SCRIPTS)
    assert len({job.json for job in benches}) == len(benches)
    for job, bench in zip(benches, plan.ON_GPU if device == "cuda" else plan.ON_CPU, strict=False):
        script = __import__(bench.script)
        command = list(job.command)
        assert Path(command[1]).is_file() and job.json.name.startswith("abacus-")
        chosen = command[command.index("--shapes") + 1] if "--shapes" in command else ""
        for shape in filter(None, [*chosen.split(","), bench.quick]):
            assert options.parse_shape(shape, script.DIMS)
    assert planned.builds and bool(planned.compilations) == (device == "cuda")
    only = plan.planned(device, quick, ["gelu"], tmp_path, "abacus").benches
    assert {job.name.partition("-")[0] for job in only} == {"gelu"}
