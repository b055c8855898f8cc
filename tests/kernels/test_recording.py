"""Recorded calls: a replay gives the bits of the Python code, and what must not be replayed is not.

Triton's launches are recorded in another process, with a driver that launches nothing. On a GPU the
tests of the ops and of training replay them, too.
"""

import contextlib
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from inputs import targets_in, tensor
from processes import ROOT, run_python
from torch.utils._python_dispatch import TorchDispatchMode
from util import DEVICE, bits_equal

from gpt2 import Config, Model, kernels
from gpt2.block import Block
from gpt2.kernels import autograd, dispatch, recorder, recording, reference

CALLS = recording.UNRECORDED + 1  # the last of them is recorded
pytestmark = pytest.mark.cpu_kernels


@pytest.fixture(autouse=True)
def started():
    assert recording.why_not() is None


@pytest.fixture
def in_python(monkeypatch):
    """The autograd functions that ran in Python, by name."""
    ran = []

    def call(function, *args, call=autograd.call):
        ran.append(function.__name__)
        return call(function, *args)

    monkeypatch.setattr(autograd, "call", call)
    monkeypatch.setattr("gpt2.kernels.block.call", call)
    return ran


@contextlib.contextmanager
def recorded(function):
    """function with its calls recorded, as for a public op."""
    call = recording.recorded(function)
    recording._sites[-1].start()
    yield call
    recording._sites.pop()


def gradients(function, args, options=None, spread=False):
    """The results, and the gradients of the tensors that require one, for random gradients of the
    results; with spread for one number, expanded."""
    found = function(*args, **(options or {}))
    outputs = found if isinstance(found, tuple) else (found,)
    wanted = [x for x in args if isinstance(x, torch.Tensor) and x.requires_grad]
    of_outputs = [
        torch.randn((), device=y.device).to(y.dtype).expand_as(y) if spread else torch.randn_like(y)
        for y in outputs
    ]
    return [*outputs, *torch.autograd.grad(outputs, wanted, of_outputs)]


def check_replay(function, make, options=None, spread=False, times=CALLS + 3, **context):
    """Calls function(*make(), **options) and its undecorated form, which is never replayed, several
    times with new values, and compares the bits."""
    for seed in range(times):
        found = []
        for run in (function, function.__wrapped__):
            torch.manual_seed(seed)
            with torch.autocast(DEVICE, **context) if context else contextlib.nullcontext():
                found.append(gradients(run, make(), options, spread))
        for ours, python in zip(*found, strict=True):
            assert bits_equal(ours, python), f"call {seed}"
            assert ours.stride() == python.stride()


def leaf(*shape, dtype=torch.float32):
    return tensor(*shape, dtype=dtype).requires_grad_()


def loss_inputs():
    return leaf(12, 33), targets_in(12, 33)


def head_inputs(dtype=torch.float32):
    return leaf(2, 6, 16, dtype=dtype), leaf(33, 16), targets_in(12, 33).view(2, 6)


CASES = {
    "causal_attention": lambda: [leaf(2, 9, 2, 16) for _ in "qkv"],
    "causal_attention-views": lambda: leaf(2, 9, 3, 2, 16).unbind(2),
    "causal_attention_qkv": lambda: (leaf(2, 9, 96), 2),
    "layer_norm": lambda: (leaf(3, 5, 32), leaf(32), leaf(32)),
    "layer_norm-alone": lambda: (leaf(3, 5, 32),),
    "layer_norm-frozen": lambda: (leaf(3, 5, 32), tensor(32), leaf(32)),
    "layer_norm-rows": lambda: (leaf(32, 5).t(), leaf(32), leaf(32)),
    "add_layer_norm": lambda: (leaf(3, 5, 32), leaf(3, 5, 32), leaf(32), leaf(32)),
    "add_layer_norm-mixed": lambda: (
        leaf(3, 5, 32, dtype=torch.bfloat16), leaf(3, 5, 32), leaf(32), leaf(32),
    ),
    "gelu": lambda: (leaf(7, 5),),
    "gelu-bf16": lambda: (leaf(7, 5, dtype=torch.bfloat16),),
    "bias_gelu": lambda: (leaf(7, 32), leaf(32)),
    "cross_entropy": loss_inputs,
    "linear_cross_entropy": head_inputs,
    "linear_cross_entropy-bf16": lambda: head_inputs(torch.bfloat16),
}  # fmt: skip


@pytest.mark.parametrize("spread", [False, True], ids=["dense", "expanded"])
@pytest.mark.parametrize("case", CASES)
def test_the_same_bits(case, spread, in_python):
    function = getattr(kernels, case.partition("-")[0])
    with kernels.use("cpu"):
        check_replay(function, CASES[case], spread=spread)
    # Every call of the undecorated form, and those of the op until it was recorded
    assert len(in_python) == 2 * CALLS + 3


@pytest.mark.parametrize("case", ["causal_attention_qkv", "linear_cross_entropy", "layer_norm"])
def test_autocast(case, in_python):
    function = getattr(kernels, case)
    with kernels.use("cpu"):
        check_replay(function, CASES[case], dtype=torch.bfloat16)
    assert len(in_python) == 2 * CALLS + 3


def test_autocast_is_part_of_the_kind():
    qkv = tensor(2, 9, 96)
    with kernels.use("cpu"):
        for i in range(4 * CALLS):
            with torch.autocast(DEVICE, torch.bfloat16, enabled=i % 2 == 0):
                y = kernels.causal_attention_qkv(qkv, 2)
            assert y.dtype == (torch.float32 if i % 2 else torch.bfloat16)


def test_gradients_of_some_inputs():
    """A block computes only the gradients that are asked for."""
    block = Block(Config(9, 65, 1, 2, 32)).to(DEVICE)
    x, s = leaf(2, 9, 32), leaf(2, 9, 32)
    every = (x, s, *block.parameters())
    with kernels.use("cpu"):
        for i in range(6 * CALLS):
            y, s2 = block(x, s, kernels)
            asked = slice(0 if i % 2 else 1, None, (i + 1) % 3 + 1)
            found = torch.autograd.grad((y.sum(), s2.square().sum()), every[asked])
            with recording.paused():
                y, s2 = block(x, s, kernels)
                expected = torch.autograd.grad((y.sum(), s2.square().sum()), every)
            assert all(map(bits_equal, found, expected[asked])), i


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", ["cross_entropy", "linear_cross_entropy"])
def test_options_of_a_loss(name, reduction, in_python):
    options = {"reduction": reduction, "label_smoothing": 0.25, "ignore_index": -1}

    def make():
        *given, targets = CASES[name]()
        return *given, targets.masked_fill(targets == -100, -1)

    with kernels.use("cpu"):
        check_replay(getattr(kernels, name), make, options)
    assert len(in_python) == 2 * CALLS + 3


def facts(x, option=None):
    """What Python code may depend on, as a tensor."""
    found = [
        x.dim(), x.shape[0], x.stride(0), x.data_ptr() % 16, x.dtype.itemsize, x.requires_grad,
        torch.is_grad_enabled(), torch.is_autocast_enabled(DEVICE),
        torch.get_autocast_dtype(DEVICE) == torch.float16, dispatch.forced() == "cpu",
        torch.backends.mkldnn.enabled, 1 if option is None else len(repr(option)), option == "bc",
        option == 3,
    ]  # fmt: skip
    return torch.stack([torch.full((), float(fact)) for fact in found])


def test_every_kind_of_call_has_its_own_recording():
    """Calls alternate that differ in one thing."""
    x = torch.ones(4, 4)
    given = [
        (x,), (x[:3],), (x[0],), (torch.ones(8, 8)[:4, :4],), (x.t()[:, :3],), (x[:, 1:],),
        (x.double(),), (x.clone().requires_grad_(),),
        *((x, option) for option in (1, 3, 1.5, True, "a", "bc", "b" * 20, float("nan"))),
    ]  # fmt: skip
    contexts = [
        torch.no_grad,
        lambda: torch.autocast(DEVICE, torch.bfloat16),
        lambda: torch.autocast(DEVICE, torch.float16),
        lambda: kernels.use("cpu"),
        lambda: kernels.use("reference"),
        lambda: torch.backends.mkldnn.flags(enabled=False),
    ]
    kinds = [(contextlib.nullcontext, args) for args in given]
    kinds += [(context, (x,)) for context in contexts]
    with recorded(facts) as call:
        for round in range(CALLS + 3):
            for context, args in kinds:
                with context():
                    assert torch.equal(call(*args), facts(*args)), (round, context, args)


def test_one_tensor_as_two_arguments():
    """q, k and v may be one tensor, and so may the gradients of two results."""
    one = [leaf(1, 5, 2, 16)] * 3
    with kernels.use("cpu"):
        check_replay(kernels.causal_attention, lambda: one)
        check_replay(kernels.causal_attention, CASES["causal_attention"])

        def both(run, same):
            args = CASES["add_layer_norm"]()
            outputs = run(*args)
            first = torch.randn_like(outputs[0])
            second = first if same else torch.randn_like(first)
            return torch.autograd.grad(outputs, args, (first, second))

        for same in (False, True) * 3 * CALLS:
            found = []
            for run in (kernels.add_layer_norm, kernels.add_layer_norm.__wrapped__):
                torch.manual_seed(0)
                found.append(both(run, same))
            assert all(map(bits_equal, *found)), same


def model_steps(model, steps, autocast=None, targets_only=False):
    """The losses of some steps, and all gradients, which accumulate over every two of them."""
    found = []
    for step in range(steps):
        torch.manual_seed(step)
        idx, targets = torch.randint(model.config.vocab_size, (2, 2, 16), device=DEVICE)
        targets[0, :3] = -1
        with torch.autocast(DEVICE, autocast or torch.bfloat16, enabled=autocast is not None):
            loss = model(idx, targets)[1]
        loss.backward()
        found.append(loss.detach())
        if step % 2:
            found += [p.grad for p in model.parameters() if p.grad is not None]
            model.zero_grad()
    return found


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["fp32", "autocast"])
@pytest.mark.parametrize("change", ["", "dropout", "frozen", "single ops"])
def test_steps_of_a_model(change, autocast, in_python):
    model = Model(Config(16, 65, 3, 2, 32, dropout=0.1 if change == "dropout" else 0.0), fast=True)
    model = model.to(DEVICE)
    if change == "frozen":
        for name, p in model.named_parameters():
            p.requires_grad_("c_attn" not in name and "ln_1" not in name)
    if change == "single ops":
        model.transformer.h[1].mlp.register_forward_hook(lambda *args: None)
    with kernels.use("cpu"):
        ours = model_steps(model, 8, autocast)
        ran = len(in_python)
        model_steps(model, 2, autocast)
        assert len(in_python) == ran, "the last steps are replayed"
        model.zero_grad()
        with recording.paused():
            assert all(map(bits_equal, ours, model_steps(model, 8, autocast)))


def test_parts_of_autograd():
    """Second derivatives, a second backward, changed tensors, hooks on saved tensors."""
    with kernels.use("cpu"):
        for _ in range(CALLS + 1):
            x, weight, bias = CASES["layer_norm"]()
            y = kernels.layer_norm(x, weight, bias)
            (dx,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
            expected = torch.autograd.grad(
                F.layer_norm(x, (32,), weight, bias).pow(3).sum(), x, create_graph=True
            )[0]
            ddx = torch.autograd.grad(dx.square().sum(), x)[0]
            wanted = torch.autograd.grad(expected.square().sum(), x)[0]
            torch.testing.assert_close(ddx, wanted, rtol=1e-3, atol=1e-2)

            y = kernels.layer_norm(x, weight, bias)
            first = torch.autograd.grad(y.sum(), x, retain_graph=True)[0]
            assert bits_equal(torch.autograd.grad(y.sum(), x)[0], first)
            with pytest.raises(RuntimeError, match="backward through the graph a second time"):
                y.sum().backward()

            y = kernels.layer_norm(x, weight, bias)
            with torch.no_grad():
                x += 1
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.sum().backward()

            packed = []

            def pack(x, packed=packed):
                packed.append(x.shape)
                return x.clone(memory_format=torch.contiguous_format)

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                y = kernels.layer_norm(x, weight, bias)
            assert len(packed) == 4
            torch.testing.assert_close(
                torch.autograd.grad(y.sum(), weight)[0], F.layer_norm(x, (32,)).sum((0, 1))
            )


def test_checkpointing_across_a_recording():
    """The first forward may run in Python and its repetition be replayed."""
    with kernels.use("cpu"):
        found = []
        for _ in range(2 * CALLS):
            torch.manual_seed(0)
            args = CASES["add_layer_norm"]()
            y, s = torch.utils.checkpoint.checkpoint(
                kernels.add_layer_norm, *args, use_reentrant=False
            )
            found.append(torch.autograd.grad((y * s).sum(), args))
        for gradients in found[1:]:
            assert all(map(bits_equal, found[0], gradients))


class Watching(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.ops.append(op)
        return op(*args, **(kwargs or {}))


class Own(torch.Tensor):
    pass


def test_who_must_see_python(in_python):
    """Modes, transforms, subclasses, forward-mode derivatives and torch.compile never get a replay,
    however often the same call was recorded before."""
    x = leaf(3, 8)
    with kernels.use("cpu"):
        for _ in range(CALLS + 1):
            kernels.gelu(x)
        ran = len(in_python)
        kernels.gelu(x)
        assert len(in_python) == ran
        with Watching() as mode:
            kernels.gelu(x)
        assert len(in_python) == ran + 1 and mode.ops
        kernels.gelu(x.as_subclass(Own))
        assert len(in_python) == ran + 2
        with torch.inference_mode():
            kernels.gelu(torch.ones(3, 8, device=DEVICE))
        assert len(in_python) == ran + 3
    x = x.detach()
    reference = F.gelu(x, approximate="tanh")
    for _ in range(CALLS + 1):
        kernels.gelu(x)
    torch.testing.assert_close(torch.func.vmap(kernels.gelu)(x), reference)
    tangent = torch.ones_like(x)
    _, found = torch.func.jvp(kernels.gelu, (x,), (tangent,))
    expected = torch.func.jvp(lambda x: F.gelu(x, approximate="tanh"), (x,), (tangent,))[1]
    torch.testing.assert_close(found, expected)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        got = torch.autograd.forward_ad.unpack_dual(kernels.gelu(dual)).tangent
        torch.testing.assert_close(got, expected)
    negated = torch.complex(x, x).conj().imag  # not yet in memory
    assert negated.is_neg()
    torch.testing.assert_close(kernels.gelu(negated), F.gelu(-x, approximate="tanh"))


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


def test_hooks_of_saved_tensors_may_wait_and_run_backwards():
    """Two threads in one node's backward, and a backward of a node inside its own, hung."""
    run(
        START
        + """
import faulthandler, threading, time
faulthandler.dump_traceback_later(60, exit=True)
recording.UNRECORDED = 2
recording.start()
for _ in range(5):
    node()
inside, ones = [], torch.ones(2, 8)
def unpack(saved):
    time.sleep(0.05)
    if nested and not inside:
        inside.append(1)
        torch.autograd.grad(y, x, ones, retain_graph=True)
    return saved
for nested in (False, True):
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, unpack):
        y = kernels.gelu(x)
    assert type(y.grad_fn).__name__ == "CppFunction"
    def backward():
        torch.autograd.grad(y, x, ones, retain_graph=True)
    threads = [threading.Thread(target=backward) for _ in range(1 if nested else 3)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
assert inside
"""
    )


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


def run(body):
    done = run_python(body)
    assert done.returncode == 0, done.stderr
    return done.stdout


START = """
import torch
from gpt2 import kernels
from gpt2.kernels import recording
x = torch.ones(2, 8, requires_grad=True)
def node():
    return type(kernels.gelu(x).grad_fn).__name__
"""


def test_it_starts_by_itself_after_some_calls():
    said = run(
        START
        + """
import time
recording.LOAD_AFTER_SECONDS = 0
names = [node() for _ in range(recording.LOAD_AFTER)]
assert set(names) == {"GeluBackward"}
for _ in range(600):
    if node() == "CppFunction":
        break
    time.sleep(0.01 if recording.libraries.decided("replay") else 0.2)
else:
    raise SystemExit("never replayed")
with torch.no_grad():
    assert kernels.gelu(x).grad_fn is None
"""
    )
    assert not said


def test_it_can_be_turned_off(monkeypatch):
    monkeypatch.setenv("GPT2_KERNELS_REPLAY", "0")
    run(
        START
        + """
assert recording.start() == "GPT2_KERNELS_REPLAY=0"
assert {node() for _ in range(200)} == {"GeluBackward"}
"""
    )


def test_importing_starts_no_compiler():
    run(
        """
import sys
import gpt2.kernels.recording
assert "torch._dynamo" not in sys.modules
assert not gpt2.kernels.recording.libraries.decided("replay")
"""
    )


def test_recording_does_not_import_the_compiler():
    """torch._dynamo takes seconds to import."""
    run(
        START
        + """
import sys
recording.start()
for _ in range(recording.UNRECORDED + 2):
    last = node()
assert last == "CppFunction", last
assert "torch._dynamo" not in sys.modules
"""
    )


@pytest.mark.triton
@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU has a driver of its own")
def test_launches():
    """A replay launches the same kernels in the same order with the same arguments, at the
    addresses of the new tensors."""
    done = run_python(
        f"""
import sys
sys.path[:0] = [{str(ROOT / "benchmarks")!r}]
import torch
from bench.host import stub_driver
if (reason := stub_driver.why_not()) is not None:
    sys.exit(f"skip: {{reason}}")
from triton.backends.nvidia.driver import CudaLauncher
from gpt2 import kernels
from gpt2.kernels import recording
from gpt2.block import Block
from gpt2 import Config

launches, run = [], CudaLauncher.__call__
names = {{}}
def address(x):
    return x.data_ptr() if isinstance(x, torch.Tensor) else x
def noted(self, *args):
    flat = []
    for x in args:
        flat += map(address, x) if isinstance(x, tuple) else [address(x)]
    del flat[8:11]  # what Triton gives to hooks that do not exist
    launches.append((id(self), flat))
    return run(self, *args)
CudaLauncher.__call__ = noted
recording.UNRECORDED = 2

def pass_of(block, x, s):
    "The launches of forward and backward, with addresses in place of which no two are equal."
    launches.clear()
    y, s2 = block(x, s, kernels)
    torch.autograd.grad((y, s2), (x, s, *block.parameters()), (torch.ones_like(y),) * 2)
    known = {{p.data_ptr(): name for name, p in block.named_parameters()}}
    known |= {{x.data_ptr(): "x", s.data_ptr(): "s"}}
    return [(run, [known.get(v, v if abs(v) < 1 << 32 else "temporary")
                   if isinstance(v, int) else v for v in flat]) for run, flat in launches]

with stub_driver.active(), kernels.use("triton"):
    assert recording.start() is None
    block, found = Block(Config(16, 65, 1, 2, 32)), []
    for i in range(recording.UNRECORDED + 4):
        x, s = (torch.zeros(2, 16, 32, requires_grad=True) for _ in "xs")
        y, _ = block(x, s, kernels)
        found.append((type(y.grad_fn).__name__, pass_of(block, x, s)))
    assert found[0][0] == "_BlockBackward" and found[-1][0] == "CppFunction", found
    assert len(found[0][1]) >= 8
    for name, launched in found:
        assert launched == found[0][1], (launched, found[0][1])

    from triton import knobs
    seen = []
    knobs.runtime.launch_enter_hook.add(lambda metadata: seen.append(1))
    pass_of(block, x, s)
    assert len(seen) == len(found[0][1]), "a profiler's hook is called"
"""
    )
    if done.stderr.startswith("skip: "):
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    "changes, said",
    [
        ({}, "yes"),
        ({"GPT2_KERNELS_REPLAY": "0"}, "no: GPT2_KERNELS_REPLAY=0"),
        ({"GPT2_KERNELS_REPLAY": "off"}, "no: GPT2_KERNELS_REPLAY=off"),
        ({"GPT2_KERNELS_CACHE": "{empty}"}, "python -m gpt2.kernels build --replay"),
        ({"GPT2_KERNELS_CACHE": "{empty}", "CXX": "none"}, "CXX is 'none', which cannot be run"),
    ],
    ids=["yes", "off", "another word", "not built", "no compiler"],
)
def test_report(changes, said, tmp_path):
    changes = {name: value.format(empty=tmp_path) for name, value in changes.items()}
    done = run_python("from gpt2.kernels import recording; print(recording.report())", **changes)
    assert done.stdout.startswith("replay of calls: ") and done.stdout.rstrip().endswith(said)
    assert not list(tmp_path.iterdir()), "nothing was built"
