"""Attention whose scores carry a per-key bias: the public functions, their checks, and how the bias is composed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import ops
from .backends import BACKENDS
from .validation import (
    FLOATING_DTYPES,
    describe,
    require_bool,
    require_number,
    require_same_device,
    require_shape,
    require_tensor,
    require_values,
)


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
        key_bias: b, float, natural-log units, shapes as M; added to log(lambda) M. -inf removes a key.
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
    query, key, value = _autocast(*_check_query_key_value(query, key, value))
    batch, _heads, num_queries, head_dim = query.shape
    num_keys = key.shape[2]

    bias = _compose_bias(region_mask, weight, key_bias, query, num_keys)
    if key_padding_mask is not None:
        _check_mask(key_padding_mask, "key_padding_mask", query, [(batch, num_keys)], "(B, Nk)")
    if row_gate is not None:
        _check_mask(row_gate, "row_gate", query, [(num_queries,), (batch, num_queries)], "(Nq,) or (B, Nq)")
        row_gate = row_gate.expand(batch, num_queries)
    is_causal, return_lse = require_bool(is_causal, "is_causal"), require_bool(return_lse, "return_lse")
    scale = 1.0 / math.sqrt(head_dim) if scale is None else require_number(scale, "scale")
    if backend != "auto" and backend not in BACKENDS:
        options = ", ".join(map(repr, ("auto", *BACKENDS)))
        raise ValueError(f"backend: expected one of {options}, got {describe(backend)}")

    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (query, key, value, bias))
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


def _check_query_key_value(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    layouts = {"query": "(B, H, Nq, D)", "key": "(B, Hkv, Nk, D)", "value": "(B, Hkv, Nk, Dv)"}
    for (name, layout), tensor in zip(layouts.items(), (query, key, value)):
        require_tensor(tensor, name, f"a tensor {layout}")
        if tensor.dim() != 4:
            raise ValueError(f"{name}: expected 4 dimensions {layout}, got shape {tuple(tensor.shape)}")
        if tensor.dtype not in FLOATING_DTYPES:
            raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {tensor.dtype}")
        require_same_device(tensor, name, query)
    if not torch.is_autocast_enabled(query.device.type):
        for name, tensor in (("key", key), ("value", value)):
            if tensor.dtype != query.dtype:
                raise TypeError(f"{name}: expected query's dtype {query.dtype}, got {tensor.dtype}; cast one of them")

    batch, heads, _, head_dim = query.shape
    if head_dim == 0:
        raise ValueError("query: expected a head dimension D of at least 1, got 0")
    if key.shape[0] != batch or key.shape[3] != head_dim:
        raise ValueError(
            f"key: expected (B, Hkv, Nk, D) with query's B = {batch} and D = {head_dim}, got shape {tuple(key.shape)}"
        )
    kv_heads = key.shape[1]
    if (heads % kv_heads if kv_heads else heads) != 0:
        raise ValueError(
            f"key: expected a number of heads Hkv that divides query's H = {heads}, got Hkv = {kv_heads} "
            f"(shape {tuple(key.shape)})"
        )
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"value: expected (B, Hkv, Nk, Dv) with key's (B, Hkv, Nk) = {tuple(key.shape[:3])}, "
            f"got shape {tuple(value.shape)}"
        )
    return query, key, value


def _autocast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    device_type = query.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        query, key, value = (t if t.dtype == torch.float64 else t.to(dtype) for t in (query, key, value))
    return query, key, value


def _check_mask(mask: Tensor, name: str, query: Tensor, shapes: list[tuple[int, ...]], meaning: str) -> None:
    require_tensor(mask, name, f"a bool tensor {meaning}")
    if mask.dtype != torch.bool:
        raise TypeError(f"{name}: expected torch.bool, got {mask.dtype}; convert it with {name}.bool()")
    require_shape(mask, name, shapes, meaning)
    require_same_device(mask, name, query)


def _compose_bias(
    region_mask: Tensor | None, weight: float | Tensor, key_bias: Tensor | None, query: Tensor, num_keys: int
) -> Tensor | None:
    """b + log(lambda) M as one (B, 1 or H, Nk) tensor in the dtype of the scores; None where that is 0 by
    construction.
    """
    batch, heads = query.shape[:2]
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    shapes = [(num_keys,), (batch, num_keys), (batch, heads, num_keys)]
    meaning = "(Nk,), (B, Nk) or (B, H, Nk)"
    weight = _check_weight(weight, query)

    def per_head(tensor: Tensor) -> Tensor:  # -> (B or 1, H or 1, Nk)
        return tensor if tensor.dim() == 3 else tensor[:, None] if tensor.dim() == 2 else tensor[None, None]

    bias = None
    if key_bias is not None:
        require_tensor(key_bias, "key_bias", f"a float tensor {meaning}")
        if key_bias.dtype not in FLOATING_DTYPES:
            raise TypeError(f"key_bias: expected a floating dtype, got {key_bias.dtype}; it is added to the scores")
        require_shape(key_bias, "key_bias", shapes, meaning)
        require_same_device(key_bias, "key_bias", query)
        largest = torch.finfo(key_bias.dtype).max
        key_bias = require_values(key_bias, "key_bias", -math.inf, largest, "values below +inf and no NaN")
        bias = per_head(key_bias).to(dtype)
    if region_mask is not None:
        require_tensor(region_mask, "region_mask", f"a bool or float tensor {meaning}")
        if region_mask.dtype != torch.bool and region_mask.dtype not in FLOATING_DTYPES:
            raise TypeError(
                f"region_mask: expected bool or a floating dtype, got {region_mask.dtype}; convert it with .bool()"
            )
        require_shape(region_mask, "region_mask", shapes, meaning)
        require_same_device(region_mask, "region_mask", query)
        region_mask = require_values(region_mask, "region_mask", 0.0, 1.0, "values in [0, 1]")
        region_bias = log_weight_times_mask(weight, per_head(region_mask).to(dtype))
        bias = region_bias if bias is None else bias + region_bias
    if bias is None:
        return None
    return bias.expand(batch, bias.shape[1], num_keys)


def _check_weight(weight: float | Tensor, query: Tensor) -> float | Tensor:
    expected = "a finite number >= 0"
    if not isinstance(weight, Tensor):
        return require_number(weight, "weight", minimum=0.0, what=expected + " or a float tensor (), (B,) or (B, H)")
    batch, heads = query.shape[:2]
    if weight.dtype not in FLOATING_DTYPES:
        raise TypeError(f"weight: expected a floating dtype, got {weight.dtype}")
    require_shape(weight, "weight", [(), (batch,), (batch, heads)], "(), (B,) or (B, H)")
    if weight.dim() > 0 or weight.device.type != "cpu":  # PyTorch lets a CPU scalar meet tensors on any device
        require_same_device(weight, "weight", query)
    return require_values(weight, "weight", 0.0, torch.finfo(weight.dtype).max, "finite values >= 0")


def log_weight_times_mask(weight: float | Tensor, mask: Tensor) -> Tensor:
    """log(lambda) M, (B or 1, H or 1, Nk); -inf where lambda = 0 and M > 0, without 0 * -inf in value or gradient."""
    if not isinstance(weight, Tensor):
        if weight == 0.0:
            return torch.zeros_like(mask).masked_fill(mask > 0, float("-inf"))
        return math.log(weight) * mask
    weight = weight.to(mask.dtype).reshape(weight.shape + (1,) * (3 - weight.dim()))
    removed = weight == 0
    bias = torch.log(weight.masked_fill(removed, 1.0)) * mask
    return bias.masked_fill(removed & (mask > 0), float("-inf"))
