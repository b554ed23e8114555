"""Crops of images, resized and normalised: both passes of the resampling in one kernel, after crop_weights.py.

    result[k, c] = multiplier[c] * vertical(horizontal(crop of image k))[c] + offset[c]        or the other way around

A program computes BLOCK_M rows by BLOCK_N columns of one box, all channels. It walks over what these need of the crop
in chunks, and the first pass of a chunk never leaves the chip:

    first pass    tap by tap: a weight for each column of the tile, times the pixels of CHUNK rows
    second pass   a matrix product: weights of the tile's rows [BLOCK_M, CHUNK], zero but for a band, times the levels
                  [CHUNK, BLOCK_N] of the first

and with rows and columns exchanged for boxes that go through the vertical pass first. Both add up integers for uint8
images, as Pillow does. A weight w, in units of 2^-22, goes through the tensor cores as high * 2^12 + low: |w| is at
most 2^23, so that |high| <= 2048, and |low| <= 2048, are exact in float16, as levels are; a sum of CHUNK products of
them with levels stays below 2^24, up to which float32 holds every integer. (With 11 bits in low, high would not be
exact: at a border, where a negative lobe of the filter is cut off, weights reach 1.125.)
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..backends.crops.interface import CropCall
from .crop_weights import (
    COLUMNS,
    EXISTS,
    IMAGE,
    RECORD,
    ROWS,
    TABLE_ADDRESS,
    TABLE_ROW,
    TABLE_STRIDE_C,
    TABLE_STRIDE_H,
    TABLE_STRIDE_W,
    VERTICAL_FIRST,
    Images,
    allocate_weights,
    bytes_of_a_box,
    crop_weights,
)
from .tuning import CROP_TILE

CHUNK = 16  # sums of up to 32 products are exact; the fewer, the less of the last chunk is in vain
SCRATCH_BYTES = 64 * 2**20  # of the weights: more boxes go one chunk after the other
_MOST_PROGRAMS = 2**31 - 1
_MOST_REGISTERS = 128  # of a thread: four programs fit, and ptxas makes no loop longer to fit more


@triton.jit
def _zero_sums(M: tl.constexpr, N: tl.constexpr, IS_ROUNDED: tl.constexpr, CHANNELS: tl.constexpr):
    """Of each channel; for levels half a level, which makes the shift that follows round."""
    if IS_ROUNDED:
        zero = tl.full([M, N], 2097152, tl.int32)  # 2^21
    else:
        zero = tl.zeros([M, N], tl.float32)
    sums = (zero,)
    for _ in tl.static_range(1, CHANNELS):
        sums = sums + (zero,)
    return sums


@triton.jit
def _add_tap(sums, weight, image, channel_stride, offsets, is_pixel, fill, IS_ROUNDED: tl.constexpr):
    """sums + weight * pixels; of those that are not in the crop, `fill`."""
    added = (_add_pixels(sums[0], weight, image + offsets, is_pixel, fill[0], IS_ROUNDED),)
    for channel in tl.static_range(1, len(sums)):
        plane = image + channel * channel_stride
        added = added + (_add_pixels(sums[channel], weight, plane + offsets, is_pixel, fill[channel], IS_ROUNDED),)
    return added


@triton.jit
def _add_pixels(total, weight, address, is_pixel, fill, IS_ROUNDED: tl.constexpr):
    pixels = tl.load(address, mask=is_pixel, other=tl.cast(fill, address.dtype.element_ty))
    return total + weight * pixels.to(tl.int32 if IS_ROUNDED else tl.float32)


@triton.jit
def _rounded(total):
    """To levels 0..255, int32."""
    return tl.minimum(tl.maximum(total >> 22, 0), 255)


@triton.jit
def _add_products(sums, weights, passed, WEIGHTS_ARE_LEFT: tl.constexpr, IS_ROUNDED: tl.constexpr):
    """sums + weights . levels, or levels . weights, of what the first pass left of each channel."""
    added = (_add_product(sums[0], weights, passed[0], WEIGHTS_ARE_LEFT, IS_ROUNDED),)
    for channel in tl.static_range(1, len(sums)):
        added = added + (_add_product(sums[channel], weights, passed[channel], WEIGHTS_ARE_LEFT, IS_ROUNDED),)
    return added


@triton.jit
def _add_product(total, weights, passed, WEIGHTS_ARE_LEFT: tl.constexpr, IS_ROUNDED: tl.constexpr):
    if IS_ROUNDED:
        levels = _rounded(passed).to(tl.float16)
        high = (weights + 2048) >> 12
        low = (weights - (high << 12)).to(tl.float16)
        high = high.to(tl.float16)
        if WEIGHTS_ARE_LEFT:
            high_product, low_product = tl.dot(high, levels), tl.dot(low, levels)
        else:
            high_product, low_product = tl.dot(levels, high), tl.dot(levels, low)
        total += (high_product.to(tl.int32) << 12) + low_product.to(tl.int32)
    else:
        if WEIGHTS_ARE_LEFT:
            total = tl.dot(weights, passed, total, input_precision="ieee")
        else:
            total = tl.dot(passed, weights, total, input_precision="ieee")
    return total


@triton.jit
def _bounds(first, count):
    """The first pixel that weighs in the tile and the one after the last; equal if there is none."""
    begin = tl.min(tl.where(count > 0, first, 2147483647), 0)
    end = tl.max(tl.where(count > 0, first + count, -2147483647), 0)
    return begin, tl.maximum(end, begin)


@triton.jit(
    do_not_specialize=[
        "image_stride_b",
        "image_stride_c",
        "image_stride_h",
        "image_stride_w",
        "first_box",
        "height",
        "width",
        "most_taps_y",
        "most_taps_x",
    ],
    do_not_specialize_on_alignment=["image_ptr"],
)
def crop_resize_kernel(
    image_ptr,  # (B, C, H, W); with HAS_TABLE only its type counts
    table_ptr,  # (images, TABLE_ROW) int64, read only with HAS_TABLE
    record_ptr,  # crop_weights.py
    span_ptr,
    weight_ptr,
    result_ptr,  # (K, C, height, width), contiguous
    image_stride_b,
    image_stride_c,
    image_stride_h,
    image_stride_w,
    first_box,  # of the result, where the records begin
    height,
    width,
    most_taps_y,
    most_taps_x,
    fill_0,
    fill_1,
    fill_2,
    multiplier_0,
    multiplier_1,
    multiplier_2,
    offset_0,
    offset_1,
    offset_2,
    CHANNELS: tl.constexpr,
    IS_ROUNDED: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program per (box, tile of the result)."""
    tiles_x = tl.cdiv(width, BLOCK_N)
    tiles = tl.cdiv(height, BLOCK_M) * tiles_x
    own_box, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles

    record = record_ptr + RECORD * own_box
    exists, index = tl.load(record + EXISTS) != 0, tl.load(record + IMAGE).to(tl.int64)
    rows_begin, rows_end = tl.load(record + ROWS), tl.load(record + ROWS + 1)
    columns_begin, columns_end = tl.load(record + COLUMNS), tl.load(record + COLUMNS + 1)
    if HAS_TABLE:
        row = table_ptr + TABLE_ROW * index
        image = tl.load(row + TABLE_ADDRESS).to(image_ptr.dtype)
        stride_c, stride_h = tl.load(row + TABLE_STRIDE_C), tl.load(row + TABLE_STRIDE_H)
        stride_w = tl.load(row + TABLE_STRIDE_W)
    else:
        image = image_ptr + index * image_stride_b
        stride_c, stride_h = tl.cast(image_stride_c, tl.int64), tl.cast(image_stride_h, tl.int64)
        stride_w = tl.cast(image_stride_w, tl.int64)

    rows = tile // tiles_x * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    columns = tile % tiles_x * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    is_row, is_column = rows < height, columns < width
    spans = span_ptr + 2 * (height + width) * own_box
    counts = spans + height + width
    y_first, y_count = tl.load(spans + rows, mask=is_row, other=0), tl.load(counts + rows, mask=is_row, other=0)
    x_first = tl.load(spans + height + columns, mask=is_column, other=0)
    x_count = tl.load(counts + height + columns, mask=is_column, other=0)
    y_weights = weight_ptr + (most_taps_y * height + most_taps_x * width).to(tl.int64) * own_box
    x_weights = y_weights + most_taps_y * height

    fill, multiplier, offset = (fill_0,), (multiplier_0,), (offset_0,)
    if CHANNELS > 1:
        fill = fill + (fill_1, fill_2)
        multiplier = multiplier + (multiplier_1, multiplier_2)
        offset = offset + (offset_1, offset_2)

    sums = _zero_sums(BLOCK_M, BLOCK_N, IS_ROUNDED, CHANNELS)
    chunk = tl.arange(0, CHUNK)
    if tl.load(record + VERTICAL_FIRST) == 0:
        begin, end = _bounds(y_first, y_count)
        for chunk_begin in range(begin, end, CHUNK):
            pixel_rows = chunk_begin + chunk  # [CHUNK]
            is_pixel_row = (pixel_rows >= rows_begin) & (pixel_rows < tl.minimum(rows_end, end))
            passed = _zero_sums(CHUNK, BLOCK_N, IS_ROUNDED, CHANNELS)
            for tap in range(0, tl.max(x_count, 0)):
                is_tap, pixel_columns = tap < x_count, x_first + tap
                weight = tl.load(x_weights + tap * width + columns, mask=is_tap, other=0)
                is_pixel_column = is_tap & (pixel_columns >= columns_begin) & (pixel_columns < columns_end)
                offsets = pixel_rows[:, None] * stride_h + pixel_columns[None, :] * stride_w  # [CHUNK, BLOCK_N]
                is_pixel = is_pixel_row[:, None] & is_pixel_column[None, :]
                passed = _add_tap(passed, weight[None, :], image, stride_c, offsets, is_pixel, fill, IS_ROUNDED)
            taps = pixel_rows[None, :] - y_first[:, None]  # [BLOCK_M, CHUNK]
            is_weight = (taps >= 0) & (taps < y_count[:, None])
            weights = tl.load(y_weights + taps * height + rows[:, None], mask=is_weight, other=0)
            sums = _add_products(sums, weights, passed, True, IS_ROUNDED)
    else:
        begin, end = _bounds(x_first, x_count)
        for chunk_begin in range(begin, end, CHUNK):
            pixel_columns = chunk_begin + chunk  # [CHUNK]
            is_pixel_column = (pixel_columns >= columns_begin) & (pixel_columns < tl.minimum(columns_end, end))
            passed = _zero_sums(BLOCK_M, CHUNK, IS_ROUNDED, CHANNELS)
            for tap in range(0, tl.max(y_count, 0)):
                is_tap, pixel_rows = tap < y_count, y_first + tap
                weight = tl.load(y_weights + tap * height + rows, mask=is_tap, other=0)
                is_pixel_row = is_tap & (pixel_rows >= rows_begin) & (pixel_rows < rows_end)
                offsets = pixel_rows[:, None] * stride_h + pixel_columns[None, :] * stride_w  # [BLOCK_M, CHUNK]
                is_pixel = is_pixel_row[:, None] & is_pixel_column[None, :]
                passed = _add_tap(passed, weight[:, None], image, stride_c, offsets, is_pixel, fill, IS_ROUNDED)
            taps = pixel_columns[:, None] - x_first[None, :]  # [CHUNK, BLOCK_N]
            is_weight = (taps >= 0) & (taps < x_count[None, :])
            weights = tl.load(x_weights + taps * width + columns[None, :], mask=is_weight, other=0)
            sums = _add_products(sums, weights, passed, False, IS_ROUNDED)

    plane = tl.cast(height, tl.int64) * width
    target = (
        result_ptr + (own_box + first_box) * CHANNELS * plane + rows[:, None].to(tl.int64) * width + columns[None, :]
    )
    is_inside = is_row[:, None] & is_column[None, :]
    for channel in tl.static_range(CHANNELS):
        levels = sums[channel]
        if IS_ROUNDED:
            levels = _rounded(levels).to(tl.float32)
        levels = tl.where(exists, levels, fill[channel])  # [BLOCK_M, BLOCK_N]
        values = levels * multiplier[channel] + offset[channel]
        tl.store(target + channel * plane, values.to(result_ptr.dtype.element_ty), mask=is_inside)


def crop_resize(call: CropCall) -> Tensor:
    """(K, C, height, width). Launches two kernels whatever the number of boxes, or as often two as their weights take
    SCRATCH_BYTES. Nothing waits for the device.
    """
    result, images = call.new_result(), Images.of(call)
    num_boxes, (height, width) = call.boxes.shape[0], call.size
    tiles = triton.cdiv(height, CROP_TILE.BLOCK_M) * triton.cdiv(width, CROP_TILE.BLOCK_N)
    most = max(1, min(num_boxes, SCRATCH_BYTES // bytes_of_a_box(call), _MOST_PROGRAMS // tiles))
    weights = allocate_weights(call, most)
    for first_box in range(0, num_boxes, most):
        boxes = min(most, num_boxes - first_box)
        crop_weights(call, images, first_box, boxes, weights)
        crop_resize_kernel[(boxes * tiles,)](
            images.first,
            weights.records if images.table is None else images.table,
            weights.records,
            weights.spans,
            weights.weights,
            result,
            *images.strides,
            first_box,
            height,
            width,
            *weights.most_taps,
            *_three(call.fill),
            *_three(call.multiplier),
            *_three(call.offset),
            CHANNELS=call.channels,
            IS_ROUNDED=call.is_rounded,
            HAS_TABLE=images.table is not None,
            CHUNK=CHUNK,
            maxnreg=_MOST_REGISTERS,
            **CROP_TILE.launch_arguments(),
        )
    return result


def _three(values: tuple[float, ...]) -> tuple[float, ...]:
    """One for each channel that a kernel may have."""
    return values if len(values) == 3 else values * 3
