"""The tiny models of all families with a tokenizer that spells any text byte by byte, so that boxes and answers can be
read back.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import transformers
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from tiny_models import IMAGE_TOKEN, TINY, TinyFamily

VOCABULARY = IMAGE_TOKEN + 1 + 256
PAD, BOS, EOS, OTHER_END = range(4)
CHATS = {  # what a chat writes, in each of the ways that matter here
    "LLaVA-1.5": None,  # the family's own plain format: USER: ... ASSISTANT:
    "LLaVA-NeXT": "{image}{question}!",
    "Qwen2-VL": "chat template, <|im_end|> after answers",
    "Qwen2.5-VL": "<s>{image} {question} >",
    "Qwen3-VL": "chat template, nothing after answers",
}
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BARE = CHATML.replace("<|im_start|>", "[").replace("<|im_end|>\n", " ")


def make_tokenizer(image_token: str) -> transformers.PreTrainedTokenizerFast:
    """Special tokens where the tiny models' configurations say, the bytes after them."""
    vision = ["<|vision_start|>", "<|vision_end|>", "<|video_pad|>", image_token]
    special = ["<pad>", "<s>", "</s>", "<|im_end|>", "<|im_start|>"]
    fillers = [f"<filler{i}>" for i in range(IMAGE_TOKEN - 3 - len(special))]
    words = [*special, *fillers, *vision, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    assert words[IMAGE_TOKEN] == image_token
    backend = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(word, special=True) for word in (*special, *vision)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<|im_end|>", "<|im_start|>", *vision],
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def make(name: str) -> tuple[Any, Any, TinyFamily, str | None]:
    """A model, its processor, its family and a template of prompts (None: the processor's, or the family's own)."""
    family = TINY[name]
    model = family.make_model(vocab_size=VOCABULARY, max_position_embeddings=2048, initializer_range=0.05)
    processor = family.make_processor()
    processor.tokenizer = make_tokenizer("<image>" if "LLaVA" in name else "<|image_pad|>")
    chat = CHATS[name]
    if chat is not None and chat.startswith("chat template"):
        processor.chat_template = CHATML if "im_end" in chat else BARE
        model.generation_config.eos_token_id = [EOS, OTHER_END]
        chat = None
    return model, processor, family, chat


def make_images(*sizes: tuple[int, int]) -> list[Image.Image]:
    """Noise of (height, width)."""
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)).convert("RGB") for size in sizes]
