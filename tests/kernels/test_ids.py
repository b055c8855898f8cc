"""Checks of ids that do not wait for the device: what is raised, when, and what is computed
meanwhile. On a CPU a device whose results come late takes the place of a GPU (tools/late.py)."""

import math

import pytest
import torch
from late import Waits
from small_models import ids, model_in
from util import DEVICE, bits_equal

from gpt2 import Config, kernels
from gpt2.kernels import ids as checks

HERE = torch.zeros(0, device=DEVICE).device
OUTSIDE = [-1, 65, 2**63 - 1, -(2**63)]


def check(*values, name="idx", ignore_index=None):
    checks.validate(torch.tensor(values, device=DEVICE), name, 65, ignore_index)


@pytest.mark.parametrize("bad", OUTSIDE)
def test_the_next_check_names_an_id(bad, late):
    check(0, 64)
    check(3, bad, 5)
    check(1, name="targets")
    late.finish()
    which = rf"\(check 2 of the 2 of idx on {HERE} so far\)"
    with pytest.raises(ValueError, match=rf"^idx must lie in \[0, 65\), got {bad} {which}$"):
        check(7)
    late.finish()
    check(7)
    checks.raise_pending(HERE, wait=True)


@pytest.mark.parametrize("ignored", [None, -1, -100, 3, 65])
def test_each_id_on_a_cpu(ignored):
    for value in (*OUTSIDE, 0, 3, 64, -2, -100):
        for values in ([value], [0, value, 64]):
            found = torch.tensor(values)
            if 0 <= value < 65 or value == ignored:
                checks.validate(found, "idx", 65, ignored)
            else:
                with pytest.raises(ValueError, match=rf"^idx must lie in .*, got {value}$"):
                    checks.validate(found, "idx", 65, ignored)
    checks.validate(torch.zeros(0, dtype=torch.int64), "idx", 65, ignored)


def test_nothing_is_read_before_it_arrives(late):
    """The pinned memory holds something else until then."""
    check(65)
    for _ in range(3):
        check(1)
    checks.raise_pending(HERE)
    assert late.waits == 0
    with pytest.raises(ValueError, match="check 1 of the 4"):
        checks.raise_pending(HERE, wait=True)
    assert late.waits == 1


def test_more_checks_than_slots(late):
    """A slot is not written again before it has been read."""
    check(65)
    for _ in range(checks.SLOTS - 1):
        check(1)
    with pytest.raises(ValueError, match="check 1 of "):
        check(1)


@pytest.mark.parametrize("ignored", [-1, -100, 3])
def test_ignored_targets(ignored, late):
    check(0, ignored, 64, ignore_index=ignored)
    checks.raise_pending(HERE, wait=True)
    for bad in (-2, 65):
        check(0, ignored, bad, ignore_index=ignored)
        with pytest.raises(ValueError, match=f"got {bad}"):
            checks.raise_pending(HERE, wait=True)
    check(ignore_index=ignored)
    checks.raise_pending(HERE, wait=True)


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("bad", OUTSIDE)
def test_a_bad_id_computes_nan(bad, fast, late):
    """No table is read or written outside, and neither loss, logits nor gradients are numbers."""
    model = model_in(fast=fast)
    idx, targets = ids(2, 5), ids(2, 5)
    wrong = idx.clone()
    wrong[1, 3] = bad
    late.finish()
    for given in ((wrong, targets), (idx, wrong if bad != -1 else wrong - 1)):
        model.zero_grad()
        _, loss = model(*given, return_logits=False)
        loss.backward()
        assert loss.isnan()
        assert model.transformer.wte.weight.grad.isnan().any()
        with pytest.raises(ValueError, match=r"must lie in \[0, 65\), got"):
            checks.raise_pending(HERE, wait=True)
    logits, _ = model(wrong)
    assert logits.isnan().all()
    with pytest.raises(ValueError, match=rf"idx must lie in \[0, 65\), got {bad}"):
        checks.raise_pending(HERE, wait=True)


@pytest.mark.parametrize("op", ["cross_entropy", "linear_cross_entropy"])
def test_the_fallback_guards_targets(op, late):
    """PyTorch's own loss would end in an assertion on the device, after which no call works. The
    same holds for the second derivative of a kernel's loss."""
    x, weight = torch.randn(3, 8, device=DEVICE), torch.randn(8, 8, device=DEVICE)
    inputs = (x, weight) if op == "linear_cross_entropy" else (x,)
    for x in inputs:
        x.requires_grad_()
    targets = torch.tensor([1, 8, -100], device=DEVICE)
    for backend in {"reference", kernels.dispatch.kernel_for(op, x.device, x.dtype)}:
        with kernels.use(backend or "reference"):
            loss = getattr(kernels, op)(*inputs, targets)
        assert loss.isnan()
        (dx,) = torch.autograd.grad(loss, inputs[:1], create_graph=True)
        assert dx.isnan().any()
        with pytest.raises(ValueError, match=r"targets must lie in \[0, 8\), got 8"):
            checks.raise_pending(HERE, wait=True)


@pytest.mark.parametrize("fast", [False, True])
def test_good_ids_change_no_bit(fast, late, monkeypatch):
    model = model_in(fast=fast)
    idx, targets = ids(2, 5), ids(2, 5)
    targets[0, :2] = -1

    def results():
        model.zero_grad()
        _, loss = model(idx, targets)
        loss.backward()
        return loss, *(p.grad for p in model.parameters())

    want = results()
    monkeypatch.setattr(checks, "guard", lambda ids, *args: (ids, None))
    monkeypatch.setattr("gpt2.model.guard", checks.guard)
    assert all(map(bits_equal, want, results()))


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_step_reads_no_value(fast, dropout, late, without_the_interpreter, monkeypatch):
    model = model_in(Config(16, 65, 2, 2, 32, dropout=dropout), fast=fast)
    idx, targets = ids(2, 5), ids(2, 5)
    with Waits(monkeypatch) as waits:
        for _ in range(2):
            _, loss = model(idx, targets)
            loss.backward()
    assert waits.found == [] and late.waits == 0
    assert math.isfinite(loss.item())


def test_waits_are_seen(monkeypatch):
    """A counter that counts nothing would pass the test above."""
    with Waits(monkeypatch) as waits:
        x = torch.ones(2, device=DEVICE)
        bool(x[0]), x.nonzero(), x[x > 0], x.tolist(), torch.equal(x, x)
    assert {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal"} <= set(waits.found)


@pytest.mark.no_poison
def test_a_compiled_model_checks_ids_late(late):
    """The check is one op of the graph, without a break and without tensors on the CPU."""
    torch._dynamo.reset()
    model, idx = model_in(fast=True), ids(1, 5)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with kernels.use("reference"):
        assert torch.allclose(compiled(idx, idx)[1], model(idx, idx)[1])
        late.finish()
        wrong = idx.clone()
        wrong[0, 2] = 65
        assert compiled(wrong, idx)[1].isnan() and compiled(idx, wrong)[1].isnan()
        for name in ("idx", "targets"):
            with pytest.raises(ValueError, match=rf"{name} must lie in \[0, 65\), got 65"):
                checks.raise_pending(HERE, wait=True)
