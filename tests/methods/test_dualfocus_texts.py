"""DualFocus where the model is free to write a box, and writes anything."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finegrain_ops import DualFocus
from finegrain_ops.boxes import parse_boxes
from talking_llava import IMAGE, PAD, make_images, saying

SHORT = {"max_new_tokens": 6, "suppress_tokens": [IMAGE, PAD]}


def saying_a_box(model, processor, text: str) -> DualFocus:
    return DualFocus(model, processor, constrained=False, grounding_generation=saying([text]))


NO_BOX = ["", "no", "[0.5, 0.5, 0.5, 0.9]", "[0.2, 0.3, 0.4", "[nan, 0, 1, 1]", "[1e309, 0, 1, 1]", "[[[[", '{"x": ["']


@pytest.mark.parametrize("text", NO_BOX)
def test_texts_without_a_box_of_any_area(model, processor, text: str) -> None:
    result = saying_a_box(model, processor, text).answer(make_images(1)[0], "Why?", **SHORT)
    assert (result.reason, result.box, result.grounding_text) == ("no_box", None, text)


@settings(max_examples=15, deadline=None)
@given(text=st.text(st.characters(codec="ascii"), max_size=40))
def test_no_text_of_a_box_raises(model, processor, text: str) -> None:
    result = saying_a_box(model, processor, text).answer(make_images(1)[0], "Why?", max_new_tokens=1)
    found = parse_boxes(result.grounding_text, image_size=(60, 80), convention="unit")
    has_area = bool(found) and found[0][0] < found[0][2] and found[0][1] < found[0][3]
    assert (result.micro is not None) == has_area
