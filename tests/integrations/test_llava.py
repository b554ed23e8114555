"""LLaVA-1.5's geometry: boxes painted into a picture must light up exactly the tokens that the processor shows them
to.
"""

from __future__ import annotations

import numpy as np
import pytest
import skimage.data
import torch
import transformers
from PIL import Image

import finegrain_ops
from finegrain_ops.demo import random_llava
from finegrain_ops.integrations.llava import pixel_map
from finegrain_ops.tiny_llava.tokenizer import clip_image_processor_class

PATCH = 14


@pytest.fixture(scope="module")
def llava():
    return random_llava.make()


def with_preprocessing(processor, name: str):
    """The two preprocessings of LLaVA-1.5, by transformers' own image processors."""
    side = {"height": 336, "width": 336}
    if name == "centre crop":
        image_processor = clip_image_processor_class()(size={"shortest_edge": 336}, crop_size=side)
    else:
        try:
            from transformers.models.llava.image_processing_pil_llava import (
                LlavaImageProcessorPil as LlavaProcessorOnPillow,
            )
        except ModuleNotFoundError:
            LlavaProcessorOnPillow = transformers.LlavaImageProcessor
        image_processor = LlavaProcessorOnPillow(size={"shortest_edge": 336}, crop_size=side, do_pad=True)
    return transformers.LlavaProcessor(
        image_processor=image_processor,
        tokenizer=processor.tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


@pytest.fixture(params=["centre crop", "pad to square"])
def preprocessing(request) -> str:
    return request.param


def prompts(count: int) -> list[str]:
    words = ["what is it ?", "what colour is the cat in it ?", "where is the cup ?"]
    return [f"USER : <image> {words[i % 3]} ASSISTANT :" for i in range(count)]


IMAGES = {
    "astronaut": (130, 20, 280, 200),
    "coffee": (322, 212, 412, 330),
    "chelsea": (290, 100, 345, 170),
    "rocket": (300, 40, 352, 330),
}


@pytest.mark.parametrize("name", IMAGES)
def test_painted_boxes_land_on_the_predicted_tokens(llava, preprocessing: str, name: str) -> None:
    """The photograph with its box painted black, and white: the patches that differ are the tokens of the region.

    Bicubic resampling reads about two source pixels beyond the box's edge, so a token next to the region may change a
    little; tokens in it change by up to the whole range, about 3.7 after normalisation.
    """
    model, processor = llava
    processor = with_preprocessing(processor, preprocessing)
    photograph = getattr(skimage.data, name)()
    x0, y0, x1, y1 = box = IMAGES[name]
    processed = []
    for colour in (0, 255):
        painted = photograph.copy()
        painted[y0:y1, x0:x1] = colour
        processed.append(processor.image_processor(Image.fromarray(painted), return_tensors="pt")["pixel_values"][0])
    change = (processed[1] - processed[0]).abs().amax(0).reshape(24, PATCH, 24, PATCH).amax((1, 3))  # per token
    inputs = processor(images=Image.fromarray(photograph), text=prompts(1)[0], return_tensors="pt")
    with finegrain_ops.patch(model, processor) as handle:
        sizes = [photograph.shape[:2]]
        mask = handle.region_mask(inputs, [[box]], sizes)[0][inputs["input_ids"][0] == model.config.image_token_id]
        soft = handle.region_mask(inputs, [[box]], sizes, soft=True)[0][
            inputs["input_ids"][0] == model.config.image_token_id
        ]
    mask, soft = mask.reshape(24, 24), soft.reshape(24, 24)
    assert 8 < int(mask.sum()) < 200
    assert torch.equal(soft > 0, mask)
    neighbours = torch.nn.functional.max_pool2d(mask[None, None].float(), 3, 1, 1)[0, 0].bool()
    assert (change[~neighbours] < 1e-6).all(), "a token far from the region changed"
    assert (change[soft > 0.1] > 2.0).all(), "a token of the region did not change"
    assert (change[~mask] < 2.0).all(), "a token beside the region changed as much as one in it"


def test_batches_of_different_images(llava, preprocessing: str) -> None:
    """Left-padded questions of different lengths: every image's region is where it is alone."""
    model, processor = llava
    processor = with_preprocessing(processor, preprocessing)
    photographs = [skimage.data.coffee(), skimage.data.chelsea(), skimage.data.rocket()]
    boxes = [[IMAGES["coffee"]], [], [IMAGES["rocket"], (10, 10, 500, 40)]]
    sizes = [p.shape[:2] for p in photographs]
    images = [Image.fromarray(p) for p in photographs]
    together = processor(images=images, text=prompts(3), padding=True, return_tensors="pt")
    with finegrain_ops.patch(model, processor) as handle:
        mask = handle.region_mask(together, boxes, sizes)
        assert mask.shape == together["input_ids"].shape
        assert mask.dtype == torch.bool
        assert (mask.sum(1) > 0).tolist() == [True, False, True]
        for i in range(3):
            alone = processor(images=images[i], text=prompts(3)[i], return_tensors="pt")
            row = handle.region_mask(alone, [boxes[i]], [sizes[i]])[0]
            assert torch.equal(mask[i, -len(row) :], row)
            assert not mask[i, : -len(row)].any()


def test_two_images_in_one_prompt(llava) -> None:
    model, processor = llava
    images = [Image.fromarray(skimage.data.coffee()), Image.fromarray(skimage.data.chelsea())]
    inputs = processor(images=images, text="USER : <image> and <image> ? ASSISTANT :", return_tensors="pt")
    with finegrain_ops.patch(model, processor) as handle:
        mask = handle.region_mask(inputs, [[], [IMAGES["chelsea"]]], [(400, 600), (300, 451)])[0]
    places = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0]
    assert not mask[places[:576]].any()
    assert mask[places[576:]].any()


def test_key_bias_is_log_weight_times_the_mask(llava) -> None:
    model, processor = llava
    inputs = processor(images=Image.fromarray(skimage.data.coffee()), text=prompts(1)[0], return_tensors="pt")
    arguments = (inputs, [[IMAGES["coffee"]]], [(400, 600)])
    with finegrain_ops.patch(model, processor) as handle:
        mask, soft = handle.region_mask(*arguments), handle.region_mask(*arguments, soft=True)
        bias = handle.key_bias(*arguments, weight=4.5)
        assert bias.shape == inputs["input_ids"].shape
        assert bias.dtype == torch.float32
        torch.testing.assert_close(bias, mask * np.float32(np.log(4.5)))
        torch.testing.assert_close(handle.key_bias(*arguments, weight=4.5, soft=True), soft * np.float32(np.log(4.5)))
        assert torch.equal(handle.key_bias(*arguments, weight=0.0) == float("-inf"), mask)
        assert torch.equal(handle.key_bias(*arguments), handle.key_bias(*arguments, weight=2.0))
        assert torch.equal(
            handle.region_mask(inputs, [IMAGES["coffee"]], [(400, 600)]), mask
        )  # a box need not be wrapped
        as_tensors = handle.region_mask(inputs, torch.tensor([[IMAGES["coffee"]]]), torch.tensor([[400, 600]]))
        assert torch.equal(as_tensors, mask)


def test_attention_mass_moves_by_lambda(llava) -> None:
    """In the first layer, whose input no bias has touched: odds of the region, times lambda."""
    model, processor = llava
    inputs = processor(images=Image.fromarray(skimage.data.coffee()), text=prompts(1)[0], return_tensors="pt")
    masses = []
    with torch.no_grad(), finegrain_ops.patch(model, processor) as handle:
        mask = handle.region_mask(inputs, [[IMAGES["coffee"]]], [(400, 600)])[0]
        bias = handle.key_bias(inputs, [[IMAGES["coffee"]]], [(400, 600)], weight=4.5)
        for key_bias in (torch.zeros_like(bias), bias):
            seen = []

            def first_layer(call, seen=seen) -> None:
                if call.layer == 0:
                    scores = call.scale * call.query[0, :, -1:] @ call.key[0].mT + call.key_bias[0]
                    seen.append(torch.softmax(scores, -1)[:, 0, mask].sum(-1))

            model(**inputs, key_bias=key_bias, attention_reader=first_layer)
            masses.append(seen[0])
    before, after = masses
    torch.testing.assert_close(after / (1 - after), 4.5 * before / (1 - before), rtol=1e-4, atol=0)


def test_a_box_that_is_cropped_away_warns(llava) -> None:
    model, processor = llava
    inputs = processor(images=Image.fromarray(skimage.data.coffee()), text=prompts(1)[0], return_tensors="pt")
    with (
        finegrain_ops.patch(model, processor) as handle,
        pytest.warns(UserWarning, match=r"boxes\[0\] lie wholly in what"),
    ):
        assert not handle.region_mask(inputs, [[(0, 0, 90, 400)]], [(400, 600)]).any()


BAD = {
    "box outside": (
        {"boxes": [[(700, 0, 800, 50)]]},
        r"boxes\[0\]\[0\]: expected a box that overlaps the image of 600 x 400",
    ),
    "box inverted": ({"boxes": [[(0, 0, 9, 9), (50, 0, 10, 50)]]}, r"boxes\[0\]\[1\]: expected finite x0 < x1"),
    "box of three": ({"boxes": [[(1, 2, 3)]]}, r"boxes\[0\]\[0\]: expected four numbers"),
    "box is text": ({"boxes": ["[0, 0, 1, 1]"]}, r"boxes\[0\]: expected a list"),
    "too many lists": ({"boxes": [[], []]}, "boxes: expected one list of boxes per image, 1 as in image_sizes, got 2"),
    "bad size": ({"image_sizes": [(400, 0)]}, r"image_sizes\[0\]: expected \(height, width\)"),
    "too many images": (
        {"boxes": [[], []], "image_sizes": [(400, 600)] * 2},
        "inputs: expected 1152 image tokens for the 2 images",
    ),
    "negative weight": ({"weight": -2.0}, "weight: expected a finite number >= 0, got -2.0"),
    "NaN weight": ({"weight": float("nan")}, "weight: expected a finite number >= 0, got nan"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_bad_input_leaves_the_model_untouched(llava, arguments: dict, message: str) -> None:
    model, processor = llava
    inputs = processor(images=Image.fromarray(skimage.data.coffee()), text=prompts(1)[0], return_tensors="pt")
    with pytest.raises(ValueError, match=message), finegrain_ops.patch(model, processor) as handle:
        handle.key_bias(inputs, **{"boxes": [[IMAGES["coffee"]]], "image_sizes": [(400, 600)], **arguments})
    assert "forward" not in model.__dict__


def test_without_a_processor_there_is_no_geometry(llava) -> None:
    model, processor = llava
    inputs = processor(images=Image.fromarray(skimage.data.coffee()), text=prompts(1)[0], return_tensors="pt")
    with finegrain_ops.patch(model) as handle, pytest.raises(ValueError, match=r"call patch\(model, processor\)"):
        handle.region_mask(inputs, [[IMAGES["coffee"]]], [(400, 600)])


def test_cls_token_comes_first_with_the_full_strategy(llava, monkeypatch) -> None:
    from finegrain_ops.integrations import llava as family

    model, processor = llava
    monkeypatch.setattr(model.config, "vision_feature_select_strategy", "full")
    ids = torch.tensor([[1] + [model.config.image_token_id] * 577 + [7]])
    (image,) = family.image_tokens(model, processor, {"input_ids": ids}, [(400, 600)])
    assert image.positions.tolist() == list(range(2, 578))


@pytest.mark.parametrize("size", [(480, 640), (1080, 1920), (337, 336), (335, 999), (3, 7), (336, 336)])
def test_pixel_map_gives_the_processed_size(llava, preprocessing: str, size: tuple[int, int]) -> None:
    processor = with_preprocessing(llava[1], preprocessing)
    pixels = processor.image_processor(Image.new("RGB", size[::-1]), return_tensors="pt")["pixel_values"]
    assert pixel_map(processor.image_processor, size).size == tuple(pixels.shape[-2:])


@pytest.mark.parametrize(("height", "width"), [(336, 337), (336, 505), (505, 336), (336, 672)])
def test_an_odd_remainder_of_the_centre_crop(llava, height: int, width: int) -> None:
    """An image that needs no resizing, whose pixels say where they are: which one is the first of the crop?"""
    places = np.indices((height, width)).transpose(1, 2, 0)  # (row, column)
    image = np.concatenate([places % 256, places[..., :1] // 256 * 16 + places[..., 1:] // 256], axis=-1)
    image_processor = llava[1].image_processor
    arguments = {"do_rescale": False, "do_normalize": False, "return_tensors": "pt"}
    row, column, high = image_processor(Image.fromarray(image.astype(np.uint8)), **arguments)["pixel_values"][
        0, :, 0, 0
    ].int()
    pixels = pixel_map(image_processor, (height, width))
    assert int(row) + 256 * (int(high) // 16) == -pixels.y.shift
    assert int(column) + 256 * (int(high) % 16) == -pixels.x.shift
