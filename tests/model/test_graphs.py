"""gpt2.graphed: replayed steps equal eager steps, bit for bit, and what cannot be replayed runs
eagerly. Without a GPU a list of operators takes the place of a graph (tools/fake_graphs.py)."""

import itertools
import warnings
from contextlib import nullcontext

import pytest
import torch
from late import ON_GPU, refused
from small_models import SMALL, ids, model_in
from util import DEVICE, bits_equal

import gpt2
from gpt2 import Config, graphs, kernels

DROPOUT = Config(**{**vars(SMALL), "dropout": 0.1})

pytestmark = [
    pytest.mark.no_poison,
    pytest.mark.usefixtures("without_the_interpreter", "captures"),
    pytest.mark.filterwarnings("error"),
]


def eager(model):
    def step(idx, targets):
        _, loss = model(idx, targets)
        with torch.autocast(DEVICE, enabled=False):
            loss.backward()
        return loss.detach()

    return step


def two_models(config=SMALL, fast=True):
    model = model_in(config, fast=fast)
    other = model_in(config, fast=fast)
    other.load_state_dict(model.state_dict())
    return model, other


def train(model, step, batches, accumulate=1, set_to_none=True, after=lambda k: None):
    """The losses of steps over the batches, and the gradients of the last."""
    torch.manual_seed(5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for k, batch in enumerate(batches):
        if k % accumulate == 0:
            optimizer.zero_grad(set_to_none=set_to_none)
        losses.append(step(*batch))
        if (k + 1) % accumulate == 0:
            optimizer.step()
        after(k)
    return [*losses, *(p.grad.clone() for p in model.parameters()), *model.parameters()]


def assert_equal(got, want):
    assert len(got) == len(want)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert bits_equal(a, b), f"result {i} differs: {a.flatten()[:3]}, {b.flatten()[:3]}"


@pytest.mark.parametrize("fast", [False, True])
def test_fifty_steps(fast, captures):
    model, other = two_models(DROPOUT, fast)
    batches = [(ids(2, 7), ids(2, 7)) for _ in range(50)]
    got = train(model, gpt2.graphed(model), batches)
    assert (captures.captures, captures.replays) == (1, 49)
    assert_equal(got, train(other, eager(other), batches))


@pytest.mark.parametrize("set_to_none", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_accumulation(accumulate, set_to_none, captures):
    """make_graphed_callables returns its static gradients, which autograd adopts as .grad: the
    second part of a step then overwrote the first, and the sum was wrong without an error."""
    model, other = two_models(DROPOUT)
    batches = [(ids(2, 7), ids(2, 7)) for _ in range(12)]
    got = train(model, gpt2.graphed(model), batches, accumulate, set_to_none)
    assert captures.replays >= 8
    assert_equal(got, train(other, eager(other), batches, accumulate, set_to_none))


@pytest.mark.parametrize("set_to_none", [False, True])
def test_changing_shapes(set_to_none, captures):
    """All graphs write to the same gradients, whichever of them came first."""
    model, other = two_models(DROPOUT)
    shapes = [(1, 5), (1, 5), (2, 7), (1, 5), (2, 7), (2, 7), (1, 5), (3, 4), (2, 7), (3, 4)] * 2
    batches = [(ids(*shape), ids(*shape)) for shape in shapes]
    got = train(model, gpt2.graphed(model), batches, 2, set_to_none)
    assert captures.replays >= 8
    assert_equal(got, train(other, eager(other), batches, 2, set_to_none))


def test_settings(captures):
    """Whatever the computation depends on leads to another graph."""
    model, other = two_models(DROPOUT)
    batches = [(ids(2, 7), ids(2, 7))] * 18

    def changing(step, model):
        settings = itertools.cycle(["none", "autocast", "eval", "plain", "dropout", "reference"])

        def run(*batch):
            setting = next(settings)
            model.train(setting != "eval")
            model.fast = setting != "plain"
            for block in model.transformer.h:
                block.mlp.dropout = 0.5 if setting == "dropout" else 0.1
            forced = kernels.use("reference") if setting == "reference" else nullcontext()
            with forced, torch.autocast(DEVICE, torch.bfloat16, enabled=setting == "autocast"):
                return step(*batch)

        return run

    got = train(model, changing(gpt2.graphed(model), model), batches)
    assert (captures.captures, captures.replays) == (6, 12)
    assert_equal(got, train(other, changing(eager(other), other), batches))


def test_weights_are_read_at_the_replay():
    """Autocast's cache holds weights converted before the capture. Plain layers use it; a block as
    a whole converts its weights itself."""
    model, other = two_models()
    model.fast = other.fast = False
    batches = [(ids(2, 7), ids(2, 7)) for _ in range(6)]
    with torch.autocast(DEVICE, torch.bfloat16):
        got = train(model, gpt2.graphed(model), batches)
    want = []
    with torch.autocast(DEVICE, torch.bfloat16, cache_enabled=False):
        want = train(other, eager(other), batches)
    assert_equal(got, want)


def test_bad_ids_are_named(captures):
    """A replay runs none of the model's checks."""
    model = model_in(fast=True)
    step = gpt2.graphed(model)
    idx = ids(2, 7)
    for _ in range(3):
        step(idx, idx)
    wrong = idx.clone()
    wrong[1, 2] = 65
    ignored = torch.where(idx < 30, -100, idx)
    step(idx, ignored)
    for batch, name in (((wrong, idx), "idx"), ((idx, wrong), "targets")):
        with refused(rf"{name} must lie in \[0, 65\), got 65"):
            step(*batch)


def hooked(model):
    model.transformer.h[0].mlp.register_forward_hook(lambda *args: None)


def hooked_parameter(model):
    model.lm_head.weight.register_post_accumulate_grad_hook(lambda p: None)


def frozen(model):
    model.transformer.wpe.weight.requires_grad_(False)


def moved(model):
    for p in model.parameters():
        p.data = p.data.clone()


def gradient_replaced(model):
    model.lm_head.weight.grad = model.lm_head.weight.grad.clone()


def gradient_dropped(model):
    model.lm_head.weight.grad = None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (hooked, "a module has hooks"),
        (hooked_parameter, "a parameter has hooks"),
        (frozen, "parameters were replaced, moved or frozen"),
        (moved, "parameters were replaced, moved or frozen"),
        (gradient_replaced, "gradients were replaced"),
        (gradient_dropped, "some parameters have gradients"),
    ],
)
def test_what_a_replay_would_miss_runs_eagerly(change, reason, captures):
    model, other = two_models(DROPOUT)
    batches = [(ids(2, 7), ids(2, 7)) for _ in range(8)]

    def changed(model):
        return lambda k: change(model) if k == 6 else None

    with pytest.warns(UserWarning, match=reason) as warned:
        got = train(model, gpt2.graphed(model), batches, 8, after=changed(model))
    assert len(warned) == 1 and captures.replays == 5
    assert_equal(
        [x for x in got if x is not None],
        train(other, eager(other), batches, 8, after=changed(other)),
    )


@pytest.mark.parametrize("mode", ["anomaly", "cpu", "wrapped"])
def test_reasons_before_any_capture(mode, captures, monkeypatch):
    model = model_in(fast=True)
    idx = ids(2, 7)
    if mode == "anomaly":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            anomaly = torch.autograd.detect_anomaly()
        with anomaly, pytest.warns(UserWarning, match="anomaly detection is on"):
            gpt2.graphed(model)(idx, idx)
    elif mode == "cpu":
        monkeypatch.setattr(graphs, "supports", lambda device: False)
        step = gpt2.graphed(model)
        with pytest.warns(UserWarning, match="not on a CUDA GPU") as warned:
            step(idx, idx)
            step(idx, idx)
        assert len(warned) == 1
    else:
        with pytest.warns(UserWarning, match="is a Wrapper, not a gpt2.Model"):
            gpt2.graphed(Wrapper(model))(idx, idx)
    assert model.lm_head.weight.grad is not None and captures.captures == 0


def test_wrong_calls_are_named():
    model, idx = model_in(fast=True), ids(2, 7)
    for wrong in (None, torch.nn.Identity(), "gpt2"):
        with pytest.raises(TypeError, match=r"model must be a gpt2\.Model, got"):
            gpt2.graphed(wrong)
    step = gpt2.graphed(model)
    with pytest.raises(TypeError, match="targets must be an int64 tensor, got NoneType"):
        step(idx, None)
    with pytest.raises(TypeError, match="scale must be a number, got 'half'"):
        step(idx, idx, "half")
    with pytest.raises(ValueError, match="scale must be a number or a floating tensor of one, got"):
        step(idx, idx, torch.ones(2))
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode, pytest.raises(RuntimeError, match="gradients, but they are disabled here"):
            step(idx, idx)
    model.requires_grad_(False)
    with pytest.raises(RuntimeError, match="but no parameter requires one"):
        step(idx, idx)


def test_a_model_that_was_moved_runs_eagerly():
    """The scale follows the loss to its device and dtype."""
    model, other = two_models(fast=False)
    step, batch = gpt2.graphed(model), (ids(2, 7), ids(2, 7))
    with pytest.warns(UserWarning, match="replaced, moved or frozen|not on a CUDA GPU"):
        step.scale = step.scale.double()  # of another kind than the loss, as after a move
        step.model.transformer.wpe.weight = torch.nn.Parameter(model.transformer.wpe.weight.clone())
        step(*batch, 0.5)
    (other(*batch)[1] * 0.5).backward()
    assert bits_equal(model.lm_head.weight.grad, other.lm_head.weight.grad)


@pytest.mark.parametrize("graph", [True, False], ids=["graph", "eager"])
def test_scaled_gradients(graph, captures, monkeypatch):
    model, other = two_models()
    monkeypatch.setattr(graphs, "supports", lambda device: graph)
    with warnings.catch_warnings():
        warnings.simplefilter("default" if graph else "ignore")
        step = gpt2.graphed(model)
        for scale in (0.5, 0.5, torch.tensor([3.0], device=DEVICE), 1, 0.5, 0.25):
            batch = ids(2, 7), ids(2, 7)
            loss = step(*batch, scale)
            want = other(*batch)[1]
            (want * scale).sum().backward()
            assert bits_equal(loss, want.detach())
            for p, q in zip(model.parameters(), other.parameters(), strict=True):
                assert bits_equal(p.grad, q.grad)
    assert (captures.captures > 0) == graph


class Wrapper(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.module = model

    def forward(self, *args):
        return self.module(*args)


@pytest.mark.skipif(ON_GPU, reason="an invalidated capture may leave PyTorch's generator unusable")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_failed_capture_runs_eagerly(accumulate, captures, monkeypatch):
    model, other = two_models(DROPOUT)
    batches = [(ids(2, 7), ids(2, 7)) for _ in range(6)]
    loss = torch.Tensor.backward

    def broken(self, *args):
        loss(self, *args)
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "backward", broken)
        with pytest.warns(UserWarning, match="RuntimeError: operation not permitted") as warned:
            got = train(model, gpt2.graphed(model), batches, accumulate)
    assert len(warned) == 1 and captures.replays == 0
    assert_equal(got, train(other, eager(other), batches, accumulate))


def test_the_number_of_graphs_is_bounded(captures, monkeypatch):
    monkeypatch.setattr(graphs, "LIMIT", 2)
    model, other = two_models(DROPOUT)
    batches = [(ids(1, T), ids(1, T)) for T in (3, 4, 5, 3, 4, 5, 3, 4, 5)]
    with pytest.warns(UserWarning, match="2 CUDA graphs are held") as warned:
        got = train(model, gpt2.graphed(model), batches)
    assert len(warned) == 1 and (captures.captures, captures.replays) == (2, 4)
    assert_equal(got, train(other, eager(other), batches))
