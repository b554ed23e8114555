"""Integer arithmetic, logic and shifts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..parser import Instruction
from ..registers import DTYPES, put
from ..report import Kind
from .forms import Form, Run

if TYPE_CHECKING:
    from ..machine import Machine

_BINARY = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "min": np.minimum,
    "max": np.maximum,
}
_UNARY = {"neg": np.negative, "abs": np.abs, "not": np.invert, "popc": np.bitwise_count}


def _operands(i: Instruction, machine: Machine, count: int) -> tuple[Any, ...]:
    """The target and `count` sources, all of the opcode's type."""
    registers = machine.registers
    return registers.view(i.operands[0], i.kind), *(registers.source(o, i.kind) for o in i.operands[1 : count + 1])


def _binary(i: Instruction, machine: Machine) -> Run:
    d, a, b = _operands(i, machine, 2)
    function = _BINARY[i.name]
    return lambda m: function(a, b, out=d, where=m)


def _extreme_relu(i: Instruction, machine: Machine) -> Run:
    """min.relu and max.relu: 0 instead of a negative result."""
    d, a, b = _operands(i, machine, 2)
    function = _BINARY[i.name]
    return lambda m: put(d, np.maximum(function(a, b), 0), m)


def _unary(i: Instruction, machine: Machine) -> Run:
    d, a = _operands(i, machine, 1)
    function = np.logical_not if i.kind == "pred" else _UNARY[i.name]
    return lambda m: put(d, function(a), m)


def _multiply_wide(i: Instruction, machine: Machine) -> Run:
    """mul.wide and mad.wide: a product, and a sum, of twice the width."""
    kind, registers = i.kind, machine.registers
    wide = f"{kind[0]}{2 * int(kind[1:])}"
    a, b = (registers.source(o, kind) for o in i.operands[1:3])
    d, dtype = registers.view(i.operands[0], wide), DTYPES[wide]
    if i.name == "mul":
        return lambda m: np.multiply(a, b, dtype=dtype, out=d, where=m)
    c = registers.source(i.operands[3], wide)
    return lambda m: put(d, np.multiply(a, b, dtype=dtype) + c, m)


def _multiply_high(i: Instruction, machine: Machine) -> Run:
    d, a, b = _operands(i, machine, 2)
    bits = int(i.kind[1:])
    wide = np.dtype(f"{d.dtype.kind}{2 * d.dtype.itemsize}")
    return lambda m: put(d, (np.multiply(a, b, dtype=wide) >> bits).astype(d.dtype), m)


def _multiply_add(i: Instruction, machine: Machine) -> Run:
    d, a, b, c = _operands(i, machine, 3)
    return lambda m: put(d, a * b + c, m)


def _divide(i: Instruction, machine: Machine) -> Run:
    """div and rem, which round towards zero."""
    d, a, b = _operands(i, machine, 2)
    is_quotient = i.name == "div"

    def run(m: Any) -> None:
        is_zero = np.broadcast_to(b == 0, d.shape)
        divisor = b
        if is_zero.any():
            if (is_zero & m).any():
                machine.report.add(Kind.DIVISION_BY_ZERO, f"{int((is_zero & m).sum())} threads")
            divisor = np.where(is_zero, d.dtype.type(1), b)
        remainder = np.fmod(a, divisor)
        put(d, (a - remainder) // divisor if is_quotient else remainder, m)

    return run


def _shift(i: Instruction, machine: Machine) -> Run:
    """Amounts beyond the width give 0, or the sign."""
    kind, registers = i.kind, machine.registers
    bits, keeps_sign = int(kind[1:]), kind[0] == "s"
    d, a = registers.view(i.operands[0], kind), registers.source(i.operands[1], kind)
    amount = registers.source(i.operands[2], "u32")
    function = np.left_shift if i.name == "shl" else np.right_shift
    if np.ndim(amount) == 0:
        if amount >= bits and not keeps_sign:
            return lambda m: put(d, 0, m)
        fixed = d.dtype.type(min(int(amount), bits - 1))
        return lambda m: function(a, fixed, out=d, where=m)

    def run(m: Any) -> None:
        shifted = function(a, np.minimum(amount, bits - 1).astype(d.dtype))
        put(d, shifted if keeps_sign else np.where(amount >= bits, 0, shifted), m)

    return run


def _extract(i: Instruction, machine: Machine) -> Run:
    """bfe: a field of bits; what lies beyond the register is 0, or the sign."""
    kind, registers = i.kind, machine.registers
    bits, keeps_sign = int(kind[1:]), kind[0] == "s"
    d, a = registers.view(i.operands[0], kind), registers.source(i.operands[1], kind)
    start, length = (registers.source(o, "u32") for o in i.operands[2:])

    def run(m: Any) -> None:
        begin = np.minimum(start & 0xFF, 64).astype(np.int64)
        count = np.minimum(length & 0xFF, bits).astype(np.int64)
        # 64 bits, of which the field is first moved to the left end and then to the right one, where the sign, or
        # zeros, come in. A shift by 64 is none in C, so it is made in two steps.
        extended = np.asarray(a).astype(np.int64 if keeps_sign else np.uint64)
        kind_of = extended.dtype.type

        def shifted(x: np.ndarray, amount: np.ndarray, function: np.ufunc) -> np.ndarray:
            half = amount >> 1
            return function(function(x, half.astype(kind_of)), (amount - half).astype(kind_of))

        moved = shifted(shifted(extended, begin, np.right_shift), 64 - count, np.left_shift)
        put(d, shifted(moved, 64 - count, np.right_shift).astype(d.dtype), m)

    return run


def _insert(i: Instruction, machine: Machine) -> Run:
    """bfi: a field of bits of b replaced by the low bits of a."""
    registers, bits = machine.registers, int(i.kind[1:])
    d = registers.view(i.operands[0], i.kind)
    a, b = (registers.source(o, i.kind) for o in i.operands[1:3])
    start, length = (registers.source(o, "u32") for o in i.operands[3:])

    def run(m: Any) -> None:
        begin = np.minimum(start & 0xFF, bits).astype(np.uint64)
        count = np.minimum((length & 0xFF).astype(np.uint64), bits - begin)
        # In two steps, since a shift by 64 is none in C.
        ones = np.where(count == 0, np.uint64(0), ~np.uint64(0) >> (np.uint64(64) - np.maximum(count, 1)))
        mask = np.where(count == 0, np.uint64(0), ones << np.minimum(begin, np.uint64(63)))
        moved = np.asarray(a, np.uint64) << np.minimum(begin, np.uint64(63))
        put(d, (np.asarray(b, np.uint64) & ~mask) | (moved & mask), m)

    return run


def _permute(i: Instruction, machine: Machine) -> Run:
    """prmt without a mode: four bytes of eight, or their signs."""
    registers = machine.registers
    d = registers.view(i.operands[0], "u32")
    a, b, selector = (registers.source(o, "u32") for o in i.operands[1:])

    def run(m: Any) -> None:
        both = np.asarray(a, np.uint64) | (np.asarray(b, np.uint64) << np.uint64(32))
        result = np.zeros(d.shape, np.uint64)
        for k in range(4):
            nibble = (np.asarray(selector, np.uint64) >> np.uint64(4 * k)) & np.uint64(15)
            byte = (both >> ((nibble & np.uint64(7)) * np.uint64(8))) & np.uint64(255)
            sign = np.where(byte >> np.uint64(7), np.uint64(255), np.uint64(0))
            byte = np.where(nibble & np.uint64(8), sign, byte)
            result = result | (byte << np.uint64(8 * k))
        put(d, result, m)

    return run


_ALL = "{s16,s32,s64,u16,u32,u64}"
FORMS = (
    Form(f"{{add,sub}}.{_ALL}", "d x x", _binary),
    Form(f"{{min,max}}.{_ALL}", "d x x", _binary),
    Form("{min,max}.relu.s32", "d x x", _extreme_relu),
    Form(f"mul.lo.{_ALL}", "d x x", _binary),
    Form("{and,or,xor}.{pred,b16,b32,b64}", "d x x", _binary),
    Form("mul.wide.{s16,s32,u16,u32}", "d x x", _multiply_wide),
    Form("mad.wide.{s16,s32,u16,u32}", "d x x x", _multiply_wide),
    Form("mul.hi.{s16,s32,u16,u32}", "d x x", _multiply_high),
    Form(f"mad.lo.{_ALL}", "d x x x", _multiply_add),
    Form(f"{{div,rem}}.{_ALL}", "d x x", _divide),
    Form("{neg,abs}.{s16,s32,s64}", "d x", _unary),
    Form("not.{pred,b16,b32,b64}", "d x", _unary),
    Form("popc.b32", "d x", _unary),
    Form("shl.{b16,b32,b64}", "d x x", _shift),
    Form("shr.{b16,b32,b64,s16,s32,s64,u16,u32,u64}", "d x x", _shift),
    Form("bfe.{s32,u32,s64,u64}", "d x x x", _extract),
    Form("bfi.{b32,b64}", "d x x x x", _insert),
    Form("prmt.b32", "d x x x", _permute),
)
