"""The first of the two kernels of `crop_resize`: which pixels weigh how much in each output pixel, for all boxes.

It computes in float64, operation by operation, what finegrain_ops/backends/crops/sampling.py says, once per box and
axis; resampling then needs no float64, of which many GPUs have little. `Weights` says what it writes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backends.crops import image_table
from ..backends.crops.interface import INTERPOLATIONS, CropCall, PassOrder

# Of a box's record, int32: which image it lies in, whether the vertical pass is the first, and the pixels of the crop.
# EXISTS is 0 for a box without area or image: no pixel weighs in its result.
EXISTS = tl.constexpr(0)
IMAGE = tl.constexpr(1)
VERTICAL_FIRST = tl.constexpr(2)
ROWS = tl.constexpr(3)  # begin, and end after it
COLUMNS = tl.constexpr(5)
RECORD = tl.constexpr(8)

# Of a row of the table of images, int64.
TABLE_ROW = tl.constexpr(len(image_table.COLUMNS))
TABLE_ADDRESS, TABLE_HEIGHT, TABLE_WIDTH, TABLE_STRIDE_C, TABLE_STRIDE_H, TABLE_STRIDE_W = (
    tl.constexpr(image_table.COLUMNS.index(name))
    for name in ("address", "height", "width", "channel_stride", "row_stride", "column_stride")
)

VERTICAL_FIRST_IF_TALL = tl.constexpr(int(PassOrder.VERTICAL_FIRST_IF_TALL))
VERTICAL_FIRST_IF_SHRUNK = tl.constexpr(int(PassOrder.VERTICAL_FIRST_IF_SHRUNK))

_BLOCK = 64  # output places of a program


@triton.jit
def _filter(x, RADIUS: tl.constexpr, ANTIALIAS: tl.constexpr):
    """[BLOCK] float64; the coefficients of the cubic are exact in float32, as which Triton may hold literals."""
    x = tl.abs(x)
    if RADIUS == 1:
        weight = tl.where(x < 1, 1 - x, 0.0)
    else:
        A: tl.constexpr = -0.5 if ANTIALIAS else -0.75
        near, far = ((A + 2) * x - (A + 3)) * x * x + 1, (((x - 5) * x + 8) * x - 4) * A
        weight = tl.where(x < 1, near, tl.where(x < 2, far, 0.0))
    return weight


@triton.jit
def _weight(position, centre, reciprocal, length, RADIUS: tl.constexpr, ANTIALIAS: tl.constexpr):
    """[BLOCK] float64, before it is divided by their sum, of the pixel of the hull at `position`."""
    if ANTIALIAS:
        weight = _filter((position - centre + 0.5) * reciprocal, RADIUS, True)
    else:
        # A pixel at the border has the weights of all those beyond it too.
        weight = tl.zeros_like(centre)
        first = tl.floor(centre - 0.5) + 1 - RADIUS
        for tap in tl.static_range(2 * RADIUS):
            clamped = tl.minimum(tl.maximum(first + tap, 0.0), length - 1)
            weight += tl.where(clamped == position, _filter(first + tap - (centre - 0.5), RADIUS, False), 0.0)
    return weight


@triton.jit(
    do_not_specialize=[
        "first_box",
        "num_images",
        "image_height",
        "image_width",
        "height",
        "width",
        "shortest_edge",
        "most_taps_y",
        "most_taps_x",
    ],
    do_not_specialize_on_alignment=["index_ptr"],
)
def crop_weights_kernel(
    boxes_ptr,  # (K, 4) float64
    index_ptr,  # (K,) int64, read only with HAS_INDEX
    table_ptr,  # (images, TABLE_ROW) int64, read only with HAS_TABLE
    record_ptr,  # of the boxes from first_box on, as are the others
    span_ptr,
    weight_ptr,
    first_box,
    num_images,
    image_height,  # without HAS_TABLE
    image_width,
    height,
    width,
    shortest_edge,  # 0: none
    most_taps_y,
    most_taps_x,
    HAS_INDEX: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    IS_PADDED: tl.constexpr,
    PASS_ORDER: tl.constexpr,
    IS_ROUNDED: tl.constexpr,
    RADIUS: tl.constexpr,
    ANTIALIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per (box, axis, block of output places); axis 0 is y."""
    own_box, axis = tl.program_id(0), tl.program_id(1)
    box = own_box.to(tl.int64) + first_box

    index = box
    if HAS_INDEX:
        index = tl.load(index_ptr + box)
    else:
        index = tl.where(num_images > 1, box, 0)
    exists = (index >= 0) & (index < num_images)
    index = tl.where(exists, index, 0)
    if HAS_TABLE:
        row = table_ptr + TABLE_ROW * index
        image_height, image_width = tl.load(row + TABLE_HEIGHT), tl.load(row + TABLE_WIDTH)

    # Comparisons with NaN are false, so NaN stays where it is, and the box does not exist.
    x0, y0 = tl.load(boxes_ptr + 4 * box), tl.load(boxes_ptr + 4 * box + 1)
    x1, y1 = tl.load(boxes_ptr + 4 * box + 2), tl.load(boxes_ptr + 4 * box + 3)
    x0, y0 = tl.where(x0 < 0, 0.0, x0), tl.where(y0 < 0, 0.0, y0)
    x1, y1 = tl.where(x1 > image_width, image_width, x1), tl.where(y1 > image_height, image_height, y1)
    exists = exists & (x0 < x1) & (y0 < y1)
    x0, y0 = tl.where(exists, x0, 0.0), tl.where(exists, y0, 0.0)
    x1, y1 = tl.where(exists, x1, 1.0), tl.where(exists, y1, 1.0)

    x_low, x_high, y_low, y_high = x0, x1, y0, y1
    if IS_PADDED:
        x_length, y_length = x1 - x0, y1 - y0
        longest = tl.maximum(x_length, y_length)
        x_before, y_before = tl.floor((longest - x_length) / 2), tl.floor((longest - y_length) / 2)
        x_low, x_high = x0 - x_before, x1 + (longest - x_length - x_before)
        y_low, y_high = y0 - y_before, y1 + (longest - y_length - y_before)
    x_begin, y_begin = tl.floor(x_low), tl.floor(y_low)
    x_hull, y_hull = tl.ceil(x_high) - x_begin, tl.ceil(y_high) - y_begin

    x_resized, y_resized = tl.cast(width, tl.float64), tl.cast(height, tl.float64)
    if shortest_edge > 0:
        shortest = tl.minimum(x_hull, y_hull)
        x_resized, y_resized = tl.floor(shortest_edge * x_hull / shortest), tl.floor(shortest_edge * y_hull / shortest)

    if (axis == 0) & (tl.program_id(2) == 0):
        record = record_ptr + RECORD * own_box.to(tl.int64)
        vertical_first = y_hull > y_resized
        if PASS_ORDER == VERTICAL_FIRST_IF_SHRUNK:
            vertical_first = vertical_first & (y_hull - y_resized > 2 * (x_hull - x_resized))
        elif PASS_ORDER == VERTICAL_FIRST_IF_TALL:
            vertical_first = vertical_first & (y_hull > 100 * x_hull)
        else:
            vertical_first = vertical_first & False
        tl.store(record + EXISTS, exists.to(tl.int32))
        tl.store(record + IMAGE, index.to(tl.int32))
        tl.store(record + VERTICAL_FIRST, vertical_first.to(tl.int32))
        tl.store(record + ROWS, tl.floor(y0).to(tl.int32))
        tl.store(record + ROWS + 1, tl.ceil(y1).to(tl.int32))
        tl.store(record + COLUMNS, tl.floor(x0).to(tl.int32))
        tl.store(record + COLUMNS + 1, tl.ceil(x1).to(tl.int32))

    is_y = axis == 0
    size, most_taps = tl.where(is_y, height, width), tl.where(is_y, most_taps_y, most_taps_x)
    low, high = tl.where(is_y, y_low, x_low), tl.where(is_y, y_high, x_high)
    begin, length = tl.where(is_y, y_begin, x_begin), tl.where(is_y, y_hull, x_hull)
    resized = tl.where(is_y, y_resized, x_resized)
    start = (low - begin).to(tl.float32).to(tl.float64)
    scale = ((high - begin).to(tl.float32) - (low - begin).to(tl.float32)).to(tl.float64) / resized

    places = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    is_place = places < size
    centre = start + (places + tl.floor((resized - size) * 0.5) + 0.5) * scale
    filter_width = tl.where(scale < 1, 1.0, scale)
    reciprocal = 1.0 / filter_width
    if ANTIALIAS:
        support = filter_width * RADIUS
        first = tl.maximum((centre - support + 0.5).to(tl.int32), 0)
        end = tl.minimum((centre + support + 0.5).to(tl.int32), length.to(tl.int32))
    else:
        below = tl.floor(centre - 0.5)
        first = tl.minimum(tl.maximum(below + 1 - RADIUS, 0.0), length - 1).to(tl.int32)
        end = tl.minimum(tl.maximum(below + RADIUS, 0.0), length - 1).to(tl.int32) + 1
    count = tl.minimum(tl.maximum(end - first, 0), most_taps)
    count = tl.where(is_place & exists, count, 0)
    most = tl.max(count, 0)

    span = span_ptr + 2 * (height + width) * own_box.to(tl.int64) + tl.where(is_y, 0, height)
    tl.store(span + places, first + begin.to(tl.int32), mask=is_place)
    tl.store(span + height + width + places, count, mask=is_place)

    total = tl.zeros([BLOCK], tl.float64)
    for tap in range(0, most):
        weight = _weight((first + tap).to(tl.float64), centre, reciprocal, length, RADIUS, ANTIALIAS)
        total += tl.where(tap < count, weight, 0.0)
    total = tl.where(count > 0, total, 1.0)
    weights_of_a_box = (most_taps_y * height + most_taps_x * width).to(tl.int64)
    target = weight_ptr + weights_of_a_box * own_box + tl.where(is_y, 0, most_taps_y * height)
    for tap in range(0, most):
        weight = _weight((first + tap).to(tl.float64), centre, reciprocal, length, RADIUS, ANTIALIAS)
        if ANTIALIAS:
            weight = weight / total
        if IS_ROUNDED:
            weight = weight * 4194304.0  # 2^22
            weight = weight + tl.where(weight < 0, -0.5, 0.5)
        tl.store(target + tap * size + places, weight.to(weight_ptr.dtype.element_ty), mask=tap < count)


@dataclass(frozen=True)
class Images:
    """What the kernels get of (B, C, H, W) or of several (C, H_i, W_i).

    first: a tensor of the images' type; without a table, the one that holds them all, with strides (B, C, H, W) in
    elements, and height and width of each image.
    """

    first: Tensor
    table: Tensor | None
    strides: tuple[int, int, int, int] = (0, 0, 0, 0)
    height: int = 0
    width: int = 0

    @staticmethod
    def of(call: CropCall) -> Images:
        if (images := call.batch) is None:
            return Images(call.images[0], image_table.image_table(call.images))
        batch, channel, row, column = images.stride()
        return Images(images, None, (batch, channel, row, column), images.shape[2], images.shape[3])


@dataclass(frozen=True)
class Weights:
    """What the pixels of some boxes weigh, on the device. Pixels of a letterbox count on beyond those of the image.

    records  (boxes, RECORD) int32, fields as above
    spans    (boxes, 2, height + width) int32: for each row of the result and then for each column the first pixel that
             weighs in it, and how many do
    weights  (boxes, most_taps_y * height + most_taps_x * width): by tap and row, then by tap and column; int32, in
             units of 2^-22, where levels are rounded, otherwise float32
    """

    records: Tensor
    spans: Tensor
    weights: Tensor
    most_taps: tuple[int, int]


def bytes_of_a_box(call: CropCall) -> int:
    (height, width), (taps_y, taps_x) = call.size, call.most_taps()
    return 4 * (RECORD.value + 2 * (height + width) + taps_y * height + taps_x * width)


def allocate_weights(call: CropCall, boxes: int) -> Weights:
    (height, width), (taps_y, taps_x), device = call.size, call.most_taps(), call.boxes.device
    weight_dtype = torch.int32 if call.is_rounded else torch.float32
    return Weights(
        torch.empty((boxes, RECORD.value), dtype=torch.int32, device=device),
        torch.empty((boxes, 2, height + width), dtype=torch.int32, device=device),
        torch.empty((boxes, taps_y * height + taps_x * width), dtype=weight_dtype, device=device),
        (taps_y, taps_x),
    )


def crop_weights(call: CropCall, images: Images, first_box: int, boxes: int, weights: Weights) -> None:
    """Launches the kernel for so many boxes from first_box on."""
    height, width = call.size
    # Without fused multiply-adds, each operation rounds as it does on a CPU.
    crop_weights_kernel[(boxes, 2, triton.cdiv(max(height, width), _BLOCK))](
        call.boxes,
        call.boxes if call.image_index is None else call.image_index,
        call.boxes if images.table is None else images.table,
        weights.records,
        weights.spans,
        weights.weights,
        first_box,
        call.num_images,
        images.height,
        images.width,
        height,
        width,
        call.shortest_edge or 0,
        *weights.most_taps,
        HAS_INDEX=call.image_index is not None,
        HAS_TABLE=images.table is not None,
        IS_PADDED=call.is_padded,
        PASS_ORDER=int(call.pass_order),
        IS_ROUNDED=call.is_rounded,
        RADIUS=INTERPOLATIONS[call.interpolation],
        ANTIALIAS=call.antialias,
        BLOCK=_BLOCK,
        num_warps=2,
        num_stages=1,
        enable_fp_fusion=False,
    )
