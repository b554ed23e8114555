"""CoF whose first pass writes by the grammar: there is a box, of the family's format, and the answer is that box's."""

from __future__ import annotations

from typing import Any

import pytest

import spelling_models
import talking_llava
import tiny_qformer
from finegrain_ops import CoF, UnsupportedModelError, families
from finegrain_ops.methods import cof as cof_module
from finegrain_ops.methods.box_grammar import JSON, LIST, MARKUP, BoxGrammar
from finegrain_ops.methods.grounding import as_fractions, first_box, image_grids
from finegrain_ops.methods.reuse import ImagePrefix
from spelling_models import FAMILIES

QUESTIONS = ["What is it?", "And which one of these?", "Why?"]
SIX = {"max_new_tokens": 6, "min_new_tokens": 6}
WEIGHT = 40.0  # or a lost bias would not be seen
WRITTEN = {"LLaVA-1.5": LIST, "LLaVA-NeXT": LIST, "Qwen2-VL": MARKUP, "Qwen2.5-VL": JSON, "Qwen3-VL": JSON}


@pytest.fixture(scope="module")
def models() -> dict:
    return {}


@pytest.fixture(params=[*FAMILIES, "talking"])
def family(request) -> str:
    return request.param


@pytest.fixture
def parts(family: str, models: dict) -> tuple[Any, Any]:
    """Model and processor."""
    if family not in models:
        if family == "talking":
            models[family] = talking_llava.make_model(), talking_llava.make_processor()
        else:
            models[family] = spelling_models.make_model(family), spelling_models.make_processor(family)
    return models[family]


@pytest.mark.parametrize("rows", ["all", "after_image"])
def test_there_is_a_box_and_the_answer_is_that_boxs(family: str, parts, rows: str, monkeypatch) -> None:
    model, processor = parts
    images = spelling_models.make_images(3)
    sizes = [image.size[::-1] for image in images]
    prefixes = []
    prefill = ImagePrefix.prefill
    monkeypatch.setattr(ImagePrefix, "prefill", lambda *a, **kw: prefixes.append(prefill(*a, **kw)) or prefixes[-1])
    grounded = []
    write = cof_module.write_boxes
    monkeypatch.setattr(
        cof_module,
        "write_boxes",
        lambda model, inputs, vocabulary, grammars, prefix=None: (
            grounded.append((inputs, grammars, prefix)) or write(model, inputs, vocabulary, grammars, prefix)
        ),
    )
    cof = CoF(model, processor, constrained=True, rows=rows, weight=WEIGHT)
    results = cof.answer_batch(images, QUESTIONS, **SIX)
    ((inputs, grammars, prefix),) = grounded
    assert (prefix is not None) == (rows == "after_image") == bool(prefixes)
    convention = cof._box_style.convention
    grids = image_grids(model, processor, inputs, sizes)
    for i, (result, grammar) in enumerate(zip(results, grammars)):
        whole = as_fractions((0, 0, *images[i].size), sizes[i], convention, grids[i])
        assert grammar == BoxGrammar.of_image(WRITTEN.get(family, LIST), convention, grids[i]).covering(whole)
        assert grammar.start().after(result.grounding_text).is_complete
        assert result.box == first_box(result.grounding_text, sizes[i], convention, grids[i])
        assert result.box is not None
    assert len({result.grounding_text for result in results}) > 1
    given = CoF(model, processor, rows=rows, weight=WEIGHT)
    expected = given.answer_batch(images, QUESTIONS, boxes=[result.box for result in results], **SIX)
    for result, of_box in zip(results, expected):
        assert (result.text, result.regions) == (of_box.text, of_box.regions)
        assert result.perplexity == pytest.approx(of_box.perplexity, rel=1e-4)
    (alone,) = CoF(model, processor, constrained=True, weight=WEIGHT).answer_batch(images[1:2], QUESTIONS[1:2], **SIX)
    assert alone.grounding_text == results[1].grounding_text  # which is not biased, with or without a prefix
    if rows == "all":
        assert alone.text == results[1].text
    assert not talking_llava.traces(model)


def test_boxes_are_never_of_padding() -> None:
    """A padded square has more in it than the image, but no box lies there, however much the model would like it to."""
    model, processor = talking_llava.make_model(), talking_llava.make_processor()
    image = talking_llava.make_images(2)[1]  # twice as high as wide: x of 0 to 0.25 and of 0.75 to 1 is padding
    bias = model.lm_head.weight.new_zeros(model.lm_head.weight.shape[0])
    for text, value in (("0", 60.0), ("1", 30.0)):
        bias[processor.tokenizer.encode(text, add_special_tokens=False)] += value
    hook = model.lm_head.register_forward_hook(lambda _, __, logits: logits + bias)
    result = CoF(model, processor, constrained=True, box_convention="unit_padded").answer(image, "What?", **SIX)
    hook.remove()
    x0, y0, x1, y1 = (float(number) for number in result.grounding_text.strip("[]").split(", "))
    assert 0.25 <= x0 < x1 <= 0.75
    assert (y0, y1) == (0.00, 0.01)
    assert first_box(result.grounding_text, image.size[::-1], "unit_padded", [families.llava(image.size[::-1])])


def test_models_whose_prompts_hold_no_image_are_refused() -> None:
    model = tiny_qformer.make_model("instructblip")
    processor = tiny_qformer.make_processor(model)
    with pytest.raises(UnsupportedModelError, match="model_type 'instructblip'"):
        CoF(model, processor, constrained=True)
    assert not talking_llava.traces(model)


def test_a_constrained_pass_takes_no_settings() -> None:
    model, processor = talking_llava.make_model(), talking_llava.make_processor()
    with pytest.raises(ValueError, match="grounding_generation: expected None with constrained=True"):
        CoF(model, processor, constrained=True, grounding_generation={"do_sample": True})
    with pytest.raises(ValueError, match="grounding_generation: expected None"):
        CoF(model, processor, constrained=True, grounding_generation={})
    with pytest.raises(TypeError, match="constrained: expected True or False"):
        CoF(model, processor, constrained="yes")
