"""The Triton backward kernels against the float64 oracle's autograd, and against themselves: equal to the bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attention_cases import ALL_CASES, CASES, Case, check_gradients, differentiable
from finegrain_ops import reweighted_attention
from finegrain_ops.kernels import attention_decode

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("small_tiles")]


@pytest.mark.parametrize("case", ALL_CASES)
def test_arguments(case: Case, dtype: torch.dtype, device: str) -> None:
    check_gradients(case, dtype, "triton", device)


@pytest.mark.parametrize("head_dim", [32, 48, 72, 80, 88, 104, 128, 160, 256])
def test_head_dimensions(head_dim: int, device: str) -> None:
    case = Case(1, 1, 1, 19, 21, head_dim, head_dim, region="bn", soft=True, weight="b", is_causal=True)
    check_gradients(case, torch.float16, "triton", device)


@pytest.mark.parametrize(("head_dim", "value_dim"), [(80, 24), (16, 104)])
def test_value_dimensions(head_dim: int, value_dim: int, device: str) -> None:
    case = Case(1, 2, 1, 19, 21, head_dim, value_dim, bias="bn", gate="n", is_causal=True)
    check_gradients(case, torch.float32, "triton", device)


def _loss(arguments: dict) -> Tensor:
    output, lse = reweighted_attention(**arguments, backend="triton", return_lse=True)
    return output.square().sum() + torch.where(torch.isinf(lse), 0.0, lse).sum()


def _gradients(arguments: dict) -> list[Tensor]:
    leaves = [t for t in arguments.values() if isinstance(t, Tensor) and t.requires_grad]
    return list(torch.autograd.grad(_loss(arguments), leaves))


@pytest.mark.parametrize("name", ["grouped heads", "row gate and padding", "soft region per head, weight per head"])
def test_two_runs_are_equal_to_the_bit(name: str, dtype: torch.dtype, device: str) -> None:
    arguments = differentiable(CASES[name].tensors(dtype, device))
    for first, second in zip(_gradients(arguments), _gradients(arguments)):
        assert torch.equal(first, second)


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("start", [0, 15, 17, 40])
@pytest.mark.parametrize("length", [0, 1, 24])
def test_the_biased_range_begins_and_ends_anywhere(start: int, length: int, is_causal: bool, device: str) -> None:
    """Of d query and of d bias: both kernels have loops with and without a bias."""
    torch.manual_seed(start)
    query, key, value = (t.requires_grad_() for t in torch.randn(3, 1, 2, 64, 16, device=device).unbind(0))
    bias = torch.zeros(1, 64, device=device)
    bias[0, start : start + length] = torch.linspace(1.0, 3.0, min(length, 64 - start), device=device)
    bias.requires_grad_()
    leaves = (query, key, value, bias)
    results = []
    for backend in ("reference", "triton"):
        output = reweighted_attention(query, key, value, key_bias=bias, is_causal=is_causal, backend=backend)
        results.append(torch.autograd.grad(output.square().sum(), leaves))
    for expected, actual in zip(*results):
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_a_large_bias_does_not_reach_rows_that_do_not_exist(device: str) -> None:
    """The last tile of rows is filled up with zeros, whose exponentials under such a bias would be infinite."""
    query, key, value = (torch.randn(1, 1, 19, 16, device=device, requires_grad=True) for _ in range(3))
    bias = torch.tensor([0.0] * 7 + [300.0] * 12, device=device, requires_grad=True)
    leaves = (query, key, value, bias)
    results = []
    for backend in ("reference", "triton"):
        output = reweighted_attention(query, key, value, key_bias=bias, backend=backend)
        results.append(torch.autograd.grad(output.square().sum(), leaves))
    for expected, actual in zip(*results):
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_gradients_after_a_decode_step(device: str) -> None:
    """The kernel for few rows returns the lse that the backward pass starts from."""
    assert attention_decode.MOST_ROWS >= 6
    check_gradients(CASES["decode"], torch.float32, "triton", device)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_under_checkpointing(use_reentrant: bool, device: str) -> None:
    from torch.utils.checkpoint import checkpoint

    query, key, value = (torch.randn(1, 2, 20, 16, device=device, requires_grad=True) for _ in range(3))
    bias = torch.randn(20, device=device, requires_grad=not use_reentrant)
    leaves = [t for t in (query, key, value, bias) if t.requires_grad]

    def layer(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return reweighted_attention(query, key, value, key_bias=bias, is_causal=True, backend="triton").square()

    expected = torch.autograd.grad(layer(query, key, value).sum(), leaves)
    loss = checkpoint(layer, query, key, value, use_reentrant=use_reentrant).sum()
    loss.backward()
    assert all(torch.equal(leaf.grad, e) for leaf, e in zip(leaves, expected))


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_compiled(device: str) -> None:
    """One graph, forward and backward."""
    torch._dynamo.reset()
    arguments = differentiable(CASES["bias and region"].tensors(torch.float32, device))
    leaves = [t for t in arguments.values() if isinstance(t, Tensor) and t.requires_grad]
    compiled = torch.compile(_loss, fullgraph=True, backend="aot_eager")
    for expected, actual in zip(_gradients(arguments), torch.autograd.grad(compiled(arguments), leaves)):
        torch.testing.assert_close(actual, expected)


def test_under_autocast(device: str) -> None:
    """float32 parameters, half-precision attention, float32 gradients."""
    query, key, value = (torch.randn(1, 2, 20, 16, device=device, requires_grad=True) for _ in range(3))
    with torch.autocast(device, dtype=torch.float16):
        output = reweighted_attention(query, key, value, is_causal=True, backend="triton")
    assert output.dtype == torch.float16
    gradients = torch.autograd.grad(output.float().sum(), (query, key, value))
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients)
