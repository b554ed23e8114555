"""The two ways to call PyTorch's SDPA kernels.

CPU_FLASH   the CPU kernel behind F.scaled_dot_product_attention, called by its own name because only so it takes a mask
            row together with a causal mask, gives its lse, and runs its backward on pieces of a row.
ANY_DEVICE  F.scaled_dot_product_attention, which chooses a kernel for the device; lse is computed apart, in chunks of
rows,
            when it is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Engine:
    """forward(query, key, value, mask_row, is_causal, scale, need_lse) -> (output, lse or None); square if causal."""

    carries_mask_row: bool
    forward: Callable[[Tensor, Tensor, Tensor, Tensor | None, bool, float, bool], tuple[Tensor, Tensor | None]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]] | None


def choose(device: torch.device) -> Engine:
    return CPU_FLASH if device.type == "cpu" else ANY_DEVICE


def _cpu_flash_forward(
    query: Tensor, key: Tensor, value: Tensor, mask_row: Tensor | None, is_causal: bool, scale: float, need_lse: bool
) -> tuple[Tensor, Tensor | None]:
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, is_causal, attn_mask=mask_row, scale=scale
    )
    return output, lse


def _cpu_flash_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    mask_row: Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_output, query, key, value, output, lse, 0.0, is_causal, attn_mask=mask_row, scale=scale
    )


CPU_FLASH = Engine(carries_mask_row=True, forward=_cpu_flash_forward, backward=_cpu_flash_backward)


def _any_device_forward(
    query: Tensor, key: Tensor, value: Tensor, mask_row: Tensor | None, is_causal: bool, scale: float, need_lse: bool
) -> tuple[Tensor, Tensor | None]:
    if mask_row is not None:
        raise AssertionError("this engine gets its bias in columns")
    output = F.scaled_dot_product_attention(query, key, value, is_causal=is_causal, scale=scale)
    return output, _lse_in_chunks(query, key, is_causal, scale) if need_lse else None


_LSE_ROWS = 128


def _lse_in_chunks(query: Tensor, key: Tensor, is_causal: bool, scale: float) -> Tensor:
    """logsumexp of the scores, (B, H, Nq) float32; _LSE_ROWS x Nk of them in memory at a time, also under autograd."""

    def chunk(rows: Tensor, keys: Tensor, start: int) -> Tensor:  # (B, H, rows, W), (B, H, Nk, W) -> (B, H, rows)
        dtype = torch.promote_types(rows.dtype, torch.float32)
        scores = scale * (rows.to(dtype) @ keys.to(dtype).transpose(-1, -2))
        if is_causal:
            visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril(diagonal=start)
            scores = scores.masked_fill(~visible, float("-inf"))
        return torch.logsumexp(scores, dim=-1)

    starts = range(0, query.shape[2], _LSE_ROWS)
    return torch.cat(
        [checkpoint(chunk, query[:, :, s : s + _LSE_ROWS], key, s, use_reentrant=False) for s in starts], dim=2
    )


ANY_DEVICE = Engine(carries_mask_row=False, forward=_any_device_forward, backward=None)
