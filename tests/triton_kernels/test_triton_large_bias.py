"""Rows with nothing but keys that a bias nearly removes, rows without a key, and biases that cannot change anything."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import large_bias_cases
from finegrain_ops.backends.interface import LARGEST_BIAS
from finegrain_ops.kernels import attention_decode, key_bias
from finegrain_ops.kernels.arguments import Units
from finegrain_ops.kernels.softmax import LOWEST
from test_bias_gradient import check_no_gradient

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("small_tiles")]


@pytest.mark.parametrize("fill", [torch.finfo(torch.float32).min, -1e9, 1e6])
@pytest.mark.parametrize("check", ["check_attention", "check_few_rows", "check_packed", "check_map"])
def test_large_bias(check: str, fill: float, device: str) -> None:
    getattr(large_bias_cases, check)(fill, 16, torch.float32, "triton", device)


def test_large_bias_in_the_forward_kernel(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr(attention_decode, "MOST_ROWS", 0)
    large_bias_cases.check_few_rows(-1e9, 16, torch.float32, "triton", device)


def test_no_gradient_where_the_region_is_everything(dtype: torch.dtype, device: str) -> None:
    check_no_gradient("triton", dtype, device)


@pytest.mark.parametrize("scale", [None, 1e-6, 3.0, -0.1, 0.0])
@pytest.mark.parametrize("head_dim", [1, 8, 16, 19, 32, 64, 80, 88, 96, 104, 112, 128, 160, 192, 224, 256])
def test_the_first_shift_is_below_every_score(head_dim: int, scale: float | None) -> None:
    """And far enough that what it is subtracted from leaves it as it is: the first correction is 2^-inf, 0."""
    units = Units.of(head_dim**-0.5 if scale is None else scale)
    lowest, bias = np.float32(LOWEST.value), np.float32(-LARGEST_BIAS * units.bias_multiplier)
    score = bias * np.float32(units.factor)
    assert math.frexp(float(-lowest))[0] == 0.5, "a power of two"
    assert score >= -(2.0**18)
    assert lowest - score == lowest
    assert np.exp2(lowest - score) == 0.0
    assert lowest - lowest == 0.0


def test_backends_clamp_alike() -> None:
    from finegrain_ops.backends.cuda import sources

    assert key_bias.LARGEST_BIAS.value == LARGEST_BIAS
    assert f"constexpr float LARGEST_BIAS = {LARGEST_BIAS}f;" in (sources.folder() / "scores.cuh").read_text()


@pytest.mark.parametrize("by", ["padding", "bias"])
def test_the_unfilled_end_of_a_cache_may_hold_anything(by: str, device: str) -> None:
    large_bias_cases.check_unfilled_cache(by, torch.float32, "triton", device, atol=5e-6)
