"""Hopper's asynchronous matrix products.

Four warps, a warp group, multiply 64 rows from registers or shared memory with a matrix in shared memory, which
descriptors describe. The result is in the registers only after the wait for its group; until then nobody may use them,
nor overwrite what is read.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..parser import Instruction
from ..registers import OperandError
from ..report import Kind
from .forms import Form, Run
from .matrix import to_float32

if TYPE_CHECKING:
    from ..machine import Machine

_GROUP_THREADS = 128
_DEPTH = 16  # of a product of 16-bit elements
_WIDTHS = {0: 16, 1: 128, 2: 64, 3: 32}  # bytes of a row of the layout, by the descriptor's bits 62 and 63


@dataclass
class _Product:
    """A product, or several into the same registers, that has not been waited for."""

    group: int  # which warp group computes it
    names: tuple[str, ...]  # of the registers of the result
    registers: list[np.ndarray]
    values: np.ndarray
    fragments: set[str]  # registers that are read
    reads: list[np.ndarray]  # addresses of pieces of shared memory
    number: int | None = None  # of its commit group


class WgmmaQueue:
    """The products in flight."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        products = [i for i in machine.kernel.instructions if i.name == "wgmma" and i.has("mma_async")]
        self.is_used = bool(products)
        self._results = {name for i in products for name in _names(i.operands[0])}
        self._fragments = {name for i in products for name in _names(i.operands[1])}
        self.in_flight: dict[tuple[int, tuple[str, ...]], _Product] = {}
        self._committed: dict[int, int] = {}  # commit groups, by warp group

    def begin_block(self) -> None:
        self.in_flight.clear()
        self._committed.clear()

    def guard(self, i: Instruction, run: Run, written: Iterable[str], read: Iterable[str]) -> Run:
        """`run`, and a check that it touches no register of a product in flight."""
        written = set(written)
        results = self._results & (written | set(read))
        fragments = self._fragments & written
        if not results and not fragments:
            return run
        own = tuple(i.operands[0]) if i.name == "wgmma" and i.has("mma_async") else None

        def guarded(m: Any) -> None:
            for product in self.in_flight.values():
                # A product may add to the result of the one before it.
                used = fragments & product.fragments
                if product.names != own:
                    used |= results & set(product.names)
                threads = slice(product.group * _GROUP_THREADS, (product.group + 1) * _GROUP_THREADS)
                if used and (m is True or m[threads].any()):
                    self.machine.report.add(Kind.WGMMA_REGISTER, ", ".join(sorted(used)))
            run(m)

        return guarded

    def groups(self, m: Any) -> np.ndarray:
        """The warp groups that are here, each with all of its warps."""
        warps = self.machine.whole_warps(m)
        groups = np.unique(warps // 4)
        if len(warps) != 4 * len(groups):
            self.machine.report.add(Kind.WARP_GROUP_DIVIDED, f"warps {warps.tolist()}")
        return groups

    def commit(self, m: Any) -> None:
        for group in map(int, self.groups(m)):
            number = self._committed[group] = self._committed.get(group, 0) + 1
            for product in self.in_flight.values():
                if product.group == group and product.number is None:
                    product.number = number

    def wait(self, m: Any, left: int) -> None:
        """Finishes all but the newest `left` commit groups."""
        for group in map(int, self.groups(m)):
            newest = self._committed.get(group, 0) - left
            for key, product in list(self.in_flight.items()):
                if product.group != group or product.number is None or product.number > newest:
                    continue
                del self.in_flight[key]
                for register, values in zip(product.registers, product.values):
                    register[group * _GROUP_THREADS : (group + 1) * _GROUP_THREADS] = values
                for address in product.reads:
                    self.machine.shared.finish_wgmma_read(address)


def _names(operand: Any) -> list[str]:
    return operand if isinstance(operand, list) else [str(operand)]


def _fence(i: Instruction, machine: Machine) -> Run:
    """wgmma.fence orders accesses to registers, which here are over before the next instruction begins."""

    def run(m: Any) -> None:
        machine.wgmma.groups(m)

    return run


def _commit(i: Instruction, machine: Machine) -> Run:
    return machine.wgmma.commit


def _wait(i: Instruction, machine: Machine) -> Run:
    left = int(i.operands[0])
    return lambda m: machine.wgmma.wait(m, left)


def _product(i: Instruction, machine: Machine) -> Run:
    registers, queue = machine.registers, machine.wgmma
    columns, is_brain = int(i.parts[4].removeprefix("m64n").split("k")[0]), i.kind == "bf16"
    names = tuple(_names(i.operands[0]))
    if len(names) != columns // 2:
        raise OperandError(f"{len(names)} registers instead of {columns // 2}")
    d = [registers.view(name, "f32") for name in names]
    is_in_registers = isinstance(i.operands[1], list)
    fragments = _names(i.operands[1]) if is_in_registers else []
    if is_in_registers and len(fragments) != 4:
        raise OperandError(f"{len(fragments)} registers instead of 4")
    left = [registers.view(name, "b32") for name in fragments]
    left_matrix = None if is_in_registers else registers.view(str(i.operands[1]), "u64")
    right_matrix = registers.view(str(i.operands[2]), "u64")
    keeps = registers.per_thread(str(i.operands[3]), "pred")
    scales, transposed = i.operands[4:6], i.operands[6:]
    if scales != ["1", "1"] or len(transposed) != 2 - is_in_registers or not set(transposed) <= {"0", "1"}:
        raise OperandError("scales other than 1, or other numbers for transposition")

    def run(m: Any) -> None:
        for group in map(int, queue.groups(m)):
            threads = slice(group * _GROUP_THREADS, (group + 1) * _GROUP_THREADS)
            reads: list[np.ndarray] = []
            if left_matrix is None:
                # Registers: rows 0 or 8, then columns 0 or 8 further on; warp, row, pair of columns.
                bits = np.stack([register[threads] for register in left]).view(np.uint16)
                a = to_float32(bits, is_brain).reshape(2, 2, 4, 8, 4, 2)
                a = a.transpose(2, 1, 3, 0, 4, 5).reshape(64, _DEPTH)
            else:
                a = to_float32(_matrix(machine, left_matrix[threads], 64, transposed[0] == "1", reads), is_brain)
            b = to_float32(_matrix(machine, right_matrix[threads], columns, transposed[-1] == "1", reads), is_brain)
            before = queue.in_flight.get((group, names))
            product = (a @ b.T).reshape(4, 2, 8, columns // 8, 4, 2)
            values = product.transpose(3, 1, 5, 0, 2, 4).reshape(len(d), _GROUP_THREADS)
            if keeps[group * _GROUP_THREADS]:
                values = values + (np.stack([register[threads] for register in d]) if before is None else before.values)
            for register in d:
                register[threads] = np.nan  # until the wait
            older, read = ([], set()) if before is None else (before.reads, before.fragments)
            queue.in_flight[group, names] = _Product(group, names, d, values, {*read, *fragments}, older + reads)

    return run


def _matrix(
    machine: Machine, descriptors: np.ndarray, rows: int, is_transposed: bool, reads: list[np.ndarray]
) -> np.ndarray:
    """The bits of (rows, 16) elements. A piece is 8 elements that lie together; layouts as in the PTX ISA's "Shared
    Memory Matrix Layout", and as CUTLASS writes them (mma_sm90_desc.hpp).
    """
    descriptor = int(descriptors[0])
    if (descriptors != descriptors[0]).any():
        machine.report.add(Kind.WGMMA_DESCRIPTORS, hex(descriptor))
    start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    width = _WIDTHS[descriptor >> 62]
    if descriptor >> 49 & 7:
        assert machine.report.at is not None
        raise machine.report.at.unknown("a descriptor with a base offset")
    if not is_transposed:
        row, piece = np.mgrid[:rows, :2]
        across = leading if width == 16 else 16
        address = start + row // 8 * stride + row % 8 * width + piece * across
    else:
        depth, piece = np.mgrid[:_DEPTH, : rows // 8]
        if width == 16:
            address = start + piece * stride + depth // 8 * leading + depth % 8 * 16
        else:
            in_row = width // 16  # pieces
            address = start + piece // in_row * leading + piece % in_row * 16 + depth // 8 * stride + depth % 8 * width
    address = address ^ ((address >> 7 & (width // 16 - 1)) << 4)  # swizzled
    flat = address.ravel()
    reads.append(flat)
    words = machine.shared.begin_wgmma_read(flat)
    elements = words.view(np.uint16).reshape(*address.shape, 8)
    if is_transposed:
        return np.ascontiguousarray(elements.reshape(_DEPTH, rows).T)
    return elements.reshape(rows, _DEPTH)


_SHAPES = ",".join(f"m64n{n}k16" for n in range(8, 257, 8))
FORMS = (
    Form("wgmma.fence.sync.aligned", "", _fence),
    Form("wgmma.commit_group.sync.aligned", "", _commit),
    Form("wgmma.wait_group.sync.aligned", "n", _wait),
    Form(f"wgmma.mma_async.sync.aligned.{{{_SHAPES}}}.f32.{{f16.f16,bf16.bf16}}", "V v x x n n n n?", _product),
)
