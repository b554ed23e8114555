"""What a patched attention layer calls in place of its attention function: transformers' AttentionInterface.

The layer's own q, k, v projections, rotary embedding and cache stay untouched. Without a key_bias the call goes on to
the function that the model's configuration names, with the mask that it made for it, so nothing changes. With one it
goes to `reweighted_attention`.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .. import ops
from ..arguments import any_requires_grad, autocast
from ..errors import UnsupportedInputError, UnsupportedModelError

NAME = "finegrain_ops"
LAYER = "finegrain_layer"  # attribute of a patched layer: its place among them

# Keyword arguments of attention functions that change what is computed and that the operator does not know.
_REFUSED = ("sliding_window", "softcap", "position_bias", "s_aux", "head_mask", "cache", "block_table")


def interface_config(config: PretrainedConfig) -> PretrainedConfig:
    """A copy of `config` for attention layers to hold, which makes them call `attention` below.

    Only the layers hold it. The model keeps its own configuration, so that masks, caches and everything else that
    transformers decides from it are made as before.
    """
    interface = copy.copy(config)
    interface._attn_implementation = NAME
    interface.finegrain_original = config
    return interface


def original_attention(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The function that `module` would call if it were not patched."""
    original = getattr(module.config, "finegrain_original", None)
    if original is None:
        raise UnsupportedModelError(
            f'attn_implementation="{NAME}" cannot be set by hand; call finegrain_ops.patch(model, processor) instead'
        )
    implementation = original._attn_implementation
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return eager if implementation in (None, "eager") else ALL_ATTENTION_FUNCTIONS[implementation]


@dataclass(frozen=True)
class AttentionCall:
    """One call of a patched attention layer, as an attention_reader sees it: what `attention_map` needs."""

    layer: int  # its place among the patched layers
    query: Tensor  # (B, H, Q, D)
    key: Tensor  # (B, Hkv, K, D), the cache in it
    key_bias: Tensor  # (B, K) or (B, H, K)
    key_padding_mask: Tensor | None  # (B, K); None: padding is -inf in key_bias
    row_gate: Tensor | None  # (B, Q)
    is_causal: bool
    scale: float


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    key_bias: Tensor | None = None,
    row_gate: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    attention_reader: Callable[[AttentionCall], None] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """query (B, H, Q, D), key and value (B, Hkv, K, D) with the cache in them -> (B, Q, H, D), None.

    key_bias is what the model's replaced forward made for this pass: (B, K'), (B, H, K') or (B, L, 1 or H, K') float32
    over all keys so far. Padding and unfilled slots of the cache are at -inf in it, or False in key_padding_mask. A
    static cache has K > K' slots, of which the first K' are filled.
    """
    original = original_attention(module)
    if key_bias is None:
        if attention_reader is not None:
            raise UnsupportedInputError(
                "attention_reader needs a key_bias, which may be 0: only with one is padding known"
            )
        if is_causal is not None:
            kwargs["is_causal"] = is_causal
        return original(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)

    refuse_what_the_operator_cannot(dropout, kwargs)
    num_keys = key_bias.shape[-1]
    call = AttentionCall(
        layer=getattr(module, LAYER),
        query=query,
        key=key[:, :, :num_keys],
        key_bias=bias_of_layer(key_bias, getattr(module, LAYER)).to(query.device),
        key_padding_mask=None if key_padding_mask is None else key_padding_mask.to(query.device),
        row_gate=None if row_gate is None else row_gate.to(query.device),
        is_causal=getattr(module, "is_causal", True) if is_causal is None else is_causal,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
    )
    if attention_reader is not None:
        attention_reader(call)
    return attend(call, value[:, :, :num_keys]).transpose(1, 2).contiguous(), None


def attend(call: AttentionCall, value: Tensor) -> Tensor:
    """(B, H, Q, D): `reweighted_attention` without its checks, which cost a decode step more than its arithmetic. What
    comes from the caller was checked once for all layers (decoder.py), the rest is the layer's own.
    """
    query, key, value = autocast(call.query, call.key, value)
    bias = call.key_bias[:, None] if call.key_bias.dim() == 2 else call.key_bias
    if query.dtype == torch.float64:  # what the operator wants beside it
        bias = bias.double()
    needs_grad = any_requires_grad(query, key, value, bias)
    output, _ = ops.reweighted_attention(
        query,
        key,
        value,
        bias,
        call.key_padding_mask,
        call.row_gate,
        call.is_causal,
        call.scale,
        needs_grad,
        needs_grad,
        "auto",
    )
    return output


def bias_of_layer(key_bias: Tensor, layer: int) -> Tensor:
    """(B, K) or (B, H, K) of (B, K), (B, H, K) or (B, L, 1 or H, K), where L = 1 stands for every layer."""
    if key_bias.dim() == 4:
        key_bias = key_bias[:, layer if key_bias.shape[1] > 1 else 0]
    return key_bias[:, 0] if key_bias.dim() == 3 and key_bias.shape[1] == 1 else key_bias


def refuse_what_the_operator_cannot(dropout: float, kwargs: dict[str, Any]) -> None:
    if dropout:
        raise UnsupportedInputError(
            f"key_bias cannot be combined with attention dropout (here {dropout}); "
            "set attention_dropout=0 in the model's text configuration, or call model.eval()"
        )
    for name in _REFUSED:
        if kwargs.get(name) is not None:
            raise UnsupportedInputError(
                f"key_bias cannot be combined with an attention layer that uses {name} (here {kwargs[name]!r}); "
                "run this model without key_bias"
            )
    if kwargs.get("output_attentions"):
        raise UnsupportedInputError(
            "key_bias cannot be combined with output_attentions=True: no attention matrix is made"
        )


# Layers look their function up by name. No mask function is registered: only layers hold the name, and masks are made
# from the model's own configuration.
AttentionInterface.register(NAME, attention)
