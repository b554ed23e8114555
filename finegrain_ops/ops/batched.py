"""`reweighted_attention` on (B, H, N, D) tensors. Results lie in memory as the inputs that they are like."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..backends.interface import AttentionCall, new_output, new_output_like
from .library import (
    LIBRARY,
    TAGS,
    laid_out_as,
    new_bias_gradient,
    new_scores,
    nothing_intercepts,
    outside_autocast,
    returned_bias_gradient,
)

LIBRARY.define(
    "reweighted_attention(Tensor query, Tensor key, Tensor value, Tensor? key_bias, Tensor? key_padding_mask, "
    "Tensor? row_gate, bool is_causal, float scale, bool return_lse, bool needs_grad, str backend) "
    "-> (Tensor output, Tensor lse)",
    tags=TAGS,
)
LIBRARY.define(
    "reweighted_attention_backward(Tensor grad_output, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, "
    "Tensor? key_bias, Tensor? key_padding_mask, Tensor? row_gate, Tensor output, Tensor lse, bool is_causal, "
    "float scale, bool bias_needs_grad, str backend) "
    "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_key_bias)",
    tags=TAGS,
)

_reweighted_attention = torch.ops.finegrain_ops.reweighted_attention.default
reweighted_attention_backward = torch.ops.finegrain_ops.reweighted_attention_backward.default


def _new_lse(query: Tensor, return_lse: bool) -> Tensor:
    return new_scores(query, query.shape[:3] if return_lse else (0,))


@torch.library.register_fake("finegrain_ops::reweighted_attention", lib=LIBRARY)
def _fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_bias: Tensor | None,
    key_padding_mask: Tensor | None,
    row_gate: Tensor | None,
    is_causal: bool,
    scale: float,
    return_lse: bool,
    needs_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return new_output(query, query.shape[2], value.shape[3]), _new_lse(query, return_lse)


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_bias: Tensor | None,
    key_padding_mask: Tensor | None,
    row_gate: Tensor | None,
    is_causal: bool,
    scale: float,
    return_lse: bool,
    needs_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    call = AttentionCall(query, key, value, key_bias, key_padding_mask, row_gate, is_causal, scale, return_lse)
    chosen = backends.load(backends.select(backend, call.features(needs_grad)))
    if query.numel() == 0 or value.numel() == 0:
        output = new_output(query, query.shape[2], value.shape[3]).zero_()
        return output, _new_lse(query, return_lse).fill_(float("-inf"))
    output, lse = chosen.forward(call)
    # A backend may return an lse that nobody wants.
    lse = _new_lse(query, False) if lse is None or not return_lse else lse.contiguous()
    return laid_out_as(output, query), lse


@torch.library.register_fake("finegrain_ops::reweighted_attention_backward", lib=LIBRARY)
def _backward_fake(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_bias: Tensor | None,
    key_padding_mask: Tensor | None,
    row_gate: Tensor | None,
    output: Tensor,
    lse: Tensor,
    is_causal: bool,
    scale: float,
    bias_needs_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grads = [new_output_like(t) for t in (query, key, value)]
    return grads[0], grads[1], grads[2], new_bias_gradient(query, key_bias, bias_needs_grad)


def _backward(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_bias: Tensor | None,
    key_padding_mask: Tensor | None,
    row_gate: Tensor | None,
    output: Tensor,
    lse: Tensor,
    is_causal: bool,
    scale: float,
    bias_needs_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = AttentionCall(query, key, value, key_bias, key_padding_mask, row_gate, is_causal, scale)
    chosen = backends.load(backends.select(backend, call.features(needs_grad=True)))
    if output.numel() == 0 or key.shape[2] == 0:
        zeros = [new_output_like(t).zero_() for t in (query, key, value)]
        return zeros[0], zeros[1], zeros[2], new_bias_gradient(query, key_bias, bias_needs_grad).zero_()
    gradients = chosen.backward(call, output, lse, grad_output, grad_lse, bias_needs_grad)
    return (
        laid_out_as(gradients.query, query),
        laid_out_as(gradients.key, key),
        laid_out_as(gradients.value, value),
        returned_bias_gradient(query, gradients.key_bias),
    )


_kernel = outside_autocast(_forward)
LIBRARY.impl("reweighted_attention", _kernel, "CompositeExplicitAutograd")
LIBRARY.impl("reweighted_attention_backward", outside_autocast(_backward), "CompositeExplicitAutograd")


def reweighted_attention(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The operator, with all of its arguments in order, or straight its kernel where that makes no difference."""
    query, key, value, *_, needs_grad, _backend = arguments
    attend = _kernel if not needs_grad and nothing_intercepts(query, key, value) else _reweighted_attention
    return attend(*arguments)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, key_bias, key_padding_mask, row_gate, is_causal, scale, return_lse, _needs_grad, backend = inputs
    ctx.save_for_backward(query, key, value, key_bias, key_padding_mask, row_gate, *output)
    ctx.is_causal, ctx.scale, ctx.return_lse, ctx.backend = is_causal, scale, return_lse, backend
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_output is None and grad_lse is None:
        return (None,) * 11
    *tensors, output, lse = ctx.saved_tensors
    grad_output = torch.zeros_like(output) if grad_output is None else grad_output
    bias_needs_grad = bool(ctx.needs_input_grad[3])
    gradients = reweighted_attention_backward(
        grad_output, grad_lse, *tensors, output, lse, ctx.is_causal, ctx.scale, bias_needs_grad, ctx.backend
    )
    grad_bias = gradients[3] if bias_needs_grad else None
    return (*gradients[:3], grad_bias, None, None, None, None, None, None, None)


torch.library.register_autograd(
    "finegrain_ops::reweighted_attention", _autograd, setup_context=_setup_context, lib=LIBRARY
)
