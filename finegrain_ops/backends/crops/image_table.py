"""Where a list of images lies, as a table on their device that kernels read: made once, and then remembered."""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor

COLUMNS = ("address", "channel_stride", "row_stride", "column_stride", "height", "width")  # strides in elements
_MOST_TABLES = 64  # that are remembered


@dataclass
class _Table:
    tensor: Tensor
    stream: torch.cuda.Stream | None = None  # on a CUDA device: the one that fills it, and when it has
    ready: torch.cuda.Event | None = None
    is_captured: bool = False  # a CUDA graph reads it whenever it is replayed: never freed


_tables: OrderedDict[tuple, _Table] = OrderedDict()  # the last used at the end
_lock = threading.Lock()


def image_table(images: list[Tensor]) -> Tensor:
    """(N, 6) int64 on the images' device, a row of COLUMNS for each (C, H, W).

    The host does not wait: the current stream does, where another one fills the table. What is remembered are numbers,
    not images; the caller keeps these.

    Raises:
        RuntimeError: the current stream is being captured into a CUDA graph, and there is no table of these images yet.
    """
    device = images[0].device
    rows = tuple((image.data_ptr(), *image.stride(), *image.shape[1:]) for image in images)
    with _lock, torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        is_capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        table = _tables.get((device, rows))
        if table is None:
            if is_capturing:
                raise RuntimeError(
                    "images: expected a list whose addresses are already on the device while a CUDA graph is being "
                    "captured, got one that no call has had before; run the call once with these images, then capture "
                    "it"
                )
            table = _tables[device, rows] = _filled(rows, device)
            for key in [key for key, old in _tables.items() if not old.is_captured][:-_MOST_TABLES]:
                del _tables[key]
        _tables.move_to_end((device, rows))
        if is_capturing:
            table.is_captured = True  # torch.cuda.graph has waited for the device before: the table is filled
        elif table.ready is not None and table.stream != (stream := torch.cuda.current_stream()):
            stream.wait_event(table.ready)
            table.tensor.record_stream(stream)
        return table.tensor


def _filled(rows: tuple[tuple[int, ...], ...], device: torch.device) -> _Table:
    if device.type != "cuda":
        return _Table(torch.tensor(rows, dtype=torch.int64, device=device))
    # Pinned, so that the host need not wait for the copy; torch frees such memory when the copy is over.
    tensor = torch.tensor(rows, dtype=torch.int64).pin_memory().to(device, non_blocking=True)
    stream = torch.cuda.current_stream()
    return _Table(tensor, stream, stream.record_event())
