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

from dataclasses import dataclass

import torch
from torch import Tensor

from .interface import INTERPOLATIONS, CropCall, PassOrder

WEIGHT_BITS = 22
CUBIC = {True: -0.5, False: -0.75}  # the parameter of the bicubic filter with and without antialiasing


@dataclass(frozen=True)
class AxisSampling:
    """Along one axis, for K boxes, (K,) each: int64, and float64 for start, end and scale."""

    pixels_begin: Tensor  # of the crop, in the image
    pixels_end: Tensor
    hull_begin: Tensor
    hull_length: Tensor
    start: Tensor
    end: Tensor
    scale: Tensor
    resized: Tensor  # S
    cut: Tensor  # where the result begins in the resized crop


@dataclass(frozen=True)
class Sampling:
    exists: Tensor  # (K,) bool: the box has area, and its image exists; of the others nothing else is meant
    index: Tensor  # (K,) int64, of the image
    y: AxisSampling
    x: AxisSampling
    vertical_first: Tensor  # (K,) bool


def sample(call: CropCall) -> Sampling:
    index = call.image_index
    if index is None:
        index = torch.arange(call.boxes.shape[0], device=call.boxes.device)
        index = index if call.num_images > 1 else torch.zeros_like(index)
    exists = (index >= 0) & (index < call.num_images)
    index = index.clamp(0, call.num_images - 1)
    sizes = torch.tensor(call.image_sizes, dtype=torch.float64, device=call.boxes.device)[index]

    x0, y0, x1, y1 = call.boxes.unbind(1)
    ends = [(y0.clamp(min=0), y1.minimum(sizes[:, 0])), (x0.clamp(min=0), x1.minimum(sizes[:, 1]))]
    exists = exists & (ends[0][0] < ends[0][1]) & (ends[1][0] < ends[1][1])
    # Boxes that do not exist are replaced by one that does, so that no NaN becomes an integer.
    ends = [(torch.where(exists, low, 0.0), torch.where(exists, high, 1.0)) for low, high in ends]
    lengths = [high - low for low, high in ends]
    longest = torch.maximum(*lengths)

    hulls = []
    for (low, high), length in zip(ends, lengths):
        before = ((longest - length) / 2).floor() if call.is_padded else torch.zeros_like(low)
        after = longest - length - before if call.is_padded else before
        begin = (low - before).floor()
        hulls.append((low - before, high + after, begin, (high + after).ceil() - begin))

    resized = _resized_lengths(call, [hull[3] for hull in hulls])
    axes = []
    for (low, high), (start, end, begin, length), new_length, size in zip(ends, hulls, resized, call.size):
        float32_start, float32_end = (start - begin).float(), (end - begin).float()
        axes.append(
            AxisSampling(
                pixels_begin=low.floor().long(),
                pixels_end=high.ceil().long(),
                hull_begin=begin.long(),
                hull_length=length.long(),
                start=float32_start.double(),
                end=float32_end.double(),
                scale=(float32_end - float32_start).double() / new_length,
                resized=new_length.long(),
                cut=(new_length.long() - size) // 2,
            )
        )
    return Sampling(exists, index, axes[0], axes[1], _vertical_first(axes[0], axes[1], call.pass_order))


def _vertical_first(y: AxisSampling, x: AxisSampling, pass_order: int) -> Tensor:
    is_shrunk = y.hull_length > y.resized
    if pass_order == PassOrder.VERTICAL_FIRST_IF_SHRUNK:
        return is_shrunk & (y.hull_length - y.resized > 2 * (x.hull_length - x.resized))
    if pass_order == PassOrder.VERTICAL_FIRST_IF_TALL:
        return is_shrunk & (y.hull_length > 100 * x.hull_length)
    return torch.zeros_like(is_shrunk)


def _resized_lengths(call: CropCall, lengths: list[Tensor]) -> list[Tensor]:
    """To what length each axis is resized: `size`, or by image processors' rule for the shortest edge."""
    if call.shortest_edge is None:
        return [torch.full_like(length, size) for length, size in zip(lengths, call.size)]
    shortest = torch.minimum(*lengths)
    return [(call.shortest_edge * length / shortest).floor() for length in lengths]


def dense_weights(axis: AxisSampling, box: int, size: int, call: CropCall) -> Tensor:
    """(size, length of the hull) float64: the weight of each pixel of the hull in each of the result; whole numbers of
    2^-22 for images that are rounded.
    """
    length, scale = int(axis.hull_length[box]), axis.scale[box]
    place = torch.arange(size, dtype=torch.float64, device=scale.device) + axis.cut[box]
    centre = (axis.start[box] + (place + 0.5) * scale)[:, None]
    radius = INTERPOLATIONS[call.interpolation]
    if call.antialias:
        weights = _antialiased(centre, scale.clamp(min=1.0), length, radius)
    else:
        weights = _interpolated(centre, length, radius)
    if not call.is_rounded:
        return weights
    scaled = weights * 2.0**WEIGHT_BITS
    return (scaled + torch.where(scaled < 0, -0.5, 0.5)).trunc()


def _antialiased(centre: Tensor, width: Tensor, length: int, radius: int) -> Tensor:
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
