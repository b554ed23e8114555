"""Counts of what a kernel does: warp instructions by class, memory traffic by instruction, and which code ran."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .parser import Instruction

_SECTOR_BITS = 5  # sectors of 32 bytes
_MOST_PATTERNS = 4_000  # that are remembered, a few kilobytes each
_OWN_CLASS = {
    *("mma", "wgmma", "ldmatrix", "stmatrix", "shfl", "redux", "vote"),
    *("bar", "barrier", "bra", "ret", "ex2", "cvt", "fma", "mov"),
}


@dataclass
class Traffic:
    """What one memory instruction has moved, over all warps."""

    requests: int = 0  # of warps
    bytes: int = 0
    sectors: int = 0  # of global memory
    wavefronts: int = 0  # of shared memory
    least_wavefronts: int = 0  # without bank conflicts

    def __iadd__(self, other: Traffic) -> Traffic:
        for name in vars(self):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        return self


@dataclass(frozen=True)
class Coverage:
    """Which instructions of a kernel have run at least once, some thread's predicate being true."""

    digest: str  # of the PTX
    executed: frozenset[int]
    total: int

    def __or__(self, other: Coverage) -> Coverage:
        if self.digest != other.digest:
            raise ValueError("coverage of different PTX cannot be merged")
        return Coverage(self.digest, self.executed | other.executed, self.total)

    @property
    def share(self) -> float:
        return len(self.executed) / max(self.total, 1)


class AccessCounts:
    """Counts the accesses to memory, by instruction."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.by_instruction: dict[int, Traffic] = {}
        self._patterns: dict[tuple, tuple[int, ...]] = {}

    def clear(self) -> None:
        self.by_instruction = {}

    def note_global(self, i: Instruction, threads: np.ndarray, address: np.ndarray, size: int) -> None:
        # Relative to a sector, since a loop makes the same pattern over and over, each time at other addresses.
        relative = address - ((address[0] >> np.uint64(_SECTOR_BITS)) << np.uint64(_SECTOR_BITS))
        key = (size, relative.tobytes(), self._threads_key(threads))
        if (found := self._patterns.get(key)) is None:
            found = self._remember(key, (sectors(address, threads >> 5, size), len(np.unique(threads >> 5))))
        traffic = self.by_instruction.setdefault(i.index, Traffic())
        traffic.sectors += found[0]
        traffic.requests += found[1]
        traffic.bytes += size * len(threads)

    def note_shared(self, i: Instruction, threads: np.ndarray, address: np.ndarray, size: int) -> None:
        is_matrix, is_copy = "matrix" in i.opcode, i.name == "cp"
        key = (size, is_matrix, address.tobytes(), self._threads_key(threads))
        if (found := self._patterns.get(key)) is None:
            # Wide accesses are made by half and quarter warps, a matrix at a time.
            lanes_at_once = 8 if is_matrix else 32 if size <= 4 else 128 // size
            phase = (threads >> 5) * 32 + (threads & 31) // lanes_at_once
            found = self._remember(key, (*wavefronts(address, phase, size), len(np.unique(threads >> 5))))
        traffic = self.by_instruction.setdefault(i.index, Traffic())
        traffic.wavefronts += found[0]
        traffic.least_wavefronts += found[1]
        if not is_copy:  # its request is counted where it reads
            traffic.requests += found[2]
            traffic.bytes += size * len(threads)

    def _threads_key(self, threads: np.ndarray) -> bytes:
        return b"" if len(threads) == self.threads else threads.tobytes()

    def _remember(self, key: tuple, counts: tuple[int, ...]) -> tuple[int, ...]:
        if len(self._patterns) >= _MOST_PATTERNS:
            self._patterns.clear()
        self._patterns[key] = counts
        return counts


def sectors(address: np.ndarray, warps: np.ndarray, size: int) -> int:
    """Sectors that the warps touch with one request each."""
    touched = np.concatenate([address, address + np.uint64(size - 1)]) >> np.uint64(_SECTOR_BITS)
    return len(np.unique((np.tile(warps, 2).astype(np.uint64) << np.uint64(58)) ^ touched))


def wavefronts(address: np.ndarray, phase: np.ndarray, size: int) -> tuple[int, int]:
    """How many a shared access takes, and how many without bank conflicts: in each phase the different words of a bank
    come one after another.
    """
    words = np.maximum(size // 4, 1)
    key = (phase[:, None].astype(np.int64) << 32) | ((address.astype(np.int64) >> 2)[:, None] + np.arange(words))
    distinct = np.unique(key)
    per_bank = np.bincount(((distinct >> 32) << 5) | (distinct & 31))
    per_bank = np.append(per_bank, np.zeros(-len(per_bank) % 32, per_bank.dtype)).reshape(-1, 32)
    worst = per_bank.max(1)
    return int(worst.sum()), int((worst > 0).sum())


def class_of(i: Instruction) -> str:
    """What an instruction is counted as."""
    if i.name in ("ld", "st"):
        space = next((part for part in i.parts if part.split("::")[0] in ("global", "shared", "param")), "")
        return f"{i.name}.{space}"
    if i.name == "cp":
        return "cp.async"
    if i.name in _OWN_CLASS:
        return i.name
    return "float" if i.kind[0] == "f" or i.kind.startswith("bf") else "integer"


def by_source_line(traffic: list[tuple[Instruction, Traffic]]) -> dict[str, Traffic]:
    """Adds up the instructions of each line, file:line."""
    lines: dict[str, Traffic] = {}
    for instruction, counted in traffic:
        total = lines.setdefault(instruction.source, Traffic())
        total += counted
    return lines
