"""`expand_box`: scaled about the centre, moved back inside, never outside."""

from __future__ import annotations

import math
from typing import Any

import pytest

pytest.importorskip("hypothesis", reason="hypothesis draws the boxes")
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from box_strategies import (
    IMAGE,
    WHOLE,
    any_size,
    inside_boxes,
    sizes,
)
from finegrain_ops.boxes import Box, expand_box

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
