"""Sampling from int8 weights: the loss of quality is reported, and such a model cannot be saved."""

import pytest
from small_models import model_in

from gpt2 import Config, Model
from gpt2.data import documents
from gpt2.data.tokenizer import byte, char
from gpt2.errors import InputError
from gpt2.generate import quantize

pytestmark = pytest.mark.usefixtures("without_the_interpreter")
BYTES = Config(block_size=16, vocab_size=256, n_layer=2, n_head=2, n_embd=16)


def test_a_quantised_model_is_not_saved(tmp_path):
    model = quantize.quantize_int8(Model(BYTES))
    with pytest.raises(InputError, match="model must have floating weights to be saved"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_cost_of_int8_is_that_of_the_model_itself():
    ids = byte().encode("To be, or not to be, that is the question. " * 4)
    model, twin = model_in(BYTES).eval(), model_in(BYTES).eval()
    twin.load_state_dict(model.state_dict())
    before, after = quantize.measured(model, ids)
    quantize.quantize_int8(twin)
    from gpt2.evaluate import scoring

    assert after.nats == scoring.perplexity(twin, ids).nats != before.nats
    assert abs(after.nats_per_token - before.nats_per_token) < 0.01


def test_an_excerpt_leaves_out_what_cannot_be_encoded(tmp_path):
    (tmp_path / "t").write_text("ab\nqq\nba\nabba\n")
    tokenizer = char("ab\n")
    assert tokenizer.decode(documents.excerpt(str(tmp_path / "t"), tokenizer, 7)) == "ab\nba\na"
    assert (
        tokenizer.decode(documents.excerpt(str(tmp_path / "t"), tokenizer, 99)) == "ab\nba\nabba\n"
    )
    assert len(documents.excerpt(str(tmp_path / "t"), char("x"), 9)) == 0
    assert len(documents.excerpt(None, byte(), 1000)) == 1000
