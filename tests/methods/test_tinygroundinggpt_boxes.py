"""Methods on TinyGroundingGPT: CoF with its boxes of three decimals; DualFocus, which it is no base of, refuses it."""

from __future__ import annotations

import re

import numpy as np
import pytest
from PIL import Image

import tiny_tinygroundinggpt
from finegrain_ops import CoF, DualFocus, UnsupportedInputError
from finegrain_ops.boxes import parse_boxes
from tiny_tinygroundinggpt import make_model, make_processor

SIZES = [(40, 64), (48, 48), (90, 30)]  # height, width
QUESTIONS = ["What is it?", "And which one of these?", "Why?"]


def make_images() -> list[Image.Image]:
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in SIZES]


@pytest.mark.parametrize("rows", ["all", "after_image"])
def test_a_constrained_box_is_in_its_own_format(rows: str) -> None:
    """Whose tokenizer has numbers of five characters beside single ones; and the answer is that of this box."""
    model, processor = make_model(), make_processor()
    options = {"weight": 40.0, "rows": rows, "on_missing_box": "plain"}
    cof = CoF(model, processor, constrained=True, **options)
    short = {"max_new_tokens": 5, "suppress_tokens": [*range(len(tiny_tinygroundinggpt.SPECIAL))]}
    results = cof.answer_batch(make_images(), QUESTIONS, **short)
    number = r"(?:0\.\d{3}|1\.000)"
    for image, question, size, result in zip(make_images(), QUESTIONS, SIZES, results):
        assert re.fullmatch(rf"\[{number}, {number}, {number}, {number}\]", result.grounding_text)
        boxes = parse_boxes(result.grounding_text, image_size=size, convention="unit_padded")
        assert [result.box] == boxes or result.box is None  # all of it may be in the padding
        alone = CoF(model, processor, constrained=True, **options).answer(image, question, **short)
        assert (alone.grounding_text, alone.text) == (result.grounding_text, result.text)
        given = CoF(model, processor, **options).answer(image, question, boxes=boxes or None, **short)
        if result.box is not None:
            assert given.text == result.text
            assert given.perplexity == pytest.approx(result.perplexity, rel=1e-4)


def test_dualfocus_refuses_it() -> None:
    with pytest.raises(UnsupportedInputError, match="processor: expected one with an image processor of"):
        DualFocus(make_model(), make_processor())
