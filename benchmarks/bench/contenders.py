"""Contenders for one case: each is checked, then timed; a failing one does not stop the others."""

import contextlib
import gc
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bench.clock import Clock, Work
from bench.result import Result
from bench.result_file import Case, Record, compare
from gpt2 import kernels

LATE = {"status": "skipped", "reason": "out of time"}
COLOURS = re.compile(r"\x1b\[[0-9;]*m")  # ANSI codes: some compilers colour their errors


class Wrong(Exception):
    """A contender's result is further from the truth than rounding explains."""


class ContextLost(Exception):
    """An error such as an illegal access, after which this process cannot use the GPU."""


@dataclass(frozen=True)
class Contender:
    """One way to compute an operation: a backend of ours, or a peer."""

    name: str
    call: Callable | None
    context: Callable = contextlib.nullcontext  # entered around its runs, outside the clock
    why_not: str | None = None
    kind: str = "peer"
    compiles: bool = False  # at its first call; rehearse() fills the compile cache before


def check_and_time(
    record: Record,
    case: Case,
    contenders: list[Contender],
    clock: Clock,
    limit: dict,
    work: Callable | None,  # (step, contender) -> Work; None if no pass has a rate
    check: Callable,  # contender -> its largest error; raises Wrong
    timed: Callable,  # (step, contenders) -> contender -> fields of its Result, with median_ms
) -> None:
    """Adds a result per contender and step to the record. On a CPU the contenders alternate; on a
    GPU one runs at a time and has all the memory."""

    def report(contender, steps, **values):
        about = case.shape, case.dtype, contender.name, contender.kind
        record.add(*(Result(case.op, step, *about, **values) for step in steps))

    on_cpu = clock.device.type == "cpu"
    for group in [contenders] if on_cpu else [[c] for c in contenders]:
        errors = {}
        for contender in group:
            if contender.why_not:
                report(contender, case.steps, status="unavailable", reason=contender.why_not)
                continue
            if record.late():
                report(contender, case.steps, **LATE)
                continue
            record.begin(case, [contender], case.steps)
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                try:
                    errors[contender] = check(contender)
                except Exception as error:  # a failing contender must not end the run
                    report(contender, case.steps, **trouble(contender, error, said))
            still_alive(clock.device)
        for i, step in enumerate(case.steps):
            if not errors:
                break
            if on_cpu and record.late():
                for contender in errors:
                    report(contender, [step], **LATE)
                continue
            record.begin(case, list(errors), case.steps[i:])
            try:
                times = timed(step, list(errors))
            except Exception as error:
                for contender in errors:
                    report(contender, [step], **trouble(contender, error))
                still_alive(clock.device)
                continue
            for contender, values in times.items():
                if work is not None:
                    ms = values["median_ms"]
                    values |= rates(work(step, contender), ms, clock.device, limit)
                report(contender, [step], max_error=errors[contender], **values)
        released(clock.device)
    for step in case.steps:
        compare([r for r in record.results if case.holds(r) and r.step == step])


def rehearse(contenders: list[Contender], run: Callable, device: torch.device) -> None:
    """Calls run(contender) for those that compile at their first call, to fill the compile cache.
    Errors are ignored: check_and_time reports them."""
    for contender in contenders:
        if contender.compiles and contender.why_not is None:
            with contextlib.suppress(Exception), contender.context():
                run(contender)
            released(device)


def rates(work: Work, ms: float, device: torch.device, limit: dict) -> dict:
    rate, unit = work.rate(ms, device), work.unit(device)
    return {"rate": rate, "unit": unit, "percent_of_limit": 100 * rate / limit[unit]}


def trouble(contender: Contender, error: Exception, warned=()) -> dict:
    """A result's status, and its reason in one line: the error, then the warnings before it. Plain
    PyTorch is "unavailable", not an error, when it runs out of memory: that is expected."""
    known = isinstance(error, (Wrong, kernels.BackendUnavailable))
    no_room = isinstance(error, torch.OutOfMemoryError) and contender.name == "reference"
    said = [str(w.message) for w in warned if issubclass(w.category, UserWarning)]
    raised = str(error) if known else f"{type(error).__name__}: {error}"
    reason = " ".join(COLOURS.sub("", "; ".join([raised, *said])).split())
    if isinstance(error, Wrong):
        status = "wrong"
    elif contender.kind == "peer" or known or no_room:
        status = "unavailable"
    else:
        status = "error"
    return {"status": status, "reason": reason if len(reason) <= 160 else reason[:157] + "..."}


def still_alive(device: torch.device) -> None:
    """Raises ContextLost if an earlier kernel made the GPU unusable for this process."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except Exception as error:
            raise ContextLost(" ".join(str(error).split())[:160]) from None


def released(device: torch.device) -> None:
    """Frees the memory that a contender left in the allocator: the next may need all of it."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
