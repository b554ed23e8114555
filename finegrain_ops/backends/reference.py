"""The equation in plain PyTorch: what every other backend is compared with, and what runs where nothing else does.

CoF (arXiv 2412.16869), Eq. 3:  softmax(log(lambda) * M + A) V  with  A = scale * Q K^T (+ causal mask).

It holds an Nq x Nk matrix of scores, in float32 for half-precision inputs and in float64 for float64 inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .interface import AttentionCall, AttentionFeatures, AttentionGradients


def unavailable_reasons() -> list[str]:
    return []


def not_supported_reasons(features: AttentionFeatures) -> list[str]:
    return []


def _probabilities(call: AttentionCall, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """softmax of the scores (B, H, Nq, Nk) and their logsumexp (B, H, Nq); heads of key already repeated."""
    scores = call.scale * (query @ key.transpose(-1, -2))  # A
    if call.key_bias is not None:  # log(lambda) * M + b
        bias = call.key_bias[:, :, None, :]
        if call.row_gate is not None:
            bias = torch.where(call.row_gate[:, None, :, None], bias, 0.0)
        scores = scores + bias
    if call.key_padding_mask is not None:
        scores = scores.masked_fill(~call.key_padding_mask[:, None, None, :], float("-inf"))
    if call.is_causal:
        num_queries, num_keys = scores.shape[-2:]
        visible = torch.ones(num_queries, num_keys, dtype=torch.bool, device=scores.device)
        scores = scores.masked_fill(~visible.tril(diagonal=num_keys - num_queries), float("-inf"))

    # A row without any key gives 0 and an lse of -inf, where a softmax alone would give NaN.
    empty = (scores == float("-inf")).all(dim=-1, keepdim=True)
    probabilities = torch.softmax(scores.masked_fill(empty, 0.0), dim=-1).masked_fill(empty, 0.0)
    return probabilities, torch.logsumexp(scores, dim=-1)


def _operands(call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
    """query, key, value in the precision of the scores, the heads of key and value repeated to those of query."""
    group = call.query.shape[1] // call.key.shape[1]
    query, key, value = (t.to(call.compute_dtype) for t in (call.query, call.key, call.value))
    return query, key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)


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

    def sum_groups(gradient: Tensor, like: Tensor) -> Tensor:
        return gradient.unflatten(1, (like.shape[1], -1)).sum(dim=2).to(like.dtype)

    return AttentionGradients(
        (call.scale * (grad_scores @ key)).to(call.query.dtype),
        sum_groups(call.scale * (grad_scores.transpose(-1, -2) @ query), call.key),
        sum_groups(probabilities.transpose(-1, -2) @ grad_output, call.value),
        grad_bias,
    )
