"""The tiny models of every family whose prompts hold images, with a tokenizer that spells any text byte by byte."""

from __future__ import annotations

from typing import Any

import numpy as np
import transformers
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from tiny_models import IMAGE_TOKEN, TINY

PAD, BOS, EOS = 0, 1, 2
FAMILIES = tuple(TINY)


def make_tokenizer(image_token: str) -> transformers.PreTrainedTokenizerFast:
    """The special tokens have the ids that the tiny models' configurations give them."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "<s>", "</s>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>", image_token]
    special += ["<|box_start|>", "<|box_end|>"]
    words = [*special[:3], *letters[: IMAGE_TOKEN - 6], *special[3:7], *letters[IMAGE_TOKEN - 6 :], *special[7:]]
    assert words[IMAGE_TOKEN] == image_token
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in special])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=special[3:],
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def make_processor(family: str) -> Any:
    processor = TINY[family].make_processor()
    processor.tokenizer = make_tokenizer("<image>" if family.startswith("LLaVA") else "<|image_pad|>")
    image = TINY[family].prompt_of_image
    processor.chat_template = (
        "{% for message in messages %}[{{ message['role'] }}]{% for part in message['content'] %}"
        f"{{% if part['type'] == 'image' %}}{image}{{% else %}}{{{{ part['text'] }}}}{{% endif %}}{{% endfor %}}"
        "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    return processor


def make_model(family: str, attn_implementation: str = "sdpa", **text: Any) -> Any:
    options = {"vocab_size": len(make_tokenizer("<image>")), "max_position_embeddings": 2048, **text}
    model = TINY[family].make_model(attn_implementation, **options)
    model.generation_config.eos_token_id = EOS
    return model


def make_images(count: int = 3) -> list[Image.Image]:
    """Of different sizes and shapes."""
    generator = np.random.default_rng(0)
    sizes = [(60, 80), (100, 50), (48, 48)]  # height, width
    return [Image.fromarray(generator.integers(0, 256, (*sizes[i % 3], 3), dtype=np.uint8)) for i in range(count)]
