"""The definition of `crop_resize` for one box, as two dense matrix products in float64, on any device.

Whole numbers below 2^53 are exact in float64, so for uint8 images this is Pillow's integer arithmetic to the bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .interface import CropCall
from .sampling import WEIGHT_BITS, CropSampling, dense_weights

_LARGEST_CHUNK = 2**24  # elements in float64 at a time


def crop(call: CropCall, sampling: CropSampling) -> Tensor:
    """The pixels of the hull, (C, H, W), in the image's dtype; a view of the image where nothing is letterboxed."""
    y, x = sampling.y, sampling.x
    pixels = call.images[sampling.image][:, y.pixels_begin : y.pixels_end, x.pixels_begin : x.pixels_end]
    if not call.is_padded:
        return pixels
    fill = torch.tensor(call.fill, dtype=torch.float64).to(pixels)
    hull = fill[:, None, None].expand(-1, y.hull_length, x.hull_length).contiguous()
    top, left = y.pixels_begin - y.hull_begin, x.pixels_begin - x.hull_begin
    hull[:, top : top + pixels.shape[1], left : left + pixels.shape[2]] = pixels
    return hull


def levels(call: CropCall, sampling: CropSampling) -> Tensor:
    """(C, height, width), before rescaling and normalising: uint8, or float32 where levels are not rounded."""
    pixels = crop(call, sampling)
    passes = [(sampling.x, 2, call.size[1]), (sampling.y, 1, call.size[0])]
    for axis, dim, size in reversed(passes) if sampling.vertical_first else passes:
        pixels = _resample(pixels, dense_weights(axis, size, call), dim, call.is_rounded)
    return pixels


def _resample(pixels: Tensor, weights: Tensor, dim: int, is_rounded: bool) -> Tensor:
    """One pass along `dim`, 1 or 2, of (C, H, W)."""
    other = 3 - dim
    chunk = max(1, _LARGEST_CHUNK // (pixels.shape[0] * pixels.shape[dim]))
    results = []
    for part in pixels.split(chunk, dim=other):
        sums = part.double() @ weights.T if dim == 2 else weights @ part.double()
        if is_rounded:
            rounded = ((sums + 2.0 ** (WEIGHT_BITS - 1)) * 2.0**-WEIGHT_BITS).floor()
            results.append(rounded.clamp(0, 255).to(torch.uint8))
        else:
            results.append(sums.float())
    return torch.cat(results, dim=other)
