"""Comparisons and choices by predicates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..parser import Instruction
from ..registers import put
from ..rounding import flush, from_bf16
from .forms import Form, Run

if TYPE_CHECKING:
    from ..machine import Machine

# With NaN the ordered ones are false, and NumPy's not_equal is true.
_COMPARE = {
    "eq": np.equal,
    "neu": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
# The unordered ones, true with NaN, are the opposite of an ordered one.
_OPPOSITE = {
    "ltu": np.greater_equal,
    "leu": np.greater,
    "gtu": np.less_equal,
    "geu": np.less,
    "equ": lambda a, b: (a != b) & (a == a) & (b == b),
}


def _compare(i: Instruction, machine: Machine) -> Run:
    relation, kind, registers = i.parts[1], i.kind, machine.registers
    d = registers.view(i.operands[0], "pred")
    a, b = (registers.source(o, kind) for o in i.operands[1:])
    is_float = kind[0] == "f" or kind == "bf16"

    def values() -> tuple[Any, Any]:
        if kind == "bf16":
            return from_bf16(np.asarray(a)), from_bf16(np.asarray(b))
        return (flush(a), flush(b)) if i.has("ftz") else (a, b)

    if relation in _OPPOSITE:
        opposite = _OPPOSITE[relation]
        return lambda m: put(d, ~opposite(*values()), m)
    if relation in ("nan", "num"):
        return lambda m: put(d, (np.isnan(a) | np.isnan(b)) == (relation == "nan"), m)
    if relation == "ne":
        if not is_float:
            return lambda m: np.not_equal(a, b, out=d, where=m)

        def differ(m: Any) -> None:
            x, y = values()
            put(d, (x < y) | (x > y), m)

        return differ
    function = _COMPARE[relation]
    if kind == "bf16" or i.has("ftz"):
        return lambda m: put(d, function(*values()), m)
    return lambda m: function(a, b, out=d, where=m)


def _select(i: Instruction, machine: Machine) -> Run:
    registers = machine.registers
    d = registers.view(i.operands[0], i.kind)
    a, b = (registers.source(o, i.kind) for o in i.operands[1:3])
    p = registers.view(i.operands[3], "pred")
    return lambda m: put(d, np.where(p, a, b), m)


FORMS = (
    Form("setp.{eq,ne,lt,le,gt,ge}.{s16,s32,s64}", "d x x", _compare),
    Form("setp.{eq,ne,lt,le,gt,ge,lo,ls,hi,hs}.{u16,u32,u64}", "d x x", _compare),
    Form("setp.{eq,ne}.{b16,b32,b64}", "d x x", _compare),
    Form("setp.{eq,ne,lt,le,gt,ge,equ,neu,ltu,leu,gtu,geu}[.ftz].f32", "d x x", _compare),
    Form("setp.{eq,ne,lt,le,gt,ge,equ,neu,ltu,leu,gtu,geu}.{f16,bf16,f64}", "d x x", _compare),
    Form("setp.{nan,num}.{f32,f64}", "d x x", _compare),
    Form("selp.{b16,b32,b64,u16,u32,u64,s16,s32,s64,f32,f64}", "d x x x", _select),
)
