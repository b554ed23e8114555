"""Models with random weights in the shapes of released checkpoints, and prompts for them.

At full size they need a GPU. Scaled down they keep what decides the cost of attention against the rest: image tokens,
head dimension, shares of query and key heads, and the ratio of the MLP to the hidden size; layers and heads are fewer.
What such a model says means nothing; what it costs is what a trained one costs.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_VOCABULARY = 32000
_IMAGE_TOKEN, _VISION_START, _BOS = 31990, 31991, 1
_QUERIES = 32  # of the Q-Former


@dataclass(frozen=True)
class ModelShape:
    """A language model behind a vision encoder: `image_grid` tokens (of InstructBLIP keys of the Q-Former)."""

    family: str  # "llava", "qwen2_5_vl" or "instructblip"
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    mlp: int
    vision_layers: int
    vision_hidden: int
    vision_heads: int
    image_grid: tuple[int, int]
    qformer_layers: int = 12
    qformer_hidden: int = 768

    @property
    def image_tokens(self) -> int:
        """In the prompt."""
        return _QUERIES if self.family == "instructblip" else self.image_grid[0] * self.image_grid[1]


SHAPES = {
    "llava-1.5-7b": ModelShape("llava", 32, 4096, 32, 32, 11008, 24, 1024, 16, (24, 24)),
    "llava-1.5-7b scaled down": ModelShape("llava", 4, 1024, 8, 8, 2752, 2, 128, 2, (24, 24)),
    "qwen2.5-vl-3b": ModelShape("qwen2_5_vl", 36, 2048, 16, 2, 11008, 32, 1280, 16, (32, 32)),
    "qwen2.5-vl-3b scaled down": ModelShape("qwen2_5_vl", 4, 1024, 8, 1, 5504, 2, 160, 2, (32, 32)),
    "instructblip-vicuna-7b": ModelShape("instructblip", 32, 4096, 32, 32, 11008, 39, 1408, 16, (16, 16)),
    "instructblip-vicuna-7b scaled down": ModelShape("instructblip", 4, 1024, 8, 8, 2752, 4, 352, 4, (16, 16)),
}


@functools.lru_cache(maxsize=1)
def make_model(name: str, dtype: torch.dtype, device: torch.device) -> Any:
    """In eval mode, with sdpa; it never ends an answer by itself."""
    shape = SHAPES[name]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.device(device):
            torch.manual_seed(0)
            model = _MAKERS[shape.family](shape).eval()
    finally:
        torch.set_default_dtype(before)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for part in (model, getattr(model, "language_model", None)):
        if getattr(part, "generation_config", None) is not None:
            part.generation_config.eos_token_id = None
            part.generation_config.pad_token_id = 0
    return model


def sharing_weights(model: nn.Module) -> Any:
    """A copy of its own, to be patched or configured, that holds the same parameters and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _text(shape: ModelShape) -> dict[str, Any]:
    return {
        "vocab_size": _VOCABULARY,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.mlp,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "max_position_embeddings": 8192,
        "bos_token_id": _BOS,
        "eos_token_id": None,
        "pad_token_id": 0,
    }


def _llava(shape: ModelShape) -> nn.Module:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=shape.vision_hidden,
        intermediate_size=4 * shape.vision_hidden,
        num_hidden_layers=shape.vision_layers,
        num_attention_heads=shape.vision_heads,
        image_size=14 * shape.image_grid[0],
        patch_size=14,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**_text(shape)),
        image_token_index=_IMAGE_TOKEN,
        image_seq_length=shape.image_tokens,
    )
    return LlavaForConditionalGeneration(config)


def _qwen2_5_vl(shape: ModelShape) -> nn.Module:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = {
        "depth": shape.vision_layers,
        "hidden_size": shape.vision_hidden,
        "intermediate_size": 4 * shape.vision_hidden,
        "num_heads": shape.vision_heads,
        "out_hidden_size": shape.hidden,
        "fullatt_block_indexes": [shape.vision_layers - 1],
    }
    head_dim = shape.hidden // shape.heads
    rope = {"type": "default", "rope_type": "default", "mrope_section": [head_dim // 8, *[3 * head_dim // 16] * 2]}
    config = Qwen2_5_VLConfig(
        vision_config=vision,
        text_config={**_text(shape), "rope_scaling": rope},
        image_token_id=_IMAGE_TOKEN,
        vision_start_token_id=_VISION_START,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def _instructblip(shape: ModelShape) -> nn.Module:
    from transformers import (
        InstructBlipConfig,
        InstructBlipForConditionalGeneration,
        InstructBlipQFormerConfig,
        InstructBlipVisionConfig,
        LlamaConfig,
    )

    vision = InstructBlipVisionConfig(
        hidden_size=shape.vision_hidden,
        intermediate_size=4 * shape.vision_hidden,
        num_hidden_layers=shape.vision_layers,
        num_attention_heads=shape.vision_heads,
        image_size=14 * shape.image_grid[0],
        patch_size=14,
        initializer_range=0.5 * shape.vision_hidden**-0.5,  # the default, 1e-10, would make all keys alike
    )
    qformer = InstructBlipQFormerConfig(
        encoder_hidden_size=shape.vision_hidden,
        hidden_size=shape.qformer_hidden,
        intermediate_size=4 * shape.qformer_hidden,
        num_hidden_layers=shape.qformer_layers,
        initializer_range=0.5 * shape.qformer_hidden**-0.5,
    )
    config = InstructBlipConfig(
        vision_config=vision.to_dict(),
        qformer_config=qformer.to_dict(),
        text_config=LlamaConfig(**_text(shape)).to_dict(),
        num_query_tokens=_QUERIES,
        image_token_index=_IMAGE_TOKEN,
    )
    model = InstructBlipForConditionalGeneration(config)
    nn.init.normal_(model.query_tokens)  # of zeros no score would be different from another
    return model


_MAKERS: dict[str, Callable[[ModelShape], nn.Module]] = {
    "llava": _llava,
    "qwen2_5_vl": _qwen2_5_vl,
    "instructblip": _instructblip,
}


def make_prompts(
    name: str, text_lengths: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """What a processor returns for prompts of an image and so many tokens of text, padded on the left."""
    shape, generator = SHAPES[name], torch.Generator().manual_seed(0)

    def text(length: int, vocabulary: int = _VOCABULARY - 100) -> list[int]:
        return torch.randint(10, vocabulary, (length,), generator=generator).tolist()

    image = [_IMAGE_TOKEN] * shape.image_tokens
    rows = [[_BOS, _VISION_START, *image, *text(length - 2)] for length in text_lengths]
    width = max(map(len, rows))
    input_ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    inputs = {"input_ids": input_ids, "attention_mask": (input_ids != 0).long()}
    batch, (grid_rows, columns) = len(rows), shape.image_grid
    if shape.family == "qwen2_5_vl":
        patches = (2 * grid_rows) * (2 * columns)
        inputs["pixel_values"] = torch.randn(batch * patches, 3 * 2 * 14 * 14, generator=generator).to(dtype)
        inputs["image_grid_thw"] = torch.tensor([[1, 2 * grid_rows, 2 * columns]] * batch)
        inputs["mm_token_type_ids"] = (input_ids == _IMAGE_TOKEN).long()
    else:
        pixels = torch.randn(batch, 3, 14 * grid_rows, 14 * columns, generator=generator)
        inputs["pixel_values"] = pixels.to(dtype)
    if shape.family == "instructblip":
        inputs["qformer_input_ids"] = torch.tensor([text(24, 30000) for _ in rows])
        inputs["qformer_attention_mask"] = torch.ones(batch, 24, dtype=torch.long)
    return {key: value.to(device) for key, value in inputs.items()}


def region_bias(name: str, input_ids: Tensor, weight: float) -> Tensor:
    """log(weight) on the middle ninth of the image: (B, P) float32, of InstructBLIP (B, 1 + keys)."""
    shape = SHAPES[name]
    rows, columns = shape.image_grid
    region = torch.zeros(rows, columns, dtype=torch.bool)
    region[rows // 3 : 2 * rows // 3, columns // 3 : 2 * columns // 3] = True
    value = torch.tensor(weight).log()
    if shape.family == "instructblip":
        of_image = torch.cat([torch.zeros(1), region.flatten() * value])
        return of_image.expand(len(input_ids), -1).contiguous().to(input_ids.device)
    bias = torch.zeros(input_ids.shape)
    for row, ids in zip(bias, input_ids.cpu()):
        row[ids == _IMAGE_TOKEN] = region.flatten() * value
    return bias.to(input_ids.device)
