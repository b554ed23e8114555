"""Integer instructions against Python's integers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from ptx.handwritten import evaluate, run_kernel
from ptx.registers import DTYPES
from ptx.report import Kind


def edge_values(kind: str, seed: int = 0) -> np.ndarray:
    """The smallest, the largest, those around 0, and random ones."""
    limits, random = np.iinfo(DTYPES[kind]), np.random.default_rng(seed)
    edges = [limits.min, limits.min + 1, limits.max - 1, limits.max, 0, 1, 2, 3, 7, 31, 32, 33, 64]
    drawn = random.integers(limits.min, limits.max, 40, DTYPES[kind], endpoint=True)
    return np.concatenate([np.array(edges, DTYPES[kind]), drawn])


def pairs(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Every edge value with every other."""
    a, b = np.meshgrid(edge_values(kind, 1)[:24], edge_values(kind, 2)[:24])
    return a.ravel(), b.ravel()


def wrapped(value: int, kind: str) -> int:
    """The low bits, as this type sees them."""
    bits = 8 * DTYPES[kind].itemsize
    value %= 1 << bits
    return value - (1 << bits) if kind[0] == "s" and value >> (bits - 1) else value


def check(instruction: str, kind: str, formula: Callable[..., int], *arrays: np.ndarray, to: str | None = None) -> None:
    to = to or kind
    actual = evaluate(instruction, DTYPES[to], *arrays)
    expected = [wrapped(formula(*map(int, values)), to) for values in zip(*arrays)]
    assert actual.tolist() == expected


def truncated_quotient(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


BINARY: dict[str, Callable[[int, int], int]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul.lo": lambda a, b: a * b,
    "min": min,
    "max": max,
}


@pytest.mark.parametrize("kind", ["s16", "s32", "s64", "u16", "u32", "u64"])
@pytest.mark.parametrize("name", BINARY)
def test_binary(name: str, kind: str) -> None:
    check(f"{name}.{kind} {{d}}, {{a}}, {{b}};", kind, BINARY[name], *pairs(kind))


@pytest.mark.parametrize("kind", ["s16", "s32", "s64", "u16", "u32", "u64"])
def test_division_rounds_towards_zero(kind: str) -> None:
    a, b = pairs(kind)
    limits = np.iinfo(a.dtype)
    chosen = (b != 0) & ~((a == limits.min) & (b == -1) & (kind[0] == "s"))  # undefined
    a, b = a[chosen], b[chosen]
    check(f"div.{kind} {{d}}, {{a}}, {{b}};", kind, truncated_quotient, a, b)
    check(f"rem.{kind} {{d}}, {{a}}, {{b}};", kind, lambda x, y: x - truncated_quotient(x, y) * y, a, b)


@pytest.mark.parametrize("name", ["relu.min", "relu.max"])
def test_relu(name: str) -> None:
    relu, function = name.split(".")
    formula = {"min": min, "max": max}[function]
    check(f"{function}.{relu}.s32 {{d}}, {{a}}, {{b}};", "s32", lambda a, b: max(0, formula(a, b)), *pairs("s32"))


@pytest.mark.parametrize("kind", ["s16", "s32", "u16", "u32"])
def test_wide_products(kind: str) -> None:
    wide = f"{kind[0]}{2 * int(kind[1:])}"
    a, b = pairs(kind)
    check(f"mul.wide.{kind} {{d}}, {{a}}, {{b}};", kind, lambda x, y: x * y, a, b, to=wide)
    check(f"mul.hi.{kind} {{d}}, {{a}}, {{b}};", kind, lambda x, y: x * y >> int(kind[1:]), a, b)
    c = np.resize(edge_values(wide), len(a))
    check(f"mad.wide.{kind} {{d}}, {{a}}, {{b}}, {{c}};", kind, lambda x, y, z: x * y + z, a, b, c, to=wide)


@pytest.mark.parametrize("kind", ["s32", "u32", "s64"])
def test_multiply_add(kind: str) -> None:
    a, b = pairs(kind)
    c = np.resize(edge_values(kind), len(a))
    check(f"mad.lo.{kind} {{d}}, {{a}}, {{b}}, {{c}};", kind, lambda x, y, z: x * y + z, a, b, c)


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_logic(bits: int) -> None:
    kind = f"u{bits}"
    a, b = pairs(kind)
    check(f"and.b{bits} {{d}}, {{a}}, {{b}};", kind, lambda x, y: x & y, a, b)
    check(f"or.b{bits} {{d}}, {{a}}, {{b}};", kind, lambda x, y: x | y, a, b)
    check(f"xor.b{bits} {{d}}, {{a}}, {{b}};", kind, lambda x, y: x ^ y, a, b)
    check(f"not.b{bits} {{d}}, {{a}};", kind, lambda x: ~x, a)


def test_logic_of_predicates() -> None:
    a, b = np.array([0, 0, 1, 1], bool), np.array([0, 1, 0, 1], bool)
    assert evaluate("and.pred {d}, {a}, {b};", bool, a, b).tolist() == [False, False, False, True]
    assert evaluate("or.pred {d}, {a}, {b};", bool, a, b).tolist() == [False, True, True, True]
    assert evaluate("xor.pred {d}, {a}, {b};", bool, a, b).tolist() == [False, True, True, False]
    assert evaluate("not.pred {d}, {a};", bool, a).tolist() == [True, True, False, False]


@pytest.mark.parametrize("kind", ["s16", "s32", "s64"])
def test_unary(kind: str) -> None:
    values = edge_values(kind)
    check(f"neg.{kind} {{d}}, {{a}};", kind, lambda x: -x, values)
    check(f"abs.{kind} {{d}}, {{a}};", kind, abs, values)


def test_popc() -> None:
    check("popc.b32 {d}, {a};", "u32", lambda x: x.bit_count(), edge_values("u32"))


AMOUNTS = np.array([0, 1, 7, 15, 16, 17, 31, 32, 33, 63, 64, 65, 255, 2**31, 2**32 - 1], np.uint32)


@pytest.mark.parametrize("kind", ["b16", "b32", "b64", "s16", "s32", "s64", "u16", "u32", "u64"])
@pytest.mark.parametrize("is_fixed", [False, True], ids=["register", "immediate"])
def test_shifts_by_more_than_the_width(kind: str, is_fixed: bool) -> None:
    number = ("u" if kind[0] == "b" else kind[0]) + kind[1:]
    for value in edge_values(number)[::3]:
        a = np.full(len(AMOUNTS), value)
        if kind[0] == "b":
            expected = [wrapped(int(value) << int(n), number) if n < 64 else 0 for n in AMOUNTS]
            assert shifted(f"shl.{kind}", a, is_fixed).tolist() == expected
        expected = [wrapped(int(value) >> int(n), number) for n in AMOUNTS]
        assert shifted(f"shr.{kind}", a, is_fixed).tolist() == expected


def shifted(opcode: str, a: np.ndarray, is_fixed: bool) -> np.ndarray:
    """By AMOUNTS, from a register or as numbers in the instruction."""
    if not is_fixed:
        return evaluate(f"{opcode} {{d}}, {{a}}, {{b}};", a.dtype, a, AMOUNTS)
    return np.concatenate([evaluate(f"{opcode} {{d}}, {{a}}, {n};", a.dtype, a[:1]) for n in AMOUNTS])


FIELDS = [(start, length) for start in (0, 1, 7, 16, 31, 32, 63, 64, 200) for length in (0, 1, 5, 8, 31, 32, 64, 255)]


def field(value: int, start: int, length: int, kind: str) -> int:
    """As the PTX ISA writes bfe, bit by bit."""
    bits = int(kind[1:])
    msb, is_signed = bits - 1, kind[0] == "s"
    sign = 0 if not is_signed or length == 0 else value >> min(start + length - 1, msb) & 1
    result = 0
    for k in range(msb + 1):
        bit = value >> (start + k) & 1 if k < length and start + k <= msb else sign
        result |= bit << k
    return result


@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "u64"])
def test_bit_field_extract(kind: str) -> None:
    for start, length in FIELDS:
        values = edge_values(kind)[::4]
        b, c = np.full(len(values), start, np.uint32), np.full(len(values), length, np.uint32)
        unsigned = f"u{kind[1:]}"
        actual = evaluate(f"bfe.{kind} {{d}}, {{a}}, {{b}}, {{c}};", DTYPES[unsigned], values, b, c)
        expected = [field(int(v) % 2 ** int(kind[1:]), start, length, kind) for v in values]
        assert actual.tolist() == expected, (start, length)


@pytest.mark.parametrize("bits", [32, 64])
def test_bit_field_insert(bits: int) -> None:
    kind = DTYPES[f"u{bits}"]
    for start, length in FIELDS:
        a, b = edge_values(f"u{bits}", 1)[::4], edge_values(f"u{bits}", 2)[::4]
        actual = evaluate(f"bfi.b{bits} {{d}}, {{a}}, {{b}}, {start}, {length};", kind, a, b)
        mask = sum(1 << (start + k) for k in range(length) if start + k < bits)
        expected = [(int(y) & ~mask) | (int(x) << start & mask) for x, y in zip(a, b)]
        assert actual.tolist() == expected, (start, length)


def test_permute() -> None:
    """A selector's nibble picks one of 8 bytes; its highest bit asks for the byte's sign instead."""
    random = np.random.default_rng(0)
    a, b, selector = (random.integers(0, 2**32, 64, np.uint32) for _ in range(3))

    def permuted(x: int, y: int, nibbles: int) -> int:
        pool = (x | y << 32).to_bytes(8, "little")
        chosen = bytearray()
        for k in range(4):
            nibble = nibbles >> 4 * k & 15
            byte = pool[nibble & 7]
            chosen.append((255 if byte >> 7 else 0) if nibble & 8 else byte)
        return int.from_bytes(chosen, "little")

    check("prmt.b32 {d}, {a}, {b}, {c};", "u32", permuted, a, b, selector)


def _comparisons() -> Iterator[tuple[str, str]]:
    for kind in ("s16", "s32", "s64", "u16", "u32", "u64"):
        for relation in ("eq", "ne", "lt", "le", "gt", "ge") + (("lo", "ls", "hi", "hs") if kind[0] == "u" else ()):
            yield relation, kind


RELATIONS: dict[str, Callable[[Any, Any], bool]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}
RELATIONS |= {new: RELATIONS[old] for new, old in (("lo", "lt"), ("ls", "le"), ("hi", "gt"), ("hs", "ge"))}


@pytest.mark.parametrize(("relation", "kind"), list(_comparisons()))
def test_comparisons(relation: str, kind: str) -> None:
    a, b = pairs(kind)
    actual = evaluate(f"setp.{relation}.{kind} {{d}}, {{a}}, {{b}};", bool, a, b)
    assert actual.tolist() == [RELATIONS[relation](int(x), int(y)) for x, y in zip(a, b)]


@pytest.mark.parametrize("kind", ["b16", "b32", "b64", "f32", "f64"])
def test_select(kind: str) -> None:
    dtype = np.dtype(f"u{int(kind[1:]) // 8}")
    a, b, p = np.arange(8, dtype=dtype), np.arange(100, 108, dtype=dtype), np.arange(8) % 3 == 0
    actual = evaluate(f"selp.{kind} {{d}}, {{a}}, {{b}}, {{c}};", dtype, a, b, p)
    assert actual.tolist() == np.where(p, a, b).tolist()


def test_only_threads_of_the_mask_divide_by_zero() -> None:
    body = "setp.ne.u32 %p0, %r0, 0; @%p0 div.u32 %r1, %r0, %r0;"
    assert Kind.DIVISION_BY_ZERO not in run_kernel(body).kinds()
