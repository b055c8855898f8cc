"""Installed, editable or not at all: gpt2.kernels can be imported, and the name `kernels` is left
to Hugging Face's library.
"""

import os
import shutil
import site
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from processes import ROOT

THEIRS = "kernels==0.16.2"  # Hugging Face's
TRACKED = ("kernels", "gpt2", "csrc", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md")
TRACKED += ("LICENSE", "Makefile")

CHECK = """
import sys
where, theirs = sys.argv[1:]
if theirs == "first":
    import kernels
from transformers import GPT2LMHeadModel
import gpt2
from gpt2 import kernels as ours
from gpt2.kernels.triton import tiles
assert ours.gelu.__module__ == "gpt2.kernels.ops"
if theirs != "absent":
    import kernels
    assert kernels is not ours and hasattr(kernels, "get_kernel"), kernels.__file__
elif where == "root":
    import kernels
    assert kernels is ours
    from kernels.ops import gelu
    import kernels.triton.tiles, kernels.reference
    assert gelu is ours.gelu and kernels.triton.tiles is tiles
    assert kernels.reference.__spec__.name == "gpt2.kernels.reference"
else:
    try:
        import kernels
    except ImportError:
        pass
    else:
        raise AssertionError(f"a top-level kernels was installed: {kernels.__file__}")
assert GPT2LMHeadModel.__name__ == "GPT2LMHeadModel"
print("good")
"""


def run(*command, cwd, **environment):
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, capture_output=True, text=True, env=env | environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


class Environment:
    """A virtual environment on top of this one's packages."""

    def __init__(self, folder: Path):
        run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
        self.python = folder / "bin/python"
        packages = next(folder.glob("lib/python*/site-packages"))
        # A plain path: .pth files there, such as that of our own editable install, are ignored.
        (packages / "outer.pth").write_text("\n".join(site.getsitepackages()) + "\n")

    def pip(self, *args):
        pip = (sys.executable, "-m", "pip", "--python", self.python, "--disable-pip-version-check")
        run(*pip, *args, cwd=ROOT.parent)

    def install(self, *what):
        self.pip("install", "-q", "--no-index", *what)

    def check(self, cwd, where, theirs, **environment):
        args = (self.python, "-c", CHECK, where, theirs)
        assert run(*args, cwd=cwd, **environment) == "good\n"


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """Only the project's files, with links, as in a clean clone."""
    folder = tmp_path_factory.mktemp("source")
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", "lib")
    for name in TRACKED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def index(tmp_path_factory):
    """The build dependencies and the package that shares the name, downloaded once. Without a
    package index the tests that need it are skipped, unless GPT2_TEST_INDEX=1 says that there is
    one."""
    folder = tmp_path_factory.mktemp("wheels")
    pip = (sys.executable, "-m", "pip", "download", "-q", "-d", folder, "setuptools>=77", "wheel")
    try:
        run(*pip, THEIRS, cwd=folder)
    except AssertionError as error:
        if os.environ.get("GPT2_TEST_INDEX") == "1":
            raise
        pytest.skip(f"no package index can be reached: {str(error).splitlines()[-1]}")
    return folder


@pytest.fixture(scope="session")
def wheel(source, index, tmp_path_factory):
    folder = tmp_path_factory.mktemp("built")
    pip = (sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder)
    run(*pip, "--find-links", index, source, cwd=folder)
    return next(folder.glob("*.whl"))


@pytest.mark.full
def test_wheel_holds_gpt2_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"gpt2", "gpt2_kernels-0.1.0.dist-info"}
    present = {name for name in names if name.endswith(".py")}
    wanted = {f"gpt2/{path.relative_to(ROOT)}" for path in (ROOT / "kernels").rglob("*.py")}
    wanted |= {str(path.relative_to(ROOT)) for path in (ROOT / "gpt2").rglob("*.py")}
    assert present == wanted


@pytest.mark.full
def test_wheel_holds_the_sources_and_nothing_compiled(wheel):
    """The link gpt2/csrc is followed, wherever the wheel is built: the sources are compiled where
    they run."""
    names = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("gpt2/csrc/")}
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    assert names == {f"gpt2/{path.relative_to(ROOT)}" for path in sources} and len(names) > 5
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not any(".so" in name for name in zipfile.ZipFile(wheel).namelist())


def small_csrc(source, folder):
    """A copy of the project whose csrc has the same files, nearly empty."""
    copy = shutil.copytree(source, folder / "project", symlinks=True)
    for path in (copy / "csrc").rglob("*.*"):
        path.write_text("")
    return copy


FIRST_USE = """
import torch
from gpt2.kernels.native import libraries
print(libraries.load())
print(*torch.ops.loaded_libraries)
"""


@pytest.mark.full
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_make_wheel_is_for_machines_without_a_compiler(source, index, tmp_path):
    project, cache = small_csrc(source, tmp_path), tmp_path / "cache"
    builder = f"PATH={Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    run("make", "wheel", builder, cwd=project, PIP_FIND_LINKS=str(index), PYTHONPATH=str(project),
        GPT2_KERNELS_CACHE=str(cache))  # fmt: skip
    wheel = next((project / "dist").glob("*.whl"))
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name.endswith(f"-py3-none-{platform}.whl")
    assert {"gpt2/kernels/lib/libgpt2_kernels_cpu.so", "gpt2/kernels/lib/libgpt2_kernels_cpu.json",
            "gpt2/csrc/ops/gelu.cpp"} <= set(zipfile.ZipFile(wheel).namelist())  # fmt: skip
    assert not (project / "kernels/lib").exists(), "the next wheel is a plain one"
    environment = Environment(tmp_path / "venv")
    environment.install("--no-deps", wheel)
    nothing = {"PATH": "/nonexistent", "CXX": "/nonexistent", "HOME": "/nonexistent"}
    nothing["GPT2_KERNELS_CACHE"] = str(tmp_path / "empty")
    reason, loaded = run(environment.python, "-c", FIRST_USE, cwd=tmp_path, **nothing).splitlines()
    assert reason == "None" and loaded.startswith(str(tmp_path / "venv"))
    assert not (tmp_path / "empty").exists()


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("how", [pytest.param("wheel", marks=pytest.mark.full), "editable"])
def test_installing_compiles_nothing_and_the_first_use_does(how, source, index, tmp_path):
    project, cache = small_csrc(source, tmp_path), tmp_path / "cache"
    environment = Environment(tmp_path / "venv")
    what = ("-e", project) if how == "editable" else (project,)
    environment.install("--no-deps", "--find-links", index, *what)
    assert not list(tmp_path.rglob("*.so"))
    args = (environment.python, "-c", FIRST_USE)
    reason, loaded = run(*args, cwd=tmp_path, GPT2_KERNELS_CACHE=str(cache)).splitlines()
    assert reason == "None" and loaded.startswith(str(cache))


@pytest.mark.full  # a new environment each, with transformers
@pytest.mark.grid(full=2)
@pytest.mark.parametrize("theirs", ["absent", "first", "last"])
@pytest.mark.parametrize("installed", ["wheel", "editable", "no"])
def test_beside_the_library_that_owns_the_name(installed, theirs, source, index, tmp_path, request):
    pytest.importorskip("transformers")
    environment = Environment(tmp_path / "venv")
    if theirs == "first":
        environment.install("--find-links", index, THEIRS)
    if installed == "wheel":
        environment.install("--no-deps", request.getfixturevalue("wheel"))
    elif installed == "editable":
        environment.install("--no-deps", "--find-links", index, "-e", source)
    if theirs == "last":
        environment.install("--find-links", index, THEIRS)
    environment.check(source, "root", theirs)
    if installed == "no":  # found through PYTHONPATH, as when run from the repository
        environment.check(tmp_path, "root", theirs, PYTHONPATH=str(source))
    else:
        environment.check(tmp_path, "elsewhere", theirs)
    if installed == "wheel" and theirs != "absent":
        environment.pip("uninstall", "-q", "-y", "gpt2-kernels")
        run(environment.python, "-c", "import kernels; kernels.get_kernel", cwd=tmp_path)


def test_module_runs_under_both_names(source):
    """python -m kernels from the repository prints the same table as python -m gpt2.kernels."""
    tables = [run(sys.executable, "-m", name, cwd=source) for name in ("kernels", "gpt2.kernels")]
    assert tables[0] == tables[1] and "served by" in tables[0]


def test_one_version_below_the_other_library():
    """transformers reads kernels.__version__ if it finds this folder: it must be valid (PEP 440)
    and below 0.17."""
    from packaging.version import Version

    import gpt2

    assert gpt2.__version__ == gpt2.kernels.__version__
    assert f'version = "{gpt2.__version__}"' in (ROOT / "pyproject.toml").read_text()
    assert Version(gpt2.__version__) < Version("0.17")
