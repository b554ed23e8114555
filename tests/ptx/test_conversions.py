"""Conversions and moves against torch, Python's integers and exact rational numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ptx.handwritten import evaluate
from ptx.registers import DTYPES
from ptx.rounding import from_bf16, to_bf16, to_fp16
from ptx.test_integers import edge_values, wrapped

# Registers have 16 bits at least, so these are what an 8-bit result is seen in.
WIDER = {"s8": "s16", "u8": "u16"}


def floats(count: int = 4000) -> np.ndarray:
    """Random bit patterns, ties of float16 and bfloat16, and edge values."""
    random = np.random.default_rng(0)
    bits = random.integers(0, 2**32, count, np.uint32, endpoint=False)
    ties = np.concatenate([(bits[:500] & 0xFFFF0000) | 0x8000, (bits[:500] & 0xBFFFE000) | 0x1000]).astype(np.uint32)
    edges = np.array([0.0, -0.0, math.inf, -math.inf, 65504, 65519.9, 65520, -65520, 6e-8, 2.9e-8, 3e-8, 3.39e38], "f4")
    moderate = random.uniform(-7e4, 7e4, count).astype(np.float32)
    x = np.concatenate([bits.view(np.float32), ties.view(np.float32), edges, moderate, [np.float32("nan")]])
    return x.astype(np.float32)


def without_payload(x: np.ndarray, values: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(values), 0x7FFF, x)


@pytest.mark.parametrize(("kind", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_narrowing_rounds_as_torch_does(kind: str, dtype: torch.dtype) -> None:
    x = floats()
    actual = evaluate(f"cvt.rn.{kind}.f32 {{d}}, {{a}};", np.uint16, x)
    expected = torch.from_numpy(x).to(dtype).view(torch.int16).numpy().view(np.uint16)
    assert (actual == without_payload(expected, x)).all()


@pytest.mark.parametrize("kind", ["bf16", "f16"])
@np.errstate(all="ignore")
def test_narrowing_towards_zero(kind: str) -> None:
    """The largest number whose size is not larger: the next one would be too large."""
    x = floats()
    bits = evaluate(f"cvt.rz.{kind}.f32 {{d}}, {{a}};", np.uint16, x)
    widen = from_bf16 if kind == "bf16" else lambda b: b.view(np.float16).astype(np.float32)
    number = np.isfinite(x)
    y, following = widen(bits)[number], widen((bits + 1).astype(np.uint16))[number]
    assert (np.abs(y) <= np.abs(x[number])).all()
    assert (np.abs(following) > np.abs(x[number])).all()
    assert (np.signbit(y) == np.signbit(x[number])).all()
    assert (widen(bits)[np.isinf(x)] == x[np.isinf(x)]).all()


@pytest.mark.parametrize("kind", ["bf16", "f16"])
@pytest.mark.parametrize("rounding", ["rn", "rz"])
def test_pairs(kind: str, rounding: str) -> None:
    """The first source becomes the upper half."""
    x, y = floats(), floats()[::-1].copy()
    pair = evaluate(f"cvt.{rounding}.{kind}x2.f32 {{d}}, {{a}}, {{b}};", np.uint32, x, y)
    for source, half in ((x, pair >> 16), (y, pair & 0xFFFF)):
        assert (half == evaluate(f"cvt.{rounding}.{kind}.f32 {{d}}, {{a}};", np.uint16, source)).all()


def test_every_half_is_widened_exactly() -> None:
    bits = np.arange(0, 2**16, 7, dtype=np.uint16)
    halves, brains = bits.view(np.float16), torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
    for kind, expected in (("f16", halves.astype(np.float32)), ("bf16", brains.float().numpy())):
        actual = evaluate(f"cvt.f32.{kind} {{d}}, {{a}};", np.float32, bits)
        number = ~np.isnan(expected)
        assert (np.isnan(actual) == ~number).all()
        assert (actual.view(np.uint32) == expected.view(np.uint32))[number].all()


def test_bfloat16_bits_are_those_of_torch() -> None:
    x = floats()
    expected = torch.from_numpy(x).bfloat16()
    number = ~np.isnan(x)
    assert (to_bf16(x) == expected.view(torch.int16).numpy().view(np.uint16))[number].all()
    assert (from_bf16(to_bf16(x)) == expected.float().numpy())[number].all()
    assert to_bf16(np.array([np.nan], "f4")) == to_fp16(np.array([np.nan], "f4")) == 0x7FFF


@pytest.mark.parametrize("source", ["s8", "s16", "s32", "s64", "u8", "u16", "u32", "u64"])
@pytest.mark.parametrize("to", ["s8", "s16", "s32", "s64", "u8", "u16", "u32", "u64"])
def test_between_integers(to: str, source: str) -> None:
    """Of a wider register the low part counts; a narrow result is extended, by its sign if it has one."""
    values = edge_values(WIDER.get(source, source))
    register = WIDER.get(to, to)
    actual = evaluate(f"cvt.{to}.{source} {{d}}, {{a}};", DTYPES[register], values)
    assert actual.tolist() == [wrapped(wrapped(wrapped(int(v), source), to), register) for v in values]


@pytest.mark.parametrize("source", ["s16", "s32", "s64", "u16", "u32", "u64"])
def test_integers_to_floats(source: str) -> None:
    """Python's own conversion to float64 is exact or rounds once; to float32 it must not go by way of float64."""
    values = np.append(edge_values(source), DTYPES[source].type(2**15 - 1))
    if source.endswith("64"):
        values = np.append(values, values.dtype.type(2**60 + 2**36 + 1))  # just above a tie of float32
    assert evaluate(f"cvt.rn.f64.{source} {{d}}, {{a}};", np.float64, values).tolist() == [
        float(int(v)) for v in values
    ]
    actual = evaluate(f"cvt.rn.f32.{source} {{d}}, {{a}};", np.float32, values)
    for value, x in zip(map(int, values), map(float, actual)):
        below, above = (float(np.nextafter(np.float32(x), np.float32(end))) for end in (-math.inf, math.inf))
        assert abs(int(x) - value) <= min(abs(int(below) - value), abs(int(above) - value))


@pytest.mark.parametrize("source", ["f32", "f64"])
@pytest.mark.parametrize("to", ["s16", "s32", "s64", "u16", "u32", "u64"])
@pytest.mark.parametrize("rounding", ["rni", "rzi", "rmi", "rpi"])
def test_floats_to_integers(rounding: str, to: str, source: str) -> None:
    functions = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}
    limits, dtype = np.iinfo(DTYPES[to]), DTYPES[source]
    values = np.array(
        [0.0, -0.0, 0.5, -0.5, 1.5, 2.5, -1.5, -2.7, 2.7, 1e3, -1e3, 32767.5, 2.0**31, -(2.0**31), 1e10], dtype
    )
    values = np.append(
        values, np.array([2.0**63, -(2.0**63), 2.0**64, 1e30, -1e30, math.inf, -math.inf, math.nan], dtype)
    )
    actual = evaluate(f"cvt.{rounding}.{to}.{source} {{d}}, {{a}};", DTYPES[to], values)
    for value, result in zip(map(float, values), map(int, actual)):
        if math.isnan(value):
            is_wide = source == "f64" or to.endswith("64")
            expected = wrapped(1 << (limits.bits - 1), to) if is_wide else 0
        elif math.isinf(value):
            expected = limits.max if value > 0 else limits.min
        else:
            expected = min(max(functions[rounding](value), limits.min), limits.max)
        assert result == expected, value


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_rounding_to_integral_numbers(kind: str) -> None:
    values = np.array([0.5, 1.5, -0.5, -1.5, 2.3, -2.3, 1e20], DTYPES[kind])
    for rounding, function in (("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)):
        actual = evaluate(f"cvt.{rounding}.{kind}.{kind} {{d}}, {{a}};", DTYPES[kind], values)
        assert actual.tolist() == function(values).tolist()


def test_float64_to_float32() -> None:
    values = np.array([1 + 2.0**-24, 1 + 2.0**-24 + 2.0**-50, 1e300, 1e-46, 1e-40, -0.0])
    with np.errstate(all="ignore"):
        expected = values.astype(np.float32)
    assert evaluate("cvt.rn.f32.f64 {d}, {a};", np.float32, values).tolist() == expected.tolist()
    assert evaluate("cvt.rn.ftz.f32.f64 {d}, {a};", np.float32, values)[4] == 0
    assert evaluate("cvt.f64.f32 {d}, {a};", np.float64, expected).tolist() == expected.tolist()


def test_moves_of_pieces() -> None:
    low, high = np.array([0x1234, 0xFFFF], np.uint16), np.array([0x8765, 1], np.uint16)
    whole = low.astype(np.uint32) | high.astype(np.uint32) << 16
    assert evaluate("mov.b32 {d}, {{{a}, {b}}};", np.uint32, low, high).tolist() == whole.tolist()
    assert evaluate("mov.b32 {{%rs1, {d}}}, {a};", np.uint16, whole).tolist() == high.tolist()
    assert evaluate("mov.b32 {{{d}, _}}, {a};", np.uint16, whole).tolist() == low.tolist()
    words = np.array([5, 2**32 - 1], np.uint32), np.array([7, 0], np.uint32)
    expected = words[0].astype(np.uint64) | words[1].astype(np.uint64) << np.uint64(32)
    assert evaluate("mov.b64 {d}, {{{a}, {b}}};", np.uint64, *words).tolist() == expected.tolist()


def test_immediates() -> None:
    one = np.zeros(1, np.uint32)
    assert evaluate("mov.b32 {d}, 0f3F800000;", np.float32, one).tolist() == [1.0]
    assert evaluate("mov.b64 {d}, 0d3FF8000000000000;", np.float64, one).tolist() == [1.5]
    assert evaluate("mov.u32 {d}, -1;", np.uint32, one).tolist() == [2**32 - 1]
    assert evaluate("mov.b32 {d}, 0x7F;", np.uint32, one).tolist() == [127]
    assert evaluate("add.f32 {d}, {a}, 0f40000000;", np.float32, np.ones(1, "f4")).tolist() == [3.0]
