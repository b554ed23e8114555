"""The definition itself, on any device: what every other backend is compared with. On a GPU it waits for the boxes."""

from __future__ import annotations

import torch
from torch import Tensor

from . import dense
from .interface import CropCall, CropFeatures
from .sampling import sample


def unavailable_reasons() -> list[str]:
    return []


def not_supported_reasons(features: CropFeatures) -> list[str]:
    return []


def crop_resize(call: CropCall) -> Tensor:
    result = call.new_result()
    multiplier, offset, fill = (
        torch.tensor(values, dtype=torch.float64, device=result.device)[:, None, None]
        for values in (call.multiplier, call.offset, call.fill)
    )
    for box, sampling in enumerate(sample(call)):
        levels = fill if sampling is None else dense.levels(call, sampling)
        result[box] = levels.double() * multiplier + offset
    return result
