"""No kernel may cost more than tests/tools/costs.json says: see costs.py."""

import json
import subprocess
import sys
from pathlib import Path

import costs
import pytest
from backends import CUDA, ON_GPU, TRITON

# Versions of nvcc differ a little in instructions; the other counts are exact.
SLACK = {"warp_instructions": 1.05}


@pytest.mark.full
@pytest.mark.skipif(ON_GPU, reason="on a GPU nothing is emulated")
@pytest.mark.parametrize("backend", [CUDA, TRITON])
def test_no_kernel_costs_more_than_it_did(backend):
    script = Path(costs.__file__)
    printed = subprocess.run(
        [sys.executable, script, backend], capture_output=True, text=True, check=True
    ).stdout
    found, recorded = json.loads(printed), json.loads(costs.RECORDED.read_text())[backend]
    assert found.keys() == recorded.keys(), "python tests/tools/costs.py --record"
    dearer = [
        f"{kernel}: {what} {found[kernel][what]}, recorded {most}"
        for kernel, counts in recorded.items()
        for what, most in counts.items()
        if found[kernel][what] > most * SLACK.get(what, 1)
    ]
    assert not dearer, "\n".join(dearer)
