"""Random models of every family whose decoder attends to image tokens, small enough for CI, with their processors.

Images are cut into tokens by transformers' own processors, of 6 or 8 pixels instead of 14 or 28. All decoders have 4
heads on 2 key-value heads, and weights so large that a bias changes what is said.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

import tiny_llava
from image_processor_cases import image_processor, qwen2_vl, square

IMAGE_TOKEN, VOCABULARY = tiny_llava.IMAGE_TOKEN, tiny_llava.VOCABULARY
SIDE, PATCH = 24, 6  # of the LLaVAs
PINPOINTS = [[24, 24], [24, 48], [48, 24], [48, 48], [72, 24], [24, 72]]

TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}
QWEN_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "num_heads": 4,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}


@dataclass(frozen=True)
class TinyFamily:
    make_config: Callable[..., Any]  # of the text configuration's options
    make_processor: Callable[[], Any]
    prompt_of_image: str
    box_convention: str

    def make_model(self, attn_implementation: str = "sdpa", **text: Any) -> Any:
        config = self.make_config({**TEXT, **text})
        architecture = transformers.AutoModelForImageTextToText._model_mapping[type(config)]
        torch.manual_seed(0)
        model = architecture(config).eval()
        model.set_attn_implementation(attn_implementation)
        model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
        return model

    def inputs(self, image_sizes: list[tuple[int, int]], counts: tuple[int, ...] = (2, 1)) -> Any:
        """A left-padded batch of prompts, counts[i] of the images in prompt i. See `questions`."""
        generator = np.random.default_rng(0)
        images = [Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in image_sizes]
        return self.processed(images, counts)

    def processed(self, images: list[Image.Image], counts: tuple[int, ...]) -> Any:
        words = [" ".join(f"w{5 + (7 * i + 3 * k) % 90}" for k in range(5 - 2 * i)) for i in range(len(counts))]
        texts = [f"<s> {f' w{4 + i} '.join([self.prompt_of_image] * n)} {words[i]}" for i, n in enumerate(counts)]
        return self.make_processor()(images=images, text=texts, padding=True, return_tensors="pt")


def tokenizer(image_token: str) -> transformers.PreTrainedTokenizerBase:
    special = ["<|vision_start|>", "<|vision_end|>", "<|video_pad|>", image_token]
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(4, IMAGE_TOKEN - 3)), *special]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=special,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


# --- LLaVA -------------------------------------------------------------------------------------------------------


def llava_config(text: dict[str, Any]) -> Any:
    return tiny_llava.make_model(**text).config


def llava_next_config(text: dict[str, Any]) -> Any:
    return transformers.LlavaNextConfig(
        vision_config=tiny_llava.make_model().config.vision_config,
        text_config=transformers.LlamaConfig(**text),
        image_token_index=IMAGE_TOKEN,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-2,
    )


def llava_processor(name: str, **options: Any) -> Any:
    """Of LLaVA-1.5 (Clip's image processor) and LLaVA-NeXT."""
    make = {"Llava": "CLIPImageProcessor", "LlavaNext": "LlavaNextImageProcessor"}[name]
    return getattr(transformers, f"{name}Processor")(
        image_processor=image_processor(make, size={"shortest_edge": SIDE}, crop_size=square(SIDE), **options),
        tokenizer=tokenizer("<image>"),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


# --- Qwen --------------------------------------------------------------------------------------------------------


def qwen_config(name: str, text: dict[str, Any], vision: dict[str, Any], sections: list[int]) -> Any:
    """`sections`: how many pairs of a head's channels turn by time, by height and by width."""
    return getattr(transformers, f"{name}Config")(
        vision_config={**QWEN_VISION, **vision},
        text_config={**text, "rope_scaling": {"rope_type": "default", "mrope_section": sections}},
        image_token_id=IMAGE_TOKEN,
        video_token_id=IMAGE_TOKEN - 1,
        vision_end_token_id=IMAGE_TOKEN - 2,
        vision_start_token_id=IMAGE_TOKEN - 3,
    )


def qwen_processor(name: str) -> Any:
    """Without the processor of videos, which needs torchvision; so the check of its class has to go."""
    base = getattr(transformers, name)
    unchecked = type(name, (base,), {"check_argument_for_proper_class": lambda *_: None})
    return unchecked(
        image_processor=qwen2_vl(64 * 4, 64 * 36, patch_size=4),
        tokenizer=tokenizer("<|image_pad|>"),
        video_processor=None,
    )


def qwen(name: str, processor: str, vision: dict[str, Any], sections: list[int], box_convention: str) -> TinyFamily:
    return TinyFamily(
        lambda text: qwen_config(name, text, vision, sections),
        lambda: qwen_processor(processor),
        "<|vision_start|><|image_pad|><|vision_end|>",
        box_convention,
    )


TINY = {
    "LLaVA-1.5": TinyFamily(llava_config, lambda: llava_processor("Llava"), "<image>", "unit_view"),
    "LLaVA-NeXT": TinyFamily(
        llava_next_config,
        lambda: llava_processor("LlavaNext", image_grid_pinpoints=PINPOINTS),
        "<image>",
        "unit_padded",
    ),
    "Qwen2-VL": qwen("Qwen2VL", "Qwen2VLProcessor", {"embed_dim": 32, "hidden_size": 64}, [2, 3, 3], "permille"),
    "Qwen2.5-VL": qwen(
        "Qwen2_5_VL",
        "Qwen2_5_VLProcessor",
        {"intermediate_size": 64, "out_hidden_size": 64, "window_size": 16, "fullatt_block_indexes": [1]},
        [2, 3, 3],
        "pixel",
    ),
    "Qwen3-VL": qwen(
        "Qwen3VL",
        "Qwen3VLProcessor",
        {
            "intermediate_size": 64,
            "out_hidden_size": 64,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        [4, 2, 2],
        "permille",
    ),
}


# --- oracle ------------------------------------------------------------------------------------------------------


class EagerOracle:
    """transformers' eager attention with the bias added to its 4-D additive mask, independent of finegrain_ops.

    bias: (B, P), (B, H, P) or (B, L, 1 or H, P); row_gate (B, P): where False, the row is not biased (not for static
    caches, whose rows' places are not known here).
    """

    def __init__(self, model: Any, bias: Tensor, row_gate: Tensor | None = None) -> None:
        self.model, self.bias, self.row_gate = model, bias, row_gate
        layer = next(m for m in model.model.language_model.modules() if hasattr(m, "layer_idx"))
        self.eager = sys.modules[type(layer).__module__].eager_attention_forward

    def _attention(self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **kwargs: Any) -> Any:
        bias = self.bias.float()
        bias = bias[:, None, None] if bias.dim() == 2 else bias[:, None] if bias.dim() == 3 else bias
        bias = bias[:, module.layer_idx % bias.shape[1]][:, :, None]  # (B, 1 or H, 1, P)
        num_keys, num_rows = mask.shape[-1], mask.shape[-2]
        bias = F.pad(bias, (0, max(0, num_keys - bias.shape[-1])))[..., :num_keys]
        if self.row_gate is not None:
            gate = F.pad(self.row_gate, (0, max(0, num_keys - self.row_gate.shape[1])), value=True)
            bias = torch.where(gate[:, None, num_keys - num_rows : num_keys, None], bias, 0.0)
        bias = bias.repeat_interleave(mask.shape[0] // bias.shape[0], 0)
        return self.eager(module, query, key, value, mask + bias, **kwargs)

    def __enter__(self) -> Any:
        self.before = self.model.config.text_config._attn_implementation
        AttentionInterface.register("biased_eager_oracle", self._attention)
        AttentionMaskInterface.register(
            "biased_eager_oracle", lambda **kwargs: eager_mask(**{**kwargs, "allow_is_causal_skip": False})
        )
        self.model.set_attn_implementation({"text_config": "biased_eager_oracle"})
        return self.model

    def __exit__(self, *_: object) -> None:
        self.model.set_attn_implementation({"text_config": self.before})
