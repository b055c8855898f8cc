"""use() in several threads: each has its own choice, and leaving a block restores that thread's
choice."""

import ast
import os
import select
import signal
import threading

import pytest
import torch
from util import DEVICE

from gpt2 import kernels
from gpt2.kernels import dispatch

ASKED = torch.device("cpu"), torch.float32, 64
THREADS, ENTRIES = 32, 100

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")


def in_threads(function, count):
    """function(i) in each of count threads; raises what the first of them raised."""
    errors = []

    def run(i):
        try:
            function(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    if errors:
        raise errors[0]


@pytest.fixture
def every_backend_serves(monkeypatch):
    monkeypatch.setattr(dispatch, "why_not", lambda *args: None)


def test_each_thread_has_its_own_choice(every_backend_serves):
    """The choice was process-wide. A thread used another's, and a thread that left its block while
    others were in theirs restored the wrong choice, so that a backend stayed forced for good."""
    unforced = dispatch.choose("gelu", *ASKED)
    all_are_inside = threading.Barrier(THREADS)

    def enter_and_leave(i):
        for entry in range(ENTRIES):
            outer, inner = (kernels.BACKENDS[(i + entry + n) % 4] for n in range(2))
            with kernels.use(outer):
                all_are_inside.wait(timeout=10)
                assert dispatch.choose("gelu", *ASKED) == outer
                with kernels.use(inner):
                    assert dispatch.choose("gelu", *ASKED) == inner

    in_threads(enter_and_leave, THREADS)
    assert dispatch.forced() is None and dispatch.choose("gelu", *ASKED) == unforced


def test_blocks_may_end_in_any_order():
    first, second = kernels.use("cpu"), kernels.use("reference")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert dispatch.forced() == "reference"
    second.__exit__(None, None, None)
    assert dispatch.forced() is None


def test_a_thread_without_a_block_follows_the_newest():
    """This includes the threads in which autograd runs a backward, because a checkpoint repeats its
    forward there."""
    seen = []
    with kernels.use("triton"), kernels.use("reference"):
        in_threads(lambda i: seen.append(dispatch.forced()), 1)
    in_threads(lambda i: seen.append(dispatch.forced()), 1)
    assert seen == ["reference", None]


def test_a_choice_is_read_once(monkeypatch):
    """A first build takes a minute. Meanwhile a thread that left its block set another thread's
    choice to None, and an op failed with "'NoneType' object has no attribute ..."."""
    block = kernels.use("cpu")

    def slow(*args):
        block.__exit__(None, None, None)

    monkeypatch.setattr(dispatch, "why_not", slow)
    block.__enter__()
    assert dispatch.choose("gelu", *ASKED) == "cpu"
    assert dispatch.forced() is None


def in_fork(function):
    """The result of function() in a forked child; None if it does not end."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, repr(function()).encode())
        os._exit(0)
    os.close(write)
    with open(read, "rb") as pipe:
        answered = select.select([pipe], [], [], 10)[0]
        if not answered:
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return ast.literal_eval(pipe.read().decode()) if answered else None


@needs_fork
def test_a_child_forked_while_a_thread_enters_a_block():
    """The child had a copy of a locked lock that nothing would release: its first block hung."""

    def enter():
        with kernels.use("cpu"):
            return dispatch.forced()

    with dispatch._entering:
        assert in_fork(enter) == "cpu"


@needs_fork
def test_a_child_keeps_the_blocks_of_the_thread_that_forked():
    """In the child another thread's block never ended, so its backend stayed forced."""

    def choices():
        with kernels.use("triton"):
            inside = dispatch.forced()
        return inside, dispatch.forced(), len(dispatch._all)

    seen = []
    with kernels.use("reference"):
        in_threads(lambda i: seen.append(in_fork(choices)), 1)
        seen.append(in_fork(choices))
    with kernels.use("cpu"), kernels.use("reference"):
        seen.append(in_fork(choices))
    assert seen == [
        ("triton", None, 0), ("triton", "reference", 1), ("triton", "reference", 2),
    ]  # fmt: skip
    assert dispatch.forced() is None


def test_a_compiled_function_follows_its_thread(monkeypatch):
    compiled = torch.compile(lambda x: kernels.layer_norm(x) * 1, backend="eager", fullgraph=True)
    x, ran = torch.randn(2, 8, device=DEVICE), []
    monkeypatch.setattr(dispatch, "_MODULES", {**dispatch._MODULES, "cpu": Spy(ran)})

    def run(backend):
        with kernels.use(backend):
            compiled(x)

    run("reference")
    with kernels.use("reference"):
        in_threads(lambda i: run("cpu"), 1)
        assert ran == ["layer_norm_fwd"]
        compiled(x)
    assert ran == ["layer_norm_fwd"]


class Spy:
    """A backend that computes everything by the reference, and records which launchers ran."""

    def __init__(self, ran):
        self.ran = ran

    def why_not(self, *args):
        return None

    def module(self, op):
        return self

    def layer_norm_fwd(self, x, weight, bias, eps):
        self.ran.append("layer_norm_fwd")
        return kernels.reference.layer_norm(x, weight, bias, eps), x.new_zeros(2, len(x))
