"""Boxes as models write them, and what is drawn and asserted in the tests of boxes."""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

from hypothesis import strategies as st

from finegrain_ops.boxes import Box

IMAGE = (480, 640)
WHOLE = (0.0, 0.0, 640.0, 480.0)
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
