"""InstructBLIP (Dai et al., arXiv 2305.06500) and BLIP-2 (Li et al., arXiv 2301.12597):
`InstructBlipForConditionalGeneration` and `Blip2ForConditionalGeneration`.

The biased keys are those of the Q-Former's cross-attention, in its layers 0, 2, ..., 10: for each image the CLS token
and the patches of the vision encoder, row major (257 for 224 / 14). The language model, which sees of an image only the
Q-Former's 32 outputs, is not biased (CoF's InstructBLIP, arXiv 2412.16869).
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ..families import ImageGrid
from .family import ImageSizes, ImageTokens
from .llava import pixel_map
from .qformer import install

__all__ = ["box_convention", "image_keys", "image_tokens", "install", "key_shape", "read", "vision_encoder"]

_CLS = 1


def vision_encoder(model: Any) -> nn.Module:
    return model.vision_model


def key_shape(model: Any, inputs: Any) -> tuple[int, int]:
    num_images, _, height, width = inputs["pixel_values"].shape
    patch = model.config.vision_config.patch_size
    return num_images, _CLS + (height // patch) * (width // patch)


def image_keys(model: nn.Module, inputs: Any) -> Tensor:
    keys = torch.ones(key_shape(model, inputs), dtype=torch.bool, device=inputs["pixel_values"].device)
    keys[:, :_CLS] = False
    return keys


def image_tokens(model: Any, processor: Any, inputs: Any, image_sizes: ImageSizes) -> list[ImageTokens]:
    num_images, num_keys = key_shape(model, inputs)
    if num_images != len(image_sizes):
        raise ValueError(
            f"inputs: expected pixel_values of the {len(image_sizes)} images of image_sizes, got {num_images}; pass "
            "what the processor returned for these images"
        )
    patch = model.config.vision_config.patch_size
    grids = [ImageGrid(pixel_map(processor.image_processor, s), (patch, patch), _CLS) for s in image_sizes]
    for grid in grids:
        if grid.num_keys != num_keys:
            raise ValueError(
                f"inputs: expected pixel_values of {grid.pixels.size} pixels, as the patch's processor makes them, got "
                f"shape {tuple(inputs['pixel_values'].shape)}"
            )
    return [ImageTokens(i, i, torch.arange(_CLS, num_keys), grid) for i, grid in enumerate(grids)]


def read(model: Any, inputs: Any, **patched: Any) -> None:
    """As far as the Q-Former: what the language model would need (T5: decoder_input_ids) is not needed."""
    names = inspect.signature(model.get_image_features).parameters
    model.get_image_features(**{name: value for name, value in inputs.items() if name in names}, **patched)


def box_convention(processor: Any) -> str:
    """No checkpoint was trained to write boxes."""
    return "auto"
