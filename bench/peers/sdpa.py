"""PyTorch's scaled dot product attention, without bias and with a mask tensor.

The whole mask with causal and bias is prepared, and is not timed: the choice in SDPA's favour, since a model builds it
anew for every prompt. It asks for no gradient, so backward gives none of the bias.
"""

from __future__ import annotations

import inspect
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..inputs import CaseInputs, PackedInputs
from .interface import Call, Peer, PeerUnavailable, Prepare, per_sequence

SDPA_UNBIASED = "SDPA unbiased"  # the kernel that PyTorch chooses
SDPA_FLASH = "SDPA flash unbiased"
SDPA_CUDNN = "SDPA cuDNN unbiased"
SDPA_MASK = "SDPA with mask tensor"
SDPA_EFFICIENT_MASK = "SDPA memory-efficient with mask"
SDPA_PER_SEQUENCE = "SDPA unbiased, per sequence"
SDPA_MASK_PER_SEQUENCE = "SDPA with mask tensor, per sequence"
SDPA_NESTED = "SDPA nested tensor unbiased"
VARLEN_ATTN = "torch varlen_attn unbiased"


def dense_peers(device_type: str) -> list[Peer]:
    return [
        Peer(SDPA_UNBIASED, _unbiased(), is_biased=False),
        Peer(SDPA_FLASH, _unbiased(SDPBackend.FLASH_ATTENTION), is_biased=False, needs_cuda=True),
        Peer(SDPA_CUDNN, _unbiased(SDPBackend.CUDNN_ATTENTION), is_biased=False, needs_cuda=True),
        Peer(SDPA_EFFICIENT_MASK, _with_mask(SDPBackend.EFFICIENT_ATTENTION), needs_cuda=True),
        *([Peer(SDPA_MASK, _with_mask())] if device_type == "cpu" else []),  # elsewhere that is the one above
    ]


def packed_peers() -> list[Peer]:
    return [
        Peer(SDPA_PER_SEQUENCE, per_sequence(_unbiased()), is_biased=False),
        Peer(SDPA_MASK_PER_SEQUENCE, per_sequence(_with_mask())),
        Peer(SDPA_NESTED, _nested, is_biased=False, needs_cuda=True),
        Peer(VARLEN_ATTN, _varlen_attn, is_biased=False, needs_cuda=True),
    ]


def _unbiased(backend: SDPBackend | None = None) -> Prepare:
    def prepare(inputs: CaseInputs) -> Call:
        query, key, value, case = inputs.query, inputs.key, inputs.value, inputs.case

        def call() -> Tensor:
            return F.scaled_dot_product_attention(
                query, key, value, is_causal=case.is_causal, enable_gqa=case.has_groups
            )

        return call if backend is None else _restricted(call, backend)

    return prepare


def _with_mask(backend: SDPBackend | None = None) -> Prepare:
    """The memory-efficient kernel knows no groups of heads: there key and value are repeated, as transformers does."""

    def prepare(inputs: CaseInputs) -> Call:
        query, key, value, case = inputs.query, inputs.key, inputs.value, inputs.case
        mask = score_mask(inputs)
        repeats = case.heads // case.num_kv_heads if backend == SDPBackend.EFFICIENT_ATTENTION else 1

        def call() -> Tensor:
            keys, values = (t if repeats == 1 else t.repeat_interleave(repeats, dim=1) for t in (key, value))
            enable_gqa = case.has_groups and repeats == 1
            return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=enable_gqa)

        return call if backend is None else _restricted(call, backend)

    return prepare


def score_mask(inputs: CaseInputs) -> Tensor:
    """Bias and causal mask as one float mask in query's dtype, which SDPA demands.

    (1, 1, Nq, Nk) when causal; (1, 1, 1, Nk) otherwise, since one row is then enough. One mask for all heads.
    """
    case = inputs.case
    mask = inputs.key_bias.detach()[None, :]
    if case.is_causal:
        hidden = torch.ones(case.num_queries, case.num_keys, dtype=torch.bool, device=mask.device).triu(diagonal=1)
        mask = torch.where(hidden, float("-inf"), mask)
    return mask.to(inputs.query.dtype)[None, None]


def _restricted(call: Call, backend: SDPBackend) -> Call:
    """`call` with one kernel allowed. When that refuses, SDPA says why in warnings, and here they become the reason."""

    def restricted() -> Tensor:
        with sdpa_kernel(backend):
            return call()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            restricted()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            said = dict.fromkeys(str(warning.message).partition(" (Triggered")[0] for warning in caught)
            raise PeerUnavailable("; ".join([*said, str(error)])[:500]) from error
    return restricted


def _nested(inputs: PackedInputs) -> Call:
    case = inputs.case
    if case.has_groups:
        raise PeerUnavailable("SDPA takes no groups of heads in nested tensors")
    offsets = inputs.cu_seqlens.long()
    query, key, value = (
        torch.nested.nested_tensor_from_jagged(
            t, offsets, min_seqlen=min(case.lengths or ()), max_seqlen=case.longest
        ).transpose(1, 2)
        for t in (inputs.query, inputs.key, inputs.value)
    )

    def call() -> Tensor:
        output = F.scaled_dot_product_attention(query, key, value, is_causal=case.is_causal)
        return output.transpose(1, 2).values()

    return call


def _varlen_attn(inputs: PackedInputs) -> Call:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        raise PeerUnavailable("torch.nn.attention.varlen came with torch 2.10") from error
    case, starts = inputs.case, inputs.cu_seqlens
    known = inspect.signature(varlen_attn).parameters
    options: dict[str, object] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if case.has_groups and "enable_gqa" in known:
        options["enable_gqa"] = True
    arguments = (inputs.query, inputs.key, inputs.value, starts, starts, case.longest, case.longest)
    return lambda: varlen_attn(*arguments, **options)
