"""A training step of GPT-2 124M: forward, backward, AdamW; gpt2.Model(fast=True) against its peers.

    python benchmarks/train_step.py --device cpu
    python benchmarks/train_step.py --shapes 4x64 --dtype float32,bfloat16 --json out.json
    python benchmarks/train_step.py --profile --largest-batch        # --largest-batch: GPU only

Shapes are BxT: sequences, and tokens per sequence. float32 is plain; bfloat16 and float16 are
autocast over float32 parameters. All models start from the same weights. Before anything is timed,
each model's first loss is compared with the loss of the plain model in float32. A token counts as
6 operations per parameter and 12 L C T for attention (Chowdhery et al., PaLM, 2022); the rate is
given as a share of the rate of a large matrix product.

fast-graph is fast with the whole step, AdamW included, captured as one CUDA graph; fast-compiled
and fast-reduce-overhead are torch.compile of the fast model, the latter with its own CUDA graphs.
compiled, reduce-overhead and max-autotune are torch.compile of the plain model; transformers is
Hugging Face's GPT-2 with SDPA attention; nanogpt is an eager model with nanoGPT's architecture.
Peak memory is that of the whole step, including parameters and AdamW's state.
"""

import contextlib
import copy
import sys

import torch
import torch.nn as nn
from bench import harness, models, step_profile
from bench.clock import FLOP, Clock, Work
from bench.contenders import check_and_time, rehearse, released
from bench.harness import Contender, Wrong
from bench.result_file import Case, Record

from gpt2 import Config, Model
from gpt2.kernels import recording

DIMS = "BxT"
SHAPES = {"cpu": "1x1024,4x64", "cuda": "64x1024,4x1024,32x1024,8x1024"}
CONFIG = Config.named("gpt2")
SEARCHED = 8  # the largest batch is a multiple of this
WARM_UP = 3  # steps before a capture, as PyTorch requires


def stepper(model: nn.Module, idx, targets, dtype, graph=False):
    """One training step as a function without arguments, which returns the loss before the update.
    With graph the step is captured once, and each call replays it."""
    fused = torch.optim.AdamW(
        model.parameters(), lr=1e-5, weight_decay=0.1, fused=True, capturable=graph
    )
    device = idx.device.type
    autocast = dtype != torch.float32
    model.train()

    def step():
        context = torch.autocast(device, dtype) if autocast else contextlib.nullcontext()
        with context:
            loss = model(idx, targets)
        loss.backward()
        fused.step()
        fused.zero_grad()
        return loss.detach()

    return captured(step, model, fused) if graph else step


def captured(step, model: nn.Module, optimizer: torch.optim.Optimizer):
    """The step captured as one CUDA graph. Restores the weights and resets the optimizer's state
    afterwards. The result's peak_memory, in bytes, is that of the capture: a replay allocates
    nothing."""
    start = [p.detach().to("cpu", copy=True) for p in model.parameters()]  # not in the peak
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.reset_peak_memory_stats()
    with torch.cuda.graph(graph):
        loss = step()
    peak_memory = torch.cuda.max_memory_allocated()
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), start, strict=True):
            parameter.copy_(value)
        for state in optimizer.state.values():
            for value in state.values():
                value.zero_()

    def replay():
        graph.replay()
        return loss

    replay.peak_memory = peak_memory
    return replay


def batch(shape, device):
    """idx and targets, (B, T) each."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(CONFIG.vocab_size, (2, shape.B, shape.T), generator=generator)
    return tokens.to(device)


def true_loss(plain: Model, idx, targets) -> float:
    """The plain model's loss in float32, a few sequences at a time: all logits may not fit."""
    model = copy.deepcopy(plain).to(idx.device)
    with torch.no_grad():
        pieces = zip(idx.split(4), targets.split(4), strict=True)
        losses = [model(i, t, return_logits=False)[1] * len(i) for i, t in pieces]
    return (sum(losses) / len(idx)).item()


def measure(
    shape, dtype, clock: Clock, limit: dict, record: Record, profile=False, largest_batch=False
) -> Case | None:
    """Compares every contender's loss at one shape, then times its steps, then takes the profile
    and finds the largest batch if asked to."""
    recording.UNRECORDED = 2  # calls are replayed, as in a training that has run for some time
    recording.start()
    torch.compiler.reset()
    torch.manual_seed(0)
    device = clock.device
    if largest_batch and device.type == "cpu":
        sys.exit("train_step.py: error: --largest-batch needs a GPU")
    case = Case("train_step", vars(shape), str(dtype).removeprefix("torch."), ("step",))
    plain = Model(CONFIG)  # its weights are copied to every model, and stay on the CPU
    makers = models.makers(plain)
    contenders = record.wanted(case, [
        Contender(name, make, kind="backend" if name in models.BACKENDS else "peer",
                  why_not=why_not(name, device), compiles=name in models.COMPILED)
        for name, make in makers.items()
    ])  # fmt: skip
    work = Work(plain.flops_per_token(shape.T) * shape.B * shape.T, FLOP)
    idx, targets = batch(shape, device)
    runs, truth = {}, []

    def stepping(contender):
        graph = contender.name == "fast-graph"
        return stepper(contender.call().to(device), idx, targets, dtype, graph)

    if record.rehearsal:
        rehearse(contenders, lambda contender: stepping(contender)(), device)
        return None

    def check(contender):
        if not truth:
            truth.append(true_loss(plain, idx, targets))
        run = stepping(contender)
        error = abs(run().item() - truth[0])
        # bfloat16 has 8 bits: a loss near 11 is exact to a few hundredths
        if not error <= 8 * torch.finfo(dtype).eps:
            raise Wrong(f"the first loss is off by {error:.2e}")
        runs[contender] = run
        return error

    def timed(step, group):
        try:
            peaks = {c: peak(runs[c], device) for c in group}
            times = clock({c: (runs[c], contextlib.nullcontext) for c in group})
            for c in group:
                speed = shape.B * shape.T / times[c]["median_ms"] * 1e3
                details = {"tokens_per_s": speed}
                if profile:
                    details["profile_ms"] = step_profile.profiled(runs[c], device)
                times[c] |= {"peak_memory_bytes": peaks[c], "details": details}
        finally:
            runs.clear()  # the next model may need all of the memory
        return times

    check_and_time(record, case, contenders, clock, limit, lambda *of: work, check, timed)
    rows = [r for r in record.results if case.holds(r) and r.median_ms]
    for row in rows if largest_batch else ():
        if "largest_batch" not in row.details and not record.late():
            record.begin(case, [], ())
            make, graph = makers[row.contender], row.contender == "fast-graph"
            row.details["largest_batch"] = largest(make, shape, dtype, device, graph)
            record.add()
    profiles = {r.contender: r.details.get("profile_ms") for r in rows}
    if profile and rows:
        print(f"\n{step_profile.table(profiles)}")
    return case


def why_not(name: str, device: torch.device) -> str | None:
    if device.type == "cpu":
        if name == "max-autotune":
            return "its search takes minutes on a CPU"
        if name == "fast-graph" or name.endswith("reduce-overhead"):
            return "CUDA graphs need a GPU"
    return None


def peak(run, device: torch.device) -> int | None:
    """Peak bytes allocated during a step, including earlier allocations; None on a CPU."""
    if device.type != "cuda":
        return None
    if hasattr(run, "peak_memory"):  # measured by the capture
        return run.peak_memory
    torch.cuda.reset_peak_memory_stats(device)
    run()
    return torch.cuda.max_memory_allocated(device)


def largest(make, shape, dtype, device: torch.device, graph: bool) -> int:
    """The largest batch of sequences of T tokens whose step fits in memory, a multiple of SEARCHED;
    0 if SEARCHED sequences do not fit. A compiled model is recompiled for every batch."""

    def fits(B) -> bool:
        torch.compiler.reset()
        one = type(shape)(B=B, T=shape.T)
        try:
            stepper(make().to(device), *batch(one, device), dtype, graph)()
            torch.cuda.synchronize(device)
            fit = True
        except torch.OutOfMemoryError:
            fit = False
        released(device)  # after the handler: the traceback holds the model
        return fit

    return bisected(fits, SEARCHED)


def bisected(fits, step: int) -> int:
    """The largest multiple of `step` that fits, 0 if none does; fits(n) must be monotone."""
    if not fits(step):
        return 0
    low, high = 1, 2  # in units of step; low fits
    while fits(high * step):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * step) else (low, middle)
    return low * step


def more(parser) -> None:
    parser.add_argument("--profile", action="store_true", help="show where the step's time goes")
    parser.add_argument("--largest-batch", action="store_true", help="find it (GPU only; minutes)")


if __name__ == "__main__":
    names = models.BACKENDS, models.PEERS
    sys.exit(harness.run("train_step", [measure], *names, doc=__doc__, dims=DIMS, shapes=SHAPES,
                         more=more, own=("profile", "largest_batch")))  # fmt: skip
