"""The tensors of a case."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from .cases import AttentionCase
from .operations import BACKWARD, FORWARD


@dataclass(frozen=True)
class CaseInputs:
    """query (B, H, Nq, D), key and value (B, Hkv, Nk, D), contiguous: no peer has to copy them.

    On a CPU this layout is not the best for finegrain_ops, whose output lies (B, N, H, D) in memory: SDPA's follows the
    query, so here it is copied once, which it is not with a query as attention layers have it.

    For BACKWARD, query, key, value and key_bias want a gradient.
    """

    case: AttentionCase
    query: Tensor
    key: Tensor
    value: Tensor
    region_mask: Tensor  # (Nk,) bool
    key_bias: Tensor  # log(lambda) * M, (Nk,) float32: what the peers are given
    grad_output: Tensor | None = None  # (B, H, Nq, D), for BACKWARD
    rows: Tensor | None = None  # (Nq,) bool, for READ_OUT; None: all

    @property
    def device(self) -> torch.device:
        return self.query.device


@dataclass(frozen=True)
class PackedInputs:
    """query (T, H, D), key and value (T, Hkv, D), contiguous; one sequence after the other."""

    case: AttentionCase
    query: Tensor
    key: Tensor
    value: Tensor
    region_mask: Tensor  # (T,) bool
    key_bias: Tensor  # (T,) float32
    cu_seqlens: Tensor  # (S + 1,) int32

    @property
    def device(self) -> torch.device:
        return self.query.device

    def sequences(self) -> list[CaseInputs]:
        """Each sequence as a call of its own, views of (1, H, L, D)."""
        starts = self.cu_seqlens.tolist()
        return [self._sequence(slice(start, end)) for start, end in pairwise(starts)]

    def _sequence(self, tokens: slice) -> CaseInputs:
        length = tokens.stop - tokens.start
        case = replace(
            self.case,
            operation=FORWARD,
            lengths=None,
            num_queries=length,
            num_keys=length,
            image_grid=(0, 0),
            image_start=0,
        )
        query, key, value = (t[tokens].transpose(0, 1)[None] for t in (self.query, self.key, self.value))
        return CaseInputs(case, query, key, value, self.region_mask[tokens], self.key_bias[tokens])


def make_inputs(case: AttentionCase, device: torch.device) -> CaseInputs | PackedInputs:
    generator = torch.Generator(device=device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.float32).to(case.dtype)

    if case.lengths is not None:
        query = normal(case.num_queries, case.heads, case.head_dim)
        key, value = (normal(case.num_keys, case.num_kv_heads, case.head_dim) for _ in range(2))
        region = packed_region_mask(case.lengths).to(device)
        starts = torch.tensor([0, *case.lengths], device=device).cumsum(dim=0).int()
        return PackedInputs(case, query, key, value, region, math.log(case.weight) * region.float(), starts)

    query = normal(case.batch, case.heads, case.num_queries, case.head_dim)
    key, value = (normal(case.batch, case.num_kv_heads, case.num_keys, case.head_dim) for _ in range(2))
    region = region_mask(case).to(device)
    inputs = CaseInputs(case, query, key, value, region, math.log(case.weight) * region.float())
    if case.operation == BACKWARD:
        for leaf in (inputs.query, inputs.key, inputs.value, inputs.key_bias):
            leaf.requires_grad_()
        return replace(inputs, grad_output=normal(*query.shape))
    if case.read_rows is not None:
        return replace(inputs, rows=torch.arange(case.num_queries, device=device) >= case.num_queries - case.read_rows)
    return inputs


def region_mask(case: AttentionCase) -> Tensor:
    """(Nk,) bool, True for the tokens of a box in the middle of the image, about region_share of all keys.

    As a box in an image is: row by row of the grid a run of neighbouring keys, with gaps between the runs.
    """
    rows, columns = case.image_grid
    area = case.region_share * case.num_keys
    box_rows = min(rows, round(rows * math.sqrt(area / (rows * columns))))
    box_columns = min(columns, round(area / box_rows))
    top, left = (rows - box_rows) // 2, (columns - box_columns) // 2
    image = torch.zeros(rows, columns, dtype=torch.bool)
    image[top : top + box_rows, left : left + box_columns] = True
    mask = torch.zeros(case.num_keys, dtype=torch.bool)
    mask[case.image_start : case.image_start + rows * columns] = image.flatten()
    return mask


def packed_region_mask(lengths: tuple[int, ...]) -> Tensor:
    """(T,) bool: in the middle half of each sequence, runs of 5 keys in every 16, 16 % of all."""
    masks = []
    for length in lengths:
        token = torch.arange(length)
        masks.append((token >= length // 4) & (token < length - length // 4) & (token % 16 < 5))
    return torch.cat(masks)
