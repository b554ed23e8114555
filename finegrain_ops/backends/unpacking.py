"""Packed sequences through a backend's own batched attention, for backends without a kernel for them.

by sequence   one sequence at a time, as views: nothing is padded or copied. It has to read cu_seqlens, which costs
              nothing on a CPU.
padded        one call on (num_seqs, H, max_seqlen, D), for devices that would have to stop before cu_seqlens can be
              read. Every sequence fills the *end* of its row, so that one bottom-right causal mask fits all of them:

                  two sequences of 2 and 3 rows, max_seqlen 4        . . a b        j' <= i' + max_k - max_q
                                                                     . c d e        <=>  j <= i + len_k - len_q
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .interface import AttentionCall, AttentionGradients, PackedCall

BatchedForward = Callable[[AttentionCall], tuple[Tensor, Tensor | None]]
BatchedBackward = Callable[[AttentionCall, Tensor, Tensor, Tensor, Tensor | None, bool], AttentionGradients]


def forward(call: PackedCall, batched: BatchedForward) -> tuple[Tensor, Tensor | None]:
    """`Backend.packed_forward` in terms of `Backend.forward`."""
    run = forward_by_sequence if call.query.device.type == "cpu" else forward_padded
    return run(call, batched)


def backward(
    call: PackedCall,
    output: Tensor,
    lse: Tensor,
    grad_output: Tensor,
    grad_lse: Tensor | None,
    bias_needs_grad: bool,
    batched: BatchedBackward,
) -> AttentionGradients:
    """`Backend.packed_backward` in terms of `Backend.backward`."""
    run = backward_by_sequence if call.query.device.type == "cpu" else backward_padded
    return run(call, output, lse, grad_output, grad_lse, bias_needs_grad, batched)


def sequence_of(cu_seqlens: Tensor, total: int) -> Tensor:
    """Which sequence each of `total` rows belongs to, (total,) int64; num_seqs for rows after the last. No
    synchronisation.
    """
    rows = torch.arange(total, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:], rows, right=True)


# --- by sequence -------------------------------------------------------------------------------------------------


def _sequences(call: PackedCall) -> Iterator[tuple[slice, slice, AttentionCall]]:
    """(rows, keys, call) of every sequence that has both."""
    row_bounds, key_bounds = call.cu_seqlens_q.tolist(), call.cu_seqlens_k.tolist()
    for sequence in range(len(row_bounds) - 1):
        rows = slice(row_bounds[sequence], row_bounds[sequence + 1])
        keys = slice(key_bounds[sequence], key_bounds[sequence + 1])
        if rows.start >= rows.stop or keys.start >= keys.stop:
            continue
        key_bias = None if call.key_bias is None else call.key_bias[None, :, keys]
        row_gate = None if call.row_gate is None else call.row_gate[None, rows]
        query, key, value = (_heads_first(t) for t in (call.query[rows], call.key[keys], call.value[keys]))
        options = (call.is_causal, call.scale, call.return_lse)
        yield rows, keys, AttentionCall(query, key, value, key_bias, None, row_gate, *options)


def _heads_first(packed: Tensor) -> Tensor:
    """(N, H, D) -> (1, H, N, D)"""
    return packed.transpose(0, 1)[None]


def _rows_first(batched: Tensor) -> Tensor:
    """(1, H, N, D) -> (N, H, D)"""
    return batched[0].transpose(0, 1)


def forward_by_sequence(call: PackedCall, batched: BatchedForward) -> tuple[Tensor, Tensor | None]:
    output, lse = call.new_results()
    for rows, _, sequence in _sequences(call):
        sequence_output, sequence_lse = batched(sequence)
        output[rows] = _rows_first(sequence_output)
        if lse is not None:
            assert sequence_lse is not None
            lse[:, rows] = sequence_lse[0]
    return output, lse


def backward_by_sequence(
    call: PackedCall,
    output: Tensor,
    lse: Tensor,
    grad_output: Tensor,
    grad_lse: Tensor | None,
    bias_needs_grad: bool,
    batched: BatchedBackward,
) -> AttentionGradients:
    grad_query, grad_key, grad_value = call.new_gradients()
    grad_bias = call.key_bias.new_zeros(call.key_bias.shape) if bias_needs_grad and call.key_bias is not None else None
    for rows, keys, sequence in _sequences(call):
        gradients = batched(
            sequence,
            _heads_first(output[rows]),
            lse[None, :, rows],
            _heads_first(grad_output[rows]),
            None if grad_lse is None else grad_lse[None, :, rows],
            bias_needs_grad,
        )
        grad_query[rows] = _rows_first(gradients.query)
        grad_key[keys] = _rows_first(gradients.key)
        grad_value[keys] = _rows_first(gradients.value)
        if grad_bias is not None and gradients.key_bias is not None:
            grad_bias[:, keys] = gradients.key_bias[0]
    return AttentionGradients(grad_query, grad_key, grad_value, grad_bias)


# --- padded ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Padding:
    """Where packed rows lie among num_seqs x max_seqlen slots, every sequence at the end of its max_seqlen.

    Every index is inside its tensor whatever cu_seqlens holds: nobody has looked at it.
    """

    row_of_slot: Tensor  # (num_seqs, max_seqlen) int64
    is_filled: Tensor  # (num_seqs, max_seqlen) bool: the slot holds a row
    slot_of_row: Tensor  # (total,) int64, into the flattened slots
    has_slot: Tensor  # (total,) bool: the row is in a sequence, and not beyond max_seqlen

    def pad(self, packed: Tensor, fill: float = 0.0) -> Tensor:
        """(total, H, ...) -> (num_seqs, H, max_seqlen, ...), `fill` in the other slots."""
        empty = ~self.is_filled.reshape(*self.is_filled.shape, *(1,) * (packed.dim() - 1))
        return packed[self.row_of_slot].masked_fill(empty, fill).transpose(1, 2)

    def unpad(self, padded: Tensor, fill: float = 0.0) -> Tensor:
        """(num_seqs, H, max_seqlen, ...) -> (total, H, ...), `fill` in rows without a slot."""
        packed = padded.transpose(1, 2).flatten(0, 1)[self.slot_of_row]
        return packed.masked_fill(~self.has_slot.reshape(-1, *(1,) * (packed.dim() - 1)), fill)


def _padding(cu_seqlens: Tensor, total: int, max_seqlen: int) -> _Padding:
    num_seqs = cu_seqlens.shape[0] - 1
    starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    slots = torch.arange(max_seqlen, device=cu_seqlens.device)
    row_of_slot = slots + (ends - max_seqlen)[:, None]
    is_filled = (row_of_slot >= starts[:, None]) & (row_of_slot >= 0) & (row_of_slot < total)

    rows = torch.arange(total, device=cu_seqlens.device)
    sequence = sequence_of(cu_seqlens, total)
    in_sequence = sequence < num_seqs
    sequence = sequence.clamp(max=num_seqs - 1)
    slot = rows - ends[sequence] + max_seqlen
    has_slot = in_sequence & (rows >= starts[sequence]) & (slot >= 0) & (slot < max_seqlen)
    slot_of_row = (sequence * max_seqlen + slot).clamp(0, num_seqs * max_seqlen - 1)
    return _Padding(row_of_slot.clamp(0, total - 1), is_filled, slot_of_row, has_slot)


def _pad(call: PackedCall) -> tuple[_Padding, _Padding, AttentionCall]:
    """The slots of the rows, those of the keys, and the call on both."""
    rows = _padding(call.cu_seqlens_q, call.query.shape[0], min(call.max_seqlen_q, call.query.shape[0]))
    keys = _padding(call.cu_seqlens_k, call.key.shape[0], min(call.max_seqlen_k, call.key.shape[0]))
    padded = AttentionCall(
        rows.pad(call.query),
        keys.pad(call.key),
        keys.pad(call.value),
        None if call.key_bias is None else keys.pad(call.key_bias.T),
        keys.is_filled,
        None if call.row_gate is None else call.row_gate[rows.row_of_slot],
        call.is_causal,
        call.scale,
        call.return_lse,
    )
    return rows, keys, padded


def forward_padded(call: PackedCall, batched: BatchedForward) -> tuple[Tensor, Tensor | None]:
    rows, _, padded = _pad(call)
    output, lse = batched(padded)
    return rows.unpad(output), None if lse is None else rows.unpad(lse, float("-inf")).T


def backward_padded(
    call: PackedCall,
    output: Tensor,
    lse: Tensor,
    grad_output: Tensor,
    grad_lse: Tensor | None,
    bias_needs_grad: bool,
    batched: BatchedBackward,
) -> AttentionGradients:
    """Slots without a row have grad_output and grad_lse of 0, so nothing comes from them."""
    rows, keys, padded = _pad(call)
    gradients = batched(
        padded,
        rows.pad(output),
        rows.pad(lse.T, float("-inf")),
        rows.pad(grad_output),
        None if grad_lse is None else rows.pad(grad_lse.T),
        bias_needs_grad,
    )
    return AttentionGradients(
        rows.unpad(gradients.query),
        keys.unpad(gradients.key),
        keys.unpad(gradients.value),
        None if gradients.key_bias is None else keys.unpad(gradients.key_bias).T,
    )
