"""Tiles as wide as a head dimension, held in up to three parts, each a power of two wide.

Triton's tiles are powers of two wide, and a head dimension of 80 padded to 128 would pay for 128 in every matrix
product. So 80 is held as 64 + 16, 88 and 96 as 64 + 32, 104 as 64 + 32 + 16; a tile of parts is a tuple of tiles. D0,
D1 and D2 are the widths, 0 for a part that is not there, and only the last part may reach beyond HEAD_DIM.
"""

from __future__ import annotations

import functools

import triton
import triton.language as tl

NARROWEST_PART = 16  # the narrowest operand of a tensor-core product


@functools.cache
def split_head_dim(head_dim: int) -> tuple[int, int, int]:
    """The widths of the parts: those whose sum is the smallest that is at least head_dim."""
    rest, widths = -(-head_dim // NARROWEST_PART) * NARROWEST_PART, []
    while rest > 0:
        power_of_two = 1 << (rest.bit_length() - 1)  # the largest that is not above the rest
        width = power_of_two if len(widths) < 2 or power_of_two == rest else 2 * power_of_two
        widths.append(width)
        rest -= width
    if len(widths) == 3 and widths[1] == widths[2]:  # 128 + 64 + 64: one wide part is better than two
        widths = [widths[0], 2 * widths[1]]
    if len(widths) == 2 and widths[0] == widths[1]:
        widths = [2 * widths[0]]
    return (*widths, 0, 0)[:3]  # type: ignore[return-value]


@triton.jit
def _load_part(
    base,
    rows,
    row_stride,
    is_row,
    HEAD_DIM: tl.constexpr,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    MASK_ROWS: tl.constexpr,
):
    dims = FIRST + tl.arange(0, WIDTH)
    address = base + rows[:, None] * row_stride + dims[None, :]  # [rows, WIDTH]
    if MASK_ROWS and FIRST + WIDTH > HEAD_DIM:
        part = tl.load(address, mask=is_row[:, None] & (dims[None, :] < HEAD_DIM), other=0.0)
    elif MASK_ROWS:
        part = tl.load(address, mask=is_row[:, None], other=0.0)
    elif FIRST + WIDTH > HEAD_DIM:
        part = tl.load(address, mask=dims[None, :] < HEAD_DIM, other=0.0)
    else:
        part = tl.load(address)
    return part


@triton.jit
def load_rows(
    base,
    rows,  # [rows]: int64 where they, times the stride, may pass 2^31
    row_stride,
    is_row,  # [rows] int1, read only with MASK_ROWS: other rows are 0 and never touched
    HEAD_DIM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    MASK_ROWS: tl.constexpr,
):
    """-> parts, [rows, D0], [rows, D1], ..."""
    parts = (_load_part(base, rows, row_stride, is_row, HEAD_DIM, 0, D0, MASK_ROWS),)
    if D1 > 0:
        parts = parts + (_load_part(base, rows, row_stride, is_row, HEAD_DIM, D0, D1, MASK_ROWS),)
    if D2 > 0:
        parts = parts + (_load_part(base, rows, row_stride, is_row, HEAD_DIM, D0 + D1, D2, MASK_ROWS),)
    return parts


@triton.jit
def _store_part(base, rows, row_stride, is_row, part, HEAD_DIM: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    dims = FIRST + tl.arange(0, WIDTH)
    address = base + rows[:, None] * row_stride + dims[None, :]  # [rows, WIDTH]
    tl.store(address, part.to(base.dtype.element_ty), mask=is_row[:, None] & (dims[None, :] < HEAD_DIM))


@triton.jit
def store_rows(
    base,
    rows,
    row_stride,
    is_row,  # [rows] int1: the rows that are stored
    parts,
    HEAD_DIM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
):
    _store_part(base, rows, row_stride, is_row, parts[0], HEAD_DIM, 0, D0)
    if D1 > 0:
        _store_part(base, rows, row_stride, is_row, parts[1], HEAD_DIM, D0, D1)
    if D2 > 0:
        _store_part(base, rows, row_stride, is_row, parts[2], HEAD_DIM, D0 + D1, D2)


@triton.jit
def zero_rows(ROWS: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    """Accumulators, float32."""
    parts = (tl.zeros([ROWS, D0], tl.float32),)
    if D1 > 0:
        parts = parts + (tl.zeros([ROWS, D1], tl.float32),)
    if D2 > 0:
        parts = parts + (tl.zeros([ROWS, D2], tl.float32),)
    return parts


@triton.jit
def scale_rows(parts, factor):
    """parts times factor [rows]."""
    scaled = (parts[0] * factor[:, None],)
    for i in tl.static_range(1, len(parts)):
        scaled = scaled + (parts[i] * factor[:, None],)
    return scaled


@triton.jit
def dot_rows(left, right):
    """[M, D] . [N, D]^T -> [M, N] float32: sums of products over the whole head dimension."""
    product = tl.dot(left[0], tl.trans(right[0]), input_precision="ieee")
    for i in tl.static_range(1, len(left)):
        product = tl.dot(left[i], tl.trans(right[i]), product, input_precision="ieee")
    return product


@triton.jit
def add_dot_rows(initial, left, right):
    """initial [M, N] + [M, D] . [N, D]^T: what the accumulator starts from costs no instruction to add."""
    product = tl.dot(left[0], tl.trans(right[0]), initial, input_precision="ieee")
    for i in tl.static_range(1, len(left)):
        product = tl.dot(left[i], tl.trans(right[i]), product, input_precision="ieee")
    return product


@triton.jit
def add_weighted_rows(accumulator, weights, rows):
    """accumulator [M, D] + weights [M, N] . rows [N, D]; weights are rounded to the rows' type."""
    weights = weights.to(rows[0].dtype)
    added = (tl.dot(weights, rows[0], accumulator[0], input_precision="ieee"),)
    for i in tl.static_range(1, len(accumulator)):
        added = added + (tl.dot(weights, rows[i], accumulator[i], input_precision="ieee"),)
    return added
