"""Image processors of transformers, set as the released checkpoints of each family have them, or smaller and cheap."""

from __future__ import annotations

from typing import Any

import transformers


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
