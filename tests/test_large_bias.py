"""Biases that nearly remove a key, on the backends that a CPU has; on a device all of them."""

from __future__ import annotations

import math

import pytest
import torch

import large_bias_cases
import oracle
from devices import require_support, ways
from finegrain_ops import reweighted_attention
from finegrain_ops.backends.interface import LARGEST_BIAS, clamp_bias
from large_bias_cases import ALL_FILLS

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fill", ALL_FILLS)
@pytest.mark.parametrize("backend", ways("reference", "sdpa"))
@pytest.mark.parametrize("check", ["check_attention", "check_few_rows", "check_packed", "check_map"])
def test_large_bias(check: str, backend: str, fill: float, dtype: torch.dtype, device: str) -> None:
    operator = {"check_packed": "reweighted_attention_varlen", "check_map": "attention_map"}
    require_support(backend, dtype, operator.get(check, "reweighted_attention"))
    getattr(large_bias_cases, check)(fill, 64, dtype, backend, device)


def test_only_minus_infinity_removes() -> None:
    bias = torch.tensor([-math.inf, torch.finfo(torch.float32).min, -1e9, -3.0, 0.0, 1e30, math.nan])
    expected = torch.tensor([-math.inf, -LARGEST_BIAS, -LARGEST_BIAS, -3.0, 0.0, LARGEST_BIAS, math.nan])
    torch.testing.assert_close(clamp_bias(bias), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("slope", [0.5, 0.84])
@pytest.mark.parametrize("backend", ways("reference", "sdpa"))
def test_biases_that_are_large_on_purpose_count(backend: str, slope: float, device: str) -> None:
    """ALiBi as a bias per key, at the end of a context of 100,000 tokens."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 1, 50, 16, generator=generator).to(device) for _ in range(3))
    bias = (slope * torch.arange(100_000 - 50, 100_000, dtype=torch.float32)).to(device)
    expected, _ = oracle.reweighted_attention(query, key, value, key_bias=bias.double() - bias[-1].double())
    actual = reweighted_attention(query, key, value, key_bias=bias, backend=backend)
    rounding = 4 * float(bias[-1]) * 2**-24  # of exponents, so relative in the probabilities
    torch.testing.assert_close(actual.double(), expected, atol=2 * rounding * float(value.abs().max()), rtol=0)
