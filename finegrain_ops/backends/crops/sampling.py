"""Which pixels weigh how much in an output pixel: the definition of `crop_resize`, in float64.

For integer boxes this is Pillow's `image.crop(box).resize(size)`, for fractional ones
`image.crop(outer).resize(size, box=inner)` with outer the integer box around it (Pillow, src/libImaging/Resample.c:
`precompute_coeffs`, `normalize_coeffs_8bpc`, `ImagingResample`).

Along one axis, for a box [e0, e1] clipped to the image, S the length that the crop is resized to:

    pixels of the crop    floor(e0) .. ceil(e1) - 1
    sampled interval      [e0, e1]; letterboxed, with M the longer side of the box: floor((M - (e1 - e0)) / 2) more
                          before and the rest after it
    hull                  the integer interval around the sampled one; what it has beyond the crop's pixels is `fill`
    start, end            of the sampled interval from the hull's first pixel, rounded to float32 as Pillow does
    scale                 (end - start) / S
    width of the filter   max(scale, 1) with antialiasing
    centre of pixel i     start + (i + 0.5) * scale
    taps of pixel i       int(centre - support + 0.5) up to, not with, int(centre + support + 0.5), within the hull;
                          support = radius * width
    weight of tap j       filter((j - centre + 0.5) / width), divided by the sum of these

Without antialiasing the taps are those of `torch.nn.functional.interpolate`: 2 or 4, beyond the border the border's.

For uint8 images weights are rounded to multiples of 2^-22, half away from zero, and each pass rounds its sums to a
level: (2^21 + sum of pixel * weight * 2^22) >> 22, clipped to 0..255. Floating images are not rounded to levels;
between the passes they are float32, as Pillow's mode "F".

The horizontal pass comes first, but for crops (hulls) of which `PassOrder` says otherwise.
"""

from __future__ import annotations

import ctypes
import math
from typing import NamedTuple

import torch
from torch import Tensor

from .interface import INTERPOLATIONS, CropCall, PassOrder

WEIGHT_BITS = 22
CUBIC = {True: -0.5, False: -0.75}  # the parameter of the bicubic filter with and without antialiasing


class AxisSampling(NamedTuple):
    """One axis of a box. What is sampled, from start to end, is counted from the hull's first pixel."""

    pixels_begin: int  # of the crop, in the image
    pixels_end: int
    hull_begin: int
    hull_length: int
    start: float
    end: float
    resized: int  # S
    cut: int  # where the result begins in the resized crop

    @property
    def scale(self) -> float:
        return _float32(self.end - self.start) / self.resized


class CropSampling(NamedTuple):
    """A box that has area, in an image that exists."""

    image: int  # its index
    y: AxisSampling
    x: AxisSampling
    vertical_first: bool


def sample(call: CropCall) -> list[CropSampling | None]:
    """Of each box; None where there is nothing to sample. On a device this waits for the boxes."""
    image_sizes = call.image_sizes
    indices = range(len(call.boxes)) if call.num_images > 1 else [0] * len(call.boxes)
    if call.image_index is not None:
        indices = call.image_index.tolist()
    return [
        _sample_box(call, box, index, image_sizes[index]) if 0 <= index < len(image_sizes) else None
        for box, index in zip(call.boxes.tolist(), indices)
    ]


def _sample_box(call: CropCall, box: list[float], index: int, image_size: tuple[int, int]) -> CropSampling | None:
    height, width = image_size
    x_low, y_low = max(box[0], 0.0), max(box[1], 0.0)
    x_high, y_high = min(box[2], float(width)), min(box[3], float(height))
    if not (x_low < x_high and y_low < y_high):  # NaN too
        return None
    longest = max(x_high - x_low, y_high - y_low) if call.is_padded else None
    hulls = [_Hull.of(y_low, y_high, longest), _Hull.of(x_low, x_high, longest)]
    resized = list(call.size)
    if call.shortest_edge is not None:
        shortest = min(hull.length for hull in hulls)
        resized = [math.floor(call.shortest_edge * hull.length / shortest) for hull in hulls]
    y, x = (
        AxisSampling(
            pixels_begin=math.floor(low),
            pixels_end=math.ceil(high),
            hull_begin=hull.begin,
            hull_length=hull.length,
            start=_float32(hull.low - hull.begin),
            end=_float32(hull.high - hull.begin),
            resized=length,
            cut=(length - size) // 2,
        )
        for low, high, hull, length, size in zip((y_low, x_low), (y_high, x_high), hulls, resized, call.size)
    )
    return CropSampling(index, y, x, _is_vertical_first(y, x, call.pass_order))


class _Hull(NamedTuple):
    low: float  # what is sampled, in the image
    high: float
    begin: int
    length: int

    @classmethod
    def of(cls, low: float, high: float, longest: float | None) -> _Hull:
        if longest is not None:
            missing = longest - (high - low)
            before = math.floor(missing / 2)
            low, high = low - before, high + (missing - before)
        begin = math.floor(low)
        return cls(low, high, begin, math.ceil(high) - begin)


def _float32(value: float) -> float:
    return ctypes.c_float(value).value


def _is_vertical_first(y: AxisSampling, x: AxisSampling, pass_order: int) -> bool:
    shrinks = y.hull_length - y.resized
    if pass_order == PassOrder.VERTICAL_FIRST_IF_SHRUNK:
        return shrinks > 0 and shrinks > 2 * (x.hull_length - x.resized)
    if pass_order == PassOrder.VERTICAL_FIRST_IF_TALL:
        return shrinks > 0 and y.hull_length > 100 * x.hull_length
    return False


def dense_weights(axis: AxisSampling, size: int, call: CropCall) -> Tensor:
    """(size, length of the hull) float64: the weight of each pixel of the hull in each of the result; whole numbers of
    2^-22 for images that are rounded.
    """
    place = torch.arange(size, dtype=torch.float64, device=call.boxes.device) + axis.cut
    centre = (axis.start + (place + 0.5) * axis.scale)[:, None]
    radius = INTERPOLATIONS[call.interpolation]
    if call.antialias:
        weights = _antialiased(centre, max(axis.scale, 1.0), axis.hull_length, radius)
    else:
        weights = _interpolated(centre, axis.hull_length, radius)
    if not call.is_rounded:
        return weights
    scaled = weights * 2.0**WEIGHT_BITS
    return (scaled + torch.where(scaled < 0, -0.5, 0.5)).trunc()


def _antialiased(centre: Tensor, width: float, length: int, radius: int) -> Tensor:
    taps = torch.arange(length, dtype=torch.float64, device=centre.device)
    support = radius * width
    first = (centre - support + 0.5).trunc().clamp(min=0)
    end = (centre + support + 0.5).trunc().clamp(max=length)
    weights = _filter((taps - centre + 0.5) * (1.0 / width), radius, CUBIC[True])
    weights = torch.where((taps >= first) & (taps < end), weights, 0.0)
    return weights / weights.sum(1, keepdim=True)


def _interpolated(centre: Tensor, length: int, radius: int) -> Tensor:
    below = (centre - 0.5).floor()
    taps = below + torch.arange(1 - radius, radius + 1, dtype=torch.float64, device=centre.device)
    weights = _filter(taps - (centre - 0.5), radius, CUBIC[False])
    dense = torch.zeros(centre.shape[0], length, dtype=torch.float64, device=centre.device)
    return dense.scatter_add_(1, taps.long().clamp(0, length - 1), weights)


def _filter(x: Tensor, radius: int, a: float) -> Tensor:
    x = x.abs()
    if radius == 1:
        return torch.where(x < 1, 1 - x, 0.0)
    near, far = ((a + 2) * x - (a + 3)) * x * x + 1, (((x - 5) * x + 8) * x - 4) * a
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
