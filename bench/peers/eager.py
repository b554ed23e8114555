"""Attention with the whole matrix of scores, as transformers writes it out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..inputs import CaseInputs
from .interface import Call, Peer, per_sequence
from .sdpa import score_mask

EAGER = "eager"
EAGER_PER_SEQUENCE = "eager, per sequence"


def dense_peers() -> list[Peer]:
    return [Peer(EAGER, _attention)]


def packed_peers() -> list[Peer]:
    return [Peer(EAGER_PER_SEQUENCE, per_sequence(_attention))]


def read_out_peers() -> list[Peer]:
    return [Peer(EAGER, _key_sums, gives_key_sums=True)]


def _attention(inputs: CaseInputs) -> Call:
    """The steps of transformers' `eager_attention_forward` (modeling_llama.py), softmax in float32 included.

    The mask is prepared and wants no gradient, as in sdpa.py.
    """
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


def _key_sums(inputs: CaseInputs) -> Call:
    """The same scores of the rows that are read, and their softmax summed in float32; which rows is prepared."""
    query, key, case, mask = inputs.query, inputs.key, inputs.case, score_mask(inputs)
    if inputs.rows is not None:
        mask = mask if mask.shape[2] == 1 else mask[:, :, inputs.rows]
        query = query[:, :, inputs.rows]
    scale, group = case.head_dim**-0.5, case.heads // case.num_kv_heads

    def call() -> Tensor:
        keys = key if group == 1 else key.repeat_interleave(group, dim=1)
        scores = torch.matmul(query, keys.transpose(2, 3)) * scale
        return F.softmax(scores + mask, dim=-1, dtype=torch.float32).sum(dim=(1, 2))

    return call
