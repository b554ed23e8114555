"""What a kernel is given: csrc/arguments.cuh, field by field.

An instance holds on to the tensors it points to, which must live until the kernel is launched.
"""

from __future__ import annotations

import ctypes
from typing import Any, ClassVar

import torch
from torch import Tensor


class Rows(ctypes.Structure):
    """(batch, heads, rows, columns); strides in elements, that of the columns is 1."""

    _fields_: ClassVar = [
        ("data", ctypes.c_void_p),
        ("batch_stride", ctypes.c_longlong),
        ("head_stride", ctypes.c_longlong),
        ("row_stride", ctypes.c_longlong),
    ]


class _Arguments(ctypes.Structure):
    tensors: dict[str, Tensor]

    def __init__(self, **numbers: Any) -> None:
        super().__init__(**numbers)
        self.tensors = {}

    def point(self, name: str, tensor: Tensor | None) -> None:
        """Sets a plain pointer."""
        if tensor is not None:
            self.tensors[name] = tensor
            setattr(self, name, tensor.data_ptr())

    def view(self, name: str, tensor: Tensor | None, batch: int | None, head: int | None, row: int) -> None:
        """Sets Rows, from the dimensions of `tensor` that count batch entries, heads (None: it has none) and rows. A
        dimension of size 1 is shared by all.
        """
        if tensor is None:
            return
        self.tensors[name] = tensor
        shape, strides = tensor.shape, tensor.stride()
        rows = Rows(
            tensor.data_ptr(),
            0 if batch is None or shape[batch] == 1 else strides[batch],
            0 if head is None or shape[head] == 1 else strides[head],
            0 if shape[row] == 1 else strides[row],
        )
        setattr(self, name, rows)


class AttentionArguments(_Arguments):
    _fields_: ClassVar = [
        *((name, Rows) for name in ("query", "key", "value", "bias", "padding", "gate")),
        ("cu_seqlens_q", ctypes.c_void_p),
        ("cu_seqlens_k", ctypes.c_void_p),
        ("output", Rows),
        ("lse", Rows),
        ("output_split_stride", ctypes.c_longlong),
        ("lse_split_stride", ctypes.c_longlong),
        *((name, Rows) for name in ("grad_output", "delta", "grad_query", "grad_key", "grad_value", "grad_bias")),
        ("row_mask", Rows),
        ("head_mask", ctypes.c_void_p),
        ("map", Rows),
        *(
            (name, ctypes.c_int)
            for name in (
                "batch",
                "heads",
                "kv_heads",
                "num_queries",
                "num_keys",
                "head_dim",
                "value_dim",
                "is_causal",
                "fold_heads",
                "num_splits",
                "blocks",
                "aligned",
            )
        ),
        ("scale", ctypes.c_float),
        ("reserved", ctypes.c_int),
    ]


class MergeArguments(_Arguments):
    _fields_: ClassVar = [
        ("partial_output", ctypes.c_void_p),
        ("partial_lse", ctypes.c_void_p),
        ("output", Rows),
        ("lse", ctypes.c_void_p),
        *((name, ctypes.c_int) for name in ("batch", "heads", "num_queries", "value_dim", "num_splits", "reserved")),
    ]


# One of the CropRecords that crop_weights leaves for crop_resize; nothing of it is known on the host but its size.
CROP_RECORD_BYTES = 64


class CropArguments(_Arguments):
    _fields_: ClassVar = [
        *((name, ctypes.c_void_p) for name in ("boxes", "image_index", "image_table", "images")),
        *((name, ctypes.c_longlong) for name in ("image_stride", "channel_stride", "row_stride", "column_stride")),
        *((name, ctypes.c_void_p) for name in ("records", "taps", "weights", "result")),
        *(
            (name, ctypes.c_int)
            for name in (
                "num_images",
                "image_height",
                "image_width",
                "channels",
                "height",
                "width",
                "row_taps",
                "column_taps",
                "first_box",
                "radius",
                "antialias",
                "is_padded",
                "shortest_edge",
                "pass_order",
                "is_rounded",
                "result_type",
            )
        ),
        *((name, ctypes.c_float * 3) for name in ("fill", "multiplier", "offset")),
        ("reserved", ctypes.c_int),
    ]


def is_aligned(tensors: list[Tensor], columns: list[int]) -> bool:
    """Whether every row of `tensors` begins at a multiple of 16 bytes, and rows of so many columns end at one: then
    they are read and written 16 bytes at a time.
    """
    size = tensors[0].element_size()
    return all(count * size % 16 == 0 for count in columns) and all(
        tensor.data_ptr() % 16 == 0
        and all(stride * size % 16 == 0 for stride, length in zip(tensor.stride()[:-1], tensor.shape) if length > 1)
        for tensor in tensors
    )


def with_unit_stride(tensor: Tensor) -> Tensor:
    """`tensor` itself where its columns lie next to each other, otherwise a copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def as_bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.view(torch.uint8)
