"""What the two backends that hand whole crops to a library's resize share: the loop around it, and the cut.

They resize to the full length that `shortest_edge` asks for and cut from that. Where little of it is kept (a crop of
1 x 4000 pixels) that would take memory without bound, so such a crop is computed by the definition, which never holds
more than the cut.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

from .interface import CropCall
from .sampling import Sampling

_Levels = TypeVar("_Levels", bound=Any)  # a tensor or an array
_MOST_PIXELS = 2**24  # of a resized crop


def is_excessive(sampling: Sampling, box: int) -> bool:
    return int(sampling.y.resized[box]) * int(sampling.x.resized[box]) > _MOST_PIXELS


def cut(levels: _Levels, sampling: Sampling, box: int, call: CropCall) -> _Levels:
    """What is kept of a resized crop (..., H, W)."""
    top, left = int(sampling.y.cut[box]), int(sampling.x.cut[box])
    return levels[..., top : top + call.size[0], left : left + call.size[1]]


def pixels_of_boxes(sampling: Sampling) -> dict[int, int]:
    """For each image that boxes lie in, how many pixels these have together."""
    height, width = (axis.pixels_end - axis.pixels_begin for axis in (sampling.y, sampling.x))
    counts: dict[int, int] = {}
    for index, count in zip(sampling.index[sampling.exists].tolist(), (height * width)[sampling.exists].tolist()):
        counts[index] = counts.get(index, 0) + count
    return counts


def multiplier_and_offset(call: CropCall) -> tuple[Tensor, Tensor]:
    """(C, 1, 1) each, in float32."""
    multiplier, offset = (
        torch.tensor(values, dtype=torch.float64).float()[:, None, None] for values in (call.multiplier, call.offset)
    )
    return multiplier, offset
