"""What a run of a kernel reports: findings, each with the instruction and the source line that caused it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .parser import Instruction


class UnknownInstruction(Exception):
    """The harness does not know an opcode, a modifier, a type or a form of an operand, and so must not guess."""

    def __init__(self, reason: str, text: str, source: str) -> None:
        super().__init__(f"{reason}: `{text}` ({source or 'no source line'})")
        self.reason, self.text, self.source = reason, text, source


class FindingError(RuntimeError):
    """The first finding of a report that stops at it."""


class EndlessLoop(RuntimeError):
    """A block ran far longer than any kernel of the project does, as a mutant may."""


class Kind(str, Enum):
    """Every kind of finding."""

    GLOBAL_OUT_OF_BOUNDS = "global access out of bounds"
    GLOBAL_GAP = "global access between the rows of a view"
    GLOBAL_MISALIGNED = "misaligned global access"
    UNREAD_POINTER = "access through a pointer that the call does not use"
    TWO_BLOCKS_WRITE = "two blocks write the same bytes"
    READ_OF_ANOTHER_BLOCK = "read of what another block wrote in this launch"
    DIFFERENT_VALUES = "threads write different values to one address"
    PARAMETER_OUT_OF_BOUNDS = "parameter read out of bounds"
    SHARED_OUT_OF_BOUNDS = "shared access out of bounds"
    SHARED_MISALIGNED = "misaligned shared access"
    UNINITIALISED = "read of uninitialised shared memory"
    RACE_READ_AFTER_WRITE = "race: read of what another warp wrote"
    RACE_WRITE_AFTER_READ = "race: write over what another warp read"
    RACE_WRITE_AFTER_WRITE = "race: write over what another warp wrote"
    COPY_READ_EARLY = "read of a cp.async in flight"
    COPY_OVERWRITTEN = "write over a cp.async in flight"
    WGMMA_OVERWRITTEN = "write over what a wgmma in flight reads"
    WGMMA_UNFENCED = "wgmma reads a write that no fence.proxy.async follows"
    WGMMA_REGISTER = "register of a wgmma in flight used before its wait"
    WGMMA_DESCRIPTORS = "threads of a warp group have different descriptors"
    WARP_DIVIDED = "a warp is divided at an instruction of the whole warp"
    WARP_GROUP_DIVIDED = "a warp group is divided at wgmma"
    BARRIERS_DIFFER = "threads wait at different barriers"
    DIVISION_BY_ZERO = "integer division by zero"

    def __str__(self) -> str:
        return self.value


@dataclass
class Finding:
    """One kind at one instruction, with the first example and how often it was seen."""

    kind: Kind
    kernel: str
    instruction: Instruction
    block: int
    example: str
    times: int = 1

    def __str__(self) -> str:
        i = self.instruction
        where = f"{self.kernel}, {i.source or 'no source line'}: {i.text}"
        return f"{self.kind} (x{self.times}) at {where}\n    block {self.block}: {self.example}"


@dataclass
class Report:
    """Findings by kind, kernel and instruction; `stop` raises FindingError at the first."""

    stop: bool = False
    by_place: dict[tuple[Kind, str, int], Finding] = field(default_factory=dict)
    kernel: str = ""  # which is running
    block: int = 0
    at: Instruction | None = None  # which is being executed

    def add(self, kind: Kind, example: str) -> None:
        assert self.at is not None, "only instructions cause findings"
        key = (kind, self.kernel, self.at.index)
        if key in self.by_place:
            self.by_place[key].times += 1
            return
        finding = self.by_place[key] = Finding(kind, self.kernel, self.at, self.block, example)
        if self.stop:
            raise FindingError(str(finding))

    @property
    def findings(self) -> list[Finding]:
        return list(self.by_place.values())

    def kinds(self) -> Counter[Kind]:
        """How many instructions have findings of each kind."""
        return Counter(finding.kind for finding in self.findings)

    def __str__(self) -> str:
        return "\n".join(map(str, self.findings))
