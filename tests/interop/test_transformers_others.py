"""transformers' other models with our attention: computed by kernels, left to PyTorch, or
refused."""

import pytest
import torch
from their_gpt2 import MARKS, transformers

from gpt2 import interop
from gpt2.errors import InputError
from gpt2.interop import transformers_attention as theirs

pytestmark = MARKS

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
}
MODELS = {  # type of model: (its options, whether the kernels compute it)
    "gpt2": ({"vocab_size": 50, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 2}, True),
    "gpt_neox": (SIZES, True),
    "llama": (SIZES | {"num_key_value_heads": 2}, True),
    "mistral": (SIZES | {"num_key_value_heads": 1, "sliding_window": 4}, False),
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_other_models(kind, monkeypatch, recwarn):
    """The logits are the same by kernels, or by SDPA with a warning."""
    options, served = MODELS[kind]
    interop.register_attention()
    theirs._said.clear()
    models, calls, attend = [], [], theirs._attend
    monkeypatch.setattr(theirs, "_attend", lambda *a, **k: (calls.append(1), attend(*a, **k))[1])
    for implementation in ("gpt2_kernels", "eager"):
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(kind, **options)
        models.append(transformers.AutoModelForCausalLM.from_config(
            config, attn_implementation=implementation).eval())  # fmt: skip
    idx = torch.randint(3, 50, (2, 9))
    with torch.no_grad():
        got, want = (model(idx).logits for model in models)
    assert torch.allclose(got, want, atol=1e-5)
    said = [w for w in recwarn if "left to PyTorch's SDPA" in str(w.message)]
    assert len(calls) == (2 if served else 0) and len(said) == (0 if served else 1)


def test_a_model_with_attention_of_its_own_is_refused():
    """BLOOM ignored the implementation, and added our boolean mask to its scores."""
    interop.register_attention()
    config = transformers.BloomConfig(vocab_size=50, hidden_size=32, n_layer=1, n_head=2)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="gpt2_kernels"
    )
    with pytest.raises(InputError, match="needs a model that transformers can run with SDPA"):
        model(torch.ones(1, 4, dtype=torch.int64))
