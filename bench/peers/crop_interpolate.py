"""torch's `interpolate` in a loop over the boxes, antialiased, in its fast forms; and kornia, where it is installed.

The layout that a form is fastest in is prepared, and so is an image in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import Tensor

from ..crop_inputs import CropInputs
from .interface import Call, CropPeer, installed

LEVELS, LEVELS_TWO_THREADS = "F.interpolate uint8", "F.interpolate uint8, two threads"
FLOAT = "F.interpolate float32"
# Seen: 7, where Pillow 13 takes the vertical pass first; 13 in float32, which clips no overshoot between the passes.
_UINT8_LEVELS, _FLOAT_LEVELS = 8.0, 16.0


def crop_peers(device_type: str) -> list[CropPeer]:
    """On CUDA it has no kernel for uint8."""
    of_levels = [
        CropPeer(LEVELS, _interpolate_levels(1), levels=_UINT8_LEVELS),
        CropPeer(LEVELS_TWO_THREADS, _interpolate_levels(2), levels=_UINT8_LEVELS),
    ]
    return [
        *(of_levels if device_type == "cpu" else []),
        CropPeer(FLOAT, _interpolate_float, levels=_FLOAT_LEVELS),
        CropPeer("kornia crop_and_resize", _kornia, levels=_FLOAT_LEVELS),
    ]


def _interpolate_levels(num_threads: int) -> Callable[[CropInputs], Call]:
    def prepare(inputs: CropInputs) -> Call:
        crops = [crop[None] for crop in inputs.crops([_channels_last(image) for image in inputs.images])]
        size = (inputs.case.size, inputs.case.size)

        def call() -> Tensor:
            result = _new_result(inputs)

            def run(box: int) -> None:
                levels = F.interpolate(crops[box], size, mode="bicubic", antialias=True)[0]
                torch.mul(levels, inputs.multiplier, out=result[box]).add_(inputs.offset)

            if num_threads == 1:
                for box in range(len(crops)):
                    run(box)
            else:
                with ThreadPoolExecutor(num_threads) as pool:
                    list(pool.map(run, range(len(crops))))
            return result.to(inputs.case.dtype)

        return call

    return prepare


def _interpolate_float(inputs: CropInputs) -> Call:
    crops = [crop[None] for crop in inputs.crops([image.contiguous().float() for image in inputs.images])]
    size = (inputs.case.size, inputs.case.size)

    def call() -> Tensor:
        result = _new_result(inputs)
        for levels, crop in zip(result, crops):
            levels.copy_(F.interpolate(crop, size, mode="bicubic", antialias=True)[0])
        return result.clamp_(0, 255).mul_(inputs.multiplier).add_(inputs.offset).to(inputs.case.dtype)

    return call


def _kornia(inputs: CropInputs) -> Call:
    """All boxes of an image in one call; it takes four pixels for each of the result's, whatever the scale."""
    crop_and_resize = installed("kornia.geometry.transform").crop_and_resize
    size, groups = (inputs.case.size, inputs.case.size), []
    for number, image in enumerate(inputs.images):
        of_image = [box for box, index in enumerate(inputs.image_index) if index == number]
        x0, y0, x1, y1 = inputs.boxes_tensor[of_image].unbind(1)
        # Its corners are centres of pixels, from the upper left one clockwise.
        corners = torch.stack([x0, y0, x1 - 1, y0, x1 - 1, y1 - 1, x0, y1 - 1], dim=1).reshape(-1, 4, 2)
        pixels = image.contiguous().float()[None].expand(len(of_image), -1, -1, -1)
        groups.append((torch.tensor(of_image, device=inputs.device), pixels, corners))

    def call() -> Tensor:
        result = _new_result(inputs)
        for boxes, pixels, corners in groups:
            result[boxes] = crop_and_resize(pixels, corners, size)
        return result.mul_(inputs.multiplier).add_(inputs.offset).to(inputs.case.dtype)

    return call


def _new_result(inputs: CropInputs) -> Tensor:
    return torch.empty((len(inputs.boxes), 3, inputs.case.size, inputs.case.size), device=inputs.device)


def _channels_last(image: Tensor) -> Tensor:
    return image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
