"""kernels/triton/launch.py: what it launches equals Triton's own launch, and when it asks Triton.

On a GPU the tests of the ops show that the results are right. Here a driver that launches nothing
takes the kernels, in another process without the interpreter.
"""

import pytest
from processes import ROOT, run_python
from util import DEVICE

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(DEVICE == "cuda", reason="a GPU has a driver of its own"),
]

SCRIPT = f"""
import sys
sys.path[:0] = [{str(ROOT / "benchmarks")!r}]
import torch
from bench.host import stub_driver
if (reason := stub_driver.why_not()) is not None:
    sys.exit(f"skip: {{reason}}")
from triton import knobs
from triton.runtime.jit import JITFunction
from gpt2.kernels.triton import launch as module
from gpt2.kernels.triton.layer_norm import layer_norm_bwd, layer_norm_fwd

by_triton, run = [], JITFunction.run
def counted(kernel, *args, **kwargs):
    by_triton.append(kernel.fn.__name__)
    return run(kernel, *args, **kwargs)
JITFunction.run = counted

def asked(function, *args):
    "The number of launches of a call, and how many of them asked Triton."
    before, launched = len(by_triton), stub_driver.launches()
    function(*args)
    return stub_driver.launches() - launched, len(by_triton) - before

def norm(N=8, C=32, dtype=torch.float32, start=0, eps=1e-5):
    x = torch.zeros(N * C + start, dtype=dtype)[start:].view(N, C)
    return layer_norm_fwd, x, torch.zeros(C), torch.zeros(C), eps

with stub_driver.active():
"""


def check(body):
    lines = "".join(f"    {line}\n" for line in body.strip().splitlines())
    done = run_python(SCRIPT + lines)
    if done.stderr.startswith("skip: "):
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr


def test_triton_is_asked_once():
    check(
        """
assert asked(*norm()) == (1, 1)
assert asked(*norm()) == (1, 0)
x, w, stats = torch.zeros(8, 32), torch.zeros(32), torch.zeros(2, 8)
assert asked(layer_norm_bwd, x, x, x, w, stats) == (2, 2)
assert asked(layer_norm_bwd, x, x, x, w, stats) == (2, 0)
"""
    )


def test_triton_is_asked_again_for_other_arguments():
    """Code is compiled for dtypes, integers, constants, and the alignment of each pointer: a launch
    of code for aligned pointers with others would fault."""
    check(
        """
assert asked(*norm()) == (1, 1)
for other in ({"N": 7}, {"C": 16}, {"dtype": torch.bfloat16}, {"eps": 1e-6}):
    assert asked(*norm(**other)) == (1, 1), other
for _ in range(2):
    assert asked(*norm(start=1)) == (1, 1)
assert asked(*norm()) == (1, 0)
"""
    )


def test_a_profiler_sees_every_launch():
    check(
        """
seen = []
def hook(metadata):
    seen.append(metadata.get()["name"])
if hasattr(knobs.runtime.launch_enter_hook, "add"):
    asked(*norm())
    knobs.runtime.launch_enter_hook.add(hook)
    asked(*norm())
    asked(*norm())
    assert seen == ["_layer_norm_fwd_kernel"] * 2, seen
    knobs.runtime.launch_enter_hook.remove(hook)
    assert asked(*norm()) == (1, 0)
"""
    )


def test_memory_is_bounded():
    check(
        """
module.MOST = 4
for N in range(1, 12):
    asked(*norm(N=N))
    assert len(module._known) <= 4
assert asked(*norm(N=11)) == (1, 0)
"""
    )
