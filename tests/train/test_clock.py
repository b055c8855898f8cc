"""If the clock stands still, as in a paused virtual machine, speeds are unknown, and nothing
divides by zero or waits for ever."""

import json
import math
import time

import pytest
import torch
from runs import TEXT, options, rows

from gpt2 import bars, device
from gpt2.cli import main
from gpt2.train.start import resume, train

pytestmark = pytest.mark.usefixtures("without_the_interpreter")


@pytest.fixture
def still(monkeypatch, tmp_path):
    """Stops all clocks."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    monkeypatch.setattr(device, "PEAK_SECONDS", 1.0)
    for name in ("perf_counter", "time", "monotonic"):
        now = getattr(time, name)()
        monkeypatch.setattr(time, name, lambda now=now: now)


def test_a_run_goes_on_without_speeds(still, tmp_path, capsys, monkeypatch):
    assert train(options("text.txt", out="run", sample_tokens=0)) == 0
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    assert settings["peak"]["flops"] is None
    lines = rows(tmp_path / "run")
    assert len(lines) == 7
    for line in lines:
        assert line["tokens_per_s"] is None and line["mfu"] is None and line["elapsed_s"] == 0
        assert line["train_loss"] > 0
    err = capsys.readouterr().err
    assert "mfu is relative to an unknown peak, because the clock stands still" in err
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(device, "PEAK_SECONDS", 0.0)
    assert resume("run", steps=14) == 0, "a run goes on when the clock does"
    assert rows(tmp_path / "run")[-1]["mfu"] > 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["peak"]["flops"] > 0


def test_every_command_ends(still, capsys):
    train(options("text.txt", out="run", sample_tokens=0))
    capsys.readouterr()
    assert main(["sample", "run", "--max-new-tokens", "5"]) == 0
    assert "unknown tokens/s, 0 ms a step" in capsys.readouterr().err
    assert main(["eval", "run", "--data", "text.txt"]) == 0
    assert "unknown tokens/s" in capsys.readouterr().out
    assert main(["eval", "run", "--data", "text.txt", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["data"]["tokens_per_second"] is None
    assert main(["prepare", "text.txt", "--out", "shards", "--tokenizer", "byte"]) == 0


def test_peaks_and_bandwidths_are_unknown(still):
    cpu = torch.device("cpu")
    assert device.peak_flops(cpu, torch.float32).flops is None
    assert device._best(lambda: None, math.inf) == 0
    assert bars.per_second(3, 0.0) is None and bars.per_second(3, 2.0) == 1.5
    assert bars.shown(None) == "unknown" and bars.shown(1234.5) == "1,234"


def test_the_bandwidth_is_unknown(still, monkeypatch):
    small = torch.ones
    monkeypatch.setattr(device.torch, "ones", lambda *size, **to: small(2048))
    monkeypatch.setattr(device.kernels, "linear", lambda x, matrix: torch.zeros(1, 1))
    assert device.read_bandwidth(torch.device("cpu")) is None


def test_a_bar_takes_it(still):
    with bars.bar(total=3) as bar:
        for _ in range(3):
            bar.update()
