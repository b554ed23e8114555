"""TinyGroundingGPT patched: regions, reweighted attention against eager attention, its picture, and CoF."""

from __future__ import annotations

import functools
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

import finegrain_ops
from finegrain_ops.integrations.tinygroundinggpt import attention_picture, object_attention
from finegrain_ops.integrations.tinygroundinggpt.picture import object_rows
from tiny_models import EagerOracle
from tiny_tinygroundinggpt import EOS, GRID, IMAGE, OBJECT, PATCH, SIDE, make_images, make_model, make_processor

SIZES = [(60, 80), (101, 50)]  # height, width, of make_images
BOXES = [[(10, 5, 35, 31)], [(0, 60, 50, 101), (20, 0, 30, 9)]]
TEXTS = ["<image>Is <object> red?", "So: <image><object>"]
OBJECTS = [[(10, 5, 35, 31)], [(0, 60, 50, 101)]]


@pytest.fixture(scope="module")
def model():
    return make_model(initializer_range=0.3)


@pytest.fixture(scope="module")
def processor():
    return make_processor()


@pytest.fixture(scope="module")
def inputs(processor):
    return processor(make_images(2), TEXTS, object_boxes=OBJECTS, padding=True, return_tensors="pt")


def tokens_of(boxes: list, size: tuple[int, int]) -> Tensor:
    """(GRID, GRID) bool, by going through all pixels of the padded square at eight times its resolution."""
    side = max(size)
    top, left = ((side - length) // 2 for length in size)
    mask = torch.zeros(GRID, GRID, dtype=torch.bool)
    for (x0, y0, x1, y1), row, column in product(boxes, range(GRID), range(GRID)):
        cell_x, cell_y = column * side / GRID, row * side / GRID
        overlaps_x = cell_x < x1 + left and x0 + left < cell_x + side / GRID
        overlaps_y = cell_y < y1 + top and y0 + top < cell_y + side / GRID
        mask[row, column] |= overlaps_x and overlaps_y
    return mask


def test_regions_are_of_images_and_not_of_objects(model, processor, inputs) -> None:
    with finegrain_ops.patch(model, processor) as handle:
        mask = handle.region_mask(inputs, BOXES, SIZES)
        keys = handle.family.image_keys(model, inputs)
        assert handle.family.box_convention(processor) == "unit_padded"
    is_image = inputs["input_ids"] == IMAGE
    expected = torch.stack([tokens_of(boxes, size).flatten() for boxes, size in zip(BOXES, SIZES)])
    assert torch.equal(mask[is_image], expected.flatten())
    assert torch.equal(keys, is_image)
    assert not mask[~is_image].any()
    assert (inputs["input_ids"] == OBJECT).sum() == 2 * GRID**2


def test_painted_boxes_light_the_tokens_of_their_region(model, processor) -> None:
    size, box = (60, 80), (11, 12, 29, 31)  # the tokens are of 10 pixels, and the padding is one row of them
    grey = np.full((*size, 3), 64, dtype=np.uint8)
    painted = grey.copy()
    painted[box[1] : box[3], box[0] : box[2]] = 192
    before, after = (processor(image, "<image>", return_tensors="pt") for image in (grey, painted))
    with finegrain_ops.patch(model, processor) as handle:
        mask = handle.region_mask(after, [[box]], [size]).reshape(GRID, GRID)
    change = (before["pixel_values"] - after["pixel_values"])[0].abs().amax(0)
    changed = change.reshape(GRID, PATCH, GRID, PATCH).amax((1, 3)) > 0.3  # the filter reaches a little further
    assert torch.equal(changed, mask)
    assert mask.sum() > 3


@torch.no_grad()
def test_a_bias_is_that_of_eager_attention(model, processor, inputs) -> None:
    with finegrain_ops.patch(model, processor) as handle:
        bias = handle.key_bias(inputs, BOXES, SIZES, weight=5.0)
        logits = model(**inputs, key_bias=bias).logits
        generated = model.generate(**inputs, key_bias=bias, max_new_tokens=8, do_sample=False)
        without = model(**inputs).logits
    with EagerOracle(model, bias) as oracle:
        expected = oracle(**inputs).logits
        tokens = oracle.generate(**inputs, max_new_tokens=8, do_sample=False)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(logits[real], expected[real], rtol=1e-3, atol=1e-3)
    assert torch.equal(generated, tokens)
    assert torch.equal(without, model(**inputs).logits)
    assert (logits - without)[real].abs().max() > 0.1


def test_reweighted_attention_trains_through(model, processor, inputs) -> None:
    names = ("model.multi_modal_projector.linear_1.weight", "model.language_model.layers.0.self_attn.q_proj.weight")
    after_padding = (
        inputs["attention_mask"].cumsum(1) <= 1
    )  # rows of padding, which predict the first token, are anything
    labels = inputs["input_ids"].masked_fill((inputs["input_ids"] < 5) | after_padding, -100)

    def gradients(trained) -> list[Tensor]:
        model.zero_grad()
        trained().backward()
        return [model.get_parameter(name).grad.clone() for name in names]

    with finegrain_ops.patch(model, processor) as handle:
        weight = torch.tensor([[3.0]], requires_grad=True)
        bias = handle.key_bias(inputs, BOXES, SIZES, weight=weight)
        got = gradients(lambda: model(**inputs, labels=labels, key_bias=bias).loss)
        (of_weight,) = (weight.grad,)
    with EagerOracle(model, bias.detach()) as oracle:
        expected = gradients(lambda: oracle(**inputs, labels=labels).loss)
    model.zero_grad()
    for gradient, other in zip(got, expected):
        assert other.abs().max() > 0
        torch.testing.assert_close(gradient, other, rtol=1e-3, atol=1e-4)
    assert of_weight.abs() > 0


# --- the picture -----------------------------------------------------------------------------------------------------


def eager_attention(model, inputs, layer: int) -> Tensor:
    """(H, P, P)"""
    model.set_attn_implementation({"text_config": "eager"})
    try:
        with torch.no_grad():
            return model(**inputs, output_attentions=True).attentions[layer][0]
    finally:
        model.set_attn_implementation({"text_config": "sdpa"})


@pytest.fixture(scope="module")
def asked(model, processor):
    """(inputs, image, output_ids) of a text with two objects, and an answer."""
    image = make_images(1)[0]
    text = "<image>Is <object> or <object> at [0.125, 0.250, 0.500, 0.750]? red"
    inputs = processor(image, text, object_boxes=[(10, 5, 35, 31), (1, 1, 70, 50)], return_tensors="pt")
    answer = processor.tokenizer(" red [0.125, 0.250, 0.500, 0.750] red it is", return_tensors="pt")["input_ids"]
    return inputs, image, torch.cat([inputs["input_ids"], answer], dim=1)


def rows_by_hand(processor, ids: Tensor, of: str | int) -> list[int]:
    """Positions of the object's tokens; bytes and numbers are tokens of one character or number each."""
    if isinstance(of, int):
        return (ids == OBJECT).nonzero()[:, 0].tolist()[of * GRID**2 : (of + 1) * GRID**2]
    spelled = processor.tokenizer(of)["input_ids"]
    starts = [i for i in range(len(ids)) if ids[i : i + len(spelled)].tolist() == spelled]
    return list(range(starts[-1], starts[-1] + len(spelled)))


@pytest.mark.parametrize("layer", [-1, 0])
@pytest.mark.parametrize("of", ["red", "[0.125, 0.250, 0.500, 0.750]", 0, 1], ids=["text", "box", "object", "second"])
@pytest.mark.parametrize("patched", [False, True])
def test_attention_of_an_object_is_eagers_summed(model, processor, asked, of, layer: int, patched: bool) -> None:
    inputs, image, output_ids = asked
    whole = {**inputs, "input_ids": output_ids, "attention_mask": torch.ones_like(output_ids)}
    rows = rows_by_hand(processor, output_ids[0], of)
    is_image = output_ids[0] == IMAGE
    expected = eager_attention(model, whole, layer)[:, rows][:, :, is_image].sum((0, 1)).reshape(GRID, GRID)
    with finegrain_ops.patch(model, processor) if patched else _nothing():
        shown = object_attention(model, processor, inputs, image, of, output_ids=output_ids, layer=layer)
        assert ("_finegrain_handle" in vars(model)) is patched
    torch.testing.assert_close(shown.values, expected, rtol=1e-4, atol=1e-5)
    assert shown.extent == (0.0, -10.0, 80.0, 70.0)  # the padding's tokens lie beyond the image


class _nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def test_the_picture(model, processor, asked, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    inputs, image, output_ids = asked
    figure = attention_picture(
        model, processor, inputs, image, 0, boxes=[(10, 5, 35, 31)], title="the first object", output_ids=output_ids
    )
    picture, overlay = figure.axes[0], figure.axes[0].images[-1]
    shown = torch.from_numpy(np.asarray(overlay.get_array()))
    assert shown.sum() == pytest.approx(1.0, abs=1e-5)
    expected = object_attention(model, processor, inputs, image, 0).values.double()
    torch.testing.assert_close(shown, expected / expected.sum(), rtol=1e-5, atol=0)
    (box,) = picture.patches
    assert box.get_bbox().extents.tolist() == [10, 5, 35, 31]
    assert box.get_edgecolor() == (1.0, 0.0, 0.0, 1.0)
    figure.savefig(tmp_path / "picture.png")


BAD = {
    "text that is not there": ("blue", ValueError, "of: expected text that is in inputs or output_ids, got str 'blue'"),
    "no text": ("", ValueError, "of: expected text that is in inputs"),
    "an object that is not there": (2, ValueError, "of: expected one of the 2 <object> of inputs, got 2"),
    "before the image": ("Tell", ValueError, "of: expected an object after the image"),
    "another shape": (torch.ones(3, dtype=torch.bool), ValueError, r"of: expected shape \(\d+,\), got \(3,\)"),
    "another type": (1.5, TypeError, "of: expected a text, the number of an object or a bool tensor"),
}


@pytest.mark.parametrize(("of", "error", "message"), BAD.values(), ids=BAD)
def test_objects_that_are_not_there(model, processor, of, error: type, message: str) -> None:
    image = make_images(1)[0]
    inputs = processor(image, "Tell <image><object><object>", object_boxes=[(0, 0, 9, 9)] * 2, return_tensors="pt")
    with pytest.raises(error, match=message):
        object_attention(model, processor, inputs, image, of)
    assert "_finegrain_handle" not in vars(model)


def test_inputs_of_which_there_is_no_picture(model, processor, inputs) -> None:
    image = make_images(1)[0]
    with pytest.raises(ValueError, match="inputs: expected those of one text, got 2 of them"):
        object_attention(model, processor, inputs, image, 0)
    one = processor(image, "<image> red", return_tensors="pt")
    with pytest.raises(ValueError, match="output_ids: expected what generate returned for inputs"):
        object_attention(model, processor, one, image, "red", output_ids=one["input_ids"][:, 1:])
    rows = object_rows(processor, one["input_ids"][0], "red")
    assert rows.nonzero()[:, 0].tolist() == [GRID**2 + 1, GRID**2 + 2, GRID**2 + 3]
    assert torch.equal(object_rows(processor, one["input_ids"][0], rows), rows)


# --- methods ---------------------------------------------------------------------------------------------------------


class Say:
    """Makes the first call of generate write a text, and each later one what it would."""

    def __init__(self, text: str, processor) -> None:
        self.left = [*processor.tokenizer(text)["input_ids"], EOS]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not self.left:
            return scores
        return torch.full_like(scores, float("-inf")).index_fill(1, torch.tensor([self.left.pop(0)]), 0.0)


def test_cof_finds_its_box_and_looks_there(model, processor) -> None:
    image, box = make_images(1)[0], (20.0, 10.0, 60.0, 40.0)
    text = processor.format_box(box, (60, 80))
    say = Say(f"At {text}", processor)
    cof = finegrain_ops.CoF(
        model, processor, weight=30.0, expand=1.0, rows="all", grounding_generation={"logits_processor": [say]}
    )
    result = cof.answer(image, "Which?", max_new_tokens=40)
    assert not say.left
    assert result.grounding_text == f"At {text}"
    assert result.box == pytest.approx(box, abs=0.05)
    with finegrain_ops.patch(model, processor) as handle:
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which?"}]}]
        inputs = processor(image, processor.apply_chat_template(chat, add_generation_prompt=True), return_tensors="pt")
        bias = handle.key_bias(inputs, [result.box], [(60, 80)], weight=30.0)
        generated = model.generate(**inputs, key_bias=bias, max_new_tokens=40, do_sample=False)
        unbiased = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    decode = functools.partial(processor.tokenizer.decode, skip_special_tokens=True)
    length = inputs["input_ids"].shape[1]
    assert result.text == decode(generated[0, length:]).strip()
    assert result.text != decode(unbiased[0, length:]).strip()


def test_the_encoders_run_once_for_several_questions(model, processor) -> None:
    from finegrain_ops.methods.reuse import vision_once

    inputs = processor(make_images(2), ["<image>a", "<image>b"], return_tensors="pt")
    with torch.no_grad(), vision_once(model) as memo:
        first, again = model(**inputs).logits, model(**inputs).logits
        assert memo.runs == 1
        assert memo.reused == 2
    assert torch.equal(first, again)


def test_sizes_are_those_of_the_model(processor) -> None:
    pixels = processor.image_processor.pixel_map((101, 50))
    assert pixels.size == (SIDE, SIDE)
    assert float(pixels.x(0)) == pytest.approx(25 * SIDE / 101)  # (101 - 50) // 2 of padding
