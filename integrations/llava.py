"""LLaVA-1.5 (Liu et al., arXiv 2310.03744) as transformers implements it: `LlavaForConditionalGeneration`.

Every image is one grid of image_size / patch_size squared tokens (24 x 24 for 336 / 14), row major. With
vision_feature_select_strategy "full" the CLS token comes before them.

The image processor's steps, each only where its flag says so, tell where a pixel goes: pad to square (do_pad: the
original LLaVA), resize (shortest edge, or to a fixed size), centre crop. The processors that transformers ships for
llava-1.5-*-hf resize and crop without padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..geometry import PixelMap


@dataclass(frozen=True)
class LlavaImageTokens:
    """See patching.ImageTokens."""

    batch_index: int
    positions: Tensor
    pixels: PixelMap
    token_size: tuple[int, int]


def language_model(model: nn.Module) -> nn.Module:
    return getattr(model, "model", model).language_model


def image_tokens(
    model: nn.Module, processor: Any, inputs: Any, image_sizes: list[tuple[int, int]]
) -> list[LlavaImageTokens]:
    config = model.config
    patch = config.vision_config.patch_size
    leading = 1 if config.vision_feature_select_strategy == "full" else 0  # CLS
    maps = [pixel_map(processor.image_processor, size) for size in image_sizes]
    counts = [leading + (m.size[0] // patch) * (m.size[1] // patch) for m in maps]

    # Images appear row by row of the batch, in the order of pixel_values.
    places = (inputs["input_ids"].cpu() == config.image_token_id).nonzero()  # (number of image tokens, 2)
    if len(places) != sum(counts):
        raise ValueError(
            f"inputs: expected {sum(counts)} image tokens for the {len(image_sizes)} images of image_sizes, "
            f"got {len(places)}; pass what the processor returned for these images"
        )
    tokens = []
    for pixels, image_places in zip(maps, torch.split(places, counts)):
        batch_index = int(image_places[0, 0])
        if bool((image_places[:, 0] != batch_index).any()):
            raise ValueError("inputs: the image tokens of one image are spread over two sequences of the batch")
        tokens.append(LlavaImageTokens(batch_index, image_places[leading:, 1], pixels, (patch, patch)))
    return tokens


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
