"""Compiles Triton kernels for GPUs that are not here, and reads registers, spills and hot loops from the machine code.

triton's wheel brings the compiler and the disassemblers; no GPU or driver is needed. Not under TRITON_INTERPRET=1.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Of one block, in bytes. Tiles for sm_80 serve sm_86 and sm_89 too, which have 99 KiB.
SHARED_MEMORY_LIMIT = {80: 99 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}

# A loop with so many FFMA computes matrix products without tensor cores; fewer are arithmetic beside them.
_FEWEST_FFMA = 65

_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")
_LABEL = re.compile(r"\s*(\.L_x_\d+):")
_BRANCH = re.compile(r"\bBRA(?:\.\S+)?\s.*`\((\.L_x_\d+)\)")


@dataclass(frozen=True)
class Loop:
    """A loop around matrix products: its length and how many tensor-core instructions it has."""

    instructions: int
    mma: int
    spills: int  # accesses to registers that were put into memory
    opcode: str  # of its products: HMMA, HGMMA or, without tensor cores, FFMA


@dataclass(frozen=True)
class MachineCode:
    registers: int
    stack_bytes: int  # registers that did not fit
    spills: int  # accesses to them, LDL and STL, in the whole kernel
    shared_bytes: int
    loops: tuple[Loop, ...]  # in the order of the code
    serialized: bool  # wgmma instructions wait for one another, which costs Hopper most of its speed


def compile_kernel(
    kernel: Any,
    constants: Mapping[str, Any],
    compute_capability: int,
    types: Mapping[str, str],
    divisible: Set[str],
    **options: Any,
) -> MachineCode:
    """`types` of the arguments that are no constants, as Triton names them; those in `divisible` are so by 16. options:
    num_warps and what else a launch says besides arguments.
    """
    return _read(compiled_kernel(kernel, constants, compute_capability, types, divisible, **options))


def compiled_kernel(
    kernel: Any,
    constants: Mapping[str, Any],
    compute_capability: int,
    types: Mapping[str, str],
    divisible: Set[str],
    **options: Any,
) -> Any:
    """The same, as Triton has it."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in divisible}
    return triton.compile(
        ASTSource(kernel, signature, constexprs=dict(constants), attrs=attributes),
        target=GPUTarget("cuda", compute_capability, 32),
        options=options,
    )


def _read(compiled: Any) -> MachineCode:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _tool("cuobjdump", "-res-usage", str(cubin))
        sass = _tool("nvdisasm", "-c", str(cubin))
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {usage!r}")
    return MachineCode(int(found[1]), int(found[2]), *read_sass(sass, compiled.metadata.shared))


def read_sass(sass: str, shared_bytes: int) -> tuple[int, int, tuple[Loop, ...], bool]:
    """The fields of MachineCode from `spills` on, of a kernel as nvdisasm prints it."""
    lines = sass.splitlines()
    opcodes = [match[1] if (match := _INSTRUCTION.search(line)) else "" for line in lines]
    bodies = [[x for x in opcodes[start : end + 1] if x] for start, end in _innermost_product_loops(lines, opcodes)]
    # Where ptxas gives up on a pipeline (warnings C7510 to C7515), every product has its own arrive and wait.
    serialized = any(0 < 2 * _count(body, "HGMMA") <= _count(body, "WARPGROUP") for body in bodies)
    return _spills(opcodes), shared_bytes, tuple(_loop(body) for body in bodies), serialized


def _innermost_product_loops(lines: list[str], opcodes: list[str]) -> list[tuple[int, int]]:
    """First and last line of the backward branches around matrix products that hold no other such branch: a jump back
    from code that was moved out of the way spans loops that it has nothing to do with.
    """
    labels = {match[1]: i for i, line in enumerate(lines) if (match := _LABEL.match(line))}
    spans = []
    for i, line in enumerate(lines):
        branch = _BRANCH.search(line)
        start = labels.get(branch[1], i) if branch else i
        if start < i and _product_opcode(opcodes[start:i]):
            spans.append((start, i))
    return [(a, b) for a, b in spans if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in spans)]


def _loop(body: list[str]) -> Loop:
    opcode = _product_opcode(body)
    return Loop(len(body), 0 if opcode == "FFMA" else _count(body, opcode), _spills(body), opcode)


def _product_opcode(opcodes: list[str]) -> str:
    """ "" where there are no matrix products."""
    for tensor_core in ("HGMMA", "HMMA"):
        if _count(opcodes, tensor_core):
            return tensor_core
    return "FFMA" if _count(opcodes, "FFMA") >= _FEWEST_FFMA else ""


def _spills(opcodes: list[str]) -> int:
    return _count(opcodes, "LDL") + _count(opcodes, "STL")


def _count(opcodes: list[str], name: str) -> int:
    """With any suffix: HMMA counts HMMA.16816.F32.BF16."""
    return sum(opcode.split(".")[0] == name for opcode in opcodes)


def _tool(name: str, *arguments: str) -> str:
    path = Path(triton.backends.nvidia.__file__).parent / "bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout
