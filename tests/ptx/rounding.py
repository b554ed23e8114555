"""Rounding that NumPy does not offer: sums rounded once, bfloat16, and towards zero.

The way to round once: a result is first brought to a wider type by rounding to odd (an inexact result takes that one
of its two neighbours whose last bit is 1), and then to nearest. Where the wider type has at least two bits more than
the narrower one, that gives what rounding the exact result gives (Boldo and Melquiond, 2008).
"""

from __future__ import annotations

from typing import Any

import numpy as np

SMALLEST_NORMAL = np.float32(2.0**-126)
_BF16_NAN, _FP16_NAN = np.uint16(0x7FFF), np.uint16(0x7FFF)


def flush(x: Any) -> Any:
    """As .ftz: denormal float32 become zeros of the same sign."""
    return np.where(np.abs(x) < SMALLEST_NORMAL, np.copysign(np.float32(0), x), x)


def sum_to_odd(a: np.ndarray, b: Any) -> np.ndarray:
    """a + b in float64, rounded to odd."""
    total = a + b
    part = total - a
    error = (a - (total - part)) + (b - part)  # exactly (Knuth's TwoSum)
    bits = total.view(np.int64)
    is_wrong = (error != 0) & (bits & 1 == 0) & np.isfinite(total)
    away = (error > 0) == (total > 0)
    return (bits + np.where(is_wrong, np.where(away, 1, -1), 0)).view(np.float64)


def float32_to_odd(x: np.ndarray) -> np.ndarray:
    """float64 to float32, rounded to odd; what is too large becomes the largest number, not infinity."""
    nearest = x.astype(np.float32)
    error = x - nearest
    bits = np.ascontiguousarray(nearest).view(np.int32)
    is_wrong = (error != 0) & (bits & 1 == 0) & np.isfinite(nearest)
    away = np.abs(x) > np.abs(nearest)
    odd = (bits + np.where(is_wrong, np.where(away, 1, -1), 0).astype(np.int32)).view(np.float32)
    largest = np.copysign(np.finfo(np.float32).max, nearest)
    return np.where(np.isinf(nearest) & np.isfinite(x), largest, odd)


def fma32(a: Any, b: Any, c: Any) -> np.ndarray:
    """a * b + c of float32, rounded once. The product is exact in float64."""
    product = np.multiply(a, b, dtype=np.float64)
    total = product + c
    result = total.astype(np.float32)
    # A second rounding does harm only where the first one has hit the middle between two float32, or below their
    # normal range, where the middles lie elsewhere.
    middle = (total.view(np.int64) & 0x1FFFFFFF) == 0x10000000
    if middle.any() or (np.abs(result) < SMALLEST_NORMAL).any():
        return sum_to_odd(product, np.asarray(c, np.float64)).astype(np.float32)
    return result


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bf16(x: np.ndarray, towards_zero: bool = False) -> np.ndarray:
    """float32 to the bits of bfloat16."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    if towards_zero:
        rounded = (bits >> 16).astype(np.uint16)
    else:
        rounded = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), _BF16_NAN, rounded)


def to_fp16(x: np.ndarray, towards_zero: bool = False) -> np.ndarray:
    """float32 or float64 to the bits of float16."""
    nearest = np.asarray(x).astype(np.float16)
    bits = np.ascontiguousarray(nearest).view(np.uint16)
    if towards_zero:
        bits = np.where(np.abs(nearest.astype(np.float64)) > np.abs(x), bits - 1, bits).astype(np.uint16)
    return np.where(np.isnan(x), _FP16_NAN, bits)


def wide_to_bf16(x: np.ndarray) -> np.ndarray:
    """float64 (exact, or rounded to odd) to the bits of bfloat16."""
    return to_bf16(float32_to_odd(x))
