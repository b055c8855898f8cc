"""README's pictures show the newest measurement of a GPU, and table.py detects outdated
pictures."""

import itertools
import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import table
from bench.report import pictures
from processes import ROOT

SHAPE = {"B": 2, "T": 1024, "H": 12, "D": 64}
STEP = {"op": "train_step", "step": "step", "shape": {"B": 4, "T": 1024}, "unit": "TFLOP/s"}


def row(contender, rate, kind="peer", **changes):
    """A result; a wrong one if rate is None."""
    ms = rate and 100 / rate
    return {
        "op": "causal_attention", "step": "forward", "dtype": "bfloat16", "shape": SHAPE,
        "contender": contender, "kind": kind, "status": "ok" if rate else "wrong", "median_ms": ms,
        "rate": rate, "unit": "TFLOP/s", "percent_of_limit": 50.0, "max_error": 1e-3, **changes,
    }  # fmt: skip


def document(*results, device="cuda", date="2026-01-02T03:04:05Z"):
    about = {
        "device": device, "device_name": "NVIDIA H200", "torch": "2", "triton": "3", "cuda": "13",
        "cudnn": 9, "threads": None, "cpu_capability": "", "commit": "abc", "dirty": False,
        "date": date,
    }  # fmt: skip
    limits = {"bfloat16": {"TFLOP/s": 700.4}}
    return {"schema": 1, "environment": about, "limits": limits, "results": list(results)}


def attention(*results, **about):
    return pictures.attention([document(*results, **about)])


@pytest.fixture
def project(tmp_path):
    """write(file name, document), and main(*options) of table.py, in a temporary project."""
    results = tmp_path / "benchmarks/results"
    for folder in (results, tmp_path / "docs"):
        folder.mkdir(parents=True)
    for file in ("README.md", "docs/benchmarks.md"):
        (tmp_path / file).write_text(f"{table.BEGIN}\n{table.END}\n")

    class Project:
        root = tmp_path
        drawn = tmp_path / pictures.FOLDER

        def write(self, name, content):
            (results / f"{name}.json").write_text(json.dumps(content))

        def main(self, *options):
            return table.main(["--root", str(tmp_path), *options])

    return Project()


def test_pictures_are_drawn_and_noticed_when_stale(project, capsys):
    long = SHAPE | {"B": 1, "T": 2048}
    curves = [
        row(name, rate * (step == "forward") + 30, kind, step=step, shape=shape)
        for name, kind, rate in (("triton", "backend", 200.0), ("flash-4", "peer", 190.0))
        for step in ("forward", "backward")
        for shape in (SHAPE, long)
    ]
    steps = document(row("fast", 50.0, "backend", **STEP), row("nanogpt", 20.0, **STEP))
    project.write("attention", document(*curves))
    project.write("train_step", steps)
    files = [project.drawn / f"{name}.svg" for name in
             ("attention", "attention-dark", "train_step", "train_step-dark")]  # fmt: skip

    assert project.main("--check") == 1 and not project.drawn.exists()
    assert project.main("--write") == 0 and project.main("--check") == 0
    texts = {file.name: file.read_text() for file in files}
    for text in texts.values():
        ElementTree.fromstring(text)
        assert "NVIDIA H200, torch 2, Triton 3, commit abc, 2026-01-02</text>" in text
        assert len(text) < 60_000
    assert "ours (Triton)  230</text>" in texts["attention.svg"]
    assert "limit, a large matrix product: 700</text>" in texts["attention-dark.svg"]
    assert "2,048,000</text>" in texts["train_step.svg"]  # 4 * 1024 tokens in 2 ms
    for path in files:
        assert f"{pictures.FOLDER}/{path.name}" in (project.root / "README.md").read_text()

    capsys.readouterr()
    project.write("attention", document(*(r | {"rate": r["rate"] + 1} for r in curves)))
    assert project.main("--check") == 1
    said = capsys.readouterr().err
    assert "docs/pictures/attention.svg" in said and "train_step" not in said
    assert project.main("--write") == 0 and project.main("--check") == 0
    assert files[2].read_text() == texts["train_step.svg"]

    files[3].unlink()
    assert project.main("--check") == 1
    assert "docs/pictures/train_step.svg: out of date" in capsys.readouterr().err
    assert project.main("--write") == 0
    assert files[3].read_text() == texts["train_step-dark.svg"], "the same bytes, whenever drawn"


def test_another_matplotlib_draws_other_bytes(project, monkeypatch, tmp_path):
    """Only the digest of the data and of the script counts, in both themes."""
    project.write("train_step", document(row("fast", 50.0, "backend", **STEP)))
    assert project.main("--write") == 0
    (picture,) = pictures.pictures([document(row("fast", 50.0, "backend", **STEP))])
    for path in picture.paths(project.root).values():
        text = path.read_text()
        path.write_text(text + "<!-- drawn by another version -->")
        assert project.main("--check") == 0
        path.write_text(text.replace(picture.digest(), "0" * 16))
        assert project.main("--check") == 1
        path.write_text(text)
    changed = tmp_path / "pictures.py"
    changed.write_text(Path(pictures.__file__).read_text() + "# another way to draw\n")
    monkeypatch.setattr(pictures, "__file__", str(changed))
    assert project.main("--check") == 1


def test_without_results_of_a_gpu_there_is_no_picture(project):
    project.write("attention", document(row("cpu", 1.0, "backend"), device="cpu"))
    assert project.main("--write") == 0 and project.main("--check") == 0
    assert not project.drawn.exists()
    assert "<picture>" not in (project.root / "README.md").read_text()
    assert attention(row("triton", None, "backend")) is None


def test_results_of_gpus_come_first(project):
    ours, theirs = row("triton", 3.0, "backend"), row("eager", 1.0)
    cpu = document(ours, theirs, device="cpu")
    cpu["environment"] |= {"device_name": "Abacus", "threads": 1}
    project.write("a-cpu", cpu)
    project.write("b-gpu", document(ours, theirs))
    assert project.main("--write") == 0
    for file in ("README.md", "docs/benchmarks.md"):
        text = (project.root / file).read_text()
        assert text.index("*NVIDIA H200, torch 2") < text.index("*Abacus, torch 2")
        assert ", 1 thread, commit" in text


def test_only_drawing_needs_matplotlib(project):
    """The style check of CI may run without matplotlib."""
    project.write("train_step", document(row("fast", 50.0, "backend", **STEP)))
    command = f"import sys, table; table.main(['--root', {str(project.root)!r}, '--check']); "
    command += "sys.exit('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", command], cwd=ROOT / "benchmarks")
    assert done.returncode == 0


def test_a_picture_shows_the_newest_results():
    old = document(row("triton", 900.0, "backend"), date="2026-01-01T00:00:00Z")
    new = document(row("triton", 300.0, "backend"), date="2026-01-03T00:00:00Z")
    other = document(row("triton", 1.0, "backend", dtype="float32"), date="2026-01-04T00:00:00Z")
    for documents in ([old, new, other], [other, new, old]):
        picture = pictures.attention(documents)
        assert picture.data["passes"]["forward"]["triton"]["points"] == [(1024, 300.0)]
        assert picture.data["line"].endswith("2026-01-03")


@pytest.mark.parametrize("order", [1, -1])
def test_a_picture_shows_one_series_and_no_one_without_a_time(order):
    rows = [
        row("flash-4", 350.0),
        row("triton", 300.0, "backend"),
        row("triton", 400.0, "backend", shape=SHAPE | {"B": 1, "T": 2048}),
        row("triton", 500.0, "backend", shape=SHAPE | {"H": 4}),
        row("triton", 600.0, "backend", op="causal_attention_qkv"),
        row("flex", None),
        row("triton", 310.0, "backend", shape=SHAPE | {"B": 1}),  # less work at the same T
    ]
    picture = attention(*rows[::order])
    assert picture.data["passes"] == {
        "forward": {
            "flash-4": {"ours": False, "points": [(1024, 350.0)]},
            "triton": {"ours": True, "points": [(1024, 300.0), (2048, 400.0)]},
        }
    }
    assert picture.data["tokens"] == [2048]


def test_a_picture_says_in_words_what_is_seen():
    picture = attention(
        row("triton", 300.0, "backend"), row("flash-4", 350.0), row('a "new" peer', 10.0)
    )
    assert picture.words == (
        "Causal attention on NVIDIA H200, TFLOP/s over T. At T=1024: Forward: FlashAttention-4 "
        '350, ours (Triton) 300, a "new" peer 10. A large matrix product reaches 700.'
    )
    found = {}
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, values: found.update({tag: dict(values)})
    parser.feed(picture.markup())
    assert found["img"] == {"src": "docs/pictures/attention.svg", "alt": picture.words}
    assert found["source"]["srcset"] == "docs/pictures/attention-dark.svg"


@pytest.mark.parametrize("heights", [[], [3], [0, 0, 0], [1, 2, 9], [0, 10, 10.5, 11, 20], [5, 6]])
def test_names_do_not_overlap(heights):
    placed = pictures.apart(heights, 2)
    gaps = [b - a for a, b in itertools.pairwise(placed)]
    assert len(placed) == len(heights) and all(gap >= 2 - 1e-9 for gap in gaps)
    assert sum(placed) == pytest.approx(sum(heights))


def test_names_far_apart_stay():
    assert pictures.apart([0, 5, 9], 2) == [0, 5, 9]


def test_a_run_that_was_cut_short_does_not_replace_a_whole_one():
    """The newest of the documents with the most shapes is shown."""
    long = SHAPE | {"B": 1, "T": 2048}
    whole = [row("triton", 300.0, "backend", shape=shape) for shape in (SHAPE, long)]
    newer = [row("triton", 400.0, "backend", shape=shape) for shape in (SHAPE, long)]
    short = [row("triton", 500.0, "backend")]

    def shown(*documents):
        lines = pictures.attention(list(documents)).data["passes"]["forward"]
        return lines["triton"]["points"][0][1]

    old = document(*whole, date="2026-01-02")
    assert shown(old, document(*short, date="2026-01-04")) == 300.0
    assert shown(document(*newer, date="2026-01-03"), old) == 400.0


def test_the_reference_is_not_shown_as_ours():
    """On a GPU it is PyTorch's choice, which is also a peer under its own name."""
    rows = row("triton", 300.0, "backend"), row("reference", 400.0, "backend")
    assert set(attention(*rows).data["passes"]["forward"]) == {"triton"}
