"""Runs a kernel, one block after another.

All threads of a block execute an instruction at once, under a mask. Where they diverge, those at the earliest
instruction go first, so they meet again where the code does. A barrier ends a turn: all threads that have not returned
wait for it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from .counts import AccessCounts, Coverage, Traffic, class_of
from .global_memory import GlobalMemory
from .instructions import Run, build, check_control
from .instructions.wgmma import WgmmaQueue
from .parser import Instruction, Kernel
from .registers import DTYPES, OperandError, Registers
from .report import EndlessLoop, Kind, Report
from .shared_memory import SharedMemory

_CONTROL = ("bra", "bar", "barrier", "ret", "exit")
_MOST_STEPS = 2_000_000  # pieces of code that a block may run


@dataclass(frozen=True)
class Checks:
    """How closely a run is watched.

    checked: shared memory knows who touched it, and traffic is counted. unit: threads that count as one for races, 32
    or 1. serial: 1 runs each warp (with wgmma, warp group) to its next barrier before the next one, -1 the last one
    first; a race then gives another number.
    """

    checked: bool = True
    unit: int = 32
    serial: int = 0


@dataclass
class _Code:
    """Instructions that are executed one after another."""

    start: int
    runs: list[tuple[Instruction, Run]] = field(default_factory=list)
    end: Instruction | None = None  # a branch, barrier or return; None where the next piece follows
    next: int = -1
    target: int = -1  # of a branch
    classes: Counter[str] = field(default_factory=Counter)
    warps: int = 0  # that have run it

    def indices(self) -> list[int]:
        return [i.index for i, _ in self.runs] + ([] if self.end is None else [self.end.index])


class _Standing(dict):
    """Masks of threads, by (turn, index of the instruction at which they stand)."""

    def join(self, at: tuple[int, int], mask: np.ndarray) -> None:
        if mask.any():
            self[at] = self[at] | mask if at in self else mask


class Machine:
    """A kernel made ready to run with a number of threads; used for many launches."""

    def __init__(self, kernel: Kernel, threads: int, dynamic_shared_bytes: int, checks: Checks) -> None:
        if threads % 32:
            raise ValueError(f"a block has whole warps, not {threads} threads")
        self.kernel, self.threads, self.checks = kernel, threads, checks
        self.all_threads = np.arange(threads)
        self.report = Report()
        self.memory = GlobalMemory(self.report)
        self.registers = Registers(kernel, threads)
        self.counts = AccessCounts(threads)
        self.wgmma = WgmmaQueue(self)
        shared_bytes = kernel.shared_bytes + dynamic_shared_bytes
        self.shared = SharedMemory(
            shared_bytes, self._granule(), checks.unit, threads, self.report, checks.checked, self.wgmma.is_used
        )
        self.predicated: set[int] = set()  # predicated instructions that some thread has executed
        self._newest_group = np.zeros(threads, np.int64)  # of cp.async, by thread
        self._code = self._build()

    def _granule(self) -> int:
        """The bytes of the narrowest access to shared memory."""
        sizes = [4]
        for i in self.kernel.instructions:
            if i.name in ("ld", "st") and i.has("shared", "shared::cta") and i.kind in DTYPES:
                value = i.operands[0 if i.name == "ld" else -1]
                sizes.append(DTYPES[i.kind].itemsize * (len(value) if isinstance(value, list) else 1))
        return min(sizes)

    def _build(self) -> dict[int, _Code]:
        kernel = self.kernel
        for i in kernel.instructions:
            if i.name in _CONTROL:
                check_control(i, kernel)
        branches = [i for i in kernel.instructions if i.name == "bra"]
        targets = {kernel.labels[str(i.operands[0])] for i in branches}
        pieces: dict[int, _Code] = {}
        piece = pieces.setdefault(0, _Code(0))
        for i in kernel.instructions:
            if i.index in targets and i.index != piece.start:
                piece = pieces.setdefault(i.index, _Code(i.index))
            piece.classes[class_of(i)] += 1
            if i.name in _CONTROL and not i.has("warp"):
                piece.end = i
                piece.target = kernel.labels[str(i.operands[0])] if i.name == "bra" else -1
                piece = pieces.setdefault(i.index + 1, _Code(i.index + 1))
            else:
                piece.runs.append((i, self._with_predicate(i, build(i, self))))
        starts = sorted(pieces)
        for start, following in zip(starts, [*starts[1:], -1]):
            pieces[start].next = following
        return pieces

    def _with_predicate(self, i: Instruction, run: Run) -> Run:
        if not i.predicate:
            return run
        try:
            predicate = self.registers.view(i.predicate, "pred")
        except OperandError as error:
            raise i.unknown(str(error)) from None

        def predicated(m: Any) -> None:
            mask = ~predicate if i.negated else predicate.copy()
            if m is not True:
                mask &= m
            if mask.all():
                self.predicated.add(i.index)
                run(True)
            elif mask.any():
                self.predicated.add(i.index)
                run(mask)

        return predicated

    # What instructions ask for

    def active(self, m: Any, address: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The threads of the mask, and their addresses."""
        if m is True:
            return self.all_threads, address
        threads = np.flatnonzero(m)
        return threads, address[threads]

    def whole_warps(self, m: Any) -> np.ndarray:
        """The warps that execute what their threads do together; each should be here with all of its threads."""
        if m is True:
            return self.all_threads[: self.threads // 32]
        by_warp = m.reshape(-1, 32)
        some = by_warp.any(1)
        if (some != by_warp.all(1)).any():
            counts = [f"{count} of warp {warp}" for warp, count in enumerate(by_warp.sum(1)) if 0 < count < 32]
            self.report.add(Kind.WARP_DIVIDED, "threads " + ", ".join(counts))
        return np.flatnonzero(some)

    def commit_group(self, m: Any) -> None:
        active = np.ones(self.threads, bool) if m is True else m
        self.shared.commit(active, self._newest_group)
        self._newest_group += active

    def wait_group(self, m: Any, left: int) -> None:
        active = np.ones(self.threads, bool) if m is True else m
        self.shared.wait(active, self._newest_group - 1 - left)

    # Running

    def launch(
        self,
        memory: GlobalMemory,
        grid: tuple[int, int, int],
        parameters: list[bytes],
        blocks: list[int] | None = None,
    ) -> None:
        """Runs the blocks with these numbers, or all, with counts of their own; findings go to the memory's report."""
        self.memory = memory
        self.report = self.shared.report = memory.report
        self.report.kernel = self.kernel.name
        self.counts.clear()
        self.predicated.clear()
        for piece in self._code.values():
            piece.warps = 0
        self.registers.set_parameters(parameters)
        for number in range(grid[0] * grid[1] * grid[2]) if blocks is None else blocks:
            place = (number % grid[0], number // grid[0] % grid[1], number // grid[0] // grid[1])
            self.registers.begin_block(grid, place)
            self.report.block = number
            with np.errstate(all="ignore"):
                self._run_block()

    def _run_block(self) -> None:
        self.shared.begin_block()
        self._newest_group.fill(0)
        self.wgmma.begin_block()
        ready, waiting = _Standing(), _Standing()
        for turn, threads in enumerate(self._turns()):
            ready.join((turn, 0), threads)
        num_warps, report = self.threads // 32, self.report
        for _ in range(_MOST_STEPS):
            if not ready:
                return
            at = min(ready)
            mask = ready.pop(at)
            piece = self._code[at[1]]
            if mask.all():
                m: Any = True
                piece.warps += num_warps
            else:
                m = mask
                piece.warps += int(mask.reshape(-1, 32).any(1).sum())
            for i, run in piece.runs:
                report.at = i
                run(m)
            self._leave(piece, at[0], mask, ready, waiting)
            if waiting and not ready:
                self._meet(waiting)
                ready, waiting = waiting, _Standing()
        raise EndlessLoop(f"{self.kernel.name}, block {report.block}: still running after {_MOST_STEPS} steps")

    def _turns(self) -> list[np.ndarray]:
        """Groups of threads that run one after another between two barriers: all, or, serially, each warp."""
        if not self.checks.serial:
            return [np.ones(self.threads, bool)]
        group = self.all_threads >> (7 if self.wgmma.is_used else 5)
        return [group == g for g in np.unique(group)[:: self.checks.serial]]

    def _leave(self, piece: _Code, turn: int, mask: np.ndarray, ready: _Standing, waiting: _Standing) -> None:
        """Sends the threads at the end of a piece of code on."""
        end, after = piece.end, (turn, piece.next)
        if end is None:
            if piece.next >= 0:
                ready.join(after, mask)
            return
        self.report.at = end
        chosen = mask
        if end.predicate:
            chosen = mask & (self.registers.view(end.predicate, "pred") != end.negated)
            ready.join(after, mask & ~chosen)
            if chosen.any():
                self.predicated.add(end.index)
        if end.name == "bra":
            ready.join((turn, piece.target), chosen)
        elif end.name in ("bar", "barrier") and chosen.any():
            self.whole_warps(chosen)
            waiting.join(after, chosen)

    def _meet(self, waiting: _Standing) -> None:
        """All threads that have not returned have come to a barrier."""
        places = {after for _, after in waiting}
        if len(places) > 1:
            counts = {self.kernel.instructions[after - 1].text: 0 for after in places}
            for (_, after), mask in waiting.items():
                counts[self.kernel.instructions[after - 1].text] += int(mask.sum())
            lines = sorted(self.kernel.instructions[after - 1].source for after in places)
            self.report.add(Kind.BARRIERS_DIFFER, f"{counts} threads, at {', '.join(lines)}")
        for after in places:
            barrier = self.kernel.instructions[after - 1]
            if barrier.has("red"):
                mask = np.logical_or.reduce([m for (_, place), m in waiting.items() if place == after])
                votes = self.registers.view(str(barrier.operands[2]), "pred")[mask]
                result = votes.any() if barrier.has("or") else votes.all()
                self.registers.view(str(barrier.operands[0]), "pred")[mask] = result
        self.shared.barrier()

    # What the last launch has done

    def instructions(self) -> Counter[str]:
        """Warp instructions, by class."""
        total: Counter[str] = Counter()
        for piece in self._code.values():
            for name, count in piece.classes.items():
                if piece.warps:
                    total[name] += count * piece.warps
        return total

    def traffic(self) -> list[tuple[Instruction, Traffic]]:
        counted = sorted(self.counts.by_instruction.items())
        return [(self.kernel.instructions[index], replace(traffic)) for index, traffic in counted]

    def coverage(self) -> Coverage:
        code = self.kernel.instructions
        reached = {index for piece in self._code.values() if piece.warps for index in piece.indices()}
        executed = {index for index in reached if not code[index].predicate or index in self.predicated}
        return Coverage(self.kernel.digest, frozenset(executed), len(code))
