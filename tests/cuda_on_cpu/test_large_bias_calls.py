"""The same as tests/triton_kernels/test_triton_large_bias.py, of the CUDA kernels."""

from __future__ import annotations

import pytest
import torch
from cpu_launcher import CpuLauncher

import large_bias_cases
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
    large_bias_cases.check_unfilled_cache(by, torch.float16, "cuda", atol=2e-3)
