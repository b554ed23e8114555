"""Image processors of transformers, set as the released checkpoints of each family have them, or smaller and cheap; and
what they give for crops.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers import BatchFeature


def image_processor(name: str, **options: Any) -> Any:
    """The class that resizes with Pillow: in transformers 5 it has "Pil" at the end of its name."""
    return getattr(transformers, f"{name}Pil" if hasattr(transformers, f"{name}Pil") else name)(**options)


def square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


def llava(side: int = 336, name: str = "LlavaImageProcessor", **options: Any) -> Any:
    sizes = {"size": {"shortest_edge": side}, "crop_size": square(side)}
    return image_processor(name, **{**sizes, **options})


def llava_next(side: int = 336, **options: Any) -> Any:
    return llava(side, name="LlavaNextImageProcessor", **options)


def blip(side: int = 224, **options: Any) -> Any:
    return image_processor("BlipImageProcessor", **{"size": square(side), **options})


def qwen2_vl(min_pixels: int = 56 * 56, max_pixels: int = 12845056, **options: Any) -> Any:
    return image_processor("Qwen2VLImageProcessor", min_pixels=min_pixels, max_pixels=max_pixels, **options)


def qwen3_vl(min_pixels: int = 65536, max_pixels: int = 16777216, **options: Any) -> Any:
    half = [0.5, 0.5, 0.5]
    return qwen2_vl(min_pixels, max_pixels, patch_size=16, image_mean=half, image_std=half, **options)


RELEASED = {
    "CLIP": lambda **options: image_processor("CLIPImageProcessor", **options),
    "LLaVA": llava,
    "LLaVA padded": lambda **options: llava(do_pad=True, **options),
    "LLaVA-NeXT": llava_next,
    "InstructBLIP, BLIP-2": blip,
    "Qwen2-VL, Qwen2.5-VL": qwen2_vl,
    "Qwen3-VL": qwen3_vl,
}
SMALL = {
    "CLIP": lambda **options: image_processor(
        "CLIPImageProcessor", size={"shortest_edge": 40}, crop_size={"height": 31, "width": 38}, **options
    ),
    "CLIP squashed": lambda **options: image_processor(
        "CLIPImageProcessor", size={"height": 41, "width": 30}, crop_size={"height": 36, "width": 30}, **options
    ),
    "CLIP bilinear": lambda **options: image_processor(
        "CLIPImageProcessor", size={"shortest_edge": 40}, crop_size=square(40), resample=2, **options
    ),
    "LLaVA": lambda **options: llava(42, **options),
    "LLaVA padded": lambda **options: llava(42, do_pad=True, **options),
    "LLaVA padded and squashed": lambda **options: llava(
        do_pad=True, size={"height": 30, "width": 44}, do_center_crop=False, **options
    ),
    "LLaVA padded, without crop": lambda **options: llava(33, do_pad=True, do_center_crop=False, **options),
    "LLaVA-NeXT": lambda **options: llava_next(
        24, image_grid_pinpoints=[[24, 48], [48, 24], [48, 48], [72, 24], [24, 72]], **options
    ),
    "LLaVA-NeXT, one tile": lambda **options: llava_next(
        size=square(21), crop_size=square(21), image_grid_pinpoints=[[21, 21]], **options
    ),
    "LLaVA-NeXT bilinear, without a cut": lambda **options: llava_next(
        15, image_grid_pinpoints=[[15, 15], [45, 30], [30, 75]], resample=2, do_center_crop=False, **options
    ),
    "BLIP": lambda **options: blip(size={"height": 45, "width": 34}, **options),
    "Qwen2-VL": lambda **options: qwen2_vl(28 * 28 * 3, 28 * 28 * 9, **options),
    "Qwen2-VL, other patches": lambda **options: qwen2_vl(
        900, 6000, patch_size=7, merge_size=3, temporal_patch_size=1, **options
    ),
    "Qwen3-VL": lambda **options: qwen3_vl(32 * 32 * 2, 32 * 32 * 10, **options),
}


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def expected(processor: Any, crops: list[Image.Image]) -> BatchFeature:
    # transformers 4.57 takes a crop of 1 or 3 rows for one with its channels first, unless it is told. LLaVA-NeXT's
    # does not tell it to its own `pad`, which only 4.57 calls with crops.
    if hasattr(processor, "_pad_for_patching"):
        processor.pad = partial(pad_with_channels_last, type(processor).pad, processor)
    return processor(images=crops, return_tensors="pt", input_data_format="channels_last")


def pad_with_channels_last(pad: Any, processor: Any, image: np.ndarray, padding: Any, **layout: Any) -> np.ndarray:
    return pad(processor, image, padding, **{**layout, "input_data_format": "channels_last"})


def assert_equal(actual: BatchFeature, expected: BatchFeature, std: Tensor | float = 1.0) -> None:
    """To the level, and in float32: each of the two rounds three or four numbers below 1 / std."""
    assert isinstance(actual, BatchFeature)
    assert set(actual) == set(expected)
    assert actual["pixel_values"].dtype == torch.float32
    assert actual["pixel_values"].is_contiguous()
    for name in set(expected) - {"pixel_values"}:
        assert actual[name].dtype == torch.int64
        assert torch.equal(actual[name], expected[name])
    smallest_std = float(torch.as_tensor(std).min())
    torch.testing.assert_close(actual["pixel_values"], expected["pixel_values"], atol=2.0**-21 / smallest_std, rtol=0)
