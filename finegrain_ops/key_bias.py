"""The bias of each key, b + log(lambda) M, composed from what the caller gave: one tensor for every backend."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends.unpacking import sequence_of
from .validation import (
    FLOATING_DTYPES,
    require_number,
    require_same_device,
    require_shape,
    require_tensor,
    require_values,
)


def compose_key_bias(
    region_mask: Tensor | None, weight: float | Tensor, key_bias: Tensor | None, query: Tensor, num_keys: int
) -> Tensor | None:
    """b + log(lambda) M for query (B, H, Nq, D), as (B, 1 or H, Nk) in the dtype of the scores; None where that is 0
    by construction.
    """
    batch, heads = query.shape[:2]
    shapes, meaning = [(num_keys,), (batch, num_keys), (batch, heads, num_keys)], "(Nk,), (B, Nk) or (B, H, Nk)"
    weight = _check_weight(weight, query, [(), (batch,), (batch, heads)], "(), (B,) or (B, H)")
    key_bias, region_mask = _check_bias_and_mask(key_bias, region_mask, query, shapes, meaning)
    if isinstance(weight, Tensor) and weight.dim() > 0:  # -> (B, 1 or H, 1)
        weight = weight.reshape(*weight.shape, *(1,) * (3 - weight.dim()))

    def per_head(tensor: Tensor) -> Tensor:  # -> (B or 1, H or 1, Nk)
        return tensor if tensor.dim() == 3 else tensor[:, None] if tensor.dim() == 2 else tensor[None, None]

    key_bias = None if key_bias is None else per_head(key_bias)
    bias = _sum(key_bias, weight, None if region_mask is None else per_head(region_mask), query)
    return None if bias is None else bias.expand(batch, bias.shape[1], num_keys)


def compose_packed_key_bias(
    region_mask: Tensor | None,
    weight: float | Tensor,
    key_bias: Tensor | None,
    query: Tensor,
    num_keys: int,
    cu_seqlens_k: Tensor,
) -> Tensor | None:
    """b + log(lambda) M for query (Tq, H, D), as (1 or H, Tk) in the dtype of the scores; None where that is 0 by
    construction. The weight of a key is that of its sequence.
    """
    heads, num_seqs = query.shape[1], cu_seqlens_k.shape[0] - 1
    weight = _check_weight(weight, query, [(), (num_seqs,), (num_seqs, heads)], "(), (num_seqs,) or (num_seqs, H)")
    shapes, meaning = [(num_keys,), (heads, num_keys)], "(Tk,) or (H, Tk)"
    key_bias, region_mask = _check_bias_and_mask(key_bias, region_mask, query, shapes, meaning)
    if region_mask is not None and isinstance(weight, Tensor) and weight.dim() > 0:  # -> (Tk,) or (H, Tk)
        # Keys after the last sequence have a weight of 1.
        per_sequence = F.pad(weight, (0,) * (2 * weight.dim() - 1) + (1,), value=1.0)
        weight = per_sequence[sequence_of(cu_seqlens_k, num_keys)].movedim(0, -1)

    def per_head(tensor: Tensor) -> Tensor:  # -> (H or 1, Tk)
        return tensor if tensor.dim() == 2 else tensor[None]

    key_bias = None if key_bias is None else per_head(key_bias)
    return _sum(key_bias, weight, None if region_mask is None else per_head(region_mask), query)


def _sum(key_bias: Tensor | None, weight: float | Tensor, region_mask: Tensor | None, query: Tensor) -> Tensor | None:
    """b + log(lambda) M of what is given, in the dtype of the scores."""
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    bias = None if key_bias is None else key_bias.to(dtype)
    if region_mask is not None:
        region_bias = log_weight_times_mask(weight, region_mask.to(dtype))
        bias = region_bias if bias is None else bias + region_bias
    return bias


def log_weight_times_mask(weight: float | Tensor, mask: Tensor) -> Tensor:
    """log(lambda) M; -inf where lambda = 0 and M > 0, without 0 * -inf in value or gradient. A tensor of weights must
    broadcast to the mask.
    """
    if not isinstance(weight, Tensor):
        if weight == 0.0:
            return torch.zeros_like(mask).masked_fill(mask > 0, float("-inf"))
        return math.log(weight) * mask
    weight = weight.to(mask.dtype)
    removed = weight == 0
    bias = torch.log(weight.masked_fill(removed, 1.0)) * mask
    return bias.masked_fill(removed & (mask > 0), float("-inf"))


def _check_bias_and_mask(
    key_bias: Tensor | None, region_mask: Tensor | None, query: Tensor, shapes: Sequence[tuple[int, ...]], meaning: str
) -> tuple[Tensor | None, Tensor | None]:
    if key_bias is not None:
        require_tensor(key_bias, "key_bias", f"a float tensor {meaning}")
        if key_bias.dtype not in FLOATING_DTYPES:
            raise TypeError(f"key_bias: expected a floating dtype, got {key_bias.dtype}; it is added to the scores")
        require_shape(key_bias, "key_bias", shapes, meaning)
        require_same_device(key_bias, "key_bias", query)
        largest = torch.finfo(key_bias.dtype).max
        key_bias = require_values(key_bias, "key_bias", -math.inf, largest, "values below +inf and no NaN")
    if region_mask is not None:
        require_tensor(region_mask, "region_mask", f"a bool or float tensor {meaning}")
        if region_mask.dtype != torch.bool and region_mask.dtype not in FLOATING_DTYPES:
            raise TypeError(
                f"region_mask: expected bool or a floating dtype, got {region_mask.dtype}; convert it with .bool()"
            )
        require_shape(region_mask, "region_mask", shapes, meaning)
        require_same_device(region_mask, "region_mask", query)
        region_mask = require_values(region_mask, "region_mask", 0.0, 1.0, "values in [0, 1]")
    return key_bias, region_mask


def _check_weight(
    weight: float | Tensor, query: Tensor, shapes: Sequence[tuple[int, ...]], meaning: str
) -> float | Tensor:
    if not isinstance(weight, Tensor):
        what = f"a finite number >= 0 or a float tensor {meaning}"
        return require_number(weight, "weight", minimum=0.0, what=what)
    if weight.dtype not in FLOATING_DTYPES:
        raise TypeError(f"weight: expected a floating dtype, got {weight.dtype}")
    require_shape(weight, "weight", shapes, meaning)
    if weight.dim() > 0 or weight.device.type != "cpu":  # PyTorch lets a CPU scalar meet tensors on any device
        require_same_device(weight, "weight", query)
    return require_values(weight, "weight", 0.0, torch.finfo(weight.dtype).max, "finite values >= 0")
