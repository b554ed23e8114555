"""The small LLaVA: transformers' own classes, narrow, with 64 tokens for an image. About two million weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from .tokenizer import IMAGE_SIDE, IMAGE_TOKENS, NUMBER_WORDS, PATCH_SIZE, vocabulary

WIDTH, HEADS, LAYERS = 128, 4, 4
_INITIAL_STD = 0.08  # transformers' 0.02 is far too small for a model this narrow


def configuration() -> LlavaConfig:
    ids = {word: i for i, word in enumerate(vocabulary())}
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        image_size=IMAGE_SIDE,
        patch_size=PATCH_SIZE,
        projection_dim=WIDTH,
    )
    text = LlamaConfig(
        vocab_size=len(ids),
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=1024,
        pad_token_id=ids["<pad>"],
        bos_token_id=ids["<s>"],
        eos_token_id=ids["</s>"],
        tie_word_embeddings=False,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=ids["<image>"],
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )


def new_model(seed: int) -> LlavaForConditionalGeneration:
    """With random weights, in train mode: those that a training from nothing begins with."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = LlavaForConditionalGeneration(configuration())
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.ndim == 2 and "vision_tower" not in name:
                    nn.init.normal_(weight, std=_INITIAL_STD)
            first = vocabulary().index(NUMBER_WORDS[0])
            words = model.get_input_embeddings().weight
            words[first : first + len(NUMBER_WORDS)] += _INITIAL_STD * _number_waves(len(NUMBER_WORDS), WIDTH)
            model.get_output_embeddings().weight.copy_(words)
            positions = embeddings_of(model).position_embedding.weight
            positions[1:] = 0.3 * _waves(IMAGE_SIDE // PATCH_SIZE, WIDTH)
    return model.train()


def embeddings_of(model: Any) -> Any:
    """CLIP's embeddings of patches and positions, wherever the installed transformers keeps them."""
    return next(module for module in model.modules() if type(module).__name__ == "CLIPVisionEmbeddings")


def _number_waves(count: int, width: int) -> Tensor:
    """(count, width): sines and cosines of each number, by which near ones are alike from the start."""
    turns = torch.logspace(-2, 3, width // 2, base=2.0)  # over all numbers: from a quarter to eight
    angles = 2 * torch.pi * turns * torch.arange(count)[:, None] / count
    return 2**0.5 * torch.cat([angles.sin(), angles.cos()], 1)


def _waves(side: int, width: int) -> Tensor:
    """(side * side, width): sines and cosines of each patch's row and column, a start from which places are learnt
    sooner than from noise.
    """
    frequencies = 1.0 / 50 ** (torch.arange(width // 4) / (width // 4))
    angles = torch.arange(side)[:, None] * frequencies
    of_axis = torch.cat([angles.sin(), angles.cos()], 1)  # (side, width / 2)
    rows = of_axis[:, None].expand(side, side, -1)
    columns = of_axis[None].expand(side, side, -1)
    return torch.cat([rows, columns], -1).reshape(side * side, width)
