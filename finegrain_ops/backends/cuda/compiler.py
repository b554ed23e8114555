"""Compiles a variant with NVRTC, NVIDIA's compiler as a library. It needs no CUDA toolkit; every CUDA build of torch
brings it along.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from . import sources
from .variants import OLDEST_ARCHITECTURE, Variant


class CompileError(RuntimeError):
    """NVRTC is missing, does not know the architecture, or refused the source; the message says which."""


class Target(NamedTuple):
    architecture: int
    is_ptx: bool  # not machine code: NVIDIA's driver compiles it further for a GPU newer than the compiler

    @property
    def option(self) -> str:
        return f"{'compute' if self.is_ptx else 'sm'}_{self.architecture}"


def _nvrtc() -> Any:
    from cuda.bindings import nvrtc

    return nvrtc


def _check(nvrtc: Any, result: Any, *values: Any) -> Any:
    """cuda.bindings returns (result, *values); a result other than success is raised."""
    if int(result) != 0:
        raise CompileError(f"NVRTC failed: {nvrtc.nvrtcGetErrorString(result)[1].decode()}")
    return values[0] if len(values) == 1 else values


@functools.cache
def version() -> tuple[int, int]:
    """Of the NVRTC that cuda.bindings loads.

    Raises:
        CompileError: there is none.
    """
    try:
        nvrtc = _nvrtc()
        major, minor = _check(nvrtc, *nvrtc.nvrtcVersion())
    except (ImportError, OSError, RuntimeError) as error:  # cuda.pathfinder's errors are RuntimeErrors
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CompileError(f"NVRTC cannot be loaded ({reason})") from error
    return int(major), int(minor)


def version_text() -> str:
    return ".".join(map(str, version()))


@functools.cache
def supported_architectures() -> tuple[int, ...]:
    version()
    nvrtc = _nvrtc()
    return tuple(sorted(_check(nvrtc, *nvrtc.nvrtcGetSupportedArchs())))


def target_for(architecture: int) -> Target:
    """What to compile for so that it runs on a GPU of `architecture`: itself, else an older one of the same major
    number, whose machine code runs there, else PTX for the newest one that this NVRTC knows.

    Raises:
        CompileError: there is no NVRTC, or it knows no architecture that old.
    """
    try:
        supported = supported_architectures()
    except CompileError as error:
        later = "" if architecture < 75 else " (or nvidia-cuda-nvrtc, for CUDA 13)"
        raise CompileError(f"{error}; install it with: pip install nvidia-cuda-nvrtc-cu12{later}") from error
    known = [a for a in supported if OLDEST_ARCHITECTURE <= a <= architecture]
    if not known:
        raise CompileError(
            f"NVRTC {version_text()} begins at sm_{min(supported)} and does not know sm_{architecture}, which 12.9 was "
            "the last to know; replace it with: pip uninstall nvidia-cuda-nvrtc; pip install nvidia-cuda-nvrtc-cu12"
        )
    newest = max(known)
    return Target(newest, is_ptx=newest // 10 != architecture // 10)


def options(variant: Variant, runs_on: int | None = None) -> list[str]:
    """`runs_on`: a later architecture, for machine code there that keeps to the instructions of the variant's own. So
    they are tested where there is no older GPU.
    """
    defines = variant.defines()
    if runs_on is not None:
        defines["FINEGRAIN_ARCH"] = 10 * variant.architecture
    return [
        f"--gpu-architecture={target_for(runs_on or variant.architecture).option}",
        "--std=c++17",
        *(f"--define-macro={name}={value}" for name, value in defines.items()),
    ]


def compile(variant: Variant, runs_on: int | None = None) -> bytes:
    """A cubin, or PTX for a GPU that is newer than this NVRTC; `runs_on` as for `options`.

    Raises:
        CompileError: with NVRTC's log where it refused the source.
    """
    target = target_for(runs_on or variant.architecture)
    nvrtc = _nvrtc()
    folder = sources.folder()
    program = _check(
        nvrtc,
        *nvrtc.nvrtcCreateProgram((folder / variant.source).read_bytes(), variant.source.encode(), 0, None, None),
    )
    try:
        arguments = [option.encode() for option in [*options(variant, runs_on), f"--include-path={folder}"]]
        (result,) = nvrtc.nvrtcCompileProgram(program, len(arguments), arguments)
        if int(result) != 0:
            raise CompileError(
                f"NVRTC {version_text()} could not compile {variant.name} for {target.option}:\n"
                + _read(nvrtc, program, "ProgramLog").rstrip(b"\0\n").decode(errors="replace")
            )
        return _read(nvrtc, program, "PTX" if target.is_ptx else "CUBIN")
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _read(nvrtc: Any, program: Any, what: str) -> bytes:
    size = _check(nvrtc, *getattr(nvrtc, f"nvrtcGet{what}Size")(program))
    data = bytearray(size)
    _check(nvrtc, *getattr(nvrtc, f"nvrtcGet{what}")(program, data))
    return bytes(data)
