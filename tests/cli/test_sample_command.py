"""gpt2 sample and gpt2 alone, as users call them: escapes, invalid prompts, help."""

import json
import re
import subprocess
import sys

import pytest
import torch

from gpt2 import Config, Model, __version__, bars, files
from gpt2.checkpoints import checkpoint
from gpt2.cli import main
from gpt2.cli.sample import _unescaped
from gpt2.data.tokenizer import char
from gpt2.errors import InputError
from gpt2.generate import completion

pytestmark = pytest.mark.usefixtures("without_the_interpreter")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose model generates anything, newlines included."""
    folder = tmp_path_factory.mktemp("made") / "run"
    folder.mkdir()
    torch.manual_seed(0)
    config = Config(block_size=16, vocab_size=4, n_layer=1, n_head=1, n_embd=8)
    checkpoint.write(folder / checkpoint.FILE, config, Model(config).to_state(), step=0)
    (folder / "tokenizer.json").write_text(char("ab\n\\").to_json())
    return folder


# ---- the command alone


def test_alone_it_prints_its_help(capsys):
    assert main([]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("usage: gpt2 ") and printed.err == ""
    for command in ("train", "sample", "eval", "convert", "prepare", "tokenizer", "--version"):
        assert command in printed.out


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"gpt2-kernels {__version__}\n"


# ---- --stop


ESCAPES = {
    r"\n\n": "\n\n",
    r"\t\r": "\t\r",
    r"\\n": "\\n",
    r"a\\\n": "a\\\n",
    r"\x41\xe9": "Aé",
    r"\u0041\u20ac": "A€",
    "\n": "\n",
    "é": "é",
}


@pytest.mark.parametrize(("written", "meant"), ESCAPES.items(), ids=ESCAPES)
def test_escapes_in_stop_are_read(written, meant):
    assert _unescaped(written) == meant


@pytest.mark.parametrize("bad", ["\\", r"a\q", r"\x4", r"\xg0", r"\u004", r"\ud800", "\\\n", r"\N"])
def test_an_escape_that_is_not_known_is_one_line(bad, run, capsys):
    assert main(["sample", str(run), "--stop", bad]) == 2
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert line.startswith(
        r"gpt2: error: stop must have no escapes but \n, \r, \t, \\, \xNN and \uNNNN, got"
    )
    assert printed.out == ""


def test_a_stop_of_two_newlines_ends_a_text(run, capsys):
    """As in README: the shell passes a backslash and an n."""
    flags = ["--seed", "5", "--max-new-tokens", "400", "--jsonl"]
    assert main(["sample", str(run), *flags]) == 0
    free = json.loads(capsys.readouterr().out)
    assert "\n\n" in free["text"] and free["finish"] == "length"
    assert main(["sample", str(run), *flags, "--stop", r"\n\n"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["finish"] == "stop"
    assert free["text"].startswith(found["text"] + "\n\n") and "\n\n" not in found["text"]


# ---- --prompts


def test_a_prompt_beside_prompts_is_an_error(run, tmp_path, capsys):
    (tmp_path / "p").write_text("a\n")
    for flags in (["--prompt", "a"], ["--prompt", ""]):
        assert main(["sample", str(run), "--prompts", str(tmp_path / "p"), *flags]) == 2
        printed = capsys.readouterr()
        (line,) = printed.err.splitlines()
        assert re.match(r"gpt2: error: argument --prompts?: not allowed with argument --p", line)
        assert printed.out == ""


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl"])
def test_a_byte_order_mark_is_dropped(name, tmp_path):
    path = tmp_path / name
    text = "one\ntwo\ufeff\n" if name == "p.txt" else '{"prompt": "one"}\n{"prompt": "two\ufeff"}\n'
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert completion.read_prompts(str(path)) == ["one", "two\ufeff"]
    assert files.read_lines("choices", path)[0][0] != "\ufeff"


BAD = {
    # file name, second line, expected message, prompt as far as it can be read
    "not in the alphabet": ("p", b"abQ", r"character 'Q' \(U\+0051\) is not among", "abQ"),
    "not UTF-8": ("p", b"ab\xff", "must be UTF-8, got 0xff at byte 2 of the line", "ab\ufffd"),
    "no object": ("p.jsonl", b"nonsense", 'must be {"prompt": TEXT}', "nonsense"),
    "half a pair": ("p.jsonl", rb'{"prompt": "\ud800"}', "got half a surrogate pair", "?"),
}


@pytest.mark.parametrize(("name", "line", "message", "prompt"), BAD.values(), ids=BAD)
def test_a_bad_prompt_names_its_line(name, line, message, prompt, run, tmp_path, capsys):
    """One bad prompt of a thousand stopped them all, without naming it."""
    path = tmp_path / name
    good = b'{"prompt": "a"}' if name.endswith("l") else b"a"
    path.write_bytes(b"\n".join([good, line, good, b""]))
    flags = ["sample", str(run), "--prompts", str(path), "--max-new-tokens", "3", "--seed", "1"]
    assert main(flags) == 2
    printed = capsys.readouterr()
    (error,) = printed.err.splitlines()
    assert re.match(rf"gpt2: error: prompts '.*{name}', line 2.* ?{message}", error)
    assert printed.out == "", "nothing is sampled before"

    assert main([*flags, "--jsonl", "--num-samples", "2"]) == 0
    printed = capsys.readouterr()
    found = [json.loads(row) for row in printed.out.splitlines()]
    assert [row["prompt"] for row in found] == ["a", "a", prompt, prompt, "a", "a"]
    for row in found[2:4]:
        assert set(row) == {"prompt", "error"}
        assert re.match(rf"prompts '.*{name}', line 2.* ?{message}", row["error"])
    assert all("text" in row for row in found[:2] + found[4:])
    assert "gpt2: 2 of 6 texts have an error" in printed.err


def test_choices_name_the_line_that_is_not_utf_8(tmp_path):
    (tmp_path / "q").write_bytes(b"fine\nab\xff\n")
    with pytest.raises(
        InputError, match=r"choices '.*q', line 2 must be UTF-8, got 0xff at byte 2"
    ):
        files.read_lines("choices", tmp_path / "q")


# ---- bars


@pytest.mark.parametrize("seen", [True, False])
def test_off_a_terminal_progress_comes_every_ten_seconds(seen, monkeypatch):
    """eval wrote ten lines a second into a log file."""
    monkeypatch.setattr(bars.sys.stderr, "isatty", lambda: seen, raising=False)
    with bars.bar(total=3, disable=False) as bar:
        assert bar.mininterval == (0.2 if seen else 10.0)


def test_every_bar_is_made_in_one_place():
    from pathlib import Path

    import gpt2

    for path in Path(gpt2.__file__).parent.glob("*.py"):
        if path.name != "bars.py":
            assert "tqdm(" not in path.read_text(encoding="utf-8"), path.name


# ---- int8


@pytest.mark.parametrize("command", ["sample", "eval"])
def test_flags_of_int8(command, run, tmp_path, capsys):
    (tmp_path / "t").write_text("abab")
    given = ["--data", str(tmp_path / "t")] if command == "eval" else []
    for flags, message in (
        (["--quantize", "int4"], "quantize must be int8 or absent, got int4"),
        (["--quantize-data", "x"], "quantize_data must be absent without quantize, got x"),
    ):
        assert main([command, str(run), *given, *flags]) == 2
        assert capsys.readouterr().err == f"gpt2: error: {message}\n"


# ---- the harness


def test_without_lm_eval_the_harness_is_one_line(tmp_path):
    """It was a traceback of twenty lines."""
    code = (
        "import sys, runpy; sys.modules['lm_eval'] = None\n"
        "sys.argv = ['gpt2.interop.lm_eval', 'run']\n"
        "try: import gpt2.interop.lm_eval\n"
        "except ImportError as e: print(e)\n"
        "runpy.run_module('gpt2.interop.lm_eval', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("gpt2: error: lm-evaluation-harness is needed (")
    assert line.endswith('): pip install "gpt2-kernels[eval]"')
    assert done.stdout.startswith("lm-evaluation-harness is needed (")
