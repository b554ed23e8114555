"""torch's own `interpolate` on a CPU, for exact=False: its uint8 kernels keep 8 to 15 bits of a weight, so levels are
near Pillow's, at most 3 off.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dense, resized
from .interface import CropCall, CropFeatures
from .sampling import Sampling, sample


def unavailable_reasons() -> list[str]:
    return []


def not_supported_reasons(features: CropFeatures) -> list[str]:
    reasons = []
    if features.exact:
        reasons.append("its levels are up to 3 off Pillow's; pass exact=False to allow that")
    elif not features.has_integer_boxes:
        reasons.append("a box has a fractional edge, which interpolate cannot sample")
    if features.device_type != "cpu":
        reasons.append(f"images are on {features.device_type}; interpolate takes uint8 images on the CPU only")
    return reasons


def crop_resize(call: CropCall) -> Tensor:
    sampling = sample(call)
    result = torch.empty((call.boxes.shape[0], call.channels, *call.size))
    call = _with_neighbouring_channels(call, sampling)
    multiplier, offset = resized.multiplier_and_offset(call)
    for box, exists in enumerate(sampling.exists.tolist()):
        result[box] = _levels(call, sampling, box) if exists else torch.tensor(call.fill)[:, None, None]
    return result.mul_(multiplier).add_(offset).to(call.dtype)


def _with_neighbouring_channels(call: CropCall, sampling: Sampling) -> CropCall:
    """Images whose pixels the boxes cover more than once are rearranged as a whole, for uint8 kernels are fast where
    channels lie next to each other.
    """
    if not call.is_rounded or call.channels == 1:
        return call
    images = list(call.images)
    for index, count in resized.pixels_of_boxes(sampling).items():
        if count >= images[index][0].numel():
            images[index] = images[index][None].contiguous(memory_format=torch.channels_last)[0]
    return dataclasses.replace(call, images=images)


def _levels(call: CropCall, sampling: Sampling, box: int) -> Tensor:
    """(C, height, width), before rescaling and normalising."""
    if resized.is_excessive(sampling, box):
        return dense.levels(call, sampling, box)
    pixels = dense.crop(call, sampling, box)[None]
    if not call.is_rounded:
        pixels = pixels.float()
    elif call.channels == 3 and pixels.stride(1) != 1:
        pixels = pixels.contiguous(memory_format=torch.channels_last)
    size = (int(sampling.y.resized[box]), int(sampling.x.resized[box]))
    # A call for both axes takes the horizontal pass first; the order matters, since each pass clips what it overshoots.
    sizes = [(size[0], pixels.shape[3]), size] if sampling.vertical_first[box] else [size]
    for height_and_width in sizes:
        pixels = F.interpolate(
            pixels, height_and_width, mode=call.interpolation, antialias=call.antialias, align_corners=False
        )
    return resized.cut(pixels[0], sampling, box, call)
