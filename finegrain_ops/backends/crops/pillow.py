"""Pillow itself, on a CPU: what all the others equal. The boxes are dealt out to torch.get_num_threads() threads, since
Pillow resizes without the interpreter's lock.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

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
    if INSTALLED_PILLOW is not None and PassOrder.of_pillow(INSTALLED_PILLOW) != features.pass_order:
        installed = ".".join(map(str, INSTALLED_PILLOW))
        reasons.append(f"Pillow {installed} is installed, whose passes come in another order than the one's asked for")
    return reasons


def crop_resize(call: CropCall) -> Tensor:
    sampling = sample(call)
    result = torch.empty((call.boxes.shape[0], call.channels, *call.size))
    multiplier, offset = resized.multiplier_and_offset(call)
    # The largest first, so that no thread is left with one at the end.
    sizes = (sampling.y.hull_length * sampling.x.hull_length).where(sampling.exists, 0)
    boxes = sizes.argsort(descending=True)[: int(sampling.exists.sum())].tolist()
    if len(boxes) < len(result):
        result[~sampling.exists] = torch.tensor(call.fill)[:, None, None] * multiplier + offset

    def run(box: int) -> None:
        # numpy, unlike torch, starts no threads of its own here.
        normalized = result[box].numpy()
        np.multiply(_levels(call, sampling, box), multiplier.numpy(), out=normalized)
        normalized += offset.numpy()

    num_threads = min(torch.get_num_threads(), len(boxes))
    if num_threads > 1:
        with ThreadPoolExecutor(num_threads) as pool:  # a lasting one would not survive a fork
            list(pool.map(run, boxes))
    else:
        for box in boxes:
            run(box)
    return result.to(call.dtype)


def _levels(call: CropCall, sampling: Sampling, box: int) -> np.ndarray:
    """(C, height, width), before rescaling and normalising."""
    if resized.is_excessive(sampling, box):
        return dense.levels(call, sampling, box).numpy()
    y, x = sampling.y, sampling.x
    size = (int(x.resized[box]), int(y.resized[box]))
    interval = (float(x.start[box]), float(y.start[box]), float(x.end[box]), float(y.end[box]))
    images = _open(dense.crop(call, sampling, box))
    arrays = [np.asarray(image.resize(size, _FILTERS[call.interpolation], box=interval)) for image in images]
    levels = arrays[0].transpose(2, 0, 1) if arrays[0].ndim == 3 else np.stack(arrays)
    return resized.cut(levels, sampling, box, call)


def _open(pixels: Tensor) -> list[Image.Image]:
    """(C, H, W) as one image in mode "RGB", or as one in "L" or "F" for each channel."""
    if pixels.dtype != torch.uint8:
        return [Image.fromarray(plane) for plane in pixels.float().contiguous().numpy()]
    channels, height, width = pixels.shape
    row_stride = pixels.stride(1)
    if channels == 3 and pixels.stride(0) == 1 and pixels.stride(2) == 3 and row_stride >= 3 * width:
        # Pillow reads the rows where they lie.
        rows = pixels.permute(1, 2, 0).as_strided(((height - 1) * row_stride + 3 * width,), (1,)).numpy()
        return [Image.frombuffer("RGB", (width, height), rows, "raw", "RGB", row_stride, 1)]
    planes = [Image.fromarray(plane) for plane in pixels.contiguous().numpy()]
    return [Image.merge("RGB", planes)] if channels == 3 else planes
