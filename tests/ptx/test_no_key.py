"""Rows that have seen no key, or only keys with a bias that nearly removes them, in the compiled kernels.

x * c - x * c, contracted to one fused multiply-add, is the rounding error of the product: with a running maximum of
-1e37 it made every padded row NaN, on GPUs only.
"""

from __future__ import annotations

import pytest
import torch

import finegrain_ops
import large_bias_cases
import oracle
from large_bias_cases import ALL_FILLS
from ptx.project import on_cuda_ptx, on_ptx
from ptx.triton_kernels import NOT_OURS
from tolerances import assert_close

HEAD_DIMS = [16, 32, 48, 64, 72, 80, 88, 96, 104, 112, 128, 160, 192, 224, 256]
WHERE = [
    pytest.param(on_ptx, 80, "triton", id="triton-sm_80"),
    pytest.param(on_ptx, 90, "triton", id="triton-sm_90"),
    pytest.param(on_cuda_ptx, 80, "cuda", id="cuda-sm_80"),
]
IN_WHERE = pytest.mark.parametrize(("execute", "capability", "backend"), WHERE)
SOME_DIMS = [16, 64, 88, 128, 256]  # of the others make test-slow


def at_every_dim(dtypes: list[torch.dtype], sample: bool) -> pytest.MarkDecorator:
    """Every place, type and head dimension; with `sample` some of them, the others are slow."""
    values = []
    for where in WHERE:
        for dtype in dtypes:
            for dim in HEAD_DIMS:
                if dim > 128 and where.values[2] == "cuda":
                    continue
                is_slow = sample and (dim not in SOME_DIMS or dtype is not torch.bfloat16)
                name = f"{where.id}-{str(dtype).removeprefix('torch.')}-d{dim}"
                values.append(pytest.param(*where.values, dtype, dim, id=name, marks=[pytest.mark.slow] * is_slow))
    return pytest.mark.parametrize(("execute", "capability", "backend", "dtype", "head_dim"), values)


@at_every_dim([torch.bfloat16], sample=False)
def test_two_layers_of_a_left_padded_batch(
    execute, capability: int, backend: str, dtype: torch.dtype, head_dim: int
) -> None:
    """The rows of the padding see no key; the second layer would spread what the first gives there."""
    torch.manual_seed(0)
    states = torch.randn(2, 1, 100, head_dim).to(dtype)
    attend = torch.ones(2, 100, dtype=torch.bool)
    attend[1, :30] = False
    expected, eager, actual = states.double(), states, states
    with execute(capability) as runner:
        for _ in range(2):
            expected, _ = oracle.reweighted_attention(*[expected] * 3, key_padding_mask=attend, is_causal=True)
            eager, _ = oracle.reweighted_attention(
                *[eager] * 3, key_padding_mask=attend, is_causal=True, compute_dtype=dtype
            )
            actual = finegrain_ops.reweighted_attention(
                *[actual] * 3, key_padding_mask=attend, is_causal=True, backend=backend
            )
    assert set(runner.report.kinds()) <= NOT_OURS, str(runner.report)
    assert (actual[1, :, :30] == 0.0).all()
    assert_close(actual, expected, dtype, "output of two layers", eager)


@IN_WHERE
@pytest.mark.parametrize("fill", ALL_FILLS)
@pytest.mark.parametrize("check", ["check_attention", "check_few_rows", "check_packed", "check_map"])
def test_large_bias(check: str, fill: float, execute, capability: int, backend: str) -> None:
    with execute(capability) as runner:
        getattr(large_bias_cases, check)(fill, 64, torch.bfloat16, backend)
    assert set(runner.report.kinds()) <= NOT_OURS, str(runner.report)


@at_every_dim([torch.bfloat16, torch.float32], sample=True)
def test_a_mask_of_the_smallest_number(
    execute, capability: int, backend: str, dtype: torch.dtype, head_dim: int
) -> None:
    """finfo.min, at every head dimension: the sign of a rounding error would decide."""
    with execute(capability) as runner:
        large_bias_cases.check_attention(torch.finfo(torch.float32).min, head_dim, dtype, backend)
    assert set(runner.report.kinds()) <= NOT_OURS, str(runner.report)
