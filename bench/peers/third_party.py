"""flash-attn, flash-linear-attention (FLA) and FlashInfer, where they are installed. None of them takes a per-key bias.

Each gets its own layout, (B, N, H, D), as views, or, where it would copy those, as tensors prepared for it.
"""

from __future__ import annotations

import torch

from ..inputs import CaseInputs, PackedInputs
from ..operations import BACKWARD, DECODE
from .interface import Call, Peer, PeerUnavailable, Prepare, installed

FLASH_ATTN = "flash-attn unbiased"
FLA = "FLA unbiased"
FLASHINFER = "FlashInfer unbiased"


def dense_peers(operation: str) -> list[Peer]:
    flash_attn = _flash_attn_decode if operation == DECODE else _flash_attn
    peers = [_unbiased(FLASH_ATTN, flash_attn)]
    if operation != DECODE:
        peers.append(_unbiased(FLA, _fla))
    if operation != BACKWARD:
        peers.append(_unbiased(FLASHINFER, _flashinfer_decode if operation == DECODE else _flashinfer))
    return peers


def packed_peers() -> list[Peer]:
    return [
        _unbiased(FLASH_ATTN, _flash_attn_packed),
        _unbiased(FLA, _fla_packed),
        _unbiased(FLASHINFER, _flashinfer_packed),
    ]


def _unbiased(name: str, prepare: Prepare) -> Peer:
    return Peer(name, prepare, is_biased=False, needs_cuda=True)


def _flash_attn(inputs: CaseInputs) -> Call:
    flash_attn_func = installed("flash_attn").flash_attn_func
    query, key, value = (t.transpose(1, 2) for t in (inputs.query, inputs.key, inputs.value))
    is_causal = inputs.case.is_causal
    return lambda: flash_attn_func(query, key, value, causal=is_causal).transpose(1, 2)


def _flash_attn_decode(inputs: CaseInputs) -> Call:
    flash_attn_with_kvcache = installed("flash_attn").flash_attn_with_kvcache
    query, key, value = (t.transpose(1, 2).contiguous() for t in (inputs.query, inputs.key, inputs.value))
    return lambda: flash_attn_with_kvcache(query, key, value).transpose(1, 2)


def _flash_attn_packed(inputs: PackedInputs) -> Call:
    flash_attn_varlen_func = installed("flash_attn").flash_attn_varlen_func
    case, starts = inputs.case, inputs.cu_seqlens
    arguments = (inputs.query, inputs.key, inputs.value, starts, starts, case.longest, case.longest)
    return lambda: flash_attn_varlen_func(*arguments, causal=case.is_causal)


def _fla(inputs: CaseInputs) -> Call:
    """For BACKWARD it copies into its layout in every call, since the gradients are wanted in ours."""
    if not inputs.case.is_causal:
        raise PeerUnavailable("parallel_attn is always causal")
    parallel_attn = installed("fla.ops.attn").parallel_attn
    query, key, value = (t.transpose(1, 2) for t in (inputs.query, inputs.key, inputs.value))
    if inputs.case.operation != BACKWARD:
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    return lambda: parallel_attn(query, key, value).transpose(1, 2)


def _fla_packed(inputs: PackedInputs) -> Call:
    parallel_attn = installed("fla.ops.attn").parallel_attn
    query, key, value = (t[None] for t in (inputs.query, inputs.key, inputs.value))
    starts = inputs.cu_seqlens.long()
    return lambda: parallel_attn(query, key, value, cu_seqlens=starts)[0]


def _flashinfer(inputs: CaseInputs) -> Call:
    single_prefill = installed("flashinfer").single_prefill_with_kv_cache
    query, key, value = _without_batch(inputs)
    is_causal = inputs.case.is_causal
    return lambda: single_prefill(query, key, value, causal=is_causal).transpose(0, 1)[None]


def _flashinfer_decode(inputs: CaseInputs) -> Call:
    single_decode = installed("flashinfer").single_decode_with_kv_cache
    query, key, value = _without_batch(inputs)
    query = query[0]  # (H, D)
    return lambda: single_decode(query, key, value)[None, :, None]


def _without_batch(inputs: CaseInputs) -> tuple[torch.Tensor, ...]:
    """(N, H, D), which FlashInfer's functions for one prompt take."""
    if inputs.case.batch != 1:
        raise PeerUnavailable(f"its functions for one prompt are timed; this case has {inputs.case.batch}")
    return tuple(t[0].transpose(0, 1).contiguous() for t in (inputs.query, inputs.key, inputs.value))


def _flashinfer_packed(inputs: PackedInputs) -> Call:
    case, starts = inputs.case, inputs.cu_seqlens
    workspace = torch.empty(128 << 20, dtype=torch.uint8, device=starts.device)
    wrapper = installed("flashinfer").BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD")
    wrapper.plan(
        starts,
        starts,
        case.heads,
        case.num_kv_heads,
        case.head_dim,
        causal=case.is_causal,
        q_data_type=case.dtype,
    )
    return lambda: wrapper.run(inputs.query, inputs.key, inputs.value)
