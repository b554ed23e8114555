"""Matrix products of a warp (mma), and the loads and stores of its fragments.

Products of two 16-bit numbers are exact in float32; their sums are rounded to float32. Tensor cores keep fewer bits of
the smaller summands, so a last bit is not settled here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ..parser import Instruction
from ..registers import OperandError
from ..rounding import from_bf16
from .forms import Form, Run
from .memory import address_of

if TYPE_CHECKING:
    from ..machine import Machine


def to_float32(bits: np.ndarray, is_brain: bool) -> np.ndarray:
    """float32 of the bits of float16 or bfloat16."""
    return from_bf16(bits) if is_brain else bits.view(np.float16).astype(np.float32)


def _fragments(i: Instruction, machine: Machine, counts: tuple[int, int, int, int]) -> list[list[np.ndarray]]:
    """The registers of d, a, b and c."""
    rows = []
    for number, (operand, count) in enumerate(zip(i.operands, counts)):
        names = operand if isinstance(operand, list) else [operand]
        if len(names) != count:
            raise OperandError(f"{len(names)} registers in operand {number}, not {count}")
        kind = "f32" if number in (0, 3) else "b32"
        read = machine.registers.view if number == 0 else machine.registers.per_thread
        rows.append([read(name, kind) for name in names])
    return rows


def _of_warps(registers: list[np.ndarray], warps: np.ndarray) -> np.ndarray:
    """(registers, warps, lanes)"""
    if 32 * len(warps) == len(registers[0]):
        return np.concatenate(registers).reshape(len(registers), -1, 32)
    return np.stack([register.reshape(-1, 32)[warps] for register in registers])


def _write(registers: list[np.ndarray], warps: np.ndarray, values: np.ndarray) -> None:
    if 32 * len(warps) == len(registers[0]):
        for register, value in zip(registers, values):
            register.reshape(-1, 32)[...] = value
        return
    for register, value in zip(registers, values):
        register.reshape(-1, 32)[warps] = value


def _mma(i: Instruction, machine: Machine) -> Run:
    """m16n8k8 and m16n8k16. With g = lane // 4 and t = lane % 4 a register of a holds, of row g or g + 8, columns 2 t
    and 2 t + 1 (or 8 more); one of b those rows of column g; those of c and d columns 2 t and 2 t + 1 of such a row.
    """
    depth, is_brain = int(i.parts[3].removeprefix("m16n8k")), i.parts[-2] == "bf16"
    halves = depth // 8
    d, a, b, c = _fragments(i, machine, (4, 2 * halves, halves, 4))

    def run(m: Any) -> None:
        warps = machine.whole_warps(m)
        count = len(warps)
        left = to_float32(_of_warps(a, warps).view(np.uint16), is_brain).reshape(halves, 2, count, 8, 4, 2)
        left = left.transpose(2, 1, 3, 0, 4, 5).reshape(count, 16, depth)
        right = to_float32(_of_warps(b, warps).view(np.uint16), is_brain).reshape(halves, count, 8, 4, 2)
        right = right.transpose(1, 0, 3, 4, 2).reshape(count, depth, 8)
        product = (left @ right).reshape(count, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(4, count, 32)
        _write(d, warps, product + _of_warps(c, warps))

    return run


def _mma_of_volta(i: Instruction, machine: Machine) -> Run:
    """m8n8k4: four products at once, each by a quad pair, the lanes 4 q to 4 q + 3 and those 16 further on."""
    b_is_row = i.parts[5] == "row"
    d, a, b, c = _fragments(i, machine, (8, 2, 2, 8))
    lane, element = np.arange(32)[:, None], np.arange(8)[None, :]
    quad, half = lane // 4 % 4, lane // 16
    row = (lane & 1) + (element & 2) + 4 * half
    column = (element & 4) + (lane & 2) + (element & 1)

    def by_quad_pair(registers: list[np.ndarray], warps: np.ndarray) -> np.ndarray:
        """(warps, quad pairs, lower or upper lanes, lanes, elements)"""
        bits = np.ascontiguousarray(_of_warps(registers, warps).transpose(1, 2, 0))
        numbers = bits.view(np.float16).astype(np.float32)
        return numbers.reshape(len(warps), 2, 4, 4, 4).transpose(0, 2, 1, 3, 4)

    def run(m: Any) -> None:
        warps = machine.whole_warps(m)
        count = len(warps)
        left = by_quad_pair(a, warps).reshape(count, 4, 8, 4)
        right = by_quad_pair(b, warps)
        if b_is_row:  # a lane has half a row
            right = right.transpose(0, 1, 3, 2, 4).reshape(count, 4, 4, 8)
        else:  # a lane has a column
            right = right.reshape(count, 4, 8, 4).swapaxes(-1, -2)
        product = (left @ right)[:, quad, row, column].transpose(2, 0, 1)
        _write(d, warps, product + _of_warps(c, warps))

    return run


def _matrices(
    i: Instruction, machine: Machine, names: Any, pointer: Any
) -> tuple[list[np.ndarray], Callable[[Any], tuple[np.ndarray, np.ndarray, np.ndarray]]]:
    """The registers, and what finds the warps under a mask, the lanes that point at rows, 8 of each matrix, and the
    addresses of these.
    """
    names = names if isinstance(names, list) else [names]
    count = int(next(part for part in i.parts if part in ("x1", "x2", "x4"))[1:])
    if len(names) != count:
        raise OperandError(f"{len(names)} registers instead of {count}")
    where = address_of(pointer, machine)
    counts = machine.counts if machine.checks.checked else None

    def rows_under(m: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        warps = machine.whole_warps(m)
        lanes = (warps[:, None] * 32 + np.arange(8 * count)).ravel()
        address = where()[lanes]
        if counts is not None:
            counts.note_shared(i, lanes, address, 16)
        return warps, lanes, address

    return [machine.registers.view(name, "b32") for name in names], rows_under


def _load_matrix(i: Instruction, machine: Machine) -> Run:
    """Lane 8 k + r points at row r of matrix k. Its lane 4 r + t receives elements 2 t and 2 t + 1 of row r, or of
    column r with .trans.
    """
    registers, rows_under = _matrices(i, machine, *i.operands)
    count, is_transposed = len(registers), i.has("trans")

    def run(m: Any) -> None:
        warps, lanes, address = rows_under(m)
        words = machine.shared.load(lanes, address, 16)
        matrices = words.view(np.uint16).reshape(len(warps), count, 8, 8)
        if is_transposed:
            matrices = np.ascontiguousarray(matrices.swapaxes(-1, -2))
        _write(registers, warps, matrices.view(np.uint32).reshape(len(warps), count, 32).swapaxes(0, 1))

    return run


def _store_matrix(i: Instruction, machine: Machine) -> Run:
    registers, rows_under = _matrices(i, machine, *reversed(i.operands))
    count, is_transposed = len(registers), i.has("trans")

    def run(m: Any) -> None:
        warps, lanes, address = rows_under(m)
        fragments = np.ascontiguousarray(_of_warps(registers, warps).swapaxes(0, 1))
        matrices = fragments.view(np.uint16).reshape(len(warps), count, 8, 8)
        if is_transposed:
            matrices = np.ascontiguousarray(matrices.swapaxes(-1, -2))
        machine.shared.store(lanes, address, matrices.view(np.dtype("V16")).ravel())

    return run


FORMS = (
    Form("mma.sync.aligned.{m16n8k8,m16n8k16}.row.col.f32.{f16.f16,bf16.bf16}.f32", "V v v v", _mma),
    Form("mma.sync.aligned.m8n8k4.row.{row,col}.f32.f16.f16.f32", "V v v v", _mma_of_volta),
    Form("ldmatrix.sync.aligned.m8n8.{x1,x2,x4}[.trans].shared[::cta].b16", "V a", _load_matrix),
    Form("stmatrix.sync.aligned.m8n8.{x1,x2,x4}[.trans].shared[::cta].b16", "a v", _store_matrix),
)
