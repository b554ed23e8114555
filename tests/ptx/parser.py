"""Reads the text of a PTX module into the instructions of one kernel, each with the source line that it comes from."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from functools import cached_property

from .report import UnknownInstruction

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
_INSTRUCTION = re.compile(r"^(?:@(!?)([%\w.$]+)\s+)?([a-z][\w.:]*)\s*(.*)$", re.S)
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.*)$", re.S)
_SHARED = re.compile(r"\.shared\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d*)\]")
_FILE = re.compile(r'\.file\s+(\d+)\s+"([^"]*)"(?:\s+"([^"]*)")?')
_OFFSET = re.compile(r"([%\w.$]+)(?:\+(-?\w+))?$")
# Directives within a kernel that say nothing about what it computes, or are read apart; others are refused.
_HARMLESS = {".loc", ".pragma", ".shared"}


@dataclass(frozen=True)
class Address:
    """What stands in square brackets."""

    base: str  # a register or a symbol; "" for an absolute address
    offset: int


Operand = str | list[str] | Address  # a register, immediate or symbol; what stands in braces; an address


@dataclass
class Instruction:
    """One instruction of a kernel."""

    index: int  # its place in the kernel
    opcode: str  # with its modifiers
    operands: list[Operand]
    predicate: str = ""
    negated: bool = False
    source: str = ""  # file:line
    text: str = ""

    @cached_property
    def parts(self) -> list[str]:
        """Its name, modifiers and types: what stands between the dots."""
        return self.opcode.split(".")

    @property
    def name(self) -> str:
        return self.parts[0]

    @property
    def kind(self) -> str:
        """The type at the opcode's end."""
        return self.parts[-1]

    def has(self, *modifiers: str) -> bool:
        return any(modifier in self.parts for modifier in modifiers)

    def unknown(self, reason: str) -> UnknownInstruction:
        return UnknownInstruction(reason, self.text, self.source)


@dataclass
class Kernel:
    """The code of one kernel, its registers, parameters and shared memory."""

    name: str
    parameters: dict[str, int]  # bytes, by name, in order
    digest: str  # of the module's text
    registers: dict[str, str] = field(default_factory=dict)  # name, or prefix<count>, and type
    shared: dict[str, int] = field(default_factory=dict)  # offsets of symbols in shared memory
    shared_bytes: int = 0  # without the extern array
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # index of the next instruction


def parse(text: str, name: str | None = None) -> Kernel:
    """The kernel `name`, or the first one.

    Raises:
        ValueError: there is no such kernel.
        UnknownInstruction: a statement cannot be read.
    """
    files = {m[1]: (m[3] or m[2]).rsplit("/", 1)[-1] for m in _FILE.finditer(text)}
    clean = _COMMENT.sub(lambda m: "\n" if "\n" in m[0] else "", text.replace("\0", ""))
    wanted = r"[\w$]+" if name is None else re.escape(name)
    entry = re.search(rf"\.entry\s+({wanted})\s*\(([^)]*)\)", clean)
    if entry is None:
        raise ValueError(f"the module has no kernel {name or ''}")
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    kernel = Kernel(entry[1], _parameters(entry[2]), digest)
    body = _body(clean, clean.index("{", entry.end()))
    extern = []
    for match in _SHARED.finditer(clean[: entry.start()] + body):
        alignment, symbol, size = int(match[1]), match[2], match[3]
        if not size:
            extern.append(symbol)
            continue
        kernel.shared_bytes = -(-kernel.shared_bytes // alignment) * alignment
        kernel.shared[symbol] = kernel.shared_bytes
        kernel.shared_bytes += int(size)
    if extern:  # it begins after the static arrays
        kernel.shared_bytes = -(-kernel.shared_bytes // 128) * 128
        kernel.shared |= dict.fromkeys(extern, kernel.shared_bytes)
    _Statements(kernel, files).read(body)
    return kernel


_SIZES = {"8": 1, "16": 2, "32": 4, "64": 8}


def _parameters(text: str) -> dict[str, int]:
    sizes = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        match = re.match(r"\.param\s.*?\.[busf](8|16|32|64)\s+(?:\.ptr.*\s)?([\w$]+)(?:\[(\d+)\])?$", part, re.S)
        if match is None:
            raise UnknownInstruction("a parameter that cannot be read", part, "")
        sizes[match[2]] = _SIZES[match[1]] * int(match[3] or 1)
    return sizes


def _body(text: str, start: int) -> str:
    depth = 0
    for match in re.finditer(r"[{}]", text[start:]):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return text[start + 1 : start + match.start()]
    raise ValueError("unbalanced braces")


class _Statements:
    """Reads a kernel's body. Braces, as inline assembly has them, open scopes with registers of their own."""

    def __init__(self, kernel: Kernel, files: dict[str, str]) -> None:
        self.kernel, self.files = kernel, files
        self.source = ""
        self.scopes: list[dict[str, str]] = [{}]  # each register's name in the text, and one that is unique
        self.num_scopes = 0

    def read(self, body: str) -> None:
        pending = ""  # an instruction may go over several lines
        for line in body.splitlines():
            line = line.strip()
            if re.match(r"\.loc\s", line):
                _, file, number, *_ = line.split()
                self.source = f"{self.files.get(file, file)}:{number}"
                continue
            *complete, pending = f"{pending} {line}".split(";")
            for statement in complete:
                self._statement(statement.strip())
            if re.fullmatch(r"\s*(?:[{}\s]|[$\w]+:|\.pragma[^;]*)*\s*", pending):  # no semicolon follows these
                self._statement(pending.strip())
                pending = ""
        if pending.strip():
            raise UnknownInstruction("a statement without an end", pending.strip(), self.source)

    def _statement(self, text: str) -> None:
        text = self._open(text)
        closing = 0
        while text.endswith("}") and text.count("}") > text.count("{"):
            text, closing = text[:-1].strip(), closing + 1
        if match := _REGISTERS.match(text):
            for name in match[2].replace(" ", "").split(","):
                unique = name if len(self.scopes) == 1 else f"{name}@{self.scopes[-1]['']}"
                self.scopes[-1][name] = unique
                self.kernel.registers[unique] = match[1]
        elif text.startswith("."):
            if text.split()[0] not in _HARMLESS:
                raise UnknownInstruction("unknown directive", text, self.source)
        elif text:
            self.kernel.instructions.append(self._instruction(text))
        for _ in range(closing):
            self.scopes.pop()

    def _open(self, text: str) -> str:
        """Takes the braces and labels from the beginning of a statement."""
        while text:
            if match := re.match(r"([$\w]+):\s*", text):
                self.kernel.labels[match[1]] = len(self.kernel.instructions)
                text = text[match.end() :]
            elif text[0] == "{":
                self.num_scopes += 1
                self.scopes.append({"": str(self.num_scopes)})
                text = text[1:].strip()
            elif text[0] == "}":
                self.scopes.pop()
                text = text[1:].strip()
            else:
                break
        return text

    def _instruction(self, text: str) -> Instruction:
        match = _INSTRUCTION.match(text)
        if match is None:
            raise UnknownInstruction("a statement that cannot be read", text, self.source)
        operands = [self._operand(operand, text) for operand in _split(match[4])]
        index, predicate = len(self.kernel.instructions), self._name(match[2] or "")
        return Instruction(index, match[3], operands, predicate, bool(match[1]), self.source, text)

    def _operand(self, text: str, statement: str) -> Operand:
        if text.startswith("{"):
            return [self._name(part.strip()) for part in text.strip("{} ").split(",")]
        if not text.startswith("["):
            first, bar, second = text.partition("|")
            return self._name(text) if not bar else f"{self._name(first.strip())}|{self._name(second.strip())}"
        inner = text.strip("[] ").replace(" ", "")
        if re.fullmatch(r"-?\d+", inner):
            return Address("", int(inner))
        match = _OFFSET.fullmatch(inner)
        try:
            assert match is not None
            return Address(self._name(match[1]), int(match[2] or "0", 0))
        except (AssertionError, ValueError):
            raise UnknownInstruction("an address that cannot be read", statement, self.source) from None

    def _name(self, text: str) -> str:
        return next((scope[text] for scope in reversed(self.scopes) if text and text in scope), text)


def _split(text: str) -> list[str]:
    """The operands: parts between commas that stand in no brackets."""
    parts, depth, start = [], 0, 0
    for position, character in enumerate(text):
        depth += (character in "{[") - (character in "}]")
        if character == "," and depth == 0:
            parts.append(text[start:position].strip())
            start = position + 1
    parts.append(text[start:].strip())
    return [part for part in parts if part]
