"""The words of the small model, as a tokenizer of transformers, and its processor.

A token is a word with the space before it, as it is written: decoding joins tokens with nothing between them. Numbers
of two decimals are a word each, and so is each sentence that the methods ask for a box or for the details with.
"""

from __future__ import annotations

import importlib
from itertools import chain
from typing import Any

import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlavaProcessor, PreTrainedTokenizerFast

from ..methods.dualfocus import BOX_PROMPT, COMBINE_PROMPT
from ..methods.grounding import GROUNDING_PROMPT
from .questions import NUMBERS
from .scenes import COLOURS, LETTERS, SHAPES

IMAGE_SIDE, PATCH_SIZE = 112, 14
IMAGE_TOKENS = (IMAGE_SIDE // PATCH_SIZE) ** 2
IMAGE_MEAN, IMAGE_STD = 0.5, 0.25

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
PHRASES = tuple(prompt.replace("{question}", "") for prompt in (BOX_PROMPT, COMBINE_PROMPT, GROUNDING_PROMPT))
NUMBER_WORDS = tuple(f"{hundredths / 100:.2f}" for hundredths in range(101))

_FRAME = ("USER:", " ASSISTANT:", " ", "\n", "?", ".", ",", ":")
_QUESTION_WORDS = ("What", "Which", "How", "Is")
_WORDS = ("a", "is", "are", "the", "on", "of", "many", "there", "left", "leftmost", "card", "cards", "colour", "shape")
_MORE_WORDS = ("letter", "dot", "yes", "no")
_BOX = (" [", "[", "]", ", ", *"0123456789", "0.", "1.")

# A word with its space, a number of two decimals, or what is left, character by character.
_PIECES = r"[01]\.\d\d| ?[A-Za-z]+:?| \[|, |[\s\S]"


def vocabulary() -> list[str]:
    """Every token, by its id."""
    spaced = (*_WORDS, *_MORE_WORDS, *COLOURS, *SHAPES, *NUMBERS.values(), *LETTERS)
    words = chain(SPECIAL, PHRASES, _FRAME, _QUESTION_WORDS, (f" {word}" for word in spaced), _BOX, NUMBER_WORDS)
    return list(dict.fromkeys(words))


def make_tokenizer() -> PreTrainedTokenizerFast:
    ids = {word: i for i, word in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_PIECES), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", ids["<s>"])]
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
    made.add_tokens([AddedToken(phrase, normalized=False) for phrase in PHRASES])
    return made


def unknown_words(tokenizer: Any, text: str) -> list[str]:
    """The pieces of a text that the model has no word for."""
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    known = tokenizer.get_vocab()
    return [piece.strip() for piece, _ in pieces if piece not in known]


def make_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Images are squashed to 112 x 112: scenes are square, and of crops nothing is cut off."""
    side = {"height": IMAGE_SIDE, "width": IMAGE_SIDE}
    image_processor = clip_image_processor_class()(
        size=side,
        crop_size=side,
        do_center_crop=False,
        resample=3,  # bicubic
        image_mean=[IMAGE_MEAN] * 3,
        image_std=[IMAGE_STD] * 3,
    )
    return llava_processor(tokenizer, image_processor)


def llava_processor(tokenizer: PreTrainedTokenizerFast, image_processor: Any) -> LlavaProcessor:
    """Of a LLaVA-1.5 whose patches have 14 pixels."""
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def clip_image_processor_class() -> Any:
    """CLIP's image processor on Pillow, which later versions of transformers keep under a name of its own (the other
    wants torchvision).
    """
    try:
        return importlib.import_module("transformers.models.clip.image_processing_pil_clip").CLIPImageProcessorPil
    except ModuleNotFoundError:
        return transformers.CLIPImageProcessor
