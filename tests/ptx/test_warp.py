"""What the threads of a warp do together, against the PTX ISA's text written out thread by thread."""

from __future__ import annotations

import numpy as np
import pytest

from ptx.handwritten import evaluate

LANES = np.arange(32, dtype=np.uint32)
VALUES = np.random.default_rng(0).integers(0, 2**32, 64, np.uint32)


def shuffled(mode: str, a: list[int], lane: int, amount: int, clamp: int) -> tuple[int, bool]:
    """As the PTX ISA's pseudocode has it."""
    bval, cval, segment = amount & 31, clamp & 31, (clamp >> 8) & 31
    most = (lane & segment) | (cval & ~segment & 31)
    least = lane & segment
    if mode == "up":
        j = lane - bval
        valid = j >= most
    elif mode == "down":
        j = lane + bval
        valid = j <= most
    elif mode == "bfly":
        j = lane ^ bval
        valid = j <= most
    else:
        j = least | (bval & ~segment & 31)
        valid = j <= most
    return a[j if valid else lane], valid


@pytest.mark.parametrize("mode", ["bfly", "up", "down", "idx"])
def test_shuffles(mode: str) -> None:
    for width in (32, 16, 8):
        clamp = ((32 - width) << 8) | (0 if mode == "up" else 31)
        for amount in (0, 1, 2, 5, 8, 16, 31, 33):
            shuffle = f"shfl.sync.{mode}.b32 {{d}}|%p3, {{a}}, {amount}, {clamp}, -1;"
            actual = evaluate(shuffle, np.uint32, VALUES)
            is_inside = evaluate(shuffle.replace("{d}|%p3", "%r5|{d}"), bool, VALUES)
            for warp in range(2):
                own = VALUES[32 * warp : 32 * warp + 32].tolist()
                expected = [shuffled(mode, own, lane, amount, clamp) for lane in range(32)]
                assert actual[32 * warp : 32 * warp + 32].tolist() == [value for value, _ in expected]
                assert is_inside[32 * warp : 32 * warp + 32].tolist() == [inside for _, inside in expected]


def test_a_shuffle_by_amounts_of_each_thread() -> None:
    amounts = np.random.default_rng(1).integers(0, 32, 32, np.uint32)
    actual = evaluate("shfl.sync.idx.b32 {d}, {a}, {b}, 31, -1;", np.uint32, VALUES[:32], amounts)
    assert actual.tolist() == VALUES[:32][amounts].tolist()


def test_a_shuffle_into_its_own_source() -> None:
    actual = evaluate("mov.b32 {d}, {a}; shfl.sync.up.b32 {d}, {d}, 1, 0, -1;", np.uint32, LANES)
    assert actual.tolist() == [0, *range(31)]


@pytest.mark.parametrize("kind", ["s32", "u32"])
def test_reductions(kind: str) -> None:
    values = VALUES.view(np.int32 if kind == "s32" else np.uint32)
    for name, function in (("min", np.min), ("max", np.max), ("add", np.sum)):
        actual = evaluate(f"redux.sync.{name}.{kind} {{d}}, {{a}}, -1;", values.dtype, values)
        expected = np.array(
            [function(own, dtype=np.int64) if name == "add" else function(own) for own in values.reshape(2, 32)]
        )
        assert actual.tolist() == np.repeat(expected.astype(values.dtype), 32).tolist()
    for name, bitwise in (("and", np.bitwise_and), ("or", np.bitwise_or), ("xor", np.bitwise_xor)):
        actual = evaluate(f"redux.sync.{name}.b32 {{d}}, {{a}}, -1;", np.uint32, VALUES)
        assert actual.tolist() == np.repeat(bitwise.reduce(VALUES.reshape(2, 32), axis=1), 32).tolist()


@pytest.mark.parametrize("votes", ["none", "one", "all"])
def test_votes(votes: str) -> None:
    p = {"none": np.zeros(32, bool), "one": np.arange(32) == 5, "all": np.ones(32, bool)}[votes]
    assert evaluate("vote.sync.any.pred {d}, {a}, -1;", bool, p).tolist() == [votes != "none"] * 32
    assert evaluate("vote.sync.all.pred {d}, {a}, -1;", bool, p).tolist() == [votes == "all"] * 32
    expected = sum(1 << k for k in range(32) if p[k])
    assert evaluate("vote.sync.ballot.b32 {d}, {a}, -1;", np.uint32, p).tolist() == [expected] * 32
