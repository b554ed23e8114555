"""`reweighted_attention_varlen` on packed (T, H, D) tensors. Output and gradients are contiguous."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..backends.interface import PackedCall
from .library import LIBRARY, TAGS, new_bias_gradient, new_scores, outside_autocast, returned_bias_gradient

LIBRARY.define(
    "reweighted_attention_varlen(Tensor query, Tensor key, Tensor value, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
    "SymInt max_seqlen_q, SymInt max_seqlen_k, Tensor? key_bias, Tensor? row_gate, bool is_causal, float scale, "
    "bool return_lse, bool needs_grad, str backend) -> (Tensor output, Tensor lse)",
    tags=TAGS,
)
LIBRARY.define(
    "reweighted_attention_varlen_backward(Tensor grad_output, Tensor? grad_lse, Tensor query, Tensor key, "
    "Tensor value, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, "
    "Tensor? key_bias, Tensor? row_gate, Tensor output, Tensor lse, bool is_causal, float scale, "
    "bool bias_needs_grad, str backend) "
    "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_key_bias)",
    tags=TAGS,
)

reweighted_attention_varlen = torch.ops.finegrain_ops.reweighted_attention_varlen.default
reweighted_attention_varlen_backward = torch.ops.finegrain_ops.reweighted_attention_varlen_backward.default


def _new_output(query: Tensor, value: Tensor) -> Tensor:
    return query.new_empty((*query.shape[:2], value.shape[2]))


def _new_lse(query: Tensor, return_lse: bool) -> Tensor:
    return new_scores(query, (query.shape[1], query.shape[0]) if return_lse else (0,))


def _sees_nothing(call: PackedCall) -> bool:
    """No row, no key or no sequence, as far as the shapes and numbers tell."""
    holds_nothing = call.query.numel() == 0 or call.value.numel() == 0 or call.cu_seqlens_q.numel() == 1
    return holds_nothing or call.max_seqlen_q == 0 or call.max_seqlen_k == 0


@torch.library.register_fake("finegrain_ops::reweighted_attention_varlen", lib=LIBRARY)
def _fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    key_bias: Tensor | None,
    row_gate: Tensor | None,
    is_causal: bool,
    scale: float,
    return_lse: bool,
    needs_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return _new_output(query, value), _new_lse(query, return_lse)


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    key_bias: Tensor | None,
    row_gate: Tensor | None,
    is_causal: bool,
    scale: float,
    return_lse: bool,
    needs_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    call = PackedCall(query, key, value, *lengths, key_bias, row_gate, is_causal, scale, return_lse)
    chosen = backends.load(backends.select(backend, call.features(needs_grad)))
    if _sees_nothing(call):
        return _new_output(query, value).zero_(), _new_lse(query, return_lse).fill_(float("-inf"))
    output, lse = chosen.packed_forward(call)
    # A backend may return an lse that nobody wants.
    return output.contiguous(), _new_lse(query, False) if lse is None or not return_lse else lse.contiguous()


@torch.library.register_fake("finegrain_ops::reweighted_attention_varlen_backward", lib=LIBRARY)
def _backward_fake(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    key_bias: Tensor | None,
    row_gate: Tensor | None,
    output: Tensor,
    lse: Tensor,
    is_causal: bool,
    scale: float,
    bias_needs_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gradients = [t.new_empty(t.shape) for t in (query, key, value)]
    return gradients[0], gradients[1], gradients[2], new_bias_gradient(query, key_bias, bias_needs_grad)


def _backward(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    key_bias: Tensor | None,
    row_gate: Tensor | None,
    output: Tensor,
    lse: Tensor,
    is_causal: bool,
    scale: float,
    bias_needs_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    call = PackedCall(query, key, value, *lengths, key_bias, row_gate, is_causal, scale)
    chosen = backends.load(backends.select(backend, call.features(needs_grad=True)))
    if _sees_nothing(call):
        zeros = [t.new_zeros(t.shape) for t in (query, key, value)]
        return zeros[0], zeros[1], zeros[2], new_bias_gradient(query, key_bias, bias_needs_grad).zero_()
    gradients = chosen.packed_backward(call, output, lse, grad_output, grad_lse, bias_needs_grad)
    return (
        gradients.query.to(query.dtype).contiguous(),
        gradients.key.to(key.dtype).contiguous(),
        gradients.value.to(value.dtype).contiguous(),
        returned_bias_gradient(query, gradients.key_bias),
    )


LIBRARY.impl("reweighted_attention_varlen", outside_autocast(_forward), "CompositeExplicitAutograd")
LIBRARY.impl("reweighted_attention_varlen_backward", outside_autocast(_backward), "CompositeExplicitAutograd")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, key_bias, row_gate = inputs[:9]
    ctx.save_for_backward(query, key, value, cu_seqlens_q, cu_seqlens_k, key_bias, row_gate, *output)
    ctx.max_seqlens = max_seqlen_q, max_seqlen_k
    ctx.is_causal, ctx.scale, _return_lse, _needs_grad, ctx.backend = inputs[9:]
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_output is None and grad_lse is None:
        return (None,) * 14
    query, key, value, cu_seqlens_q, cu_seqlens_k, key_bias, row_gate, output, lse = ctx.saved_tensors
    grad_output = torch.zeros_like(output) if grad_output is None else grad_output
    bias_needs_grad = bool(ctx.needs_input_grad[7])
    lengths = (cu_seqlens_q, cu_seqlens_k, *ctx.max_seqlens)
    packed = (query, key, value, *lengths, key_bias, row_gate, output, lse)
    gradients = reweighted_attention_varlen_backward(
        grad_output, grad_lse, *packed, ctx.is_causal, ctx.scale, bias_needs_grad, ctx.backend
    )
    grad_bias = gradients[3] if bias_needs_grad else None
    return (*gradients[:3], None, None, None, None, grad_bias, None, None, None, None, None, None)


torch.library.register_autograd(
    "finegrain_ops::reweighted_attention_varlen", _autograd, setup_context=_setup_context, lib=LIBRARY
)
