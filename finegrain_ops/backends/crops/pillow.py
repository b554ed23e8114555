"""Pillow itself, on a CPU: what all the others equal. The boxes are dealt out to torch.get_num_threads() threads, since
Pillow resizes without the interpreter's lock.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .interface import INSTALLED_PILLOW, CropCall, CropFeatures, PassOrder
from .sampling import CropSampling

try:
    import numpy as np
    from PIL import Image

    from . import resized

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
    def resize(pixels: Tensor, box: CropSampling) -> np.ndarray:
        size, interval = (box.x.resized, box.y.resized), (box.x.start, box.y.start, box.x.end, box.y.end)
        images = [image.resize(size, _FILTERS[call.interpolation], box=interval) for image in _open(pixels)]
        arrays = [np.asarray(image) for image in images]
        return arrays[0].transpose(2, 0, 1) if arrays[0].ndim == 3 else np.stack(arrays)

    return resized.crop_resize(call, resize, torch.get_num_threads())


def _open(pixels: Tensor) -> list[Image.Image]:
    """(C, H, W) as one image in mode "RGB", or as one in "L" or "F" for each channel."""
    if pixels.dtype != torch.uint8:
        return [Image.fromarray(np.ascontiguousarray(plane)) for plane in pixels.float().numpy()]
    channels, height, width = pixels.shape
    row_stride = pixels.stride(1)
    if channels == 3 and pixels.stride(0) == 1 and pixels.stride(2) == 3 and row_stride >= 3 * width:
        # Pillow reads the rows where they lie.
        rows = pixels.permute(1, 2, 0).as_strided(((height - 1) * row_stride + 3 * width,), (1,)).numpy()
        return [Image.frombuffer("RGB", (width, height), rows, "raw", "RGB", row_stride, 1)]
    planes = [Image.fromarray(np.ascontiguousarray(plane)) for plane in pixels.numpy()]
    return [Image.merge("RGB", planes)] if channels == 3 else planes
