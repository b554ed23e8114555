"""Boxes as text, read back."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finegrain_ops.boxes import parse_boxes
from finegrain_ops.training.box_text import box_text

CONVENTIONS = {"unit": 2, "unit_padded": 3, "permille": 0, "pixel": 0}
sizes = st.tuples(st.integers(1, 3000), st.integers(1, 3000))


@st.composite
def boxes_in(draw, size: tuple[int, int]):
    edges = []
    for side in size[::-1]:
        low = draw(st.floats(0, side, exclude_max=True))
        edges.append((low, draw(st.floats(low, side, exclude_min=True))))
    (x0, x1), (y0, y1) = edges
    return x0, y0, x1, y1


@given(st.data(), sizes, sizes, st.sampled_from(list(CONVENTIONS)))
@settings(deadline=None, max_examples=300)
def test_parse_boxes_reads_it_back_to_half_a_step(data, size, seen, convention: str) -> None:
    box = data.draw(boxes_in(size))
    decimals = data.draw(st.none() | st.integers(0, 6)) if convention != "unit" else None
    text = box_text(box, size, convention, decimals=decimals, processed_size=seen)
    step = 10.0 ** -(CONVENTIONS[convention] if decimals is None else decimals)
    height, width = size
    longest = max(size)
    span = {"unit": 1, "unit_padded": 1, "permille": 1000}.get(convention)
    per_step = []  # pixels of the original image
    for side, processed in ((width, seen[1]), (height, seen[0])):
        per_step.append(step * (longest if convention == "unit_padded" else side) / (span or processed))
    found = parse_boxes(text, image_size=size, convention=convention, processed_size=seen)
    if all(steps <= 0.5 * side for steps, side in zip(per_step, (width, height))):
        (read,) = found
        for k, (got, expected) in enumerate(zip(read, box)):
            # A box thinner than a step is drawn to one.
            thin = (box[2 + k % 2] - box[k % 2]) < per_step[k % 2]
            assert abs(got - expected) <= per_step[k % 2] * (1.5 if thin else 0.5) + 1e-6 * longest


def test_values_written_out() -> None:
    box, size = (10, 20, 30, 40), (60, 80)
    assert box_text(box, size) == "[0.12, 0.33, 0.38, 0.67]"  # 0.125 and 0.375 to even
    assert box_text(box, size, decimals=3) == "[0.125, 0.333, 0.375, 0.667]"
    assert box_text(box, size, "unit_padded") == "[0.125, 0.375, 0.375, 0.625]"
    assert box_text(box, size, "permille") == "[125, 333, 375, 667]"
    assert box_text(box, size, "pixel", processed_size=(56, 84)) == "[10, 19, 32, 37]"
    assert box_text((-5, 0, 500, 60), size) == "[0.00, 0.00, 1.00, 1.00]"
    assert box_text((0, 0, 80, 60), (60, 80), "unit_padded") == "[0.000, 0.125, 1.000, 0.875]"


def test_no_box_is_empty() -> None:
    assert box_text((40, 30, 40.1, 30.1), (60, 80)) == "[0.50, 0.50, 0.51, 0.51]"
    assert box_text((79.9, 59.9, 80, 60), (60, 80)) == "[0.99, 0.99, 1.00, 1.00]"
    assert box_text((0, 0, 0.1, 0.1), (60, 80), "pixel", processed_size=(1, 1)) == "[0, 0, 1, 1]"
    text = box_text((0, 39.9, 20, 40), (40, 60), "unit_padded", decimals=2)
    assert text == f"[0.00, {float(Fraction(49, 60)) - 0.006666:.2f}, 0.33, 0.83]".replace("0.81", "0.82")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((0, 0, 1, 1), (4, 4), "auto"), "convention: expected one of 'unit', 'unit_padded', 'permille', 'pixel'"),
        (((0, 0, 1, 1), (4, 4), "pixel"), "processed_size: expected"),
        (((1, 1, 1, 2), (4, 4)), "box"),
        (((9, 9, 10, 10), (4, 4)), "box"),
        (((0, 0, 1, 1), (0, 4)), "image_size"),
    ],
)
def test_arguments(arguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        box_text(*arguments)
