"""Finite biases that nearly remove a key: -1e9, finfo.min and the like, which many people write for a mask.

A row all of whose keys carry one sees them all the same. Finite biases count up to 2^17 (backends/interface.py), where
float32 still holds a score to 1/128; so they do here, and what float32 makes of them is the budget.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import finegrain_ops
import oracle
from tolerances import assert_close

_LARGEST = 2.0**17
FILLS = [torch.finfo(torch.float32).min, -1e30, -1e9, -1e7, -1e5, 1e6, torch.finfo(torch.float32).max]
ALL_FILLS = [pytest.param(fill, id=f"{fill:.0e}") for fill in FILLS]

_KEYS, _FILLED = 70, 40  # under a causal mask the first 40 rows see keys with such a bias only; the first sees none


def tensors(fill: float, head_dim: int, dtype: torch.dtype, device: str) -> tuple[list[Tensor], Tensor]:
    """query, key and value (2, 2, 70, D), and a bias (2, 70)."""
    generator = torch.Generator().manual_seed(50)
    shape = (2, 2, _KEYS, head_dim)
    operands = [torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for _ in range(3)]
    bias = torch.randn((2, _KEYS), generator=generator)
    bias[:, :_FILLED] = fill
    bias[:, [0, 7]] = float("-inf")
    return operands, bias.to(device)


def _clamped(bias: Tensor) -> Tensor:
    return torch.where(bias == float("-inf"), bias, bias.clamp(-_LARGEST, _LARGEST))


def _low_precision(expected: list[Tensor], eager: list[Tensor], dtype: torch.dtype, head_dim: int) -> list[Tensor]:
    """What may be off by as much as eager attention in float32, times how often a kernel rounds what that rounds once:
    a score, what it is counted from, that from one base to another twice, and in half precision once per product of 16
    columns, since a tensor core's accumulator starts from the bias.
    """
    times = 4 + (head_dim / 16 if dtype != torch.float32 else 0)
    return [torch.where(e.isfinite(), e + times * (a.double() - e), e) for a, e in zip(eager, expected)]


def _compare(
    names: list[str], actual: list[Tensor], results: list[list[Tensor]], dtype: torch.dtype, head_dim: int
) -> None:
    expected, eager = ([t.detach() for t in result] for result in results)
    for name, a, e, low in zip(names, actual, expected, _low_precision(expected, eager, dtype, head_dim), strict=True):
        assert_close(a, e, dtype, name, low)


_NAMES = ["output", "lse", *(f"gradient of {name}" for name in ("query", "key", "value", "key_bias"))]


def _with_gradients(
    attention: Any, operands: list[Tensor], bias: Tensor, *arguments: Any, **options: Any
) -> list[Tensor]:
    """Output, lse and the gradients of query, key, value and bias, causal."""
    leaves = [t.detach().requires_grad_() for t in (*operands, bias)]
    output, lse = attention(*leaves[:3], *arguments, key_bias=leaves[3], is_causal=True, **options)
    return [output, lse, *torch.autograd.grad(output.to(torch.float64).sin().sum(), leaves)]


def check_attention(fill: float, head_dim: int, dtype: torch.dtype, backend: str, device: str = "cpu") -> None:
    """Output, lse and all gradients, causal."""
    operands, bias = tensors(fill, head_dim, dtype, device)

    results = [
        _with_gradients(oracle.reweighted_attention, operands, _clamped(bias), compute_dtype=kept)
        for kept in (torch.float64, torch.float32)
    ]
    options = {"backend": backend, "return_lse": True}
    actual = _with_gradients(finegrain_ops.reweighted_attention, operands, bias, **options)
    _compare(_NAMES, actual, results, dtype, head_dim)
    assert (actual[0][:, :, 0] == 0.0).all()


def check_few_rows(fill: float, head_dim: int, dtype: torch.dtype, backend: str, device: str = "cpu") -> None:
    """Three rows against the keys that carry the bias, as in a decode."""
    (query, key, value), bias = tensors(fill, head_dim, dtype, device)
    query, key, value, bias = query[:, :, :3], key[:, :, :_FILLED], value[:, :, :_FILLED], bias[:, :_FILLED]
    results = [
        list(oracle.reweighted_attention(query, key, value, key_bias=_clamped(bias), compute_dtype=kept))
        for kept in (torch.float64, torch.float32)
    ]
    with torch.no_grad():
        actual = finegrain_ops.reweighted_attention(query, key, value, key_bias=bias, backend=backend, return_lse=True)
    _compare(["output", "lse"], list(actual), results, dtype, head_dim)


def check_packed(fill: float, head_dim: int, dtype: torch.dtype, backend: str, device: str = "cpu") -> None:
    (query, key, value), bias = tensors(fill, head_dim, dtype, device)
    packed = [t[0].transpose(0, 1) for t in (query, key, value)]
    bounds = torch.tensor([0, 33, _KEYS], dtype=torch.int32, device=device)
    arguments = (bounds, bounds, _KEYS, _KEYS)

    results = [
        _with_gradients(oracle.reweighted_attention_varlen, packed, _clamped(bias[0]), *arguments, compute_dtype=kept)
        for kept in (torch.float64, torch.float32)
    ]
    options = {"backend": backend, "return_lse": True}
    actual = _with_gradients(finegrain_ops.reweighted_attention_varlen, packed, bias[0], *arguments, **options)
    _compare(_NAMES, actual, results, dtype, head_dim)


def check_map(fill: float, head_dim: int, dtype: torch.dtype, backend: str, device: str = "cpu") -> None:
    (query, key, _), bias = tensors(fill, head_dim, dtype, device)

    def run(bias: Tensor, attention_map: Any, **options: Any) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in (query, key, bias)]
        result = attention_map(*leaves[:2], key_bias=leaves[2], is_causal=True, **options)
        return [result, *torch.autograd.grad(result.to(torch.float64).sin().sum(), leaves)]

    names = ["map", *(f"gradient of {name}" for name in ("query", "key", "key_bias"))]
    results = [run(_clamped(bias), oracle.attention_map, compute_dtype=kept) for kept in (torch.float64, torch.float32)]
    _compare(names, run(bias, finegrain_ops.attention_map, backend=backend), results, dtype, head_dim)


def check_unfilled_cache(by: str, dtype: torch.dtype, backend: str, device: str = "cpu", *, atol: float) -> None:
    """One row, and a cache whose last block is partly filled: what lies beyond is NaN, and 0 * NaN is NaN, so it must
    not be read. `by`: what hides it, "padding" or "bias".
    """
    query, key, value = torch.randn(3, 2, 2, 70, 16, dtype=dtype, device=device).unbind(0)
    attend = torch.arange(70, device=device) < torch.tensor([[37], [50]], device=device)
    mask = {"key_padding_mask": attend} if by == "padding" else {"key_bias": torch.where(attend, 0.0, float("-inf"))}

    def run(fill: float, backend: str) -> Tensor:
        cache = (t.masked_fill(~attend[:, None, :, None], fill) for t in (key, value))
        return finegrain_ops.reweighted_attention(query[:, :, :1], *cache, **mask, backend=backend)

    torch.testing.assert_close(run(float("nan"), backend), run(0.0, "reference"), atol=atol, rtol=0)
