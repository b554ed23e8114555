"""The attention that keys receive, without a matrix of it: the public function `attention_map`."""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops
from .arguments import any_requires_grad, autocast, check_backend, check_batched, check_scale
from .key_bias import compose_key_bias
from .validation import describe, require_bool, require_mask, require_same_device, require_shape, require_tensor

_REDUCTIONS = ("sum", "mean", "none")


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
    backend: str = "auto",
) -> Tensor:
    r"""The probability that each key receives from the chosen rows, without ever holding an Nq x Nk matrix.

    .. math::
        s_{ij} = \mathrm{scale} \cdot q_i \cdot k_j + g_i (b_j + \log(\lambda) M_j), \qquad
        \mathrm{map}_{hj} = \sum_{i \in \mathrm{rows}} \mathrm{softmax}_j(s_{ij})

    These are the probabilities that `reweighted_attention` multiplies with value, called with the same arguments.

    Args:
        query: (B, H, Nq, D), float16, bfloat16 or float32 (float64 on CPU), any strides.
        key: (B, Hkv, Nk, D), same dtype; H is a multiple of Hkv (grouped-query attention).
        rows: (Nq,) or (B, Nq) bool: the rows that count. None: all of them.
        heads: (H,) bool: the heads that count; the others give 0. None: all of them.
        region_mask: M, bool or float in [0, 1], (Nk,), (B, Nk) or (B, H, Nk). None: no region, and weight has
            no effect.
        weight: lambda >= 0, a number or a float tensor (), (B,) or (B, H). 0 removes the keys with M > 0.
        key_bias: b, float, natural-log units, shapes as M; added to log(lambda) M. -inf removes a key; finite sums
            beyond +-131072 (2^17) count as that, so that a row all of whose keys carry -1e9 still tells them apart.
        key_padding_mask: (B, Nk) bool, True = attend. It holds for every row, whatever row_gate says.
        row_gate: g, (Nq,) or (B, Nq) bool: the rows in which the bias acts. None: all of them.
        is_causal: row i sees keys j <= i + Nk - Nq: aligned bottom-right, as in flash-attn.
        scale: of the dot product; default 1 / sqrt(D).
        lse: (B, H, Nq) float32 (float64 for float64 inputs), what reweighted_attention(..., return_lse=True) returned
            for the same arguments: saves one of two passes. Gradients are those of the whole expression, with or
            without it; lse itself receives none.
        reduction: "sum" over heads and rows; "mean" divides that by the number of heads and rows that count (0 where
            none do); "none" sums over rows only.
        backend: "auto" takes the fastest that can run the call; "triton", "cuda", "sdpa" or "reference" run there
            or raise.

    Returns:
        (B, Nk), with reduction="none" (B, H, Nk); float32 (float64 for float64 inputs). A row that sees no key
        contributes 0. Differentiable in query, key and every float tensor among region_mask, weight and key_bias.

    Raises:
        ValueError: a shape or a value is not as said above (values on a device only with FINEGRAIN_CHECK=1).
        TypeError: a dtype or a type is not.
        UnsupportedInputError: the named backend cannot run this; every reason is listed.

    Under autocast, query and key are cast as for scaled_dot_product_attention.

    Equivalent, for float inputs without padding, gate, groups and empty rows::

        scores = scale * query @ key.mT + (key_bias + weight.log() * region_mask)[:, None, None, :]
        if is_causal:
            visible = torch.ones(Nq, Nk, dtype=torch.bool).tril(Nk - Nq)
            scores = scores.masked_fill(~visible, float("-inf"))
        per_head = (scores.softmax(-1) * rows[:, None, :, None]).sum(2) * heads[:, None]
        attention_map = per_head.sum(1)  # "mean": / (heads.sum() * rows.sum(-1))[:, None]; "none": per_head
    """
    check_batched(query=query, key=key)
    query, key = autocast(query, key)
    batch, num_heads, num_queries, head_dim = query.shape
    num_keys = key.shape[2]

    bias = compose_key_bias(region_mask, weight, key_bias, query, num_keys)
    if key_padding_mask is not None:
        require_mask(key_padding_mask, "key_padding_mask", query, [(batch, num_keys)], "(B, Nk)")
    row_shapes, row_meaning = [(num_queries,), (batch, num_queries)], "(Nq,) or (B, Nq)"
    if row_gate is not None:
        row_gate = require_mask(row_gate, "row_gate", query, row_shapes, row_meaning).expand(batch, num_queries)
    if rows is not None:
        rows = require_mask(rows, "rows", query, row_shapes, row_meaning).expand(batch, num_queries)
    if heads is not None:
        require_mask(heads, "heads", query, [(num_heads,)], "(H,)")
    lse = None if lse is None else _check_lse(lse, query)
    is_causal = require_bool(is_causal, "is_causal")
    scale, backend = check_scale(scale, head_dim), check_backend(backend)
    if reduction not in _REDUCTIONS:
        options = ", ".join(map(repr, _REDUCTIONS))
        raise ValueError(f"reduction: expected one of {options}, got {describe(reduction)}")

    per_head, _ = ops.attention_map(
        query,
        key,
        bias,
        key_padding_mask,
        row_gate if bias is not None else None,
        rows,
        heads,
        lse,
        is_causal,
        scale,
        any_requires_grad(query, key, bias),
        backend,
    )
    if reduction == "none":
        return per_head
    total = per_head.sum(dim=1)
    return total if reduction == "sum" else total / _count(rows, heads, query)


def _check_lse(lse: Tensor, query: Tensor) -> Tensor:
    batch, heads, num_queries, _ = query.shape
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    require_tensor(lse, "lse", "a tensor (B, H, Nq)")
    if lse.dtype != dtype:
        raise TypeError(f"lse: expected {dtype} for a {query.dtype} query, got {lse.dtype}; it must not be rounded")
    require_shape(lse, "lse", [(batch, heads, num_queries)], "(B, H, Nq)")
    require_same_device(lse, "lse", query)
    return lse.detach()


def _count(rows: Tensor | None, heads: Tensor | None, query: Tensor) -> Tensor | int:
    """How many pairs of a head and a row count, at least 1; (B, 1) where that depends on the batch entry."""
    num_heads = query.shape[1] if heads is None else heads.sum()
    num_rows = query.shape[2] if rows is None else rows.sum(dim=1, keepdim=True)
    count = num_heads * num_rows
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)
