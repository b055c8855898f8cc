"""Generation with a cache equals generation without one, and a sampled text depends only on its
prompt and seed."""

import copy

import pytest
import torch
from small_models import SMALL, ids, model_in
from util import DEVICE, assert_close_to, bits_equal, launches

from gpt2 import Config, kernels
from gpt2.generate import decoding
from gpt2.generate.decode_layers import DecodeLayers
from gpt2.generate.decoding import Cached, Rows, Sampling
from gpt2.generate.kv_cache import Cache, Decode, Prefill
from gpt2.generate.quantize import quantize_int8

GREEDY = Sampling(temperature=0.0)
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11]]


def texts(model, prompts, n, sampling=GREEDY, **kwargs):
    """The continuation of each prompt, as lists without the -1 after a stop."""
    steps = [t.tolist() for t in decoding.tokens(model, prompts, n, sampling, **kwargs)]
    return [[t for t in row if t >= 0] for row in zip(*steps, strict=True)]


def runs_of(model, monkeypatch):
    """A list that receives the (B, T) of every forward of the model, and of every replay of a CUDA
    graph.

    A capture computes nothing, so it is not in the list.
    """
    shapes, captured = [], []
    hidden, replay = model.hidden, getattr(torch.cuda.CUDAGraph, "replay", None)

    def noted(ids, *cache):
        capturing = DEVICE == "cuda" and torch.cuda.is_current_stream_capturing()
        (captured if capturing else shapes).append(tuple(ids.shape))
        return hidden(ids, *cache)

    def replayed(graph):
        shapes.extend(captured)
        replay(graph)

    model.hidden = noted
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", replayed, raising=False)
    return shapes


# ---- the cache


def test_greedy_equals_the_cacheless_reference(backend):
    """Token by token, for prompts of different lengths and beyond block_size: each token is the
    best after those before it, or within rounding of the best."""
    model = model_in().eval()
    model.fast = backend != "reference"
    n = 60 if backend in ("reference", "cpu") else 6  # emulation is slow
    with kernels.use(backend):
        found = texts(model, PROMPTS, n)
    model.fast = False
    exact_model = copy.deepcopy(model).double()
    for prompt, text in zip(PROMPTS, found, strict=True):
        assert len(text) == n
        for i, token in enumerate(text):
            seen = torch.tensor([[*prompt, *text[:i]][-SMALL.block_size :]], device=DEVICE)
            with torch.no_grad():
                exact, plain = (m(seen)[0][0, -1] for m in (exact_model, model))
            noise = (
                2 * (plain - exact).abs().max() + torch.finfo(plain.dtype).eps * exact.abs().max()
            )
            assert exact[token] >= exact.max() - 2 * noise, f"{prompt}, token {i}"  # both err


@pytest.mark.parametrize("chunk", [1, 2, 5, 100])
def test_logits_equal_the_full_forward_s(chunk, backend, monkeypatch, ran):
    """Prefill in chunks, each with its last query at the last key so far; then token by token."""
    if chunk != 2 and backend in ("triton", "cuda"):
        pytest.skip("chunks are the same code on every backend")
    monkeypatch.setattr(decoding, "CHUNK", chunk * len(PROMPTS))
    model = model_in(fast=backend != "reference").eval()
    exact, plain = model_in().double().eval(), model_in().eval()
    for other in (exact, plain):
        other.load_state_dict(model.state_dict())
    rows = Rows(PROMPTS, torch.device(DEVICE))
    with torch.no_grad(), kernels.use(backend), launches() as launched:
        cached = Cached(model, rows, 16)
        for step in range(3):
            logits = cached.logits()
            for b, n in enumerate(rows.counts):
                truth = exact(rows.ids[b : b + 1, :n])[0][:, -1]
                yardstick = plain(rows.ids[b : b + 1, :n])[0][:, -1]
                what, largest = f"step {step}, row {b}", truth.abs().max().item()
                assert_close_to(truth, logits[b : b + 1], yardstick, what, factor=2, terms=largest)
                ran(backend)
            rows.append(torch.tensor([7, 8, 9], device=DEVICE), [True] * 3)
    assert backend == "reference" or set(launched) == {backend}


def test_a_cache_reads_nothing_beyond_a_sequence(backend):
    """Old content of the cache, even NaN, does not reach the logits."""
    model, rows = model_in(fast=True).eval(), Rows(PROMPTS, torch.device(DEVICE))
    results = []
    for rubbish in (0.0, float("nan")):
        with torch.no_grad(), kernels.use(backend):
            cached = Cached(model, rows, 12)
            first = cached.logits()
            for b, n in enumerate(rows.counts):
                cached.cache.kv[:, b, n:] = rubbish
            token = torch.tensor([[1], [2], [3]], device=DEVICE)
            results.append(torch.stack([first, cached._decode(token, rows.lengths)]))
    assert bits_equal(*results)


def test_past_tokens_are_computed_once(monkeypatch):
    """The prompts once, then one token each; beyond block_size, the last block_size tokens."""
    model = model_in(fast=True)
    shapes = runs_of(model, monkeypatch)
    with kernels.use("reference"):
        texts(model, [[1, 2, 3], [4] * 45], 6)
    assert shapes == [(2, 45), *[(2, 1)] * 3, *[(2, 48)] * 2]


def test_a_prefill_has_no_more_than_chunk_tokens_at_a_time(monkeypatch):
    monkeypatch.setattr(decoding, "CHUNK", 8)
    model = model_in(fast=True)
    shapes = runs_of(model, monkeypatch)
    with kernels.use("reference"):
        texts(model, PROMPTS, 1)
    assert shapes == [(3, 2), (3, 2), (3, 2), (3, 1)]


@pytest.mark.usefixtures("without_the_interpreter")
def test_under_autocast_the_cache_is_of_its_dtype():
    model, rows = model_in(fast=True).eval(), Rows(PROMPTS, torch.device(DEVICE))
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
        cached = Cached(model, rows, 12)
        assert cached.cache.kv.dtype == torch.bfloat16 and cached.layers is None
        for _ in range(2):
            want = decoding.recomputed(model, rows)
            assert (cached.logits() - want).abs().max() < 0.05 * want.std()
            rows.append(torch.tensor([7, 8, 9], device=DEVICE), [True] * 3)


def test_rows_that_have_ended_grow_no_more():
    rows = Rows([[1, 2], [3]], torch.device("cpu"))
    for token, growing in ((4, [True, True]), (5, [False, True]), (6, [False, True])):
        rows.append(torch.tensor([token, token]), growing)
    assert rows.counts == rows.lengths.tolist() == [3, 4]
    assert rows.ids[0, :3].tolist() == [1, 2, 4] and rows.ids[1, :4].tolist() == [3, 4, 5, 6]
    assert rows.last().tolist() == [[4], [6]]
    ids, lengths = rows.window(3)
    assert ids.tolist() == [[1, 2, 4], [4, 5, 6]] and lengths.tolist() == [3, 3]


@pytest.mark.parametrize("int8", [False, True], ids=["whole", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_all_blocks_as_one_call_have_the_bits_of_the_blocks(dtype, int8, cpu_backend, monkeypatch):
    config = Config(block_size=40, vocab_size=65, n_layer=3, n_head=2, n_embd=96)
    model = model_in(config, fast=True).to(dtype).eval()
    if int8:
        quantize_int8(model)
    prompts = [[1, 2, 3], [4], [9] * 7, [5, 5]]
    results = []
    for serve in (DecodeLayers.serve, lambda x, B: False):
        monkeypatch.setattr(DecodeLayers, "serve", staticmethod(serve))
        rows = Rows(prompts, torch.device("cpu"))
        with torch.no_grad(), kernels.use("cpu"):
            cached = Cached(model, rows, 12)
            assert (cached.layers is None) == bool(results)
            steps = [cached.logits()]
            for _ in range(3):
                rows.append(torch.tensor([3, 1, 4, 1]), [True, True, False, True])
                steps.append(cached.logits())
        results.append((torch.stack(steps), cached.cache.kv))
    (fused, fused_kv), (plain, plain_kv) = results
    assert bits_equal(fused, plain) and bits_equal(fused_kv, plain_kv)


def layers_of(model, B=1):
    with kernels.use("cpu"):
        return decoding.decode_layers(model, model.transformer["wte"].weight, B)


@pytest.mark.cpu_kernels
def test_what_is_not_a_gpt_2_is_named():
    """test_decode_layers.py tests the errors of the layers themselves."""
    model = model_in().eval()
    model.transformer["h"][1].mlp.c_fc.bias.data = torch.ones(3)
    with pytest.raises(ValueError, match=r"layers\[1\].fc.bias must have shape \(128,\)"):
        layers_of(model)
    mixed = quantize_int8(model_in())
    mixed.transformer["h"][0].attn.c_proj = model_in().transformer["h"][0].attn.c_proj
    with pytest.raises(ValueError, match="layers must be int8 as a whole or not at all"):
        layers_of(mixed)
    assert layers_of(model_in(), B=9) is None, "more sequences than a few"
    with pytest.raises(ValueError, match="T must be 1 to block_size=48 tokens, got 49"):
        Cache(SMALL, 1, 49)


@pytest.mark.cpu_kernels
def test_the_raw_op_passes_opcheck():
    layers = layers_of(model_in().eval(), B=2)
    args = (torch.ones(2, 32), layers.params, [], *layers.norm, torch.zeros(2, 2, 8, 2, 2, 16),
            torch.tensor([0, 3]), 2, 1e-5, "cpu")  # fmt: skip
    torch.library.opcheck(torch.ops.gpt2_kernels.decode_layers.default, args)


def test_forms_of_the_cache_take_gradients_nowhere(backend):
    """Prefill and decode by hand, as users of hidden() would."""
    model = model_in(fast=backend != "reference").eval()
    cache = Cache(SMALL, 2, 8, device=DEVICE)
    idx = ids(2, 5)
    with torch.no_grad(), kernels.use(backend):
        full = model.hidden(idx)
        first = model.hidden(idx[:, :4], Prefill(cache, 0, 4))
        last = model.hidden(idx[:, 4:], Decode(cache, torch.tensor([4, 4], device=DEVICE)))
    assert torch.allclose(torch.cat([first, last], 1), full, rtol=1e-4, atol=1e-5)
    assert cache.room == 8


# ---- generate


def test_generate(backend):
    model, idx = model_in(fast=backend != "reference"), ids(2, 5)
    with kernels.use(backend):
        out = model.generate(idx, 7, seed=1)
        assert out.shape == (2, 12) and torch.equal(out[:, :5], idx)
        assert torch.equal(out, model.generate(idx, 7, seed=1))
        assert not torch.equal(out, model.generate(idx, 7, seed=2))
        streamed = torch.cat([idx, *model.stream(idx, 7, seed=1)], dim=1)
    assert torch.equal(out, streamed)
    assert model.training, "left as it was"


def test_generate_does_not_look_at_dropout():
    model = model_in(Config(**{**vars(SMALL), "dropout": 0.9}))
    idx = ids(1, 5)
    a, b = (model.generate(idx, 20, temperature=0.0) for _ in range(2))
    assert torch.equal(a, b)


@pytest.mark.usefixtures("slow_when_emulated")
def test_compiled_model_trains_evaluates_and_samples_without_recompiling_per_length(accelerated):
    model = model_in(fast=True)
    compiled = torch.compile(model, backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    with kernels.use(accelerated):
        for mode in (True, False):
            compiled.train(mode)
            for T in (5, 6):
                compiled(ids(1, T), ids(1, T))
        before = dict(torch._dynamo.utils.counters["stats"])
        for mode in (True, False):
            compiled.train(mode)
            for T in (7, 9, 12):
                compiled(ids(1, T), ids(1, T))
        assert compiled.generate(ids(1, 5), 4, temperature=0.0).shape == (1, 9)
        assert dict(torch._dynamo.utils.counters["stats"]) == before, "compiled again"
    torch.compiler.reset()


# ---- sampling


# ---- int8


def test_int8_model_is_near_and_keeps_its_scales():
    config = Config(block_size=40, vocab_size=65, n_layer=2, n_head=2, n_embd=96)
    model = model_in(config, fast=True).eval()
    idx = ids(2, 20)
    with torch.no_grad():
        whole, loss = model(idx, idx)
        quantize_int8(model)
        assert not any(p.requires_grad for p in model.parameters())
        for fast in (True, False):
            model.fast = fast
            logits, loss8 = model(idx, idx)
            assert 0 < (logits - whole).abs().max() < 0.1 * whole.std()
            assert abs(loss8 - loss) < 0.02
            assert model(idx, idx, return_logits=False)[0] is None
    model.bfloat16()
    assert model.lm_head.scale.dtype == torch.float32 and model.lm_head.weight.dtype == torch.int8
    assert model.generate(idx, 3, temperature=0.0).shape == (2, 23)
