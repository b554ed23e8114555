"""Tensors as callers may have them: off the alignment of vector loads, and rows further apart than 32 bits count."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor

import finegrain_ops
from finegrain_ops.kernels.arguments import AttentionInputs
from ptx.project import on_ptx
from ptx.report import Kind
from ptx.triton_kernels import FENCES_COPIES, NOT_OURS


def _off_by(elements: int, tensor: Tensor) -> Tensor:
    """The same numbers, at an address that is no multiple of 16 bytes."""
    memory = torch.zeros(tensor.numel() + elements, dtype=tensor.dtype)
    moved = memory[elements:].view(tensor.shape)
    return moved.copy_(tensor)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("which", ["q", "k", "v", "g", "kg", "qv", "qkvg"])
def test_off_alignment(which: str, capability: int) -> None:
    """Of query, key, value and the gradient of the output those in `which` are two bytes off. What cannot be copied
    asynchronously takes another way into shared memory, and both need a fence before wgmma reads.
    """
    torch.manual_seed(0)
    plain = [torch.randn(1, 2, 150, 64).bfloat16() for _ in range(4)]
    tensors = [_off_by(1, t) if name in which else t for name, t in zip("qkvg", plain)]
    results = {}
    with on_ptx(capability) as runner:
        for backend, (query, key, value, grad) in (("triton", tensors), ("reference", plain)):
            leaves = [t.detach().requires_grad_() for t in (query, key, value)]
            output = finegrain_ops.reweighted_attention(*leaves, is_causal=True, backend=backend)
            results[backend] = [output, *torch.autograd.grad(output, leaves, grad)]
    assert set(runner.report.kinds()) <= NOT_OURS, str(runner.report)
    for actual, expected in zip(results["triton"], results["reference"]):
        scale = float(expected.detach().abs().max())
        torch.testing.assert_close(actual, expected, rtol=0, atol=2e-2 * max(1.0, scale))


@pytest.mark.skipif(not FENCES_COPIES, reason="this Triton leaves the fence out everywhere")
def test_with_stages_a_fence_is_missing() -> None:
    """What AttentionInputs.tile is for: if this fails, Triton has mended it, and it can go."""
    with mock.patch("finegrain_ops.kernels.arguments._is_aligned", return_value=True), on_ptx(90) as runner:
        query, key, value = (torch.randn(1, 1, 150, 64).bfloat16() for _ in range(3))
        leaves = [t.requires_grad_() for t in (query, _off_by(1, key), value)]
        finegrain_ops.reweighted_attention(*leaves, is_causal=True, backend="triton").sum().backward()
    assert Kind.WGMMA_UNFENCED in runner.report.kinds()


def _far_apart(rows: Tensor) -> Tensor:
    """(1, 1, N, D), rows 2^23 - 8 elements apart: 6.7 GB, of which only the rows are touched."""
    stride = 2**23 - 8
    memory = torch.empty((len(rows) - 1) * stride + rows.shape[1], dtype=rows.dtype)
    return memory.as_strided((1, 1, *rows.shape), (0, 0, stride, 1)).copy_(rows)


@pytest.mark.parametrize("capability", [80, 90])
def test_offsets_beyond_32_bits(capability: int) -> None:
    rows, query = torch.randn(400, 16).half(), torch.randn(1, 1, 100, 16).half()
    key = _far_apart(rows)
    expected = finegrain_ops.reweighted_attention(query, rows[None, None], rows[None, None], backend="reference")
    with on_ptx(capability) as runner:
        actual = finegrain_ops.reweighted_attention(query, key, key, backend="triton")
    assert set(runner.report.kinds()) <= NOT_OURS, str(runner.report)
    torch.testing.assert_close(actual, expected, rtol=0, atol=4e-3)
    with mock.patch.object(AttentionInputs, "_wide_offsets", return_value=False), on_ptx(capability) as runner:
        finegrain_ops.reweighted_attention(query, key, key, backend="triton")
    assert Kind.GLOBAL_OUT_OF_BOUNDS in runner.report.kinds()
