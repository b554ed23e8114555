"""Q-Formers, whose query tokens attend to the keys of a vision encoder: InstructBLIP and BLIP-2.

What `install` changes on the instance, alike in every version of transformers:
- model.forward, generate and get_image_features take `key_bias` and `attention_reader`. They pass their Q-Former no
  keywords, so for it these two wait in a context variable, which no other thread sees, and which the Q-Former empties;
- from there on they are arguments: of the Q-Former, of its encoder and, in the place of encoder_attention_mask, of its
  layers. So gradient checkpointing recomputes with them, and self-attention never gets them;
- every cross-attention that gets them calls `reweighted_attention` with its own q, k and v.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..attention import reweighted_attention
from ..errors import UnsupportedInputError, UnsupportedModelError
from ..validation import describe
from .attention_interface import LAYER, AttentionCall, bias_of_layer, refuse_what_the_operator_cannot
from .changes import Changes, bound_to
from .decoder import check_key_bias, per_key, require_layers_and_heads, with_keywords

Reader = Callable[[AttentionCall], None]


def install(changes: Changes, model: Any) -> Sequence[nn.Module]:
    needed = ("vision_model", "qformer", *_METHODS)
    layers = _cross_attention(model.qformer) if all(hasattr(model, name) for name in needed) else []
    if not layers:
        raise UnsupportedModelError(
            "patch: expected InstructBlipForConditionalGeneration or Blip2ForConditionalGeneration, whose Q-Former "
            f"attends to the image before a language model generates, got {type(model).__name__}"
        )
    for i, layer in enumerate(layers):
        changes.set(layer.attention, LAYER, i)
        changes.replace_method(layer, "forward", _cross_attention_forward)
    changes.replace_method(model.qformer.encoder, "forward", _encoder_forward)
    changes.replace_method(
        model.qformer,
        "forward",
        functools.partial(_qformer_forward, num_layers=len(layers), num_heads=layers[0].attention.num_attention_heads),
    )
    for name in _METHODS:
        changes.replace_method(model, name, _that_takes_key_bias)
    return [layer.attention for layer in layers]


_METHODS = ("forward", "generate", "get_image_features")


def _cross_attention(qformer: Any) -> list[Any]:
    return [layer.crossattention for layer in qformer.encoder.layer if hasattr(layer, "crossattention")]


# --- from the model's methods to its Q-Former --------------------------------------------------------------------


@dataclass
class _HandedOver:
    """What one call of one of the model's methods gives to its Q-Former."""

    qformer: nn.Module
    key_bias: Tensor
    attention_reader: Reader | None
    taken: bool = False


_HANDED_OVER: ContextVar[_HandedOver | None] = ContextVar("finegrain_ops_handed_over", default=None)


def _that_takes_key_bias(original: Callable[..., Any]) -> Callable[..., Any]:
    """forward, generate or get_image_features with `key_bias` in its signature."""

    @functools.wraps(original)
    def method(
        self: Any,
        *args: Any,
        key_bias: Tensor | None = None,
        row_gate: None = None,
        attention_reader: Reader | None = None,
        **kwargs: Any,
    ) -> Any:
        if row_gate is not None:
            raise UnsupportedInputError(
                "row_gate cannot be used with a Q-Former, whose rows are query tokens, not positions of the prompt; "
                "give key_bias alone"
            )
        original_here = bound_to(self, original)
        if key_bias is None:
            _refuse_reader_alone(attention_reader)
            return original_here(*args, **kwargs)
        check_key_bias(key_bias)
        return _call_handing_over(
            functools.partial(original_here, *args, **kwargs), _HandedOver(self.qformer, key_bias, attention_reader)
        )

    method.__signature__ = with_keywords(original, "key_bias")  # type: ignore[attr-defined]
    return method


# torch.compile cannot trace context variables: with key_bias a compiled model runs as if it were not compiled.
@torch.compiler.disable
def _call_handing_over(call: Callable[[], Any], handed_over: _HandedOver) -> Any:
    token = _HANDED_OVER.set(handed_over)
    try:
        output = call()
    finally:
        _HANDED_OVER.reset(token)
    if not handed_over.taken:
        raise UnsupportedInputError(
            "key_bias was not used: the model's Q-Former did not run, or it was wrapped or compiled on its own; "
            "pass pixel_values, not features made before, to a model whose qformer is transformers' own module"
        )
    return output


def _handed_over_to(qformer: nn.Module) -> tuple[Tensor | None, Reader | None]:
    """What the call that this is part of gave it, the first time; then nothing, so that the calls of the model that
    are made inside of it (by a logits processor, say) have no bias but their own.
    """
    handed_over = None if torch.compiler.is_compiling() else _HANDED_OVER.get()
    if handed_over is None or handed_over.taken or handed_over.qformer is not qformer:
        return None, None
    handed_over.taken = True
    return handed_over.key_bias, handed_over.attention_reader


def _refuse_reader_alone(attention_reader: Reader | None) -> None:
    if attention_reader is not None:
        raise UnsupportedInputError("attention_reader needs a key_bias, which may be 0")


# --- inside the Q-Former -----------------------------------------------------------------------------------------


class _BiasedKeys(NamedTuple):
    """In the place of encoder_attention_mask, padding in it."""

    key_bias: Tensor
    attention_reader: Reader | None


def _qformer_forward(original: Callable[..., Any], num_layers: int, num_heads: int) -> Callable[..., Any]:
    """The Q-Former's forward: takes what was handed over, or keywords of its own, and makes one bias of padding too."""
    positional = list(inspect.signature(original).parameters)

    @functools.wraps(original)
    def forward(
        self: Any, *args: Any, key_bias: Tensor | None = None, attention_reader: Reader | None = None, **kwargs: Any
    ) -> Any:
        original_here = bound_to(self, original)
        if key_bias is None:
            _refuse_reader_alone(attention_reader)
            key_bias, attention_reader = _handed_over_to(self)
        if key_bias is None:
            return original_here(*args, **kwargs)
        arguments = kwargs | dict(zip(positional, args))
        keys = arguments.get("encoder_hidden_states")
        check_key_bias(key_bias)
        require_layers_and_heads(key_bias, num_layers, num_heads)
        if any(arguments.get(name, getattr(self.config, name, False)) for name in _OUTPUTS):
            raise UnsupportedInputError(
                "key_bias cannot be combined with output_attentions=True of the Q-Former: no attention matrix is made"
            )
        arguments["key_bias"] = _bias_with_padding(key_bias, keys, arguments.pop("encoder_attention_mask", None))
        return original_here(**arguments, attention_reader=attention_reader)

    return forward


_OUTPUTS = ("output_attentions", "output_cross_attentions")


def _bias_with_padding(key_bias: Tensor, keys: Tensor | None, attention_mask: object) -> Tensor:
    """key_bias in float32, -inf where attention_mask is 0."""
    if keys is None:
        raise ValueError("key_bias: expected encoder_hidden_states beside it, the keys that it is for, got none")
    num_images, num_keys = keys.shape[:2]
    if key_bias.shape[0] != num_images or key_bias.shape[-1] != num_keys:
        raise ValueError(
            f"key_bias: expected (images, keys of the vision encoder) = ({num_images}, {num_keys}), here (B, P), CLS "
            f"first, or with heads or layers between, got shape {tuple(key_bias.shape)}"
        )
    bias = key_bias.to(device=keys.device, dtype=torch.float32)
    if attention_mask is None:
        return bias
    if not isinstance(attention_mask, Tensor) or attention_mask.shape != keys.shape[:2]:
        raise UnsupportedInputError(
            f"key_bias needs a 2-D encoder_attention_mask ({num_images}, {num_keys}), or none, got "
            f"{describe(attention_mask)}"
        )
    return bias.masked_fill(per_key(attention_mask.to(bias.device) == 0, bias), float("-inf"))


def _encoder_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """The first place where encoder_attention_mask is handed on as it is."""

    @functools.wraps(original)
    def forward(
        self: nn.Module,
        *args: Any,
        key_bias: Tensor | None = None,
        attention_reader: Reader | None = None,
        **kwargs: Any,
    ) -> Any:
        if key_bias is not None:
            kwargs["encoder_attention_mask"] = _BiasedKeys(key_bias, attention_reader)
        return bound_to(self, original)(*args, **kwargs)

    return forward


def _cross_attention_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """Of the module that holds both the attention and its output layer: transformers 4.57 leaves a wrapper on the
    attention's own forward once output_attentions was asked for, over which it could not be restored.
    """

    @functools.wraps(original)
    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if isinstance(kwargs.get("encoder_attention_mask"), _BiasedKeys):
            return self.output(_attention(self.attention, hidden_states, *args, **kwargs), hidden_states)
        return bound_to(self, original)(hidden_states, *args, **kwargs)

    return forward


def _attention(
    module: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    encoder_attention_mask: _BiasedKeys,
    attention_mask: object = None,  # of the self-attention
    **kwargs: Any,
) -> Tensor:
    """softmax(q k' / sqrt(D) + key_bias) v with the module's own q, k and v of H heads: (N, Q, H * D)."""
    _refuse_what_this_module_adds(module)
    refuse_what_the_operator_cannot(0.0, kwargs)

    def heads(projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (-1, module.attention_head_size)).transpose(1, 2)

    key_bias, attention_reader = encoder_attention_mask
    num_images = len(encoder_hidden_states)
    call = AttentionCall(
        layer=getattr(module, LAYER),
        query=heads(module.query(hidden_states)).expand(num_images, -1, -1, -1),  # one set of queries may serve all
        key=heads(module.key(encoder_hidden_states)),
        key_bias=bias_of_layer(key_bias, getattr(module, LAYER)).to(hidden_states.device),
        key_padding_mask=None,
        row_gate=None,
        is_causal=False,
        scale=module.attention_head_size**-0.5,
    )
    if attention_reader is not None:
        attention_reader(call)
    value = heads(module.value(encoder_hidden_states))
    output = reweighted_attention(call.query, call.key, value, key_bias=call.key_bias, scale=call.scale)
    return output.transpose(1, 2).flatten(2)


def _refuse_what_this_module_adds(module: Any) -> None:
    """Of what both versions of transformers may do between scores and values."""
    rate = getattr(module, "attention_dropout", None)
    rate = module.dropout.p if rate is None else rate
    if module.training and rate:
        raise UnsupportedInputError(
            f"key_bias cannot be combined with attention dropout (here {rate}); set attention_probs_dropout_prob=0 in "
            "the model's qformer_config, or call model.qformer.eval()"
        )
    positions = getattr(module, "position_embedding_type", "absolute")
    if positions != "absolute":
        raise UnsupportedInputError(
            f"key_bias cannot be combined with a Q-Former of position_embedding_type {positions!r}; "
            'expected "absolute", as in the released checkpoints'
        )
    if getattr(module, "save_attention", False):
        raise UnsupportedInputError(
            "key_bias cannot be combined with save_attention: no attention matrix is made; use handle.attention_map"
        )
