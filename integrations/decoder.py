"""Decoders whose layers attend to image tokens in the sequence: LLaVA, LLaVA-NeXT, Qwen2-VL and later.

What `install` changes on the instance:
- model.forward and the language model's forward take `key_bias`, `row_gate` and `attention_reader`: keywords, so that
  they reach every layer through gradient checkpointing, beams, caches and threads without any state outside the call;
- every attention layer of the language model holds a copy of its configuration that names our attention function
  (attention_interface.py), and its place among them. The model's own configuration is not touched.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UnsupportedInputError, UnsupportedModelError
from ..validation import describe, require_values
from .attention_interface import LAYER, interface_config
from .changes import Changes, bound_to


def install(changes: Changes, model: nn.Module, language_model: nn.Module) -> list[nn.Module]:
    layers = _attention_layers(language_model)
    for i, (layer, config) in enumerate(zip(layers, shared_interface_configs(layers))):
        changes.set(layer, "config", config)
        changes.set(layer, LAYER, i)
    num_heads = getattr(layers[0].config, "num_attention_heads", None)
    changes.replace_method(
        language_model, "forward", functools.partial(_forward_with_bias, num_layers=len(layers), num_heads=num_heads)
    )
    changes.replace_method(model, "forward", forward_that_takes_key_bias)
    for name, replacement in (
        ("prepare_inputs_for_generation", _prepare_inputs_keeping_mask),
        ("generate_batch", generate_batch_without_bias),
        ("_valid_auto_compile_criteria", _compiled_without_bias),
    ):
        if hasattr(model, name):
            changes.replace_method(model, name, replacement)
    return layers


def key_shape(model: nn.Module, inputs: Any) -> tuple[int, int]:
    return tuple(inputs["input_ids"].shape)  # type: ignore[return-value]


def read(model: nn.Module, inputs: Any, **patched: Any) -> None:
    model(**inputs, use_cache=False, logits_to_keep=1, **patched)


def _attention_layers(language_model: nn.Module) -> list[nn.Module]:
    """The decoder's self-attention modules; raises when there are none that go through AttentionInterface."""
    layers = [
        m
        for m in language_model.modules()
        if hasattr(m, "layer_idx") and hasattr(m, "is_causal") and hasattr(m, "config")
    ]
    if not layers or not getattr(language_model, "_supports_attention_backend", False):
        raise UnsupportedModelError(
            f"patch: {type(language_model).__name__} has no attention layers that call transformers' AttentionInterface"
        )
    return layers


def shared_interface_configs(layers: Sequence[nn.Module]) -> list[Any]:
    """One interface configuration per configuration, shared by the layers that shared it."""
    copies: dict[int, Any] = {}
    return [copies.setdefault(id(layer.config), interface_config(layer.config)) for layer in layers]


# --- the replaced methods ----------------------------------------------------------------------------------------


def forward_that_takes_key_bias(original: Callable[..., Any]) -> Callable[..., Any]:
    """model.forward with `key_bias` and `row_gate` in its signature, which is how generate comes to accept, expand and
    pass them.
    """

    @functools.wraps(original)
    def forward(
        self: nn.Module, *args: Any, key_bias: Tensor | None = None, row_gate: Tensor | None = None, **kwargs: Any
    ) -> Any:
        if key_bias is None:
            return bound_to(self, original)(*args, **kwargs)
        check_key_bias(key_bias)
        if row_gate is not None:
            _check_row_gate(row_gate)
            kwargs["row_gate"] = row_gate
        if kwargs.get("output_attentions") or getattr(self.config, "output_attentions", False):
            raise UnsupportedInputError(
                "key_bias cannot be combined with output_attentions=True: no attention matrix is made"
            )
        return bound_to(self, original)(*args, key_bias=key_bias, **kwargs)

    forward.__signature__ = with_keywords(original, "key_bias", "row_gate")  # type: ignore[attr-defined]
    return forward


def with_keywords(original: Callable[..., Any], *names: str) -> inspect.Signature:
    """The signature of a function of (self, ...) that takes what `original`, bound, takes, and these keywords."""
    parameters = list(inspect.signature(original).parameters.values())
    at = next((i for i, p in enumerate(parameters) if p.kind is p.VAR_KEYWORD), len(parameters))
    parameters[at:at] = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in names]
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return inspect.Signature([own, *parameters])


def _forward_with_bias(original: Callable[..., Any], num_layers: int, num_heads: int | None) -> Callable[..., Any]:
    """The language model's forward: makes one bias over all keys of this pass, once for all layers."""
    positional = list(inspect.signature(original).parameters)

    @functools.wraps(original)
    def forward(
        self: nn.Module, *args: Any, key_bias: Tensor | None = None, row_gate: Tensor | None = None, **kwargs: Any
    ) -> Any:
        original_here = bound_to(self, original)
        if key_bias is None:
            return original_here(*args, **kwargs)
        require_layers_and_heads(key_bias, num_layers, num_heads)
        kwargs |= dict(zip(positional, args))
        embedded = kwargs.get("inputs_embeds")
        new_tokens = kwargs["input_ids"] if embedded is None else embedded
        mask = kwargs.get("attention_mask")
        num_keys = _num_keys(new_tokens, mask, kwargs.get("position_ids"), kwargs.get("past_key_values"))
        bias, padding = bias_over_all_keys(key_bias, mask, num_keys, new_tokens)
        if row_gate is None:
            bias = bias if padding is None else bias.masked_fill(per_key(~padding, bias), float("-inf"))
        else:  # padding holds in every row
            kwargs |= {
                "row_gate": rows_of_this_pass(row_gate, num_keys, new_tokens),
                "key_padding_mask": padding,
            }
        # transformers hands a 4-D mask through to the layers as it is, so no Nq x Nk mask is made; ours do not read it.
        kwargs["attention_mask"] = bias.reshape(len(bias), -1, num_keys)[:, :1, None]
        return original_here(**kwargs, key_bias=bias)

    return forward


def _num_keys(new_tokens: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cache: Any) -> int:
    """How many keys there are after this pass. Refuses what could not be biased right."""
    require_padding_mask(attention_mask)
    if position_ids is not None and position_ids.dim() == 3:  # M-RoPE: the text's own positions come first, or not
        position_ids = position_ids[0] if position_ids.shape[0] == 4 else None
    may_be_packed = attention_mask is None and cache is None and position_ids is not None
    if may_be_packed and bool((position_ids.diff(dim=-1) != 1).any()):  # type: ignore[union-attr]
        raise UnsupportedInputError(
            "key_bias cannot be combined with packed sequences (position_ids that start anew within a row); "
            "pass one sequence per row, with an attention_mask"
        )
    if torch.compiler.is_compiling() and attention_mask is not None:
        return attention_mask.shape[1]  # a static cache counts on the device; asking it would break the graph
    return new_tokens.shape[1] + (0 if cache is None else int(cache.get_seq_length()))


def bias_over_all_keys(
    key_bias: Tensor, attention_mask: Tensor | None, num_keys: int, new_tokens: Tensor
) -> tuple[Tensor, Tensor | None]:
    """key_bias with 0 beyond its end, (B, ..., K) float32; and (B, K) bool, True where there is no padding."""
    batch = new_tokens.shape[0]
    if key_bias.shape[0] != batch:
        raise ValueError(f"key_bias: expected one row per sequence, here {batch}, got shape {tuple(key_bias.shape)}")
    length = key_bias.shape[-1]
    bias = require_bias_values(key_bias).to(device=new_tokens.device, dtype=torch.float32)
    bias = F.pad(bias, (0, num_keys - length)) if length < num_keys else bias[..., :num_keys]
    if attention_mask is None:
        return bias, None
    if attention_mask.shape[1] < num_keys:
        raise ValueError(
            f"attention_mask: expected (B, K) over all {num_keys} keys so far, got shape {tuple(attention_mask.shape)}"
        )
    return bias, attention_mask[:, :num_keys].to(bias.device) != 0


def rows_of_this_pass(row_gate: Tensor, num_keys: int, new_tokens: Tensor) -> Tensor:
    """(B, rows of this pass) bool of a gate over the prompt; what comes after the prompt is open."""
    batch, num_rows = new_tokens.shape[:2]
    if row_gate.shape[0] != batch:
        raise ValueError(f"row_gate: expected one row per sequence, here {batch}, got shape {tuple(row_gate.shape)}")
    gate = row_gate.to(new_tokens.device)
    if gate.shape[1] < num_keys:
        gate = F.pad(gate, (0, num_keys - gate.shape[1]), value=True)
    return gate[:, num_keys - num_rows : num_keys]


def per_key(mask: Tensor, bias: Tensor) -> Tensor:
    """mask (B, K) in the shape of a bias (B, ..., K)."""
    return mask.reshape(len(mask), *(1,) * (bias.dim() - 2), mask.shape[1])


def _prepare_inputs_keeping_mask(original: Callable[..., Any]) -> Callable[..., Any]:
    """prepare_inputs_for_generation turns the mask 4-D for a static cache; with key_bias the (B, K) one is wanted."""

    @functools.wraps(original)
    def prepare_inputs_for_generation(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        model_inputs = bound_to(self, original)(*args, **kwargs)
        if kwargs.get("key_bias") is None:
            return model_inputs
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            model_inputs["attention_mask"] = mask
        elif mask is None and model_inputs.get("attention_mask") is not None:
            # generate leaves out a mask that hides nothing. All tokens so far are in input_ids, but with inputs_embeds.
            input_ids = args[0] if args else kwargs["input_ids"]
            has_embeddings = kwargs.get("inputs_embeds") is not None
            model_inputs["attention_mask"] = None if has_embeddings else torch.ones_like(input_ids)
        return model_inputs

    return prepare_inputs_for_generation


def _compiled_without_bias(original: Callable[..., Any]) -> Callable[..., Any]:
    """On a GPU generate compiles the forward for a static cache, whose shapes stay. Those of the bias and of the mask
    grow with every step, so that each would be compiled anew.
    """

    @functools.wraps(original)
    def _valid_auto_compile_criteria(self: nn.Module, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> bool:
        if model_kwargs.get("key_bias") is not None:
            return False
        return bool(bound_to(self, original)(model_kwargs, *args, **kwargs))

    return _valid_auto_compile_criteria


def generate_batch_without_bias(original: Callable[..., Any]) -> Callable[..., Any]:
    """Continuous batching replaces the attention function, so it would lose a key_bias silently."""

    @functools.wraps(original)
    def generate_batch(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("key_bias") is not None:
            raise UnsupportedInputError("key_bias cannot be combined with generate_batch; use generate")
        return bound_to(self, original)(*args, **kwargs)

    return generate_batch


# --- checks ------------------------------------------------------------------------------------------------------

BIAS_SHAPES = "(B, P), (B, H, P) per head or (B, L, 1 or H, P) per layer"


def check_key_bias(key_bias: object) -> None:
    if not isinstance(key_bias, Tensor) or not key_bias.is_floating_point():
        raise TypeError(
            f"key_bias: expected a float tensor (B, P), got {describe(key_bias)}; handle.key_bias makes one"
        )
    if not 2 <= key_bias.dim() <= 4:
        raise ValueError(f"key_bias: expected shape {BIAS_SHAPES}, got {tuple(key_bias.shape)}")


def require_padding_mask(attention_mask: object) -> None:
    if attention_mask is not None and (not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2):
        raise UnsupportedInputError(
            f"key_bias needs a 2-D attention_mask (B, K), or none, got {describe(attention_mask)}; "
            "a mask of its own per row cannot be combined with key_bias"
        )


def require_bias_values(key_bias: Tensor) -> Tensor:
    """Once for all layers; they do not check."""
    largest = torch.finfo(key_bias.dtype).max
    return require_values(key_bias, "key_bias", -math.inf, largest, "values below +inf and no NaN")


def require_layers_and_heads(key_bias: Tensor, num_layers: int, num_heads: int | None) -> None:
    """Of a bias that differs between them; one layer or head stands for all."""
    layers = key_bias.shape[1] if key_bias.dim() == 4 else 1
    heads = key_bias.shape[-2] if key_bias.dim() > 2 else 1
    if layers not in (1, num_layers) or (num_heads is not None and heads not in (1, num_heads)):
        raise ValueError(
            f"key_bias: expected {BIAS_SHAPES} with L = {num_layers} and H = {num_heads}, got shape "
            f"{tuple(key_bias.shape)}"
        )


def _check_row_gate(row_gate: object) -> None:
    if not isinstance(row_gate, Tensor) or row_gate.dtype != torch.bool:
        raise TypeError(f"row_gate: expected a bool tensor (B, P), got {describe(row_gate)}; handle.row_gate makes one")
    if row_gate.dim() != 2:
        raise ValueError(f"row_gate: expected shape (B, P), got {tuple(row_gate.shape)}")
