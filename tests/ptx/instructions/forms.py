"""How the tables of known instructions are written: a pattern of opcodes, their operands, and what builds them.

    Form("add[.{rn}][.ftz].f32", "d x x", build)

In a pattern `[.x]` may be left out and `{a,b}` is one of several; everything else is literal. An opcode that matches no
pattern is refused when the kernel is built, so each modifier that a kernel may have is one that somebody has thought
about: either the builder asks for it, or its table says why it does not matter.

Operands: d a register that is written, D the same, perhaps with a predicate after a bar; V a vector that is written, or
d; v a vector that is read, or x; x a register, immediate or symbol; a an address; n a number; p a register or a number
that is a predicate. A question mark follows what may be left out.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..parser import Address, Instruction

if TYPE_CHECKING:
    from ..machine import Machine

Run = Callable[[Any], None]  # takes the mask of threads: True (all of them) or an array of bool
Builder = Callable[[Instruction, "Machine"], Run]


@dataclass(frozen=True)
class Form:
    """One line of a table of known instructions."""

    pattern: str
    operands: str
    build: Builder

    @property
    def names(self) -> list[str]:
        """The opcodes that it is for, without modifiers."""
        match = re.match(r"\{([\w,]+)\}|(\w+)", self.pattern)
        assert match is not None
        return (match[1] or match[2]).split(",")

    @functools.cached_property
    def _regex(self) -> re.Pattern[str]:
        symbols = {".": r"\.", "[": "(?:", "]": ")?", "{": "(?:", "}": ")", ",": "|"}
        return re.compile("".join(symbols.get(character, character) for character in self.pattern))

    def matches(self, opcode: str) -> bool:
        return self._regex.fullmatch(opcode) is not None

    def problem(self, i: Instruction) -> str | None:
        """What is wrong with the operands, if anything."""
        codes = self.operands.split()
        fewest = sum(not code.endswith("?") for code in codes)
        if not fewest <= len(i.operands) <= len(codes):
            return f"{len(i.operands)} operands instead of {self.operands}"
        for number, (code, operand) in enumerate(zip(codes, i.operands)):
            if not _fits(code[0], operand):
                return f"operand {number} should be {code}"
        return None

    def written(self, i: Instruction) -> list[str]:
        """The registers that it writes."""
        names: list[str] = []
        for code, operand in zip(self.operands.split(), i.operands):
            if code[0] in "dDV":
                names += operand if isinstance(operand, list) else str(operand).split("|")
        return names

    def read(self, i: Instruction) -> list[str]:
        """The registers that it reads."""
        names = [i.predicate] if i.predicate else []
        for code, operand in zip(self.operands.split(), i.operands):
            if isinstance(operand, Address):
                names.append(operand.base)
            elif code[0] not in "dDV":
                names += operand if isinstance(operand, list) else [operand]
        return names


def _fits(code: str, operand: object) -> bool:
    if code == "a":
        return isinstance(operand, Address)
    if code in "vV":
        return isinstance(operand, (str, list))
    if not isinstance(operand, str):
        return False
    if code == "n":
        return re.fullmatch(r"-?\w+", operand) is not None
    return code == "D" or "|" not in operand
