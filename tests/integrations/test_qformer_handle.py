"""The handle of a patched InstructBLIP or BLIP-2: regions among the keys of its Q-Former, and maps of attention."""

from __future__ import annotations

import functools
import types
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import finegrain_ops
import image_processor_cases
from tiny_qformer import (
    GREEDY,
    IMAGE_TOKEN,
    MODELS,
    NUM_KEYS,
    NUM_LAYERS,
    NUM_QUERIES,
    EagerOracle,
    logits,
    made,
    make_bias,
    make_inputs,
    make_processor,
    per_head,
)

SIZES = [(72, 144), (96, 60)]  # (height, width): tokens of 18 x 36 and of 24 x 15 pixels
PROCESSOR = types.SimpleNamespace(image_processor=image_processor_cases.blip(24))


@pytest.fixture(params=MODELS)
def model(request: Any) -> Any:
    return made(request.param)


@pytest.fixture
def instructblip() -> Any:
    return made("InstructBLIP, Llama")


def with_pixels(model: Any, images: list[Image.Image]) -> dict[str, torch.Tensor]:
    return {
        **make_inputs(model),
        "pixel_values": PROCESSOR.image_processor(images, return_tensors="pt")["pixel_values"],
    }


def test_painted_boxes_land_on_the_predicted_keys(model: Any) -> None:
    """Each image with its boxes painted black, and white: the patches that differ are the keys of the region."""
    boxes = [[(40, 20, 100, 50), (120, 60, 144, 72)], [(0, 0, 14, 40)]]
    images: dict[int, list[Image.Image]] = {0: [], 255: []}
    for colour, painted in images.items():
        for size, of_image in zip(SIZES, boxes):
            pixels = np.full((*size, 3), 128, np.uint8)
            for x0, y0, x1, y1 in of_image:
                pixels[y0:y1, x0:x1] = colour
            painted.append(Image.fromarray(pixels))
    black, white = (with_pixels(model, painted)["pixel_values"] for painted in images.values())
    change = (white - black).abs().amax(1).reshape(2, 4, 6, 4, 6).amax((2, 4)).flatten(1)  # (N, patches)
    with finegrain_ops.patch(model, PROCESSOR) as handle:
        inputs = with_pixels(model, images[0])
        mask, soft = (handle.region_mask(inputs, boxes, SIZES, soft=soft) for soft in (False, True))
        bias = handle.key_bias(inputs, boxes, SIZES, weight=22.0)
        assert not logits(model, inputs, key_bias=bias).equal(logits(model, inputs))
    assert mask.shape == (2, NUM_KEYS)
    assert mask[:, 1:].sum(1).tolist() == [4 + 1, 2]
    assert not mask[:, 0].any()  # CLS
    assert torch.equal(soft > 0, mask)
    torch.testing.assert_close(bias, mask * np.float32(np.log(22.0)))
    assert (change[soft[:, 1:] > 0.1] > 1.9).all(), "a patch of the region did not change"
    assert (change[~mask[:, 1:]] < 1.9).all(), "a patch beside the region changed as much as one in it"


def test_with_the_processor_from_prompt_to_answer(model: Any) -> None:
    """What its processor returns is what patch, the handle and generate take."""
    processor = make_processor(model)
    images = [Image.fromarray(np.full((*size, 3), colour, np.uint8)) for size, colour in zip(SIZES, (40, 200))]
    inputs = processor(images=images, text=["where is it", "what"], padding=True, return_tensors="pt")
    with finegrain_ops.patch(model, processor) as handle:
        bias = handle.key_bias(inputs, [[(36, 18, 72, 36)], []], SIZES, weight=22.0)
        tokens = model.generate(**inputs, **GREEDY, key_bias=bias)
        attention = handle.attention_map(inputs, key_bias=bias) - handle.attention_map(inputs)
    assert bias.nonzero().tolist() == [[0, 1 + 5]]
    assert attention[0].argmax() == 1 + 5
    assert attention[1].abs().max() < 1e-5
    with EagerOracle(model, bias):
        assert torch.equal(tokens, model.generate(**inputs, **GREEDY))


def test_two_images_in_one_prompt() -> None:
    """Which of the two families BLIP-2 alone can do: the bias has a row for each image."""
    model, bias = made("BLIP-2, OPT"), make_bias()
    ids = torch.tensor([[*[IMAGE_TOKEN] * 2 * NUM_QUERIES, 1, 20, 21]])
    inputs = {"pixel_values": make_inputs(model)["pixel_values"], "input_ids": ids}
    with EagerOracle(model, bias):
        expected = logits(model, inputs)
    with finegrain_ops.patch(model, PROCESSOR) as handle:
        torch.testing.assert_close(logits(model, inputs, key_bias=bias), expected, atol=5e-5, rtol=0)
        assert handle.region_mask(inputs, [[], [(0, 0, 9, 9)]], SIZES).nonzero().tolist() == [[1, 1]]


def test_complement_image_leaves_cls_alone(model: Any) -> None:
    inputs = make_inputs(model)
    with finegrain_ops.patch(model, PROCESSOR) as handle:
        arguments = (inputs, [[(0, 0, 36, 18)], []], SIZES)
        outside = handle.key_bias(*arguments, weight=0.5, complement="image") != 0
        assert torch.equal(outside[:, 1:], ~handle.region_mask(*arguments)[:, 1:])
        assert not outside[:, 0].any()


@pytest.mark.parametrize("bias", [None, per_head()], ids=["plain", "biased"])
def test_attention_map_is_the_sum_of_the_probabilities(model: Any, bias: torch.Tensor | None) -> None:
    inputs = make_inputs(model)
    oracle = EagerOracle(model, torch.zeros(2, NUM_KEYS) if bias is None else bias)
    with oracle:
        logits(model, inputs)
    expected = torch.stack(oracle.probabilities, 1)  # (N, L, H, Q, K)
    expected[..., 0] = 0.0  # CLS shows no place of the image
    with torch.no_grad(), finegrain_ops.patch(model, PROCESSOR) as handle:
        assert handle.num_layers == NUM_LAYERS
        read = functools.partial(handle.attention_map, inputs, key_bias=bias)
        torch.testing.assert_close(read(), expected.sum((1, 2, 3)), atol=2e-5, rtol=0)
        torch.testing.assert_close(read(reduction="none"), expected.sum(3), atol=2e-5, rtol=0)
        for layer in range(NUM_LAYERS):
            torch.testing.assert_close(read(layers=layer), expected[:, layer].sum((1, 2)), atol=2e-5, rtol=0)
        torch.testing.assert_close(read(rows=[1, -1]), expected[:, :, :, [1, 3]].sum((1, 2, 3)), atol=2e-5, rtol=0)
        maps = handle.image_maps(inputs, read(), SIZES)
    assert len(maps) == 2
    assert expected.sum() > 20


def test_attention_map_does_not_run_the_language_model(model: Any) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("the language model ran")

    hook = model.language_model.register_forward_pre_hook(fail)
    pixels = make_inputs(model)["pixel_values"].requires_grad_()
    with finegrain_ops.patch(model) as handle:
        handle.attention_map({**make_inputs(model), "pixel_values": pixels})[0, 3:5].sum().backward()
    hook.remove()
    assert pixels.grad[0].abs().max() > 1e-6
    assert pixels.grad[1].abs().max() == 0.0


def test_image_sizes_that_do_not_fit(instructblip: Any) -> None:
    other = types.SimpleNamespace(image_processor=image_processor_cases.blip(30))
    inputs = make_inputs(instructblip)
    with finegrain_ops.patch(instructblip, PROCESSOR) as handle:
        with pytest.raises(ValueError, match="inputs: expected pixel_values of the 1 images of image_sizes, got 2"):
            handle.region_mask(inputs, [[]], SIZES[:1])
        handle.processor = other
        with pytest.raises(ValueError, match=r"inputs: expected pixel_values of \(30, 30\) pixels"):
            handle.region_mask(inputs, [[], []], SIZES)


def test_the_family(model: Any) -> None:
    with finegrain_ops.patch(model, PROCESSOR) as handle:
        assert handle.family.vision_encoder(model) is model.vision_model
        assert handle.family.box_convention(PROCESSOR) == "auto"


def test_row_gates_are_refused(model: Any) -> None:
    inputs, gate = make_inputs(model), torch.ones(2, NUM_KEYS, dtype=torch.bool)
    with finegrain_ops.patch(model, PROCESSOR) as handle:
        assert handle.row_gate(inputs, "all") is None
        with pytest.raises(ValueError, match=r'rows: expected "all" for model_type'):
            handle.row_gate(inputs)
        for call in (functools.partial(logits, model, inputs), functools.partial(model.generate, **inputs, **GREEDY)):
            with pytest.raises(finegrain_ops.UnsupportedInputError, match="row_gate cannot be used with a Q-Former"):
                call(key_bias=make_bias(), row_gate=gate)
