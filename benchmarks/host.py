"""Host time: what Python, dispatch, autograd and the launcher cost before a kernel runs.

    python benchmarks/host.py --device cpu
    python benchmarks/host.py --device cuda --json out.json
    python benchmarks/host.py --backends triton-stub          # on a CPU: Triton's launcher

Times every op of gpt2.kernels beside PyTorch's own op, on tensors so small that the work itself
hardly counts: the forward without gradients, then forward and backward. Then a step (forward and
backward) of a small 12-layer GPT-2, fast and plain. Then the parts of a forward. They come from
nested calls with the same arguments; a part is the time of a call less that of the call inside it:

    argument checks     the public op, including a loss's work around its kernel
    dispatch            the choice of a backend
    autograd function   Function.apply
    raw op              torch.ops.gpt2_kernels: from torch.library to the launcher
    launcher            the backend's function: output tensors, grid, launch

Calls are replayed by C++ (kernels/recording.py), as in a training that has run for some time;
the parts are those of calls in Python. GPT2_KERNELS_REPLAY=0 times the Python code.

Shapes are BxTxHxD: batch, time, heads, head size. On a CPU the time is the CPU time of one thread:
it includes the small kernels, but not other processes. triton-stub launches Triton's kernels on a
driver that does nothing (stub_driver.py), so their results are not checked. On a GPU the time is
the time to issue the work; if an op waits for the GPU, it includes the wait.
"""

import contextlib
import itertools
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial

import torch
from bench import harness
from bench.contenders import Contender, ContextLost, Wrong, check_and_time
from bench.environment import environment
from bench.harness import as_tuple
from bench.host import stub_driver
from bench.host.host_clock import HostClock, within
from bench.host.ops import Op, V, operations
from bench.host.parts import summed, taken_apart
from bench.host.tables import BOTH, FORWARD, OP, PEER, PLAIN, STEP, WITH_GRAD, tables, text
from bench.options import DTYPES, parse
from bench.result import label
from bench.result_file import Case, Record

from gpt2 import Config, Model, kernels
from gpt2.kernels import dispatch, recording

DIMS = "BxTxHxD"
SHAPES = {"cpu": "1x16x2x16", "cuda": "1x16x2x16"}
STUB = "triton-stub"
BACKENDS = {"cpu": ("cpu", STUB), "cuda": ("triton", "cuda")}  # device type -> backends


def ours(record: Record, device, dtype, ops: list[str], size: int, call) -> list[Contender]:
    """A contender for each backend of this device that the record wants, calling these ops."""
    found, only = [], record.only["backend"]
    for name in BACKENDS[device.type]:
        if (only is None or name in only) and name not in record.without:
            backend = "triton" if name == STUB else name
            base = stub_driver.active if name == STUB else contextlib.nullcontext
            reason = stub_driver.why_not() if name == STUB else None
            context = base
            if reason is None:
                context, reason = serving(backend, base, ops, device, dtype, size)
            found.append(Contender(name, call, context, reason, "backend"))
    return found


def serving(backend: str, base: Callable, ops: list[str], *asked) -> tuple[Callable, str | None]:
    """Returns (context in which the backend runs all the ops, None or why it cannot run them). The
    context forces nothing if dispatch chooses the backend anyway, so that the choice costs what it
    costs a user."""
    with base():
        for op in ops:
            if reason := kernels.why_not(backend, op, *asked):
                return base, reason
        chosen = {dispatch.choose(op, *asked) for op in ops}
    force = contextlib.nullcontext if chosen == {backend} else partial(kernels.use, backend)
    return partial(within, base, force), None


def stepper(op: Op, step: str, call: Callable, grads) -> tuple[Callable, Callable]:
    """Returns (one pass as a function without arguments, the context to run it in)."""
    if step == FORWARD:
        return partial(call, *op.inputs), torch.no_grad
    if step == WITH_GRAD:
        return partial(call, *op.inputs), contextlib.nullcontext
    wanted = [x for x in op.inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    return lambda: torch.autograd.grad(call(*op.inputs), wanted, grads), contextlib.nullcontext


def measure(op: Op, shape, dtype, clock: HostClock, record: Record) -> None:
    """Compares every contender's results for one op, then times each pass."""
    device = clock.device
    case = Case(OP + op.name, vars(shape), str(dtype).removeprefix("torch."), op.steps)
    contenders = ours(record, device, dtype, [op.kernel], op.size, op.ours)
    contenders = record.wanted(case, [*contenders, Contender(PEER, op.theirs)])
    with torch.no_grad():
        grads = [torch.randn_like(y) for y in as_tuple(op.theirs(*op.inputs))]

    def stepped(step, contender):
        run, mode = stepper(op, step, contender.call, grads)
        return run, partial(within, contender.context, mode)

    def results(contender):
        found = []
        for step in dict.fromkeys((FORWARD, op.steps[-1])):
            run, context = stepped(step, contender)
            with context():
                found += as_tuple(run())
        return found

    def check(contender):
        return compared(contender, results(contender), results(Contender(PEER, op.theirs)))

    def timed(step, group):
        runs = {c: stepped(step, c) for c in group}
        times = clock(runs)
        for c in group:
            times[c]["details"] = {"launches": launched(*runs[c])} if c.name == STUB else {}
        # Splits the forward that records a gradient, if the op has one
        if step == (WITH_GRAD if WITH_GRAD in op.steps else FORWARD):
            with recording.paused():
                nested = {(c, part): call for c in group
                          for part, call in taken_apart(*runs[c]).items()}  # fmt: skip
                least = clock.least(nested)
            for c in group:
                mine = {part: least[one, part] for one, part in nested if one is c}
                times[c]["details"]["parts_us"] = summed(mine)
        return times

    check_and_time(record, case, contenders, clock, {}, None, check, timed)
    record.settle(case)


def launched(run: Callable, context: Callable) -> int:
    """The number of kernels that one run launches on the stub driver."""
    with context():
        before = stub_driver.launches()
        run()
        return stub_driver.launches() - before


def compared(contender: Contender, found, truth) -> float | None:
    """The largest difference from PyTorch's results; None for the stub, whose kernels never run.
    Raises Wrong only for a difference that shows another op was computed: the other benchmarks
    judge precision."""
    if contender.name == STUB:
        return None
    pairs = list(zip(found, truth, strict=True))
    errors = [(x.double() - y.double()).abs().max().item() for x, y in pairs]
    bounds = [torch.finfo(y.dtype).eps ** 0.5 * max(1.0, y.abs().max().item()) for _, y in pairs]
    for error, bound in zip(errors, bounds, strict=True):
        if not error <= bound:
            raise Wrong(f"it is off by {error:.2e}, more than {bound:.2e}")
    return max(errors)


def measure_step(shape, dtype, clock: HostClock, record: Record) -> None:
    """Times forward and backward of a small model, fast and plain; half precision is autocast."""
    device = clock.device
    case = Case(STEP, vars(shape), str(dtype).removeprefix("torch."), (BOTH,))
    config = Config(block_size=shape.T, vocab_size=V, n_layer=12, n_head=shape.H,
                    n_embd=shape.H * shape.D)  # fmt: skip
    torch.manual_seed(0)
    plain, fast = Model(config).to(device), Model(config, fast=True).to(device)
    fast.load_state_dict(plain.state_dict())
    idx, targets = torch.randint(V, (2, shape.B, shape.T)).to(device)
    half = dtype != torch.float32
    autocast = partial(torch.autocast, device.type, dtype) if half else contextlib.nullcontext

    def step(model):
        parameters = list(model.parameters())

        def run():
            with autocast():
                loss = model(idx, targets)[1]
            loss.backward()
            for p in parameters:
                p.grad = None
            return loss.detach()

        return run

    ops = ["attention", "layer_norm", "gelu", "linear_cross_entropy"]
    backends = ours(record, device, dtype, ops, shape.D, step(fast))
    reference = Contender(PLAIN, step(plain))
    contenders = record.wanted(case, [*backends, reference])

    def loss(contender):
        with contender.context():
            return [contender.call()]

    def check(contender):
        return compared(contender, loss(contender), loss(reference))

    def timed(_, group):
        times = clock({c: (c.call, c.context) for c in group})
        for c in group:
            details = {"n_layer": config.n_layer, "n_embd": config.n_embd, "vocab_size": V}
            if c.name == STUB:
                details["launches"] = launched(c.call, c.context)
            times[c]["details"] = details
        return times

    check_and_time(record, case, contenders, clock, {}, None, check, timed)
    record.settle(case)


def main(argv=None) -> int:
    """Returns exit code 1 if a backend of ours is wrong or fails, 3 if the GPU is lost."""
    known = list(dict.fromkeys(itertools.chain(*BACKENDS.values())))
    parsers = []
    options = parse(argv, __doc__, DIMS, SHAPES, known, [PEER, PLAIN], parsers.append)
    here = BACKENDS[options.device.type]
    for name in options.backends or ():
        if name not in here:
            parsers[0].error(f"--backends {name}: on {options.device} there is {', '.join(here)}")
    if options.plot:
        parsers[0].error("--plot: host time is given in tables alone")
    if options.compile_only:
        return 0  # torch.compile compiles nothing here
    torch.set_num_threads(1)
    recording.UNRECORDED = 2  # a few calls suffice, also with --quick
    reason = recording.start()
    clock = HostClock(options.device, options.quick)
    about = environment(options.device)
    record = Record(
        options.json, "host", about, only={"backend": options.backends, "peer": options.peers},
        without=options.without, seconds=options.seconds, resume=options.resume,
    )  # fmt: skip
    print(f"{about['device_name']}, torch {about['torch']}, triton {about['triton']}, commit "
          f"{about['commit']}{'+' if about['dirty'] else ''}")  # fmt: skip
    if reason:
        print(f"calls are not replayed: {reason}")
    lost = None
    try:
        for dtype, shape in itertools.product(options.dtype, options.shapes):
            for op in operations(shape, DTYPES[dtype], options.device):
                measure(op, shape, DTYPES[dtype], clock, record)
            measure_step(shape, DTYPES[dtype], clock, record)
    except ContextLost as error:
        lost = f"the CUDA context is lost, nothing more can run in this process: {error}"
    record.add()  # nothing is running now
    for lines in tables([asdict(r) for r in record.results]):
        print(f"\n{text(lines)}")
    untimed = [r for r in record.results if r.status != "ok"]
    failed = [r for r in untimed if r.kind == "backend" and r.status in ("wrong", "error")]
    for said in dict.fromkeys(f"{r.contender} {r.op}: {r.reason}" for r in untimed):
        print(said)
    for said in dict.fromkeys(f"{r.contender} {r.op} {label(r.shape)}: {r.reason}" for r in failed):
        print(f"FAILED {said}", file=sys.stderr)
    if lost:
        print(lost, file=sys.stderr)
    return harness.LOST if lost else 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
