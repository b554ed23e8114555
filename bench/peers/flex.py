"""FlexAttention with the bias as a captured tensor. Compiled, and its block mask built, outside the timing."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from ..inputs import CaseInputs, PackedInputs
from .interface import Call, Peer

FLEX_ATTENTION = "FlexAttention"


def dense_peers() -> list[Peer]:
    return [Peer(FLEX_ATTENTION, _dense)]


def packed_peers() -> list[Peer]:
    return [Peer(FLEX_ATTENTION, _packed)]


def _dense(inputs: CaseInputs) -> Call:
    query, case = inputs.query, inputs.case

    def is_visible(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return row >= column

    block_mask = None
    if case.is_causal:
        block_mask = create_block_mask(is_visible, None, None, case.num_queries, case.num_keys, str(query.device))
    return _compiled(query, inputs.key, inputs.value, inputs.key_bias, block_mask, case.has_groups)


def _packed(inputs: PackedInputs) -> Call:
    """All sequences as one, in which a token sees those before it in its own sequence."""
    case = inputs.case
    query, key, value = (t.transpose(0, 1)[None].contiguous() for t in (inputs.query, inputs.key, inputs.value))
    lengths = torch.tensor(case.lengths, device=query.device)
    sequence = torch.arange(len(lengths), device=query.device).repeat_interleave(lengths)

    def is_visible(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return (row >= column) & (sequence[row] == sequence[column])

    block_mask = create_block_mask(is_visible, None, None, case.num_queries, case.num_keys, str(query.device))
    call = _compiled(query, key, value, inputs.key_bias, block_mask, case.has_groups)
    return lambda: call()[0].transpose(0, 1)


def _compiled(
    query: Tensor, key: Tensor, value: Tensor, key_bias: Tensor, block_mask: object, has_groups: bool
) -> Call:
    def add_bias(score: Tensor, batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return score + key_bias[column]

    # Without this, the shapes of earlier cases count towards the limit of recompilations.
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    return lambda: compiled(query, key, value, score_mod=add_bias, block_mask=block_mask, enable_gqa=has_groups)
