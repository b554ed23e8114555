"""Conversions between types, and moves."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ..parser import Instruction
from ..registers import DTYPES, OperandError, put
from ..rounding import flush, from_bf16, to_bf16, to_fp16
from .forms import Form, Run

if TYPE_CHECKING:
    from ..machine import Machine

_TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def _kinds(i: Instruction) -> tuple[str, str]:
    """The types that are converted to, and from."""
    return i.parts[-2], i.parts[-1]


def _between_integers(i: Instruction, machine: Machine) -> Run:
    to, source = _kinds(i)
    d = machine.registers.extending(i.operands[0], to)
    a = machine.registers.source(i.operands[1], source, narrow=True)
    dtype = DTYPES[to]
    return lambda m: put(d, a.astype(dtype).astype(d.dtype), m)


def _from_integer(i: Instruction, machine: Machine) -> Run:
    to, source = _kinds(i)
    d = machine.registers.view(i.operands[0], to)
    a = machine.registers.source(i.operands[1], source, narrow=True)
    return lambda m: put(d, a.astype(d.dtype), m)


def _to_integer(i: Instruction, machine: Machine) -> Run:
    """What is too large or too small becomes the largest or smallest integer. NaN becomes 0, or, where 64 bits are
    involved, the number of which only the highest bit is set.
    """
    to, source = _kinds(i)
    d = machine.registers.extending(i.operands[0], to)
    a = machine.registers.source(i.operands[1], source)
    rounded, limits = _TO_INTEGER[next(p for p in i.parts if p in _TO_INTEGER)], np.iinfo(DTYPES[to])
    is_wide = source == "f64" or limits.bits == 64
    nan = np.array(1 << (limits.bits - 1) if is_wide else 0, f"u{limits.bits // 8}").view(limits.dtype)

    def run(m: Any) -> None:
        x = rounded(a).astype(np.float64)
        is_nan, is_high, is_low = np.isnan(x), x >= float(limits.max), x <= float(limits.min)
        inside = np.where(is_nan | is_high | is_low, 0, x).astype(limits.dtype)
        chosen = np.select(
            [is_nan, is_high, is_low], [nan, limits.dtype.type(limits.max), limits.dtype.type(limits.min)], inside
        )
        put(d, chosen.astype(limits.dtype).astype(d.dtype), m)

    return run


def _round_to_integral(i: Instruction, machine: Machine) -> Run:
    to, source = _kinds(i)
    d, a = machine.registers.view(i.operands[0], to), machine.registers.source(i.operands[1], source)
    function = _TO_INTEGER[next(p for p in i.parts if p in _TO_INTEGER)]
    return lambda m: put(d, function(a), m)


def _between_floats(i: Instruction, machine: Machine) -> Run:
    to, source = _kinds(i)
    registers = machine.registers
    d = registers.view(i.operands[0], "b16" if to == "bf16" else to)
    a = registers.source(i.operands[1], source)
    narrow = _narrow(i, to) if to in ("f16", "bf16") else None
    flushes = i.has("ftz")

    def run(m: Any) -> None:
        x = from_bf16(np.asarray(a)) if source == "bf16" else a
        if narrow is not None:
            put(d, narrow(x).view(d.dtype), m)
        else:
            x = x.astype(d.dtype)
            put(d, flush(x) if flushes else x, m)

    return run


def _narrow(i: Instruction, to: str) -> Callable[[Any], np.ndarray]:
    """What gives the bits of a float32 in 16."""
    towards_zero = i.has("rz")
    function = to_bf16 if to.startswith("bf") else to_fp16
    return lambda x: function(np.asarray(x), towards_zero)


def _pair(i: Instruction, machine: Machine) -> Run:
    """Two float32 become the upper and the lower half."""
    to, source = _kinds(i)
    registers = machine.registers
    d = registers.view(i.operands[0], "b32")
    high, low = (registers.per_thread(o, source) for o in i.operands[1:])
    narrow = _narrow(i, to)

    def run(m: Any) -> None:
        put(d, narrow(low).astype(np.uint32) | (narrow(high).astype(np.uint32) << 16), m)

    return run


def _move(i: Instruction, machine: Machine) -> Run:
    to, source = i.operands
    if isinstance(to, list):
        return _unpack(i, machine, to)
    if isinstance(source, list):
        return _pack(i, machine, source)
    return _copy(i, machine)


def _copy(i: Instruction, machine: Machine) -> Run:
    """mov, and cvta: an address is the same number in every space."""
    registers = machine.registers
    d, a = registers.view(i.operands[0], i.kind), registers.source(i.operands[1], i.kind)
    return lambda m: put(d, a, m)


def _piece_kind(i: Instruction, count: int) -> str:
    kind = f"b{int(i.kind[1:]) // count}"
    if kind not in DTYPES:
        raise OperandError(f"{count} pieces of {i.kind}")
    return kind


def _pack(i: Instruction, machine: Machine, names: list[str]) -> Run:
    registers, kind = machine.registers, _piece_kind(i, len(names))
    d = registers.view(i.operands[0], i.kind)
    pieces = [registers.per_thread(name, kind) for name in names]
    return lambda m: put(d, np.stack(pieces, -1).view(d.dtype)[:, 0], m)


def _unpack(i: Instruction, machine: Machine, names: list[str]) -> Run:
    registers, kind = machine.registers, _piece_kind(i, len(names))
    whole = registers.per_thread(i.operands[1], i.kind)
    pieces = [None if name == "_" else registers.view(name, kind) for name in names]

    def run(m: Any) -> None:
        values = np.ascontiguousarray(whole).view(DTYPES[kind]).reshape(len(whole), -1)
        for k, piece in enumerate(pieces):
            if piece is not None:
                put(piece, values[:, k], m)

    return run


_INTEGERS = "{s8,s16,s32,s64,u8,u16,u32,u64}"
FORMS = (
    Form(f"cvt.{_INTEGERS}.{_INTEGERS}", "d x", _between_integers),
    Form(f"cvt.rn.{{f16,f32,f64}}.{_INTEGERS}", "d x", _from_integer),
    Form("cvt.{rni,rzi,rmi,rpi}.{s16,s32,s64,u16,u32,u64}.{f32,f64}", "d x", _to_integer),
    Form("cvt.{rni,rzi,rmi,rpi}.f32.f32", "d x", _round_to_integral),
    Form("cvt.{rni,rzi,rmi,rpi}.f64.f64", "d x", _round_to_integral),
    Form("cvt[.ftz].f32.{f16,bf16}", "d x", _between_floats),  # of which no denormal is one in float32
    Form("cvt.f64.{f16,f32}", "d x", _between_floats),
    Form("cvt.rn[.ftz].f32.f64", "d x", _between_floats),
    Form("cvt.{rn,rz}.{f16,bf16}.f32", "d x", _between_floats),
    Form("cvt.{rn,rz}.{f16x2,bf16x2}.f32", "d x x", _pair),
    Form("mov.{b32,b64}", "V v", _move),
    Form("mov.{pred,b16,u16,u32,u64,s16,s32,s64,f32,f64}", "d x", _copy),
    Form("cvta[.to].{global,shared}.{u32,u64}", "d x", _copy),
)
