"""Everything that can compute a case, each as a function from its inputs to a call without arguments.

Preparing a peer is not timed. For SDPA and eager it includes the whole mask with causal and bias, and for FlexAttention
the compilation: the choice in their favour, since a model builds the mask anew for every prompt. finegrain_ops prepares
nothing: composing log(lambda) * M from a bool mask is part of each of its calls.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import finegrain_ops
from finegrain_ops.backends import preference

from .cases import CaseInputs

Call = Callable[[], Tensor]

SDPA_UNBIASED = "SDPA unbiased"
SDPA_MASK = "SDPA with mask tensor"
EAGER = "eager"
FLEX_ATTENTION = "FlexAttention"


class PeerUnavailable(Exception):
    """The peer cannot run a case on this machine; the message says why."""


@dataclass(frozen=True)
class Peer:
    """`prepare` returns a call that does one forward pass, or raises PeerUnavailable."""

    name: str
    prepare: Callable[[CaseInputs], Call]
    is_biased: bool = True


def ours(backend: str) -> str:
    return f"finegrain_ops {backend}"


def peers_for(device_type: str) -> list[Peer]:
    """All peers; those of finegrain_ops come first, in the order in which backend="auto" prefers them.

    Only what "auto" considers is timed: on a CPU, "triton" is an interpreter that is there to check numbers.
    """
    backends = [name for name in preference(device_type) if name != "reference"]
    return [
        *(Peer(ours(name), _prepare_finegrain_ops(name)) for name in backends),
        Peer(SDPA_UNBIASED, _prepare_sdpa_unbiased, is_biased=False),
        Peer(SDPA_MASK, _prepare_sdpa_with_mask),
        Peer(EAGER, _prepare_eager),
        Peer(FLEX_ATTENTION, _prepare_flex_attention),
    ]


def _prepare_finegrain_ops(backend: str) -> Callable[[CaseInputs], Call]:
    def prepare(inputs: CaseInputs) -> Call:
        def call() -> Tensor:
            return finegrain_ops.reweighted_attention(
                inputs.query,
                inputs.key,
                inputs.value,
                inputs.region_mask,
                inputs.case.weight,
                is_causal=inputs.case.is_causal,
                backend=backend,
            )

        try:
            call()
        except finegrain_ops.UnsupportedInputError as error:
            raise PeerUnavailable(str(error)) from error
        return call

    return prepare


def _prepare_sdpa_unbiased(inputs: CaseInputs) -> Call:
    """No bias at all: the floor that a fused bias is measured against."""
    query, key, value, case = inputs.query, inputs.key, inputs.value, inputs.case
    enable_gqa = case.num_kv_heads != case.heads
    return lambda: F.scaled_dot_product_attention(query, key, value, is_causal=case.is_causal, enable_gqa=enable_gqa)


def _prepare_sdpa_with_mask(inputs: CaseInputs) -> Call:
    query, key, value, case = inputs.query, inputs.key, inputs.value, inputs.case
    mask, enable_gqa = score_mask(inputs), case.num_kv_heads != case.heads
    return lambda: F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=enable_gqa)


def _prepare_eager(inputs: CaseInputs) -> Call:
    """The steps of transformers' `eager_attention_forward` (modeling_llama.py), softmax in float32 included."""
    query, key, value, case = inputs.query, inputs.key, inputs.value, inputs.case
    mask, scale = score_mask(inputs), case.head_dim**-0.5
    group = case.heads // case.num_kv_heads

    def call() -> Tensor:
        keys, values = (t if group == 1 else t.repeat_interleave(group, dim=1) for t in (key, value))
        scores = torch.matmul(query, keys.transpose(2, 3)) * scale
        scores = scores + mask
        probabilities = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
        return torch.matmul(probabilities, values)

    return call


def _prepare_flex_attention(inputs: CaseInputs) -> Call:
    """Compiled here, outside the timing; the causal block mask is built here too."""
    query, key, value, case, key_bias = inputs.query, inputs.key, inputs.value, inputs.case, inputs.key_bias

    def add_bias(score: Tensor, batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return score + key_bias[column]

    def is_visible(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return row >= column

    # Without this, the shapes of earlier cases count towards the limit of recompilations.
    torch.compiler.reset()
    try:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        block_mask = None
        if case.is_causal:
            block_mask = create_block_mask(is_visible, None, None, case.num_queries, case.num_keys, str(query.device))
        compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
        enable_gqa = case.num_kv_heads != case.heads

        def call() -> Tensor:
            return compiled(query, key, value, score_mod=add_bias, block_mask=block_mask, enable_gqa=enable_gqa)

        call()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a compiler may raise; the reason is stored with the row
        raise PeerUnavailable(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}") from error
    return call


def score_mask(inputs: CaseInputs) -> Tensor:
    """Bias and causal mask as one float mask in query's dtype, which SDPA demands.

    (1, 1, Nq, Nk) when causal; (1, 1, 1, Nk) otherwise, since one row is then enough. One mask for all heads.
    """
    case = inputs.case
    mask = inputs.key_bias[None, :]
    if case.is_causal:
        hidden = torch.ones(case.num_queries, case.num_keys, dtype=torch.bool, device=mask.device).triu(diagonal=1)
        mask = torch.where(hidden, float("-inf"), mask)
    return mask.to(inputs.query.dtype)[None, None]
