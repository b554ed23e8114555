"""A LLaVA with random weights but real geometry: 336-pixel preprocessing, 24 x 24 image tokens, transformers' own
classes.

It needs no download. What it says means nothing; where its attention goes, and what that costs, is computed as in a
trained model.
"""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from ..tiny_llava.tokenizer import PATCH_SIZE, clip_image_processor_class, llava_processor

_IMAGE_SIDE = 336
_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
_WORDS = [
    "USER",
    ":",
    "ASSISTANT",
    ".",
    ",",
    "?",
    "a",
    "the",
    "is",
    "are",
    "it",
    "in",
    "on",
    "of",
    "and",
    "to",
    "what",
    "which",
    "where",
    "how",
    "many",
    "colour",
    "color",
    "lying",
    "next",
    "standing",
    "see",
    "there",
    "image",
    "cup",
    "coffee",
    "spoon",
    "saucer",
    "table",
    "wood",
    "cat",
    "eye",
    "eyes",
    "nose",
    "rocket",
    "tower",
    "sky",
    "man",
    "woman",
    "helmet",
    "suit",
    "flag",
    "red",
    "green",
    "blue",
    "brown",
    "white",
    "black",
    "grey",
    "small",
    "large",
    "left",
    "right",
    "above",
    "below",
    "beside",
    "behind",
    "one",
    "two",
    "three",
    "yes",
    "no",
    "shiny",
    "round",
]


def make(seed: int = 0) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """(model in eval mode, processor): about 11 million parameters, float32."""
    tokenizer = _tokenizer()
    text_config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=320,
        intermediate_size=864,
        num_hidden_layers=8,
        num_attention_heads=5,
        num_key_value_heads=5,
        max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.06,  # large enough for attention that is not uniform
    )
    vision_config = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=_IMAGE_SIDE,
        patch_size=PATCH_SIZE,
    )
    config = LlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_index=tokenizer.vocab["<image>"],
        image_seq_length=(_IMAGE_SIDE // PATCH_SIZE) ** 2,
        vision_feature_layer=-2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config).eval()
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model, make_processor(tokenizer)


def _tokenizer() -> PreTrainedTokenizerFast:
    words = list(dict.fromkeys((*_SPECIAL, *_WORDS)))
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


def make_processor(tokenizer: PreTrainedTokenizerFast, side: int = _IMAGE_SIDE) -> LlavaProcessor:
    """LLaVA-1.5's, of images of `side` pixels, with another tokenizer."""
    crop_size = {"height": side, "width": side}
    return llava_processor(tokenizer, clip_image_processor_class()(size={"shortest_edge": side}, crop_size=crop_size))
