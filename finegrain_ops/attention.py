"""Attention whose scores carry a per-key bias: the public functions on batched and on packed tensors."""

from __future__ import annotations

from torch import Tensor

from . import ops
from .arguments import any_requires_grad, autocast, check_backend, check_batched, check_packed, check_scale
from .key_bias import compose_key_bias, compose_packed_key_bias
from .validation import require_bool, require_cu_seqlens, require_length, require_mask

__all__ = ["reweighted_attention", "reweighted_attention_varlen"]


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
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Attention with the weight of chosen keys multiplied, fused: softmax(log(lambda) M + A) V.

    .. math::
        s_{ij} = \mathrm{scale} \cdot q_i \cdot k_j + g_i (b_j + \log(\lambda) M_j), \qquad
        o_i = \sum_j \mathrm{softmax}_j(s_{ij}) \, v_j

    With b = 0 and g = 1 this is Eq. 3 of CoF (arXiv 2412.16869, Sec. II-C): before normalisation, the attention that
    each key of the region receives is multiplied by lambda. Prompt Highlighter, PASTA (lambda < 1 on the other keys)
    and attention knock-out (lambda = 0) are the same operation with other M, b and g.

    Args:
        query: (B, H, Nq, D), float16, bfloat16 or float32 (float64 on CPU). Any strides; a unit last stride avoids
            a copy.
        key: (B, Hkv, Nk, D), same dtype; H is a multiple of Hkv (grouped-query attention).
        value: (B, Hkv, Nk, Dv), same dtype; Dv may differ from D.
        region_mask: M, bool or float in [0, 1], (Nk,), (B, Nk) or (B, H, Nk). None: no region, and weight has
            no effect.
        weight: lambda >= 0, a number or a float tensor (), (B,) or (B, H). 0 removes the keys with M > 0.
        key_bias: b, float, natural-log units, shapes as M; added to log(lambda) M. -inf removes a key; finite sums
            beyond +-131072 (2^17) count as that, so that a row all of whose keys carry -1e9 still tells them apart.
        key_padding_mask: (B, Nk) bool, True = attend. It holds for every row, whatever row_gate says.
        row_gate: g, (Nq,) or (B, Nq) bool: the rows in which the bias acts. None: all of them.
        is_causal: row i sees keys j <= i + Nk - Nq: aligned bottom-right, as in flash-attn.
        scale: of the dot product; default 1 / sqrt(D).
        return_lse: also return the logsumexp of each row's scores.
        backend: "auto" takes the fastest that can run the call; "triton", "cuda", "sdpa" or "reference" run there
            or raise.

    Returns:
        (B, H, Nq, Dv) in query's dtype; with return_lse also lse (B, H, Nq), float32 (float64 for float64 inputs),
        natural log. A row that sees no key gives 0, lse -inf and gradients of 0. Differentiable in query, key, value
        and every float tensor among region_mask, weight and key_bias; also through lse.

    Raises:
        ValueError: a shape or a value is not as said above (values on a device only with FINEGRAIN_CHECK=1).
        TypeError: a dtype or a type is not.
        UnsupportedInputError: the named backend cannot run this; every reason is listed.

    Under autocast, query, key and value are cast as for scaled_dot_product_attention.

    Equivalent, for float inputs without padding, gate, groups and empty rows::

        scores = scale * query @ key.mT + (key_bias + weight.log() * region_mask)[:, None, None, :]
        if is_causal:
            visible = torch.ones(Nq, Nk, dtype=torch.bool).tril(Nk - Nq)
            scores = scores.masked_fill(~visible, float("-inf"))
        output = scores.softmax(-1) @ value
    """
    check_batched(query=query, key=key, value=value)
    query, key, value = autocast(query, key, value)
    batch, _heads, num_queries, head_dim = query.shape
    num_keys = key.shape[2]

    bias = compose_key_bias(region_mask, weight, key_bias, query, num_keys)
    if key_padding_mask is not None:
        require_mask(key_padding_mask, "key_padding_mask", query, [(batch, num_keys)], "(B, Nk)")
    if row_gate is not None:
        require_mask(row_gate, "row_gate", query, [(num_queries,), (batch, num_queries)], "(Nq,) or (B, Nq)")
        row_gate = row_gate.expand(batch, num_queries)
    is_causal, return_lse = require_bool(is_causal, "is_causal"), require_bool(return_lse, "return_lse")
    scale, backend = check_scale(scale, head_dim), check_backend(backend)

    needs_grad = any_requires_grad(query, key, value, bias)
    output, lse = ops.reweighted_attention(
        query,
        key,
        value,
        bias,
        key_padding_mask,
        row_gate if bias is not None else None,
        is_causal,
        scale,
        return_lse or needs_grad,
        needs_grad,
        backend,
    )
    return (output, lse) if return_lse else output


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
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""`reweighted_attention` on packed sequences: several of different lengths, one after another without padding.

    .. math::
        s_{ij} = \mathrm{scale} \cdot q_i \cdot k_j + g_i (b_j + \log(\lambda_s) M_j), \qquad
        o_i = \sum_j \mathrm{softmax}_j(s_{ij}) \, v_j

    where row i of sequence s sees the keys j of sequence s and no others. The layout is that of
    `flash_attn_varlen_func`: sequence s holds the rows cu_seqlens_q[s] up to cu_seqlens_q[s + 1] of query and the rows
    cu_seqlens_k[s] up to cu_seqlens_k[s + 1] of key and value. A sequence may be empty, on either side.

    Args:
        query: (Tq, H, D), float16, bfloat16 or float32 (float64 on CPU). Any strides, so a slice of a fused
            (T, 3, H, D) projection will do; a unit last stride avoids a copy.
        key: (Tk, Hkv, D), same dtype; H is a multiple of Hkv (grouped-query attention).
        value: (Tk, Hkv, Dv), same dtype; Dv may differ from D.
        cu_seqlens_q: (num_seqs + 1,) int32 on query's device (int64 is converted): 0, then the cumulative lengths of
            the sequences in query, up to Tq.
        cu_seqlens_k: the same of key and value, up to Tk.
        max_seqlen_q: an integer, at least the largest length in query. Longer sequences are an error where values are
            checked; elsewhere their result is undefined.
        max_seqlen_k: the same of key and value.
        region_mask: M, bool or float in [0, 1], (Tk,) or (H, Tk). None: no region, and weight has no effect.
        weight: lambda >= 0, a number or a float tensor (), (num_seqs,) or (num_seqs, H). 0 removes the keys with M > 0.
        key_bias: b, float, natural-log units, shapes as M; added to log(lambda) M. -inf removes a key; finite sums
            beyond +-131072 (2^17) count as that, so that a row all of whose keys carry -1e9 still tells them apart.
        row_gate: g, (Tq,) bool: the rows in which the bias acts. None: all of them.
        is_causal: in a sequence of n rows and m keys, row i sees keys j <= i + m - n: aligned bottom-right.
        scale: of the dot product; default 1 / sqrt(D).
        return_lse: also return the logsumexp of each row's scores.
        backend: "auto" takes the fastest that can run the call; "triton", "cuda", "sdpa" or "reference" run there
            or raise.

    Returns:
        (Tq, H, Dv) in query's dtype; with return_lse also lse (H, Tq), float32 (float64 for float64 inputs), natural
        log. A row that sees no key, or is in no sequence, gives 0, lse -inf and gradients of 0. Differentiable in
        query, key, value and every float tensor among region_mask, weight and key_bias; also through lse.

    Raises:
        ValueError: a shape or a value is not as said above (values on a device only with FINEGRAIN_CHECK=1).
        TypeError: a dtype or a type is not.
        UnsupportedInputError: the named backend cannot run this; every reason is listed.

    Under autocast, query, key and value are cast as for scaled_dot_product_attention.

    Equivalent, for a bias (Tk,) and a gate (Tq,)::

        outputs = []
        for q0, q1, k0, k1 in zip(cu_seqlens_q, cu_seqlens_q[1:], cu_seqlens_k, cu_seqlens_k[1:]):
            outputs.append(reweighted_attention(
                query[q0:q1].transpose(0, 1)[None], key[k0:k1].transpose(0, 1)[None],
                value[k0:k1].transpose(0, 1)[None], key_bias=key_bias[k0:k1], row_gate=row_gate[q0:q1],
                is_causal=is_causal, scale=scale)[0].transpose(0, 1))
        output = torch.cat(outputs)
    """
    check_packed(query=query, key=key, value=value)
    query, key, value = autocast(query, key, value)
    num_queries, _heads, head_dim = query.shape
    num_keys = key.shape[0]

    max_seqlen_q = require_length(max_seqlen_q, "max_seqlen_q")
    max_seqlen_k = require_length(max_seqlen_k, "max_seqlen_k")
    cu_seqlens_q = require_cu_seqlens(cu_seqlens_q, "cu_seqlens_q", query, num_queries, max_seqlen_q)
    cu_seqlens_k = require_cu_seqlens(cu_seqlens_k, "cu_seqlens_k", query, num_keys, max_seqlen_k)
    if cu_seqlens_k.shape != cu_seqlens_q.shape:
        raise ValueError(
            f"cu_seqlens_k: expected as many sequences as in cu_seqlens_q, {cu_seqlens_q.shape[0] - 1}, got "
            f"{cu_seqlens_k.shape[0] - 1}; a sequence may be empty"
        )
    bias = compose_packed_key_bias(region_mask, weight, key_bias, query, num_keys, cu_seqlens_k)
    if row_gate is not None:
        require_mask(row_gate, "row_gate", query, [(num_queries,)], "(Tq,)")
    is_causal, return_lse = require_bool(is_causal, "is_causal"), require_bool(return_lse, "return_lse")
    scale, backend = check_scale(scale, head_dim), check_backend(backend)

    needs_grad = any_requires_grad(query, key, value, bias)
    output, lse = ops.reweighted_attention_varlen(
        query,
        key,
        value,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        bias,
        row_gate if bias is not None else None,
        is_causal,
        scale,
        return_lse or needs_grad,
        needs_grad,
        backend,
    )
    return (output, lse) if return_lse else output
