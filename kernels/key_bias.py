"""What the attention kernels read of the bias: one row of scores to add per head, and the range of keys that it
covers.
"""

import torch
import triton.language as tl
from torch import Tensor

import triton


@triton.jit(do_not_specialize=["num_keys"])
def prepare_key_bias_kernel(
    bias_ptr,  # (B, 1 or H, Nk) float32, or unused
    padding_ptr,  # (B, Nk) bool, or unused
    prepared_ptr,  # (B * heads, Nk) float32
    range_ptr,  # (B * heads, 2) int32
    bias_stride_b,
    bias_stride_h,
    bias_stride_n,
    padding_stride_b,
    padding_stride_n,
    num_heads,
    num_keys,
    multiplier,
    HAS_BIAS: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per (batch, head) row: prepared = multiplier * bias, -inf where padded; range = [first, last + 1) of
    prepared != 0.
    """
    row = tl.program_id(0).to(tl.int64)
    batch, head = row // num_heads, row % num_heads
    first, last = num_keys, -1
    for start in range(0, num_keys, BLOCK):
        keys = start + tl.arange(0, BLOCK)  # [BLOCK]
        inside = keys < num_keys
        keys_64 = keys.to(tl.int64)
        prepared = tl.zeros([BLOCK], tl.float32)
        if HAS_BIAS:
            address = bias_ptr + batch * bias_stride_b + head * bias_stride_h + keys_64 * bias_stride_n
            prepared = tl.load(address, mask=inside, other=0.0) * multiplier
        if HAS_PADDING:
            attend = tl.load(padding_ptr + batch * padding_stride_b + keys_64 * padding_stride_n, mask=inside, other=1)
            prepared = tl.where(attend != 0, prepared, float("-inf"))
        tl.store(prepared_ptr + row * num_keys + keys_64, prepared, mask=inside)
        biased = inside & (prepared != 0.0)
        first = tl.minimum(first, tl.min(tl.where(biased, keys, num_keys), 0))
        last = tl.maximum(last, tl.max(tl.where(biased, keys, -1), 0))
    tl.store(range_ptr + 2 * row, first)
    tl.store(range_ptr + 2 * row + 1, last + 1)


def prepare_key_bias(
    key_bias: Tensor | None, key_padding_mask: Tensor | None, batch: int, num_keys: int, multiplier: float
) -> tuple[Tensor, Tensor]:
    """The bias times `multiplier` with padded keys at -inf, (B, 1 or H, Nk) float32, and its range (B, 1 or H, 2)
    int32.

    Outside [start, end) of the range every entry is 0, so blocks of keys there need no bias and no mask. start > end
    is possible when no entry differs from 0. Everything stays on the device: no synchronisation.
    """
    source = key_bias if key_bias is not None else key_padding_mask
    assert source is not None
    heads = 1 if key_bias is None else key_bias.shape[1]
    prepared = torch.empty((batch, heads, num_keys), dtype=torch.float32, device=source.device)
    key_range = torch.empty((batch, heads, 2), dtype=torch.int32, device=source.device)
    bias_strides = (0, 0, 0) if key_bias is None else key_bias.stride()
    padding_strides = (0, 0) if key_padding_mask is None else key_padding_mask.stride()
    prepare_key_bias_kernel[(batch * heads,)](
        source if key_bias is None else key_bias,
        source if key_padding_mask is None else key_padding_mask.view(torch.uint8),
        prepared,
        key_range,
        *bias_strides,
        *padding_strides,
        heads,
        num_keys,
        multiplier,
        HAS_BIAS=key_bias is not None,
        HAS_PADDING=key_padding_mask is not None,
        BLOCK=min(1024, triton.next_power_of_2(num_keys)),
        num_warps=4,
    )
    return prepared, key_range
