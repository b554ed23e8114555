"""An independent float64 reference of the operators, written from the contract and sharing no code with finegrain_ops.

It loops over batch or sequence and head and builds every score explicitly, so that it can be checked by reading.
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
    batch, heads, num_queries, _ = query.shape
    outputs, lses = [], []
    for b in range(batch):
        for h in range(heads):
            kv_head = h * key.shape[1] // heads
            bias = None if key_bias is None else pick(key_bias, b, h)
            mask = None if region_mask is None else pick(region_mask, b, h)
            gate = None if row_gate is None else row_gate if row_gate.dim() == 1 else row_gate[b]
            padding = None if key_padding_mask is None else key_padding_mask[b]
            scores, allowed = biased_scores(
                query[b, h], key[b, kv_head], bias, mask, pick_weight(weight, b, h), gate, padding, is_causal, scale
            )
            output, lse = softmax_rows(scores, allowed, value[b, kv_head])
            outputs.append(output)
            lses.append(lse)
    return (
        torch.stack(outputs).reshape(batch, heads, num_queries, value.shape[-1]),
        torch.stack(lses).reshape(batch, heads, num_queries),
    )


def reweighted_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    region_mask: Tensor | None = None,
    weight: float | Tensor = 1.0,
    *,
    key_bias: Tensor | None = None,
    row_gate: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    compute_dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """(output (Tq, H, Dv), lse (H, Tq)) in compute_dtype, differentiable."""
    query, key, value = query.to(compute_dtype), key.to(compute_dtype), value.to(compute_dtype)
    total, heads, _ = query.shape
    output = torch.zeros(total, heads, value.shape[-1], dtype=compute_dtype, device=query.device)
    lse = torch.full((heads, total), -math.inf, dtype=compute_dtype, device=query.device)
    for s in range(len(cu_seqlens_q) - 1):
        rows = slice(int(cu_seqlens_q[s]), int(cu_seqlens_q[s + 1]))
        keys = slice(int(cu_seqlens_k[s]), int(cu_seqlens_k[s + 1]))
        for h in range(heads):
            kv_head = h * key.shape[1] // heads
            bias = None if key_bias is None else (key_bias if key_bias.dim() == 1 else key_bias[h])[keys]
            mask = None if region_mask is None else (region_mask if region_mask.dim() == 1 else region_mask[h])[keys]
            gate = None if row_gate is None else row_gate[rows]
            scores, allowed = biased_scores(
                query[rows, h], key[keys, kv_head], bias, mask, pick_weight(weight, s, h), gate, None, is_causal, scale
            )
            output[rows, h], lse[h, rows] = softmax_rows(scores, allowed, value[keys, kv_head])
    return output, lse


def attention_map(
    query: Tensor,
    key: Tensor,
    *,
    rows: Tensor | None = None,
    heads: Tensor | None = None,
    region_mask: Tensor | None = None,
    weight: float | Tensor = 1.0,
    key_bias: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    row_gate: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    lse: Tensor | None = None,
    reduction: str = "sum",
    compute_dtype: torch.dtype = torch.float64,
) -> Tensor:
    """In compute_dtype, differentiable, from the whole matrix of probabilities; a given lse is not looked at."""
    batch, num_heads, num_queries, _ = query.shape
    num_keys = key.shape[2]
    one_per_key = torch.eye(num_keys, dtype=compute_dtype, device=query.device)
    probabilities, _ = reweighted_attention(
        query,
        key,
        one_per_key.expand(batch, key.shape[1], num_keys, num_keys),
        region_mask,
        weight,
        key_bias=key_bias,
        key_padding_mask=key_padding_mask,
        row_gate=row_gate,
        is_causal=is_causal,
        scale=scale,
        compute_dtype=compute_dtype,
    )
    maps = []
    for b in range(batch):
        chosen_rows = [i for i in range(num_queries) if rows is None or (rows if rows.dim() == 1 else rows[b])[i]]
        chosen_heads = [h for h in range(num_heads) if heads is None or heads[h]]
        per_head = torch.zeros(num_heads, num_keys, dtype=compute_dtype, device=query.device)
        for h in chosen_heads:
            per_head[h] = probabilities[b, h, chosen_rows].sum(0)
        if reduction == "none":
            maps.append(per_head)
        elif reduction == "sum":
            maps.append(per_head.sum(0))
        else:
            maps.append(per_head.sum(0) / max(1, len(chosen_heads) * len(chosen_rows)))
    return torch.stack(maps)


def biased_scores(
    query: Tensor,
    key: Tensor,
    key_bias: Tensor | None,
    region_mask: Tensor | None,
    weight: Tensor,
    row_gate: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """Scores of one head (Nq, Nk) in query's dtype, and which of them may be seen."""
    num_queries, num_keys = query.shape[0], key.shape[0]
    scale = 1.0 / math.sqrt(query.shape[1]) if scale is None else scale
    bias = torch.zeros(num_keys, dtype=torch.float64, device=query.device)
    if key_bias is not None:
        bias = bias + key_bias.double()
    if region_mask is not None:
        bias = bias + log_weight_times(weight, region_mask.double())
    gate = torch.ones(num_queries, dtype=torch.bool, device=query.device) if row_gate is None else row_gate
    scores = scale * (query @ key.T)
    scores = torch.where(gate[:, None], scores + bias.to(query.dtype), scores)
    allowed = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device)
    if key_padding_mask is not None:
        allowed &= key_padding_mask
    if is_causal:
        i = torch.arange(num_queries, device=query.device)[:, None]
        j = torch.arange(num_keys, device=query.device)[None, :]
        allowed &= j <= i + num_keys - num_queries
    return scores, allowed


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
