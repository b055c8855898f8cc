"""Recorded calls in new processes: when recording starts, the report, and Triton's launches."""

import pytest
from processes import ROOT, run_python
from util import DEVICE

pytestmark = [pytest.mark.cpu_kernels, pytest.mark.usefixtures("replaying")]


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
