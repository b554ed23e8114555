"""The Triton kernels. On a CPU they run in Triton's interpreter (TRITON_INTERPRET=1), to check numbers, not to be
fast.
"""

from __future__ import annotations

import functools
import importlib.util
import os

import torch
from torch import Tensor

from .interface import AttentionCall, AttentionFeatures, AttentionGradients, new_output

LARGEST_HEAD_DIM = 256
_NO_BACKWARD = (
    "it has no backward pass yet, and a gradient is wanted; call under torch.no_grad() or use another backend"
)


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _compute_capability(device_index: int | None) -> int:
    major, minor = torch.cuda.get_device_capability(device_index)
    return 10 * major + minor


def unavailable_reasons() -> list[str]:
    if importlib.util.find_spec("triton") is None:
        return ["triton is not installed; install it with: pip install triton"]
    if not torch.cuda.is_available() and not _interpreted():
        return ["torch sees no CUDA device (TRITON_INTERPRET=1 runs the kernels in Triton's interpreter, slowly)"]
    return []


def not_supported_reasons(features: AttentionFeatures) -> list[str]:
    reasons = []
    if features.device_type == "cpu" and not _interpreted():
        reasons.append("query is on cpu; move it to a CUDA device, or set TRITON_INTERPRET=1 for Triton's interpreter")
    elif features.device_type not in ("cpu", "cuda"):
        reasons.append(f"query is on {features.device_type}; Triton runs on CUDA devices")
    if features.dtype == torch.float64:
        reasons.append("float64 is not supported; use float32, bfloat16 or float16")
    if features.device_type == "cpu" and features.dtype == torch.bfloat16:
        reasons.append("Triton's interpreter computes wrong bfloat16 products; use float16 or float32 there")
    if features.device_type == "cuda" and _compute_capability(features.device_index) < 80:
        reasons.append("the GPU's compute capability is below 8.0, where Triton uses no tensor cores")
    for name, dim in (("query's head dimension", features.head_dim), ("value's head dimension", features.value_dim)):
        if dim > LARGEST_HEAD_DIM:
            reasons.append(f"{name} is {dim}; at most {LARGEST_HEAD_DIM} is supported")
    if features.needs_grad:
        reasons.append(_NO_BACKWARD)
    return reasons


def forward(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    from ..kernels.attention_forward import attention_forward  # imports triton, so only now

    output = new_output(call.query, call.query.shape[2], call.value.shape[3])
    lse = call.query.new_empty(call.query.shape[:3], dtype=torch.float32) if call.return_lse else None
    arguments = (
        call.query,
        call.key,
        call.value,
        call.key_bias,
        call.key_padding_mask,
        call.row_gate,
        call.is_causal,
        call.scale,
        output,
        lse,
    )
    if call.query.device.type == "cpu":
        attention_forward(*arguments, compute_capability=80)
    else:
        with torch.cuda.device(call.query.device):
            attention_forward(*arguments, compute_capability=_compute_capability(call.query.device.index))
    return output, lse


def backward(
    call: AttentionCall,
    output: Tensor,
    lse: Tensor,
    grad_output: Tensor,
    grad_lse: Tensor | None,
    bias_needs_grad: bool,
) -> AttentionGradients:
    raise NotImplementedError(_NO_BACKWARD)
