"""No time is taken of a call whose result is wrong: every peer is first compared with a float64 reference.

The reference is the equation, a few rows at a time, since a whole Nq x Nk matrix in float64 fits no device. Of more
than MOST_ROWS rows it computes only so many, spread over all of them, and only these are compared. Gradients of key,
value and bias are sums over rows: there the gradient of the output is zero in all other rows while peers are checked
(and random everywhere while they are timed). Read-outs are compared over every row that they read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .cases import AttentionCase
from .inputs import CaseInputs, PackedInputs
from .operations import BACKWARD, READ_OUT
from .peers import Call, Gradients, Peer

MOST_ROWS = 1024
_LARGEST_CHUNK = 1 << 26  # float64 scores in memory at a time: 512 MiB

# For the worst row, in epsilons of the dtype. Seen: up to 15 in float32 (rounding of long dot products, for all peers
# alike); 0.4 in bfloat16, and 3.2 where the scores are stored in it (eager). A forgotten bias of log 2 on 15 % of the
# keys has an error above 0.3, which is 40 epsilons of bfloat16. Gradients round twice as often.
TOLERANCE_IN_EPSILONS = {torch.float32: 64.0, torch.float16: 8.0, torch.bfloat16: 8.0}
_GRADIENT_FACTOR = 2.0


def tolerance(case: AttentionCase) -> float:
    factor = _GRADIENT_FACTOR if case.operation == BACKWARD else 1.0
    return factor * TOLERANCE_IN_EPSILONS[case.dtype] * torch.finfo(case.dtype).eps


@dataclass(frozen=True)
class Reference:
    """float64; rows are those that were computed. output (..., rows, D), or (rows, H, D) when packed."""

    rows: Tensor
    output: Tensor
    key_sums: Tensor | None = None  # (B, Nk): what each key receives from the rows, over all heads
    gradients: Gradients | None = None  # that of query in the rows only


def reference(inputs: CaseInputs | PackedInputs, is_biased: bool = True) -> Reference:
    with torch.no_grad():
        return _packed(inputs, is_biased) if isinstance(inputs, PackedInputs) else _dense(inputs, is_biased)


def _packed(inputs: PackedInputs, is_biased: bool) -> Reference:
    starts = inputs.cu_seqlens.tolist()
    sequences = [_dense(sequence, is_biased) for sequence in inputs.sequences()]
    return Reference(
        torch.cat([start + sequence.rows for start, sequence in zip(starts, sequences)]),
        torch.cat([sequence.output[0].transpose(0, 1) for sequence in sequences]),
    )


def _dense(inputs: CaseInputs, is_biased: bool) -> Reference:
    case = inputs.case
    group = case.heads // case.num_kv_heads
    scale = case.head_dim**-0.5
    query = inputs.query.unflatten(1, (case.num_kv_heads, group))  # (B, Hkv, G, Nq, D)
    key, value = (t.double()[:, :, None] for t in (inputs.key, inputs.value))  # (B, Hkv, 1, Nk, D)
    keys = torch.arange(case.num_keys, device=query.device)
    rows = checked_rows(inputs)
    grad_output = None if inputs.grad_output is None else inputs.grad_output.unflatten(1, (-1, group))

    outputs, grad_queries = [], []
    key_sums = key.new_zeros(case.batch, case.num_keys)
    grad_key, grad_value, grad_bias = torch.zeros_like(key), torch.zeros_like(value), key.new_zeros(case.num_keys)
    for chunk in rows.split(max(1, _LARGEST_CHUNK // (case.batch * case.heads * case.num_keys))):
        chunk_query = query[..., chunk, :].double()
        scores = scale * (chunk_query @ key.mT)  # (B, Hkv, G, chunk, Nk)
        if is_biased:
            scores += inputs.key_bias.double()
        if case.is_causal:
            scores.masked_fill_(keys > chunk[:, None], float("-inf"))
        probabilities = scores.softmax(dim=-1)
        outputs.append(probabilities @ value)
        key_sums += probabilities.sum(dim=(1, 2, 3))
        if grad_output is None:
            continue
        chunk_grad = grad_output[..., chunk, :].double()
        grad_probabilities = chunk_grad @ value.mT
        grad_scores = probabilities * (grad_probabilities - (chunk_grad * outputs[-1]).sum(dim=-1, keepdim=True))
        grad_queries.append(scale * (grad_scores @ key))
        grad_key += scale * (grad_scores.mT @ chunk_query).sum(dim=2, keepdim=True)
        grad_value += (probabilities.mT @ chunk_grad).sum(dim=2, keepdim=True)
        grad_bias += grad_scores.sum(dim=(0, 1, 2, 3))

    gradients = None
    if grad_queries:
        grad_query = torch.cat(grad_queries, dim=-2).flatten(1, 2)
        gradients = Gradients(grad_query, grad_key[:, :, 0], grad_value[:, :, 0], grad_bias if is_biased else None)
    return Reference(rows, torch.cat(outputs, dim=-2).flatten(1, 2), key_sums, gradients)


def checked_rows(inputs: CaseInputs) -> Tensor:
    """Indices: all rows of a small case, MOST_ROWS from the first to the last otherwise; those of a read-out."""
    device, num_rows = inputs.query.device, inputs.case.num_queries
    if inputs.rows is not None:
        return inputs.rows.nonzero()[:, 0]
    if num_rows <= MOST_ROWS or inputs.case.operation == READ_OUT:
        return torch.arange(num_rows, device=device)
    return torch.linspace(0, num_rows - 1, MOST_ROWS, dtype=torch.float64, device=device).round().long()


def keep_correct(
    calls: dict[str, Call], peers: list[Peer], inputs: CaseInputs | PackedInputs, reasons: dict[str, str]
) -> tuple[dict[str, Call], dict[str, float]]:
    """The calls whose result is right, and their errors; why another is not kept goes to `reasons`.

    One of ours that is wrong fails the test, and then nobody's time is taken.
    """
    found, allowed = errors(calls, peers, inputs), tolerance(inputs.case)
    wrong = {name: error for name, error in found.items() if not error <= allowed}
    ours = [peer.name for peer in peers if peer.is_ours and peer.name in wrong]
    assert not ours, f"wrong by more than {allowed:.1e}, so nothing is timed: {wrong}"
    reasons |= {name: f"its result is wrong by {error:.1e}, above {allowed:.1e}" for name, error in wrong.items()}
    return {name: call for name, call in calls.items() if name not in wrong}, found


def errors(calls: dict[str, Call], peers: list[Peer], inputs: CaseInputs | PackedInputs) -> dict[str, float]:
    """The worst relative error of every call; above `tolerance` it is wrong."""
    called = [peer for peer in peers if peer.name in calls]
    with _gradient_in_checked_rows_only(inputs):
        references = {is_biased: reference(inputs, is_biased) for is_biased in {peer.is_biased for peer in called}}
        return {peer.name: error_of(calls[peer.name](), references[peer.is_biased], peer) for peer in called}


def error_of(result: Any, expected: Reference, peer: Peer) -> float:
    if isinstance(result, Gradients):
        assert expected.gradients is not None
        pairs = [
            (result.query[:, :, expected.rows], expected.gradients.query),
            (result.key, expected.gradients.key),
            (result.value, expected.gradients.value),
        ]
        if result.key_bias is not None and expected.gradients.key_bias is not None:
            pairs.append((result.key_bias[:, None], expected.gradients.key_bias[:, None]))
        return max(typical_row_error(*pair) for pair in pairs)
    if peer.gives_key_sums:
        assert expected.key_sums is not None
        return typical_row_error(result[..., None], expected.key_sums[..., None])
    rows = result[expected.rows] if result.dim() == 3 else result[:, :, expected.rows]
    return worst_row_error(rows, expected.output)


def worst_row_error(output: Tensor, expected: Tensor) -> float:
    """max over rows of |output - expected| / |expected|, so that a single wrong row is seen; NaN counts as infinite."""
    error = (output.double() - expected).norm(dim=-1) / expected.norm(dim=-1)
    return error.nan_to_num(nan=float("inf")).max().item()


def typical_row_error(output: Tensor, expected: Tensor) -> float:
    """The same where a row may be zero: relative to its own or to the typical norm, whichever is larger."""
    norms = expected.norm(dim=-1)
    error = (output.double() - expected).norm(dim=-1) / norms.clamp_min(norms.square().mean().sqrt().item())
    return error.nan_to_num(nan=float("inf")).max().item()


@contextmanager
def _gradient_in_checked_rows_only(inputs: CaseInputs | PackedInputs) -> Iterator[None]:
    if isinstance(inputs, PackedInputs) or inputs.grad_output is None or inputs.case.num_queries <= MOST_ROWS:
        yield
        return
    everywhere = inputs.grad_output.clone()
    rows = checked_rows(inputs)
    inputs.grad_output.zero_()
    inputs.grad_output[:, :, rows] = everywhere[:, :, rows]
    try:
        yield
    finally:
        inputs.grad_output.copy_(everywhere)
