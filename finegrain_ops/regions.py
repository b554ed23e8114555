"""The regions around boxes that the methods look at, for any number of boxes at once, on any device.

Boxes are (K, 4) xyxy in continuous pixels of the original image, tensors or numbers; sizes are (height, width).
image_size is one size for all boxes, or one for each: (K, 2). Results are (K, 4) float64, or int64 where said, on the
boxes' device, which is never waited for. Boxes on the CPU are checked: finite, x0 < x1 and y0 < y1, overlapping their
image (ValueError, which names the box); those on a device with FINEGRAIN_CHECK=1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .geometry import as_box_tensor, check_image_size, clip_box
from .validation import describe, require_bool, require_length, require_number, values_are_checked

__all__ = ["add_margin", "clip_boxes", "dualfocus_crops", "expand_boxes", "square_boxes"]

Boxes = Tensor | Sequence[Sequence[float]]
ImageSize = Tensor | Sequence[int] | Sequence[Sequence[int]]


def clip_boxes(boxes: Boxes, image_size: ImageSize) -> Tensor:
    """What of each box lies within its image."""
    boxes, height, width = _checked(boxes, image_size)
    return _clipped(boxes, height, width)


def square_boxes(boxes: Boxes) -> Tensor:
    """The square about each box's centre whose side is the box's longer one; it may stick out of the image.

    With s = max(x1 - x0, y1 - y0): ((x0 + x1 - s) / 2, (y0 + y1 - s) / 2, (x0 + x1 + s) / 2, (y0 + y1 + s) / 2).
    """
    boxes = as_box_tensor(boxes, "boxes")
    _require_ordered(boxes)
    return _squared(boxes)


def add_margin(boxes: Boxes, margin: float, image_size: ImageSize) -> Tensor:
    """Each box with `margin` pixels (>= 0) more on all four sides, clipped to its image."""
    margin = require_number(margin, "margin", minimum=0.0, what="a finite number of pixels >= 0")
    boxes, height, width = _checked(boxes, image_size)
    return _clipped(_with_margin(boxes, margin), height, width)


def expand_boxes(boxes: Boxes, factor: float, image_size: ImageSize, *, square: bool = False) -> Tensor:
    """CoF's region (arXiv 2412.16869, Sec. II-B): scaled about the centre, then moved back inside the image.

    `boxes.expand_box` for each box, with its equations, bit for bit.

    Args:
        boxes: (K, 4).
        factor: alpha > 0; CoF takes 1.3 for LLaVA-1.5-7B and 1.0 for the 13B models.
        image_size: (height, width) of the original image, or (K, 2).
        square: make each box a square of its longer side first.

    Returns:
        (K, 4) float64 with 0 <= x0 <= x1 <= W and 0 <= y0 <= y1 <= H.
    """
    factor = require_number(factor, "factor", what="a positive finite number")
    if factor <= 0:
        raise ValueError(f"factor: expected a positive finite number, got {factor}; pass 1.0 to keep the boxes' sizes")
    square = require_bool(square, "square")
    boxes, height, width = _checked(boxes, image_size)
    x0, y0, x1, y1 = boxes.unbind(1)
    box_width, box_height = x1 - x0, y1 - y0
    if square:
        box_width = box_height = torch.maximum(box_width, box_height)
    left, right = _expanded(x0, x1, box_width * factor, width)
    top, bottom = _expanded(y0, y1, box_height * factor, height)
    return torch.stack([left, top, right, bottom], dim=1)


def dualfocus_crops(boxes: Boxes, image_size: ImageSize, *, margin: int = 25) -> Tensor:
    """The crops that DualFocus zooms into (arXiv 2402.14767, Sec. 3.3, v' = zoom(crop(v, box))), as its authors' code
    makes them: squared about the centre, clipped, `margin` pixels more on each side, clipped, truncated.

    x0' = int(max(0, max(0, (x0 + x1) / 2 - s / 2) - margin)), x1' = int(min(W, min(W, (x0 + x1) / 2 + s / 2) + margin))
    with s = max(x1 - x0, y1 - y0), and so in y.

    Args:
        boxes: (K, 4).
        image_size: (height, width) of the original image, or (K, 2).
        margin: pixels, at least 1, so that no crop is empty.

    Returns:
        (K, 4) int64, none empty, within the image: what `crop_resize` and `preprocess` take as boxes.
    """
    if require_length(margin, "margin") < 1:
        raise ValueError(f"margin: expected at least 1 pixel, so that no crop is empty, got {margin}")
    boxes, height, width = _checked(boxes, image_size)
    squares = _clipped(_squared(boxes), height, width)
    return _clipped(_with_margin(squares, margin), height, width).long()


def _squared(boxes: Tensor) -> Tensor:
    low, high = boxes[:, :2], boxes[:, 2:]
    half = (high - low).amax(1, keepdim=True) / 2
    centre = (low + high) / 2
    return torch.cat([centre - half, centre + half], dim=1)


def _with_margin(boxes: Tensor, margin: float) -> Tensor:
    return torch.cat([boxes[:, :2] - margin, boxes[:, 2:] + margin], dim=1)


def _clipped(boxes: Tensor, height: Tensor, width: Tensor) -> Tensor:
    x0, y0, x1, y1 = boxes.unbind(1)
    return torch.stack([x0.clamp(min=0), y0.clamp(min=0), x1.minimum(width), y1.minimum(height)], dim=1)


def _expanded(low: Tensor, high: Tensor, size: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
    """boxes._expand_axis, statement by statement, so that both round alike."""
    margin = (size - (high - low)) / 2
    low, high = low - margin, high + margin
    low = torch.where(low > high, high, low)
    inside = (low >= 0) & (high <= limit)
    fills = size >= limit
    moved_low = torch.where(fills | (low < 0), torch.zeros_like(low), limit - size)
    moved_high = torch.where(fills | ~(low < 0), limit, size)
    return torch.where(inside, low, moved_low), torch.where(inside, high, moved_high)


def _checked(boxes: Boxes, image_size: ImageSize) -> tuple[Tensor, Tensor, Tensor]:
    """boxes (K, 4), and the height and width of the image of each, (K,), all float64."""
    boxes = as_box_tensor(boxes, "boxes")
    sizes = _image_sizes(image_size, boxes)
    height, width = sizes.unbind(1)
    if values_are_checked(boxes) and len(boxes):
        x0, y0, x1, y1 = boxes.unbind(1)
        ordered = boxes.isfinite().all(1) & (x0 < x1) & (y0 < y1)
        overlaps = (x0.clamp(min=0) < x1.minimum(width)) & (y0.clamp(min=0) < y1.minimum(height))
        for k in (~(ordered & overlaps)).nonzero()[:, 0].tolist():
            clip_box(boxes[k].tolist(), (int(height[k]), int(width[k])), f"boxes[{k}]")  # raises
    return boxes, height, width


def _require_ordered(boxes: Tensor) -> None:
    if values_are_checked(boxes):
        ordered = boxes.isfinite().all(1) & (boxes[:, :2] < boxes[:, 2:]).all(1)
        for k in (~ordered).nonzero()[:, 0].tolist():
            raise ValueError(
                f"boxes[{k}]: expected finite x0 < x1 and y0 < y1 in pixels, got {tuple(boxes[k].tolist())}"
            )


def _image_sizes(image_size: ImageSize, boxes: Tensor) -> Tensor:
    """(K, 2) float64 on the boxes' device."""
    expected = f"image_size: expected (height, width), or {len(boxes)} of them as (K, 2)"
    if isinstance(image_size, Tensor):
        if image_size.shape not in ((2,), (len(boxes), 2)) or image_size.is_floating_point():
            raise ValueError(f"{expected}, in integers, got {describe(image_size)}")
        if image_size.device.type != "cpu" and image_size.device != boxes.device:
            raise ValueError(
                f"image_size: expected the boxes' device {boxes.device} or the CPU, got {image_size.device}"
            )
        if image_size.device.type != "cpu":
            return image_size.to(torch.float64).expand(len(boxes), 2)
        image_size = image_size.tolist()
    try:
        is_nested = len(image_size) == 0 or hasattr(image_size[0], "__len__")
    except TypeError:
        raise ValueError(f"{expected}, got {describe(image_size)}") from None
    if not is_nested:
        size = check_image_size(image_size, "image_size")
        return torch.tensor(size, dtype=torch.float64).to(boxes.device).expand(len(boxes), 2)
    if len(image_size) != len(boxes):
        raise ValueError(f"{expected}, got {len(image_size)} of them")
    sizes = [check_image_size(size, f"image_size[{k}]") for k, size in enumerate(image_size)]
    return torch.tensor(sizes, dtype=torch.float64).reshape(-1, 2).to(boxes.device)
