"""What the attention kernels read of the bias: one row of scores to add per head, and which keys it concerns.

The rows of all heads and sequences lie in one buffer, each beginning at a multiple of ROW_ALIGNMENT and reaching to
the next one, -inf beyond the last key. So a block of keys is read with vector loads and without a mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tuning import EXACT

ROW_ALIGNMENT = 128  # at least the largest BLOCK_N of a kernel that reads such rows

# In natural-log units: finegrain_ops/backends/interface.py says why.
LARGEST_BIAS = tl.constexpr(131072.0)


@triton.jit
def sequence_bounds(cu_seqlens_ptr, sequence, total):
    """First row and number of rows of a packed sequence, kept inside the buffer whatever the lengths say."""
    start = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + sequence), 0), total)
    end = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + sequence + 1), start), total)
    return start, end - start


@triton.jit
def packed_bias_row(first_key, sequence):
    """Where the row of a packed sequence begins: a multiple of 128 (ROW_ALIGNMENT) that leaves room for the ones
    before.
    """
    return (first_key // 128 + sequence) * 128


@triton.jit
def bias_in_units(bias, multiplier):
    """A finite bias is kept within +-LARGEST_BIAS, where float32 still tells scores apart; infinities and NaN stay."""
    bias = tl.where((bias < -LARGEST_BIAS) & (bias != float("-inf")), -LARGEST_BIAS, bias)
    return tl.where((bias > LARGEST_BIAS) & (bias != float("inf")), LARGEST_BIAS, bias) * multiplier


@triton.jit(do_not_specialize=["num_keys"])
def prepare_key_bias_kernel(
    bias_ptr,  # (B, 1 or H, Nk) or packed (1 or H, Tk) float32; read only with HAS_BIAS
    padding_ptr,  # (B, Nk) uint8; read only with HAS_PADDING
    cu_seqlens_k_ptr,  # (sequences + 1,) int32; read only with PACKED
    prepared_ptr,  # float32
    range_ptr,  # (sequences, heads, 4) int32
    bias_stride_b,
    bias_stride_h,
    bias_stride_n,
    padding_stride_b,
    padding_stride_n,
    prepared_stride_b,
    prepared_stride_h,
    num_heads,
    num_keys,  # packed: of all sequences together
    multiplier,
    HAS_BIAS: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    HAS_GATE: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per (sequence, head): prepared = multiplier * bias, -inf after the end of the keys and, without a row
    gate, where padded; range = first and last + 1 of the keys that are biased or padded, first and last + 1 of those
    that some row may see.
    """
    row = tl.program_id(0).to(tl.int64)
    sequence, head = row // num_heads, row % num_heads
    bias_base = bias_ptr + sequence * bias_stride_b + head * bias_stride_h
    prepared_base = prepared_ptr + sequence * prepared_stride_b + head * prepared_stride_h
    if PACKED:
        first_key, num_keys = sequence_bounds(cu_seqlens_k_ptr, sequence, num_keys)
        bias_base += tl.cast(first_key, tl.int64) * bias_stride_n
        prepared_base += packed_bias_row(first_key, sequence)
    first_biased, last_biased, first_visible, last_visible = num_keys, -1, num_keys, -1
    for start in range(0, num_keys, BLOCK):
        keys = start + tl.arange(0, BLOCK)  # [BLOCK]
        inside = keys < num_keys
        keys_64 = keys.to(tl.int64)
        prepared = tl.zeros([BLOCK], tl.float32)
        if HAS_BIAS:
            bias = tl.load(bias_base + keys_64 * bias_stride_n, mask=inside, other=0.0)
            prepared = bias_in_units(bias, multiplier)
        biased = inside & (prepared != 0.0)
        visible = inside
        if HAS_PADDING:
            attend = tl.load(
                padding_ptr + sequence * padding_stride_b + keys_64 * padding_stride_n, mask=inside, other=1
            )
            padded = attend == 0
            biased = biased | padded
            visible = inside & (attend != 0)
            if not HAS_GATE:
                prepared = tl.where(padded, float("-inf"), prepared)
        if not HAS_GATE:
            visible = inside & (prepared != float("-inf"))
        prepared = tl.where(inside, prepared, float("-inf"))
        tl.store(prepared_base + keys_64, prepared, mask=keys < tl.cdiv(num_keys, 128) * 128)
        first_biased = tl.minimum(first_biased, tl.min(tl.where(biased, keys, num_keys), 0))
        last_biased = tl.maximum(last_biased, tl.max(tl.where(biased, keys, -1), 0))
        first_visible = tl.minimum(first_visible, tl.min(tl.where(visible, keys, num_keys), 0))
        last_visible = tl.maximum(last_visible, tl.max(tl.where(visible, keys, -1), 0))
    tl.store(range_ptr + 4 * row, first_biased)
    tl.store(range_ptr + 4 * row + 1, last_biased + 1)
    tl.store(range_ptr + 4 * row + 2, first_visible)
    tl.store(range_ptr + 4 * row + 3, last_visible + 1)


@dataclass(frozen=True)
class PreparedBias:
    """Rows of scores to add, in units (softmax.py) or, unfolded, in base 2; see prepare_key_bias_kernel for the
    range.
    """

    bias: Tensor
    key_range: Tensor  # (sequences, heads, 4) int32
    stride_b: int  # of a packed bias 0: the row of a sequence begins at packed_bias_row
    stride_h: int  # 0 where all heads share a row

    def kernel_arguments(self) -> dict[str, Tensor | int]:
        heads = self.key_range.shape[1]
        return {
            "bias_ptr": self.bias,
            "range_ptr": self.key_range,
            "bias_stride_b": self.stride_b,
            "bias_stride_h": self.stride_h if heads > 1 else 0,
            "range_stride_b": 4 * heads,
            "range_stride_h": 4 if heads > 1 else 0,
        }


def prepare_key_bias(
    key_bias: Tensor | None,
    key_padding_mask: Tensor | None,
    cu_seqlens_k: Tensor | None,
    *,
    batch: int,
    num_keys: int,
    longest: int,
    has_gate: bool,
    multiplier: float,
) -> PreparedBias:
    """From key_bias (B, 1 or H, Nk), packed (1 or H, Tk), and key_padding_mask (B, Nk); one of them must be given.

    num_keys counts the keys of all packed sequences together, longest those of the longest. Everything stays on the
    device: no synchronisation.
    """
    source = key_bias if key_bias is not None else key_padding_mask
    assert source is not None
    packed = cu_seqlens_k is not None
    heads = 1 if key_bias is None else key_bias.shape[-2]
    if packed:
        stride_b, stride_h = 0, (num_keys // ROW_ALIGNMENT + batch) * ROW_ALIGNMENT
        prepared = torch.empty(heads * stride_h, dtype=torch.float32, device=source.device)
        bias_strides = (0, *key_bias.stride()) if key_bias is not None else (0, 0, 0)
    else:
        stride_h = triton.cdiv(num_keys, ROW_ALIGNMENT) * ROW_ALIGNMENT
        stride_b = heads * stride_h
        prepared = torch.empty(batch * stride_b, dtype=torch.float32, device=source.device)
        bias_strides = (0, 0, 0) if key_bias is None else key_bias.stride()
    key_range = torch.empty((batch, heads, 4), dtype=torch.int32, device=source.device)
    prepare_key_bias_kernel[(batch * heads,)](
        source if key_bias is None else key_bias,
        source if key_padding_mask is None else key_padding_mask.view(torch.uint8),
        source if cu_seqlens_k is None else cu_seqlens_k,
        prepared,
        key_range,
        *bias_strides,
        *((0, 0) if key_padding_mask is None else key_padding_mask.stride()),
        stride_b,
        stride_h,
        heads,
        num_keys,
        multiplier,
        HAS_BIAS=key_bias is not None,
        HAS_PADDING=key_padding_mask is not None,
        HAS_GATE=has_gate,
        PACKED=packed,
        BLOCK=max(ROW_ALIGNMENT, min(1024, triton.next_power_of_2(longest))),
        num_warps=4,
        **EXACT,
    )
    return PreparedBias(prepared, key_range, stride_b, stride_h)
