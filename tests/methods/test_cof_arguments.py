"""What CoF refuses, before any pass, and its presets."""

from __future__ import annotations

import math

import pytest
import torch
from PIL import Image

from finegrain_ops import CoF, UnsupportedModelError
from finegrain_ops.methods.cof import PRESETS
from talking_llava import count_calls, make_images, make_processor, traces

BAD_OPTIONS = {
    "negative weight": ({"weight": -1.0}, ValueError, "weight: expected a finite number >= 0"),
    "NaN weight": ({"weight": float("nan")}, ValueError, "weight: expected"),
    "weight is text": ({"weight": "2"}, TypeError, "weight: expected"),
    "expand 0": ({"expand": 0}, ValueError, "expand: expected a finite number > 0"),
    "expand infinite": ({"expand": math.inf}, ValueError, "expand: expected"),
    "policy": (
        {"on_missing_box": "ignore"},
        ValueError,
        "on_missing_box: expected one of 'whole_image', 'plain', 'raise'",
    ),
    "rows": ({"rows": "last"}, ValueError, "rows: expected one of 'all', 'after_image', got 'last'"),
    "convention": ({"box_convention": "cm"}, ValueError, "box_convention: expected one of"),
    "grounding": ({"grounding": "no"}, TypeError, "grounding: expected True or False"),
    "prompt": ({"prompt": "Where is it?"}, ValueError, 'prompt: expected "{question}" in it'),
    "retry_prompt": ({"retry_prompt": 3}, TypeError, "retry_prompt: expected text"),
    "no tokens": ({"grounding_tokens": 0}, ValueError, "grounding_tokens: expected an integer > 0"),
    "grounding_generation": ({"grounding_generation": {"num_return_sequences": 2}}, ValueError, "num_return_sequences"),
}


@pytest.mark.parametrize(("options", "error", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_bad_options(model, processor, options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        CoF(model, processor, **options)
    assert not traces(model)


def test_a_model_that_cannot_be_patched(processor) -> None:
    with pytest.raises(UnsupportedModelError, match="patch: expected a model of one of the families"):
        CoF(torch.nn.Linear(2, 2), processor)


BAD_CALLS = {
    "more questions": (
        {"questions": ["a", "b"]},
        ValueError,
        "questions: expected one for each of the 1 images, got 2",
    ),
    "none": ({"images": [], "questions": []}, ValueError, "images: expected at least one"),
    "one image": ({"images": Image.new("RGB", (9, 9))}, TypeError, "images: expected a list, got"),
    "one question": ({"questions": "What?"}, TypeError, "questions: expected a list, got str"),
    "question is none": ({"questions": [None]}, TypeError, r"questions\[0\]: expected a str, got NoneType"),
    "image is none": ({"images": [None]}, TypeError, r"images\[0\]: expected a Pillow image or a path"),
    "boxes": ({"boxes": []}, ValueError, "boxes: expected an entry for each of the 1 images, got 0"),
    "box outside": ({"boxes": [(90, 0, 99, 9)]}, ValueError, r"boxes\[0\]: expected a box that overlaps the image"),
    "key_bias": ({"key_bias": torch.zeros(1, 9)}, ValueError, "key_bias: expected only settings of generation"),
    "num_return_sequences": ({"num_return_sequences": 2}, ValueError, "num_return_sequences: expected 1"),
    "an image token asked for": ({"questions": ["<image>?"]}, ValueError, "image"),
}


@pytest.mark.parametrize(("arguments", "error", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_calls_stop_before_any_pass(model, processor, monkeypatch, arguments: dict, error: type, message) -> None:
    generate = count_calls(monkeypatch, model, "generate")
    arguments = {"images": make_images(1), "questions": ["What?"], **arguments}
    cof = CoF(model, processor)
    with pytest.raises(error, match=message):
        cof.answer_batch(**arguments)
    assert not generate
    monkeypatch.undo()
    assert not traces(model)


@pytest.mark.parametrize("weight", [torch.ones(7, 1), torch.full((2, 4), -1.0)], ids=["shape", "values"])
def test_weights_per_layer_are_checked_before_any_pass(model, processor, monkeypatch, weight) -> None:
    generate = count_calls(monkeypatch, model, "generate")
    with pytest.raises(ValueError, match="weight: expected"):
        CoF(model, processor, weight=weight).answer(make_images(1)[0], "What?")
    assert not generate


def test_boxes_without_grounding(model, processor) -> None:
    with pytest.raises(ValueError, match="boxes: expected None with grounding=False"):
        CoF(model, processor, grounding=False).answer(make_images(1)[0], "What?", boxes=(0, 0, 9, 9))


def test_a_processor_of_other_geometry(model, monkeypatch) -> None:
    """Fewer image tokens in the prompt than the pixels make."""
    generate = count_calls(monkeypatch, model, "generate")
    other = make_processor()
    other.patch_size = 8
    with pytest.raises(ValueError, match="inputs: expected 64 image tokens for the 1 images of image_sizes, got 36"):
        CoF(model, other).answer(make_images(1)[0], "What?")
    assert not generate


# --- presets --------------------------------------------------------------------------------------------------------


def test_presets(model, processor) -> None:
    numbers = {name: (p["weight"], p["expand"]) for name, p in PRESETS.items()}
    assert numbers == {"llava-1.5-7b": (2.0, 1.3), "llava-1.5-13b": (4.5, 1.0), "instructblip-13b": (22.0, 1.0)}
    cof = CoF.from_preset("llava-1.5-13b", model, processor, expand=1.5, on_missing_box="raise")
    assert (cof.weight, cof.expand, cof.on_missing_box) == (4.5, 1.5, "raise")
    with pytest.raises(ValueError, match=r"preset: expected one of 'llava-1\.5-7b'"):
        CoF.from_preset("llava", model, processor)
