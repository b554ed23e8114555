"""Checks of arguments: every message says which argument, what was expected, what came and what to do.

Shapes and dtypes are always checked. Values are checked where that needs no device synchronisation: Python numbers
and CPU tensors always, tensors on a device when FINEGRAIN_CHECK=1 is set in the environment.
"""

from __future__ import annotations

import math
import numbers
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .geometry import Box, clip_box

_LARGEST = sys.float_info.max

FLOATING_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def describe(value: object) -> str:
    """What came: a tensor by shape and dtype, anything else by type and value."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and dtype {value.dtype}"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 80 else text[:77] + '...'}"


def require_tensor(value: object, name: str, expected: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected {expected}, got {describe(value)}")
    return value


def require_shape(tensor: Tensor, name: str, shapes: Sequence[tuple[int, ...]], meaning: str) -> None:
    """One of `shapes`, which `meaning` spells out in symbols."""
    if not any(tuple(tensor.shape) == shape for shape in shapes):
        options = " or ".join(str(shape) for shape in shapes)
        raise ValueError(f"{name}: expected shape {meaning}, here {options}, got {tuple(tensor.shape)}")


def require_same_device(tensor: Tensor, name: str, query: Tensor) -> None:
    if tensor.device != query.device:
        raise ValueError(
            f"{name}: expected a tensor on query's device {query.device}, got one on {tensor.device}; "
            f"move it there with {name}.to(query.device)"
        )


def require_bool(value: object, name: str) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {describe(value)}")
    return value


def require_number(value: object, name: str, *, minimum: float = -math.inf, what: str = "a finite number") -> float:
    """A finite Python (or numpy) number, at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected {what}, got {describe(value)}")
    number = float(value)
    if not max(minimum, -_LARGEST) <= number <= _LARGEST:  # NaN fails; torch.compile can trace it
        raise ValueError(f"{name}: expected {what}, got {number}")
    return number


def require_length(value: object, name: str) -> int:
    """A Python (or numpy) integer, at least 0."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}: expected an integer, got {describe(value)}; a tensor would have to be waited for")
    length = int(value)
    if length < 0:
        raise ValueError(f"{name}: expected an integer >= 0, got {length}")
    return length


def require_mask(mask: Tensor, name: str, query: Tensor, shapes: Sequence[tuple[int, ...]], meaning: str) -> Tensor:
    """A bool tensor on query's device of one of `shapes`, which `meaning` spells out in symbols."""
    require_tensor(mask, name, f"a bool tensor {meaning}")
    if mask.dtype != torch.bool:
        raise TypeError(f"{name}: expected torch.bool, got {mask.dtype}; convert it with {name}.bool()")
    require_shape(mask, name, shapes, meaning)
    require_same_device(mask, name, query)
    return mask


def values_are_checked(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" or os.environ.get("FINEGRAIN_CHECK") == "1"


def require_values(tensor: Tensor, name: str, minimum: float, maximum: float, expected: str) -> Tensor:
    """`tensor`, whose values lie in [minimum, maximum]; NaN never does. Unchecked on a device without
    FINEGRAIN_CHECK=1.
    """
    if tensor.is_floating_point() and tensor.numel() and values_are_checked(tensor):
        if torch.compiler.is_compiling():
            return torch.ops.finegrain_ops.require_values(tensor, name, minimum, maximum, expected)
        _check_values(tensor, name, minimum, maximum, expected)
    return tensor


def _check_values(tensor: Tensor, name: str, minimum: float, maximum: float, expected: str) -> None:
    low, high = (float(bound) for bound in torch.aminmax(tensor.detach()))
    if not (minimum <= low and high <= maximum):  # NaN fails both
        raise ValueError(f"{name}: expected {expected}, got values from {low} to {high}")


def require_cu_seqlens(cu_seqlens: Tensor, name: str, query: Tensor, total: int, max_seqlen: int) -> Tensor:
    """`cu_seqlens_q` or `cu_seqlens_k` as contiguous int32. Its values, where they are checked: 0 first, never
    decreasing, `total` last, no difference above `max_seqlen`.
    """
    require_tensor(cu_seqlens, name, "an int32 tensor (num_seqs + 1,)")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"{name}: expected torch.int32 (or int64), got {cu_seqlens.dtype}; convert it with {name}.int()"
        )
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(
            f"{name}: expected shape (num_seqs + 1,), the cumulative lengths with a 0 before them, got "
            f"{tuple(cu_seqlens.shape)}"
        )
    require_same_device(cu_seqlens, name, query)
    if values_are_checked(cu_seqlens):
        if torch.compiler.is_compiling():
            cu_seqlens = torch.ops.finegrain_ops.require_cu_seqlens(cu_seqlens, name, total, max_seqlen)
        else:
            _check_cu_seqlens(cu_seqlens, name, total, max_seqlen)
    return cu_seqlens.to(torch.int32).contiguous()


def _check_cu_seqlens(cu_seqlens: Tensor, name: str, total: int, max_seqlen: int) -> None:
    packed, longest = {"cu_seqlens_q": ("query", "max_seqlen_q"), "cu_seqlens_k": ("key", "max_seqlen_k")}[name]
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if first != 0:
        raise ValueError(
            f"{name}: expected the first value to be 0, got {first}; put a 0 before the cumulative lengths"
        )
    if cu_seqlens.shape[0] > 1:
        shortest, largest = (int(bound) for bound in torch.aminmax(cu_seqlens.diff()))
        if shortest < 0:
            raise ValueError(f"{name}: expected values that never decrease, got one that is {-shortest} below the last")
        if largest > max_seqlen:
            raise ValueError(
                f"{name}: expected no length above {longest} = {max_seqlen}, got one of {largest}; pass the largest "
                f"length as {longest}"
            )
    if last != total:
        raise ValueError(f"{name}: expected the last value to be {packed}'s length {total}, got {last}")


def require_boxes(
    boxes: Tensor, image_index: Tensor | None, image_sizes: Sequence[tuple[int, int]], name: str
) -> Tensor:
    """`boxes` (K, 4), where values are checked: finite, x0 < x1 and y0 < y1, and each overlapping its image, which
    image_index (K,) says (None: one for each box, or one for all).
    """
    if boxes.numel() and all(values_are_checked(tensor) for tensor in (boxes, image_index) if tensor is not None):
        if torch.compiler.is_compiling():
            sizes = [side for size in image_sizes for side in size]
            return torch.ops.finegrain_ops.require_boxes(boxes, image_index, sizes, name)
        _check_boxes(boxes, image_index, image_sizes, name)
    return boxes


def _check_boxes(boxes: Tensor, image_index: Tensor | None, image_sizes: Sequence[tuple[int, int]], name: str) -> None:
    indices = [k if len(image_sizes) > 1 else 0 for k in range(len(boxes))]
    if image_index is not None:
        indices = image_index.tolist()
    for k, (box, index) in enumerate(zip(boxes.tolist(), indices)):
        if not 0 <= index < len(image_sizes):
            raise ValueError(
                f"image_index[{k}]: expected 0 to {len(image_sizes) - 1}, the images there are, got {index}"
            )
        clip_box(box, image_sizes[index], f"{name}[{k}]")


# Under torch.compile a check of values is an operator that hands its tensor on, so that it stays in the graph and
# breaks none.
_LIBRARY = torch.library.Library("finegrain_ops", "FRAGMENT")
_LIBRARY.define(
    "require_values(Tensor tensor, str name, float minimum, float maximum, str expected) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "require_cu_seqlens(Tensor cu_seqlens, str name, SymInt total, SymInt max_seqlen) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "require_boxes(Tensor boxes, Tensor? image_index, SymInt[] sizes, str name) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _require_values(tensor: Tensor, name: str, minimum: float, maximum: float, expected: str) -> Tensor:
    _check_values(tensor, name, minimum, maximum, expected)
    return tensor.clone()


def _require_cu_seqlens(cu_seqlens: Tensor, name: str, total: int, max_seqlen: int) -> Tensor:
    _check_cu_seqlens(cu_seqlens, name, total, max_seqlen)
    return cu_seqlens.clone()


def _require_boxes(boxes: Tensor, image_index: Tensor | None, sizes: list[int], name: str) -> Tensor:
    _check_boxes(boxes, image_index, list(zip(sizes[::2], sizes[1::2])), name)
    return boxes.clone()


_LIBRARY.impl("require_values", _require_values, "CompositeExplicitAutograd")
_LIBRARY.impl("require_cu_seqlens", _require_cu_seqlens, "CompositeExplicitAutograd")
_LIBRARY.impl("require_boxes", _require_boxes, "CompositeExplicitAutograd")
for _name in ("require_values", "require_cu_seqlens", "require_boxes"):
    torch.library.register_fake(f"finegrain_ops::{_name}", lambda tensor, *_: torch.empty_like(tensor), lib=_LIBRARY)
torch.library.register_autograd(
    "finegrain_ops::require_values", lambda ctx, grad: (grad, None, None, None, None), lib=_LIBRARY
)


def clip_boxes_of_image(boxes: Any, image_size: tuple[int, int], name: str) -> list[Box]:
    """`clip_box` for each of a list of boxes, for one box that is not wrapped, or for a tensor or array of either.

    Raises:
        ValueError: boxes are none of these, or one is no box or outside of the image; `name` says which.
    """
    boxes = boxes.tolist() if hasattr(boxes, "tolist") else boxes
    if boxes is None or isinstance(boxes, (str, bytes)) or not hasattr(boxes, "__len__"):
        raise ValueError(f"{name}: expected a list of (x0, y0, x1, y1) boxes, [] for none, got {describe(boxes)}")
    if len(boxes) == 4 and not any(hasattr(edge, "__len__") for edge in boxes):
        return [clip_box(boxes, image_size, name)]
    return [clip_box(box, image_size, f"{name}[{k}]") for k, box in enumerate(boxes)]
