"""The CUDA C++ kernels for GPUs on which Triton has no tensor cores. Not part of this release: it always says so."""

from __future__ import annotations

from torch import Tensor

from .interface import AttentionCall, AttentionFeatures, AttentionGradients, MapCall, MapGradients, PackedCall

_MISSING = 'this release of finegrain_ops has no CUDA C++ kernels yet; use "triton" or "sdpa" on a GPU'


def unavailable_reasons() -> list[str]:
    return [_MISSING]


def not_supported_reasons(features: AttentionFeatures) -> list[str]:
    return [_MISSING]


def forward(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    raise NotImplementedError(_MISSING)


def backward(
    call: AttentionCall,
    output: Tensor,
    lse: Tensor,
    grad_output: Tensor,
    grad_lse: Tensor | None,
    bias_needs_grad: bool,
) -> AttentionGradients:
    raise NotImplementedError(_MISSING)


def packed_forward(call: PackedCall) -> tuple[Tensor, Tensor | None]:
    raise NotImplementedError(_MISSING)


def packed_backward(
    call: PackedCall,
    output: Tensor,
    lse: Tensor,
    grad_output: Tensor,
    grad_lse: Tensor | None,
    bias_needs_grad: bool,
) -> AttentionGradients:
    raise NotImplementedError(_MISSING)


def map_forward(call: MapCall) -> tuple[Tensor, Tensor]:
    raise NotImplementedError(_MISSING)


def map_backward(call: MapCall, lse: Tensor, grad_map: Tensor, bias_needs_grad: bool) -> MapGradients:
    raise NotImplementedError(_MISSING)
