"""LLaVA-1.5 (Liu et al., arXiv 2310.03744) as transformers implements it: `LlavaForConditionalGeneration`.

Every image is one grid of image_size / patch_size squared tokens (24 x 24 for 336 / 14), row major. With
vision_feature_select_strategy "full" the CLS token comes before them.

The image processor's steps, each only where its flag says so, tell where a pixel goes: pad to square (do_pad: the
original LLaVA), resize (shortest edge, or to a fixed size), centre crop. The processors that transformers ships for
llava-1.5-*-hf resize and crop without padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..families import ImageGrid
from ..geometry import PixelMap
from . import decoder
from .changes import Changes
from .decoder import key_shape, read
from .family import ImageSizes, ImageTokens, positions_of_images

__all__ = [
    "box_convention",
    "image_keys",
    "image_tokens",
    "install",
    "key_shape",
    "pixel_map",
    "read",
    "vision_encoder",
]


def install(changes: Changes, model: nn.Module) -> Sequence[nn.Module]:
    return decoder.install(changes, model, getattr(model, "model", model).language_model)


def vision_encoder(model: nn.Module) -> nn.Module:
    return getattr(model, "model", model).vision_tower


def image_keys(model: nn.Module, inputs: Any) -> Tensor:
    keys = inputs["input_ids"] == model.config.image_token_id
    vision, leading = model.config.vision_config, _leading(model)
    num_keys = leading + (vision.image_size // vision.patch_size) ** 2
    return keys & ((keys.cumsum(1) - 1) % num_keys >= leading)


def image_tokens(model: nn.Module, processor: Any, inputs: Any, image_sizes: ImageSizes) -> list[ImageTokens]:
    patch, leading = model.config.vision_config.patch_size, _leading(model)
    maps = [pixel_map(processor.image_processor, size) for size in image_sizes]
    grids = [ImageGrid(pixels, (patch, patch), leading) for pixels in maps]
    places = positions_of_images(inputs, model.config.image_token_id, [grid.num_keys for grid in grids])
    return [
        ImageTokens(i, batch_index, positions[leading:], grid)
        for i, ((batch_index, positions), grid) in enumerate(zip(places, grids))
    ]


def box_convention(processor: Any) -> str:
    """0..1 of the square that the model sees: LLaVA was trained on images padded to one, which is "unit_padded"; a
    processor that does not pad cuts one out.
    """
    return "unit_view"


def pixel_map(image_processor: Any, image_size: tuple[int, int]) -> PixelMap:
    """From original to processed pixels, by the steps of transformers' CLIPImageProcessor and LlavaImageProcessor."""
    pixels = PixelMap.of_image(image_size)
    if getattr(image_processor, "do_pad", False):
        pixels = pixels.pad_to_square()
    if getattr(image_processor, "do_resize", True):
        size = image_processor.size
        if size.get("shortest_edge") is not None:
            pixels = pixels.resize_shortest_edge(size["shortest_edge"])
        else:
            pixels = pixels.resize(size["height"], size["width"])
    if getattr(image_processor, "do_center_crop", False):
        crop = image_processor.crop_size
        pixels = pixels.center_crop(crop["height"], crop["width"])
    return pixels


def _leading(model: nn.Module) -> int:
    """CLS tokens before an image's grid."""
    return 1 if model.config.vision_feature_select_strategy == "full" else 0
