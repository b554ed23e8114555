"""The methods' regions: against one box at a time in plain Python."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("hypothesis", reason="hypothesis draws the boxes")
from hypothesis import example, given, settings
from hypothesis import strategies as st

from finegrain_ops.boxes import expand_box
from finegrain_ops.regions import add_margin, clip_boxes, dualfocus_crops, expand_boxes, square_boxes

Box = tuple[float, float, float, float]


@st.composite
def images_and_boxes(draw, largest: float = 1.7e308) -> tuple[list[tuple[int, int]], list[Box]]:
    """Boxes that overlap their images, of integers, of floats near the image and of any up to `largest`."""
    sizes, boxes = [], []
    for _ in range(draw(st.integers(0, 4))):
        height, width = draw(st.integers(1, 2000)), draw(st.integers(1, 2000))
        corners = []
        for side in (width, height):
            inside = st.integers(0, side) | st.floats(0, side)
            anywhere = st.floats(-1e4, 1e4) | st.floats(-largest, largest)
            low, high = sorted(draw(st.lists(inside | anywhere, min_size=2, max_size=2)))
            is_overlapping = low < high and low < side and high > 0
            corners.append((low, high) if is_overlapping else (0, side))
        sizes.append((height, width))
        boxes.append((corners[0][0], corners[1][0], corners[0][1], corners[1][1]))
    return sizes, boxes


def rows(boxes: torch.Tensor) -> list[Box]:
    return [tuple(box) for box in boxes.tolist()]


@given(images_and_boxes(), st.floats(1e-6, 1e6) | st.floats(0.3, 4.0), st.booleans())
@settings(max_examples=150, deadline=None)
@example(([(20, 20)] * 3, [(0.1, 0.1, 10.0, 10.0), (0.1, 0.1, 0.3, 0.7), (1e-20, 0.0, 20.0, 20.0)]), 5e-324, True)
@example(([(480, 640)], [(-1e308, -1e308, 1e308, 1e308)]), 1.0, False)
def test_expand_boxes_is_expand_box_to_the_bit(drawn, factor: float, square: bool) -> None:
    sizes, boxes = drawn
    expected = [expand_box(box, factor, size, square=square) for box, size in zip(boxes, sizes)]
    assert rows(expand_boxes(boxes, factor, sizes, square=square)) == expected


def dualfocus(box: Box, size: tuple[int, int], margin: int) -> Box:
    x0, y0, x1, y1 = box
    side = max(x1 - x0, y1 - y0)
    edges = []
    for low, high, limit in ((x0, x1, size[1]), (y0, y1, size[0])):
        centre = (low + high) / 2
        low, high = max(0, centre - side / 2), min(limit, centre + side / 2)
        edges.append((int(max(0, low - margin)), int(min(limit, high + margin))))
    return edges[0][0], edges[1][0], edges[0][1], edges[1][1]


@given(images_and_boxes(largest=1e12), st.sampled_from([1, 25, 40]))
@settings(max_examples=150, deadline=None)
def test_dualfocus_crops(drawn, margin: int) -> None:
    sizes, boxes = drawn
    crops = dualfocus_crops(boxes, sizes, margin=margin)
    assert crops.dtype == torch.int64
    assert rows(crops) == [dualfocus(box, size, margin) for box, size in zip(boxes, sizes)]
    for (x0, y0, x1, y1), (height, width) in zip(rows(crops), sizes):
        assert 0 <= x0 < x1 <= width
        assert 0 <= y0 < y1 <= height


def test_dualfocus_crops_of_concrete_boxes() -> None:
    boxes = [
        (100, 100, 200, 150),  # squared to 75..175 in y
        (0, 0, 10, 100),  # clipped on the left before the margin is added: 0..55, not -45..55
        (600, 400, 640, 480),
        (99.9, 100.5, 199.9, 150.5),  # truncated
    ]
    assert rows(dualfocus_crops(boxes, (480, 640))) == [
        (75, 50, 225, 200),
        (0, 0, 80, 125),
        (555, 375, 640, 480),
        (74, 50, 224, 200),
    ]


@given(images_and_boxes(), st.floats(0, 100))
@settings(max_examples=60, deadline=None)
def test_clipping_and_margins(drawn, margin: float) -> None:
    sizes, boxes = drawn
    for grown, found in ((0.0, clip_boxes(boxes, sizes)), (margin, add_margin(boxes, margin, sizes))):
        assert rows(found) == [
            (max(x0 - grown, 0), max(y0 - grown, 0), min(x1 + grown, width), min(y1 + grown, height))
            for (x0, y0, x1, y1), (height, width) in zip(boxes, sizes)
        ]


def test_square_boxes() -> None:
    boxes = [(100, 100, 200, 150), (0, 0, 10, 100), (3.5, 1, 4.5, 2)]
    expected = [(100, 75, 200, 175), (-45, 0, 55, 100), (3.5, 1, 4.5, 2)]
    assert rows(square_boxes(boxes)) == expected
    assert rows(square_boxes(torch.tensor(boxes, dtype=torch.float32))) == expected


def test_one_size_for_all_boxes_or_one_for_each() -> None:
    boxes = torch.tensor([[0, 0, 90, 40], [10, 10, 80, 80]])
    alike = expand_boxes(boxes, 1.5, (100, 100))
    assert alike.dtype == torch.float64
    assert torch.equal(expand_boxes(boxes, 1.5, torch.tensor([100, 100])), alike)
    assert torch.equal(expand_boxes(boxes, 1.5, torch.tensor([[100, 100]] * 2)), alike)
    assert torch.equal(expand_boxes(boxes, 1.5, [[100, 100], (100, 100)]), alike)
    assert clip_boxes([], (5, 5)).shape == clip_boxes([], []).shape == (0, 4)


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ((1, 1, math.nan, 2), r"boxes\[1\]: expected finite x0 < x1 and y0 < y1"),
        ((5, 1, 5, 2), r"boxes\[1\]: expected finite x0 < x1 and y0 < y1"),
        ((100, 1, 110, 2), r"boxes\[1\]: expected a box that overlaps the image of 100 x 50 pixels"),
    ],
)
@pytest.mark.parametrize(
    "function",
    [clip_boxes, dualfocus_crops, lambda *a: expand_boxes(a[0], 2, a[1]), lambda *a: add_margin(a[0], 2, a[1])],
)
def test_bad_boxes_are_named(function, box: Box, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function([(0, 0, 10, 10), box], (50, 100))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: square_boxes([(0, 0, 1, 1), (2, 0, 1, 1)]), ValueError, r"boxes\[1\]: expected finite x0 < x1"),
        (lambda: square_boxes([(0, 0, 1)]), ValueError, r"boxes: expected shape \(K, 4\)"),
        (lambda: square_boxes("box"), TypeError, r"boxes: expected a tensor \(K, 4\)"),
        (lambda: square_boxes(torch.zeros(1, 4, dtype=torch.bool)), TypeError, "boxes: expected real numbers"),
        (lambda: clip_boxes([(0, 0, 1, 1)], 5), ValueError, r"image_size: expected \(height, width\), or 1 of them"),
        (lambda: clip_boxes([(0, 0, 1, 1)], (0, 5)), ValueError, "image_size: expected .* two positive integers"),
        (lambda: clip_boxes([(0, 0, 1, 1)], [(5, 5)] * 2), ValueError, "image_size: expected .* got 2 of them"),
        (lambda: clip_boxes([(0, 0, 1, 1)], torch.zeros(2)), ValueError, "image_size: expected .* in integers"),
        (lambda: expand_boxes([(0, 0, 1, 1)], 0, (5, 5)), ValueError, "factor: expected a positive finite number"),
        (lambda: expand_boxes([(0, 0, 1, 1)], 1, (5, 5), square=1), TypeError, "square: expected True or False"),
        (lambda: add_margin([(0, 0, 1, 1)], -1, (5, 5)), ValueError, "margin: expected a finite number of pixels >= 0"),
        (lambda: dualfocus_crops([(0, 0, 1, 1)], (5, 5), margin=0), ValueError, "margin: expected at least 1 pixel"),
        (lambda: dualfocus_crops([(0, 0, 1, 1)], (5, 5), margin=2.5), TypeError, "margin: expected an integer"),
    ],
)
def test_bad_arguments(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
