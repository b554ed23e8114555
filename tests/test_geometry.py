"""Boxes to tokens, in exact arithmetic: against a brute-force definition with rational numbers."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

pytest.importorskip("hypothesis", reason="hypothesis draws the boxes")
from hypothesis import given, settings
from hypothesis import strategies as st

from finegrain_ops.geometry import PixelMap, check_image_size, clip_box, token_coverage, token_mask

SIDES = st.integers(1, 3000)


def test_integer_exact() -> None:
    """720 * 336 / 1920 / 14 is 9 exactly; in floats it is 8.999..., which would light the ninth column as well."""
    pixels = PixelMap.of_image((1080, 1920)).resize(189, 336)
    assert pixels.x(720) / 14 == 9
    columns = token_mask([(720, 0, 960, 1080)], pixels, (14, 14)).any(0).nonzero().flatten().tolist()
    assert columns == [9, 10, 11]


def test_center_crop_of_a_wide_image() -> None:
    pixels = PixelMap.of_image((400, 600)).resize_shortest_edge(336).center_crop(336, 336)
    assert pixels.size == (336, 336)
    assert pixels.x(100) == 0  # (504 - 336) / 2 = 84 pixels are cut on the left: 84 * 600 / 504 = 100
    assert pixels.y(400) == 336
    assert not token_mask([(0, 0, 100, 400)], pixels, (14, 14)).any()
    assert token_mask([(0, 0, 100.001, 400)], pixels, (14, 14)).any(0).nonzero().flatten().tolist() == [0]
    assert token_mask([(0, 0, 600, 400)], pixels, (14, 14)).all()


def test_pad_to_square_keeps_the_margins_out() -> None:
    pixels = PixelMap.of_image((300, 451)).pad_to_square().resize(336, 336)
    rows = token_mask([(0, 0, 451, 300)], pixels, (14, 14)).any(1).nonzero().flatten().tolist()
    assert rows == list(range(3, 20))  # from 75 * 336 / 451 / 14 = 3.99... to 375 * ... = 19.96 tokens
    assert pixels.y(0) == Fraction(75 * 336, 451)


@given(height=SIDES, width=SIDES, edge=st.sampled_from([224, 336]))
def test_shortest_edge_is_what_image_processors_compute(height: int, width: int, edge: int) -> None:
    short, long = min(height, width), max(height, width)
    expected = (edge, int(edge * long / short)) if height <= width else (int(edge * long / short), edge)
    assert PixelMap.of_image((height, width)).resize_shortest_edge(edge).size == expected


@st.composite
def images_and_boxes(draw) -> tuple[PixelMap, list[tuple[float, float, float, float]]]:
    height, width = draw(st.integers(8, 400)), draw(st.integers(8, 400))
    pixels = PixelMap.of_image((height, width))
    if draw(st.booleans()):
        pixels = pixels.pad_to_square()
    pixels = pixels.resize_shortest_edge(48) if draw(st.booleans()) else pixels.resize(48, 56)
    pixels = pixels.center_crop(48, 48)
    boxes = []
    for _ in range(draw(st.integers(0, 3))):
        x0, x1 = sorted(draw(st.lists(st.floats(0, width), min_size=2, max_size=2, unique=True)))
        y0, y1 = sorted(draw(st.lists(st.floats(0, height), min_size=2, max_size=2, unique=True)))
        boxes.append((x0, y0, x1, y1))
    return pixels, boxes


def overlap(low: Fraction, high: Fraction, cell: int, side: int) -> Fraction:
    return max(Fraction(0), min(high, Fraction((cell + 1) * side)) - max(low, Fraction(cell * side)))


@given(images_and_boxes())
@settings(max_examples=60, deadline=None)
def test_a_token_is_in_the_region_when_it_overlaps_a_box(drawn) -> None:
    pixels, boxes = drawn
    side = 8
    expected = torch.zeros(6, 6, dtype=torch.bool)
    for x0, y0, x1, y1 in boxes:
        for row in range(6):
            for column in range(6):
                expected[row, column] |= bool(
                    overlap(pixels.y(y0), pixels.y(y1), row, side) and overlap(pixels.x(x0), pixels.x(x1), column, side)
                )
    assert torch.equal(token_mask(boxes, pixels, (side, side)), expected)


@given(images_and_boxes())
@settings(max_examples=60, deadline=None)
def test_coverage_is_the_area_of_the_union(drawn) -> None:
    pixels, boxes = drawn
    coverage = token_coverage(boxes, pixels, (8, 8))
    mask = token_mask(boxes, pixels, (8, 8))
    assert ((coverage >= 0) & (coverage <= 1 + 1e-6)).all()
    assert not (coverage[~mask] > 0).any()
    single = torch.zeros(6, 6, dtype=torch.float64)
    for x0, y0, x1, y1 in boxes:
        ys = [float(overlap(pixels.y(y0), pixels.y(y1), row, 8)) for row in range(6)]
        xs = [float(overlap(pixels.x(x0), pixels.x(x1), column, 8)) for column in range(6)]
        area = torch.tensor(ys)[:, None] * torch.tensor(xs)[None, :] / 64
        assert (coverage + 1e-6 >= area).all()  # a union covers at least each of its boxes
        single = single + area
    assert (coverage <= single + 1e-6).all()  # and at most their sum
    if len(boxes) == 1:
        torch.testing.assert_close(coverage.double(), single, atol=1e-6, rtol=0)
    assert torch.equal(token_coverage(boxes * 2, pixels, (8, 8)), coverage)  # a box twice is the box


def test_a_crop_larger_than_the_image_is_refused() -> None:
    with pytest.raises(ValueError, match="center_crop: expected a crop within the resized image"):
        PixelMap.of_image((300, 300)).resize_shortest_edge(224).center_crop(336, 336)


@pytest.mark.parametrize("size", [(0, 5), (5,), (1.5, 2), "ab", None, (float("inf"), 3), (-1, 2)])
def test_bad_image_sizes(size) -> None:
    with pytest.raises(ValueError, match=r"image_sizes\[0\]: expected \(height, width\) as two positive integers"):
        check_image_size(size, "image_sizes[0]")


def test_boxes_are_clipped() -> None:
    assert clip_box((-5, 2, 50, 300), (200, 40), "box") == (0.0, 2.0, 40.0, 200.0)


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ((1, 2, 3), "expected four numbers"),
        (("a", 0, 1, 1), "expected four numbers"),
        (3, "expected four numbers"),
        ((5, 5, 5, 9), "expected finite x0 < x1"),
        ((9, 5, 5, 9), "expected finite x0 < x1"),
        ((0, 0, float("nan"), 1), "expected finite x0 < x1"),
        ((40, 0, 60, 10), "expected a box that overlaps the image of 40 x 200 pixels"),
        ((0, 200, 10, 210), "expected a box that overlaps .* boxes are in pixels of the original image"),
    ],
)
def test_bad_boxes(box, message: str) -> None:
    with pytest.raises(ValueError, match=r"boxes\[1\]: " + message):
        clip_box(box, (200, 40), "boxes[1]")
