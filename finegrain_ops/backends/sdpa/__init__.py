"""Per-key bias through PyTorch's own scaled dot product attention, unmodified and without an Nq x Nk mask.

Two ways carry the bias; both cost memory linear in Nq + Nk.

mask row     CPU flash attention reads a mask with strides, so the bias goes in as one row (B, 1 or H, 1, Nk) that all
             queries share, also under a causal mask. Exact for -inf. It cannot differ between rows.
bias columns softmax(scale * [q, g] . [k, b / scale]) = softmax(scale * q.k + g * b): the head dimension grows by a few
             columns and the kernel stays unbiased (FlashBias, NeurIPS 2025). It carries a row gate and runs on every
             device. In half precision b / scale is split over three columns, so that it keeps at least 24 bits.

operands.py puts the bias in, engines.py holds the two ways to call SDPA, pieces.py cuts a bottom-right causal mask into
what SDPA knows. This file joins them. Packed sequences run through the same forward and backward (../unpacking.py); an
attention map cannot, since SDPA returns no probabilities.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .. import unpacking
from ..interface import (
    AttentionCall,
    AttentionFeatures,
    AttentionGradients,
    MapCall,
    MapGradients,
    PackedCall,
    clamp_bias,
)
from . import engines
from .operands import Operands, make_operands
from .pieces import empty_rows, merge, split

_NO_MAPS = "PyTorch's SDPA returns no probabilities, so it has no attention map"


def unavailable_reasons() -> list[str]:
    return []


def not_supported_reasons(features: AttentionFeatures) -> list[str]:
    reasons = []
    if features.operator == "attention_map":
        reasons.append(_NO_MAPS)
    if features.dtype == torch.float64 and features.device_type != "cpu":
        reasons.append(f"float64 runs on cpu only, query is on {features.device_type}; use float32")
    return reasons


def forward(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    call, engine = _with_clamped_bias(call), engines.choose(call.query.device)
    if not _heads_fold(call):
        return _forward(call, engine)
    output, lse = _forward(_with_heads_as_rows(call), engine)
    shape = call.query.shape[:3]
    return output.reshape(*shape, output.shape[-1]), None if lse is None else lse.reshape(shape)


def _with_clamped_bias(call: AttentionCall) -> AttentionCall:
    return call if call.key_bias is None else replace(call, key_bias=clamp_bias(call.key_bias))


def _heads_fold(call: AttentionCall) -> bool:
    """Whether the heads of a KV group can be rows of one head, which spares a copy of key and value per head of query:
    a decode with grouped queries reads its cache once.
    """
    grouped = call.query.shape[1] > call.key.shape[1]
    one_bias = call.key_bias is None or call.key_bias.shape[1] == 1
    return grouped and one_bias and (call.query.shape[2] == 1 or not call.is_causal)


def _with_heads_as_rows(call: AttentionCall) -> AttentionCall:
    """query (B, H, Nq, D) -> (B, Hkv, H / Hkv * Nq, D)."""
    group, rows = call.query.shape[1] // call.key.shape[1], call.query.shape[2]
    return replace(
        call,
        query=call.query.reshape(call.query.shape[0], -1, group * rows, call.query.shape[-1]),
        row_gate=None if call.row_gate is None else call.row_gate.repeat(1, group),
        is_causal=False,  # a single row sees every key
    )


def backward(
    call: AttentionCall,
    output: Tensor,
    lse: Tensor,
    grad_output: Tensor,
    grad_lse: Tensor | None,
    bias_needs_grad: bool,
) -> AttentionGradients:
    call, engine = _with_clamped_bias(call), engines.choose(call.query.device)
    if engine.backward is None:
        return _recomputed_backward(call, engine, grad_output, grad_lse, bias_needs_grad)
    return _kernel_backward(call, engine, output, lse, grad_output, grad_lse, bias_needs_grad)


def packed_forward(call: PackedCall) -> tuple[Tensor, Tensor | None]:
    return unpacking.forward(call, forward)


def packed_backward(
    call: PackedCall,
    output: Tensor,
    lse: Tensor,
    grad_output: Tensor,
    grad_lse: Tensor | None,
    bias_needs_grad: bool,
) -> AttentionGradients:
    return unpacking.backward(call, output, lse, grad_output, grad_lse, bias_needs_grad, backward)


def map_forward(call: MapCall) -> tuple[Tensor, Tensor]:
    raise NotImplementedError(_NO_MAPS)


def map_backward(call: MapCall, lse: Tensor, grad_map: Tensor, bias_needs_grad: bool) -> MapGradients:
    raise NotImplementedError(_NO_MAPS)


def _forward(call: AttentionCall, engine: engines.Engine) -> tuple[Tensor, Tensor | None]:
    operands = make_operands(call, carries_mask_row=engine.carries_mask_row)
    pieces = split(call.query.shape[2], call.key.shape[2], call.is_causal)
    needs_lse = call.return_lse or len(pieces) > 1
    # A kernel that sees -inf in its mask row gives 0 for a row without keys; but not the lse, and not with columns.
    kernel_zeroes_empty_rows = engine.carries_mask_row and call.row_gate is None and not needs_lse
    results = []
    for piece in pieces:
        output, lse = engine.forward(
            piece.rows_of(operands.query),
            piece.keys_of(operands.key),
            piece.keys_of(operands.value),
            operands.mask_row_of(piece.keys),
            piece.is_causal,
            operands.scale,
            needs_lse,
        )
        if output.shape[-1] > call.value.shape[-1]:
            output = output[..., : call.value.shape[-1]]
        if not kernel_zeroes_empty_rows and (empty := empty_rows(call, piece)) is not None:
            output = output.masked_fill(empty[..., None], 0.0)
            lse = None if lse is None else lse.masked_fill(empty, float("-inf"))
        results.append((output, lse))

    output, lse = results[0] if len(results) == 1 else merge(results[0], results[1])
    missing = call.query.shape[2] - output.shape[2]
    if missing:  # bottom-right causal with Nq > Nk: the first rows see no key
        output = torch.nn.functional.pad(output, (0, 0, missing, 0))
        lse = None if lse is None else torch.nn.functional.pad(lse, (missing, 0), value=float("-inf"))
    return output, lse


def _kernel_backward(
    call: AttentionCall,
    engine: engines.Engine,
    output: Tensor,
    lse: Tensor,
    grad_output: Tensor,
    grad_lse: Tensor | None,
    bias_needs_grad: bool,
) -> AttentionGradients:
    """The kernel's own backward on every piece, with the output and the lse of the whole row.

    The kernel computes dS_ij = P_ij * (dO_i . V_j - dO_i . O_i), with P recomputed from lse. Two things are read off
    or put in through columns that exist for this only (operands.py):
    - the gradient of the bias is sum_i g_i dS_ij, which is what the kernel returns for a key column;
    - d lse_i / d S_ij = P_ij, so a value column of ones whose dO is grad_lse adds it to the first dot product, and
    whose
      O is stated as 0 keeps it out of the second.
    """
    operands = make_operands(
        call, carries_mask_row=engine.carries_mask_row, gradient_column=bias_needs_grad or grad_lse is not None
    )
    lse = lse.masked_fill(lse == float("-inf"), float("inf"))  # P = exp(S - inf) = 0 in rows without any key
    output, grad_output = operands.widen(output), operands.widen(grad_output)
    if grad_lse is not None:
        grad_output[..., operands.first_column] = grad_lse

    grad_query = torch.zeros_like(operands.query)
    grad_key, grad_value = torch.zeros_like(operands.key), torch.zeros_like(operands.value)
    assert engine.backward is not None
    for piece in split(call.query.shape[2], call.key.shape[2], call.is_causal):
        d_query, d_key, d_value = engine.backward(
            piece.rows_of(grad_output),
            piece.rows_of(operands.query),
            piece.keys_of(operands.key),
            piece.keys_of(operands.value),
            piece.rows_of(output),
            piece.rows_of(lse),
            operands.mask_row_of(piece.keys),
            piece.is_causal,
            operands.scale,
        )
        grad_query[:, :, piece.rows] += d_query
        grad_key[:, :, piece.keys] += d_key
        grad_value[:, :, piece.keys] += d_value
    return _narrow(call, operands, grad_query, grad_key, grad_value, bias_needs_grad)


def _narrow(
    call: AttentionCall,
    operands: Operands,
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    bias_needs_grad: bool,
) -> AttentionGradients:
    """From the gradients of the operands to those of the call: columns taken off, heads of one KV group summed."""
    grad_bias = None
    if bias_needs_grad:
        assert call.key_bias is not None
        column = grad_key[..., operands.first_column].to(call.compute_dtype) / operands.score_per_key_column
        grad_bias = column.sum_to_size(call.key_bias.shape)

    def sum_groups(gradient: Tensor, like: Tensor) -> Tensor:
        return gradient[..., : like.shape[-1]].unflatten(1, (like.shape[1], -1)).sum(dim=2)

    grad_query = grad_query[..., : call.query.shape[-1]] * operands.query_factor
    return AttentionGradients(grad_query, sum_groups(grad_key, call.key), sum_groups(grad_value, call.value), grad_bias)


def _recomputed_backward(
    call: AttentionCall,
    engine: engines.Engine,
    grad_output: Tensor,
    grad_lse: Tensor | None,
    bias_needs_grad: bool,
) -> AttentionGradients:
    """Runs the forward again under autograd, for devices on which SDPA gives no lse to its caller."""
    tensors = [call.query, call.key, call.value]
    if bias_needs_grad and call.key_bias is not None:
        tensors.append(call.key_bias)
    with torch.enable_grad():
        query, key, value, *bias = leaves = [t.detach().requires_grad_() for t in tensors]
        again = AttentionCall(
            query,
            key,
            value,
            bias[0] if bias else call.key_bias,
            call.key_padding_mask,
            call.row_gate,
            call.is_causal,
            call.scale,
            return_lse=grad_lse is not None,
        )
        output, lse = _forward(again, engine)
        outputs, grads = [output], [grad_output]
        if lse is not None and grad_lse is not None:
            outputs, grads = [output, lse], [grad_output, grad_lse]
        gradients = torch.autograd.grad(outputs, leaves, grads, allow_unused=True, materialize_grads=True)
    return AttentionGradients(gradients[0], gradients[1], gradients[2], gradients[3] if bias else None)
