"""`crop_resize` on validated tensors. It has no gradient: levels are rounded."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from ..backends.crops.interface import CropCall
from .library import LIBRARY

# images holds one (B, C, H, W), or any number of (C, H_i, W_i). shortest_edge 0: none.
LIBRARY.define(
    "crop_resize(Tensor[] images, Tensor boxes, Tensor? image_index, SymInt[2] size, str interpolation, "
    "bool antialias, bool is_padded, int shortest_edge, float[] fill, float[] multiplier, float[] offset, "
    "ScalarType dtype, int pass_order, bool exact, str backend) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)

crop_resize = torch.ops.finegrain_ops.crop_resize.default


@torch.library.register_fake("finegrain_ops::crop_resize", lib=LIBRARY)
def _fake(
    images: list[Tensor],
    boxes: Tensor,
    image_index: Tensor | None,
    size: list[int],
    interpolation: str,
    antialias: bool,
    is_padded: bool,
    shortest_edge: int,
    fill: list[float],
    multiplier: list[float],
    offset: list[float],
    dtype: torch.dtype,
    pass_order: int,
    exact: bool,
    backend: str,
) -> Tensor:
    return boxes.new_empty((boxes.shape[0], images[0].shape[-3], *size), dtype=dtype)


def _crop_resize(
    images: list[Tensor],
    boxes: Tensor,
    image_index: Tensor | None,
    size: list[int],
    interpolation: str,
    antialias: bool,
    is_padded: bool,
    shortest_edge: int,
    fill: list[float],
    multiplier: list[float],
    offset: list[float],
    dtype: torch.dtype,
    pass_order: int,
    exact: bool,
    backend: str,
) -> Tensor:
    call = CropCall(
        images[0] if images[0].dim() == 4 else images,
        boxes,
        image_index,
        (size[0], size[1]),
        interpolation,
        antialias,
        is_padded,
        shortest_edge or None,
        tuple(fill),
        tuple(multiplier),
        tuple(offset),
        dtype,
        pass_order,
    )
    chosen = backends.load_crop(backends.select(backend, call.features(exact)))
    if boxes.shape[0] == 0:
        return call.new_result()
    return chosen.crop_resize(call)


LIBRARY.impl("crop_resize", _crop_resize, "CompositeExplicitAutograd")
