"""The bottom-right causal mask as pieces that SDPA knows, and the merge of what they give.

SDPA's own is_causal is aligned top-left. With Nq < Nk the mask is every row on the first Nk - Nq keys, and a square
causal rest, where both alignments agree:

    Nq = 3, Nk = 5     x x | x . .
                       x x | x x .
                       x x | x x x
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..interface import AttentionCall

EVERYTHING = slice(None)


@dataclass(frozen=True)
class Piece:
    """A part of the score matrix that is either full, or square and causal."""

    rows: slice
    keys: slice
    is_causal: bool

    def rows_of(self, tensor: Tensor) -> Tensor:
        """tensor (B, H, Nq, ...); not even sliced where the piece has all of it, which saves small calls some time."""
        return tensor if self.rows == EVERYTHING else tensor[:, :, self.rows]

    def keys_of(self, tensor: Tensor) -> Tensor:
        return tensor if self.keys == EVERYTHING else tensor[:, :, self.keys]


def split(num_queries: int, num_keys: int, is_causal: bool) -> list[Piece]:
    """At most two pieces whose union is the bottom-right causal mask. Rows in none of them see no key."""
    offset = num_keys - num_queries
    if not is_causal or num_queries == 1:
        return [Piece(EVERYTHING, EVERYTHING, False)]
    if offset == 0:
        return [Piece(EVERYTHING, EVERYTHING, True)]
    if offset < 0:
        return [Piece(slice(-offset, None), EVERYTHING, True)]
    return [Piece(EVERYTHING, slice(None, offset), False), Piece(EVERYTHING, slice(offset, None), True)]


def empty_rows(call: AttentionCall, piece: Piece) -> Tensor | None:
    """Which rows of a piece see no key at all, (B or 1, 1 or H, rows) bool; None when there is no such row."""
    if call.key_padding_mask is None and (call.key_bias is None or _removes_no_key(call.key_bias)):
        return None
    num_rows = call.query[:, :, piece.rows].shape[2]

    def without_key(visible: Tensor) -> Tensor:  # (B, 1 or H, keys) -> (B, 1 or H, rows)
        if piece.is_causal:
            return visible.cumsum(dim=-1) == 0
        return (~visible.any(dim=-1, keepdim=True)).expand(*visible.shape[:2], num_rows)

    unpadded, unbiased = None, None
    if call.key_padding_mask is not None:
        unpadded = call.key_padding_mask[:, None, piece.keys]
    if call.key_bias is not None:
        unbiased = call.key_bias[..., piece.keys] != float("-inf")

    visible = [mask for mask in (unbiased, unpadded) if mask is not None]
    empty = without_key(visible[0] if len(visible) == 1 else visible[0] & visible[1])
    if unbiased is not None and call.row_gate is not None:
        closed = without_key(torch.ones_like(unbiased) if unpadded is None else unpadded)
        empty = torch.where(call.row_gate[:, None, piece.rows], empty, closed)
    if empty.device.type == "cpu" and not empty.any():  # on other devices the question would stop the device
        return None
    return empty


def _removes_no_key(key_bias: Tensor) -> bool:
    """Whether it is cheap to know that no entry is -inf: on a CPU it is, on a device the question would stop it."""
    return key_bias.device.type == "cpu" and bool(key_bias.min() != float("-inf"))


def merge(first: tuple[Tensor, Tensor | None], second: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys, from (output, lse) over each (Nq rows both).

    out = (exp(lse_1) out_1 + exp(lse_2) out_2) / (exp(lse_1) + exp(lse_2)), with a row that sees no key in either at 0.
    """
    (first_output, first_lse), (second_output, second_lse) = first, second
    assert first_lse is not None
    assert second_lse is not None
    maximum = torch.maximum(first_lse, second_lse).detach()
    empty = maximum == float("-inf")
    maximum = maximum.masked_fill(empty, 0.0)
    first_weight, second_weight = torch.exp(first_lse - maximum), torch.exp(second_lse - maximum)
    total = (first_weight + second_weight).masked_fill(empty, 1.0)
    output = first_output * (first_weight / total)[..., None] + second_output * (second_weight / total)[..., None]
    return output.to(first_output.dtype), (maximum + total.log()).masked_fill(empty, float("-inf"))
