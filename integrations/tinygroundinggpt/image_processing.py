"""Images and object images as both encoders of TinyGroundingGPT want them, in one `crop_resize` for all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils.constants import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)

from ...crop_resize import crop_resize
from ...geometry import PixelMap
from ...validation import describe
from ..image_processors import channels_first


class TinyGroundingGPTImageProcessor(BaseImageProcessor):  # type: ignore[misc]
    """Pads to a square (centred), resizes (bicubic, as Pillow does), rescales, and normalises for each encoder.

    Args:
        size: {"height": S, "width": S} of the result, in pixels.
        fill: RGB levels around what is no square: CLIP's mean colour, as in LLaVA.
        image_mean, image_std: CLIP's.
        dino_image_mean, dino_image_std: DINOv2's, which are ImageNet's.

    Raises:
        ValueError: size is no square.
    """

    model_input_names = ["pixel_values", "dino_pixel_values"]  # noqa: RUF012

    def __init__(
        self,
        size: dict[str, int] | None = None,
        fill: Sequence[int] = (122, 116, 104),
        image_mean: Sequence[float] = OPENAI_CLIP_MEAN,
        image_std: Sequence[float] = OPENAI_CLIP_STD,
        dino_image_mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        dino_image_std: Sequence[float] = IMAGENET_DEFAULT_STD,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.size = {"height": 336, "width": 336} if size is None else dict(size)
        if self.size.keys() != {"height", "width"} or self.size["height"] != self.size["width"]:
            raise ValueError(f'size: expected {{"height": S, "width": S}}, a square, got {describe(size)}')
        self.fill = list(fill)
        self.image_mean, self.image_std = list(image_mean), list(image_std)
        self.dino_image_mean, self.dino_image_std = list(dino_image_mean), list(dino_image_std)

    def preprocess(
        self,
        images: Any,
        boxes: Sequence[Sequence[float]] | Tensor | None = None,
        image_index: Sequence[int] | Tensor | None = None,
        *,
        device: torch.device | str | None = None,
        return_tensors: Any = "pt",
    ) -> BatchFeature:
        """Each image, or each box of one, as (3, S, S) for both encoders.

        Args:
            images: one or a list: PIL images, uint8 tensors (3, H, W) on any device, or uint8 arrays (H, W, 3).
            boxes: (K, 4) xyxy in pixels of the original images, clipped to them. None: the whole of each image.
            image_index: (K,), the image that each box lies in. None: the only one, or image k for box k.
            device: where the images are brought to be cropped; None: where they are.
            return_tensors: "pt"; the result is tensors whatever is said.

        Returns:
            BatchFeature with pixel_values (K, 3, S, S) float32 in CLIP's normalisation, and dino_pixel_values, the same
            levels in ImageNet's.

        Raises:
            ValueError, TypeError: see `finegrain_ops.crop_resize`.
        """
        tensors = [tensor if device is None else tensor.to(device) for tensor in as_image_tensors(images)]
        if boxes is None:
            boxes = [(0.0, 0.0, float(tensor.shape[2]), float(tensor.shape[1])) for tensor in tensors]
        # Levels in 0..1, which both normalisations start from: crops are cut and resized once.
        levels = crop_resize(
            tensors, boxes, image_index, size=self.size["height"], pad="square", fill=self.fill, rescale=1 / 255
        )
        return BatchFeature(
            {
                "pixel_values": _normalized(levels, self.image_mean, self.image_std),
                "dino_pixel_values": _normalized(levels, self.dino_image_mean, self.dino_image_std),
            }
        )

    def pixel_map(self, image_size: tuple[int, int]) -> PixelMap:
        """From original to processed pixels of an image of (height, width)."""
        return PixelMap.of_image(image_size).pad_to_square().resize(self.size["height"], self.size["width"])


def as_image_tensors(images: Any) -> list[Tensor]:
    """One image, or any nesting of lists of them, each as uint8 (3, H, W) where it is.

    Raises:
        TypeError: one is neither a PIL image nor a uint8 tensor or array.
        ValueError: a tensor is not (3, H, W), or an array not (H, W, 3).
    """
    if not isinstance(images, (list, tuple)):
        return [_as_tensor(images, "images")]
    flat: list[Any] = []
    for entry in images:  # a conversation's images come as a list of their own
        flat += entry if isinstance(entry, (list, tuple)) else [entry]
    return [_as_tensor(image, f"images[{i}]") for i, image in enumerate(flat)]


def _as_tensor(image: Any, name: str) -> Tensor:
    if hasattr(image, "convert") and hasattr(image, "getbands"):  # a PIL image
        image = np.array(image.convert("RGB"))
    if not isinstance(image, (Tensor, np.ndarray)) or image.dtype not in (torch.uint8, np.uint8):
        raise TypeError(
            f"{name}: expected a PIL image, a uint8 tensor (3, H, W) or a uint8 array (H, W, 3), got {describe(image)}"
        )
    return channels_first(image, name)


def _normalized(levels: Tensor, mean: list[float], std: list[float]) -> Tensor:
    mean_of, std_of = (levels.new_tensor(values)[:, None, None] for values in (mean, std))
    return (levels - mean_of) / std_of
