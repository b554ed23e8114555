"""`reweighted_attention` against the float64 oracle, over the grid of arguments, on a CPU or a GPU."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import finegrain_ops
import oracle
from attention_cases import ALL_CASES, CASES, Case, check_forward, check_gradients
from devices import require_support, ways
from finegrain_ops import backends, reweighted_attention
from finegrain_ops.backends.interface import AttentionCall
from finegrain_ops.backends.sdpa import engines
from tolerances import assert_close

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(params=ways("reference", "sdpa", "sdpa on any device"))
def backend(request, monkeypatch) -> str:
    """The name of a backend; the third is the path that sdpa takes on devices other than CPUs, here on the CPU."""
    if request.param == "sdpa on any device":
        monkeypatch.setattr(engines, "choose", lambda device: engines.ANY_DEVICE)
        return "sdpa"
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ALL_CASES)
def test_forward(case: Case, dtype: torch.dtype, backend: str, device: str) -> None:
    require_support(backend, dtype)
    check_forward(case, dtype, backend, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ALL_CASES)
def test_gradients(case: Case, dtype: torch.dtype, backend: str, device: str) -> None:
    require_support(backend, dtype)
    check_gradients(case, dtype, backend, device)


@pytest.mark.parametrize("name", ["grouped heads", "row gate and padding", "more keys than queries", "a padded row"])
@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_gradcheck(name: str, backend: str) -> None:
    small = {"heads": 2, "num_queries": 3, "num_keys": 4, "head_dim": 3, "value_dim": 3}
    case = Case(**{**vars(CASES[name]), **small, "kv_heads": 1 if name == "grouped heads" else 2})
    arguments = case.tensors(torch.float64)
    names = [n for n, t in arguments.items() if isinstance(t, torch.Tensor) and t.is_floating_point()]
    finite = torch.isfinite(oracle.reweighted_attention(**arguments)[1])

    def function(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        output, lse = reweighted_attention(
            **{**arguments, **dict(zip(names, tensors))}, backend=backend, return_lse=True
        )
        return output, lse[finite]

    leaves = []
    for n in names:
        leaf = arguments[n].detach().clone()
        leaves.append(leaf.requires_grad_(bool(torch.isfinite(leaf).all())))  # -inf has no finite difference
    assert torch.autograd.gradcheck(function, leaves)


def test_equation_of_the_docstring() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 4, 9, 8, dtype=torch.float64).unbind(0)
    region_mask, weight = torch.rand(2, 9, dtype=torch.float64), torch.tensor(2.5, dtype=torch.float64)
    key_bias = torch.randn(2, 9, dtype=torch.float64)
    scores = 8**-0.5 * query @ key.mT + (key_bias + weight.log() * region_mask)[:, None, None, :]
    scores = scores.masked_fill(~torch.ones(9, 9, dtype=torch.bool).tril(0), float("-inf"))
    actual = reweighted_attention(query, key, value, region_mask, weight, key_bias=key_bias, is_causal=True)
    torch.testing.assert_close(actual, scores.softmax(-1) @ value)


def test_lambda_multiplies_the_odds() -> None:
    """What CoF promises: the region's attention mass over the rest grows by exactly lambda."""
    torch.manual_seed(0)
    query, key = torch.randn(1, 1, 5, 8), torch.randn(1, 1, 12, 8)
    region_mask = torch.arange(12) < 4
    value = region_mask.float()[None, None, :, None]  # the output is the mass on the region
    before = reweighted_attention(query, key, value)
    after = reweighted_attention(query, key, value, region_mask, 4.5)
    torch.testing.assert_close(after / (1 - after), 4.5 * before / (1 - before))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_bias_equals_sdpa(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 4, 33, 16, dtype=dtype).unbind(0)
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    assert torch.equal(reweighted_attention(query, key, value, is_causal=True, backend="sdpa"), expected)
    ones = torch.zeros(33, dtype=torch.bool)
    assert torch.equal(reweighted_attention(query, key, value, ones, 7.0, is_causal=True, backend="sdpa"), expected)


@pytest.mark.parametrize("backend", ways("reference", "sdpa"))
@pytest.mark.parametrize(
    "shape", [(0, 4, 3, 5), (2, 0, 3, 5), (2, 4, 0, 5), (2, 4, 3, 0), (0, 0, 0, 0)], ids=["B", "H", "Nq", "Nk", "all"]
)
def test_empty_inputs(shape: tuple[int, int, int, int], backend: str, device: str) -> None:
    batch, heads, num_queries, num_keys = shape
    query = torch.randn(batch, heads, num_queries, 8, device=device, requires_grad=True)
    key = torch.randn(batch, heads, num_keys, 8, device=device, requires_grad=True)
    value = torch.randn(batch, heads, num_keys, 6, device=device, requires_grad=True)
    bias = torch.zeros(batch, num_keys, device=device, requires_grad=True)
    region = torch.ones(num_keys, device=device)
    output, lse = reweighted_attention(
        query, key, value, region, 2.0, key_bias=bias, is_causal=True, return_lse=True, backend=backend
    )
    assert output.shape == (batch, heads, num_queries, 6)
    assert lse.shape == (batch, heads, num_queries)
    assert (output == 0).all()
    assert (lse == -math.inf).all()
    output.sum().backward()
    assert all(t.grad is not None and (t.grad == 0).all() for t in (query, key, value, bias))


def test_half_precision_bias_is_not_rounded() -> None:
    """A bias of 100.25 in bfloat16 would become 100; the gate forces it through columns, where it is split."""
    dtype = torch.bfloat16
    query = torch.zeros(1, 1, 2, 8, dtype=dtype)
    key_bias = torch.tensor([100.25, 100.0])
    value = torch.tensor([1.0, 0.0], dtype=dtype)[None, None, :, None]
    for gate in (None, torch.tensor([True, True])):
        _, lse = reweighted_attention(
            query, query, value, key_bias=key_bias, row_gate=gate, return_lse=True, backend="sdpa"
        )
        torch.testing.assert_close(lse, torch.logsumexp(key_bias, 0).expand(1, 1, 2), rtol=1e-6, atol=0)


def test_autocast(device: str) -> None:
    query, key, value = torch.randn(3, 1, 2, 9, 8, device=device).unbind(0)
    key_bias = torch.randn(9, device=device, requires_grad=True)
    with torch.autocast(device, torch.bfloat16):
        output, lse = reweighted_attention(query, key.half(), value, key_bias=key_bias, return_lse=True)
    assert output.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    expected, _ = oracle.reweighted_attention(query, key, value, key_bias=key_bias)
    low, _ = oracle.reweighted_attention(query, key, value, key_bias=key_bias, compute_dtype=torch.bfloat16)
    assert_close(output, expected, torch.bfloat16, "output", low)
    output.sum().backward()
    assert key_bias.grad is not None
    assert key_bias.grad.dtype == torch.float32


def test_two_runs_are_equal_to_the_bit(device: str) -> None:
    arguments = CASES["bias and region"].tensors(torch.float32, device)
    runs = []
    for _ in range(2):
        leaves = {
            n: t.detach().requires_grad_()
            for n, t in arguments.items()
            if isinstance(t, torch.Tensor) and t.dtype.is_floating_point
        }
        output = finegrain_ops.reweighted_attention(**{**arguments, **leaves})
        runs.append([output, *torch.autograd.grad(output.sum(), list(leaves.values()))])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@pytest.mark.parametrize("with_gate", [False, True], ids=["", "gate"])
def test_no_quadratic_memory(with_gate: bool) -> None:
    """No tensor with Nq x Nk elements is made, forward or backward, on the way that auto takes on a CPU.

    The backend is called directly: a dispatch mode does not see what happens within an operator.
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple) else (result,):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.untyped_storage().nbytes())
            return result

    n = 2048
    query, key, value = (torch.randn(1, 1, n, 8) for _ in range(3))
    gate = torch.rand(1, n) > 0.5 if with_gate else None
    call = AttentionCall(query, key, value, torch.randn(1, 1, n), None, gate, True, 0.3)
    sdpa = backends.load("sdpa")
    with Watch():
        output, lse = sdpa.forward(call)
        sdpa.backward(call, output, lse, torch.ones_like(output), None, True)
    assert largest < 4 * n * 64
    with Watch():
        backends.load("reference").forward(call)
    assert largest >= 4 * n * n, "the watch sees nothing"
