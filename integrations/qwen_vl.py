"""Qwen-VL and Qwen-VL-Chat (Bai et al., arXiv 2308.12966): `QWenLMHeadModel` of the checkpoints' own code.

An image is the 256 positions between image_start_id (config.visual) and the id after it, whose tokens spell the path
of the image. It is squashed to 448 x 448; position i holds query i of the resampler's 16 x 16, row major. What the
family calls its processor is the tokenizer, whose `from_list_format` writes such prompts.

That code calls no AttentionInterface, and its forwards hand no keywords on. What `install` changes on the instance:
- model.forward takes `key_bias`, `row_gate` and `attention_reader`. With a bias it puts a `BiasedPass` in place of the
  attention_mask, which goes to every layer untouched, gradient checkpointing included: no state outside the call;
- transformer._prepare_decoder_attention_mask lets it through. What that would make is Q x K, and does not fit the keys
  when several tokens come on top of a cache;
- every layer's attn._attn, which gets query, key and value after rotation, cache and scaling by log n, heeds it;
- model.prepare_inputs_for_generation hands key_bias and row_gate on to every step, and no empty cache to the first, as
  that code cannot read one: unpatched, its generate fails on transformers 4.57 unless use_cache=False.

The code does not run on transformers 5.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from ..attention import reweighted_attention
from ..errors import UnsupportedInputError, UnsupportedModelError
from ..families import qwen_vl
from .attention_interface import LAYER, AttentionCall, bias_of_layer
from .changes import Changes, bound_to
from .decoder import (
    bias_over_all_keys,
    forward_that_takes_key_bias,
    key_shape,
    require_layers_and_heads,
    require_padding_mask,
    rows_of_this_pass,
    with_keywords,
)
from .family import ImageSizes, ImageTokens

__all__ = [
    "box_convention",
    "image_keys",
    "image_tokens",
    "install",
    "key_shape",
    "read",
    "vision_encoder",
]


def install(changes: Changes, model: nn.Module) -> Sequence[nn.Module]:
    transformer: Any = getattr(model, "transformer", None)
    layers: list[Any] = [getattr(block, "attn", None) for block in getattr(transformer, "h", ())]
    if (
        not layers
        or not all(hasattr(layer, "_attn") for layer in layers)
        or not hasattr(transformer, "visual")
        or not hasattr(transformer, "_prepare_decoder_attention_mask")
    ):
        raise UnsupportedModelError(
            f'patch: {type(model).__name__} has the model_type "qwen", but is not Qwen-VL: expected '
            "transformer.visual, transformer._prepare_decoder_attention_mask and transformer.h[i].attn._attn; load "
            "Qwen/Qwen-VL or Qwen/Qwen-VL-Chat (the text-only Qwen and Qwen-Audio share the model_type)"
        )
    for i, layer in enumerate(layers):
        changes.set(layer, LAYER, i)
        changes.replace_method(layer, "_attn", _attn_with_bias)
    changes.replace_method(transformer, "_prepare_decoder_attention_mask", _mask_unless_biased)
    changes.replace_method(model, "prepare_inputs_for_generation", _prepare_inputs_keeping_bias)
    num_heads = layers[0].num_heads

    def biased(original: Callable[..., Any]) -> Callable[..., Any]:
        inner = types.MethodType(_forward_with_bias(original, len(layers), num_heads), model)
        return forward_that_takes_key_bias(inner)

    changes.replace_method(model, "forward", biased)
    return layers


def vision_encoder(model: nn.Module) -> nn.Module:
    """The ViT with its resampler. Its `encode(paths)`, which the model calls, opens the images and calls forward."""
    return model.get_submodule("transformer.visual")


def image_keys(model: nn.Module, inputs: Any) -> Tensor:
    ids, start = inputs["input_ids"], _image_start_id(model)
    return ((ids == start).cumsum(1) > (ids == start + 1).cumsum(1)) & (ids != start)


def image_tokens(model: nn.Module, processor: Any, inputs: Any, image_sizes: ImageSizes) -> list[ImageTokens]:
    ids, start = inputs["input_ids"].cpu(), _image_start_id(model)
    starts, ends = ((ids == image_id).nonzero() for image_id in (start, start + 1))  # (images, 2): row, position
    if len(starts) != len(image_sizes):
        raise ValueError(
            f"inputs: expected {len(image_sizes)} images as in image_sizes, got {len(starts)} image_start_id in "
            "input_ids; pass what the tokenizer returned for these images"
        )
    grids = [qwen_vl(size) for size in image_sizes]
    if not torch.equal(ends, starts + torch.tensor([0, 257])):
        raise ValueError(
            "inputs: expected 256 tokens between the start and the end of each image, got the starts "
            f"{starts.tolist()} and the ends {ends.tolist()} (row of the batch, position); do not truncate the "
            "tokenizer's input_ids within an image"
        )
    return [
        ImageTokens(i, row, position + 1 + torch.arange(grid.num_keys), grid)
        for i, ((row, position), grid) in enumerate(zip(starts.tolist(), grids))
    ]


def read(model: nn.Module, inputs: Any, **patched: Any) -> None:
    model(**inputs, use_cache=False, **patched)


def box_convention(processor: Any) -> str:
    return "permille"


def _image_start_id(model: Any) -> int:
    return model.config.visual["image_start_id"]


# --- the replaced methods ----------------------------------------------------------------------------------------


@dataclass
class BiasedPass:
    """What the layers of one forward pass need. It travels in place of the attention_mask."""

    key_bias: Tensor  # (B, K), (B, H, K) or (B, L, 1 or H, K) float32, over all keys so far
    key_padding_mask: Tensor | None  # (B, K)
    row_gate: Tensor | None  # (B, Q)
    attention_reader: Callable[[AttentionCall], None] | None
    heeded_by: set[int] = field(default_factory=set)  # layers


def _forward_with_bias(original: Callable[..., Any], num_layers: int, num_heads: int) -> Callable[..., Any]:
    positional = list(inspect.signature(original).parameters)

    @functools.wraps(original)
    def forward(
        self: nn.Module,
        *args: Any,
        key_bias: Tensor | None = None,
        row_gate: Tensor | None = None,
        attention_reader: Callable[[AttentionCall], None] | None = None,
        **kwargs: Any,
    ) -> Any:
        original_here = bound_to(self, original)
        if key_bias is None:
            if attention_reader is not None:
                raise UnsupportedInputError(
                    "attention_reader needs a key_bias, which may be 0: only with one is padding known"
                )
            return original_here(*args, **kwargs)
        kwargs |= dict(zip(positional, args))
        require_layers_and_heads(key_bias, num_layers, num_heads)
        _refuse(self, kwargs)
        ids, mask, past = (kwargs.get(name) for name in ("input_ids", "attention_mask", "past_key_values"))
        new_tokens = kwargs["inputs_embeds"] if ids is None else ids
        num_keys = new_tokens.shape[1] + (past[0][0].shape[1] if past else 0)  # the cache is (B, S, H, D)
        bias, padding = bias_over_all_keys(key_bias, mask, num_keys, new_tokens)
        gate = None if row_gate is None else rows_of_this_pass(row_gate, num_keys, new_tokens)
        biased = BiasedPass(bias, padding, gate, attention_reader)
        output = original_here(**{**kwargs, "attention_mask": biased})
        if len(biased.heeded_by) != num_layers:
            raise UnsupportedInputError(
                f"key_bias: {num_layers - len(biased.heeded_by)} of {num_layers} layers attended without calling "
                "attn._attn, as flash attention does; load the model with use_flash_attn=False"
            )
        return output

    forward.__signature__ = with_keywords(original)  # type: ignore[attr-defined]
    return forward


def _refuse(model: nn.Module, arguments: dict[str, Any]) -> None:
    require_padding_mask(arguments.get("attention_mask"))
    if arguments.get("head_mask") is not None:
        raise UnsupportedInputError(
            "key_bias cannot be combined with head_mask; leave it out, or run this model without key_bias"
        )
    if getattr(model.config, "use_cache_quantization", False):
        raise UnsupportedInputError(
            "key_bias cannot be combined with a quantized cache; load the model with use_cache_quantization=False"
        )


def _mask_unless_biased(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _prepare_decoder_attention_mask(self: nn.Module, attention_mask: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(attention_mask, BiasedPass):
            return attention_mask
        return bound_to(self, original)(attention_mask, *args, **kwargs)

    return _prepare_decoder_attention_mask


def _attn_with_bias(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _attn(
        self: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        registered_causal_mask: Tensor | None = None,
        attention_mask: Tensor | BiasedPass | None = None,
        head_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """query (B, H, Q, D), key and value (B, H, K, D), the cache in them -> (B, Q, H, D) and the probabilities, of
        which none are made with a bias.
        """
        if not isinstance(attention_mask, BiasedPass):
            return bound_to(self, original)(query, key, value, registered_causal_mask, attention_mask, head_mask)
        if self.attn_dropout.training and self.attn_dropout.p:
            raise UnsupportedInputError(
                f"key_bias cannot be combined with attention dropout (here {self.attn_dropout.p}); "
                "load the model with attn_dropout_prob=0, or call model.eval()"
            )
        biased, layer = attention_mask, getattr(self, LAYER)
        padding, gate = biased.key_padding_mask, biased.row_gate
        call = AttentionCall(
            layer=layer,
            query=query,
            key=key,
            key_bias=bias_of_layer(biased.key_bias, layer).to(query.device),
            key_padding_mask=None if padding is None else padding.to(query.device),
            row_gate=None if gate is None else gate.to(query.device),
            is_causal=True,
            scale=None if self.scale_attn_weights else 1.0,
        )
        if biased.attention_reader is not None:
            biased.attention_reader(call)
        output = reweighted_attention(
            query,
            key,
            value,
            key_bias=call.key_bias,
            key_padding_mask=call.key_padding_mask,
            row_gate=call.row_gate,
            is_causal=True,
            scale=call.scale,
        )
        biased.heeded_by.add(layer)
        return output.transpose(1, 2), None

    return _attn


def _prepare_inputs_keeping_bias(original: Callable[..., Any]) -> Callable[..., Any]:
    """prepare_inputs_for_generation returns what it knows, and drops the rest. It knows caches as tuples only, so that
    the empty one that generate starts with becomes None; from there on generate keeps what the model returns.
    """

    @functools.wraps(original)
    def prepare_inputs_for_generation(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        past = kwargs.get("past_key_values")
        if isinstance(past, Cache) and past.get_seq_length() == 0:
            kwargs["past_key_values"] = None
        model_inputs = bound_to(self, original)(*args, **kwargs)
        return {**model_inputs, **{name: kwargs[name] for name in ("key_bias", "row_gate") if name in kwargs}}

    prepare_inputs_for_generation.__signature__ = with_keywords(original)  # type: ignore[attr-defined]
    return prepare_inputs_for_generation
