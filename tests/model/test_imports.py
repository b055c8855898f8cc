"""The dependencies between the parts of the package, and the cost of importing them."""

import ast
import collections
import graphlib
import itertools
from pathlib import Path

from processes import ROOT, run_python

import gpt2


def imports(path: Path):
    """The modules of this package that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = path.relative_to(ROOT).parent.parts
            base = base[: len(base) - node.level + 1] if node.level else ()
            module = ".".join([*base, *filter(None, [node.module])])
            yield module.replace("gpt2.kernels", "kernels")
            if not node.module or node.level:
                for alias in node.names:
                    yield f"{module}.{alias.name}".replace("gpt2.kernels", "kernels")
        elif isinstance(node, ast.Import):
            yield from (alias.name.replace("gpt2.kernels", "kernels") for alias in node.names)


def test_imports_point_one_way():
    """kernels: ops -> dispatch -> backends, and nothing of gpt2. Nothing in the package imports
    tests or benchmarks."""
    for path in itertools.chain(ROOT.glob("kernels/**/*.py"), ROOT.glob("gpt2/[!kc]*/*.py")):
        found = set(imports(path))
        name = path.relative_to(ROOT).with_suffix("").as_posix()
        assert not any(m.split(".")[0] in ("tests", "benchmarks") for m in found), name
        if name.startswith("kernels/") and name != "kernels/_alias":
            assert not any(m == "gpt2" or m.startswith("gpt2.") for m in found), name
        if name == "kernels/reference":
            assert {m.split(".")[0] for m in found} <= {"math", "torch"}
        if name == "kernels/dispatch":
            assert not any(m.startswith(("kernels.ops", "kernels.autograd")) for m in found)
        if name.startswith("kernels/triton/"):
            assert not any(
                m.startswith(("kernels.ops", "kernels.autograd", "kernels.dispatch")) for m in found
            ), name


def test_importing_touches_nothing():
    """Importing initializes no GPU, starts no compiler, does not import triton, and is fast."""
    done = run_python(
        "import time, torch, sys, subprocess\n"
        "subprocess.Popen = None\n"
        "start = time.perf_counter(); import gpt2.model; took = time.perf_counter() - start\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert not {'torch._dynamo', 'triton'} & set(sys.modules)\n"
        "print(took)"
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.3


# Folder of gpt2 -> folders that it may import; every folder may import BASE.
BASE = {"errors", "checks", "config", "bars", "memory", "device", "kernels"}
ROOMS = {
    **{room: set() for room in BASE},
    "files": set(),
    "data": {"files"},
    "checkpoints": {"files", "data"},
    "layers": set(),
    "block": {"layers"},
    "model": {"block", "layers", "checkpoints", "generate"},  # the last two only in functions
    "graphs": {"layers", "model"},
    "evaluate": {"files", "data", "model"},
    "generate": {"files", "data", "evaluate", "layers", "model"},
    "loading": {"data", "checkpoints", "model"},
    "train": {"files", "data", "checkpoints", "generate", "graphs", "loading", "model"},
    "interop": {"data", "evaluate", "generate", "loading", "model"},
    "cli": {"files", "data", "checkpoints", "evaluate", "generate", "loading", "train"},
}


def arrows(in_functions):
    """Module of gpt2 -> the modules of gpt2 that it imports; kernels counts as one."""
    found = {}
    for path in Path(gpt2.__file__).parent.rglob("[a-z_]*.py"):
        parts = path.relative_to(Path(gpt2.__file__).parent).with_suffix("").parts
        if parts[0] in ("kernels", "csrc", "__init__", "__main__"):
            continue
        package = parts[:-1]
        module = ".".join(package if parts[-1] == "__init__" else parts)
        tree = ast.parse(path.read_text())
        nodes = ast.walk(tree) if in_functions else tree.body
        found[module] = targets = set()
        for node in nodes:
            if isinstance(node, ast.ImportFrom) and node.level:
                base = package[: len(package) - node.level + 1]
                base = [*base, *filter(None, (node.module or "").split("."))]
                targets.update(".".join([*base, alias.name]) for alias in node.names)
    return {
        module: {known(t, found) for t in targets} - {None} for module, targets in found.items()
    }


def known(target, modules):
    """The module that contains a name."""
    if target.startswith("kernels"):
        return "kernels"
    while target and target not in modules:
        target = target.rpartition(".")[0]
    return target or None


def test_rooms_import_what_they_may():
    for module, targets in arrows(in_functions=True).items():
        room = module.partition(".")[0]
        reached = {target.partition(".")[0] for target in targets} - {room}
        assert reached <= ROOMS[room] | BASE, f"{module} imports {reached - ROOMS[room] - BASE}"


def test_imports_have_no_circle():
    """Neither modules, functions included, nor folders at import time may import in a circle."""
    list(graphlib.TopologicalSorter(arrows(in_functions=True)).static_order())
    rooms = collections.defaultdict(set)
    for module, targets in arrows(in_functions=False).items():
        room = module.partition(".")[0]
        rooms[room] |= {target.partition(".")[0] for target in targets} - {room}
    list(graphlib.TopologicalSorter(rooms).static_order())
