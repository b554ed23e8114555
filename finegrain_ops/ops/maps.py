"""`attention_map` on (B, H, N, D) tensors: (B, H, Nk), summed over rows only; the sum over heads is the caller's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..backends.interface import MapCall, new_output_like
from .library import LIBRARY, TAGS, laid_out_as, new_bias_gradient, new_scores, outside_autocast, returned_bias_gradient

# lse comes out only where it did not go in: an operator must not return its input.
LIBRARY.define(
    "attention_map(Tensor query, Tensor key, Tensor? key_bias, Tensor? key_padding_mask, Tensor? row_gate, "
    "Tensor? rows, Tensor? heads, Tensor? lse, bool is_causal, float scale, bool needs_grad, str backend) "
    "-> (Tensor attention_map, Tensor new_lse)",
    tags=TAGS,
)
LIBRARY.define(
    "attention_map_backward(Tensor grad_map, Tensor query, Tensor key, Tensor? key_bias, Tensor? key_padding_mask, "
    "Tensor? row_gate, Tensor? rows, Tensor? heads, Tensor lse, bool is_causal, float scale, bool bias_needs_grad, "
    "str backend) -> (Tensor grad_query, Tensor grad_key, Tensor grad_key_bias)",
    tags=TAGS,
)

attention_map = torch.ops.finegrain_ops.attention_map.default
attention_map_backward = torch.ops.finegrain_ops.attention_map_backward.default


def _new_map(query: Tensor, key: Tensor) -> Tensor:
    return new_scores(query, (*query.shape[:2], key.shape[2]))


def _new_lse(query: Tensor, wanted: bool) -> Tensor:
    return new_scores(query, query.shape[:3] if wanted else (0,))


@torch.library.register_fake("finegrain_ops::attention_map", lib=LIBRARY)
def _fake(
    query: Tensor,
    key: Tensor,
    key_bias: Tensor | None,
    key_padding_mask: Tensor | None,
    row_gate: Tensor | None,
    rows: Tensor | None,
    heads: Tensor | None,
    lse: Tensor | None,
    is_causal: bool,
    scale: float,
    needs_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return _new_map(query, key), _new_lse(query, needs_grad and lse is None)


def _forward(
    query: Tensor,
    key: Tensor,
    key_bias: Tensor | None,
    key_padding_mask: Tensor | None,
    row_gate: Tensor | None,
    rows: Tensor | None,
    heads: Tensor | None,
    lse: Tensor | None,
    is_causal: bool,
    scale: float,
    needs_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    call = MapCall(query, key, key_bias, key_padding_mask, row_gate, rows, heads, lse, is_causal, scale)
    chosen = backends.load(backends.select(backend, call.features(needs_grad)))
    lse_wanted = needs_grad and lse is None
    if query.numel() == 0 or key.numel() == 0:
        return _new_map(query, key).zero_(), _new_lse(query, lse_wanted).fill_(float("-inf"))
    attention_map, new_lse = chosen.map_forward(call)
    return attention_map.contiguous(), new_lse.contiguous() if lse_wanted else _new_lse(query, False)


@torch.library.register_fake("finegrain_ops::attention_map_backward", lib=LIBRARY)
def _backward_fake(
    grad_map: Tensor,
    query: Tensor,
    key: Tensor,
    key_bias: Tensor | None,
    key_padding_mask: Tensor | None,
    row_gate: Tensor | None,
    rows: Tensor | None,
    heads: Tensor | None,
    lse: Tensor,
    is_causal: bool,
    scale: float,
    bias_needs_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_query, grad_key = (new_output_like(t) for t in (query, key))
    return grad_query, grad_key, new_bias_gradient(query, key_bias, bias_needs_grad)


def _backward(
    grad_map: Tensor,
    query: Tensor,
    key: Tensor,
    key_bias: Tensor | None,
    key_padding_mask: Tensor | None,
    row_gate: Tensor | None,
    rows: Tensor | None,
    heads: Tensor | None,
    lse: Tensor,
    is_causal: bool,
    scale: float,
    bias_needs_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    call = MapCall(query, key, key_bias, key_padding_mask, row_gate, rows, heads, lse, is_causal, scale)
    chosen = backends.load(backends.select(backend, call.features(needs_grad=True)))
    if query.numel() == 0 or key.numel() == 0:
        grad_query, grad_key = (new_output_like(t).zero_() for t in (query, key))
        return grad_query, grad_key, new_bias_gradient(query, key_bias, bias_needs_grad).zero_()
    gradients = chosen.map_backward(call, lse, grad_map, bias_needs_grad)
    return (
        laid_out_as(gradients.query, query),
        laid_out_as(gradients.key, key),
        returned_bias_gradient(query, gradients.key_bias),
    )


LIBRARY.impl("attention_map", outside_autocast(_forward), "CompositeExplicitAutograd")
LIBRARY.impl("attention_map_backward", outside_autocast(_backward), "CompositeExplicitAutograd")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, lse, ctx.is_causal, ctx.scale, _needs_grad, ctx.backend = inputs
    ctx.save_for_backward(*tensors, output[1] if lse is None else lse)
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, grad_map: Tensor | None, _grad_new_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    """lse is an intermediate of the map, which the backward accounts for: it neither receives nor sends a gradient."""
    if grad_map is None:
        return (None,) * 12
    bias_needs_grad = bool(ctx.needs_input_grad[2])
    gradients = attention_map_backward(
        grad_map, *ctx.saved_tensors, ctx.is_causal, ctx.scale, bias_needs_grad, ctx.backend
    )
    return (*gradients[:2], gradients[2] if bias_needs_grad else None, *(None,) * 9)


torch.library.register_autograd("finegrain_ops::attention_map", _autograd, setup_context=_setup_context, lib=LIBRARY)
