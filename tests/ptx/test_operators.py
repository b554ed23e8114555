"""Each operator once, through the package: its kernels as compiled, against the reference backend."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor

import finegrain_ops
from ptx import cuda_kernels
from ptx.project import on_cuda_ptx, on_ptx
from ptx.triton_kernels import NOT_OURS

CAPABILITIES = pytest.mark.parametrize("capability", [80, 90])
_TOLERANCE = 2e-2  # of half precision, for numbers of about 1


def _normal(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def _check(
    call: Callable[[str], Tensor],
    where: AbstractContextManager[Any],
    backend: str,
    inputs: tuple[Tensor, ...] = (),
) -> Any:
    """Compares results, and gradients of `inputs`, with those of the reference backend; there are no findings."""
    results = {}
    with where as runner:
        for name in (backend, "reference"):
            result = call(name)
            weights = _normal(*result.shape, dtype=result.dtype, seed=1)
            gradients = torch.autograd.grad((result * weights).sum(), inputs) if inputs else ()
            results[name] = (result, *gradients)
    assert set(runner.report.kinds()) <= NOT_OURS, str(runner.report)
    assert runner.runs
    for actual, expected in zip(results[backend], results["reference"]):
        scale = max(1.0, expected.detach().abs().max().item())
        torch.testing.assert_close(actual.float(), expected.float(), rtol=0, atol=_TOLERANCE * scale)
    return runner


@CAPABILITIES
def test_forward_and_backward(capability: int) -> None:
    query, key, value = (_normal(1, 2, n, 64).requires_grad_() for n in (100, 150, 150))
    bias = _normal(1, 150, dtype=torch.float32).requires_grad_()

    def call(backend: str) -> Tensor:
        return finegrain_ops.reweighted_attention(query, key, value, key_bias=bias, is_causal=True, backend=backend)

    runner = _check(call, on_ptx(capability), "triton", (query, key, value, bias))
    kernels = {run.kernel for run in runner.runs}
    assert {"attention_forward_kernel", "attention_backward_query_kernel", "attention_backward_keys_kernel"} <= kernels
    executed = sum(run.instructions["wgmma"] for run in runner.runs)
    assert (executed > 0) == (capability == 90)


@CAPABILITIES
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_gradients_of_rows_that_fill_no_tile(is_causal: bool, capability: int) -> None:
    """The last rows are the second range of the masked loop. Triton up to 3.5 compiled an assignment to the variable
    of a loop as if it were not there: no kernel may do that.
    """
    query, key, value = (_normal(1, 1, 90, 64, seed=seed).requires_grad_() for seed in range(3))

    def call(backend: str) -> Tensor:
        return finegrain_ops.reweighted_attention(query, key, value, is_causal=is_causal, backend=backend)

    _check(call, on_ptx(capability), "triton", (query, key, value))


@CAPABILITIES
def test_packed(capability: int) -> None:
    lengths = torch.tensor([0, 90, 91, 160], dtype=torch.int32)
    query, key, value = (_normal(160, 2, 64, seed=seed) for seed in range(3))

    def call(backend: str) -> Tensor:
        return finegrain_ops.reweighted_attention_varlen(
            query, key, value, cu_seqlens_q=lengths, cu_seqlens_k=lengths, max_seqlen_q=90, max_seqlen_k=90,
            is_causal=True, backend=backend,
        )  # fmt: skip

    _check(call, on_ptx(capability), "triton")


@CAPABILITIES
def test_decode(capability: int) -> None:
    """One row, so the keys are dealt to several blocks, and what these leave is merged."""
    query, key, value = _normal(1, 4, 1, 64), _normal(1, 2, 300, 64), _normal(1, 2, 300, 64, seed=1)

    def call(backend: str) -> Tensor:
        return finegrain_ops.reweighted_attention(query, key, value, backend=backend)

    runner = _check(call, on_ptx(capability), "triton")
    assert any("decode" in run.kernel for run in runner.runs), runner.summary()


@CAPABILITIES
def test_map(capability: int) -> None:
    query, key = _normal(1, 2, 70, 64).requires_grad_(), _normal(1, 2, 100, 64).requires_grad_()

    def call(backend: str) -> Tensor:
        return finegrain_ops.attention_map(query, key, is_causal=True, backend=backend)

    _check(call, on_ptx(capability), "triton", (query, key))


def _images(dtype: torch.dtype, heights: tuple[int, int]) -> list[Tensor]:
    return [(255 * torch.rand(3, n, 50, generator=torch.Generator().manual_seed(n))).to(dtype) for n in heights]


BOXES = torch.tensor([[3.0, 4.5, 33.0, 29.0], [0.0, 0.0, 50.0, 30.0]])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
@pytest.mark.parametrize("is_list", [False, True])
def test_crop(is_list: bool, dtype: torch.dtype) -> None:
    """The images of a list lie at addresses that are in a table, those of a tensor at strides."""
    images: Tensor | list[Tensor] = _images(dtype, (40, 30)) if is_list else torch.stack(_images(dtype, (40, 40)))

    def call(backend: str) -> Tensor:
        return finegrain_ops.crop_resize(images, BOXES, size=(20, 24), backend=backend)

    _check(call, on_ptx(80), "triton")


@pytest.mark.parametrize(("architecture", "dtype"), [(70, torch.float16), (75, torch.float16), (80, torch.bfloat16)])
def test_cuda_forward(architecture: int, dtype: torch.dtype) -> None:
    if reason := cuda_kernels.missing(architecture):
        pytest.skip(reason)
    query, key, value = (
        _normal(1, 4, 70, 64, dtype=dtype),
        *(_normal(1, 2, 90, 64, dtype=dtype, seed=s) for s in (0, 1)),
    )

    def call(backend: str) -> Tensor:
        return finegrain_ops.reweighted_attention(query, key, value, is_causal=True, backend=backend)

    _check(call, on_cuda_ptx(architecture), "cuda")
