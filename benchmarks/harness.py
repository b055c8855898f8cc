"""Correct, then timed: one harness for every operation, backend, peer, pass and shape.

A script declares its operations (Op) and hands them to main(). For every shape the harness draws
random inputs, evaluates the reference in float64, and checks each contender's results and every
gradient against it; what is wrong, or raises, is reported and not timed. The rest is timed in one
process: on a GPU by triton.testing.do_bench (L2 flushed, median), on a CPU in alternating rounds.
Two limits are measured in the same run, and each result is given as a share of one of them: the
bandwidth of a plain copy, and the rate of a large matrix product in the same dtype.
"""

import contextlib
import functools
import importlib.util
import itertools
import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace as Shape

import torch
import torch._functorch.config
from clock import Clock, environment, limits, peak_memory
from options import DTYPES, parse
from report import Result, label, plot, show, significant

if importlib.util.find_spec("gpt2") is None:  # not installed: run from the tree
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpt2 import kernels

SCHEMA = 1
FORWARD, BACKWARD, BOTH = "forward", "backward", "forward+backward"


class Wrong(Exception):
    """A contender's result is further from the truth than rounding explains."""


@dataclass(frozen=True)
class Contender:
    """One way to compute an operation: a backend of ours, or a peer."""

    name: str
    call: Callable | None
    context: Callable = contextlib.nullcontext  # entered around its runs, outside the clock
    why_not: str | None = None
    kind: str = "peer"


@dataclass(frozen=True)
class Op:
    """An operation as gpt2.kernels has it, and everything it is compared with."""

    name: str
    kernel: str  # the row of the kernel table that serves it
    inputs: Callable  # (shape, randn, randint) -> tensors
    call: Callable  # (*inputs) -> tensor or tensors: ours
    truth: Callable  # the same from kernels.reference, evaluated in float64
    plain: Callable  # the formula in eager PyTorch: its error is the yardstick
    peers: Callable  # (device) -> contenders
    work: Callable  # (shape, pass, bytes per element) -> Work
    passes: tuple = (FORWARD, BACKWARD)
    part: Callable = lambda x: x  # what of a tensor is checked, where the truth would not fit
    size: Callable = lambda shape: 0  # the extent that dispatch asks about


def compiled(name: str, call: Callable) -> Contender:
    return Contender(name, torch.compile(call, dynamic=False))


def liger(function: str, call: Callable) -> Contender:
    """call(liger's function, *inputs), where Liger is installed."""
    try:
        from liger_kernel.transformers import functional
    except ImportError as error:
        return Contender("liger", None, why_not=str(error))
    return Contender("liger", lambda *inputs: call(getattr(functional, function), *inputs))


def backends(op: Op, shape: Shape, device: torch.device, dtype: torch.dtype) -> list[Contender]:
    return [
        Contender(
            name,
            op.call,
            lambda name=name: kernels.use(name),
            kernels.why_not(name, op.kernel, device, dtype, op.size(shape)),
            "backend",
        )
        for name in kernels.BACKENDS
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
    """Copies that one contender may differentiate, and spoil, on its own."""
    return [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]


def stepper(step: str, call: Callable, inputs, grads) -> Callable:
    """One pass as a function of nothing, ready to be repeated."""
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


def check(op: Op, contender: Contender, inputs, grads, truth, bounds) -> float:
    """The largest error among results and gradients; Wrong where one exceeds its bound."""
    with contender.context():
        values = list(stepper(FORWARD, contender.call, inputs, grads)())
        run = stepper(op.passes[-1], contender.call, inputs, grads)
        if op.passes[-1] == BACKWARD:
            run()  # whose saved tensors must survive it: the second is checked
        values += run()
    worst = 0.0
    for i, (value, exact, bound) in enumerate(zip(values, truth, bounds, strict=True)):
        error = _error(op.part(value), exact)
        if not error <= bound:  # NaN is wrong too
            what = f"result {i}" if i < len(grads) else f"gradient {i - len(grads)}"
            raise Wrong(f"{what} is off by {error:.2e}, more than {bound:.2e}")
        worst = max(worst, error)
    return worst


def exact_and_bounds(op: Op, inputs, grads):
    """The truth in float64, and what each result may be off: by twice, gradients by three times
    the error of plain PyTorch in the same dtype, and by the rounding of the result itself."""
    part = [op.part(x) for x in inputs]
    part_grads = [op.part(g) for g in grads]
    double = [x.double() if x.is_floating_point() else x for x in part]

    def values(call, inputs, grads):
        return [*stepper(FORWARD, call, inputs, grads)(), *stepper(BOTH, call, inputs, grads)()]

    truth = values(op.truth, double, [g.double() for g in part_grads])
    plain = values(op.plain, part, part_grads)
    bounds = [
        (2 if i < len(grads) else 3) * _error(value, exact)
        + torch.finfo(value.dtype).eps * exact.abs().max().item()
        for i, (value, exact) in enumerate(zip(plain, truth, strict=True))
    ]
    return truth, bounds


def measure(op: Op, shape: Shape, dtype: torch.dtype, clock: Clock, limit: dict, only) -> list:
    """The Results of every contender for one operation at one shape: checked, then timed."""
    torch.compiler.reset()
    device = clock.device
    contenders = [*backends(op, shape, device, dtype), *op.peers(device)]
    contenders = [c for c in contenders if only[c.kind] is None or c.name in only[c.kind]]
    inputs, grads = draw(op, shape, device, dtype)
    truth, bounds = exact_and_bounds(op, inputs, grads)
    results, errors = [], {}

    def report(contender, steps, **values):
        name = str(dtype).removeprefix("torch.")
        results.extend(
            Result(op.name, step, vars(shape), name, contender.name, contender.kind, **values)
            for step in steps
        )

    for contender in contenders:
        if contender.why_not:
            report(contender, op.passes, status="unavailable", reason=contender.why_not)
            continue
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                errors[contender] = check(op, contender, inputs, grads, truth, bounds)
            except Exception as error:  # one contender's trouble must not end the run
                report(contender, op.passes, **trouble(contender, error, said))
    del truth

    for step in op.passes:
        work = op.work(shape, step, torch.finfo(dtype).bits // 8)
        times = {}
        # On a CPU all take turns; on a GPU each has the memory to itself
        for group in [list(errors)] if device.type == "cpu" else [[c] for c in errors]:
            try:
                times |= timed(step, group, inputs, grads, clock)
            except Exception as error:
                for contender in group:
                    report(contender, [step], **trouble(contender, error))
        for contender, (median, p20, p80, peak) in sorted(times.items(), key=lambda t: t[1][0]):
            rate = work.rate(median, device)
            report(
                contender,
                [step],
                median_ms=median,
                p20_ms=p20,
                p80_ms=p80,
                rate=rate,
                unit=work.unit(device),
                percent_of_limit=100 * rate / limit[work.unit(device)],
                times_faster_than={
                    c.name: t[0] / median for c, t in times.items() if c.kind == "peer"
                },
                max_error=errors[contender],
                peak_memory_bytes=peak,
            )
    return sorted(results, key=lambda r: (op.passes.index(r.step), r.status != "ok"))


def timed(step: str, contenders, inputs, grads, clock: Clock) -> dict[Contender, tuple]:
    """Median, 20th and 80th percentile in ms, and peak memory in bytes: a backward's includes
    what the forward saved for it."""
    runs, peaks = {}, {}
    for contender in contenders:
        with contender.context():
            whole = stepper(BOTH if step == BACKWARD else step, contender.call, inputs, grads)
            peaks[contender] = peak_memory(whole, clock.device)
            run = stepper(step, contender.call, inputs, grads)
        runs[contender] = run, contender.context
    return {contender: (*ms, peaks[contender]) for contender, ms in clock(runs).items()}


def trouble(contender: Contender, error: Exception, warned=()) -> dict:
    """Status, and reason in one line: what was raised, then what had been warned of."""
    known = isinstance(error, (Wrong, kernels.BackendUnavailable))
    said = [str(w.message) for w in warned if issubclass(w.category, UserWarning)]
    raised = str(error) if known else f"{type(error).__name__}: {error}"
    reason = " ".join("; ".join([raised, *said]).split())
    if isinstance(error, Wrong):
        status = "wrong"
    elif contender.kind == "peer" or known:
        status = "unavailable"
    else:
        status = "error"
    return {"status": status, "reason": reason if len(reason) <= 160 else reason[:157] + "..."}


def main(ops: list[Op], *, doc: str, dims: str, shapes: dict, argv=None) -> int:
    """Runs the script of some operations; see run."""
    peers = dict.fromkeys(peer.name for op in ops for peer in op.peers(torch.device("cpu")))
    cases = [functools.partial(measure, op) for op in ops]
    names = list(kernels.BACKENDS), list(peers)
    return run(ops[0].kernel, cases, *names, doc=doc, dims=dims, shapes=shapes, argv=argv)


def run(
    script: str, cases: list[Callable], backends: list[str], peers: list[str],
    *, doc: str, dims: str, shapes: dict, argv=None,
) -> int:  # fmt: skip
    """Prints, writes and draws what each case(shape, dtype, clock, limit, only) measures.

    The exit code is 1 where a backend of ours is wrong or fails.
    """
    options = parse(argv, doc, dims, shapes, backends, peers)
    torch._functorch.config.donated_buffer = False  # a compiled backward is run more than once
    clock = Clock(options.device, options.quick)
    about = environment(options.device)
    only = {"backend": options.backends, "peer": options.peers}
    where = f"{about['device_name']}, torch {about['torch']}, triton {about['triton']}"
    if about["threads"]:
        where += f", {about['threads']} threads"
    print(f"{where}, commit {about['commit']}{'+' if about['dirty'] else ''}")

    results, measured = [], {}
    for dtype in options.dtype:
        measured[dtype] = limits(clock, DTYPES[dtype], options.quick)
        copy, product = (f"{significant(x)} {unit}" for unit, x in measured[dtype].items())
        print(f"limits, {dtype}: copy {copy}, matrix product {product}")
        for case, shape in itertools.product(cases, options.shapes):
            found = case(shape, DTYPES[dtype], clock, measured[dtype], only)
            print(f"\n{show(found)}", flush=True)
            results += found
    if options.json:
        document = {
            "schema": SCHEMA,
            "script": script,
            "environment": about,
            "limits": measured,
            "results": [asdict(r) for r in results],
        }
        partial = options.json.with_name(f"{options.json.name}.partial")
        partial.write_text(json.dumps(document, indent=1) + "\n")
        partial.replace(options.json)
    if options.plot:
        plot(results, options.plot, where)
    failed = [r for r in results if r.kind == "backend" and r.status in ("wrong", "error")]
    for r in failed:
        print(f"FAILED {r.contender} {r.op} {label(r.shape)}: {r.reason}", file=sys.stderr)
    return 1 if failed else 0


def as_tuple(x):
    return x if isinstance(x, tuple) else (x,)


def _error(value, exact) -> float:
    return (value.double() - exact).abs().max().item()
