"""Compiles the Triton kernels for GPUs that are not here, and reads registers, spills and hot loops from the machine
code.

    python -m bench.machine_code    prints a table for every shipped configuration of the forward kernel

triton's wheel brings the compiler and the disassemblers; no GPU or driver is needed. Not under TRITON_INTERPRET=1.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton.backends.nvidia
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from finegrain_ops.kernels.attention_forward import attention_forward_kernel, launch_arguments

SHARED_MEMORY_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024, 120: 99 * 1024}
ELEMENT_SIZE = {"fp16": 2, "bf16": 2, "fp32": 4}


@dataclass(frozen=True)
class Loop:
    """A loop around tensor-core (or, in float32, FMA) work: its length and how many tensor-core instructions it has."""

    instructions: int
    mma: int
    spills: int  # accesses to registers that were put into memory


@dataclass(frozen=True)
class MachineCode:
    registers: int
    stack_bytes: int  # registers that did not fit: spills
    shared_bytes: int
    loops: tuple[Loop, ...]  # in the order of the code: unbiased, biased, unbiased, masked


def compile_forward(
    compute_capability: int,
    head_dim: int,
    dtype: str = "fp16",
    *,
    has_bias: bool = True,
    has_gate: bool = False,
    is_causal: bool = True,
    scale: float = 0.1,
) -> MachineCode:
    """The forward kernel with the tile that `tuning.py` gives it; a scale <= 0 compiles the variant for such scales."""
    launch = launch_arguments(head_dim, head_dim, ELEMENT_SIZE[dtype], compute_capability, scale)
    constants = {
        "HAS_BIAS": has_bias,
        "HAS_PADDING": has_gate,
        "HAS_GATE": has_gate,
        "IS_CAUSAL": is_causal,
        "RETURN_LSE": True,
        **{name: value for name, value in launch.items() if name.isupper()},
    }
    names = attention_forward_kernel.arg_names
    signature = {name: "constexpr" if name in constants else _type(name, dtype) for name in names}
    aligned = [
        i
        for i, n in enumerate(names)
        if n.endswith("_ptr") or n.startswith(("query_stride", "key_stride", "value_stride"))
    ]
    compiled = triton.compile(
        ASTSource(
            attention_forward_kernel,
            signature,
            constexprs=constants,
            attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
        ),
        target=GPUTarget("cuda", compute_capability, 32),
        options={"num_warps": launch["num_warps"], "num_stages": launch["num_stages"]},
    )
    return _read(compiled.asm["cubin"], compiled.metadata.shared)


def _type(argument: str, dtype: str) -> str:
    if argument.removesuffix("_ptr") in ("query", "key", "value", "output"):
        return "*" + dtype
    if argument in ("bias_ptr", "lse_ptr"):
        return "*fp32"
    if argument == "range_ptr":
        return "*i32"
    if argument.endswith("_ptr"):
        return "*u8"
    return "fp32" if argument in ("factor", "score_multiplier") else "i32"


def _read(cubin: bytes, shared_bytes: int) -> MachineCode:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        lines = _tool("nvdisasm", "-c", file.name).splitlines()
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {usage!r}")
    return MachineCode(int(found[1]), int(found[2]), shared_bytes, tuple(_loops(lines)))


def _loops(lines: list[str]) -> list[Loop]:
    """Backward branches whose body holds matrix products: tensor-core instructions, or many FFMA."""
    labels = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r"\s*(\.L_x_\d+):", line))}
    loops = []
    for i, line in enumerate(lines):
        branch = re.search(r"BRA(?:\.\S+)?\s+.*`\((\.L_x_\d+)\)", line)
        if branch and labels.get(branch[1], i) < i:
            body = [x for x in lines[labels[branch[1]] : i + 1] if re.search(r"/\*[0-9a-f]{4,}\*/", x)]
            mma = sum("HMMA" in x or "HGMMA" in x for x in body)
            if mma or sum("FFMA" in x for x in body) > 64:
                spills = sum(bool(re.search(r"\b(LDL|STL)\b", x)) for x in body)
                loops.append(Loop(len(body), mma, spills))
    return loops


def _tool(name: str, *arguments: str) -> str:
    path = Path(triton.backends.nvidia.__file__).parent / "bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def main() -> None:
    table = Table(title="Forward kernel, causal, with bias")
    for column in ("GPU", "dtype", "head dim", "registers", "spills", "shared KiB", "instructions (MMA) per loop"):
        table.add_column(column)
    for capability in (80, 90):
        for dtype in ("fp16", "fp32"):
            for head_dim in (64, 80, 128, 256):
                code = compile_forward(capability, head_dim, dtype)
                loops = ", ".join(f"{loop.instructions} ({loop.mma})" for loop in code.loops)
                shared = f"{code.shared_bytes / 1024:.0f}"
                table.add_row(
                    f"sm_{capability}", dtype, str(head_dim), str(code.registers), str(code.stack_bytes), shared, loops
                )
    Console().print(table)


if __name__ == "__main__":
    main()
