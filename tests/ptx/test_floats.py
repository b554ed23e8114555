"""Floating-point instructions against exact rational numbers, rounded once, and against NumPy's float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest

from ptx.handwritten import evaluate
from ptx.rounding import fma32, from_bf16, to_bf16

TINY = float(np.finfo(np.float32).tiny)
EDGES = np.array(
    [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 1e-45, -1e-45, TINY, -TINY, TINY / 2, 3.4e38, -3.4e38, 1 / 3],
    np.float32,
)


def pairs() -> tuple[np.ndarray, np.ndarray]:
    a, b = np.meshgrid(EDGES, EDGES)
    random = np.random.default_rng(0)
    drawn = random.standard_normal((2, 200)).astype(np.float32) * np.exp2(
        random.integers(-60, 60, (2, 200)), dtype="f4"
    )
    return np.concatenate([a.ravel(), drawn[0]]), np.concatenate([b.ravel(), drawn[1]])


def flushed(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < TINY, np.copysign(np.zeros_like(x), x), x)


def assert_same(actual: np.ndarray, expected: np.ndarray) -> None:
    """To the bit, but for the payload of NaN."""
    number = ~np.isnan(expected)
    assert (np.isnan(actual) == ~number).all()
    unsigned = np.dtype(f"u{expected.dtype.itemsize}")
    bad = np.flatnonzero(actual[number].view(unsigned) != expected[number].view(unsigned))
    assert not len(bad), (actual[number][bad][:5], expected[number][bad][:5])


BINARY: dict[str, Callable[..., np.ndarray]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div.rn": lambda a, b: a / b,
    "div.full": lambda a, b: a / b,
}


@pytest.mark.parametrize("name", BINARY)
@pytest.mark.parametrize("ftz", ["", ".ftz"])
@np.errstate(all="ignore")
def test_binary(name: str, ftz: str) -> None:
    """NumPy's float32 rounds once, as the IEEE says."""
    a, b = pairs()
    actual = evaluate(f"{name}{ftz}.f32 {{d}}, {{a}}, {{b}};", np.float32, a, b)
    if ftz:
        assert_same(actual, flushed(BINARY[name](flushed(a), flushed(b))))
    else:
        assert_same(actual, BINARY[name](a, b))


@pytest.mark.parametrize("name", ["add", "sub", "mul"])
@np.errstate(all="ignore")
def test_an_explicit_rounding_is_the_default(name: str) -> None:
    a, b = pairs()
    assert_same(evaluate(f"{name}.rn.f32 {{d}}, {{a}}, {{b}};", np.float32, a, b), BINARY[name](a, b))


def test_products_and_sums_are_not_contracted() -> None:
    """(1 + 2^-12)^2 - 1 - 2^-11 is 2^-24 exactly; the product that is rounded first leaves 0."""
    x = np.float32(1 + 2**-12)
    minus = np.float32(-1 - 2**-11)
    separate = evaluate("mul.f32 {d}, {a}, {a}; add.f32 {d}, {d}, {b};", np.float32, x, minus)
    fused = evaluate("fma.rn.f32 {d}, {a}, {a}, {b};", np.float32, x, minus)
    assert separate.tolist() == [0.0]
    assert fused.tolist() == [2.0**-24]


def rounded(x: Fraction, digits: int, smallest: int, largest: float) -> float:
    """To nearest, ties to even, with so many digits; `smallest`: the exponent of the least denormal."""
    if x == 0:
        return 0.0
    exponent = max(math.floor(math.log2(abs(x))) - digits + 1, smallest)
    while abs(x) / Fraction(2) ** exponent >= 2**digits:  # where log2 was rounded
        exponent += 1
    while exponent > smallest and abs(x) / Fraction(2) ** exponent < 2 ** (digits - 1):
        exponent -= 1
    result = round(x / Fraction(2) ** exponent) * Fraction(2) ** exponent
    return math.copysign(math.inf, x) if abs(result) > largest else float(result)


SINGLE = (24, -149, float(np.finfo(np.float32).max))
HALF = (11, -24, 65504.0)
BRAIN = (8, -133, float(from_bf16(np.array([0x7F7F], np.uint16))[0]))


def test_fma_rounds_once() -> None:
    """Random triples, and those of which the product's last bits decide a tie of the sum."""
    random = np.random.default_rng(0)
    a, b, c = (
        random.standard_normal(3000).astype(np.float32) * np.exp2(random.integers(-20, 20, 3000), dtype="f4")
        for _ in "abc"
    )
    # The product is just above, just below or at the middle between two numbers around c.
    ulp = np.spacing(np.float32(1.5))
    near = np.array([1 + 2**-23, 1 - 2**-24, 1.0], np.float32)
    a, b, c = np.append(a, near), np.append(b, np.full(3, ulp / 2)), np.append(c, np.full(3, 1.5))
    denormal = np.array([2.0**-140 * 1.2345, 3e-42], np.float32)
    a, b, c = np.append(a, denormal), np.append(b, [0.7, 1.5]).astype("f4"), np.append(c, [3e-43, 2e-44]).astype("f4")
    expected = [
        rounded(Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)), *SINGLE) for x, y, z in zip(a, b, c)
    ]
    actual = evaluate("fma.rn.f32 {d}, {a}, {b}, {c};", np.float32, a, b, c)
    assert actual.astype(float).tolist() == expected


def test_a_second_rounding_would_show() -> None:
    """c + 2^-24 - 2^-70 with an odd c: float64 drops the last part; the tie that is left goes to the even number."""
    a, b, c = (np.array([x], np.float32) for x in (2.0**-24 * (1 + 2**-23), 1 - 2.0**-23, 1 + 2.0**-23))
    twice = (a.astype(np.float64) * b + c).astype(np.float32)
    assert twice.tolist() == [1 + 2.0**-22]
    assert fma32(a, b, c).tolist() == c.tolist()


@np.errstate(all="ignore")
def test_fma_of_infinities_and_nan() -> None:
    inf, nan = math.inf, math.nan
    cases = [(inf, 0, 1), (inf, 1, -inf), (1, nan, 0), (3e38, 3e38, -inf), (3e38, 3e38, 0), (-0.0, 1, -0.0), (1, -1, 1)]
    a, b, c = np.array(cases, np.float32).T.copy()
    expected = np.array([nan, nan, nan, -inf, inf, -0.0, 0.0], np.float32)
    assert_same(evaluate("fma.rn.f32 {d}, {a}, {b}, {c};", np.float32, a, b, c), expected)


def test_fma_flushes_denormals() -> None:
    small = np.float32(1e-40)
    assert evaluate("fma.rn.ftz.f32 {d}, {a}, {b}, {c};", np.float32, small, np.float32(1), np.float32(0)).tolist() == [
        0
    ]
    half, least = np.float32(0.5), np.float32(TINY)
    assert evaluate("fma.rn.ftz.f32 {d}, {a}, {b}, {c};", np.float32, least, half, np.float32(0)).tolist() == [0]
    assert evaluate("fma.rn.f32 {d}, {a}, {b}, {c};", np.float32, least, half, np.float32(0)).tolist() == [TINY / 2]


EXTREMES = {"min": (np.fmin, np.minimum), "max": (np.fmax, np.maximum)}


@pytest.mark.parametrize("name", EXTREMES)
def test_extremes(name: str) -> None:
    """The other operand instead of NaN, unless it is asked for; and -0 < +0."""
    a, b = pairs()
    zeros = np.array([0.0, -0.0, 0.0, -0.0], np.float32), np.array([0.0, 0.0, -0.0, -0.0], np.float32)
    signs = (
        np.signbit(zeros[0]) | np.signbit(zeros[1]) if name == "min" else np.signbit(zeros[0]) & np.signbit(zeros[1])
    )
    for modifier, function in zip(("", ".NaN"), EXTREMES[name]):
        opcode = f"{name}{modifier}.f32 {{d}}, {{a}}, {{b}};"
        actual, expected = evaluate(opcode, np.float32, a, b), function(a, b)
        assert (np.isnan(actual) == np.isnan(expected)).all()
        assert (actual == expected)[~np.isnan(expected)].all()
        assert np.signbit(evaluate(opcode, np.float32, *zeros)).tolist() == signs.tolist()


UNARY: dict[str, Callable[..., np.ndarray]] = {
    "ex2.approx": np.exp2,
    "lg2.approx": np.log2,
    "sqrt.rn": np.sqrt,
    "sqrt.approx": np.sqrt,
    "rcp.rn": lambda x: 1 / x,
    "rcp.approx": lambda x: 1 / x,
    "rsqrt.approx": lambda x: 1 / np.sqrt(x),
    "sin.approx": np.sin,
    "cos.approx": np.cos,
    "neg": np.negative,
    "abs": np.abs,
}


@pytest.mark.parametrize("name", UNARY)
@pytest.mark.parametrize("ftz", ["", ".ftz"])
@np.errstate(all="ignore")
def test_unary(name: str, ftz: str) -> None:
    """To 4 units in the last place of float32, of what float64 gives."""
    random = np.random.default_rng(0)
    a = np.concatenate([EDGES, random.uniform(-130, 130, 200).astype(np.float32), np.array([-126.5, -149.0], "f4")])
    actual = evaluate(f"{name}{ftz}.f32 {{d}}, {{a}};", np.float32, a)
    exact = UNARY[name]((flushed(a) if ftz else a).astype(np.float64)).astype(np.float32)
    expected = flushed(exact) if ftz else exact
    number = np.isfinite(expected)
    assert (np.isnan(actual) == np.isnan(expected)).all()
    assert (actual == expected)[np.isinf(expected)].all()
    error = np.abs(actual[number].astype(np.float64) - expected[number])
    allowed = np.float64(4) * np.spacing(np.abs(expected[number]))
    # The argument of sine and cosine is reduced in float32.
    assert (error <= (np.maximum(allowed, 1e-5) if name[:3] in ("sin", "cos") else allowed)).all()
    if ftz:
        assert not ((actual != 0) & (np.abs(actual) < TINY)).any()


def test_double_precision() -> None:
    random = np.random.default_rng(0)
    a, b = random.standard_normal((2, 50))
    for name, function in (*BINARY.items(),):
        if name != "div.full":
            assert (evaluate(f"{name}.f64 {{d}}, {{a}}, {{b}};", np.float64, a, b) == function(a, b)).all()
    assert (evaluate("abs.f64 {d}, {a};", np.float64, a) == np.abs(a)).all()
    assert (evaluate("rcp.rn.f64 {d}, {a};", np.float64, a) == 1 / a).all()


# float16 and bfloat16

HALF_KINDS = {"f16": HALF, "bf16": BRAIN}


def halves(kind: str, count: int, seed: int, spread: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    x = (random.standard_normal(count) * np.exp2(random.integers(-spread, spread, count))).astype(np.float32)
    return to_bf16(x) if kind == "bf16" else x.astype(np.float16).view(np.uint16)


def numbers(bits: np.ndarray, kind: str) -> list[Fraction]:
    values = from_bf16(bits) if kind == "bf16" else bits.view(np.float16)
    return [Fraction(float(v)) for v in values]


HALF_FORMULAS: dict[str, Callable[..., Fraction]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "fma.rn": lambda a, b, c: a * b + c,
}


@pytest.mark.parametrize("kind", HALF_KINDS)
@pytest.mark.parametrize("name", HALF_FORMULAS)
def test_half_precision_rounds_once(name: str, kind: str) -> None:
    spread = 6 if kind == "f16" else 40
    count = 3 if name == "fma.rn" else 2
    inputs = [halves(kind, 800, seed, spread) for seed in range(count)]
    registers = ", ".join(["{d}", "{a}", "{b}", "{c}"][: count + 1])
    exact = [HALF_FORMULAS[name](*values) for values in zip(*(numbers(x, kind) for x in inputs))]
    expected = [rounded(x, *HALF_KINDS[kind]) for x in exact]
    single = evaluate(f"{name}.{kind} {registers};", np.uint16, *inputs)
    assert [float(x) for x in numbers(single, kind)] == expected
    packed = [x.view(np.uint32) for x in inputs]
    pairs_of = evaluate(f"{name}.{kind}x2 {registers};", np.uint32, *packed)
    assert pairs_of.view(np.uint16).tolist() == single.tolist()


@pytest.mark.parametrize("exponent", [-40, -60])
def test_a_bfloat16_fma_whose_tie_a_small_summand_decides(exponent: int) -> None:
    """1.5 (1 + 2^-7) lies in the middle between two numbers. float32 loses 2^-40, and float64 2^-60."""
    a, b, c = (to_bf16(np.array([x], np.float32)) for x in (1.5, 1 + 2.0**-7, -(2.0**exponent)))
    result = evaluate("fma.rn.bf16 {d}, {a}, {b}, {c};", np.uint16, a, b, c)
    assert from_bf16(result).tolist() == [1.5 + 2.0**-7]
    zero = np.zeros(1, np.uint16)
    assert from_bf16(evaluate("fma.rn.bf16 {d}, {a}, {b}, {c};", np.uint16, a, b, zero)).tolist() == [1.5 + 2.0**-6]


RELATIONS: dict[str, Callable[[float, float], bool]] = {
    "eq": lambda a, b: a == b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "ne": lambda a, b: a < b or a > b,
}


@pytest.mark.parametrize("relation", [*RELATIONS, *(f"{r}u" for r in RELATIONS), "num", "nan"])
def test_comparisons(relation: str) -> None:
    """The ordered ones are false with NaN, the unordered ones, which end in u, true."""
    a, b = pairs()
    actual = evaluate(f"setp.{relation}.f32 {{d}}, {{a}}, {{b}};", bool, a, b).tolist()
    for x, y, is_true in zip(a.tolist(), b.tolist(), actual):
        has_nan = math.isnan(x) or math.isnan(y)
        if relation in ("num", "nan"):
            assert is_true == (has_nan == (relation == "nan"))
        elif relation.endswith("u"):
            assert is_true == (has_nan or RELATIONS[relation[:-1]](x, y))
        else:
            assert is_true == (not has_nan and RELATIONS[relation](x, y))
