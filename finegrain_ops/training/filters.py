"""The papers' filters over any number of boxes at once: masks, True where something is kept.

Boxes are (N, 4) xyxy in pixels, lists, arrays or tensors on any device; results are on the boxes' device. Where boxes
belong to something together (the object images of one question, the instances of one object), `group` (N,) int64 says
to which, in any order, and a result for each group is (num_groups,). There is no loop over boxes or groups.

DualFocus (arXiv 2402.14767, Sec. 3.2) filters ambiguous questions; TinyGroundingGPT (Sec. 3.2, "Filter") object images
that are too large or too small or overlap each other, detections of low confidence, and objects with too many boxes.
Neither paper gives a number: the defaults are this package's choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..geometry import as_box_tensor
from ..validation import describe, require_length, require_number

__all__ = ["area_mask", "area_share", "box_count_mask", "confidence_mask", "group_iou", "overlap_mask", "repeated_mask"]


def area_share(boxes: Any, image_sizes: Any) -> Tensor:
    """What share of its image each box takes: area / (H * W), (N,) float64; a box of no area takes 0.

    Args:
        boxes: (N, 4).
        image_sizes: (height, width) of all images, or (N, 2).
    """
    boxes = as_box_tensor(boxes, "boxes")
    sizes = torch.as_tensor(image_sizes, dtype=torch.float64, device=boxes.device)
    if sizes.shape not in ((2,), (len(boxes), 2)):
        raise ValueError(
            f"image_sizes: expected (height, width), or {len(boxes)} of them as (N, 2), got {describe(image_sizes)}"
        )
    return _areas(boxes) / sizes.expand(len(boxes), 2).prod(1)


def area_mask(boxes: Any, image_sizes: Any, *, smallest: float = 0.01, largest: float = 0.5) -> Tensor:
    """(N,) bool: boxes whose share of their image is in [smallest, largest].

    Object images that are too small are blurred when they are zoomed, too large ones show the image itself. A hundredth
    of the image is 34 x 34 of 336 x 336 pixels.
    """
    smallest = require_number(smallest, "smallest", minimum=0.0)
    largest = require_number(largest, "largest", minimum=smallest, what="a finite number >= smallest")
    share = area_share(boxes, image_sizes)
    return (share >= smallest) & (share <= largest)


def confidence_mask(scores: Any, *, lowest: float = 0.35) -> Tensor:
    """(N,) bool: detections with a score of at least `lowest`; 0.35 is what GroundingDINO's demonstrations take."""
    return torch.as_tensor(scores, dtype=torch.float64) >= require_number(lowest, "lowest")


def box_count_mask(group: Any, num_groups: int, *, most: int = 3) -> Tensor:
    """(num_groups,) bool: objects that have at most `most` boxes; one without a box is kept.

    With many boxes for one name it is not clear which an object image or a pair of coordinates means.
    """
    most = require_length(most, "most")
    group, num_groups = _group(group, num_groups)
    return group.bincount(minlength=num_groups) <= most


def group_iou(boxes: Any, group: Any, num_groups: int) -> tuple[Tensor, Tensor]:
    """The smallest and the largest intersection over union of any two boxes of each group, (num_groups,) float64.

    IoU = |a & b| / |a | b|, and 0 where both have no area. A group with fewer than two boxes has 1 and 0. Time and
    memory grow with the number of pairs within groups.
    """
    boxes = as_box_tensor(boxes, "boxes")
    group, num_groups = _group(group, num_groups, boxes)
    first, second = _pairs(group, num_groups)
    iou = _iou(boxes[first], boxes[second])
    pair_group = group[first]
    smallest = torch.ones(num_groups, dtype=torch.float64, device=boxes.device)
    largest = torch.zeros_like(smallest)
    smallest.scatter_reduce_(0, pair_group, iou, "amin")
    largest.scatter_reduce_(0, pair_group, iou, "amax")
    return smallest, largest


def overlap_mask(boxes: Any, group: Any, num_groups: int, *, largest: float = 0.3) -> Tensor:
    """(num_groups,) bool: questions of whose object images no two have an IoU above `largest`.

    Two object images that show the same cannot be told apart as the options of a question.
    """
    largest = require_number(largest, "largest", minimum=0.0)
    return group_iou(boxes, group, num_groups)[1] <= largest


def repeated_mask(boxes: Any, image: Any, category: Any, *, same: float = 0.5) -> Tensor:
    """(N,) bool: boxes of a category of which their image has several objects; the vectorised part of the ambiguity
    filter (DualFocus, Sec. 3.2).

    Annotators box the same object more than once: two boxes with an IoU of at least `same` are one object. A category
    has several objects in an image where any two of its boxes there have less.

    Args:
        boxes: (N, 4).
        image, category: (N,) int64: of which image and which category each box is.
    """
    same = require_number(same, "same", minimum=0.0)
    boxes = as_box_tensor(boxes, "boxes")
    keys = torch.stack(
        [_integers(values, name, boxes) for values, name in ((image, "image"), (category, "category"))], dim=1
    )
    found, group = keys.unique(dim=0, return_inverse=True)
    return (group_iou(boxes, group, len(found))[0] < same)[group]


def _pairs(group: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """The indices of both boxes of every pair within a group; each pair once."""
    order = group.argsort(stable=True)
    counts = group.bincount(minlength=num_groups)
    ends = counts.cumsum(0)[group[order]]  # where the group of each, in order, is over
    places = torch.arange(len(group), device=group.device)
    following = ends - places - 1  # how many of the group come after each
    first = places.repeat_interleave(following)
    starts = (following.cumsum(0) - following).repeat_interleave(following)
    second = first + 1 + torch.arange(len(first), device=group.device) - starts
    return order[first], order[second]


def _areas(boxes: Tensor) -> Tensor:
    return (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1)


def _iou(first: Tensor, second: Tensor) -> Tensor:
    """Of each pair of (N, 4) and (N, 4)."""
    low, high = torch.maximum(first[:, :2], second[:, :2]), torch.minimum(first[:, 2:], second[:, 2:])
    shared = (high - low).clamp(min=0).prod(1)
    either = _areas(first) + _areas(second) - shared
    return torch.where(either > 0, shared / either, torch.zeros_like(shared))


def _group(group: Any, num_groups: int, boxes: Tensor | None = None) -> tuple[Tensor, int]:
    num_groups = require_length(num_groups, "num_groups")
    values = _integers(group, "group", boxes)
    if values.device.type == "cpu" and len(values) and not 0 <= int(values.min()) <= int(values.max()) < num_groups:
        raise ValueError(
            f"group: expected 0 to {num_groups - 1}, got values from {int(values.min())} to {int(values.max())}"
        )
    return values, num_groups


def _integers(values: Tensor | Sequence[int], name: str, boxes: Tensor | None) -> Tensor:
    """(N,) int64, one for each box where `boxes` is given, on its device."""
    integers = torch.as_tensor(values, device=None if boxes is None else boxes.device)
    if integers.numel() and (integers.is_floating_point() or integers.dtype == torch.bool):
        raise TypeError(f"{name}: expected integers, got {describe(values)}")
    if integers.dim() != 1 or (boxes is not None and len(integers) != len(boxes)):
        raise ValueError(
            f"{name}: expected shape {(len(boxes) if boxes is not None else 'N',)}, got {describe(values)}"
        )
    return integers.long()
