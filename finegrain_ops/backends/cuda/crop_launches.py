"""Which kernels `crop_resize` needs: two launches for however many boxes have room in the scratch memory."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from ..crops.image_table import image_table
from ..crops.interface import INTERPOLATIONS, CropCall
from .arguments import CROP_RECORD_BYTES, CropArguments
from .machine import Launcher
from .variants import Variant

ELEMENT_OF = {torch.uint8: "byte_t", torch.float16: "half_t", torch.bfloat16: "bfloat16_t", torch.float32: "float"}
_RESULT_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

_LARGEST_SCRATCH = 64 * 2**20  # bytes; more boxes than have room in it follow in launches of their own

_variant = functools.lru_cache(maxsize=64)(Variant)


def crop_resize(launcher: Launcher, call: CropCall, result: Tensor) -> None:
    """Writes result (K, C, height, width), contiguous."""
    arguments = _arguments(call, result)
    height, width = call.size
    row_taps, column_taps = arguments.row_taps, arguments.column_taps
    num_boxes = call.boxes.shape[0]
    at_once = boxes_at_once(num_boxes, call.size, (row_taps, column_taps))
    num_weights = at_once * (row_taps * height + column_taps * width)
    scratch = functools.partial(torch.empty, device=result.device)
    arguments.point("records", scratch(at_once * CROP_RECORD_BYTES, dtype=torch.uint8))
    arguments.point("taps", scratch(at_once * (height + width) * 2, dtype=torch.int32))
    arguments.point("weights", scratch(num_weights, dtype=torch.int32))  # or float32, as large

    weights = _variant("crop_weights", "float", 0, launcher.architecture)
    resize = _variant("crop_resize", ELEMENT_OF[call.image_dtype], 0, launcher.architecture)
    blocks = math.ceil((height + width) / weights.rows)
    tiles = math.ceil(height / resize.rows) * math.ceil(width / resize.rows)
    for first in range(0, num_boxes, at_once):
        arguments.first_box = first
        boxes = min(at_once, num_boxes - first)
        launcher.launch(weights, (boxes * blocks, 1, 1), arguments)
        launcher.launch(resize, (boxes * tiles, 1, 1), arguments)


def boxes_at_once(num_boxes: int, size: tuple[int, int], most_taps: tuple[int, int]) -> int:
    """How many have room in the scratch memory; one at least."""
    bytes_per_box = CROP_RECORD_BYTES + sum(places * (8 + 4 * taps) for places, taps in zip(size, most_taps))
    return min(num_boxes, max(1, _LARGEST_SCRATCH // bytes_per_box))


def _arguments(call: CropCall, result: Tensor) -> CropArguments:
    row_taps, column_taps = call.most_taps()
    arguments = CropArguments(
        num_images=call.num_images,
        channels=call.channels,
        height=call.size[0],
        width=call.size[1],
        row_taps=row_taps,
        column_taps=column_taps,
        radius=INTERPOLATIONS[call.interpolation],
        antialias=call.antialias,
        is_padded=call.is_padded,
        shortest_edge=call.shortest_edge or 0,
        pass_order=call.pass_order,
        is_rounded=call.is_rounded,
        result_type=_RESULT_TYPES[call.dtype],
        fill=call.fill,
        multiplier=call.multiplier,
        offset=call.offset,
    )
    arguments.point("boxes", call.boxes)
    arguments.point("image_index", call.image_index)
    arguments.point("result", result)
    if (images := call.batch) is not None:
        arguments.point("images", images)
        arguments.image_height, arguments.image_width = images.shape[2:]
        strides = images.stride()
        arguments.image_stride, arguments.channel_stride, arguments.row_stride, arguments.column_stride = strides
    else:
        arguments.point("image_table", image_table(list(call.images)))
        arguments.tensors.update({f"images[{index}]": image for index, image in enumerate(call.images)})
    return arguments
