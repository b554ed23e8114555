"""A random LLaVA small enough for CI: 4 x 4 image tokens of 6 pixels, 3 decoder layers with grouped heads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from transformers.masking_utils import eager_mask
from transformers.models.llama.modeling_llama import eager_attention_forward

IMAGE_TOKEN = 99
TOKENS_PER_IMAGE = 16
VOCABULARY = 100


def make_model(attn_implementation: str = "sdpa", **text) -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    vision_config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=24,
        patch_size=6,
        projection_dim=32,
    )
    text_config = LlamaConfig(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "bos_token_id": 1,
            "eos_token_id": None,
            "pad_token_id": 0,
            "initializer_range": 0.3,
            **text,
        }
    )
    config = LlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_index=IMAGE_TOKEN,
        image_seq_length=TOKENS_PER_IMAGE,
        vision_feature_layer=-2,
    )
    model = LlavaForConditionalGeneration(config).eval()
    model.set_attn_implementation(attn_implementation)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    return model


def make_inputs(text_lengths=(6, 3), seed=0) -> dict[str, torch.Tensor]:
    """A left-padded batch of different images and questions: bos, image, text."""
    generator = torch.Generator().manual_seed(seed)
    rows = [
        [1] + [IMAGE_TOKEN] * TOKENS_PER_IMAGE + torch.randint(5, 90, (n,), generator=generator).tolist()
        for n in text_lengths
    ]
    width = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[0] * (width - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
        "pixel_values": torch.randn(len(rows), 3, 24, 24, generator=generator),
    }


def make_bias(input_ids: torch.Tensor, strength: float = 2.1) -> torch.Tensor:
    """(B, P): a different region, and a different sign, for every row."""
    bias = torch.zeros(input_ids.shape)
    for i, row in enumerate(input_ids):
        image = (row == IMAGE_TOKEN).nonzero()[:, 0]
        bias[i, image[2 * i : 2 * i + 6]] = strength * (-1) ** i
    return bias


class EagerOracle:
    """transformers' eager attention with the bias put in its 4-D additive mask, independent of finegrain_ops."""

    def __init__(self, model: LlavaForConditionalGeneration, bias: torch.Tensor | None) -> None:
        self.model, self.bias = model, bias

    def _mask(self, **kwargs) -> torch.Tensor | None:
        mask = eager_mask(**{**kwargs, "allow_is_causal_skip": False})
        if self.bias is None:
            return mask
        batch, length = self.bias.shape
        bias = self.bias.repeat_interleave(mask.shape[0] // batch, 0)
        bias = F.pad(bias, (0, mask.shape[-1] - length)) if mask.shape[-1] > length else bias[:, : mask.shape[-1]]
        return mask + bias[:, None, None]

    def __enter__(self) -> LlavaForConditionalGeneration:
        self.before = self.model.config.text_config._attn_implementation
        AttentionInterface.register("biased_eager_oracle", eager_attention_forward)
        AttentionMaskInterface.register("biased_eager_oracle", self._mask)
        self.model.set_attn_implementation({"text_config": "biased_eager_oracle"})
        return self.model

    def __exit__(self, *_: object) -> None:
        self.model.set_attn_implementation({"text_config": self.before})
