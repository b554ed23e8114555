"""TinyGroundingGPT as a family of `patch`: see integrations/family.py.

Regions are in images; the tokens of object images get no bias of their own, and no place in `image_tokens`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ...families import ImageGrid
from .. import decoder
from ..changes import Changes
from ..decoder import key_shape, read
from ..family import ImageSizes, ImageTokens, positions_of_images

__all__ = ["box_convention", "image_keys", "image_tokens", "install", "key_shape", "read", "vision_encoder"]


def install(changes: Changes, model: Any) -> Sequence[nn.Module]:
    return decoder.install(changes, model, getattr(model, "model", model).language_model)


def vision_encoder(model: Any) -> nn.Module:
    return getattr(model, "model", model).vision_tower


def image_keys(model: Any, inputs: Any) -> Tensor:
    return inputs["input_ids"] == model.config.image_token_id


def image_tokens(model: Any, processor: Any, inputs: Any, image_sizes: ImageSizes) -> list[ImageTokens]:
    patch = model.config.clip_config.patch_size
    grids = [ImageGrid(processor.image_processor.pixel_map(size), (patch, patch)) for size in image_sizes]
    places = positions_of_images(inputs, model.config.image_token_id, [grid.num_keys for grid in grids])
    return [
        ImageTokens(i, batch_index, positions, grid)
        for i, ((batch_index, positions), grid) in enumerate(zip(places, grids))
    ]


def box_convention(processor: Any) -> str:
    """Coordinates "were normalized after padding" (App. A.1)."""
    return "unit_padded"
