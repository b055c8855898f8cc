"""The model equals transformers' GPT-2, is the same fast and plain, and compiled and not."""

import math

import numpy as np
import pytest
import torch
from late import refused
from small_models import SMALL, ids, loss_and_gradients, model_in
from util import DEVICE, DTYPES, assert_close_to, bits_equal, launches

from gpt2 import Config, Model, kernels


def seeded_logits(model, idx, seed=0):
    torch.manual_seed(seed)
    with torch.no_grad():
        return model(idx)[0]


# ---- against transformers


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_equals_transformers(dtype):
    """Logits, loss and every gradient, from the same random weights."""
    transformers = pytest.importorskip("transformers")
    c = SMALL
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd,
            n_layer=c.n_layer, n_head=c.n_head, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
            attn_implementation="eager", bos_token_id=0, eos_token_id=0,
        )
    ).to(dtype)  # fmt: skip
    ours = model_in(dtype=dtype).cpu()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            p.copy_(transposed(name, ours.get_parameter(name)))
    idx = torch.randint(c.vocab_size, (3, 33))
    targets = torch.randint(c.vocab_size, (3, 33))
    targets[0, 5:9] = -1

    logits, _ = ours(idx)
    _, loss = ours(idx, targets)
    output = theirs(idx)
    their_loss = torch.nn.functional.cross_entropy(
        output.logits.flatten(0, 1), targets.flatten(), ignore_index=-1
    )
    loss.backward(), their_loss.backward()

    tolerance = {"rtol": 0, "atol": 64 * torch.finfo(dtype).eps}
    assert torch.allclose(logits, output.logits, **tolerance)
    assert torch.allclose(loss, their_loss, **tolerance)
    gradients = dict(theirs.named_parameters())
    assert set(gradients) == {name for name, _ in ours.named_parameters()}
    for name, p in ours.named_parameters():
        assert torch.allclose(p.grad, transposed(name, gradients[name].grad), **tolerance), name


def transposed(name, weight):
    """transformers stores the four projections as (in, out), as the published checkpoints do."""
    projections = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    return weight.T if name.endswith(projections) else weight


def test_state_dict_names():
    names = set(Model(SMALL).state_dict())
    block = [
        *("ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias"),
        *("attn.c_proj.weight", "attn.c_proj.bias", "ln_2.weight", "ln_2.bias"),
        *("mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias"),
    ]
    want = {f"transformer.h.{i}.{name}" for i in range(SMALL.n_layer) for name in block}
    want |= {"transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"}
    assert names == want | {"transformer.ln_f.weight", "transformer.ln_f.bias"}


@pytest.mark.no_poison
def test_published_sizes(monkeypatch):
    """124M and 1.5B parameters, as published, counted without drawing weights."""
    for draw in ("normal_", "uniform_"):  # slow, and not needed here
        monkeypatch.setattr(torch.Tensor, draw, lambda x, *args, **kwargs: x)
    with torch.device("meta"):
        counts = {
            name: Model(Config.named(name)).num_params(non_embedding=False)
            for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
        }
    assert counts == {
        "gpt2": 124439808, "gpt2-medium": 354823168,
        "gpt2-large": 774030080, "gpt2-xl": 1557611200,
    }  # fmt: skip


def test_initialization():
    torch.manual_seed(0)
    config = Config(block_size=64, vocab_size=500, n_layer=8, n_head=4, n_embd=128)
    for name, p in Model(config).named_parameters():
        if "ln_" in name:
            assert (p == (1.0 if name.endswith("weight") else 0.0)).all(), name
        elif name.endswith("bias"):
            assert not p.any(), name
        else:
            std = 0.02 / math.sqrt(16) if name.endswith("c_proj.weight") else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.05), name
    assert Model(config)(ids(2, 64, 500).cpu(), ids(2, 64, 500).cpu())[1].item() == pytest.approx(
        math.log(500), rel=0.02
    )


# ---- fast against plain


@pytest.mark.grid
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", [1, 33, 48])
def test_fast_equals_plain(T, dtype, dropout, ran, accelerated):
    """Loss and every gradient of kernels and plain PyTorch, within twice the error. With dropout
    both modes use the same masks."""
    config = Config(**{**vars(SMALL), "dropout": dropout})
    model = model_in(config, DTYPES[dtype])
    idx, targets = ids(2, T), ids(2, T)
    targets[0, T // 2] = -1
    plain, plain_logits = loss_and_gradients(model, idx, targets), seeded_logits(model, idx)
    model.fast = True
    with kernels.use(accelerated), launches() as launched:
        fast = loss_and_gradients(model, idx, targets)
        # forward and backward of 2 x (attention, gelu) and 5 norms, and the loss
        assert len(launched) == 2 * (2 * 2 + 5) + 1
        logits = seeded_logits(model, idx)
    model.fast = False
    exact = loss_and_gradients(model.double(), idx, targets)
    exact_logits = seeded_logits(model, idx)
    assert_close_to(exact_logits, logits, plain_logits, "logits", factor=2)
    # The error of one number may be small by chance; the loss moves by as much as the logits.
    noise = (plain_logits - exact_logits).abs().max().item()
    assert (fast[0] - exact[0]).abs() <= 2 * noise
    for name in exact[1]:
        # The rounded activations of every lower layer affect a gradient; the scale of this noise is
        # the model's largest gradient.
        scale = max(g.double().square().mean().sqrt().item() for g in exact[1].values())
        assert_close_to(
            exact[1][name], fast[1][name], plain[1][name], name, factor=3, terms=scale / 8
        )
        ran(accelerated)


def test_dropout_is_drawn_anew_and_only_in_training(accelerated):
    model = model_in(Config(**{**vars(SMALL), "dropout": 0.5}), fast=True)
    idx = ids(1, 20)
    with kernels.use(accelerated):
        assert not bits_equal(model(idx)[0], model(idx)[0])
        model.eval()
        assert bits_equal(model(idx)[0], model(idx)[0])


def test_switching_is_one_attribute(accelerated, monkeypatch):
    for op in kernels.dispatch.OPS:
        monkeypatch.setitem(kernels.dispatch.PRIORITY, op, (accelerated,))
    model = model_in()
    idx = ids(2, 20)
    with launches() as launched:
        model(idx)
        assert not launched
        model.fast = True
        model(idx)
        assert set(launched) == {accelerated}
        launched.clear()
        model.fast = False
        model(idx)
        assert not launched


def test_fast_on_a_machine_that_cannot_says_so_and_works(monkeypatch):
    for backend in (kernels.triton, kernels.native.cuda, kernels.native.cpu):
        monkeypatch.setattr(backend, "why_not", lambda *args: "this test says so")
    kernels.dispatch._said.clear()
    model, idx = model_in(fast=True), ids(2, 20)
    with pytest.warns(UserWarning, match=r"falls back to plain PyTorch.*this test says so") as said:
        fast = model(idx, idx)[1]
    assert len({str(w.message) for w in said}) == len(said) == 4, "once for each op"
    model.fast = False
    assert bits_equal(fast, model(idx, idx)[1])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fast", [False, True])
def test_what_is_returned(fast, training, accelerated):
    model = model_in(fast=fast).train(training)
    idx = ids(2, 20)
    with kernels.use(accelerated if fast else "reference"):
        logits, loss = model(idx)
        assert logits.shape == (2, 20, 65) and loss is None
        logits, loss = model(idx, idx)
        assert (logits is None) == training and loss.shape == ()
        whole, same = model(idx, idx, return_logits=True)
        none, again = model(idx, idx, return_logits=False)
    assert whole.shape == (2, 20, 65) and none is None
    assert torch.allclose(same, loss) and torch.allclose(again, loss)


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode"])
def test_without_gradients(mode, accelerated):
    model, idx = model_in(fast=True), ids(2, 20)
    with kernels.use(accelerated):
        want = model(idx)[0]
        with getattr(torch, mode)():
            assert bits_equal(want, model(idx)[0])


# ---- torch.compile


# ---- errors


@pytest.mark.parametrize("bad", [-1, 65, 2**63 - 1])
def test_ids_out_of_range_are_named(bad, backend):
    model = model_in(fast=backend != "reference")
    idx = ids(2, 5)
    wrong = idx.clone()
    wrong[1, 3] = bad
    with kernels.use(backend):
        with refused(rf"idx must lie in \[0, 65\), got {bad}"):
            model(wrong)
        if bad != -1:
            for return_logits in (True, False):
                with refused(rf"targets must lie in \[0, 65\), got {bad}"):
                    model(idx, wrong, return_logits=return_logits)


@pytest.mark.parametrize(
    "idx, error, message",
    [
        (torch.zeros(1, 49).long(), ValueError, "at most block_size=48 tokens long, got T=49"),
        (torch.zeros(5).long(), ValueError, r"idx must have shape \(B, T\), got \(5,\)"),
        (torch.zeros(1, 5), TypeError, "idx must be an int64 tensor, got torch.float32"),
        ([[1]], TypeError, "idx must be an int64 tensor, got list"),
    ],
)
def test_bad_input_is_named(idx, error, message):
    with pytest.raises(error, match=message):
        Model(SMALL)(idx)


def test_targets_of_another_shape():
    with pytest.raises(ValueError, match=r"targets must have idx's shape \(1, 5\), got \(1, 4\)"):
        Model(SMALL)(torch.zeros(1, 5).long(), torch.zeros(1, 4).long())


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"n_head": 5}, ValueError, "n_embd must be divisible by n_head, got n_embd=32, n_head=5"),
        ({"n_layer": 0}, ValueError, "n_layer must be at least 1, got 0"),
        ({"vocab_size": 65.0}, TypeError, "vocab_size must be an int, got 65.0"),
        ({"dropout": 1.0}, ValueError, "dropout must be at least 0 and below 1, got 1.0"),
        ({"dropout": "0"}, TypeError, "dropout must be a number, got '0'"),
    ],
)
def test_bad_configurations_are_named(change, error, message):
    with pytest.raises(error, match=message):
        Config(**{**vars(SMALL), **change})


def test_sizes_may_be_numpy_s_integers():
    config = Config(*np.array([8, 20, 1, 2, 16]))
    assert config == Config(8, 20, 1, 2, 16) and type(config.n_layer) is int


def test_named_configurations():
    assert Config.named("gpt2") == Config()
    assert Config.named("gpt2-xl", dropout=0.1).dropout == 0.1
    with pytest.raises(ValueError, match=r"name must be one of gpt2, .*got 'gpt3'"):
        Config.named("gpt3")


@pytest.mark.filterwarnings("ignore:.*falls back to plain PyTorch")
@pytest.mark.parametrize("shape", [(1, 8), (0, 8), (2, 0)], ids=["ignored", "B0", "T0"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("return_logits", [None, True])
@pytest.mark.parametrize("fast", [False, True])
def test_a_batch_without_targets_changes_nothing(fast, return_logits, autocast, shape):
    """The loss is NaN, the mean of nothing, and the gradients are 0, so that adding them to those
    of another batch changes nothing. With fast=True they were NaN."""
    model = Model(Config(8, 20, 1, 1, 16), fast=fast).to(DEVICE)
    x = torch.randint(0, 20, (2, 8), device=DEVICE)
    model(x, x)[1].backward()
    before = [p.grad.clone() for p in model.parameters()]
    x = torch.randint(0, 20, shape, device=DEVICE)
    for ignored in (-1, -100):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            _, loss = model(x, torch.full_like(x, ignored), return_logits)
        assert loss.isnan() and loss.shape == ()
        loss.backward()
    for p, grad in zip(model.parameters(), before, strict=True):
        assert torch.equal(p.grad, grad)


@pytest.mark.parametrize("fast", [False, True])
def test_minus_100_is_ignored_beside_minus_1(fast):
    model = Model(Config(8, 20, 1, 1, 16), fast=fast).to(DEVICE)
    x = torch.randint(0, 20, (2, 8), device=DEVICE)
    ones, hundreds = x.clone(), x.clone()
    ones[:, ::3], hundreds[:, ::3] = -1, -100
    hundreds[0, 0] = -1
    assert torch.equal(model(x, ones)[1], model(x, hundreds)[1])
    assert not torch.equal(model(x, ones)[1], model(x, x)[1])
    with refused(r"targets must lie in \[0, 20\), got -2"):
        model(x, torch.full_like(x, -2))
