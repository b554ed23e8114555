"""torch's own `interpolate` on a CPU, for exact=False: its uint8 kernels keep 8 to 15 bits of a weight, so levels are
near Pillow's, at most 3 off.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .interface import CropCall, CropFeatures
from .sampling import CropSampling

try:
    import numpy as np

    from . import resized

    _PROBLEM = None
except ImportError as error:
    _PROBLEM = f"{error}; install it with: pip install numpy"


def unavailable_reasons() -> list[str]:
    return [] if _PROBLEM is None else [_PROBLEM]


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
    def resize(pixels: Tensor, box: CropSampling) -> np.ndarray:
        size = (box.y.resized, box.x.resized)
        # A call for both axes takes the horizontal pass first. The order matters: each pass clips what it overshoots.
        sizes = [(size[0], pixels.shape[2]), size] if box.vertical_first else [size]
        # Of planes with a side of one pixel torch mistakes the layout.
        by_pixel = pixels.stride(0) == 1 or 1 in (*pixels.shape[1:], *size)
        pixels = _contiguous(pixels, by_pixel) if call.is_rounded else pixels.float()
        for next_size in sizes:
            pixels = F.interpolate(
                pixels[None], next_size, mode=call.interpolation, antialias=call.antialias, align_corners=False
            )[0]
        return pixels.numpy()

    # uint8 kernels run in the thread that calls them, the others in all of torch's.
    return resized.crop_resize(call, resize, torch.get_num_threads() if call.is_rounded else 1)


def _contiguous(pixels: Tensor, by_pixel: bool) -> Tensor:
    """(C, H, W), stored pixel by pixel or channel by channel. Copied by numpy, which starts no threads."""
    if by_pixel:
        return torch.from_numpy(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())).permute(2, 0, 1)
    return torch.from_numpy(np.ascontiguousarray(pixels.numpy()))
