"""Whole answers of a model of transformers: unpatched, patched without and with a bias, and eager with the bias in its
mask, as the papers' code has it.

Every peer has a model object of its own; all share one set of weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

import finegrain_ops

from ..generate_inputs import GenerateInputs
from ..generate_models import SHAPES, sharing_weights
from ..operations import GENERATE_DECODE
from .interface import Call, Peer

PATCHED_BIASED = "finegrain_ops patched, biased"
PATCHED_IDLE = "finegrain_ops patched, idle"
UNPATCHED = "transformers sdpa, unbiased"
EAGER_BIASED = "transformers eager, bias in the mask"
_EAGER = "bench_eager_with_bias"


def generate_peers() -> list[Peer]:
    return [
        Peer(PATCHED_BIASED, _patched(is_biased=True), is_ours=True),
        Peer(PATCHED_IDLE, _patched(is_biased=False), is_biased=False, is_ours=True),
        Peer(UNPATCHED, lambda inputs: _call(inputs, sharing_weights(inputs.model)), is_biased=False),
        Peer(EAGER_BIASED, _eager),
    ]


def _patched(is_biased: bool) -> Callable[[GenerateInputs], Call]:
    def prepare(inputs: GenerateInputs) -> Call:
        model = sharing_weights(inputs.model)
        finegrain_ops.patch(model)
        return _call(inputs, model, **({"key_bias": inputs.key_bias} if is_biased else {}))

    return prepare


def _eager(inputs: GenerateInputs) -> Call:
    model = sharing_weights(inputs.model)
    if SHAPES[inputs.case.model].family == "instructblip":
        _add_to_cross_attention(model, inputs.key_bias)
    else:
        _add_to_decoder_mask(model, inputs.key_bias)
    return _call(inputs, model)


def _add_to_decoder_mask(model: Any, key_bias: Tensor) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask
    from transformers.models.llama.modeling_llama import eager_attention_forward

    def mask_with_bias(**kwargs: Any) -> Tensor:
        mask = eager_mask(**{**kwargs, "allow_is_causal_skip": False})
        bias = F.pad(key_bias, (0, mask.shape[-1] - key_bias.shape[1])).to(mask.dtype)
        return mask + bias[:, None, None]

    AttentionInterface.register(_EAGER, eager_attention_forward)
    AttentionMaskInterface.register(_EAGER, mask_with_bias)
    model.set_attn_implementation({"text_config": _EAGER})


def _add_to_cross_attention(model: Any, key_bias: Tensor) -> None:
    model.set_attn_implementation("eager")

    def add_bias(module: Any, args: Any, kwargs: dict) -> tuple[Any, dict]:
        mask = kwargs.get("encoder_attention_mask")
        bias = key_bias[:, None, None].to(next(module.parameters()).dtype)
        return args, {**kwargs, "encoder_attention_mask": bias if mask is None else bias + mask}

    for layer in model.qformer.encoder.layer:
        if layer.has_cross_attention:
            layer.crossattention.attention.register_forward_pre_hook(add_bias, with_kwargs=True)


def _call(inputs: GenerateInputs, model: Any, **bias: Tensor) -> Call:
    """Gives the logits of the last new token, (B, vocabulary)."""
    case, prompts = inputs.case, inputs.prompts
    options = {
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
        "pad_token_id": 0,
        **bias,
    }
    if case.operation != GENERATE_DECODE:
        return lambda: model.generate(**prompts, max_new_tokens=1, **options).logits[-1]

    # The prompt but for its last token is in the cache, which each call gets anew; update() never writes into it.
    started = {key: value[:, :-1] if key in inputs.per_position else value for key, value in prompts.items()}
    prefilled = model.generate(**started, max_new_tokens=1, **options).past_key_values
    rest = {key: value for key, value in prompts.items() if not key.startswith("pixel")}

    def decode() -> Tensor:
        cache = copy.copy(prefilled)
        cache.layers = [copy.copy(layer) for layer in prefilled.layers]
        return model.generate(**rest, past_key_values=cache, max_new_tokens=case.new_tokens, **options).logits[-1]

    return decode
