"""Recorded calls: what must not be replayed is not, and what must happen at each call does."""

import threading
import weakref

import pytest
import torch
from inputs import tensor
from recorded import CALLS, CASES, leaf, loss_inputs, recorded
from util import DEVICE, bits_equal

from gpt2 import kernels
from gpt2.kernels import autograd, recorder, recording, reference

pytestmark = [pytest.mark.cpu_kernels, pytest.mark.usefixtures("replaying")]


@pytest.mark.parametrize("name", ["cross_entropy", "linear_cross_entropy"])
def test_ids_are_checked_at_each_call(name):
    *given, targets = CASES[name]()
    function = getattr(kernels, name)
    with kernels.use("cpu"):
        for _ in range(CALLS + 2):
            function(*given, targets)
            bad = targets.clone()
            bad.view(-1)[-1] = 33
            with pytest.raises(ValueError, match=r"targets must lie in \[0, 33\), got 33"):
                function(*given, bad)
            function(*given, targets.masked_fill(targets >= 0, -100))
            apart = torch.zeros(24, dtype=torch.int64, device=DEVICE)[::2].view(targets.shape)
            function(*given, apart)
            apart.view(-1)[-1] = -7
            with pytest.raises(ValueError, match="got -7"):
                function(*given, apart)


def test_random_numbers_are_drawn_at_each_call():
    x = torch.ones(2, 9, 96, device=DEVICE)
    with kernels.use("cpu"):
        found, states = [], []
        for _ in range(CALLS + 2):
            torch.manual_seed(3)
            kernels.causal_attention_qkv(x, 2, dropout_p=0.5)
            found.append(kernels.causal_attention_qkv(x, 2, dropout_p=0.5))
            states.append(torch.get_rng_state())
        assert all(bits_equal(found[0], y) for y in found)
        assert all(torch.equal(states[0], state) for state in states)
        assert not bits_equal(found[0], kernels.causal_attention_qkv(x, 2, dropout_p=0.5))


OUTSIDE = torch.tensor(3.0)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.full((4,), x.sum().item()),
        lambda x: x * 2 if x.sum() > 0 else x,
        lambda x: x * OUTSIDE,
        lambda x: torch.as_strided(x, (3,), (1,), x.storage_offset() + 1),
        lambda x: x + torch.tensor([1.0, 2.0, 3.0, 4.0]),
        lambda x: torch.full((4,), float(len(x[x > 0]))),
    ],
    ids=["item", "bool", "outside", "as_strided", "constant", "dynamic shape"],
)
def test_not_recorded(function):
    """A replay of these would give wrong results."""
    with recorded(function) as call:
        for i in range(4 * CALLS):
            x = torch.randn(12)[4 * (i % 2) :][:4]  # equally aligned, elsewhere in its storage
            assert torch.equal(call(x), function(x))
        assert OUTSIDE == 3


def test_in_place_loss_gradient_is_not_recorded():
    """It changes the version of the logits, so that a second backward is refused."""
    with kernels.use("cpu"):
        for _ in range(CALLS + 3):
            leaf_of, targets = loss_inputs()
            loss = kernels.cross_entropy(leaf_of * 1, targets, inplace_backward=True)
            loss.backward(retain_graph=True)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()


@pytest.mark.parametrize("replay", [False, True], ids=["recording", "replay"])
def test_memory_is_freed_as_in_python(replay):
    """Each intermediate result, after its last use."""
    refs, alive, ran = [], [], []

    def watch(x):
        if noting := recorder.current():
            noting.python(watch, x)
            return
        alive.append(sum(ref() is not None for ref in refs))
        refs.append(weakref.ref(x))

    def function(x):
        ran.append(1)
        for _ in range(4):
            x = x * 2
            watch(x)
        return x

    with recorded(function) as call:
        for _ in range(CALLS + replay):
            refs.clear(), alive.clear()
            y = call(torch.ones(3))
    assert torch.equal(y, torch.full((3,), 16.0))
    assert alive == [0, 0, 0, 0] and len(ran) == CALLS


def test_sums_are_handed_on():
    """A norm's backward attaches the sum of its result; a replayed backward finds and attaches it
    too, and does not use it once the tensor has changed."""

    class Summed(torch.autograd.Function):
        uses_sums = True

        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * 1

        @staticmethod
        def backward(ctx, dout):
            given = recorder.attached_sum(dout)
            total = dout.sum() if given is None else given * 100
            dx = dout + total
            recorder.attach_sum(dx, dx.sum())
            return dx

    with recorded(lambda x: autograd.call(Summed, x)) as call:
        for i in range(3 * CALLS):
            x = torch.ones(2, requires_grad=True)
            one = torch.full((2,), float(i))
            if i % 3:
                recorder.attach_sum(one, torch.tensor(7.0 + i))
            if i % 3 == 2:
                one += 1
            (dx,) = torch.autograd.grad(call(x), x, one)
            total = (7.0 + i) * 100 if i % 3 == 1 else one.sum()
            assert torch.equal(dx, one + total), i
            assert torch.equal(recorder.attached_sum(dx), dx.sum())
            dx += 1
            assert recorder.attached_sum(dx) is None


def test_plain_pytorch_is_not_recorded(monkeypatch):
    """Its operators choose others by settings of the process (sdpa_kernel)."""
    ran = []

    def attend(*args, attend=reference.causal_attention_qkv, **options):
        ran.append(1)
        return attend(*args, **options)

    monkeypatch.setattr(reference, "causal_attention_qkv", attend)
    with kernels.use("reference"):
        for _ in range(CALLS + 2):
            kernels.causal_attention_qkv(leaf(1, 8, 48), 1)
    assert len(ran) == CALLS + 2


def test_a_setting_that_changes_during_a_recording():
    """Another thread may force a backend for a moment, and the Python code read it."""
    ran = []

    def force():
        with kernels.use("reference"):
            pass

    def function(x):
        ran.append(1)
        if len(ran) == CALLS:  # the call that is recorded
            thread = threading.Thread(target=force)
            thread.start()
            thread.join()
        return x * 2

    with recorded(function) as call:
        for _ in range(CALLS + 3):
            call(torch.ones(3))
    assert len(ran) == CALLS + 1, "recorded one call later"


def test_a_name_is_not_a_text():
    x, weight = leaf(3, 8), tensor(8)
    with kernels.use("cpu"):
        for _ in range(CALLS + 1):
            kernels.layer_norm(x, weight=weight)
        try:
            kernels.layer_norm(x, "weight", weight)
        except TypeError as error:
            said = str(error)
        else:
            said = "nothing"
        assert said == "weight must be a tensor, got str"


def test_starting_again_changes_nothing():
    x = leaf(3, 8)
    with kernels.use("cpu"):
        for _ in range(CALLS + 1):
            kernels.gelu(x)
        calls = [site.call for site in recording._sites]
        with recording.paused():
            assert recording.start() is None
        assert recording.start() is None
        assert calls == [site.call for site in recording._sites]
        assert type(kernels.gelu(x).grad_fn).__name__ == "CppFunction"


def test_threads():
    """Calls of several threads, while some are recorded, and backwards on threads of their own."""
    errors = []

    def work(seed):
        try:
            for T in range(2, 12):
                x = torch.randn(1, T, 96).requires_grad_()
                expected = None
                for _ in range(CALLS + 2):
                    with kernels.use("cpu"):
                        y = kernels.causal_attention_qkv(x, 2)
                    (dx,) = torch.autograd.grad(y.sum(), x)
                    expected = dx if expected is None else expected
                    assert bits_equal(dx, expected)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
