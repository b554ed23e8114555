"""Floating-point arithmetic. add, mul and the like are never contracted here, whether they carry .rn or not; ptxas may
contract those that do not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ..parser import Instruction
from ..registers import put
from ..rounding import SMALLEST_NORMAL, flush, fma32, from_bf16, sum_to_odd, to_fp16, wide_to_bf16
from .forms import Form, Run

if TYPE_CHECKING:
    from ..machine import Machine

_BINARY = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide}
_UNARY: dict[str, Callable[[Any], Any]] = {
    "neg": np.negative,
    "abs": np.abs,
    "ex2": np.exp2,
    "lg2": np.log2,
    "sqrt": np.sqrt,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
    "rcp": lambda x: x.dtype.type(1) / x,
    "rsqrt": lambda x: x.dtype.type(1) / np.sqrt(x),
}


def _operands(i: Instruction, machine: Machine) -> tuple[Any, ...]:
    registers = machine.registers
    return registers.view(i.operands[0], i.kind), *(registers.source(o, i.kind) for o in i.operands[1:])


def _binary(i: Instruction, machine: Machine) -> Run:
    d, a, b = _operands(i, machine)
    function = _BINARY[i.name]
    if i.has("ftz"):
        return lambda m: put(d, flush(function(flush(a), flush(b))), m)
    return lambda m: function(a, b, out=d, where=m)


def _unary(i: Instruction, machine: Machine) -> Run:
    d, a = _operands(i, machine)
    function = _UNARY[i.name]
    if np.ndim(a) == 0:
        a = np.full(1, a)
    if not i.has("ftz"):
        return lambda m: put(d, function(a), m)
    if i.name != "ex2":
        return lambda m: put(d, flush(function(flush(a))), m)

    def power(m: Any) -> None:
        result = function(a)  # 1 of a denormal, as of 0
        put(d, result * (result >= SMALLEST_NORMAL), m)  # never negative; NaN stays

    return power


def _extreme(i: Instruction, machine: Machine) -> Run:
    """min and max: the other operand where one is NaN, unless .NaN is asked for; -0 is less than +0."""
    d, a, b = _operands(i, machine)
    names = {("max", False): np.fmax, ("min", False): np.fmin, ("max", True): np.maximum, ("min", True): np.minimum}
    function = names[i.name, i.has("NaN")]
    flushes = i.has("ftz")

    def run(m: Any) -> None:
        x, y = (flush(a), flush(b)) if flushes else (a, b)
        result = function(x, y)
        if not result.all():
            # NumPy takes either of two zeros. Their sum is -0 if both are, which is max; min is the other way around.
            zeros = x + y if i.name == "max" else -(-x - y)
            result = np.where((result == 0) & (x == y), zeros, result)
        put(d, result, m)

    return run


def _fma(i: Instruction, machine: Machine) -> Run:
    d, a, b, c = _operands(i, machine)
    if i.has("ftz"):
        return lambda m: put(d, flush(fma32(flush(a), flush(b), flush(c))), m)
    return lambda m: put(d, fma32(a, b, c), m)


# float16 and bfloat16, single or in pairs: computed in float64, rounded once.


_HALF: dict[str, Callable[..., Any]] = {
    "add": sum_to_odd,
    "sub": lambda a, b: sum_to_odd(a, -b),
    "mul": np.multiply,
    "fma": lambda a, b, c: sum_to_odd(a * b, c),
    "max": np.fmax,
    "min": np.fmin,
    "neg": np.negative,
    "abs": np.abs,
}


def _half(i: Instruction, machine: Machine) -> Run:
    registers, kind = machine.registers, i.kind
    is_pair, is_brain = kind.endswith("x2"), kind.startswith("bf")
    bits = "b32" if is_pair else "b16"
    d = registers.view(i.operands[0], bits)
    sources = [registers.source(o, bits) for o in i.operands[1:]]
    function = _HALF[i.name]

    def widen(x: Any) -> np.ndarray:
        halves = np.ascontiguousarray(np.broadcast_to(x, d.shape)).view(np.uint16)
        return (from_bf16(halves) if is_brain else halves.view(np.float16)).astype(np.float64)

    def run(m: Any) -> None:
        result = function(*map(widen, sources))
        halves = wide_to_bf16(result) if is_brain else to_fp16(result)
        put(d, np.ascontiguousarray(halves).view(d.dtype), m)

    return run


FORMS = (
    # .rn is the default, and of these the only rounding that is known.
    Form("{add,sub,mul}[.rn][.ftz].f32", "d x x", _binary),
    Form("{add,sub,mul}[.rn].f64", "d x x", _binary),
    Form("div.rn[.ftz].f32", "d x x", _binary),
    # Approximations: those of GPUs err by up to 2 units in the last place, NumPy's by less than 1.
    Form("div.{full,approx}[.ftz].f32", "d x x", _binary),
    Form("div.rn.f64", "d x x", _binary),
    Form("fma.rn[.ftz].f32", "d x x x", _fma),
    Form("{min,max}[.ftz][.NaN].f32", "d x x", _extreme),
    Form("{min,max}.f64", "d x x", _extreme),
    Form("{neg,abs}[.ftz].f32", "d x", _unary),
    Form("{neg,abs}.f64", "d x", _unary),
    Form("{rcp,sqrt}.{rn,approx}[.ftz].f32", "d x", _unary),
    Form("{rcp,sqrt}.rn.f64", "d x", _unary),
    Form("{ex2,lg2,sin,cos,rsqrt}.approx[.ftz].f32", "d x", _unary),
    Form("tanh.approx.f32", "d x", _unary),
    Form("{add,sub,mul}[.rn].{f16,f16x2,bf16,bf16x2}", "d x x", _half),
    Form("fma.rn.{f16,f16x2,bf16,bf16x2}", "d x x x", _half),
    Form("{min,max}.{f16,f16x2,bf16,bf16x2}", "d x x", _half),
    Form("{neg,abs}.{f16,f16x2,bf16,bf16x2}", "d x", _half),
)
