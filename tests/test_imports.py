"""How the parts of the package depend on each other, and what importing them costs."""

import ast
import graphlib
import itertools
from pathlib import Path

from test_dispatch import ROOT, run_python

import gpt2


def imports(path: Path):
    """Modules of this package that a file imports, as they stand in the folder tree."""
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
    """cli -> train / sampling -> model -> kernels (ops -> dispatch -> backends); nothing in the
    package looks at tests or benchmarks."""
    for path in itertools.chain(ROOT.glob("kernels/**/*.py"), ROOT.glob("gpt2/*.py")):
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
        if name in ("gpt2/model", "gpt2/config"):
            above = ("cli", "train", "sampling", "checkpoint", "data", "tokenizer", "optim")
            assert not any(m.startswith(tuple(f"gpt2.{a}" for a in above)) for m in found), name


def test_importing_touches_nothing():
    """No GPU is initialised, no compiler starts, triton itself is not imported, and it is quick."""
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


def test_a_module_of_gpt2_imports_none_above_it():
    """Those of a module, not of a function: Model.from_pretrained may reach for interop."""
    imports = {}
    for path in Path(gpt2.__file__).parent.glob("[a-z]*.py"):
        found = imports[path.stem] = set()
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                modules = [node.module] if node.module else [a.name for a in node.names]
                found.update(module.partition(".")[0] for module in modules)
    list(graphlib.TopologicalSorter(imports).static_order())  # raises where there is a cycle

    def reached(module):
        return {module}.union(*map(reached, imports.get(module, ())))

    for above, below in itertools.pairwise(("cli", "train", "finetune", "convert", "interop")):
        assert above not in reached(below)
        assert below in reached(above) or above == "cli"  # which imports what a command needs
    assert "model" in reached("interop")
    assert not reached("model") & {"interop", "weights", "convert", "sampling", "train", "cli"}
