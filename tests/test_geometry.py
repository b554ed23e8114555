"""Boxes to tokens, in exact arithmetic: against a brute-force definition with rational numbers."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

pytest.importorskip("hypothesis", reason="hypothesis draws the boxes")
from hypothesis import given, settings
from hypothesis import strategies as st

from finegrain_ops import families
from finegrain_ops.geometry import (
    PixelMap,
    check_image_size,
    clip_box,
    smart_resize,
    token_coverage,
    token_mask,
    token_masks,
    token_ranges,
)

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


FAMILIES = {
    "llava": families.llava,
    "llava padded": lambda size: families.llava(size, do_pad=True),
    "instructblip": families.instructblip,
    "blip2": families.blip2,
    "qwen_vl": families.qwen_vl,
    "qwen2_vl": families.qwen2_vl,
    "qwen2_5_vl": lambda size: families.qwen2_5_vl(size, max_pixels=28 * 28 * 1280),
    "qwen3_vl": families.qwen3_vl,
}


@st.composite
def grids_and_boxes(draw) -> tuple[families.ImageGrid, list[tuple[float, float, float, float]]]:
    """Boxes anywhere, and boxes whose edges lie on the border of a token, and a float beside it."""
    height, width = draw(st.integers(8, 1500)), draw(st.integers(8, 1500))
    grid = FAMILIES[draw(st.sampled_from(list(FAMILIES)))]((height, width))
    boxes = []
    for _ in range(draw(st.integers(0, 3))):
        corners = []
        for axis, token, side in (
            (grid.pixels.x, grid.token_size[1], width),
            (grid.pixels.y, grid.token_size[0], height),
        ):
            borders = [draw(st.integers(-1, axis.length // token + 1)) for _ in range(2)]
            exact = [float((border * token - axis.shift) / axis.scale) for border in borders]
            beside = [math.nextafter(x, draw(st.sampled_from([-math.inf, math.inf]))) for x in exact]
            anywhere = (
                st.floats(-10, side + 10) | st.integers(0, side) | st.floats(allow_nan=False, allow_infinity=False)
            )
            corners.append(sorted(draw(st.sampled_from([exact, beside]) | st.lists(anywhere, min_size=2, max_size=2))))
        boxes.append((corners[0][0], corners[1][0], corners[0][1], corners[1][1]))
    return grid, boxes


@given(grids_and_boxes())
@settings(max_examples=200, deadline=None)
def test_vectorised_masks_are_token_mask_of_each_box(drawn) -> None:
    grid, boxes = drawn
    masks = token_masks(boxes, grid.pixels, grid.token_size)
    assert masks.shape == (len(boxes), *grid.shape)
    ranges = token_ranges(torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4), grid.pixels, grid.token_size)
    for mask, (left, top, right, bottom), box in zip(masks, ranges.tolist(), boxes):
        assert torch.equal(mask, token_mask([box], grid.pixels, grid.token_size))
        assert mask.sum() == max(right - left, 0) * max(bottom - top, 0)
        assert mask[top:bottom, left:right].all()


def test_vectorised_ranges_are_exact_where_floats_are_not() -> None:
    pixels = PixelMap.of_image((1080, 1920)).resize(189, 336)
    above = math.nextafter(720, math.inf)
    boxes = [(720, 0, 960, 1080), (0, 0, 720, 1080), (0, 0, above, 1080), (above, 0, 960, 1080)]
    assert token_ranges(boxes, pixels, (14, 14))[:, ::2].tolist() == [[9, 12], [0, 9], [0, 10], [9, 12]]


def test_boxes_in_other_dtypes_and_none() -> None:
    grid = families.llava((480, 640))
    boxes = torch.tensor([[0, 0, 640, 480], [100, 50, 101, 51]])
    for dtype in (torch.int32, torch.float16, torch.float32, torch.float64):
        assert torch.equal(grid.masks(boxes.to(dtype)), grid.masks(boxes))
    assert grid.masks([]).shape == (0, 24, 24)
    assert grid.ranges(torch.zeros(0, 4)).shape == (0, 4)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_box_that_is_no_box(value: float) -> None:
    with pytest.raises(ValueError, match="boxes: expected finite numbers"):
        families.llava((480, 640)).ranges([(0, 0, 1, 1), (0, 0, value, 1)])
    with pytest.raises(ValueError, match=r"boxes: expected shape \(K, 4\)"):
        families.llava((480, 640)).ranges((0, 0, 1, 1))


def test_an_axis_too_long_to_be_exact_is_refused() -> None:
    long = families.llava((400009, 5))  # its longer side becomes 26880604 pixels, before it is cut
    with pytest.raises(ValueError, match=r"pixels: expected at most 2\^24 pixels along an axis"):
        long.ranges([(0, 0, 1, 1)])
    assert token_mask([(0, 200000, 5, 200010)], long.pixels, long.token_size).any()


@pytest.mark.parametrize(
    ("name", "processed", "shape", "num_keys"),
    [
        ("llava", (336, 336), (24, 24), 576),
        ("llava padded", (336, 336), (24, 24), 576),
        ("instructblip", (224, 224), (16, 16), 257),
        ("blip2", (224, 224), (16, 16), 257),
        ("qwen_vl", (448, 448), (16, 16), 256),
        ("qwen2_vl", (476, 644), (17, 23), 391),
        ("qwen2_5_vl", (476, 644), (17, 23), 391),
        ("qwen3_vl", (480, 640), (15, 20), 300),
    ],
)
def test_families(name: str, processed: tuple[int, int], shape: tuple[int, int], num_keys: int) -> None:
    grid = FAMILIES[name]((480, 640))
    assert (grid.pixels.size, grid.shape, grid.num_keys) == (processed, shape, num_keys)
    keys = grid.key_masks([(0, 0, 640, 480), (320, 0, 640, 480)])
    assert keys.shape == (2, num_keys)
    assert not keys[:, : grid.leading].any()
    assert torch.equal(keys[:, grid.leading :].reshape(2, *shape), grid.masks([(0, 0, 640, 480), (320, 0, 640, 480)]))
    with pytest.raises(ValueError, match="image_size: expected"):
        FAMILIES[name]((480, 0))


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((480, 640), (476, 644)),
        ((42, 70), (56, 56)),  # halves go to the even multiple: 1.5 to 2, 2.5 to 2
        ((10, 20), (56, 84)),  # too few pixels: scaled by sqrt(3136 / 200), rounded up
        ((3000, 4000), (840, 1148)),  # too many: 867.5 x 1156.7, rounded down
        ((5600, 28), (5600, 28)),
    ],
)
def test_smart_resize(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert smart_resize(size, 28, 56 * 56, 28 * 28 * 1280) == expected


def test_smart_resize_refuses_what_the_processors_refuse() -> None:
    with pytest.raises(ValueError, match=r"sides of at most 200 : 1, got 201 x 1 pixels"):
        families.qwen2_vl((201, 1))


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
