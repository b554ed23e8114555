"""A random TinyGroundingGPT small enough for CI: 8 x 8 tokens of 6 pixels, two encoders, 2 decoder layers.

Its tokenizer spells any text byte by byte; multiples of 1/8 with three decimals, of which the boxes of `make_scenes`
are made, are one token each.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from finegrain_ops.integrations.tinygroundinggpt import (
    TinyGroundingGPTConfig,
    TinyGroundingGPTForConditionalGeneration,
    TinyGroundingGPTImageProcessor,
    TinyGroundingGPTProcessor,
)

SIDE, PATCH = 48, 6
GRID = SIDE // PATCH
TOKENS_PER_IMAGE = GRID**2
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<object>")
PAD, START, EOS, IMAGE, OBJECT = range(5)
NUMBERS = [f"{i / 8:.3f}" for i in range(9)]
VOCABULARY = len(SPECIAL) + 256 + len(NUMBERS)


def make_tokenizer(**options: Any) -> transformers.PreTrainedTokenizerFast:
    words = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in SPECIAL])
    tokenizer.add_tokens([AddedToken(number, normalized=False) for number in NUMBERS])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>", "<image>", "<object>"],
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        padding_side="left",
        **options,
    )


def make_processor(**options: Any) -> TinyGroundingGPTProcessor:
    """`options` are the tokenizer's."""
    return TinyGroundingGPTProcessor(
        TinyGroundingGPTImageProcessor(size={"height": SIDE, "width": SIDE}),
        make_tokenizer(**options),
        patch_size=PATCH,
    )


def make_config(**text: Any) -> TinyGroundingGPTConfig:
    """`text` are options of the language model. DINOv2's position embeddings are of 10 x 10 patches."""
    encoder = {"num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": PATCH}
    return TinyGroundingGPTConfig(
        clip_config={**encoder, "hidden_size": 32, "intermediate_size": 64, "image_size": SIDE, "projection_dim": 32},
        dino_config={**encoder, "hidden_size": 48, "mlp_ratio": 2, "image_size": 10 * PATCH},
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "eos_token_id": EOS,
            "pad_token_id": PAD,
            "tie_word_embeddings": True,
            **text,
        },
        image_token_id=IMAGE,
        object_token_id=OBJECT,
    )


def make_model(seed: int = 0, **text: Any) -> TinyGroundingGPTForConditionalGeneration:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = TinyGroundingGPTForConditionalGeneration(make_config(**text)).eval()
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = PAD, EOS
    return model


def make_images(count: int = 3) -> list[Image.Image]:
    """Noise of different sizes and shapes."""
    generator = np.random.default_rng(0)
    sizes = [(60, 80), (101, 50), (48, 48)]  # height, width
    return [
        Image.fromarray(generator.integers(0, 256, (*sizes[i % 3], 3), dtype=np.uint8)).convert("RGB")
        for i in range(count)
    ]


def make_scenes(count: int, seed: int = 0) -> list[tuple[Image.Image, tuple[int, int, int, int]]]:
    """Grey squares of 48 x 48 pixels with a red box in each, whose edges are multiples of 1/8 of the side; and its box
    in pixels.
    """
    generator = np.random.default_rng(seed)
    scenes = []
    for _ in range(count):
        width, height = generator.integers(3, 6, 2)
        x, y = generator.integers(0, GRID + 1 - width), generator.integers(0, GRID + 1 - height)
        x0, y0, x1, y1 = (int(edge) * PATCH for edge in (x, y, x + width, y + height))
        pixels = np.full((SIDE, SIDE, 3), 128, dtype=np.uint8)
        pixels[y0:y1, x0:x1] = (220, 30, 30)
        scenes.append((Image.fromarray(pixels), (x0, y0, x1, y1)))
    return scenes
