"""Everything is in pyproject.toml, but for what depends on the environment: with FINEGRAIN_BUILD_CUDA=1 the CUDA C++
kernels are compiled here (finegrain_ops/backends/cuda/nvcc.py). Without it the install needs no compiler.
"""

from __future__ import annotations

import importlib
import os
import shutil
import sys
import types
from pathlib import Path

from setuptools import Command, setup
from setuptools.command.build import build

ROOT = Path(__file__).resolve().parent
FOLDER = Path("finegrain_ops", "backends", "cuda")


def load_nvcc() -> types.ModuleType:
    """finegrain_ops.backends.cuda.nvcc, without its parents: they import torch, which no build needs."""
    package = types.ModuleType("finegrain_ops_cuda")
    package.__path__ = [str(ROOT / FOLDER)]
    sys.modules[package.__name__] = package
    return importlib.import_module(f"{package.__name__}.nvcc")


class BuildCuda(Command):
    description = "compile the CUDA C++ kernels, if FINEGRAIN_BUILD_CUDA asks for it"
    user_options = ()

    def initialize_options(self) -> None:
        self.build_lib = None
        self.editable_mode = False

    def finalize_options(self) -> None:
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def run(self) -> None:
        output = (ROOT if self.editable_mode else Path(self.build_lib)) / FOLDER / "prebuilt"
        if WANTED:
            NVCC.build_for_install(output, ROOT / "build" / "cuda", ROOT / "finegrain_ops", os.environ)
        elif not self.editable_mode:
            shutil.rmtree(output, ignore_errors=True)  # of an earlier build in the same folder

    def get_source_files(self) -> list[str]:
        return []

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


NVCC = load_nvcc()
try:
    WANTED = NVCC.requested(os.environ)
except NVCC.BuildError as error:
    sys.exit(f"finegrain_ops: {error}")

build.sub_commands = [*build.sub_commands, ("build_cuda", None)]
setup(cmdclass={"build_cuda": BuildCuda}, setup_requires=["ninja"] if WANTED else [])
