"""What a backend that crops and resizes is given and what it must offer."""

from __future__ import annotations

import importlib.metadata
import math
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

INTERPOLATIONS = {"bilinear": 1, "bicubic": 2}  # radius of the filter in pixels


NEWEST_PILLOW = (13, 0)  # major and minor version of the newest that is followed


class PassOrder(IntEnum):
    """Which of the two passes comes first, for a crop of H x W that becomes h x w. Pillow has changed it."""

    HORIZONTAL_FIRST = 0  # before 12.2
    VERTICAL_FIRST_IF_TALL = 1  # 12.2 and 12.3: vertical first if H > 100 W and H > h
    VERTICAL_FIRST_IF_SHRUNK = 2  # since 13.0: vertical first if H > h and H - h > 2 (W - w)

    @classmethod
    def of_pillow(cls, version: tuple[int, int]) -> PassOrder:
        if version >= (13, 0):
            return cls.VERTICAL_FIRST_IF_SHRUNK
        return cls.VERTICAL_FIRST_IF_TALL if version >= (12, 2) else cls.HORIZONTAL_FIRST


def _installed_pillow() -> tuple[int, int] | None:
    try:
        major, minor = importlib.metadata.version("pillow").split(".")[:2]
        return int(major), int(minor)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return None


INSTALLED_PILLOW = _installed_pillow()  # its major and minor version


@dataclass(frozen=True)
class CropCall:
    """One validated call, as every backend receives it; sampling.py says what each output pixel is.

    images: (B, C, H, W), or a list of (C, H_i, W_i), all of one dtype (uint8 or floating) and with C = 1 or 3, any
    strides. boxes (K, 4) float64, contiguous, xyxy, on the images' device, not yet clipped. image_index (K,) int64,
    contiguous; None: box k lies in image k if there are several, otherwise in the only one. On a device nobody has
    looked at their values: a box without area, with NaN or of an image that does not exist gives `fill`, and nothing
    may be read or written out of bounds whatever they are.

    size (height, width) of the result. shortest_edge: the crop is resized so that its shorter side has this length,
    and size is cut from its centre. is_padded: the crop is letterboxed to a square with `fill` first. fill, multiplier
    and offset have C entries; the result is level * multiplier + offset in float32, rounded to dtype.
    pass_order: a PassOrder.
    """

    images: Tensor | list[Tensor]
    boxes: Tensor
    image_index: Tensor | None
    size: tuple[int, int]
    interpolation: str
    antialias: bool
    is_padded: bool
    shortest_edge: int | None
    fill: tuple[float, ...]
    multiplier: tuple[float, ...]
    offset: tuple[float, ...]
    dtype: torch.dtype
    pass_order: int

    @property
    def num_images(self) -> int:
        return len(self.images)

    @property
    def batch(self) -> Tensor | None:
        """(B, C, H, W), where one tensor holds them all: no table says where each lies."""
        if isinstance(self.images, Tensor):
            return self.images
        return self.images[0][None] if len(self.images) == 1 else None

    @property
    def _any_image(self) -> Tensor:
        return self.images if isinstance(self.images, Tensor) else self.images[0]

    @property
    def channels(self) -> int:
        return self._any_image.shape[-3]

    @property
    def image_dtype(self) -> torch.dtype:
        return self._any_image.dtype

    @property
    def is_rounded(self) -> bool:
        """Whether pixels are rounded to levels 0..255 after each pass: uint8 images."""
        return self.image_dtype == torch.uint8

    @property
    def image_sizes(self) -> list[tuple[int, int]]:
        """(height, width) of each image."""
        if isinstance(self.images, Tensor):
            return [(self.images.shape[-2], self.images.shape[-1])] * self.num_images
        return [(image.shape[-2], image.shape[-1]) for image in self.images]

    def new_result(self) -> Tensor:
        shape = (self.boxes.shape[0], self.channels, *self.size)
        return torch.empty(shape, dtype=self.dtype, device=self.boxes.device)

    def most_taps(self) -> tuple[int, int]:
        """How many pixels at most weigh in an output pixel, (vertically, horizontally), whatever the boxes are."""
        radius = INTERPOLATIONS[self.interpolation]
        if not self.antialias:
            return 2 * radius, 2 * radius
        sizes = [(max(size), max(size)) if self.is_padded else size for size in self.image_sizes]
        taps = []
        for axis in (0, 1):
            length = self.size[axis] if self.shortest_edge is None else self.shortest_edge
            # One more than the exact bound, for what rounding may do to it.
            scale = max((max(size[axis] for size in sizes) + 1) / length, 1.0)
            taps.append(2 * math.ceil(radius * scale) + 1)
        return taps[0], taps[1]

    def features(self, exact: bool) -> CropFeatures:
        return CropFeatures(
            device_type=self.boxes.device.type,
            device_index=self.boxes.device.index,
            antialias=self.antialias,
            pass_order=self.pass_order,
            exact=exact,
            has_integer_boxes=exact or self._has_integer_boxes(),
        )

    def _has_integer_boxes(self) -> bool:
        return self.boxes.device.type == "cpu" and torch.equal(self.boxes, self.boxes.round())


class CropFeatures(NamedTuple):
    """All of a call that may decide which backend can run it; hashable."""

    device_type: str
    device_index: int | None
    antialias: bool
    pass_order: int
    exact: bool  # Pillow's levels are wanted, not values near them
    has_integer_boxes: bool  # only looked at where not exact, and on a CPU


class CropBackend(Protocol):
    """A module in this folder. It declares what it can run, and never falls back by itself.

    It is called only with boxes: ops/ answers calls without any.
    """

    def unavailable_reasons(self) -> list[str]:
        """Why nothing at all can run on this machine; [] when something can."""

    def not_supported_reasons(self, features: CropFeatures) -> list[str]:
        """Every reason why a call with these features cannot run; [] when it can."""

    def crop_resize(self, call: CropCall) -> Tensor:
        """(K, C, height, width), contiguous, of call.dtype."""
