"""The CUDA C++ kernels of csrc/, for GPUs on which Triton has no tensor cores (V100, T4); they run on later ones too.

launches.py   which kernels a call needs, on which grid       variants.py, tiles.py   what a kernel is compiled for
machine.py    which way machine code comes to this device: prebuilt.py, or compiler.py (NVRTC) and cache.py
driver.py     launches it
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..interface import (
    AttentionCall,
    AttentionFeatures,
    AttentionGradients,
    MapCall,
    MapGradients,
    PackedCall,
    new_output_like,
    sum_over_sharing_heads,
)
from . import launches, machine
from .tiles import WIDTHS
from .variants import ELEMENTS


def unavailable_reasons() -> list[str]:
    return machine.unavailable_reasons()


def not_supported_reasons(features: AttentionFeatures) -> list[str]:
    reasons = machine.device_reasons(features.device_type, features.device_index)
    if features.dtype not in launches.ELEMENT_OF:
        reasons.append(f"{features.dtype} is not supported; use float32, bfloat16 or float16")
    elif not reasons:
        device = torch.device(features.device_type, features.device_index or 0)
        architecture = machine.launcher(device).architecture
        if architecture < ELEMENTS[launches.ELEMENT_OF[features.dtype]][1]:
            reasons.append(
                f"the GPU's compute capability is {architecture / 10}, and bfloat16 needs 8.0; use float16 or float32"
            )
    for name, dim in (("query's head dimension", features.head_dim), ("value's head dimension", features.value_dim)):
        if dim > WIDTHS[-1]:
            reasons.append(f"{name} is {dim}; at most {WIDTHS[-1]} is supported")
    return reasons


def forward(call: AttentionCall | PackedCall) -> tuple[Tensor, Tensor | None]:
    output, lse = call.new_results()
    launches.forward(machine.launcher(call.query.device), call, output, lse)
    return output, lse


packed_forward = forward


def backward(
    call: AttentionCall,
    output: Tensor,
    lse: Tensor,
    grad_output: Tensor,
    grad_lse: Tensor | None,
    bias_needs_grad: bool,
) -> AttentionGradients:
    per_head = (*call.query.shape[:2], call.key.shape[2])
    bias = call.query.new_empty(per_head, dtype=torch.float32) if bias_needs_grad else None
    return _backward(call, lse, _delta(output, grad_output, grad_lse), grad_output, grad_lse, bias)


def packed_backward(
    call: PackedCall,
    output: Tensor,
    lse: Tensor,
    grad_output: Tensor,
    grad_lse: Tensor | None,
    bias_needs_grad: bool,
) -> AttentionGradients:
    per_head = (call.query.shape[1], call.key.shape[0])
    bias = call.query.new_zeros(per_head, dtype=torch.float32) if bias_needs_grad else None
    delta = _delta(output.transpose(0, 1), grad_output.transpose(0, 1), grad_lse)
    return _backward(call, lse, delta, grad_output, grad_lse, bias)


def _backward(
    call: AttentionCall | PackedCall,
    lse: Tensor,
    delta: Tensor,
    grad_output: Tensor,
    grad_lse: Tensor | None,
    bias: Tensor | None,
) -> AttentionGradients:
    gradients = AttentionGradients(*call.new_gradients(), bias)
    launcher = machine.launcher(call.query.device)
    launches.backward(launcher, call, lse.contiguous(), delta, grad_output, grad_lse, gradients)
    return gradients._replace(key_bias=sum_over_sharing_heads(bias, call.key_bias))


def _delta(output: Tensor, grad_output: Tensor, grad_lse: Tensor | None) -> Tensor:
    """sum_d dO_id o_id - dlse_i, for (..., N, D) tensors: what softmax subtracts from every gradient of a row."""
    delta = (output.float() * grad_output.float()).sum(-1)
    return delta if grad_lse is None else delta - grad_lse


def map_forward(call: MapCall) -> tuple[Tensor, Tensor]:
    batch, heads, num_queries = call.query.shape[:3]
    result = call.query.new_empty((batch, heads, call.key.shape[2]), dtype=torch.float32)
    lse = call.lse
    if lse is None:
        lse = call.query.new_empty((batch, heads, num_queries), dtype=torch.float32)
    launcher = machine.launcher(call.query.device)
    launches.attention_map(launcher, call, lse, call.lse is not None, result)
    return result, lse


def map_backward(call: MapCall, lse: Tensor, grad_map: Tensor, bias_needs_grad: bool) -> MapGradients:
    per_head = (*call.query.shape[:2], call.key.shape[2])
    bias = call.query.new_empty(per_head, dtype=torch.float32) if bias_needs_grad else None
    gradients = MapGradients(new_output_like(call.query), new_output_like(call.key), bias)
    launcher = machine.launcher(call.query.device)
    launches.attention_map_backward(launcher, call, lse.contiguous(), grad_map, gradients)
    return gradients._replace(key_bias=sum_over_sharing_heads(bias, call.key_bias))
