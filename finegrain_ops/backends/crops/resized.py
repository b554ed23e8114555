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
from .sampling import CropSampling, sample

_MOST_PIXELS = 2**24  # of a resized crop

# (pixels of the hull (C, H, W), the box) -> levels (C, height, width), as large as the whole crop becomes
Resize = Callable[[Tensor, CropSampling], np.ndarray]


def crop_resize(call: CropCall, resize: Resize, num_threads: int) -> Tensor:
    """(K, C, height, width), normalised. `resize` is called by so many threads."""
    result = torch.empty((call.boxes.shape[0], call.channels, *call.size))
    multiplier, offset = (
        np.array(values, dtype=np.float32)[:, None, None] for values in (call.multiplier, call.offset)
    )

    # The largest first, so that no thread is left with one at the end.
    boxes = sorted(zip(sample(call), result.numpy()), key=lambda box: _pixels(box[0]), reverse=True)
    remaining = iter(boxes)  # a list's, from which threads may take turns

    def work() -> None:
        for box, normalized in remaining:
            # By numpy: torch's own threads would be in the way of these.
            np.multiply(_levels(call, box, resize), multiplier, out=normalized)
            normalized += offset

    helpers = min(num_threads, len(boxes)) - 1
    if helpers > 0:
        with ThreadPoolExecutor(helpers) as pool:  # a lasting one would not survive a fork
            futures = [pool.submit(work) for _ in range(helpers)]
            work()
            for future in futures:
                future.result()  # raises what it has raised
    else:
        work()
    return result.to(call.dtype)


def _pixels(box: CropSampling | None) -> int:
    return 0 if box is None else box.y.hull_length * box.x.hull_length


def _levels(call: CropCall, box: CropSampling | None, resize: Resize) -> np.ndarray:
    """(C, height, width), before rescaling and normalising."""
    if box is None:
        return np.array(call.fill, dtype=np.float32)[:, None, None]
    if box.y.resized * box.x.resized > _MOST_PIXELS:
        return dense.levels(call, box).numpy()
    top, left = box.y.cut, box.x.cut
    return resize(dense.crop(call, box), box)[:, top : top + call.size[0], left : left + call.size[1]]
