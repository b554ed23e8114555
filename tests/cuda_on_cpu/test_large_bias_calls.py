"""The same as tests/triton_kernels/test_triton_large_bias.py, of the CUDA kernels."""

from __future__ import annotations

import math

import pytest
import torch
from cpu_launcher import CpuLauncher

import large_bias_cases
from finegrain_ops import reweighted_attention
from large_bias_cases import ALL_FILLS
from test_bias_gradient import check_no_gradient

pytestmark = pytest.mark.usefixtures("small_tiles")


@pytest.fixture(autouse=True)
def launcher(use_launcher) -> CpuLauncher:
    return use_launcher(CpuLauncher(75))


@pytest.mark.parametrize("fill", ALL_FILLS)
@pytest.mark.parametrize("check", ["check_attention", "check_few_rows", "check_packed", "check_map"])
def test_large_bias(check: str, fill: float) -> None:
    getattr(large_bias_cases, check)(fill, 16, torch.float16, "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_no_gradient_where_the_region_is_everything(dtype: torch.dtype) -> None:
    check_no_gradient("cuda", dtype, "cpu")


@pytest.mark.parametrize("by", ["padding", "bias"])
def test_the_unfilled_end_of_a_cache_may_hold_anything(by: str) -> None:
    query, key, value = torch.randn(3, 2, 2, 70, 16, dtype=torch.float16).unbind(0)
    query, attend = query[:, :, :1], torch.arange(70) < torch.tensor([37, 50])[:, None]
    key, value = (t.masked_fill(~attend[:, None, :, None], 0.0) for t in (key, value))
    mask = {"key_padding_mask": attend} if by == "padding" else {"key_bias": torch.where(attend, 0.0, -math.inf)}
    expected = reweighted_attention(query, key, value, **mask, backend="reference")
    key, value = (t.masked_fill(~attend[:, None, :, None], math.nan) for t in (key, value))
    actual = reweighted_attention(query, key, value, **mask, backend="cuda")
    torch.testing.assert_close(actual, expected, atol=2e-3, rtol=0)
