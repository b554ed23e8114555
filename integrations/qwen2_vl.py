"""Qwen2-VL (Wang et al., arXiv 2409.12191), Qwen2.5-VL (Bai et al., arXiv 2502.13923) and Qwen3-VL (arXiv 2511.21631)
as transformers implements them: `Qwen2VLForConditionalGeneration` and its like.

Every image is one grid of tokens, as many as its size gives (`smart_resize`): image_grid_thw counts its patches, of
which merge_size squared make a token. The language model alone is patched; its M-RoPE stays what it is, and the vision
encoder, to which these models hand all their keywords on, gets none of ours. Tokens of videos are not regions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from ..families import ImageGrid
from ..geometry import PixelMap
from . import decoder
from .changes import Changes, bound_to
from .decoder import key_shape, read, with_keywords
from .family import ImageSizes, ImageTokens, positions_of_images
from .image_processors import pixel_limits

__all__ = [
    "box_convention",
    "image_keys",
    "image_tokens",
    "install",
    "key_shape",
    "read",
    "vision_encoder",
]

_KEYWORDS = ("key_bias", "row_gate", "attention_reader")


def install(changes: Changes, model: nn.Module) -> Sequence[nn.Module]:
    changes.replace_method(vision_encoder(model), "forward", _forward_without_our_keywords)
    return decoder.install(changes, model, _core(model).language_model)


def vision_encoder(model: nn.Module) -> nn.Module:
    return _core(model).visual


def image_keys(model: nn.Module, inputs: Any) -> Tensor:
    return inputs["input_ids"] == model.config.image_token_id


def image_tokens(model: nn.Module, processor: Any, inputs: Any, image_sizes: ImageSizes) -> list[ImageTokens]:
    image_processor = processor.image_processor
    patch_size, merge_size = _require_fit(model, image_processor)
    token_size = patch_size * merge_size
    seen = inputs["image_grid_thw"].tolist() if "image_grid_thw" in inputs else []
    if len(seen) != len(image_sizes):
        raise ValueError(
            f"image_sizes: expected one for each of the {len(seen)} images of inputs, got {len(image_sizes)}"
        )
    grids = []
    for i, (size, patches) in enumerate(zip(image_sizes, seen)):
        pixels = PixelMap.of_image(size).smart_resize(token_size, *pixel_limits(image_processor))
        expected = [1, pixels.size[0] // patch_size, pixels.size[1] // patch_size]
        if patches != expected:
            raise ValueError(
                f"image_sizes[{i}]: the processor makes image_grid_thw {expected} of an image of {size} (height, "
                f"width), but inputs has {patches}; pass the size of the image that the processor was given, and set "
                "its limits of pixels on the processor, not in the call"
            )
        grids.append(ImageGrid(pixels, (token_size, token_size)))
    places = positions_of_images(inputs, model.config.image_token_id, [grid.num_keys for grid in grids])
    return [
        ImageTokens(i, batch_index, positions, grid)
        for i, ((batch_index, positions), grid) in enumerate(zip(places, grids))
    ]


def box_convention(processor: Any) -> str:
    """Pixels of the resized image in Qwen2.5-VL, 0..1000 in Qwen2-VL and Qwen3-VL."""
    names = {cls.__name__ for cls in type(processor).__mro__}
    return "pixel" if "Qwen2_5_VLProcessor" in names else "permille"


def _core(model: nn.Module) -> Any:
    return getattr(model, "model", model)


def _forward_without_our_keywords(original: Callable[..., Any]) -> Callable[..., Any]:
    """The vision encoder's forward, which in transformers 5 is given every keyword of the model's."""

    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return bound_to(self, original)(*args, **{k: v for k, v in kwargs.items() if k not in _KEYWORDS})

    forward.__signature__ = with_keywords(original)  # type: ignore[attr-defined]
    return forward


def _require_fit(model: nn.Module, image_processor: Any) -> tuple[int, int]:
    """patch_size and merge_size, which model and processor must agree on."""
    vision = model.config.vision_config
    expected = vision.patch_size, vision.spatial_merge_size
    got = getattr(image_processor, "patch_size", None), getattr(image_processor, "merge_size", None)
    if got != expected:
        raise ValueError(
            f"processor: expected an image processor with the model's patch_size and merge_size {expected}, got "
            f"{type(image_processor).__name__} with {got}"
        )
    return expected
