"""What the two backends that hand whole crops to a library's resize share: the loop over the boxes, and the cut.

They resize to the full length that `shortest_edge` asks for and cut from that. Where little of it is kept (a crop of
1 x 4000 pixels) that would take memory without bound, so such a crop is computed by the definition, which never holds
more than the cut.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from . import dense
from .interface import CropCall
from .sampling import Sampling, sample

_MOST_PIXELS = 2**24  # of a resized crop

# (pixels of the hull (C, H, W), size (height, width), sampling, box) -> levels (C, height, width)
Resize = Callable[[Tensor, tuple[int, int], Sampling, int], np.ndarray]


def crop_resize(call: CropCall, resize: Resize, num_threads: int) -> Tensor:
    """(K, C, height, width), normalised. `resize` is called by so many threads."""
    sampling = sample(call)
    result = torch.empty((call.boxes.shape[0], call.channels, *call.size))
    multiplier, offset = (
        np.array(values, dtype=np.float32)[:, None, None] for values in (call.multiplier, call.offset)
    )
    # The largest first, so that no thread is left with one at the end.
    sizes = (sampling.y.hull_length * sampling.x.hull_length).where(sampling.exists, 0)
    order = sizes.argsort(descending=True).tolist()

    def levels(box: int) -> np.ndarray:
        if not sampling.exists[box]:
            return np.array(call.fill, dtype=np.float32)[:, None, None]
        height, width = int(sampling.y.resized[box]), int(sampling.x.resized[box])
        if height * width > _MOST_PIXELS:
            return dense.levels(call, sampling, box).numpy()
        resized = resize(dense.crop(call, sampling, box), (height, width), sampling, box)
        top, left = int(sampling.y.cut[box]), int(sampling.x.cut[box])
        return resized[:, top : top + call.size[0], left : left + call.size[1]]

    def run(box: int) -> None:
        # By numpy: torch's own threads would be in the way of these.
        normalized = result[box].numpy()
        np.multiply(levels(box), multiplier, out=normalized)
        normalized += offset

    num_threads = min(num_threads, len(order))
    if num_threads > 1:
        with ThreadPoolExecutor(num_threads) as pool:  # a lasting one would not survive a fork
            list(pool.map(run, order))
    else:
        for box in order:
            run(box)
    return result.to(call.dtype)
