"""A wheel that carries a built library is for one platform; all else stands in pyproject.toml."""

import sysconfig
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel


class Wheel(bdist_wheel):
    def get_tag(self):
        python, abi, platform = super().get_tag()
        if any(Path(self.get_finalized_command("build_py").build_lib).rglob("*.so")):
            platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        return python, abi, platform


setup(cmdclass={"bdist_wheel": Wheel})
