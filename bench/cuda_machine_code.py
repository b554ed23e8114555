"""Compiles variants of the CUDA C++ kernels for GPUs that are not here, and reads their machine code.

nvcc compiles where there is one that knows the architecture (CUDA_HOME, PATH); elsewhere NVRTC does. The disassemblers
come with triton's wheel.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton.backends.nvidia

from finegrain_ops.backends.cuda import compiler as nvrtc
from finegrain_ops.backends.cuda import sources
from finegrain_ops.backends.cuda.variants import Variant

from .machine_code import read_sass

_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)")
_PTXAS_REGISTERS = re.compile(r"Used (\d+) registers")
_PTXAS_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
# Where an ELF file of 64 bits has its flags, and the two architectures in those of a cubin: real, and virtual.
_FLAGS_AT, _VOLTA, _TURING = 48, (70 << 16) | 70, (75 << 16) | 75
_ARCHITECTURES_IN_FLAGS = 0x00FF00FF


@dataclass(frozen=True)
class Cubin:
    data: bytes
    compiler: str
    log: str  # what `ptxas -v` printed; "" of NVRTC


@dataclass(frozen=True)
class CudaCode:
    compiler: str
    registers: int  # of a thread
    stack_bytes: int
    spilled_bytes: int | None  # stores and loads as ptxas counts them; None where it was not asked
    spills: int  # LDL and STL, registers' way into memory and back
    static_shared_bytes: int
    matrix: dict[str, int]  # tensor-core instructions by opcode
    ffma: int
    wide_global_loads: int  # of 128 bits, into registers or into shared memory
    wide_shared_loads: int  # of 128 bits, or matrices
    loops: tuple[str, ...]  # "HMMA 534": what makes the products of a loop, and how many instructions there are in all
    disagreement: str = ""  # between ptxas, cuobjdump and the listing


def nvcc_path() -> Path | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    in_home = Path(home, "bin", "nvcc") if home else None
    if in_home is not None and in_home.is_file():
        return in_home
    on_path = shutil.which("nvcc")
    return Path(on_path) if on_path else None


@functools.cache
def _nvcc() -> tuple[Path | None, str, frozenset[int]]:
    """Where it is, its name with its version, and the architectures it knows."""
    path = nvcc_path()
    if path is None:
        return None, "", frozenset()
    version = re.search(r"\bV(\d[\d.]*)", _run(path, "--version").stdout)
    known = re.findall(r"\bsm_(\d+)\b", _run(path, "--list-gpu-code").stdout)
    return path, f"nvcc {version[1]}" if version else "nvcc", frozenset(map(int, known))


def compiler_for(architecture: int) -> str:
    """Its name and version.

    Raises:
        CompileError: none here knows the architecture; the message says what to install.
    """
    _, name, known = _nvcc()
    if architecture in known:
        return name
    target = nvrtc.target_for(architecture)
    if target.architecture != architecture or target.is_ptx:
        raise nvrtc.CompileError(f"neither nvcc nor NVRTC {nvrtc.version_text()} knows sm_{architecture}")
    return f"NVRTC {nvrtc.version_text()}"


def compile_cubin(variant: Variant) -> Cubin:
    name = compiler_for(variant.architecture)
    if name.startswith("NVRTC"):
        return Cubin(nvrtc.compile(variant), name, "")
    path, folder = _nvcc()[0], sources.folder()
    assert path is not None
    with tempfile.TemporaryDirectory() as temporary:
        # A file that includes the source: the source's own `#pragma once` is no warning then.
        source, cubin = Path(temporary, "kernel.cu"), Path(temporary, "kernel.cubin")
        source.write_text(f'#include "{variant.source}"\n')
        result = _run(
            path,
            "-cubin",
            f"-arch=sm_{variant.architecture}",
            "-std=c++17",
            "-Xptxas=-v",
            *(f"-D{macro}={value}" for macro, value in variant.defines().items()),
            f"-I{folder}",
            "-o",
            str(cubin),
            str(source),
            check=False,
        )
        if result.returncode:
            log = "\n".join(line for line in result.stderr.splitlines() if "error" in line) or result.stderr
            raise nvrtc.CompileError(f"{name} could not compile {variant.name}: {log.strip()}")
        return Cubin(cubin.read_bytes(), name, result.stdout + result.stderr)


def read_cubin(cubin: Cubin) -> CudaCode:
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary, "kernel.cubin")
        path.write_bytes(cubin.data)
        usage = _tool("cuobjdump", "-res-usage", str(path))
        path.write_bytes(readable(cubin.data))
        sass = _tool("nvdisasm", "-c", str(path))
    return read(cubin.compiler, cubin.log, usage, sass)


def read(compiler: str, log: str, usage: str, sass: str) -> CudaCode:
    """`usage`: what `cuobjdump -res-usage` printed, `sass`: what nvdisasm did."""
    registers, stack_bytes, static_shared_bytes = read_usage(usage)
    spills, _, loops, _ = read_sass(sass, 0)
    by_ptxas = read_log(log) if log else None
    opcodes = [match[1] for match in map(_INSTRUCTION.search, sass.splitlines()) if match]
    return CudaCode(
        compiler,
        registers,
        stack_bytes,
        by_ptxas[2] if by_ptxas else None,
        spills,
        static_shared_bytes,
        # sm_70 multiplies in four steps, which count as one.
        dict(Counter(re.sub(r"\.STEP0$", "", o) for o in opcodes if re.match(r"HMMA\b(?!.*\.STEP[1-9])", o))),
        sum(o.split(".")[0] == "FFMA" for o in opcodes),
        sum(_is_wide(o, "LDG", "LDGSTS") for o in opcodes),
        sum(_is_wide(o, "LDS") or o.startswith("LDSM.") for o in opcodes),
        tuple(f"{loop.opcode} {loop.instructions}" for loop in loops),
        _disagreement((registers, stack_bytes), by_ptxas, spills),
    )


def read_usage(usage: str) -> tuple[int, int, int]:
    """Registers, bytes of stack, bytes of static shared memory."""
    found = _USAGE.search(usage)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {usage!r}")
    return int(found[1]), int(found[2]), int(found[3])


def read_log(log: str) -> tuple[int, int, int]:
    """Registers, bytes of stack, bytes of spill stores and loads together."""
    registers, spills = _PTXAS_REGISTERS.search(log), _PTXAS_SPILLS.search(log)
    if registers is None or spills is None:
        raise RuntimeError(f"ptxas printed no resource usage: {log!r}")
    return int(registers[1]), int(spills[1]), int(spills[2]) + int(spills[3])


def readable(cubin: bytes) -> bytes:
    """Code for sm_70, which nvdisasm has refused since CUDA 13.1, marked as code for sm_75: the encoding is the same.
    (nvdisasm 12.8, which knows both, prints the same instructions either way.)
    """
    (flags,) = struct.unpack_from("<I", cubin, _FLAGS_AT)
    if flags & _ARCHITECTURES_IN_FLAGS != _VOLTA:
        return cubin
    marked = bytearray(cubin)
    struct.pack_into("<I", marked, _FLAGS_AT, flags & ~_ARCHITECTURES_IN_FLAGS | _TURING)
    return bytes(marked)


def _is_wide(opcode: str, *names: str) -> bool:
    """LDG.E.128.SYS, LDGSTS.E.BYPASS.LTC128B.128, LDS.U.128."""
    name, *suffixes = opcode.split(".")
    return name in names and "128" in suffixes


def _disagreement(by_cuobjdump: tuple[int, int], by_ptxas: tuple[int, int, int] | None, spills: int) -> str:
    if by_ptxas is None:
        return ""
    if by_ptxas[:2] != by_cuobjdump:
        return f"ptxas counts {by_ptxas[:2]} registers and bytes of stack, cuobjdump {by_cuobjdump}"
    if bool(by_ptxas[2]) != bool(spills):
        return f"ptxas counts {by_ptxas[2]} spilled bytes, the listing has {spills} LDL and STL"
    return ""


def _tool(name: str, *arguments: str) -> str:
    return _run(Path(triton.backends.nvidia.__file__).parent / "bin" / name, *arguments).stdout


def _run(path: Path, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=check)
