"""Training from existing weights: a run starts from exactly these, and does not need their files
again."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from runs import TEXT, TINY, interrupted_after
from safetensors.torch import load_file
from util import bits_equal

from gpt2 import Config, Model, loading
from gpt2.checkpoints import checkpoint, huggingface, weights
from gpt2.cli import main
from gpt2.data import shards, tokenizers
from gpt2.errors import InputError
from gpt2.train import pretrained
from gpt2.train.start import Trainer, resume, train

CONFIG = Config(block_size=32, vocab_size=256, n_layer=2, n_head=2, n_embd=16)
CHOSEN = {k: v for k, v in TINY.items() if k not in ("block_size", "n_layer", "n_head", "n_embd")}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a text, and a model of bytes in Hugging Face's format."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    Model(CONFIG).save_pretrained("hf")
    return tmp_path


def started(**chosen):
    options = pretrained.options(**{**CHOSEN, "data": "text.txt", **chosen})
    start = pretrained.start(options)
    trainer = Trainer(options, start.tokenizer)
    trainer.start_from(start)
    return trainer


def test_it_begins_with_the_model_and_its_sizes(place):
    trainer = started(init="hf", tokenizer="byte")
    expected = huggingface.read_state(place / "hf", CONFIG)
    state = trainer.model.to_state()
    assert trainer.model.config == CONFIG and trainer.corpus.tokenizer.name == "byte"
    assert all(bits_equal(state[name], expected[name]) for name in expected)
    assert trainer.options.lr == 3e-5
    path = place / "hf" / huggingface.CONFIG
    path.write_text(path.read_text().replace('"attn_pdrop": 0.0', '"attn_pdrop": 0.1'))
    trainer = started(init="hf", tokenizer="byte", lr=1e-3, block_size=8, dropout=0.1)
    state = trainer.model.to_state()
    assert bits_equal(state[weights.WPE], expected[weights.WPE][:8])
    assert trainer.model.config == Config(8, 256, 2, 2, 16, 0.1) and trainer.options.lr == 1e-3
    assert trainer.model.lm_head.weight is trainer.model.transformer.wte.weight


@pytest.mark.parametrize(
    "stop", [pytest.param(1, marks=pytest.mark.full), 7], ids="stop-at-{}".format
)
def test_a_run_goes_on_without_the_model_it_began_with(stop, place, monkeypatch):
    """Bit for bit as without the interruption; and the result can be sampled."""
    chosen = {"init": "hf", "tokenizer": "byte", "data": "text.txt", "block_size": 16}
    options = {**CHOSEN, **chosen, "dropout": 0.1, "lr": 1e-2}
    assert train(pretrained.options(**options, out="whole")) == 0
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", interrupted_after(stop))
        assert train(pretrained.options(**options, out="cut")) == 130
    shutil.rmtree("hf")
    assert resume("cut") == 0
    whole, cut = (load_file(place / run / checkpoint.FILE) for run in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert loading.load("cut")[1].name == "byte"
    with pytest.raises(InputError, match="init cannot be changed by --resume, got 'whole'"):
        resume("cut", init="whole")


def test_a_run_of_ours_brings_its_tokenizer(place, capsys):
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in TINY.items()]
    assert main(["train", "--data", "text.txt", "--out", "run", *flags]) == 0
    chosen = [f"--{k.replace('_', '-')}={v}" for k, v in CHOSEN.items() if k != "steps"]
    more = ["train", "--init", "run", "--data", "text.txt", *chosen, "--steps", "2", "--out"]
    assert main([*more, "tuned"]) == 0
    text = (place / "run" / tokenizers.FILE).read_text()
    assert (place / "tuned" / tokenizers.FILE).read_text() == text
    spec = {"init": "run", "tokenizer": "run/tokenizer.json"}  # the run's own, by name
    assert started(**spec).corpus.tokenizer.name == "char"
    before, after = (loading.load(run)[0] for run in ("run", "tuned"))
    assert before.config == after.config
    change = (before.transformer.wte.weight - after.transformer.wte.weight).abs().max()
    assert 0 < change < 1e-4  # two steps of 3e-5, not of the 4e-3 for random weights


def test_gpt2s_tokenizer_by_default_where_it_fits(place, monkeypatch):
    with pytest.raises(InputError, match="tokenizer must be that of init 'hf', got 'char'"):
        started(init="hf", tokenizer="char")
    three = tokenizers.char("abc")
    monkeypatch.setattr(tokenizers, "gpt2", lambda f: three)
    with pytest.raises(InputError, match="'hf': the tokenizer must fit its vocab_size 256, got 3"):
        started(init="hf")
    asked = []
    monkeypatch.setattr(tokenizers, "gpt2", lambda f: asked.append(f) or tokenizers.byte())
    assert started(init="hf").model.config.vocab_size == 256
    assert asked == [None]


@pytest.mark.parametrize("rows", [200, 256, 257, 304])
def test_a_run_has_the_ids_of_its_tokenizer(rows, place):
    """If the embedding is padded, or smaller than the tokenizer, a run keeps the rows that both
    have; sample and --resume do the same."""
    Model(replace(CONFIG, vocab_size=rows)).save_pretrained("other")
    options = {"init": "other", "tokenizer": "byte", "data": "text.txt", "block_size": 16}
    assert train(pretrained.options(**{**CHOSEN, **options, "out": "run"})) == 0
    model, tokenizer = loading.load("run")
    assert model.config.vocab_size == tokenizer.vocab_size == min(rows, 256)
    assert resume("run", steps=CHOSEN["steps"] + 1) == 0
    if rows < 256:
        (place / "text.txt").write_text("😀" * 1000)
        with pytest.raises(InputError, match=r"text.txt': text must be made of the model's 200 id"):
            started(**options)


def test_shards_of_another_tokenizer_are_refused(place):
    """Ids of one vocabulary are meaningless in another of the same size."""
    (place / "shards").mkdir()
    for part in ("train", "val"):
        shards.write(place / "shards" / f"{part}_0.bin", np.arange(200) % 256)
    assert started(init="hf", tokenizer="byte", data="shards").corpus.tokenizer.name == "byte"
    other = tokenizers.char(map(chr, range(100, 356)))
    (place / "shards" / tokenizers.FILE).write_text(other.to_json())
    with pytest.raises(InputError, match=r"train_0.bin' must be made with the model's tokenizer"):
        started(init="hf", tokenizer="byte", data="shards")


def test_nothing_is_written_where_the_weights_are_broken(place):
    file = place / "hf" / huggingface.FILE
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(InputError, match=r"model.safetensors' cannot be read"):
        train(pretrained.options(**CHOSEN, init="hf", tokenizer="byte", data="text.txt", out="new"))
    assert not (place / "new").exists()
