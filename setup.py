"""Adds one step to the build that pyproject.toml describes: the protobuf code is generated first."""

import runpy
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithProtobuf(build_py):
    def run(self) -> None:
        runpy.run_path(str(Path(__file__).parent / "protos" / "generate.py"), run_name="__main__")
        super().run()


setup(cmdclass={"build_py": BuildWithProtobuf})
