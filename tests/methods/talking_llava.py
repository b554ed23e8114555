"""A tiny random LLaVA whose processor spells any text byte by byte, and that can be made to say something: random
weights do not find boxes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from image_processor_cases import image_processor, square

SIDE, PATCH = 48, 6
GRID = SIDE // PATCH
SPECIAL = ("<pad>", "<s>", "</s>", "<image>")
PAD, BOS, EOS, IMAGE = range(4)


def make_tokenizer(**options) -> transformers.PreTrainedTokenizerFast:
    words = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>"],
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        **options,
    )


def make_processor(chat_template: str | None = None, **image_options) -> transformers.LlavaProcessor:
    return transformers.LlavaProcessor(
        image_processor=image_processor(
            "CLIPImageProcessor", **{"size": {"shortest_edge": SIDE}, "crop_size": square(SIDE), **image_options}
        ),
        tokenizer=make_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template,
    )


def make_model(seed: int = 0) -> transformers.LlavaForConditionalGeneration:
    text_config = transformers.LlamaConfig(
        vocab_size=4 + 256,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        initializer_range=0.3,
    )
    vision_config = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=32,
    )
    config = transformers.LlavaConfig(
        vision_config=vision_config, text_config=text_config, image_token_index=IMAGE, image_seq_length=GRID**2
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.LlavaForConditionalGeneration(config).eval()
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = PAD, EOS
    return model


def make_images(count: int = 3) -> list[Image.Image]:
    """Of different sizes and shapes."""
    generator = np.random.default_rng(0)
    sizes = [(60, 80), (100, 50), (48, 48)]  # height, width
    return [
        Image.fromarray(generator.integers(0, 256, (*sizes[i % 3], 3), dtype=np.uint8)).convert("RGB")
        for i in range(count)
    ]


class Say(transformers.LogitsProcessor):
    """Makes `generate` write given texts: one list for each call of it, one text for each row."""

    def __init__(self, *calls: Sequence[str]) -> None:
        tokenizer = make_tokenizer()
        self.left = [[tokenizer(text, add_special_tokens=False)["input_ids"] for text in call] for call in calls]
        self.rows: list[int] = []  # of each call so far
        self.width = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] != self.width + 1 or not self.rows:  # another call of generate
            self.texts, self.start = self.left.pop(0), input_ids.shape[1]
            self.rows.append(len(input_ids))
            assert len(self.texts) == len(input_ids)
        self.width = input_ids.shape[1]
        step = self.width - self.start
        forced = torch.full_like(scores, float("-inf"))
        for row, text in zip(forced, self.texts):
            row[text[step] if step < len(text) else EOS] = 0.0
        return forced


def saying(*calls: Sequence[str]) -> dict:
    """Settings of generation that say these texts; see Say."""
    return {"logits_processor": transformers.LogitsProcessorList([Say(*calls)])}


def count_calls(monkeypatch, owner, name: str = "forward") -> list:
    """The keyword arguments of every call of owner.name from here on."""
    calls, original = [], getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *a, **kw: calls.append(kw) or original(*a, **kw), raising=False)
    return calls


def traces(model) -> list[str]:
    """What a patch puts on the modules of a model."""
    return [
        f"{name}.{key}"
        for name, part in model.named_modules()
        for key in vars(part)
        if key in ("forward", "generate", "_finegrain_handle", "finegrain_layer")
    ]
