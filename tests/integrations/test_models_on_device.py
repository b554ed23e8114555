"""Patched models on the device that `make gpu` names, on a CPU otherwise, in every dtype that models are run in.

Against eager attention in float32 with the bias in its mask: float32 to 5e-5, as everywhere; in half precision the
error may be twice that of eager attention in the same dtype, which rounds as often.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import finegrain_ops
import tiny_qformer
from tiny_models import IMAGE_TOKEN, TINY, EagerOracle

IMAGE_SIZES = [(30, 67), (22, 24), (41, 60)]  # two in the first prompt
GREEDY = {"max_new_tokens": 5, "do_sample": False, "suppress_tokens": [96, 97, 98, 99]}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def decoder(name: str, device: str) -> tuple[Any, dict[str, torch.Tensor], torch.Tensor]:
    """Model, inputs of a left-padded batch, bias of one region in each prompt."""
    inputs = {key: value.to(device) for key, value in TINY[name].inputs(IMAGE_SIZES).items()}
    bias = torch.zeros(inputs["input_ids"].shape, device=device)
    for i, row in enumerate(inputs["input_ids"]):
        bias[i, (row == IMAGE_TOKEN).nonzero()[2 + i : 10 + i, 0]] = 2.1 * (-1) ** i
    return TINY[name].make_model().to(device), inputs, bias


def logits(model: Any, inputs: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    pixels = {"pixel_values": inputs["pixel_values"].to(model.dtype)}
    with torch.no_grad():
        return model(**{**inputs, **pixels}, **options).logits


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", TINY)
def test_decoders(name: str, dtype: torch.dtype, device: str) -> None:
    model, inputs, bias = decoder(name, device)
    real = inputs["attention_mask"].bool()
    with EagerOracle(model, bias):
        exact = logits(model, inputs)[real]
        eager = logits(model.to(dtype), inputs)[real]
    plain = logits(model, inputs)[real]
    with finegrain_ops.patch(model):
        assert torch.equal(logits(model, inputs)[real], plain)
        actual = logits(model, inputs, key_bias=bias)[real]
    require_agreement(actual, exact, eager, plain)


@pytest.mark.parametrize("name", TINY)
def test_decoders_in_float64(name: str) -> None:
    """On a CPU, as checks of gradients want it: float32's logits, which are eager attention's in float32."""
    model, inputs, bias = decoder(name, "cpu")
    real = inputs["attention_mask"].bool()
    with EagerOracle(model, bias):
        expected = logits(model, inputs)[real]
    with finegrain_ops.patch(model.double()):
        actual = logits(model, inputs, key_bias=bias)[real]
    torch.testing.assert_close(actual.float(), expected, rtol=0, atol=5e-4)  # float32 rounds by as much as 1e-4


def require_agreement(actual: torch.Tensor, exact: torch.Tensor, eager: torch.Tensor, plain: torch.Tensor) -> None:
    def error(result: torch.Tensor) -> float:
        difference = result.float() - exact
        return float(difference.abs().max() if result.dtype == torch.float32 else difference.square().mean().sqrt())

    budget = 5e-5 if actual.dtype == torch.float32 else 2 * error(eager)
    assert error(actual) <= budget
    assert error(plain) > 2 * budget  # or a lost bias would not be seen


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
@pytest.mark.parametrize("name", ["LLaVA-1.5", "Qwen2.5-VL"])
def test_generate(name: str, options: dict, device: str) -> None:
    model, inputs, bias = decoder(name, device)
    with EagerOracle(model, bias):
        expected = model.generate(**inputs, **GREEDY, **options)
    with finegrain_ops.patch(model):
        assert torch.equal(model.generate(**inputs, **GREEDY, **options, key_bias=bias), expected)
        gate = torch.ones_like(bias, dtype=torch.bool)
        gated = model.generate(**inputs, **GREEDY, **options, key_bias=bias, row_gate=gate)  # every row: the same
        assert torch.equal(gated, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_qformer(dtype: torch.dtype, device: str) -> None:
    model = tiny_qformer.make_model().to(device)
    inputs = {key: value.to(device) for key, value in tiny_qformer.make_inputs(model).items()}
    bias = tiny_qformer.make_bias().to(device)
    with tiny_qformer.EagerOracle(model, bias):
        exact = logits(model, inputs)
    model = model.to(dtype)
    with tiny_qformer.EagerOracle(model, bias.to(dtype)):
        eager = logits(model, inputs)
    plain = logits(model, inputs)
    with finegrain_ops.patch(model):
        actual = logits(model, inputs, key_bias=bias)
    require_agreement(actual, exact, eager, plain)
