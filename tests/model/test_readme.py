"""All code blocks of README.md and of the user pages in docs run in order, unchanged and without a
network.

Python blocks share one namespace. gpt2 commands in shell blocks run in this process, in a folder
with the files that they name; tiny weights and a small BPE replace the published ones. Commands
that install, build or run other programs are listed as exceptions; there are no others.
"""

import contextlib
import io
import itertools
import re
import shlex

import pytest
from processes import ROOT

from gpt2 import Config, Model
from gpt2.checkpoints import hub
from gpt2.cli import main
from gpt2.data import tokenizers

pytestmark = pytest.mark.usefixtures("without_the_interpreter")

PAGES = [ROOT / page for page in ("README.md", "docs/kernels.md", "docs/interop.md")]
TEXT = (
    "To be, or not to be, that is the question.\n\nWhether 'tis nobler in the mind to suffer " * 40
)
QUESTION = '{"ctx": "To be", "endings": ["or not", "to be"], "label": 0}\n'

ELSEWHERE = {  # run in installing, building and testing
    'pip install -c constraints.txt -e ".[test]" && pytest tests/',
    'pip install -c constraints.txt -e ".[eval]"',
    "python -m gpt2.interop.lm_eval run --model gpt2_kernels --model_args pretrained=gpt2 "
    "--tasks hellaswag",
    "python -m gpt2.kernels build",
    "make wheel",
}
INSTALL = "pip install -c constraints.txt -e . && "
QUICK = {  # options that make a command faster without changing its behaviour
    "train": ["--steps", "1", "--sample-tokens", "2", "--eval-batches", "1", "--batch-size", "2"],
    "sample": ["--max-new-tokens", "3"],
}


def blocks(language):
    texts = [page.read_text(encoding="utf-8") for page in PAGES]
    found = [re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S) for text in texts]
    return [code for name, code in itertools.chain(*found) if name == language]


def commands():
    """The lines of the shell blocks, without comments."""
    lines = "".join(block for block in blocks("") if not block.startswith("gpt2/ ")).splitlines()
    return [line for line in (re.sub(r"\s+#.*$", "", line) for line in lines) if line]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with the files of the examples; published names need no network."""
    monkeypatch.chdir(tmp_path)
    small = tokenizers.train_bpe([TEXT], 300)
    published = tmp_path / "published"
    Model(Config(256, small.vocab_size, 1, 2, 8)).save_pretrained(published)
    monkeypatch.setattr(hub, "download", lambda name, patterns: published)
    monkeypatch.setattr(tokenizers, "gpt2", lambda folder=None: small)
    for name in ("shakespeare.txt", "text.txt", "corpus.txt"):
        (tmp_path / name).write_text(TEXT)
    (tmp_path / "prompts.txt").write_text("To be\nor not\n")
    (tmp_path / "hellaswag_val.jsonl").write_text(QUESTION)
    for name in ("corpus", "out"):
        (tmp_path / name).mkdir()
    (tmp_path / "corpus" / "a.txt").write_text(TEXT)
    return tmp_path


def test_every_python_block_runs_as_it_stands(place):
    pytest.importorskip("transformers", minversion="5.4")
    found, namespace, out = blocks("python"), {}, io.StringIO()
    assert len(found) >= 4
    with contextlib.redirect_stdout(out):
        for code in found:
            exec(compile(code, "README.md", "exec"), namespace)
    assert out.getvalue() and (place / "out" / "model.safetensors").is_file()
    assert (place / "out" / "tokenizer.json").is_file()
    assert namespace["out"].shape == (4, 84)


def test_every_command_runs_or_is_listed(place, capsys):
    found = commands()
    assert sum(line.startswith("gpt2 ") for line in found) >= 9
    assert set(found) >= ELSEWHERE
    for line in found:
        line = line.removeprefix(INSTALL)
        if line in ELSEWHERE:
            continue
        program, *arguments = shlex.split(line)
        assert program == "gpt2", line
        more = QUICK.get(arguments[0], [])
        assert main([*arguments, *more]) == 0, (line, capsys.readouterr().err)
    assert (place / "runs/shakespeare/checkpoint.safetensors").is_file()
    assert (place / "bpe.json").read_text().startswith("{")
