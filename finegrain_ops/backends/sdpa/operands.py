"""How the bias gets into the tensors that SDPA is called with: as a mask row, or as columns of query and key.

    column        0 .. D-1      first_column ...                      W-1
    query         q             unit * g  (three times in half precision)  0
    key           k             b / (scale * unit), split                  0
    value         v             1 (only with gradient_column)              0

first_column = max(D, Dv), and W is rounded up to a multiple of 8, which the kernels' alignment wants.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..interface import AttentionCall

# Below this scale the quotient b / scale would overflow, so the scale is multiplied onto the query instead.
_SMALLEST_SCALE = 1e-4


def _positive_scale(scale: float) -> tuple[float, float]:
    """(factor for the query, scale for SDPA): CPU kernels take the maximum before scaling, so they need scale > 0."""
    if abs(scale) < _SMALLEST_SCALE:
        return scale, 1.0
    return (1.0, scale) if scale > 0 else (-1.0, -scale)


# What a query column holds. In float16 it is large, since b / scale must stay below the largest float16, 65504.
_COLUMN_UNIT = {torch.float16: 256.0, torch.bfloat16: 1.0, torch.float32: 1.0, torch.float64: 1.0}

# What stands for infinity in a key column: times scale and unit it must be far below every score, yet finite, since a
# gate of 0 is multiplied with it.
_LARGEST_COLUMN = {torch.float16: 6e4, torch.bfloat16: 1e34, torch.float32: 1e34, torch.float64: 1e34}

# Half precision holds 11 or 8 bits of b; three columns hold at least the 24 of float32.
_NUM_PARTS = {torch.float16: 3, torch.bfloat16: 3, torch.float32: 1, torch.float64: 1}


@dataclass(frozen=True)
class Operands:
    """What SDPA is called with: query (B, H, Nq, W), key and value (B, H, Nk, W), mask_row (B, 1 or H, 1, Nk)."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask_row: Tensor | None
    scale: float
    first_column: int
    score_per_key_column: float  # d score / d (first key column) where the gate is open
    query_factor: float  # what the query was multiplied by

    def mask_row_of(self, keys: slice) -> Tensor | None:
        return None if self.mask_row is None else self.mask_row[..., keys]

    def widen(self, tensor: Tensor) -> Tensor:
        """A new tensor of width W, zero beyond what `tensor` (..., Dv) holds."""
        return F.pad(tensor, (0, self.query.shape[-1] - tensor.shape[-1]))


@dataclass(frozen=True)
class _Column:
    """g_i * b_j as a sum of outer products: gate (B, 1, Nq) or None for 1, parts each (B, 1 or H, Nk)."""

    gate: Tensor | None
    parts: list[Tensor]


def make_operands(call: AttentionCall, *, carries_mask_row: bool, gradient_column: bool = False) -> Operands:
    """`gradient_column`: give key and value a column even where the bias needs none, for the backward."""
    query_factor, scale = _positive_scale(call.scale)
    query = call.query if query_factor == 1.0 else call.query * query_factor
    group = query.shape[1] // call.key.shape[1]
    key, value = (t.repeat_interleave(group, dim=1) if group > 1 else t for t in (call.key, call.value))

    unit = _COLUMN_UNIT[query.dtype]
    mask_row, columns = _mask_row_and_columns(call, scale * unit, carries_mask_row)
    first_column = max(query.shape[-1], value.shape[-1])
    num_columns = sum(len(column.parts) for column in columns) or int(gradient_column)
    width = -(-(first_column + num_columns) // 8) * 8 if num_columns else first_column

    query, key, value = (_unit_stride(t, width) for t in (query, key, value))
    at = first_column
    for column in columns:
        for part in column.parts:
            query[..., at] = unit if column.gate is None else unit * column.gate
            key[..., at] = part
            at += 1
    if gradient_column:
        if not columns:
            query[..., first_column] = unit
        value[..., first_column] = 1.0
    return Operands(query, key, value, mask_row, scale, first_column, scale * unit, query_factor)


def _unit_stride(tensor: Tensor, width: int) -> Tensor:
    """`tensor` padded with zeros to `width`, in memory of its own where it grew; SDPA wants a unit last stride."""
    if tensor.shape[-1] < width:
        return F.pad(tensor, (0, width - tensor.shape[-1]))
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _mask_row_and_columns(
    call: AttentionCall, score_per_key_column: float, carries_mask_row: bool
) -> tuple[Tensor | None, list[_Column]]:
    bias, padding = call.key_bias, call.key_padding_mask
    bias_in_row = carries_mask_row and call.row_gate is None
    columns = []
    if bias is not None and not bias_in_row:
        gate = None if call.row_gate is None else call.row_gate[:, None, :]
        columns.append(_Column(gate, _key_column(bias, score_per_key_column, call.query.dtype)))
    if padding is None:
        return (bias[:, :, None, :] if bias is not None and bias_in_row else None), columns

    if bias is not None and bias_in_row:
        return bias.masked_fill(~padding[:, None, :], float("-inf"))[:, :, None, :], columns
    nothing = torch.zeros(padding[:, None, :].shape, dtype=call.compute_dtype, device=padding.device)
    row = nothing.masked_fill(~padding[:, None, :], float("-inf"))
    if carries_mask_row:
        return row[:, :, None, :], columns
    return None, [*columns, _Column(None, _key_column(row, score_per_key_column, call.query.dtype))]


def _key_column(bias: Tensor, score_per_key_column: float, dtype: torch.dtype) -> list[Tensor]:
    """bias / score_per_key_column as a sum of tensors in `dtype`, the largest first."""
    limit = _LARGEST_COLUMN[dtype]
    rest = (bias / score_per_key_column).clamp(-limit, limit)
    parts = []
    for _ in range(_NUM_PARTS[dtype]):
        parts.append(rest.to(dtype))
        rest = rest - parts[-1]
    return parts
