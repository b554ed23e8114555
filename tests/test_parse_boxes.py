"""`parse_boxes`: every look of a box, every convention, any text; and that the module stands alone."""

from __future__ import annotations

import doctest
import importlib.util
import math
import sys
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("hypothesis", reason="hypothesis draws the boxes")
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from box_strategies import (
    CONVENTIONS,
    IMAGE,
    SHAPES,
    WHOLE,
    any_size,
    assert_near,
    assert_valid,
    conventions,
    inside_boxes,
    shapes,
    sizes,
    tolerances,
    written,
)
from finegrain_ops import boxes
from finegrain_ops.boxes import Box, expand_box, parse_boxes

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
