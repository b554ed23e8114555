"""The Triton kernels. On a CPU they run in Triton's interpreter (TRITON_INTERPRET=1), to check numbers, not to be
fast.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import os
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .interface import (
    AttentionCall,
    AttentionFeatures,
    AttentionGradients,
    MapCall,
    MapGradients,
    PackedCall,
    new_output_like,
    sum_over_sharing_heads,
)

if TYPE_CHECKING:
    from ..kernels.arguments import AttentionInputs

LARGEST_HEAD_DIM = 256
_OLDEST_TRITON = (3, 3)  # tuples of tensors in device functions


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _compute_capability(device_index: int | None) -> int:
    major, minor = torch.cuda.get_device_capability(device_index)
    return 10 * major + minor


@functools.cache
def _num_processors(device: torch.device) -> int:
    """Streaming multiprocessors; the interpreter pretends to a few, so that it too splits the keys."""
    return 8 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _triton_version() -> tuple[int, ...]:
    """Major and minor; a build of triton that does not say is taken for new enough."""
    for package in ("triton", "pytorch-triton"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return tuple(int(part) for part in importlib.metadata.version(package).split(".")[:2])
    return _OLDEST_TRITON


def unavailable_reasons() -> list[str]:
    if importlib.util.find_spec("triton") is None:
        return ["triton is not installed; install it with: pip install triton"]
    if (installed := _triton_version()) < _OLDEST_TRITON:
        return [
            f"triton {'.'.join(map(str, installed))} is too old; the kernels need {'.'.join(map(str, _OLDEST_TRITON))} "
            "or newer, which comes with torch 2.7"
        ]
    if not torch.cuda.is_available() and not _interpreted():
        return ["torch sees no CUDA device (TRITON_INTERPRET=1 runs the kernels in Triton's interpreter, slowly)"]
    return []


def device_reasons(device_type: str, device_index: int | None, *, subject: str = "query is") -> list[str]:
    """Why no Triton kernel can run on this device, on which `subject`."""
    reasons = []
    if device_type == "cpu" and not _interpreted():
        reasons.append(f"{subject} on cpu; use a CUDA device, or set TRITON_INTERPRET=1 for Triton's interpreter")
    elif device_type not in ("cpu", "cuda"):
        reasons.append(f"{subject} on {device_type}; Triton runs on CUDA devices")
    if device_type == "cuda" and _compute_capability(device_index) < 80:
        reasons.append("the GPU's compute capability is below 8.0, where Triton uses no tensor cores")
    return reasons


def not_supported_reasons(features: AttentionFeatures) -> list[str]:
    reasons = device_reasons(features.device_type, features.device_index)
    if features.dtype == torch.float64:
        reasons.append("float64 is not supported; use float32, bfloat16 or float16")
    if features.device_type == "cpu" and features.dtype == torch.bfloat16:
        reasons.append("Triton's interpreter computes wrong bfloat16 products; use float16 or float32 there")
    for name, dim in (("query's head dimension", features.head_dim), ("value's head dimension", features.value_dim)):
        if dim > LARGEST_HEAD_DIM:
            reasons.append(f"{name} is {dim}; at most {LARGEST_HEAD_DIM} is supported")
    return reasons


def _inputs(call: AttentionCall | PackedCall | MapCall) -> AttentionInputs:
    from ..kernels.arguments import AttentionInputs, Packing, addressable

    packing, padding = None, None
    if isinstance(call, PackedCall):
        packing = Packing(call.cu_seqlens_q, call.cu_seqlens_k, call.max_seqlen_q, call.max_seqlen_k)
    else:
        padding = call.key_padding_mask
    return AttentionInputs(
        addressable(call.query),
        addressable(call.key),
        call.key_bias,
        padding,
        call.row_gate,
        call.is_causal,
        call.scale,
        80 if call.query.device.type == "cpu" else _compute_capability(call.query.device.index),
        packing,
    )


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device."""
    return contextlib.nullcontext() if tensor.device.type == "cpu" else torch.cuda.device(tensor.device)


# The kernels import triton, so they are imported when they are first called.


def forward(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    from ..kernels import attention_decode
    from ..kernels.arguments import addressable
    from ..kernels.attention_forward import attention_forward

    output, lse = call.new_results()
    inputs, value = _inputs(call), addressable(call.value)
    with on_device_of(call.query):
        if attention_decode.suits(inputs):
            attention_decode.attention_decode(inputs, value, output, lse, _num_processors(call.query.device))
        else:
            attention_forward(inputs, value, output, lse)
    return output, lse


def packed_forward(call: PackedCall) -> tuple[Tensor, Tensor | None]:
    from ..kernels.arguments import addressable
    from ..kernels.attention_forward import attention_forward

    output, lse = call.new_results()
    with on_device_of(call.query):
        attention_forward(_inputs(call), addressable(call.value), output, lse)
    return output, lse


def backward(
    call: AttentionCall,
    output: Tensor,
    lse: Tensor,
    grad_output: Tensor,
    grad_lse: Tensor | None,
    bias_needs_grad: bool,
) -> AttentionGradients:
    return _backward(call, output, lse, grad_output, grad_lse, bias_needs_grad)


def packed_backward(
    call: PackedCall,
    output: Tensor,
    lse: Tensor,
    grad_output: Tensor,
    grad_lse: Tensor | None,
    bias_needs_grad: bool,
) -> AttentionGradients:
    return _backward(call, output, lse, grad_output, grad_lse, bias_needs_grad)


def _backward(
    call: AttentionCall | PackedCall,
    output: Tensor,
    lse: Tensor,
    grad_output: Tensor,
    grad_lse: Tensor | None,
    bias_needs_grad: bool,
) -> AttentionGradients:
    from ..kernels.arguments import addressable
    from ..kernels.attention_backward import attention_backward

    gradients = call.new_gradients()
    with on_device_of(call.query):
        grad_bias = attention_backward(
            _inputs(call),
            addressable(call.value),
            addressable(output),
            lse,
            addressable(grad_output),
            None if grad_lse is None else grad_lse.contiguous(),
            *gradients,
            bias_needs_grad,
        )
    return AttentionGradients(*gradients, sum_over_sharing_heads(grad_bias, call.key_bias))


def map_forward(call: MapCall) -> tuple[Tensor, Tensor]:
    from ..kernels.attention_map import attention_map

    with on_device_of(call.query):
        return attention_map(_inputs(call), call.rows, call.heads, None if call.lse is None else call.lse.contiguous())


def map_backward(call: MapCall, lse: Tensor, grad_map: Tensor, bias_needs_grad: bool) -> MapGradients:
    from ..kernels.attention_map import attention_map_backward

    gradients = new_output_like(call.query), new_output_like(call.key)
    with on_device_of(call.query):
        grad_bias = attention_map_backward(
            _inputs(call), call.rows, call.heads, lse.contiguous(), grad_map, *gradients, bias_needs_grad
        )
    return MapGradients(*gradients, sum_over_sharing_heads(grad_bias, call.key_bias))
