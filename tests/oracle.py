"""An independent float64 reference of the operators, written from the contract and sharing no code with finegrain_ops.

It loops over batch and head and builds every score explicitly, so that it can be checked by reading.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def reweighted_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    region_mask: Tensor | None = None,
    weight: float | Tensor = 1.0,
    *,
    key_bias: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    row_gate: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    compute_dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """(output, lse) in compute_dtype, differentiable. In half precision it is the plain eager attention of
    tolerances.py.
    """
    query, key, value = query.to(compute_dtype), key.to(compute_dtype), value.to(compute_dtype)
    batch, heads, num_queries, head_dim = query.shape
    num_keys = key.shape[2]
    scale = 1.0 / math.sqrt(head_dim) if scale is None else scale

    outputs, lses = [], []
    for b in range(batch):
        for h in range(heads):
            kv_head = h * key.shape[1] // heads
            bias = torch.zeros(num_keys, dtype=torch.float64, device=query.device)
            if key_bias is not None:
                bias = bias + pick(key_bias, b, h).double()
            if region_mask is not None:
                bias = bias + log_weight_times(pick_weight(weight, b, h), pick(region_mask, b, h).double())
            gate = torch.ones(num_queries, dtype=torch.bool, device=query.device)
            if row_gate is not None:
                gate = row_gate if row_gate.dim() == 1 else row_gate[b]
            scores = scale * (query[b, h] @ key[b, kv_head].T)
            scores = torch.where(gate[:, None], scores + bias.to(compute_dtype), scores)
            allowed = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device)
            if key_padding_mask is not None:
                allowed &= key_padding_mask[b]
            if is_causal:
                i = torch.arange(num_queries, device=query.device)[:, None]
                j = torch.arange(num_keys, device=query.device)[None, :]
                allowed &= j <= i + num_keys - num_queries
            output, lse = softmax_rows(scores, allowed, value[b, kv_head])
            outputs.append(output)
            lses.append(lse)
    return (
        torch.stack(outputs).reshape(batch, heads, num_queries, value.shape[-1]),
        torch.stack(lses).reshape(batch, heads, num_queries),
    )


def softmax_rows(scores: Tensor, allowed: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Rows with nothing to attend to give 0 and -inf, and gradients of 0."""
    allowed = allowed & (scores.detach() != -math.inf)
    some = allowed.any(-1)
    safe = torch.where(allowed, scores, torch.full_like(scores, torch.finfo(scores.dtype).min / 4))
    safe = torch.where(some[:, None], safe, torch.zeros_like(safe))
    maximum = safe.max(-1, keepdim=True).values.detach() if scores.shape[-1] else safe.sum(-1, keepdim=True)
    weights = torch.exp(safe - maximum) * allowed
    total = weights.sum(-1, keepdim=True)
    total = torch.where(some[:, None], total, torch.ones_like(total))
    lse = torch.where(some, (maximum + torch.log(total))[:, 0], torch.full_like(total[:, 0], -math.inf))
    return (weights / total) @ value, lse


def pick(tensor: Tensor, b: int, h: int) -> Tensor:
    """The row of a (Nk,), (B, Nk) or (B, H, Nk) tensor for one batch entry and head."""
    return tensor if tensor.dim() == 1 else tensor[b] if tensor.dim() == 2 else tensor[b, h]


def pick_weight(weight: float | Tensor, b: int, h: int) -> Tensor:
    weight = torch.as_tensor(weight, dtype=torch.float64) if not isinstance(weight, Tensor) else weight.double()
    return weight if weight.dim() == 0 else weight[b] if weight.dim() == 1 else weight[b, h]


def log_weight_times(weight: Tensor, mask: Tensor) -> Tensor:
    if float(weight.detach()) == 0.0:
        return torch.where(mask > 0, torch.full_like(mask, -math.inf), torch.zeros_like(mask))
    return torch.log(weight) * mask
