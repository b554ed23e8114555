"""The gradient of a bias that cannot change anything: the same for all keys that a row sees, it is 0.

d(weight) divides it by the weight, so what rounding leaves of it must be small beside the terms that cancel.
"""

from __future__ import annotations

import pytest
import torch

from devices import require_support, ways
from finegrain_ops import reweighted_attention


def _gradient_of_weight(backend: str, dtype: torch.dtype, device: str, weight: float) -> tuple[float, float]:
    """d(weight) where the region covers every key; and float32's rounding of the terms that it is the sum of."""
    generator = torch.Generator().manual_seed(0)
    query, key, value, grad = (torch.randn(2, 2, 80, 16, generator=generator).to(device, dtype) for _ in range(4))
    tensor = torch.tensor(weight, device=device, requires_grad=True)
    region = torch.ones(80, dtype=torch.bool, device=device)
    output = reweighted_attention(query, key, value, region, tensor, is_causal=True, backend=backend)
    (gradient,) = torch.autograd.grad((output.float() * grad.float()).sum(), tensor)
    terms = (grad.double() @ value.double().transpose(-1, -2)).abs().amax(-1).sum()
    return float(gradient), float(terms) * torch.finfo(torch.float32).eps / weight


def check_no_gradient(backend: str, dtype: torch.dtype, device: str) -> None:
    gradient, rounding = _gradient_of_weight(backend, dtype, device, 1e-6)
    assert abs(gradient) <= rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ways("reference"))
def test_no_gradient_where_the_region_is_everything(backend: str, dtype: torch.dtype, device: str) -> None:
    """sdpa is left out: it can only give PyTorch's kernels the output as it was rounded."""
    require_support(backend, dtype)
    check_no_gradient(backend, dtype, device)


def test_lse_keeps_its_part(device: str) -> None:
    """sum_j db_j is the sum of dlse over the rows that see a key: with an lse in the loss there is a gradient."""
    query, key, value = torch.randn(3, 1, 2, 30, 16, device=device).unbind(0)
    bias = torch.zeros(30, device=device, requires_grad=True)
    _, lse = reweighted_attention(query, key, value, key_bias=bias, return_lse=True, backend="reference")
    (gradient,) = torch.autograd.grad(lse.sum(), bias)
    torch.testing.assert_close(gradient.sum(), torch.tensor(60.0, device=device))
