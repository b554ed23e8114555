"""CoF end to end on a tiny LLaVA that is made to write its boxes: the answer is that of generate with the bias of the
box, made by hand.
"""

from __future__ import annotations

import json
import math
import warnings

import pytest
import skimage.data
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import finegrain_ops
from finegrain_ops import CoF
from finegrain_ops.boxes import expand_box, parse_boxes
from finegrain_ops.methods import cof as module
from finegrain_ops.methods.cof import MissingBoxError
from finegrain_ops.methods.generation import Answers
from finegrain_ops.methods.grounding import STRICT_GROUNDING_PROMPT
from talking_llava import EOS, GRID, IMAGE, PAD, count_calls, make_images, make_processor, saying, traces

QUESTIONS = ["What is it?", "And which one of these?", "Why?"]
WEIGHT = 30.0  # enough to change what is said
SHORT = {"max_new_tokens": 8, "suppress_tokens": [IMAGE, PAD]}
BOX = "[0.3, 0.2, 0.6, 0.7]"
NO_BOX = "I do not know"


def make(model, processor, *grounding: list[str], **options) -> CoF:
    """Grounding calls of generate write these texts."""
    options = {"weight": WEIGHT, "grounding_tokens": 80, "box_convention": "unit", **options}
    if grounding:
        options["grounding_generation"] = saying(*grounding)
    return CoF(model, processor, **options)


def by_hand(model, processor, boxes, images=None, questions=QUESTIONS, *, plain=False, rows="all", **options):
    """Texts and tokens of the answers with these regions of interest, by transformers' own means and a key_bias."""
    images = make_images(len(questions)) if images is None else images
    prompts = [f"USER: <image>\n{question} ASSISTANT:" for question in questions]
    inputs = processor(images=images, text=prompts, padding=True, padding_side="left", return_tensors="pt")
    options, arguments = {"weight": WEIGHT, **options}, {}
    with finegrain_ops.patch(model, processor) as handle:
        if boxes == "all":
            is_image = (inputs["input_ids"] == IMAGE).float()
            arguments["key_bias"] = math.log(options["weight"]) * is_image
        elif not plain:
            sizes = [image.size[::-1] for image in images]
            arguments["key_bias"] = handle.key_bias(inputs, boxes, sizes, **options)
        if rows != "all":
            arguments["row_gate"] = handle.row_gate(inputs, rows)
        tokens = model.generate(**inputs, **arguments, **SHORT, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    return [processor.tokenizer.decode(row, skip_special_tokens=True).strip() for row in tokens]


def regions_of(text: str, images, factor: float = 1.3, square: bool = False):
    sizes = [image.size[::-1] for image in images]
    boxes = [parse_boxes(text, image_size=size, convention="unit")[0] for size in sizes]
    return boxes, [expand_box(box, factor, size, square=square) for box, size in zip(boxes, sizes)]


OPTIONS = {
    "defaults": {},
    "alpha 2, squared": {"expand": 2.0, "square": True},
    "soft": {"soft": True},
    "after the image": {"rows": "after_image"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_answer_is_generate_with_the_bias_made_by_hand(model, processor, options: dict) -> None:
    images = make_images(3)
    results = make(model, processor, [f'{{"bbox": {BOX}}}'] * 3, **options).answer_batch(images, QUESTIONS, **SHORT)
    boxes, regions = regions_of(BOX, images, options.get("expand", 1.3), options.get("square", False))
    passed_on = {name: options[name] for name in ("soft", "rows") if name in options}
    expected = by_hand(model, processor, [[region] for region in regions], **passed_on)
    assert [result.text for result in results] == expected
    assert [result.box for result in results] == boxes
    assert [result.regions for result in results] == [(region,) for region in regions]
    assert {result.grounding_text for result in results} == {f'{{"bbox": {BOX}}}'}
    assert {result.chosen for result in results} == {"cof"}
    assert expected != by_hand(model, processor, None, plain=True)  # the bias matters here


def test_the_first_pass_asks_the_papers_question(model, processor, monkeypatch) -> None:
    seen = []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda **kw: seen.append(kw["input_ids"]) or generate(**kw), raising=False)
    make(model, processor, [BOX]).answer(make_images(1)[0], "What is it?", **SHORT)
    grounding, answer = (processor.tokenizer.decode(ids[0]).replace("<image>", "") for ids in seen)
    assert grounding == (
        "<s>USER: \nWhat is it?\nAccording to the information in the image and the question, detail the bounding box "
        "of the region in the image that contains the answer in JSON format. ASSISTANT:"
    )
    assert answer == "<s>USER: \nWhat is it? ASSISTANT:"


def test_perplexity_is_that_of_a_separate_scoring_pass(model, processor) -> None:
    image = make_images(1)[0]
    result = make(model, processor, [BOX]).answer(image, QUESTIONS[0], **SHORT)
    inputs = processor(images=image, text=f"USER: <image>\n{QUESTIONS[0]} ASSISTANT:", return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    with torch.no_grad(), finegrain_ops.patch(model, processor) as handle:
        bias = handle.key_bias(inputs, [list(result.regions)], [image.size[::-1]], weight=WEIGHT)
        whole = model.generate(**inputs, key_bias=bias, **SHORT, do_sample=False)
        logits = model(input_ids=whole, pixel_values=inputs["pixel_values"], key_bias=bias).logits
    losses = torch.nn.functional.cross_entropy(logits[0, length - 1 : -1], whole[0, length:])
    assert result.perplexity == pytest.approx(math.exp(float(losses)), rel=1e-5)


def test_a_batch_equals_one_by_one(model, processor) -> None:
    """With boxes, without one, with one that is cropped away."""
    images, said = make_images(3), [BOX, NO_BOX, "[0.1, 0.4, 0.5, 0.5]"]
    together = make(model, processor, said).answer_batch(images, QUESTIONS, **SHORT)
    for i, result in enumerate(together):
        alone = make(model, processor, [said[i]]).answer(images[i], QUESTIONS[i], **SHORT)
        for name in ("text", "box", "regions", "grounding_text", "chosen"):
            assert getattr(result, name) == getattr(alone, name), name
        assert result.perplexity == pytest.approx(alone.perplexity, rel=1e-4)


def test_weight_one_is_the_plain_answer(model, processor) -> None:
    results = make(model, processor, [BOX] * 3, weight=1.0).answer_batch(make_images(3), QUESTIONS, **SHORT)
    assert [result.text for result in results] == by_hand(model, processor, None, plain=True)


@pytest.mark.parametrize("policy", ["whole_image", "plain", "raise"])
def test_without_grounding_every_image_token_is_reweighted(model, processor, policy: str) -> None:
    """Table II's "Reweight" alone: one call of generate. No box is missing where none was asked for."""
    ablation = make(model, processor, grounding=False, on_missing_box=policy)
    results = ablation.answer_batch(make_images(3), QUESTIONS, **SHORT)
    assert [result.text for result in results] == by_hand(model, processor, "all")
    assert results[0].text != by_hand(model, processor, None, plain=True)[0]
    assert [result.regions for result in results] == [((0, 0, 80, 60),), ((0, 0, 50, 100),), ((0, 0, 48, 48),)]
    assert {(result.box, result.grounding_text, result.chosen) for result in results} == {(None, None, "cof")}
    assert "ground" not in results[0].timings


def test_the_padding_of_a_squared_image_counts_as_image(model) -> None:
    """All image tokens means all: the whole image's box would leave the letterbox's out."""
    from finegrain_ops.integrations.llava import pixel_map

    padding = make_processor()
    padding.image_processor.do_pad = True  # only the geometry asks
    inputs = padding(images=make_images(1)[0], text="<image>", return_tensors="pt")
    assert pixel_map(padding.image_processor, (60, 80)).size == (48, 48)
    cof = CoF(model, padding, weight=math.e)
    with finegrain_ops.patch(model, padding) as handle:
        assert handle.region_mask(inputs, [(0, 0, 80, 60)], [(60, 80)]).sum() < GRID**2
        assert cof._bias_on_whole_images(handle, inputs, [(60, 80)]).sum() == GRID**2


def test_weights_per_layer(model, processor) -> None:
    image = make_images(1)[0]
    weight = torch.tensor([[WEIGHT], [1.0]])
    result = make(model, processor, [BOX], weight=weight).answer(image, QUESTIONS[0], **SHORT)
    _, regions = regions_of(BOX, [image])
    assert result.text == by_hand(model, processor, [regions], questions=QUESTIONS[:1], weight=weight)[0]


# --- without a box --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["whole_image", "plain"])
def test_images_without_a_box(model, processor, policy: str) -> None:
    """Beside one that has a box."""
    images = make_images(3)
    cof = make(model, processor, [NO_BOX, BOX, NO_BOX], on_missing_box=policy)
    results = cof.answer_batch(images, QUESTIONS, **SHORT)
    _, regions = regions_of(BOX, images)
    with_box = by_hand(model, processor, [[], [regions[1]], []])
    without = by_hand(model, processor, *(["all"] if policy == "whole_image" else [None]), plain=policy == "plain")
    assert [result.text for result in results] == [without[0], with_box[1], without[2]]
    assert [result.box is None for result in results] == [True, False, True]
    assert [result.chosen for result in results] == (
        ["cof"] * 3 if policy == "whole_image" else ["macro", "cof", "macro"]
    )
    assert [len(result.regions) for result in results] == ([1, 1, 1] if policy == "whole_image" else [0, 1, 0])


def test_plain_answers_of_a_whole_batch_use_no_bias(model, processor, monkeypatch) -> None:
    seen = []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda **kw: seen.append(kw) or generate(**kw), raising=False)
    cof = make(model, processor, [NO_BOX] * 3, on_missing_box="plain")
    texts = [result.text for result in cof.answer_batch(make_images(3), QUESTIONS, **SHORT)]
    assert ["key_bias" in kw for kw in seen] == [False, False]
    assert texts == by_hand(model, processor, None, plain=True)


def test_raise_without_a_box(model, processor) -> None:
    cof = make(model, processor, [BOX, NO_BOX, NO_BOX], on_missing_box="raise")
    with pytest.raises(
        MissingBoxError, match=r"images\[1\]: expected a box .*got the grounding text 'I do not"
    ) as raised:
        cof.answer_batch(make_images(3), QUESTIONS, **SHORT)
    assert isinstance(raised.value, ValueError)
    assert (raised.value.image_index, raised.value.grounding_text) == (1, NO_BOX)
    assert "forward" not in model.__dict__


def test_a_box_that_is_cropped_away_is_none(model, processor) -> None:
    """Of an image of 80 x 60 the centre crop keeps 10 to 70; and nobody is warned."""
    cof = make(model, processor, ["[0, 0, 0.08, 1]"], expand=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        result = cof.answer(make_images(1)[0], QUESTIONS[0], **SHORT)
    assert result.box is None
    assert result.regions == ((0, 0, 80, 60),)


def test_the_second_attempt_is_for_those_without_a_box(model, processor) -> None:
    images = make_images(3)
    cof = make(model, processor, [NO_BOX, BOX, NO_BOX], [BOX, "nor now"], retry_prompt=STRICT_GROUNDING_PROMPT)
    results = cof.answer_batch(images, QUESTIONS, **SHORT)
    (say,) = cof.grounding_generation["logits_processor"]
    assert say.rows == [3, 2]
    assert [result.grounding_text for result in results] == [BOX, BOX, "nor now"]
    assert [result.box is None for result in results] == [False, False, True]
    _, regions = regions_of(BOX, images)
    assert results[0].text == by_hand(model, processor, [[regions[0]], [], []])[0]


def test_no_second_attempt_without_need(model, processor) -> None:
    cof = make(model, processor, [BOX], retry_prompt=STRICT_GROUNDING_PROMPT)
    cof.answer(make_images(1)[0], QUESTIONS[0], **SHORT)
    assert cof.grounding_generation["logits_processor"][0].rows == [1]


TEXTS = {
    "prose": ("The answer is in [0.5, 0.5, 1.0, 1.0].", (40, 30, 80, 60)),
    "fenced JSON": ('```json\n{"bbox_2d": [0.5, 0.5, 1, 1]}\n```', (40, 30, 80, 60)),
    "ten boxes": (json.dumps([[0.5, i / 20, 0.75, i / 20 + 0.25] for i in range(10)]), (40, 0, 60, 15)),
    "half a JSON": ('{"bbox": [0.5, 0.5, 1', None),
    "cut off after the last number": ('{"bbox": [0.5, 0.5, 1, 1', (40, 30, 80, 60)),
    "no numbers to speak of": ("[1e309, nan, null, -inf]", None),
    "one bad box before a good one": ("[1e309, 0, nan, 1] [0.5, 0.5, 1, 1]", (40, 30, 80, 60)),
    "outside of the image": ("[3.5, 3.5, 4, 4]", None),
    "without area": ("[0.5, 0.5, 0.5, 1]", None),
    "nothing": ("", None),
}


@pytest.mark.parametrize(("text", "box"), TEXTS.values(), ids=TEXTS)
def test_what_models_write(model, processor, text: str, box) -> None:
    """Of several boxes the first counts; what is none is none."""
    cof = make(model, processor, [text], grounding_tokens=300)
    result = cof.answer(make_images(1)[0], QUESTIONS[0], max_new_tokens=1)
    assert result.grounding_text == text
    assert result.box == box


NUMBERS = st.one_of(
    st.floats(0, 1), st.floats(), st.sampled_from(["", "nan", "1e309", "null", 0.5, 0.5 + 2**-53, "-0"])
)
BOXES = st.lists(NUMBERS, min_size=3, max_size=5).map(lambda numbers: "[" + ", ".join(map(str, numbers)) + "]")


@settings(max_examples=60, deadline=None)
@given(
    text=st.one_of(st.text(), BOXES, st.lists(st.one_of(BOXES, st.text(max_size=9)), max_size=9).map(" ".join)),
    factor=st.sampled_from([1e-300, 0.5, 1.0, 1.3, 1e300]),
    soft=st.booleans(),
)
def test_no_text_raises(model, processor, text: str, factor: float, soft: bool) -> None:
    """And whatever region comes of it lies in the image. generate is left out, all else is there."""
    with pytest.MonkeyPatch.context() as patching:
        answers = Answers([text], [1.0])
        patching.setattr(module, "generate_answers", lambda *_, **__: answers)
        result = CoF(model, processor, expand=factor, soft=soft).answer(make_images(1)[0], "What?")
    ((x0, y0, x1, y1),) = result.regions
    assert 0 <= x0 < x1 <= 80
    assert 0 <= y0 < y1 <= 60


def test_the_geometry_of_a_released_model() -> None:
    """336 pixels, 24 x 24 tokens: the box in the text is one of the centre, which is what the model sees."""
    from finegrain_ops.demo import random_llava

    large, words = random_llava.make()
    image = Image.fromarray(skimage.data.coffee())  # 600 x 400, of which 100 to 500 are seen
    with pytest.MonkeyPatch.context() as patching:
        patching.setattr(module.Prompter, "decode_markup", lambda *_: '{"bbox": [0.5, 0.5, 0.75, 0.75]}')
        cof = CoF.from_preset("llava-1.5-7b", large, words, grounding_tokens=1, expand=1.0)
        result = cof.answer(image, "what is it ?", max_new_tokens=4)
    assert result.box == (300, 200, 400, 300)
    inputs = words(images=image, text="USER: <image>\nwhat is it ? ASSISTANT:", return_tensors="pt")
    bias = torch.zeros(1, 24, 24)
    bias[:, 12:18, 12:18] = math.log(2.0)
    places = inputs["input_ids"] == large.config.image_token_id
    with finegrain_ops.patch(large) as handle:
        key_bias = torch.zeros(places.shape).masked_scatter(places, bias)
        tokens = large.generate(**inputs, key_bias=key_bias, max_new_tokens=4, do_sample=False)[0, -4:]
    assert handle.processor is None
    assert result.text == words.tokenizer.decode(tokens, skip_special_tokens=True).strip()


# --- boxes of the caller's ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_tensor", [False, True])
def test_given_boxes_need_no_first_pass(model, processor, as_tensor: bool) -> None:
    image = make_images(1)[0]
    several = [(20.0, 10.0, 40.0, 30.0), (50.0, 40.0, 60.0, 55.0)]
    expanded = [expand_box(box, 1.3, (60, 80)) for box in several]
    for boxes, regions in ((several[0], expanded[:1]), (several, expanded)):
        result = make(model, processor).answer(
            image, QUESTIONS[0], boxes=torch.tensor(boxes) if as_tensor else boxes, **SHORT
        )
        assert result.text == by_hand(model, processor, [regions], questions=QUESTIONS[:1])[0]
        assert (result.box, result.regions) == (several[0], tuple(regions))
        assert result.grounding_text is None
        assert "ground" not in result.timings


def test_given_boxes_of_a_batch(model, processor) -> None:
    images = make_images(3)
    cof = make(model, processor, on_missing_box="plain", expand=1.0)
    results = cof.answer_batch(images, QUESTIONS, boxes=[None, [10, 20, 30, 60], []], **SHORT)
    assert [result.text for result in results] == by_hand(model, processor, [[], [(10, 20, 30, 60)], []])
    assert [result.chosen for result in results] == ["macro", "cof", "macro"]


# --- what is computed once, and what is left behind -----------------------------------------------------------------


@pytest.mark.parametrize("rows", ["all", "after_image"])
def test_the_vision_encoder_runs_once(model, processor, monkeypatch, rows: str) -> None:
    """Also for two questions about the same image, and with a second attempt at grounding."""
    tower = model.model.vision_tower
    encoder = count_calls(monkeypatch, getattr(tower, "vision_model", tower).encoder)
    images = make_images(2)
    cof = make(model, processor, [BOX, NO_BOX, BOX], [BOX], rows=rows, retry_prompt=STRICT_GROUNDING_PROMPT)
    results = cof.answer_batch([images[0], images[1], images[0]], QUESTIONS, **SHORT)
    assert all(result.box for result in results)
    assert [kw["inputs_embeds"].shape[0] for kw in encoder] == [2]


def test_after_the_image_the_decoder_sees_it_once(model, processor, monkeypatch) -> None:
    passes, forward = [], model.model.language_model.forward

    def recorded(**kwargs):
        cache = kwargs["past_key_values"]
        passes.append((0 if cache is None else cache.get_seq_length(), kwargs["inputs_embeds"].shape[1]))
        return forward(**kwargs)

    monkeypatch.setattr(model.model.language_model, "forward", recorded, raising=False)
    cof = make(model, processor, [BOX] * 3, rows="after_image")
    assert "prefill" in cof.answer_batch(make_images(3), QUESTIONS, **SHORT)[0].timings
    before_image = len("<s>USER: ") - len("<s>") + 1
    assert [length for past, length in passes if past == 0] == [before_image + GRID**2]


def test_after_the_image_with_the_question_before_it(model, processor) -> None:
    """Nothing to share but the vision encoder, and the same answer."""
    before = "{question} {image} ASSISTANT:"
    first = make(model, processor, [BOX], rows="after_image", template=before)
    image = make_images(1)[0]
    result = first.answer(image, QUESTIONS[0], **SHORT)
    inputs = processor(images=image, text=f"{QUESTIONS[0]} <image> ASSISTANT:", return_tensors="pt")
    with finegrain_ops.patch(model, processor) as handle:
        bias = handle.key_bias(inputs, [list(result.regions)], [image.size[::-1]], weight=WEIGHT)
        tokens = model.generate(**inputs, key_bias=bias, row_gate=handle.row_gate(inputs), **SHORT, do_sample=False)
    new = tokens[0, inputs["input_ids"].shape[1] :]
    assert result.text == processor.tokenizer.decode(new, skip_special_tokens=True).strip()


def test_a_model_is_left_as_it_was(model, processor, monkeypatch) -> None:
    cof = make(model, processor, [BOX])
    assert not traces(model)
    cof.answer(make_images(1)[0], QUESTIONS[0], **SHORT)
    assert not traces(model)

    def fails(*args, **kwargs):
        raise ArithmeticError

    monkeypatch.setattr(model.model.language_model.norm, "forward", fails, raising=False)
    with pytest.raises(ArithmeticError):
        make(model, processor, [BOX]).answer(make_images(1)[0], QUESTIONS[0], **SHORT)
    monkeypatch.undo()
    assert not traces(model)


def test_a_patch_of_the_callers_is_used_and_stays(model, processor) -> None:
    """Also one that knows no processor."""
    image = make_images(1)[0]
    expected = make(model, processor, [BOX]).answer(image, QUESTIONS[0], **SHORT).text
    with finegrain_ops.patch(model) as handle:
        patched = traces(model)
        assert make(model, processor, [BOX]).answer(image, QUESTIONS[0], **SHORT).text == expected
        assert traces(model) == patched
        assert handle.processor is None
    assert not traces(model)


def test_timings(model, processor) -> None:
    cof = make(model, processor, [BOX] * 2)
    first, second = cof.answer_batch(make_images(2), QUESTIONS[:2], **SHORT)
    assert list(first.timings) == ["encode", "region", "ground", "answer"]
    assert first.timings == second.timings
    assert all(seconds > 0 for seconds in first.timings.values())


# --- settings of generation -----------------------------------------------------------------------------------------


def test_beams_and_a_generation_config(model, processor) -> None:
    from transformers import GenerationConfig

    image = make_images(1)[0]
    inputs = processor(images=image, text=f"USER: <image>\n{QUESTIONS[0]} ASSISTANT:", return_tensors="pt")
    plain = {**SHORT, "num_beams": 3, "do_sample": False}
    expected = model.generate(**inputs, **plain)[0, inputs["input_ids"].shape[1] :]
    text = processor.tokenizer.decode(expected, skip_special_tokens=True).strip()
    config = GenerationConfig(**plain, eos_token_id=EOS, pad_token_id=PAD)
    cof = make(model, processor, [NO_BOX], [NO_BOX], on_missing_box="plain")
    by_keywords = cof.answer(image, QUESTIONS[0], **SHORT, num_beams=3)
    by_config = cof.answer(image, QUESTIONS[0], generation_config=config)
    assert by_keywords.text == by_config.text == text
    assert by_keywords.perplexity == pytest.approx(by_config.perplexity)
    assert config.output_logits is not True  # the caller's stays as it was


def test_grounding_is_greedy_whatever_the_answer_is(model, processor, monkeypatch) -> None:
    seen = count_calls(monkeypatch, model, "generate")
    CoF(model, processor).answer(make_images(1)[0], "What?", do_sample=True, **SHORT)
    CoF(model, processor, grounding_generation={"num_beams": 2}, grounding_tokens=5).answer(
        make_images(1)[0], "What?", **SHORT
    )
    given = [(kw["do_sample"], kw["num_beams"], kw["max_new_tokens"]) for kw in seen]
    assert given == [(False, 1, 64), (True, 1, 8), (False, 2, 5), (False, 1, 8)]
