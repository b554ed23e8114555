"""The images and boxes of a case of `crop_resize`."""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .crop_cases import Box, CropCase

if TYPE_CHECKING:
    from PIL import Image

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's
RESCALE = 1 / 255
_DRAWN = (400, 600)  # as large as the photograph, so that enlarged its edges are as soft


@dataclass(frozen=True)
class CropInputs:
    """images (3, H, W) uint8 in the layout of the case; the boxes as tensors on the device and as numbers."""

    case: CropCase
    images: list[Tensor]
    boxes: list[Box]
    image_index: list[int]
    boxes_tensor: Tensor  # (K, 4) float32
    image_index_tensor: Tensor  # (K,) int64

    @property
    def device(self) -> torch.device:
        return self.images[0].device

    @functools.cached_property
    def multiplier(self) -> Tensor:
        """(3, 1, 1) float32: level * multiplier + offset is the normalised value."""
        return torch.tensor([RESCALE / std for std in STD], device=self.device)[:, None, None]

    @functools.cached_property
    def offset(self) -> Tensor:
        return torch.tensor([-mean / std for mean, std in zip(MEAN, STD)], device=self.device)[:, None, None]

    def crops(self, images: list[Tensor] | None = None) -> list[Tensor]:
        """Views (3, h, w), of these images or of the same in another layout."""
        images = self.images if images is None else images
        return [images[i][:, y0:y1, x0:x1] for (x0, y0, x1, y1), i in zip(self.boxes, self.image_index)]

    def pil_images(self) -> list[Image.Image]:
        from PIL import Image

        return [Image.fromarray(image.permute(1, 2, 0).cpu().numpy()) for image in self.images]


def make_crop_inputs(case: CropCase, device: torch.device) -> CropInputs:
    images = []
    for size in case.image_sizes:
        pixels = _photograph(*size).to(device)  # (H, W, 3)
        image = pixels.permute(2, 0, 1)
        images.append(image.contiguous() if case.layout == "planes" else image)
    boxes, index = case.boxes(), case.image_index()
    boxes_tensor = torch.tensor(boxes, dtype=torch.float32, device=device)
    return CropInputs(case, images, boxes, index, boxes_tensor, torch.tensor(index, device=device))


@functools.cache
def _photograph(height: int, width: int) -> Tensor:
    """(height, width, 3) uint8: a photograph of a cup of coffee, or what has edges and noise like one."""
    original = _coffee() if importlib.util.find_spec("skimage") else _drawing(*_DRAWN)
    pixels = original.permute(2, 0, 1)[None].float()
    resized = F.interpolate(pixels, (height, width), mode="bicubic", antialias=True)[0]
    return resized.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous()


def _coffee() -> Tensor:
    import skimage.data

    return torch.from_numpy(skimage.data.coffee())


def _drawing(height: int, width: int) -> Tensor:
    """Discs of one colour each, one above the other, under faint noise."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.arange(height)[:, None], torch.arange(width)
    image = torch.full((height, width, 3), 128.0)
    for _ in range(60):
        share_y, share_x, share_radius, *colour = torch.rand(6, generator=generator).tolist()
        is_inside = (y - share_y * height) ** 2 + (x - share_x * width) ** 2 < (share_radius * height / 4) ** 2
        image[is_inside] = 255 * torch.tensor(colour)
    noise = 4 * torch.randn(height, width, 3, generator=generator)
    return (image + noise).round().clamp(0, 255).to(torch.uint8)
