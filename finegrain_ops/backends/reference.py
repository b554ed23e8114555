"""The equation in plain PyTorch: what every other backend is compared with, and what runs where nothing else does.

CoF (arXiv 2412.16869), Eq. 3:  softmax(log(lambda) * M + A) V  with  A = scale * Q K^T (+ causal mask).

It holds an Nq x Nk matrix of scores, in float32 for half-precision inputs and in float64 for float64 inputs; an
attention map holds those of a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import unpacking
from .interface import (
    AttentionCall,
    AttentionFeatures,
    AttentionGradients,
    MapCall,
    MapGradients,
    PackedCall,
    clamp_bias,
)

_MAP_ROWS = 128  # rows of scores that an attention map holds at a time


def unavailable_reasons() -> list[str]:
    return []


def not_supported_reasons(features: AttentionFeatures) -> list[str]:
    return []


def _scores(call: AttentionCall | MapCall, query: Tensor, key: Tensor, rows: Tensor) -> Tensor:
    """(B, H, len(rows), Nk), -inf where a key is not seen; `query` holds those rows, heads of key already repeated."""
    scores = call.scale * (query @ key.transpose(-1, -2))  # A
    if call.key_bias is not None:  # log(lambda) * M + b
        bias = clamp_bias(call.key_bias)[:, :, None, :]
        if call.row_gate is not None:
            bias = torch.where(call.row_gate[:, None, rows, None], bias, 0.0)
        scores = scores + bias
    if call.key_padding_mask is not None:
        scores = scores.masked_fill(~call.key_padding_mask[:, None, None, :], float("-inf"))
    if call.is_causal:
        num_queries, num_keys = call.query.shape[2], key.shape[2]
        keys = torch.arange(num_keys, device=scores.device)
        scores = scores.masked_fill(keys > rows[:, None] + (num_keys - num_queries), float("-inf"))
    return scores


def _probabilities(call: AttentionCall, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """softmax of the scores (B, H, Nq, Nk) and their logsumexp (B, H, Nq); heads of key already repeated."""
    scores = _scores(call, query, key, torch.arange(query.shape[2], device=query.device))
    # A row without any key gives 0 and an lse of -inf, where a softmax alone would give NaN.
    empty = (scores == float("-inf")).all(dim=-1, keepdim=True)
    probabilities = torch.softmax(scores.masked_fill(empty, 0.0), dim=-1).masked_fill(empty, 0.0)
    return probabilities, torch.logsumexp(scores, dim=-1)


def _operands(call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
    """query, key, value in the precision of the scores, the heads of key and value repeated to those of query."""
    group = call.query.shape[1] // call.key.shape[1]
    query, key, value = (t.to(call.compute_dtype) for t in (call.query, call.key, call.value))
    return query, key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)


def _sum_groups(gradient: Tensor, like: Tensor) -> Tensor:
    """(B, H, N, D) -> (B, Hkv, N, D): the heads that share one head of key or value."""
    return gradient.unflatten(1, (like.shape[1], -1)).sum(dim=2).to(like.dtype)


def forward(call: AttentionCall) -> tuple[Tensor, Tensor]:
    query, key, value = _operands(call)
    probabilities, lse = _probabilities(call, query, key)
    return (probabilities @ value).to(call.query.dtype), lse


def backward(
    call: AttentionCall,
    output: Tensor,
    lse: Tensor,
    grad_output: Tensor,
    grad_lse: Tensor | None,
    bias_needs_grad: bool,
) -> AttentionGradients:
    """dS = P * (dO V^T - rowsum(dO * O) + dlse); from it dQ = scale dS K, dK = scale dS^T Q, db_j = sum_i g_i dS_ij;
    dV = P^T dO.
    """
    query, key, value = _operands(call)
    probabilities, _ = _probabilities(call, query, key)
    grad_output = grad_output.to(call.compute_dtype)
    row_constant = (grad_output * (probabilities @ value)).sum(dim=-1, keepdim=True)
    if grad_lse is not None:
        row_constant = row_constant - grad_lse[..., None]
    grad_scores = probabilities * (grad_output @ value.transpose(-1, -2) - row_constant)

    grad_bias = None
    if bias_needs_grad:
        assert call.key_bias is not None
        gated = grad_scores if call.row_gate is None else grad_scores * call.row_gate[:, None, :, None]
        grad_bias = gated.sum(dim=2).sum_to_size(call.key_bias.shape)

    return AttentionGradients(
        (call.scale * (grad_scores @ key)).to(call.query.dtype),
        _sum_groups(call.scale * (grad_scores.transpose(-1, -2) @ query), call.key),
        _sum_groups(probabilities.transpose(-1, -2) @ grad_output, call.value),
        grad_bias,
    )


def packed_forward(call: PackedCall) -> tuple[Tensor, Tensor | None]:
    return unpacking.forward(call, forward)


def packed_backward(
    call: PackedCall,
    output: Tensor,
    lse: Tensor,
    grad_output: Tensor,
    grad_lse: Tensor | None,
    bias_needs_grad: bool,
) -> AttentionGradients:
    return unpacking.backward(call, output, lse, grad_output, grad_lse, bias_needs_grad, backward)


# --- attention maps, a few rows at a time --------------------------------------------------------------------------


def _map_rows(call: MapCall) -> Sequence[Tensor]:
    """Indices of the rows, _MAP_ROWS at a time. On a CPU only of those that count in some batch entry; a device would
    have to stop to be asked.
    """
    if call.rows is not None and call.rows.device.type == "cpu":
        rows = call.rows.any(dim=0).nonzero()[:, 0]
    else:
        rows = torch.arange(call.query.shape[2], device=call.query.device)
    return rows.split(_MAP_ROWS)


def _map_key(call: MapCall) -> Tensor:
    """key in the precision of the scores, its heads repeated to those of query."""
    return call.key.to(call.compute_dtype).repeat_interleave(call.query.shape[1] // call.key.shape[1], dim=1)


def _map_probabilities(call: MapCall, key: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of a few rows: their query (B, H, len(rows), D), their softmax (B, H, len(rows), Nk), 0 in rows that do not count
    or see no key, and their lse (B, H, len(rows)).

    Whole rows are at hand, so that a known lse would save nothing, and the softmax is more exact than exp(S - lse).
    """
    query = call.query[:, :, rows].to(call.compute_dtype)
    scores = _scores(call, query, key, rows)
    maximum = scores.amax(dim=-1, keepdim=True)
    maximum = maximum.masked_fill(maximum == float("-inf"), 0.0)
    unnormalised = torch.exp(scores - maximum)
    total = unnormalised.sum(dim=-1, keepdim=True)
    probabilities = unnormalised / total.masked_fill(total == 0.0, 1.0)
    if call.rows is not None:
        probabilities = probabilities.masked_fill(~call.rows[:, None, rows, None], 0.0)
    return query, probabilities, (maximum + total.log()).squeeze(-1)


def _counted_heads(call: MapCall, attention_map: Tensor) -> Tensor:
    return attention_map if call.heads is None else attention_map.masked_fill(~call.heads[:, None], 0.0)


def map_forward(call: MapCall) -> tuple[Tensor, Tensor]:
    batch, heads, num_queries, _ = call.query.shape
    attention_map = call.query.new_zeros(batch, heads, call.key.shape[2], dtype=call.compute_dtype)
    lse = call.query.new_full((batch, heads, num_queries), float("-inf"), dtype=call.compute_dtype)
    key = _map_key(call)
    for rows in _map_rows(call):
        _, probabilities, lse[:, :, rows] = _map_probabilities(call, key, rows)
        attention_map += probabilities.sum(dim=2)
    return _counted_heads(call, attention_map), lse if call.lse is None else call.lse


def map_backward(call: MapCall, lse: Tensor, grad_map: Tensor, bias_needs_grad: bool) -> MapGradients:
    key = _map_key(call)
    grad_map = _counted_heads(call, grad_map)[:, :, None, :]
    grad_query = call.query.new_zeros(call.query.shape, dtype=call.compute_dtype)
    grad_key = torch.zeros_like(key)
    grad_bias = call.key_bias.new_zeros(call.key_bias.shape) if bias_needs_grad and call.key_bias is not None else None
    for rows in _map_rows(call):
        query, probabilities, _ = _map_probabilities(call, key, rows)
        grad_scores = probabilities * (grad_map - (probabilities * grad_map).sum(dim=-1, keepdim=True))
        grad_query[:, :, rows] = call.scale * (grad_scores @ key)
        grad_key += call.scale * (grad_scores.transpose(-1, -2) @ query)
        if grad_bias is not None:
            gated = grad_scores if call.row_gate is None else grad_scores * call.row_gate[:, None, rows, None]
            grad_bias += gated.sum(dim=2).sum_to_size(grad_bias.shape)
    return MapGradients(grad_query.to(call.query.dtype), _sum_groups(grad_key, call.key), grad_bias)
