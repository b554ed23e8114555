"""Pillow itself, on a CPU: what all the others equal. The boxes are dealt out to torch.get_num_threads() threads, since
Pillow resizes without the interpreter's lock.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from . import dense, resized
from .interface import INSTALLED_PILLOW, CropCall, CropFeatures, PassOrder
from .sampling import Sampling, sample

try:
    import numpy as np
    from PIL import Image

    _FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
    _PROBLEM = None
except ImportError as error:
    _PROBLEM = f"{error}; install both with: pip install pillow numpy"


def unavailable_reasons() -> list[str]:
    return [] if _PROBLEM is None else [_PROBLEM]


def not_supported_reasons(features: CropFeatures) -> list[str]:
    reasons = []
    if features.device_type != "cpu":
        reasons.append(f"images are on {features.device_type}; Pillow runs on the CPU")
    if not features.antialias:
        reasons.append("Pillow always antialiases; pass antialias=True")
    if INSTALLED_PILLOW is not None and PassOrder.of_pillow(INSTALLED_PILLOW) != features.vertical_first:
        installed = ".".join(map(str, INSTALLED_PILLOW))
        reasons.append(f"Pillow {installed} is installed, whose passes come in another order than the one's asked for")
    return reasons


def crop_resize(call: CropCall) -> Tensor:
    sampling = sample(call)
    result = torch.empty((call.boxes.shape[0], call.channels, *call.size))
    multiplier, offset = resized.multiplier_and_offset(call)
    boxes = sampling.exists.nonzero().flatten().tolist()
    if len(boxes) < len(result):
        result[~sampling.exists] = torch.tensor(call.fill)[:, None, None] * multiplier + offset
    sources = _Sources(call, sampling)

    def run(box: int) -> None:
        for channel, plane in enumerate(_levels(call, sampling, box, sources)):
            # While the plane is in the cache; and numpy, unlike torch, starts no threads of its own here.
            normalized = result[box, channel].numpy()
            np.multiply(plane, np.float32(call.multiplier[channel]), out=normalized)
            normalized += np.float32(call.offset[channel])

    num_threads = min(torch.get_num_threads(), len(boxes))
    if num_threads > 1:
        with ThreadPoolExecutor(num_threads) as pool:  # a lasting one would not survive a fork
            list(pool.map(run, boxes))
    else:
        for box in boxes:
            run(box)
    return result.to(call.dtype)


class _Sources:
    """Pillow's images of the call's: of a whole image where that has fewer pixels than its boxes together, otherwise
    of each crop on its own.
    """

    def __init__(self, call: CropCall, sampling: Sampling) -> None:
        self.call, self.sampling = call, sampling
        self.whole = {
            index: _open(call.images[index])
            for index, count in resized.pixels_of_boxes(sampling).items()
            if count >= call.images[index][0].numel()
        }

    def hull(self, box: int) -> list[Image.Image]:
        """The crop, letterboxed if it is to be: one image in RGB, or one for each channel."""
        index, y, x = int(self.sampling.index[box]), self.sampling.y, self.sampling.x
        left, top, right, bottom = (
            int(edge[box]) for edge in (x.pixels_begin, y.pixels_begin, x.pixels_end, y.pixels_end)
        )
        if index in self.whole:
            images = [image.crop((left, top, right, bottom)) for image in self.whole[index]]
        else:
            images = _open(self.call.images[index][:, top:bottom, left:right])
        if not self.call.is_padded:
            return images
        size = (int(x.hull_length[box]), int(y.hull_length[box]))
        fill: list[Any] = [int(level) for level in self.call.fill] if self.call.is_rounded else list(self.call.fill)
        canvases = []
        for image, color in zip(images, fill if len(images) == len(fill) else [tuple(fill)]):
            canvas = Image.new(image.mode, size, color)
            canvas.paste(image, (left - int(x.hull_begin[box]), top - int(y.hull_begin[box])))
            canvases.append(canvas)
        return canvases


def _open(pixels: Tensor) -> list[Image.Image]:
    """(C, H, W) as one image in mode "RGB", or as one in "L" or "F" for each channel."""
    if pixels.dtype != torch.uint8:
        pixels = pixels.float()
    elif pixels.shape[0] == 3 and pixels.stride(0) == 1:
        return [Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))]
    planes = [Image.fromarray(np.ascontiguousarray(plane.numpy())) for plane in pixels]
    return [Image.merge("RGB", planes)] if pixels.dtype == torch.uint8 and len(planes) == 3 else planes


def _levels(call: CropCall, sampling: Sampling, box: int, sources: _Sources) -> Sequence[np.ndarray]:
    """(C, height, width), before rescaling and normalising."""
    if resized.is_excessive(sampling, box):
        return list(dense.levels(call, sampling, box).numpy())
    y, x = sampling.y, sampling.x
    size = (int(x.resized[box]), int(y.resized[box]))
    interval = (float(x.start[box]), float(y.start[box]), float(x.end[box]), float(y.end[box]))
    planes: list[np.ndarray] = []
    for image in sources.hull(box):
        levels = np.asarray(image.resize(size, _FILTERS[call.interpolation], box=interval))
        planes.extend([levels] if levels.ndim == 2 else levels.transpose(2, 0, 1))
    return [resized.cut(plane, sampling, box, call) for plane in planes]
