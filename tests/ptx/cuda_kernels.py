"""The CUDA C++ kernels of csrc/ compiled to PTX and executed, in the place of the package's own launcher (as
tests/cuda_on_cpu/cpu_launcher.py is).
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import subprocess
from typing import Any

from finegrain_ops.backends.cuda import compiler, nvcc, sources
from finegrain_ops.backends.cuda.arguments import Rows
from finegrain_ops.backends.cuda.variants import Variant

from .global_memory import GlobalMemory
from .launches import Executor, buffer_of, cache_folder, machine_for, write_whole


@functools.cache
def _nvcc() -> nvcc.Nvcc | None:
    try:
        return nvcc.find_nvcc(os.environ)
    except nvcc.BuildError:
        return None


def _is_known_to_nvcc(architecture: int) -> bool:
    found = _nvcc()
    return found is not None and architecture in found.architectures


def missing(architecture: int) -> str | None:
    """Why nothing can be compiled for this architecture here, or None."""
    if _is_known_to_nvcc(architecture):
        return None
    try:
        known = compiler.supported_architectures()
    except compiler.CompileError as error:
        return f"no nvcc for sm_{architecture}, and {error}"
    return (
        None if architecture in known else f"neither nvcc nor NVRTC {compiler.version_text()} knows sm_{architecture}"
    )


@functools.lru_cache(maxsize=256)
def ptx_of(variant: Variant) -> str:
    """From the cache, or compiled now: by nvcc where it knows the architecture, else by NVRTC."""
    by_nvcc = _nvcc() if _is_known_to_nvcc(variant.architecture) else None
    version = f"nvcc {by_nvcc.version}" if by_nvcc else f"NVRTC {compiler.version_text()}"
    key = repr((version, variant.name, variant.defines(), sources.current_digest()))
    path = cache_folder() / "cuda" / f"{variant.name}-{hashlib.sha256(key.encode()).hexdigest()[:24]}.ptx"
    if not path.exists():
        write_whole(path, _by_nvcc(by_nvcc, variant) if by_nvcc else _by_nvrtc(variant))
    return path.read_text()


def _by_nvcc(found: nvcc.Nvcc, variant: Variant) -> str:
    command = [found.path, "-ptx", f"-arch=compute_{variant.architecture}", "-std=c++17", "-lineinfo"]
    command += [f"-D{name}={value}" for name, value in variant.defines().items()]
    command += ["-x", "cu", str(sources.folder() / variant.source), "-o", "-"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"nvcc refused {variant.name}:\n{done.stderr}")
    return done.stdout


def _by_nvrtc(variant: Variant) -> str:
    nvrtc, folder = compiler._nvrtc(), sources.folder()
    code = (folder / variant.source).read_bytes()
    program = compiler._check(nvrtc, *nvrtc.nvrtcCreateProgram(code, variant.source.encode(), 0, None, None))
    options = [f"-arch=compute_{variant.architecture}", "-std=c++17", "-lineinfo", f"-I{folder}"]
    options += [f"-D{name}={value}" for name, value in variant.defines().items()]
    (result,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    if int(result) != 0:
        log = compiler._read(nvrtc, program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
        raise RuntimeError(f"NVRTC refused {variant.name}:\n{log}")
    ptx = compiler._read(nvrtc, program, "PTX").rstrip(b"\0").decode()
    nvrtc.nvrtcDestroyProgram(program)
    return ptx


def source_line(place: str) -> str:
    """The text at file:line, of a finding, in csrc/."""
    file, _, line = place.partition(":")
    return (sources.folder() / file).read_text().splitlines()[int(line) - 1]


class PtxLauncher(Executor):
    """As `finegrain_ops.backends.cuda.machine.Launcher`. `options`: an Executor's."""

    num_processors = 8

    def __init__(self, architecture: int = 75, **options: Any) -> None:
        super().__init__(**options)
        self.architecture = architecture

    def launch(self, variant: Variant, grid: tuple[int, int, int], arguments: ctypes.Structure) -> None:
        ptx = self.mutated(variant.kernel, ptx_of(variant))
        machine = machine_for(ptx, variant.entry, variant.threads, variant.shared_bytes, self.checks)
        memory = GlobalMemory(self.report)
        passed = _with_own_addresses(arguments, memory)
        self.execute(variant.kernel, variant.name, machine, memory, grid, [bytes(passed)])


def _with_own_addresses(arguments: ctypes.Structure, memory: GlobalMemory) -> ctypes.Structure:
    """A copy whose pointers are addresses of `memory`, far from each other. Tensors that are no field, but images in a
    table, keep their real ones.
    """
    copy = type(arguments).from_buffer_copy(arguments)
    kinds = {name: kind for name, kind, *_ in arguments._fields_}
    for name, tensor in arguments.tensors.items():  # type: ignore[attr-defined]
        if name not in kinds:
            memory.bind_real(name, buffer_of(tensor))
        elif kinds[name] is Rows:
            rows = getattr(copy, name)
            rows.data = memory.bind(name, buffer_of(tensor))
        else:
            setattr(copy, name, memory.bind(name, buffer_of(tensor)))
    return copy
