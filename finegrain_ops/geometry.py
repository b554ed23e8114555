"""From boxes in an image to the tokens that a vision encoder makes of it, in exact arithmetic.

Coordinates are continuous: pixel (row r, column c) covers [c, c+1] x [r, r+1], an image spans (0, 0) to (width,
height), a box is (x0, y0, x1, y1). Sizes are (height, width), as everywhere in PyTorch.

A `PixelMap` follows an image through its preprocessing, one method per step, named as the step is:

    PixelMap.of_image((height, width)).pad_to_square().resize_shortest_edge(336).center_crop(336, 336)

Each axis is x' = scale * x + shift with rational scale and shift: 720 * 336 / 1920 / 14 is 9 exactly, and 8.999... in
floats. `token_mask` and `token_coverage` take the union of some boxes; `token_ranges` and `token_masks` each of any
number of them, on any device, and are as exact. What each family of models does with an image: families.py.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class AxisMap:
    """x' = scale * x + shift, onto an axis of `length` pixels."""

    length: int
    scale: Fraction = Fraction(1)
    shift: Fraction = Fraction(0)

    def __call__(self, x: float | Fraction) -> Fraction:
        return self.scale * Fraction(x) + self.shift

    def resized(self, length: int) -> AxisMap:
        ratio = Fraction(length, self.length)
        return AxisMap(length, self.scale * ratio, self.shift * ratio)

    def padded(self, before: int, length: int) -> AxisMap:
        return AxisMap(length, self.scale, self.shift + before)

    def cropped(self, before: int, length: int) -> AxisMap:
        return AxisMap(length, self.scale, self.shift - before)


@dataclass(frozen=True)
class PixelMap:
    """Where the pixels of an image are after preprocessing; y and x are mapped independently."""

    y: AxisMap
    x: AxisMap

    @classmethod
    def of_image(cls, image_size: tuple[int, int]) -> PixelMap:
        return cls(AxisMap(image_size[0]), AxisMap(image_size[1]))

    @property
    def size(self) -> tuple[int, int]:
        return self.y.length, self.x.length

    def pad_to_square(self) -> PixelMap:
        """Centred on a square of the longer side; an odd remainder leaves the larger margin after the image."""
        return self.pad(max(self.size), max(self.size))

    def resize_shortest_edge(self, edge: int) -> PixelMap:
        """Shorter side to `edge`, the other to int(edge * long / short) computed in floats, as image processors do."""
        short, long = sorted(self.size)
        new_long = int(edge * long / short)
        height, width = self.size
        return self.resize(edge, new_long) if height <= width else self.resize(new_long, edge)

    def resize(self, height: int, width: int) -> PixelMap:
        return PixelMap(self.y.resized(height), self.x.resized(width))

    def resize_within(self, height: int, width: int) -> PixelMap:
        """To fill height or width and stay within the other, which is rounded up, computed in floats as LLaVA-NeXT's
        image processors do.
        """
        by_height, by_width = height / self.y.length, width / self.x.length
        if by_width < by_height:
            return self.resize(min(math.ceil(self.y.length * by_width), height), width)
        return self.resize(height, min(math.ceil(self.x.length * by_height), width))

    def pad(self, height: int, width: int) -> PixelMap:
        """Centred on an area of that size; an odd remainder leaves the larger margin after the image."""
        y, x = (axis.padded((side - axis.length) // 2, side) for axis, side in ((self.y, height), (self.x, width)))
        return PixelMap(y, x)

    def smart_resize(self, factor: int, min_pixels: int, max_pixels: int) -> PixelMap:
        """To multiples of `factor`, as Qwen2-VL does; see `smart_resize` below."""
        return self.resize(*smart_resize(self.size, factor, min_pixels, max_pixels))

    def center_crop(self, height: int, width: int) -> PixelMap:
        if height > self.y.length or width > self.x.length:
            raise ValueError(
                f"center_crop: expected a crop within the resized image {self.size}, got {(height, width)}; "
                "set the image processor's size to at least its crop_size"
            )
        y, x = (
            axis.cropped((axis.length - length) // 2, length) for axis, length in ((self.y, height), (self.x, width))
        )
        return PixelMap(y, x)


def smart_resize(image_size: tuple[int, int], factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """To what (height, width) Qwen2-VL resizes an image (Wang et al., arXiv 2409.12191, Sec. 2.1).

    Each side goes to the multiple of `factor` nearest to it, of two the even one. Where their product leaves min_pixels
    .. max_pixels, both sides are scaled alike to the limit first, and rounded down (or up, to min_pixels). Computed in
    floats as transformers' image processors do, so that the sizes are theirs.

    Raises:
        ValueError: one side is more than 200 times the other, which these processors refuse.
    """
    height, width = image_size
    if max(image_size) > 200 * min(image_size):
        raise ValueError(
            f"expected an image or crop with sides of at most 200 : 1, got {height} x {width} pixels (height x width)"
        )
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    if new_height * new_width > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height, new_width = (math.ceil(side * grow / factor) * factor for side in image_size)
    return new_height, new_width


def token_mask(boxes: Sequence[Box], pixels: PixelMap, token_size: tuple[int, int]) -> Tensor:
    """The tokens that overlap any of the boxes: (grid height, grid width) bool.

    A token of side q overlaps an edge-to-edge box [x0', x1'] in columns floor(x0' / q) .. ceil(x1' / q) - 1. What
    preprocessing cut away has no tokens, so a box there gives none.
    """
    rows, columns = _grid(pixels, token_size)
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    for x0, y0, x1, y1 in boxes:
        top, bottom = _overlap(pixels.y, y0, y1, token_size[0], rows)
        left, right = _overlap(pixels.x, x0, x1, token_size[1], columns)
        mask[top:bottom, left:right] = True
    return mask


def token_coverage(boxes: Sequence[Box], pixels: PixelMap, token_size: tuple[int, int]) -> Tensor:
    """The share of each token's area that the union of the boxes covers: (grid height, grid width) float32."""
    rows, columns = _grid(pixels, token_size)
    limits = (Fraction(rows * token_size[0]), Fraction(columns * token_size[1]))
    mapped = [
        (
            _clamp(pixels.x(x0), limits[1]),
            _clamp(pixels.y(y0), limits[0]),
            _clamp(pixels.x(x1), limits[1]),
            _clamp(pixels.y(y1), limits[0]),
        )
        for x0, y0, x1, y1 in boxes
    ]
    # The union is cut along every edge of a box or a token into cells that lie wholly inside or outside every box.
    xs = sorted({Fraction(c * token_size[1]) for c in range(columns + 1)} | {x for b in mapped for x in (b[0], b[2])})
    ys = sorted({Fraction(r * token_size[0]) for r in range(rows + 1)} | {y for b in mapped for y in (b[1], b[3])})
    inside = torch.zeros(len(ys) - 1, len(xs) - 1, dtype=torch.float64)
    for x0, y0, x1, y1 in mapped:
        inside[ys.index(y0) : ys.index(y1), xs.index(x0) : xs.index(x1)] = 1.0
    return (_share_of_tokens(ys, token_size[0], rows) @ inside @ _share_of_tokens(xs, token_size[1], columns).T).float()


def token_ranges(boxes: Tensor | Sequence[Sequence[float]], pixels: PixelMap, token_size: tuple[int, int]) -> Tensor:
    """Which tokens each box overlaps: (K, 4) int64, (first column, first row, end column, end row), ends not included.

    The rectangle of `token_mask` for each box alone, exactly; empty where preprocessing cut the box away.

    Args:
        boxes: (K, 4) xyxy in pixels of the original image, a tensor on any device (which is not waited for) or numbers.
        pixels: where the image's pixels go.
        token_size: side of a token in processed pixels, (height, width).

    Raises:
        TypeError, ValueError: boxes is not (K, 4), or not finite on the CPU. On a device NaN overlaps no token.
        ValueError: preprocessing enlarges the image to more than 2^24 pixels along an axis.
    """
    boxes = as_box_tensor(boxes, "boxes")
    if boxes.device.type == "cpu" and not bool(boxes.isfinite().all()):
        raise ValueError(f"boxes: expected finite numbers, got {boxes[~boxes.isfinite().all(1)][0].tolist()}")
    boxes = torch.where(boxes.isnan().any(1, keepdim=True), -math.inf, boxes)
    rows, columns = _grid(pixels, token_size)
    left, right = _overlaps(pixels.x, boxes[:, 0], boxes[:, 2], token_size[1], columns)
    top, bottom = _overlaps(pixels.y, boxes[:, 1], boxes[:, 3], token_size[0], rows)
    return torch.stack([left, top, right, bottom], dim=1)


def token_masks(boxes: Tensor | Sequence[Sequence[float]], pixels: PixelMap, token_size: tuple[int, int]) -> Tensor:
    """`token_ranges` as masks: (K, grid height, grid width) bool, `token_mask` of each box alone."""
    ranges = token_ranges(boxes, pixels, token_size)
    rows, columns = (torch.arange(count, device=ranges.device) for count in _grid(pixels, token_size))
    left, top, right, bottom = ranges[:, :, None].unbind(1)
    in_rows, in_columns = (top <= rows) & (rows < bottom), (left <= columns) & (columns < right)
    return in_rows[:, :, None] & in_columns[:, None, :]


def as_box_tensor(boxes: Tensor | Sequence[Sequence[float]], name: str) -> Tensor:
    """(K, 4) float64, on the device that it is on; numbers on the CPU."""
    if not isinstance(boxes, Tensor):
        try:
            boxes = torch.tensor(boxes, dtype=torch.float64).reshape(len(boxes), -1 if len(boxes) else 4)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise TypeError(f"{name}: expected a tensor (K, 4) or K boxes of four numbers, got {boxes!r:.80}") from None
    if boxes.is_complex() or boxes.dtype == torch.bool:
        raise TypeError(f"{name}: expected real numbers, got {boxes.dtype}")
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        raise ValueError(f"{name}: expected shape (K, 4), (x0, y0, x1, y1) each, got {tuple(boxes.shape)}")
    return boxes.detach().to(torch.float64)


def _grid(pixels: PixelMap, token_size: tuple[int, int]) -> tuple[int, int]:
    return pixels.size[0] // token_size[0], pixels.size[1] // token_size[1]


def _overlap(axis: AxisMap, low: float, high: float, token: int, count: int) -> tuple[int, int]:
    """The half-open range of tokens that [low, high] overlaps."""
    first, end = math.floor(axis(low) / token), math.ceil(axis(high) / token)
    return min(max(first, 0), count), min(max(end, 0), count)


def _overlaps(axis: AxisMap, low: Tensor, high: Tensor, token: int, count: int) -> tuple[Tensor, Tensor]:
    """`_overlap` of (K,) float64 edges, as exactly: (K,) int64 each."""
    below, _ = _whole_tokens(axis, low, token, count)
    _, above = _whole_tokens(axis, high, token, count)
    return below.clamp(0, count), above.clamp(0, count)


def _whole_tokens(axis: AxisMap, x: Tensor, token: int, count: int) -> tuple[Tensor, Tensor]:
    """floor and ceil of axis(x) / token, exactly where it lies in [0, count]; beyond, anything on that side of it."""
    # axis(x) / token is (slope * x + shift) / unit in whole numbers.
    common = math.lcm(axis.scale.denominator, axis.shift.denominator)
    slope, shift, unit = int(axis.scale * common), int(axis.shift * common), common * token
    if slope >= 2**24 or unit * (count + 2) + abs(shift) >= 2**50:
        raise ValueError(f"pixels: expected at most 2^24 pixels along an axis, got {axis}; use token_mask")
    x = x.clamp((-unit - shift) / slope, (unit * (count + 1) - shift) / slope)
    nearest = ((x * slope + shift) / unit).round()
    # The sign of slope * x - target tells on which side of `nearest` the exact value lies. The upper 24 bits of x and
    # the other 29 give exact products with slope; where they do not cancel with target, rounding keeps the sign.
    target = nearest * unit - shift
    upper = x.float().double()
    side = (slope * upper - target) + slope * (x - upper)
    nearest = nearest.long()
    return nearest - (side < 0).long(), nearest + (side > 0).long()


def _clamp(value: Fraction, limit: Fraction) -> Fraction:
    return min(max(value, Fraction(0)), limit)


def _share_of_tokens(edges: list[Fraction], token: int, count: int) -> Tensor:
    """(count, len(edges) - 1): which share of each token's side every interval between edges takes."""
    share = torch.zeros(count, len(edges) - 1, dtype=torch.float64)
    for interval, (low, high) in enumerate(itertools.pairwise(edges)):
        share[int(low // token), interval] = float((high - low) / token)
    return share


def check_image_size(image_size: object, name: str) -> tuple[int, int]:
    """(height, width) as two positive integers."""
    try:
        height, width = (int(side) for side in image_size)  # type: ignore[attr-defined]
        exact = all(int(side) == side for side in image_size)  # type: ignore[attr-defined]
    except (TypeError, ValueError, OverflowError):
        height, width, exact = 0, 0, False
    if not exact or height < 1 or width < 1:
        raise ValueError(f"{name}: expected (height, width) as two positive integers, got {image_size!r}")
    return height, width


def clip_box(box: Sequence[float], image_size: tuple[int, int], name: str) -> Box:
    """`box` clipped to the image; ValueError, which names it, when it is no box or nothing of it is left."""
    try:
        x0, y0, x1, y1 = (float(edge) for edge in box)
    except (TypeError, ValueError):
        raise ValueError(f"{name}: expected four numbers (x0, y0, x1, y1) in pixels, got {box!r}") from None
    height, width = image_size
    if not all(map(math.isfinite, (x0, y0, x1, y1))) or not (x0 < x1 and y0 < y1):
        raise ValueError(f"{name}: expected finite x0 < x1 and y0 < y1 in pixels, got ({x0}, {y0}, {x1}, {y1})")
    clipped = (max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height)))
    if not (clipped[0] < clipped[2] and clipped[1] < clipped[3]):
        raise ValueError(
            f"{name}: expected a box that overlaps the image of {width} x {height} pixels (width x height), got "
            f"({x0}, {y0}, {x1}, {y1}); boxes are in pixels of the original image"
        )
    return clipped
