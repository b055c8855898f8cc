"""Checks, then times every operation, backend, peer, pass and shape.

A script declares its operations (Op) and passes them to main(). For every shape the harness draws
random inputs, evaluates the reference in float64, and compares each contender's results and
gradients with it. A contender that is wrong or raises is reported and not timed. The others are
timed in one process: on a GPU by triton.testing.do_bench (L2 flushed, median), on a CPU in
alternating rounds. The same run measures the machine's limits: the bandwidth of a copy, the
bandwidth of reading, and the rate of a large matrix product in the same dtype. Each result is given
as a share of one of them.
"""

import functools
import importlib.util
import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace as Shape

import torch
import torch._functorch.config

if importlib.util.find_spec("gpt2") is None:  # not installed: import it from the repository
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.clock import Clock, limits, peak_memory
from bench.contenders import Contender, ContextLost, Wrong, check_and_time, rehearse, released
from bench.environment import environment
from bench.options import DTYPES, parse
from bench.result import label, plot, show, significant
from bench.result_file import Case, Record
from gpt2 import kernels

FORWARD, BACKWARD, BOTH = "forward", "backward", "forward+backward"
LOST = 3  # exit code: the CUDA context is gone
CHUNK = 2**27  # elements compared at once


@dataclass(frozen=True)
class Op:
    """An operation of gpt2.kernels, and the functions that it is compared with."""

    name: str
    kernel: str  # its row in the kernel table
    inputs: Callable  # (shape, randn, randint) -> tensors
    call: Callable  # (*inputs) -> tensor or tensors, by our kernels
    truth: Callable  # the same from kernels.reference, evaluated in float64
    plain: Callable  # the formula in eager PyTorch; its error sets the bounds
    peers: Callable  # (device) -> contenders
    work: Callable  # (shape, pass, bytes per element) -> Work
    passes: tuple = (FORWARD, BACKWARD)
    part: Callable = lambda x: x  # the part of a tensor to check, if the truth would not fit
    size: Callable = lambda shape: 0  # the extent that dispatch decides by


def backends(
    op: Op, shape: Shape, device: torch.device, dtype: torch.dtype, record: Record
) -> list[Contender]:
    """Contenders for those of our backends that the record wants. None in a rehearsal: asking
    whether a backend is available might build its library."""
    only = [] if record.rehearsal else record.only["backend"]
    return [
        Contender(
            name,
            op.call,
            lambda name=name: kernels.use(name),
            kernels.why_not(name, op.kernel, device, dtype, op.size(shape)),
            "backend",
        )
        for name in kernels.BACKENDS
        if (only is None or name in only) and name not in record.without
    ]


def draw(op: Op, shape: Shape, device: torch.device, dtype: torch.dtype, seed=0):
    """The inputs of one case and the gradients of its outputs."""
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*size):
        return torch.randn(size, device=device, generator=generator).to(dtype)

    def randint(high, *size):
        return torch.randint(high, size, device=device, generator=generator)

    inputs = op.inputs(shape, randn, randint)
    outputs = as_tuple(op.plain(*(x.to("meta") for x in inputs)))
    grads = [
        randn(*y.shape).to(y.dtype) if y.dim() else y.new_ones((), device=device) for y in outputs
    ]
    return inputs, grads


def leaves(inputs):
    """Copies of the inputs for one contender, which may differentiate and overwrite them."""
    return [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]


def stepper(step: str, call: Callable, inputs, grads) -> Callable:
    """One pass as a function without arguments that can be repeated."""
    inputs = leaves(inputs)
    wanted = [x for x in inputs if x.requires_grad]
    if step == FORWARD:

        def run():
            with torch.no_grad():
                return as_tuple(call(*inputs))

    elif step == BACKWARD:
        outputs = as_tuple(call(*inputs))

        def run():
            return torch.autograd.grad(outputs, wanted, grads, retain_graph=True)

    else:

        def run():
            return torch.autograd.grad(as_tuple(call(*inputs)), wanted, grads)

    return run


def evaluated(op: Op, contender: Contender, inputs, grads) -> list:
    """The contender's results and gradients."""
    with contender.context():
        values = list(stepper(FORWARD, contender.call, inputs, grads)())
        if op.passes[-1] != FORWARD:
            run = stepper(op.passes[-1], contender.call, inputs, grads)
            if op.passes[-1] == BACKWARD:
                run()  # a backward must not spoil its saved tensors: check the second
            values += run()
    return values


def check(op: Op, contender: Contender, inputs, grads, truth, bounds) -> float:
    """The largest error among results and gradients. Raises Wrong if one exceeds its bound."""
    values = evaluated(op, contender, inputs, grads)
    worst = 0.0
    for i, (value, exact, bound) in enumerate(zip(values, truth, bounds, strict=True)):
        error = _error(op.part(value), exact)
        if not error <= bound:  # NaN is wrong too
            what = f"result {i}" if i < len(grads) else f"gradient {i - len(grads)}"
            raise Wrong(f"{what} is off by {error:.2e}, more than {bound:.2e}")
        worst = max(worst, error)
    return worst


def exact_and_bounds(op: Op, inputs, grads):
    """Returns (the truth in float64, the error bound of each result and gradient). A bound is twice
    (gradients: three times) plain PyTorch's error in the same dtype, plus the rounding of the
    result."""
    part = [op.part(x) for x in inputs]
    part_grads = [op.part(g) for g in grads]
    double = [x.double() if x.is_floating_point() else x for x in part]

    def values(call, inputs, grads):
        outputs = stepper(FORWARD, call, inputs, grads)()
        if op.passes[-1] == FORWARD:
            return outputs
        return [*outputs, *stepper(BOTH, call, inputs, grads)()]

    truth = values(op.truth, double, [g.double() for g in part_grads])
    plain = values(op.plain, part, part_grads)
    bounds = [
        (2 if i < len(grads) else 3) * _error(value, exact)
        + torch.finfo(value.dtype).eps * exact.abs().max().item()
        for i, (value, exact) in enumerate(zip(plain, truth, strict=True))
    ]
    return truth, bounds


def measure(
    op: Op, shape: Shape, dtype: torch.dtype, clock: Clock, limit: dict, record: Record
) -> Case | None:
    """Checks, then times every contender of an operation at one shape. None in a rehearsal."""
    torch.compiler.reset()
    device = clock.device
    case = Case(op.name, vars(shape), str(dtype).removeprefix("torch."), op.passes)
    contenders = [*backends(op, shape, device, dtype, record), *op.peers(device)]
    contenders = record.wanted(case, contenders)
    if record.rehearsal:
        data = draw(op, shape, device, dtype)
        rehearse(contenders, lambda contender: evaluated(op, contender, *data), device)
        return None
    inputs, grads, truth, bounds, no_truth = None, None, None, None, None
    able = [c for c in contenders if c.why_not is None]
    if able and not record.late():
        record.begin(case, able, case.steps)
        try:
            inputs, grads = draw(op, shape, device, dtype)
            truth, bounds = exact_and_bounds(op, inputs, grads)
        except Exception as error:
            no_truth = f"nothing to check against: {type(error).__name__}: {error}"
        released(device)

    def work(step, contender):
        return op.work(shape, step, torch.finfo(dtype).bits // 8)

    def checked(contender):
        if no_truth:
            raise RuntimeError(no_truth)
        return check(op, contender, inputs, grads, truth, bounds)

    def clocked(step, group):
        return timed(step, group, inputs, grads, clock)

    check_and_time(record, case, contenders, clock, limit, work, checked, clocked)
    return case


def timed(step: str, contenders, inputs, grads, clock: Clock) -> dict[Contender, dict]:
    """Times in ms and peak memory in bytes, as fields of a Result. A backward's memory includes
    what its forward saved."""
    runs, peaks = {}, {}
    for contender in contenders:
        with contender.context():
            whole = stepper(BOTH if step == BACKWARD else step, contender.call, inputs, grads)
            peaks[contender] = peak_memory(whole, clock.device)
            run = stepper(step, contender.call, inputs, grads)
        runs[contender] = run, contender.context
    times = clock(runs)
    return {c: times[c] | {"peak_memory_bytes": peaks[c]} for c in contenders}


def main(ops: list[Op], *, doc: str, dims: str, shapes: dict, argv=None) -> int:
    """Runs a script that measures these operations; see run."""
    peers = dict.fromkeys(peer.name for op in ops for peer in op.peers(torch.device("cpu")))
    cases = [functools.partial(measure, op) for op in ops]
    names = list(kernels.BACKENDS), list(peers)
    return run(ops[0].kernel, cases, *names, doc=doc, dims=dims, shapes=shapes, argv=argv)


def run(
    script: str, cases: list[Callable], backends: list[str], peers: list[str],
    *, doc: str, dims: str, shapes: dict, argv=None, more=None, own=(),
) -> int:  # fmt: skip
    """Prints, writes and draws what each case(shape, dtype, clock, limit, record) measures.
    more(parser) adds options; those named in own are passed to the cases by name.

    Returns exit code 1 if a backend of ours is wrong or fails, 3 if this process lost the GPU: then
    another process can go on with --resume.
    """
    options = parse(argv, doc, dims, shapes, backends, peers, more)
    torch._functorch.config.donated_buffer = False  # a compiled backward runs more than once
    clock = Clock(options.device, options.quick)
    about = environment(options.device)
    record = Record(
        options.json, script, about, only={"backend": options.backends, "peer": options.peers},
        without=options.without, seconds=options.seconds, resume=options.resume,
        rehearsal=options.compile_only,
    )  # fmt: skip
    where = f"{about['device_name']}, torch {about['torch']}, triton {about['triton']}"
    if about["threads"]:
        where += f", {about['threads']} threads"
    print(f"{where}, commit {about['commit']}{'+' if about['dirty'] else ''}")
    extra = {name: getattr(options, name) for name in own}

    lost = None
    try:
        for dtype in options.dtype:
            limit = {} if options.compile_only else limits_of(dtype, clock, record)
            for measured, shape in itertools.product(cases, options.shapes):
                case = measured(shape, DTYPES[dtype], clock, limit, record, **extra)
                if case is not None:  # None: not requested, or a rehearsal
                    print(f"\n{show(record.settle(case))}", flush=True)
    except ContextLost as error:
        lost = f"the CUDA context is lost, nothing more can run in this process: {error}"
    record.add()  # nothing is running now
    if options.plot and record.results:
        plot(record.results, options.plot, where)
    failed = [r for r in record.results if r.kind == "backend" and r.status in ("wrong", "error")]
    for r in failed:
        print(f"FAILED {r.contender} {r.op} {label(r.shape)}: {r.reason}", file=sys.stderr)
    if lost:
        print(lost, file=sys.stderr)
        return LOST
    return 1 if failed else 0


def limits_of(dtype: str, clock: Clock, record: Record) -> dict[str, float]:
    """Prints the machine's limits for this dtype; measures them unless the record has them."""
    if dtype not in record.limits:
        record.limits[dtype] = limits(clock, DTYPES[dtype], clock.quick)
    limit = record.limits[dtype]
    copy, read, product = (f"{significant(x)} {unit}" for unit, x in limit.items())
    print(f"limits, {dtype}: copy {copy}, reading {read}, matrix product {product}")
    return limit


def as_tuple(x):
    return x if isinstance(x, tuple) else (x,)


def _error(value, exact) -> float:
    """The largest error, NaN if any is. Works in pieces: three float64 copies may not fit."""
    if not value.dim():
        return (value.double() - exact).abs().item()
    rows = max(1, CHUNK // max(1, value[0].numel()))
    pieces = zip(value.split(rows), exact.split(rows), strict=True)
    return torch.stack([(v.double() - e).abs().max() for v, e in pieces]).max().item()
