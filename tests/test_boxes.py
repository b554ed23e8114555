"""Boxes in text, and their expansion. Sizes are (height, width), boxes (x0, y0, x1, y1)."""

from __future__ import annotations

import doctest
import importlib.util
import math
import sys
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from finegrain_ops import boxes
from finegrain_ops.boxes import Box, expand_box, parse_boxes

IMAGE = (480, 640)
CONVENTIONS = ("unit", "unit_padded", "permille", "pixel")

# Every shape of text that counts as a box, from its four numbers as decimals: x0, y0, x1, y1.
SHAPES: dict[str, Callable[[Decimal, Decimal, Decimal, Decimal], str]] = {
    "list": lambda a, b, c, d: f"[{a}, {b}, {c}, {d}]",
    "list without spaces": lambda a, b, c, d: f"[{a},{b},{c},{d}]",
    "list over lines": lambda a, b, c, d: f"[\n  {a},\n  {b},\n  {c},\n  {d}\n]",
    "list with a trailing comma": lambda a, b, c, d: f"[{a}, {b}, {c}, {d},]",
    "list of strings": lambda a, b, c, d: f'["{a}", "{b}", "{c}", "{d}"]',
    "list in a list": lambda a, b, c, d: f"[[{a}, {b}, {c}, {d}]]",
    "list closed by the wrong bracket": lambda a, b, c, d: f"[{a}, {b}, {c}, {d})",
    "list cut off": lambda a, b, c, d: f"[{a}, {b}, {c}, {d}",
    "tuple": lambda a, b, c, d: f"({a}, {b}, {c}, {d})",
    "two points": lambda a, b, c, d: f"({a},{b}),({c},{d})",
    "two lists": lambda a, b, c, d: f"[[{a}, {b}], [{c}, {d}]]",
    "points with keys": lambda a, b, c, d: f'[{{"x": {a}, "y": {b}}}, {{"x": {c}, "y": {d}}}]',
    "bbox": lambda a, b, c, d: f'{{"bbox": [{a}, {b}, {c}, {d}], "score": 0.9}}',
    "bbox, single quotes": lambda a, b, c, d: f"{{'label': 'a dog', 'bbox': [{a}, {b}, {c}, {d}],}}",
    "bbox as a string": lambda a, b, c, d: f'{{"bbox": "{a}, {b}, {c}, {d}"}}',
    "bbox_2d in a fence": lambda a, b, c, d: (
        f'```json\n[\n\t{{"bbox_2d": [{a}, {b}, {c}, {d}], "label": "dog"}}\n]\n```'
    ),
    "bbox_2d cut off": lambda a, b, c, d: f'[{{"bbox_2d": [{a}, {b}, {c}, {d}], "label": "the do',
    "x1": lambda a, b, c, d: f'{{"x1": {a}, "y1": {b}, "x2": {c}, "y2": {d}}}',
    "x1, escaped quotes": lambda a, b, c, d: rf"{{\"x1\": {a}, \"y1\": {b}, \"x2\": {c}, \"y2\": {d}}}",
    "x1, numbers as strings": lambda a, b, c, d: f'{{"x1": "{a}", "y1": "{b}", "x2": "{c}", "y2": "{d}"}}',
    "x1, another order": lambda a, b, c, d: f'{{"y2": {d}, "y1": {b}, "x2": {c}, "x1": {a}, "label": "dog"}}',
    "x1, the image's size too": lambda a, b, c, d: (
        f'{{"x": 0, "y": 0, "width": 1, "height": 1, "x1": {a}, "y1": {b}, "x2": {c}, "y2": {d}}}'
    ),
    "x1, without brackets": lambda a, b, c, d: f"x1 = {a}, y1 = {b}, x2 = {c}, y2 = {d}",
    "x1, cut off at the front": lambda a, b, c, d: f'"x1": {a}, "y1": {b}, "x2": {c}, "y2": {d}}}]',
    "x0": lambda a, b, c, d: f'{{"x0": {a}, "y0": {b}, "x1": {c}, "y1": {d}}}',
    "xmin": lambda a, b, c, d: f'{{"xmin": {a}, "ymin": {b}, "xmax": {c}, "ymax": {d}}}',
    "x_min": lambda a, b, c, d: f"{{'x_min': {a}, 'x_max': {c}, 'y_min': {b}, 'y_max': {d}}}",
    "X-Min": lambda a, b, c, d: f'{{"X-Min": {a}, "Y-Min": {b}, "X-Max": {c}, "Y-Max": {d}}}',
    "min_x": lambda a, b, c, d: f'{{"min_x": {a}, "min_y": {b}, "max_x": {c}, "max_y": {d}}}',
    "left": lambda a, b, c, d: f'{{"left": {a}, "top": {b}, "right": {c}, "bottom": {d}}}',
    "top_left lists": lambda a, b, c, d: f'{{"top_left": [{a}, {b}], "bottom_right": [{c}, {d}]}}',
    "top_left mappings": lambda a, b, c, d: (
        f'{{"top_left": {{"x": {a}, "y": {b}}}, "bottom_right": {{"x": {c}, "y": {d}}}}}'
    ),
    "top_left_x": lambda a, b, c, d: (
        f'{{"top_left_x": {a}, "top_left_y": {b}, "bottom_right_x": {c}, "bottom_right_y": {d}}}'
    ),
    "bounding_box": lambda a, b, c, d: (
        f'{{"bounding_box": {{"x1": {a}, "y1": {b}, "x2": {c}, "y2": {d}}}, "label": "dog"}}'
    ),
    "width": lambda a, b, c, d: f'{{"x": {a}, "y": {b}, "width": {c - a}, "height": {d - b}}}',
    "w": lambda a, b, c, d: f"{{'x': {a}, 'y': {b}, 'w': {c - a}, 'h': {d - b}}}",
    "left and width": lambda a, b, c, d: f'{{"left": {a}, "top": {b}, "width": {c - a}, "height": {d - b}}}',
    "xmin and width": lambda a, b, c, d: f'{{"xmin": {a}, "ymin": {b}, "width": {c - a}, "height": {d - b}}}',
    "bare": lambda a, b, c, d: f"{a}, {b}, {c}, {d}",
    "bare, cut off at the front": lambda a, b, c, d: f'{a}, {b}, {c}, {d}], "label": "dog"}}]',
    "bare, after a key": lambda a, b, c, d: f"Bounding box: {a}, {b}, {c}, {d}.",
    "bare, in parentheses": lambda a, b, c, d: f"(the box is {a}, {b}, {c}, {d})",
    "corners in the wrong order": lambda a, b, c, d: f"[{c}, {b}, {a}, {d}]",
    "signs and exponents": lambda a, b, c, d: f"[{a:+e}, {b:e}, {c:E}, {d:+E}]",
}

sides = st.integers(16, 4000)
sizes = st.tuples(sides, sides)
any_size = st.tuples(st.integers(1, 9000), st.integers(1, 9000))
conventions = st.sampled_from(CONVENTIONS)
shapes = st.sampled_from(sorted(SHAPES))


@st.composite
def inside_boxes(draw: Any, size: tuple[int, int]) -> Box:
    """Boxes inside the image that take at least a twentieth of each side."""
    corners = []
    for limit in (size[1], size[0]):
        low = draw(st.floats(0, 0.9)) * limit
        corners.append((low, min(low + draw(st.floats(0.05, 1.0)) * limit, float(limit))))
    (x0, x1), (y0, y1) = corners
    return x0, y0, x1, y1


def written(box: Box, convention: str, size: tuple[int, int], seen: tuple[int, int], decimals: int) -> list[Decimal]:
    """The numbers that a model would write for the box; exact arithmetic, then one rounding."""
    height, width = size
    side = max(size)
    if convention == "unit_padded":
        shift_x, shift_y = (side - width) // 2, (side - height) // 2
        scale_x = scale_y = Fraction(1, side)
    else:
        shift_x = shift_y = 0
        seen_height, seen_width = {"unit": (1, 1), "permille": (1000, 1000), "pixel": seen}[convention]
        scale_x, scale_y = Fraction(seen_width, width), Fraction(seen_height, height)
    values = []
    for edge, shift, scale in zip(box, (shift_x, shift_y) * 2, (scale_x, scale_y) * 2, strict=True):
        numerator = round((Fraction(edge) + shift) * scale * 10**decimals)
        values.append(Decimal(numerator).scaleb(-decimals))
    return values


def tolerances(convention: str, size: tuple[int, int], seen: tuple[int, int], decimals: int) -> Box:
    """Half of the last decimal, in pixels, and what float arithmetic may add."""
    height, width = size
    if convention == "unit_padded":
        height = width = max(size)
    spans = {"unit": (1, 1), "permille": (1000, 1000), "pixel": seen, "unit_padded": (1, 1)}[convention]
    per_y, per_x = height / spans[0], width / spans[1]
    half = 0.5 * 10.0**-decimals
    slack = 1e-9 * max(size)
    return per_x * half + slack, per_y * half + slack, per_x * half + slack, per_y * half + slack


def assert_near(got: Box, expected: Box, within: Box) -> None:
    assert all(abs(g - e) <= w for g, e, w in zip(got, expected, within, strict=True)), (got, expected, within)


def assert_valid(found: list[Box], size: tuple[int, int]) -> None:
    height, width = size
    assert isinstance(found, list)
    for box in found:
        assert isinstance(box, tuple)
        assert len(box) == 4
        assert all(type(edge) is float and math.isfinite(edge) for edge in box)
        x0, y0, x1, y1 = box
        assert 0 <= x0 < x1 <= width
        assert 0 <= y0 < y1 <= height
        assert (x1 - x0) * (y1 - y0) > 0


# ---------------------------------------------------------------------------------------------- parse_boxes: round trip


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_in_every_convention(shape: str, convention: str) -> None:
    size, seen, box = (333, 1001), (448, 672), (100.5, 30.25, 620.0, 260.75)
    text = SHAPES[shape](*written(box, convention, size, seen, 8))
    found = parse_boxes(text, image_size=size, convention=convention, processed_size=seen)
    assert len(found) == 1
    assert_near(found[0], box, tolerances(convention, size, seen, 8))


@given(st.data(), sizes, sizes, conventions, shapes, st.integers(3, 12))
@settings(max_examples=200, deadline=None)
def test_round_trip(
    data: st.DataObject, size: tuple[int, int], seen: tuple[int, int], convention: str, shape: str, decimals: int
) -> None:
    box, within = data.draw(inside_boxes(size)), tolerances(convention, size, seen, decimals)
    assume(box[2] - box[0] > 2 * within[0] and box[3] - box[1] > 2 * within[1])  # or rounding leaves it no area
    text = SHAPES[shape](*written(box, convention, size, seen, decimals))
    found = parse_boxes(text, image_size=size, convention=convention, processed_size=seen)
    assert_valid(found, size)
    assert len(found) == 1
    assert_near(found[0], box, within)


prose = st.text(alphabet="abcXYZ .!?;'`*#>\n\té犬", max_size=30)


@given(st.data(), shapes, prose, prose, conventions)
@settings(max_examples=100, deadline=None)
@example(None, "list", "Sure! It's the dog's box:\n", "That is my answer :)", "unit")
@example(None, "bare", "I see 3 dogs and 2 cats; the box is", ", as far as I can tell (not 100%)", "unit")
@example(None, "two points", "The 2 corners are", ", and no others: [1, 2, 3] and (4, 5) are none.", "permille")
def test_prose_around_a_box_changes_nothing(
    data: st.DataObject | None, shape: str, before: str, after: str, convention: str
) -> None:
    box = (64.0, 48.0, 320.0, 240.0) if data is None else data.draw(inside_boxes(IMAGE))
    text = SHAPES[shape](*written(box, convention, IMAGE, (448, 672), 4))
    assume("cut off" not in shape or data is None)
    alone, within = (
        parse_boxes(each, image_size=IMAGE, convention=convention, processed_size=(448, 672))
        for each in (text, f"{before} {text} {after}")
    )
    assert len(alone) == 1
    assert within == alone


@given(st.data(), st.lists(st.sampled_from(["list", "tuple", "two points", "bbox", "x1", "width"]), max_size=6))
@settings(max_examples=50, deadline=None)
@example(None, ["list", "list", "list"])
def test_boxes_come_in_order_of_appearance_and_repeated(data: st.DataObject | None, several: list[str]) -> None:
    expected = [(64.0, 48.0, 320.0, 240.0) if data is None else data.draw(inside_boxes(IMAGE)) for _ in several]
    numbers = [written(box, "unit", IMAGE, IMAGE, 9) for box in expected]
    text = "\n".join(SHAPES[shape](*four) for shape, four in zip(several, numbers, strict=True))
    found = parse_boxes(text, image_size=IMAGE, convention="unit")
    assert len(found) == len(expected)
    for got, box in zip(found, expected, strict=True):
        assert_near(got, box, tolerances("unit", IMAGE, IMAGE, 9))


# ------------------------------------------------------------------------------------------ parse_boxes: concrete texts


WHOLE = (0.0, 0.0, 640.0, 480.0)
SOME = (64.0, 96.0, 320.0, 384.0)  # 0.1, 0.2, 0.5, 0.8 of a 480 x 640 image; 100, 200, 500, 800 permille


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[0.1, 0.2, 0.5, 0.8]", [SOME]),
        ("[.1, 0.20000, +0.5, 8e-1]", [SOME]),
        ("[0, 0, 1, 1.]", [WHOLE]),
        ("[0.00, 0.00, 1.00, 1.00]", [WHOLE]),
        ("[-0.1, -0.25, 1.2, 1.01]", [WHOLE]),
        ("<box>(100,200),(500,800)</box>", [SOME]),
        ("<ref>the 2 dogs</ref><box>(100,200),(500,800)</box><box>(0,0),(1000,1000)</box>", [SOME, WHOLE]),
        ("<|object_ref_start|>dog<|object_ref_end|><|box_start|>(100,200),(500,800)<|box_end|>", [SOME]),
        ("<box>[[100, 200, 500, 800]]</box>", [SOME]),
        ("<box>(0,0),(1,1)</box>", [(0.0, 0.0, 0.64, 0.48)]),
        ('[{"bbox_2d": [100, 200, 500, 800], "label": "dog 1, 2, 3, 4"}]', [SOME]),
        ("[[0.1, 0.2, 0.5, 0.8], [0, 0, 1, 1]]", [SOME, WHOLE]),
        ("(0.1, 0.2), (0.5, 0.8)\n(0, 0), (1, 1)", [SOME, WHOLE]),
        ("0.1, 0.2, 0.5, 0.8\n0, 0, 1, 1", [SOME, WHOLE]),
        ("x1: 0.1, y1: 0.2, x2: 0.5, y2: 0.8; x1: 0, y1: 0, x2: 1, y2: 1", [SOME, WHOLE]),
        ('{"x1": 0.1, "y1": 0.2, "parts": [[0, 0, 1, 1]], "x2": 0.5, "y2": 0.8}', [SOME, WHOLE]),
        ("1, 2, 3, 4 dogs, of which one at [0.1, 0.2, 0.5, 0.8]", [SOME]),
        ("[nan, 0, 1, 1] and [null, 0.1, 1, 1], so 0.1, 0.2, 0.5, 0.8", [SOME]),
        ("(1,2,3) (0.1,0.2),(0.5,0.8),", [SOME]),
        ("(0.1,0.2),(0.5,0.8), (as shown)", [SOME]),
        ('{"bbox_2d": [100, 200, 500, 800], "point_2d": [300, 500]}', [SOME]),
        # Neither four numbers nor two points.
        ("", []),
        ("No box here; the answer is 42.", []),
        ("[0.1, 0.2, 0.3]", []),
        ("[0.1, 0.2, 0.3, 0.4, 0.5]", []),
        ("(0.1, 0.2, 0.3, 0.4, 0.5)", []),
        ("0.1, 0.2, 0.3, 0.4, 0.5", []),
        ("0.1, 0.2, 0.3", []),
        ("0.1 0.2 0.3 0.4", []),
        ("[0.1, , 0.2, 0.3, 0.4]", []),
        ("[0.1,, 0.3, 0.4]", []),
        ("(0.1, 0.2), , (0.3, 0.4)", []),
        ("[, 0.1, 0.2, 0.3, 0.4]", []),
        ("[0.0.1, 0.2, 0.3, 0.4]", []),
        ('["dog", 0.1, 0.2, 0.3, 0.4]', []),
        ('[0.1, 0.2, 0.3, 0.4, "dog"]', []),
        ("[0.1, 0.2, 0.3, 0.4, ", []),
        ("[0.1, 0.2, 0.3", []),
        ("[[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]]", []),
        ("<quad>(1,2),(3,4),(5,6),(7,8)</quad>", []),
        ("[[0.1, 0.2], [0.3, 0.4, 0.5]]", []),
        ("(0.1, 0.2), (0.3, 0.4), 0.5", []),
        ("(0.1, 0.2), (0.3, 0.4), (0.5, 0.6, 0.7)", []),
        ("(near 0.1, 0.2), (0.3, 0.4)", []),
        ("0.1, 0.2), 0.3, 0.4", []),
        ("(nan, 0.1, 0.2, 0.5, 0.8)", []),
        ("(0.1, 0.2) and (0.3, 0.4)", []),
        ('{"x1": 0.1, "y1": 0.2, "x2": 0.5}', []),
        ('{"x1": 0.1, "y1": 0.2}, {"x2": 0.5, "y2": 0.8}', []),
        ('{"x": 0.1, "y": 0.2, "label": "dog"}', []),
        ("x1 0.1, y1 0.2 x2 0.5 y2 0.8", []),
        ("x1 7: 0.1, y1 7: 0.2, x2 7: 0.5, y2 7: 0.8", []),
        ("x1: not 0.1, y1: not 0.2, x2: not 0.5, y2: not 0.8", []),
        ("[x1, y1, x2, y2]", []),
        ("[\u0661, \u0662, \u0663, \u0664]", []),
        ("[0x1, 0x2, 0x3, 0x4]", []),
        # No area, or no numbers.
        ("[0.5, 0.5, 0.5, 0.9]", []),
        ("[0.5, 0.5, 0.9, 0.5]", []),
        ("[1.1, 0.2, 1.3, 0.8]", []),
        ("[-0.4, 0.2, -0.1, 0.8]", []),
        ("[1e-200, 1e-200, 2e-200, 2e-200]", []),
        ("[0.1, 0.2, nan, 0.8]", []),
        ("[0.1, 0.2, Infinity, 0.8]", []),
        ("[0.1, 0.2, 1e400, 0.8]", []),
        ("[0.1, 0.2, null, 0.8]", []),
        ("[10%, 20%, 50%, 80%]", []),
        ('{"x1": "10%", "y1": "20 %", "x2": "50%", "y2": "80%"}', []),
        ('{"x": 0.5, "y": 0.5, "width": 0, "height": 0.2}', []),
    ],
)
def test_auto_on_concrete_texts(text: str, expected: list[Box]) -> None:
    assert parse_boxes(text, image_size=IMAGE) == expected


@pytest.mark.parametrize(
    ("text", "convention", "size", "seen", "expected"),
    [
        # Landscape: 80 rows of padding above and below; portrait: 80 columns on each side.
        ("[0.25, 0.25, 0.5, 0.5]", "unit_padded", (480, 640), None, (160.0, 80.0, 320.0, 240.0)),
        ("[0.25, 0.25, 0.5, 0.5]", "unit_padded", (640, 480), None, (80.0, 160.0, 240.0, 320.0)),
        ("[0, 0, 1, 1]", "unit_padded", (480, 640), None, (0.0, 0.0, 640.0, 480.0)),
        ("[0.5, 0.5, 1, 1]", "unit_padded", (3, 8), None, (4.0, 2.0, 8.0, 3.0)),  # an odd pad: (8 - 3) // 2 = 2
        ("[0.25, 0.25, 0.5, 0.5]", "unit", (480, 640), None, (160.0, 120.0, 320.0, 240.0)),
        ("(700, 100), (900, 300)", "permille", (480, 640), None, (448.0, 48.0, 576.0, 144.0)),
        ("[0, 0, 1, 1]", "permille", (1000, 2000), None, (0.0, 0.0, 2.0, 1.0)),
        ("[0, 35, 70, 140]", "permille", (200, 200), None, (0.0, 7.0, 14.0, 28.0)),  # exact, though 0.07 * 200 is not
        ("[14, 28, 70, 56]", "pixel", (100, 200), (112, 140), (20.0, 25.0, 100.0, 50.0)),
        ("[14, 28, 700, 1e308]", "pixel", (100, 200), (112, 140), (20.0, 25.0, 200.0, 100.0)),
        ("[-5, -5, 2000, 500]", "permille", (100, 200), None, (0.0, 0.0, 200.0, 50.0)),
        ('{"x": 100, "y": 200, "width": 300, "height": 400}', "permille", (10, 10), None, (1.0, 2.0, 4.0, 6.0)),
        ('{"x": 400, "y": 600, "width": -300, "height": -400}', "permille", (10, 10), None, (1.0, 2.0, 4.0, 6.0)),
        # auto: markup, then 0..1, then pixels of the processed image, then permille, then pixels of the image itself.
        ("<box>(100,100),(500,500)</box>", "auto", (100, 200), (112, 140), (20.0, 10.0, 100.0, 50.0)),
        ("<|box_start|>(100,100),(500,500)<|box_end|>", "auto", (100, 200), (112, 140), (20.0, 10.0, 100.0, 50.0)),
        ("[0.5, 0, 1, 1]", "auto", (100, 200), (112, 140), (100.0, 0.0, 200.0, 100.0)),
        ("[14, 28, 70, 56]", "auto", (100, 200), (112, 140), (20.0, 25.0, 100.0, 50.0)),
        ("[100, 100, 500, 1000]", "auto", (100, 200), None, (20.0, 10.0, 100.0, 100.0)),
        ("[100, 100, 500, 1001]", "auto", (2000, 2000), None, (100.0, 100.0, 500.0, 1001.0)),
        ("[0, 0, 2, 2]", "auto", (1000, 2000), None, (0.0, 0.0, 4.0, 2.0)),
        ('{"x": 0.75, "y": 0.5, "w": 0.25, "h": 1}', "auto", (100, 200), None, (150.0, 50.0, 200.0, 100.0)),
        # Numbers that belong to no box do not sway it.
        ("In 2024, 3 dogs: [0.5, 0, 1, 1], [1, 2, 3] (1200)", "auto", (100, 200), None, (100.0, 0.0, 200.0, 100.0)),
        ("[5000, 0, nan, 1] [0.5, 0, 1, 1]", "auto", (100, 200), None, (100.0, 0.0, 200.0, 100.0)),
    ],
)
def test_conventions_on_concrete_texts(
    text: str, convention: str, size: tuple[int, int], seen: tuple[int, int] | None, expected: Box
) -> None:
    assert parse_boxes(text, image_size=size, convention=convention, processed_size=seen) == [expected]


def test_auto_reads_one_text_in_one_convention() -> None:
    found = parse_boxes("[0, 0, 1, 1] and [100, 200, 500, 800]", image_size=IMAGE)
    assert found == [(0.0, 0.0, 0.64, 0.48), SOME]


def test_sizes_of_other_types() -> None:
    class Index:
        def __init__(self, value: int) -> None:
            self.value = value

        def __index__(self) -> int:
            return self.value

    sizes_like = [Index(480), Index(640)]  # as NumPy integers and integer tensors are
    assert parse_boxes("[0.1, 0.2, 0.5, 0.8]", image_size=sizes_like) == [SOME]  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ parse_boxes: any text


fragments = st.sampled_from(
    [
        *"[](){},:= \n\"'\\%+-.<>|/\u0663\u00b2\ud800\x00",
        *["x1", "y1", "x2", "y2", "x", "y", "width", "height", "top_left", "bottom_right", "bbox", "nan", "null"],
        *["0", "1", "0.25", ".5", "7", "800", "1200", "-3", "1e400", "1e308", "-1e308", "1e-320"],
        *["<box>", "</box>", "<|box_start|>", "[0.1,", "(1,2),", '{"x1":', "[1,2,3,4]", "(0,1),(1,0)"],
    ]
)
any_text = st.text() | st.lists(fragments, max_size=60).map("".join)


@given(any_text, any_size, st.sampled_from(boxes.CONVENTIONS), st.booleans())
@settings(max_examples=300, deadline=None)
def test_any_text_gives_only_valid_boxes(text: str, size: tuple[int, int], convention: str, with_seen: bool) -> None:
    seen = (224, 336) if with_seen or convention == "pixel" else None
    assert_valid(parse_boxes(text, image_size=size, convention=convention, processed_size=seen), size)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "]" * 100_000,
        "[]" * 50_000,
        "{" * 50_000 + "}" * 50_000,
        "1," * 50_000,
        "[1," * 30_000,
        "(1,2)," * 16_000,
        "1" * 100_000,
        "1 " * 50_000,
        "1." * 50_000,
        "1" + " " * 100_000,
        "1e" * 50_000,
        "-" * 100_000,
        "a-" * 50_000,
        "x" * 100_000 + ":",
        "x1:" * 30_000,
        "x1:1," * 20_000,
        '{"x1":' * 16_000,
        '"' * 100_000,
        "<box>" * 20_000,
        "nan" * 30_000,
    ],
    ids=lambda text: ascii(text[:6]),
)
def test_long_hostile_text_ends(text: str) -> None:
    assert parse_boxes(text, image_size=IMAGE) == []


def test_deep_and_many_boxes() -> None:
    deep = "[" * 1000 + "0.1, 0.2, 0.5, 0.8" + "]" * 1000
    assert parse_boxes(deep + " and [0, 0, 1, 1]", image_size=IMAGE) == [SOME, WHOLE]
    assert parse_boxes("[" * 1000 + "]" * 1000 + " 0.1, 0.2, 0.5, 0.8", image_size=IMAGE) == [SOME]
    assert parse_boxes("[0.1, 0.2, 0.5, 0.8], " * 5000, image_size=IMAGE) == [SOME] * 5000


# -------------------------------------------------------------------------------------------------- parse_boxes: errors


@pytest.mark.parametrize("text", [None, b"[0, 0, 1, 1]", 1, ["[0, 0, 1, 1]"]])
def test_text_must_be_a_string(text: Any) -> None:
    with pytest.raises(TypeError, match=rf"text must be a str.*got {type(text).__name__}\. Decode"):
        parse_boxes(text, image_size=IMAGE)


BAD_SIZES = [
    480,
    (),
    (480,),
    (480, 640, 3),
    (0, 640),
    (480, -1),
    (480.0, 640.0),
    (math.nan, 640),
    (math.inf, 640),
    ("480", "640"),
    "ab",
    (10**400, 640),
]


SIZE_ARGUMENTS: dict[str, Callable[[Any], object]] = {
    "image_size": lambda bad: parse_boxes("", image_size=bad),
    "processed_size": lambda bad: parse_boxes("", image_size=IMAGE, processed_size=bad),
    "image_size of expand_box": lambda bad: expand_box((0, 0, 1, 1), 1.0, bad),
}


@pytest.mark.parametrize("bad", BAD_SIZES, ids=lambda bad: repr(bad)[:20])
@pytest.mark.parametrize("argument", SIZE_ARGUMENTS)
def test_sizes_must_be_two_positive_integers(bad: Any, argument: str) -> None:
    with pytest.raises(ValueError, match=r"must be \(height, width\), two positive integers.*\. Pass ") as caught:
        SIZE_ARGUMENTS[argument](bad)
    assert str(caught.value).startswith(argument.split()[0])
    assert f"got {bad!r}" in str(caught.value)


@pytest.mark.parametrize("convention", ["", "Unit", "normalized", None, 1])
def test_unknown_convention_lists_the_known_ones(convention: Any) -> None:
    with pytest.raises(ValueError, match="convention must be one of") as caught:
        parse_boxes("", image_size=IMAGE, convention=convention)
    assert all(repr(known) in str(caught.value) for known in ("auto", *CONVENTIONS))
    assert f"got {convention!r}" in str(caught.value)


@pytest.mark.parametrize("text", ["", "[1, 2, 3, 4]"])
def test_pixel_needs_the_processed_size(text: str) -> None:
    with pytest.raises(ValueError, match=r"processed_size must be .* got None\. Pass"):
        parse_boxes(text, image_size=IMAGE, convention="pixel")


# ----------------------------------------------------------------------------------------------------------- expand_box


@pytest.mark.parametrize(
    ("box", "factor", "square", "expected"),
    [
        ((100, 100, 200, 150), 1.0, False, (100.0, 100.0, 200.0, 150.0)),
        ((100, 100, 200, 150), 2, False, (50.0, 75.0, 250.0, 175.0)),
        ((100, 100, 200, 150), 0.5, False, (125.0, 112.5, 175.0, 137.5)),
        ((100, 100, 200, 150), 2, True, (50.0, 25.0, 250.0, 225.0)),
        ((100, 100, 150, 200), 1, True, (75.0, 100.0, 175.0, 200.0)),
        # Moved, not clamped: the size stays what it would have been.
        ((0, 100, 100, 150), 2, False, (0.0, 75.0, 200.0, 175.0)),
        ((540, 100, 640, 150), 2, False, (440.0, 75.0, 640.0, 175.0)),
        ((100, 0, 200, 50), 2, False, (50.0, 0.0, 250.0, 100.0)),
        ((100, 430, 200, 480), 2, False, (50.0, 380.0, 250.0, 480.0)),
        ((0, 0, 100, 50), 1, True, (0.0, 0.0, 100.0, 100.0)),
        # Larger than the image along one axis, or both.
        ((100, 100, 500, 200), 2, False, (0.0, 50.0, 640.0, 250.0)),
        ((10, 10, 630, 470), 1.3, False, WHOLE),
        ((100, 100, 200, 150), 1e300, False, WHOLE),
        ((-1e308, -1e308, 1e308, 1e308), 1, False, WHOLE),
        # Sticking out of the image in part.
        ((-50, 100, 50, 200), 1, False, (0.0, 100.0, 100.0, 200.0)),
        ((600, 100, 700, 200), 1, False, (540.0, 100.0, 640.0, 200.0)),
        ((-100, 100, 10, 200), 0.5, False, (0.0, 125.0, 55.0, 175.0)),
    ],
)
def test_expand_box_on_concrete_boxes(box: Box, factor: float, square: bool, expected: Box) -> None:
    found = expand_box(box, factor, IMAGE, square=square)
    assert found == expected
    assert all(type(edge) is float for edge in found)


factors = st.floats(1e-6, 1e6) | st.floats(0.3, 4.0)
any_factor = st.floats(min_value=0, exclude_min=True, allow_infinity=False, allow_nan=False)
edges = st.floats(-1e4, 1e4) | st.floats(allow_infinity=False, allow_nan=False)


@given(st.tuples(edges, edges, edges, edges), any_factor, any_size, st.booleans())
@settings(max_examples=150, deadline=None)
@example((0.1, 0.1, 10.0, 10.0), 5e-324, (20, 20), False)
@example((0.1, 0.1, 0.3, 0.7), 1e-300, (20, 20), True)
@example((1e-20, 0.0, 20.0, 20.0), 1.0, (20, 20), False)
def test_expanded_box_is_always_inside(corners: Box, factor: float, size: tuple[int, int], square: bool) -> None:
    height, width = size
    (x0, x1), (y0, y1) = sorted(corners[::2]), sorted(corners[1::2])
    assume(x0 < x1 and y0 < y1 and x0 < width and x1 > 0 and y0 < height and y1 > 0)
    left, top, right, bottom = expand_box((x0, y0, x1, y1), factor, size, square=square)
    assert 0 <= left <= right <= width
    assert 0 <= top <= bottom <= height


@given(st.data(), sizes)
@settings(max_examples=80, deadline=None)
@example(None, (20, 20))
def test_factor_one_returns_an_inside_box_to_the_bit(data: st.DataObject | None, size: tuple[int, int]) -> None:
    box = (1e-20, 0.1, 20.0, 0.30000000000000004) if data is None else data.draw(inside_boxes(size))
    assert expand_box(box, 1.0, size) == box
    assert expand_box(list(box), 1, list(size)) == box


@given(st.data(), sizes, factors, st.booleans())
@settings(max_examples=120, deadline=None)
def test_expand_box_size_centre_and_least_move(
    data: st.DataObject, size: tuple[int, int], factor: float, square: bool
) -> None:
    box = data.draw(inside_boxes(size))
    found = expand_box(box, factor, size, square=square)
    spans = (box[2] - box[0], box[3] - box[1])
    for axis, limit in enumerate((size[1], size[0])):
        side = (max(spans) if square else spans[axis]) * factor
        low, high = found[axis], found[axis + 2]
        if side >= limit:
            assert low <= 1e-9 * limit
            assert high >= limit * (1 - 1e-9)
            continue
        assert high - low == pytest.approx(side, abs=1e-9 * limit)
        centre = (box[axis] + box[axis + 2]) / 2
        if centre - side / 2 > 0 and centre + side / 2 < limit:
            assert (low + high) / 2 == pytest.approx(centre, abs=1e-9 * limit)
        else:  # moved no farther than to the border that it left
            border = 0 if centre < limit / 2 else limit
            assert min(abs(low - border), abs(high - border)) <= 1e-9 * limit


@given(st.data(), sizes, factors)
@settings(max_examples=80, deadline=None)
def test_square_is_a_square_where_it_fits(data: st.DataObject, size: tuple[int, int], factor: float) -> None:
    box = data.draw(inside_boxes(size))
    side = max(box[2] - box[0], box[3] - box[1]) * factor
    assume(side < min(size))
    x0, y0, x1, y1 = expand_box(box, factor, size, square=True)
    assert x1 - x0 == pytest.approx(y1 - y0, abs=1e-9 * max(size))
    assert x1 - x0 == pytest.approx(side, abs=1e-9 * max(size))


@given(st.data(), sizes, factors, factors, st.booleans())
@settings(max_examples=80, deadline=None)
def test_a_larger_factor_gives_a_box_around_the_smaller_one(
    data: st.DataObject, size: tuple[int, int], one: float, other: float, square: bool
) -> None:
    box = data.draw(inside_boxes(size))
    small, large = (expand_box(box, factor, size, square=square) for factor in sorted((one, other)))
    slack = 1e-9 * max(size)
    assert large[0] <= small[0] + slack
    assert large[1] <= small[1] + slack
    assert large[2] >= small[2] - slack
    assert large[3] >= small[3] - slack


BAD_FACTORS = [0, -1.3, math.nan, math.inf, None, "1.3", 10**400, [1, 2]]


@pytest.mark.parametrize("factor", BAD_FACTORS, ids=lambda factor: repr(factor)[:20])
def test_factor_must_be_positive_and_finite(factor: Any) -> None:
    with pytest.raises(ValueError, match=r"factor must be a positive finite number; got .*\. Pass") as caught:
        expand_box((0, 0, 1, 1), factor, IMAGE)
    assert repr(factor) in str(caught.value)


@pytest.mark.parametrize(
    "box",
    [
        None,
        1.0,
        "1234",
        ("0", "0", "1", "1"),
        (),
        (0, 0, 1),
        (0, 0, 1, 1, 1),
        ((0, 0), (1, 1)),
        (0, 0, math.nan, 1),
        (0, 0, math.inf, 1),
        (-math.inf, 0, 1, 1),
        (0, 0, 10**400, 1),
        (2, 0, 1, 1),
        (0, 2, 1, 1),
        (1, 0, 1, 1),
        (0, 1, 1, 1),
    ],
    ids=lambda box: repr(box)[:20],
)
def test_box_must_be_four_ordered_numbers(box: Any) -> None:
    with pytest.raises(ValueError, match=r"box must be four finite numbers .* with x0 < x1 and y0 < y1") as caught:
        expand_box(box, 1.0, IMAGE)
    assert f"got {box!r}. Pass" in str(caught.value)


@pytest.mark.parametrize(
    "box",
    [(-10, 0, 0, 10), (0, -10, 10, 0), (640, 0, 650, 10), (0, 480, 10, 490), (500, 500, 600, 600)],
)
def test_box_must_overlap_the_image(box: Any) -> None:
    with pytest.raises(ValueError, match="box must overlap the image, x from 0 to 640 and y from 0 to 480") as caught:
        expand_box(box, 1.0, IMAGE)
    assert f"got {box!r}. Pass" in str(caught.value)


# ----------------------------------------------------------------------------------------------------------- the module


def test_examples_in_the_docstrings() -> None:
    result = doctest.testmod(boxes)
    assert result.attempted >= 4
    assert result.failed == 0


def test_module_imports_without_torch_and_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torch", "numpy"):
        monkeypatch.setitem(sys.modules, name, None)  # an import of it raises now
    assert boxes.__file__ is not None
    spec = importlib.util.spec_from_file_location("boxes_alone", boxes.__file__)
    assert spec is not None
    assert spec.loader is not None
    alone = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "boxes_alone", alone)
    spec.loader.exec_module(alone)
    assert alone.parse_boxes("[0.1, 0.2, 0.5, 0.8]", image_size=IMAGE) == [SOME]
