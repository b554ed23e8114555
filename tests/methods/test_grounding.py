"""From a model's text to a box of the image, through the image processor's steps."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finegrain_ops import families
from finegrain_ops.boxes import parse_boxes
from finegrain_ops.methods.grounding import first_box, region_around

SIZES = st.tuples(st.integers(20, 2000), st.integers(20, 2000))
SHARES = st.tuples(*[st.integers(0, 100)] * 4).filter(lambda box: box[0] < box[2] and box[1] < box[3])


def text_of(shares: tuple[int, ...]) -> str:
    return "It is at [{}].".format(", ".join(str(share / 100) for share in shares))


@given(SIZES, SHARES)
def test_the_view_of_a_padded_image_is_the_padded_square(size: tuple[int, int], shares: tuple[int, ...]) -> None:
    text, grid = text_of(shares), families.llava(size, do_pad=True)
    boxes = parse_boxes(text, image_size=size, convention="unit_padded")
    seen = first_box(text, size, "unit_view", [grid])
    assert (seen is None) == (not boxes)
    if boxes:
        assert seen == pytest.approx(boxes[0], abs=1e-9 * max(size))


@given(SIZES, SHARES)
def test_the_view_of_a_squashed_image_is_all_of_it(size: tuple[int, int], shares: tuple[int, ...]) -> None:
    expected = first_box(text_of(shares), size, "unit", [families.instructblip(size)])
    seen = first_box(text_of(shares), size, "unit_view", [families.instructblip(size)])
    assert seen == pytest.approx(expected, abs=1e-9 * max(size))


def test_the_view_of_a_centre_crop_is_the_crop() -> None:
    grid = families.llava((400, 600))  # of which columns 100 to 500 are seen
    assert first_box("[0, 0, 1, 1]", (400, 600), "unit_view", [grid]) == (100, 0, 500, 400)
    assert first_box("[0.25, 0.5, 0.5, 0.75]", (400, 600), "unit_view", [grid]) == (200, 200, 300, 300)
    assert first_box("[0.25, 0.5, 0.5, 0.75]", (400, 600), "unit", [grid]) == (150, 200, 300, 300)


def test_a_box_of_padding_alone_is_none() -> None:
    """And the next one counts."""
    grid = families.llava((100, 400), do_pad=True)
    assert first_box("[0, 0, 1, 0.2]", (100, 400), "unit_view", [grid]) is None
    assert first_box("[0, 0, 1, 0.2] or [0, 0.5, 1, 1]", (100, 400), "unit_view", [grid]) == (0, 50, 400, 100)


@given(st.text(), st.sampled_from(["unit", "unit_view", "unit_padded", "permille", "pixel", "auto"]))
def test_no_text_raises(text: str, convention: str) -> None:
    box = first_box(text + " [1e309, nan, 0.5, ", (300, 400), convention, [families.qwen2_vl((300, 400))])
    if box is not None:
        assert 0 <= box[0] < box[2] <= 400
        assert 0 <= box[1] < box[3] <= 300


def test_a_region_that_is_cropped_away_is_none() -> None:
    grid = families.llava((400, 600))
    assert region_around((0, 0, 60, 400), 1.0, (400, 600), [grid]) is None
    assert region_around((0, 0, 60, 400), 2.0, (400, 600), [grid]) == (0, 0, 120, 400)
