"""Calls of `crop_resize` that every backend must answer alike: each argument at least once, odd sizes, strides."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from devices import DEVICE
from finegrain_ops import crop_resize

Box = tuple[float, float, float, float]

_INTEGER: tuple[Box, ...] = ((3, 5, 40, 61), (0, 0, 90, 70), (10, 20, 11, 21), (0, 69, 90, 70), (57, 2, 60, 68))
_FRACTIONAL: tuple[Box, ...] = (
    (3.25, 5.5, 40.125, 61.75),
    (0.1, 0.2, 89.9, 69.7),
    (10.3, 20.6, 10.4, 20.7),
    (4.5, 9.0, 5.5, 60.3),
)
_BEYOND: tuple[Box, ...] = ((-20, -30.5, 35, 200), (80, 50, 1e6, 71), (-1e9, -1e9, 1e9, 1e9))
_ANYWHERE: tuple[Box, ...] = (
    (-9, -9, 1e9, 1e9),
    (0.2, 0.1, 0.9, 0.8),
    (100.5, 3, 150, 30),
    (10, 20, 33.5, 40),
    (0, 0, 50, 50),
)


@dataclass(frozen=True)
class CropCase:
    """Images of `sizes` (height, width), or one tensor of `batch` images of sizes[0]; image_index goes through them."""

    boxes: tuple[Box, ...] = _INTEGER
    sizes: tuple[tuple[int, int], ...] = ((70, 90),)
    batch: int | None = None
    size: tuple[int, int] = (24, 33)
    dtype: torch.dtype = torch.uint8  # of the images
    channels: int = 3
    layout: str = "contiguous"  # or "channels_last", "sliced"
    has_index: bool = True
    options: dict = field(default_factory=dict)

    def images(self) -> Tensor | list[Tensor]:
        generator = torch.Generator().manual_seed(len(self.boxes) + self.size[0])
        images = [
            self._image(size, generator) for size in (self.sizes if self.batch is None else self.sizes * self.batch)
        ]
        return images if self.batch is None else torch.stack(images)

    def _image(self, size: tuple[int, int], generator: torch.Generator) -> Tensor:
        height, width = size
        if self.layout == "sliced":  # every other row and column of a larger one, which lies at an odd address
            noise = self._noise((self.channels, 2 * height + 1, 2 * width + 1), generator)
            return noise[:, 1::2, 1::2]
        noise = self._noise((self.channels, height, width), generator)
        if self.layout == "channels_last":
            return noise.permute(1, 2, 0).contiguous().permute(2, 0, 1)
        return noise

    def _noise(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Half noise, half stripes of black and white, which a bicubic filter overshoots."""
        noise = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        stripes = (torch.arange(shape[2]) // 5 % 2 * 255).to(torch.uint8).expand(shape)
        levels = torch.where(torch.arange(shape[1])[:, None] % 16 < 8, noise, stripes)
        return (levels if self.dtype == torch.uint8 else levels.to(self.dtype)).to(DEVICE)

    def arguments(self) -> dict:
        num_images = self.batch or len(self.sizes)
        index = [k % num_images for k in range(len(self.boxes))] if self.has_index else None
        return {"images": self.images(), "boxes": self.boxes, "image_index": index, "size": self.size, **self.options}


_MEAN, _STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
_TALL = (((0, 0, 40, 200), (3, 1, 43, 190)), ((201, 44),))
_SLIVER = ((7, 10, 10, 311), (7, 10, 10, 310), (0, 0, 3, 20))  # 301 by 3 pixels, 300 by 3, and a short one
_PADDED = {"pad": "square"}
CASES = {
    "integer boxes": CropCase(),
    "bilinear": CropCase(options={"interpolation": "bilinear"}),
    "fractional boxes": CropCase(_FRACTIONAL),
    "fractional, bilinear": CropCase(_FRACTIONAL, options={"interpolation": "bilinear"}),
    "boxes beyond the image": CropCase(_BEYOND),
    "enlarged": CropCase(_INTEGER, size=(150, 131)),
    "shrunk much": CropCase(((0, 0, 90, 70), (0, 0, 5, 70)), size=(3, 2)),
    "to one pixel": CropCase(size=(1, 1)),
    "tall": CropCase(*_TALL, size=(30, 36)),
    "tall, before Pillow 12.2": CropCase(*_TALL, size=(30, 36), options={"pillow": "12.1"}),
    "tall, Pillow 13": CropCase(*_TALL, size=(30, 36), options={"pillow": "13.0"}),
    "sliver, Pillow 12.2": CropCase(_SLIVER, ((320, 44),), size=(30, 36), options={"pillow": "12.2"}),
    "tall, padded": CropCase(*_TALL, size=(30, 36), options={**_PADDED, "fill": (9, 80, 250)}),
    "several sizes": CropCase(_ANYWHERE, ((70, 90), (1, 1), (33, 200), (80, 95)), options={"pillow": "13.0"}),
    "one box per image": CropCase(_INTEGER[:3], batch=3, has_index=False),
    "one image": CropCase(has_index=False),
    "batch": CropCase(_FRACTIONAL, batch=2),
    "padded": CropCase(_INTEGER, options={**_PADDED, "fill": (122, 116, 104)}),
    "padded, fractional": CropCase(_FRACTIONAL + _BEYOND, options={**_PADDED, "fill": 255}),
    "shortest edge": CropCase(
        ((0, 0, 90, 70), (5, 5, 30, 60), (3.5, 1.5, 88, 30)), size=(28, 20), options={"shortest_edge": 31}
    ),
    "shortest edge, padded": CropCase(
        ((0, 0, 90, 70), (5, 5, 30, 60)), size=(20, 28), options={"shortest_edge": 29, "pad": "square"}
    ),
    "without antialiasing": CropCase(_INTEGER + _FRACTIONAL, options={"antialias": False}),
    "without antialiasing, bilinear": CropCase(_INTEGER, options={"antialias": False, "interpolation": "bilinear"}),
    "enlarged without antialiasing": CropCase(
        _FRACTIONAL, size=(90, 100), options={"antialias": False, "pad": "square"}
    ),
    "normalised": CropCase(options={"mean": _MEAN, "std": _STD}),
    "half precision": CropCase(options={"mean": _MEAN, "std": _STD, "dtype": torch.float16}),
    "bfloat16": CropCase(options={"mean": 0.5, "std": 0.5, "dtype": torch.bfloat16}),
    "grey": CropCase(channels=1, options={"fill": 3, "pad": "square"}),
    "float32 images": CropCase(_INTEGER + _FRACTIONAL, dtype=torch.float32),
    "float32 images, padded": CropCase(_FRACTIONAL, dtype=torch.float32, options={**_PADDED, "fill": 99.5}),
    "float32 images without antialiasing": CropCase(_FRACTIONAL, dtype=torch.float32, options={"antialias": False}),
    "float16 images": CropCase(_INTEGER, dtype=torch.float16),
    "bfloat16 images": CropCase(_INTEGER, dtype=torch.bfloat16),
    "channels last": CropCase(layout="channels_last"),
    "sliced": CropCase(_FRACTIONAL, layout="sliced"),
    "sliced, tall": CropCase(((0, 0, 40, 200),), ((201, 44),), size=(30, 36), layout="sliced"),
    "large": CropCase(((0, 0, 410, 330), (100.5, 3, 400, 300)), ((330, 410),), size=(75, 66)),
}
ALL_CASES = [pytest.param(case, id=name) for name, case in CASES.items()]

# Of a result in float16 and bfloat16: half a unit in the last place, relative.
_EPSILON = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def check(case: CropCase, backend: str, *, levels: float = 0.0) -> None:
    """The backend's result is the reference's, with at most so many levels between them where levels are rounded.

    Floating images: sums of float32 products, for which 2^-20 of 255 leaves room for 16 roundings.
    """
    arguments = case.arguments()
    actual = crop_resize(**arguments, backend=backend)
    expected = crop_resize(**{**arguments, "dtype": torch.float32}, backend="reference")
    assert actual.dtype == case.options.get("dtype", torch.float32)
    assert actual.shape == expected.shape
    assert actual.is_contiguous()
    assert_levels_close(actual, expected, case, levels)


def assert_levels_close(actual: Tensor, expected: Tensor, case: CropCase, levels: float) -> None:
    std = torch.tensor(case.options.get("std", 1.0), device=actual.device).reshape(-1, 1, 1)
    if case.dtype != torch.uint8:
        levels += 255 * 2.0**-20
    # float32 rounds the result two or three times: multiplier, product, sum.
    tolerance = levels / 255 / std + expected.abs() * _EPSILON[actual.dtype] + 4 * 2.0**-24 * (1 / std).clamp(min=1.0)
    difference = (actual.float() - expected).abs()
    assert bool((difference <= tolerance).all()), f"off by {(difference * std).max() * 255} levels"
