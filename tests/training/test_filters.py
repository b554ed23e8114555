"""The filters against loops over boxes, one at a time."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finegrain_ops.training import filters

edges = st.integers(0, 12).map(float) | st.floats(0, 12, allow_subnormal=False)
boxes_of_any_shape = st.tuples(edges, edges, edges, edges).map(
    lambda b: (min(b[0], b[2]), min(b[1], b[3]), max(b[0], b[2]), max(b[1], b[3]))
)
grouped = st.lists(st.tuples(boxes_of_any_shape, st.integers(0, 4)), max_size=24)


def area(box) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def iou(a, b) -> float:
    shared = area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    either = area(a) + area(b) - shared
    return shared / either if either > 0 else 0.0


@given(grouped)
@settings(deadline=None, max_examples=200)
def test_overlap_within_groups_is_what_all_pairs_say(rows) -> None:
    boxes, group = [row[0] for row in rows], [row[1] for row in rows]
    smallest, largest = filters.group_iou(np.array(boxes, dtype=np.float64).reshape(-1, 4), group, 6)
    kept = filters.overlap_mask(torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4), group, 6, largest=0.25)
    for g in range(6):
        pairs = [iou(a, b) for a, b in itertools.combinations([b for b, h in rows if h == g], 2)]
        assert smallest[g].item() == pytest.approx(min(pairs, default=1.0), abs=1e-12)
        assert largest[g].item() == pytest.approx(max(pairs, default=0.0), abs=1e-12)
        if all(abs(pair - 0.25) > 1e-9 for pair in pairs):
            assert bool(kept[g]) == all(pair <= 0.25 for pair in pairs)


@given(grouped, st.integers(1, 3))
@settings(deadline=None)
def test_categories_with_several_objects_in_their_image(rows, num_images: int) -> None:
    boxes, category = [row[0] for row in rows], [row[1] for row in rows]
    image = [i % num_images for i in range(len(rows))]
    mask = filters.repeated_mask(torch.tensor(boxes).reshape(-1, 4), image, category, same=0.5)
    assert mask.shape == (len(rows),)
    for i in range(len(rows)):
        those = [boxes[k] for k in range(len(rows)) if (image[k], category[k]) == (image[i], category[i])]
        overlaps = [iou(a, b) for a, b in itertools.combinations(those, 2)]
        if all(abs(overlap - 0.5) > 1e-4 for overlap in overlaps):  # the boxes were rounded to float32
            assert bool(mask[i]) == any(overlap < 0.5 for overlap in overlaps)


@given(st.lists(boxes_of_any_shape, max_size=9), st.integers(1, 30), st.integers(1, 30))
@settings(deadline=None)
def test_the_share_of_an_image_that_a_box_takes(boxes, height: int, width: int) -> None:
    share = filters.area_share(np.array(boxes, dtype=np.float64).reshape(-1, 4), (height, width))
    assert share.tolist() == pytest.approx([area(box) / (height * width) for box in boxes])
    sizes = torch.tensor([[height, width]] * len(boxes)).reshape(-1, 2)
    assert torch.equal(filters.area_share(torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4), sizes), share)


def test_areas_on_the_limits_are_kept() -> None:
    boxes = [[0, 0, 10, 10], [0, 0, 10, 9.99], [0, 0, 100, 50], [0, 0, 100, 50.01], [5, 5, 5, 50]]
    assert filters.area_mask(boxes, (100, 100)).tolist() == [True, False, True, False, False]
    assert filters.area_mask(boxes, (100, 100), smallest=0, largest=1).all()
    sizes = [[100, 100], [10, 10], [1000, 1000], [100, 101], [1, 1]]
    assert filters.area_mask(boxes, sizes, largest=1.0).tolist() == [True, True, False, True, False]


def test_confidence_and_number_of_boxes() -> None:
    assert filters.confidence_mask([0.34, 0.35, math.nan, 1.0]).tolist() == [False, True, False, True]
    assert filters.confidence_mask(np.array([0.34, 0.5], dtype=np.float32), lowest=0.3).tolist() == [True, True]
    assert filters.confidence_mask([]).tolist() == []
    group = [4, 0, 0, 2, 0, 2, 0]
    assert filters.box_count_mask(group, 5).tolist() == [False, True, True, True, True]
    assert filters.box_count_mask(group, 5, most=1).tolist() == [False, True, False, True, True]


def test_nothing_at_all() -> None:
    assert filters.overlap_mask([], [], 3).tolist() == [True] * 3
    assert filters.overlap_mask([], [], 0).shape == (0,)
    assert filters.repeated_mask([], [], []).shape == (0,)
    assert filters.area_mask([], (4, 4)).shape == (0,)
    assert filters.box_count_mask([], 2).tolist() == [True, True]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: filters.overlap_mask([[0, 0, 1, 1]], [2], 2), r"group: expected 0 to 1, got values from 2 to 2"),
        (lambda: filters.overlap_mask([[0, 0, 1, 1]], [-1], 2), r"group: expected 0 to 1, got values from -1 to -1"),
        (lambda: filters.overlap_mask([[0, 0, 1, 1]], [0, 1], 2), r"group: expected shape \(1,\), got list \[0, 1\]"),
        (lambda: filters.overlap_mask([[0, 0, 1, 1]], [0.0], 2), "group: expected integers, got list"),
        (lambda: filters.repeated_mask([[0, 0, 1, 1]], [0], [[0]]), r"category: expected shape \(1,\)"),
        (
            lambda: filters.area_share([[0, 0, 1, 1]], [[1, 2], [3, 4]]),
            r"image_sizes: expected \(height, width\), or 1",
        ),
        (lambda: filters.area_mask([], (1, 1), smallest=0.6), "largest: expected a finite number >= smallest, got 0.5"),
        (lambda: filters.area_mask([], (1, 1), smallest=-1), "smallest: expected"),
        (lambda: filters.box_count_mask([0], 1, most=-1), "most: expected an integer >= 0"),
    ],
)
def test_arguments(call, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def test_a_hundred_thousand_questions_at_once() -> None:
    """Three object images each."""
    generator = torch.Generator().manual_seed(0)
    low = torch.rand(300_000, 2, generator=generator) * 100
    boxes = torch.cat([low, low + torch.rand(300_000, 2, generator=generator) * 100], dim=1)
    group = torch.randperm(300_000, generator=generator) % 100_000
    kept = filters.overlap_mask(boxes, group, 100_000)
    for g in (0, 7, 99_999):
        of_group = boxes[group == g].double().tolist()
        assert len(of_group) == 3
        assert bool(kept[g]) == all(iou(a, b) <= 0.3 for a, b in itertools.combinations(of_group, 2))
