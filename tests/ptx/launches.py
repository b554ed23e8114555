"""What launches have in common, whichever compiler made the kernel: tensors as memory, machines, and a record."""

from __future__ import annotations

import functools
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .counts import Coverage, Traffic, by_source_line
from .global_memory import Buffer, GlobalMemory
from .machine import Checks, Machine
from .parser import Instruction, parse
from .report import Report

_REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass
class Launch:
    """One launch, and what it did."""

    kernel: str
    grid: tuple[int, int, int]
    blocks: int  # that ran
    seconds: float
    instructions: Counter[str]  # executed by warps, by class
    traffic: list[tuple[Instruction, Traffic]]  # of each memory instruction
    coverage: Coverage
    code: list[Instruction]  # all of the kernel's; `coverage` and `traffic` speak of these
    loads: dict[str, int]  # load instructions executed, by pointer argument
    stores: dict[str, int]

    def by_source_line(self) -> dict[str, Traffic]:
        return by_source_line(self.traffic)

    def __str__(self) -> str:
        total = sum(self.instructions.values())
        per_block = self.seconds / max(self.blocks, 1)
        return f"{self.kernel}: {self.blocks} blocks, {total} warp instructions, {1000 * per_block:.0f} ms each"


def merged_coverage(runs: list[Launch]) -> dict[tuple[str, str], Coverage]:
    """What all launches of the same PTX have executed together, by kernel and digest of its PTX."""
    merged: dict[tuple[str, str], Coverage] = {}
    for run in runs:
        key = (run.kernel, run.coverage.digest)
        merged[key] = merged[key] | run.coverage if key in merged else run.coverage
    return merged


class Executor:
    """What runs the launches of one kind of kernel: `report` has what was found, `runs` a record of each launch.

    checked, unit, serial: `machine.Checks`. stop: raise FindingError at the first finding. mutate: gets a kernel's name
    and PTX and returns what to run instead. ctas: gets a kernel's name and grid and returns the numbers of the blocks
    to run.
    """

    def __init__(
        self,
        *,
        checked: bool = True,
        unit: int = 32,
        serial: int = 0,
        stop: bool = False,
        mutate: Callable[[str, str], str] | None = None,
        ctas: Callable[[str, tuple[int, int, int]], list[int]] | None = None,
    ) -> None:
        self.checks = Checks(checked, unit, serial)
        self.mutate, self.ctas = mutate, ctas
        self.report = Report(stop)
        self.runs: list[Launch] = []

    def mutated(self, kernel: str, ptx: str) -> str:
        return ptx if self.mutate is None else self.mutate(kernel, ptx)

    def execute(
        self,
        kernel: str,
        name: str,
        machine: Machine,
        memory: GlobalMemory,
        grid: tuple[int, int, int],
        values: list[bytes],
    ) -> None:
        """Runs the blocks that are asked for, and keeps a record under `name`; `values` are the kernel's parameters."""
        blocks = self.ctas(kernel, grid) if self.ctas else None
        start = time.perf_counter()
        machine.launch(memory, grid, values, blocks)
        seconds = time.perf_counter() - start
        count = grid[0] * grid[1] * grid[2] if blocks is None else len(blocks)
        self.runs.append(_record(name, machine, memory, grid, count, seconds))

    def summary(self) -> str:
        """A line for each launch."""
        return "\n".join(map(str, self.runs))


def _record(
    name: str, machine: Machine, memory: GlobalMemory, grid: tuple[int, int, int], blocks: int, seconds: float
) -> Launch:
    """The record of the machine's last launch."""
    segments = (*memory.segments.values(), *memory.escaped)
    return Launch(
        name,
        grid,
        blocks,
        seconds,
        machine.instructions(),
        machine.traffic(),
        machine.coverage(),
        machine.kernel.instructions,
        {segment.name: segment.loads for segment in segments},
        {segment.name: segment.stores for segment in segments},
    )


@functools.lru_cache(maxsize=32)
def machine_for(ptx: str, entry: str | None, threads: int, shared_bytes: int, checks: Checks) -> Machine:
    return Machine(parse(ptx, entry), threads, shared_bytes, checks)


def address_of(tensor: Tensor) -> int:
    """As `Tensor.data_ptr`, which a Runner watches."""
    return tensor.untyped_storage().data_ptr() + tensor.storage_offset() * tensor.element_size()


def buffer_of(tensor: Tensor) -> Buffer:
    """The tensor's own memory."""
    extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride())) if tensor.numel() else 0
    data = np.empty(0, np.uint8)
    if extent:
        data = tensor.detach().as_strided((extent,), (1,)).view(torch.uint8).numpy()
    return Buffer(data, tuple(tensor.shape), tensor.stride(), tensor.element_size(), address_of(tensor))


def cache_folder() -> Path:
    """Where PTX is kept: FINEGRAIN_PTX_CACHE, or a folder that git ignores."""
    folder = os.environ.get("FINEGRAIN_PTX_CACHE")
    return Path(folder) if folder else _REPOSITORY / ".pytest_cache" / "ptx"


def write_whole(path: Path, text: str) -> None:
    """Writes a file at once, since another process may write it, or read it, at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(text)
    Path(file.name).replace(path)
