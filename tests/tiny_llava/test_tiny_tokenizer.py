"""The small model's words: every text of the project's methods and questions comes back as it was, and boxes are
short.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from finegrain_ops import DualFocus
from finegrain_ops.boxes import parse_boxes
from finegrain_ops.methods.dualfocus import BOX_PROMPT, COMBINE_PROMPT
from finegrain_ops.methods.grounding import GROUNDING_PROMPT
from finegrain_ops.methods.prompting import Prompter
from finegrain_ops.tiny_llava.questions import NUMBERS
from finegrain_ops.tiny_llava.scenes import COLOURS, LETTERS, SHAPES, draw_scene
from finegrain_ops.tiny_llava.tokenizer import (
    IMAGE_SIDE,
    IMAGE_TOKENS,
    PHRASES,
    make_processor,
    make_tokenizer,
    unknown_words,
    vocabulary,
)

PROMPTS = {"question": "{question}", "box": BOX_PROMPT, "combine": COMBINE_PROMPT, "grounding": GROUNDING_PROMPT}
QUESTIONS = [
    "How many cards are there?",
    "Which cards are there?",
    "What colour is the leftmost card?",
    *(f"What colour is the {shape}?" for shape in SHAPES),
    *(f"What shape is the {colour} card?" for colour in COLOURS),
    *(f"Which letter is on the {colour} card?" for colour in COLOURS),
    *(f"What colour is the dot on the {colour} card?" for colour in COLOURS),
    *(f"Is the {a} card left of the {b} card?" for a, b in itertools.permutations(COLOURS, 2)),
]
WORDS = [*COLOURS, *SHAPES, *LETTERS, *NUMBERS.values(), "yes", "no"]
BOX = "[0.20, 0.41, 0.37, 0.74]"
numbers = st.integers(0, 100).map(lambda hundredths: f"{hundredths / 100:.2f}")


def ids_of(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def comes_back(tokenizer, text: str) -> bool:
    ids = ids_of(tokenizer, text)
    return tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == text


@pytest.mark.parametrize("prompt", PROMPTS)
def test_questions_come_back(prompt: str, tokenizer) -> None:
    for question in QUESTIONS:
        asked = PROMPTS[prompt].replace("{question}", question)
        for text in (asked, f"USER: <image>\n{asked} ASSISTANT:", f"USER: <image>\n{asked} ASSISTANT: red</s>"):
            assert comes_back(tokenizer, text), text


@pytest.mark.parametrize("word", WORDS)
def test_an_answer_is_one_token(word: str, tokenizer) -> None:
    assert comes_back(tokenizer, f" {word}")
    assert len(ids_of(tokenizer, f" {word}")) == 1
    assert len(ids_of(tokenizer, f" ASSISTANT: {word}</s>")) == 3


@pytest.mark.parametrize("prompt", ["box", "combine", "grounding"])
def test_what_the_methods_ask_with_is_one_token(prompt: str, tokenizer) -> None:
    asked = PROMPTS[prompt].replace("{question}", "What colour is the circle?")
    alone = ids_of(tokenizer, "What colour is the circle?")
    ids = ids_of(tokenizer, asked)
    assert len(ids) == len(alone) + 1
    assert ids[-len(alone) :] == alone or ids[: len(alone)] == alone


@given(st.lists(numbers, min_size=4, max_size=4))
@settings(max_examples=60, deadline=None)
def test_a_box_has_nine_tokens(of_box: list[str]) -> None:
    tokenizer = make_tokenizer()
    text = f" [{', '.join(of_box)}]"
    assert comes_back(tokenizer, text)
    assert [tokenizer.decode([token]) for token in ids_of(tokenizer, text)] == [
        *(" [", of_box[0], ", ", of_box[1], ", "),
        *(of_box[2], ", ", of_box[3], "]"),
    ]


def test_the_box_of_the_paper(tokenizer) -> None:
    for text in (f" {BOX}", BOX):
        assert len(ids_of(tokenizer, text)) == 9
        assert comes_back(tokenizer, text)
    (box,) = parse_boxes(tokenizer.decode(ids_of(tokenizer, f" {BOX}")), image_size=(100, 100), convention="unit")
    assert box == pytest.approx((20, 41, 37, 74))


def test_ids_are_the_vocabularys(tokenizer) -> None:
    words = vocabulary()
    assert len(set(words)) == len(words) == len(tokenizer)
    assert tokenizer.convert_ids_to_tokens(list(range(len(words)))) == words
    assert words.count("<image>") == 1
    special = [tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token]
    assert special == ["<pad>", "<s>", "</s>", "<unk>"]
    assert all(phrase in words for phrase in PHRASES)


def test_texts_begin_with_the_beginning_once_and_are_padded_on_the_left(tokenizer) -> None:
    short, long = tokenizer(["Is", "Is the red card left of the blue card?"], padding=True)["input_ids"]
    pad, bos = tokenizer.pad_token_id, tokenizer.bos_token_id
    assert short == [pad] * (len(long) - 2) + [bos, *ids_of(tokenizer, "Is")]
    assert long == [bos, *ids_of(tokenizer, "Is the red card left of the blue card?")]
    assert tokenizer.decode(long, skip_special_tokens=True) == "Is the red card left of the blue card?"


def test_unknown_words(tokenizer) -> None:
    assert unknown_words(tokenizer, "What colour is the zebra on a hovercraft?") == ["zebra", "hovercraft"]
    assert unknown_words(tokenizer, "What colour is the cross?") == []
    assert tokenizer.unk_token_id in ids_of(tokenizer, "What colour is the zebra?")


def test_saved_and_loaded_it_is_the_same(tokenizer, tmp_path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    texts = [
        f"USER: <image>\n{prompt.replace('{question}', QUESTIONS[0])} ASSISTANT: {BOX}</s>"
        for prompt in PROMPTS.values()
    ]
    for text in (*texts, "What colour is the zebra?"):
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
        ids = ids_of(tokenizer, text)
        assert loaded.decode(ids) == tokenizer.decode(ids)
    assert loaded(["Is", texts[0]], padding=True)["input_ids"] == tokenizer(["Is", texts[0]], padding=True)["input_ids"]
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert (loaded.pad_token_id, loaded.bos_token_id, loaded.eos_token_id, loaded.unk_token_id) == (0, 1, 2, 3)


# --- with the model ---


def test_the_model_has_these_words(model, tokenizer) -> None:
    text = model.config.text_config
    assert text.vocab_size == len(tokenizer) == model.get_output_embeddings().weight.shape[0]
    assert (text.pad_token_id, text.bos_token_id, text.eos_token_id) == (
        tokenizer.pad_token_id,
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
    )
    assert model.config.image_token_id == tokenizer.convert_tokens_to_ids("<image>")


def test_an_image_has_as_many_tokens_as_features(model, processor) -> None:
    inputs = processor(images=[Image.new("RGB", (300, 300))], text="USER: <image>\nIs", return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == IMAGE_TOKENS == 64
    assert inputs["pixel_values"].shape == (1, 3, IMAGE_SIDE, IMAGE_SIDE)
    model(**inputs)  # counts them


def test_nothing_of_an_image_is_cut_off(processor) -> None:
    """A picture that is not square is squashed: its edges are still there."""
    pixels = np.zeros((60, 200, 3), np.uint8)
    pixels[:, :20] = pixels[:, -20:] = 255
    made = processor.image_processor(images=[Image.fromarray(pixels)], return_tensors="pt")["pixel_values"][0]
    assert made.shape == (3, IMAGE_SIDE, IMAGE_SIDE)
    assert made[:, :, 0].min() == made[:, :, -1].max() == 2.0  # white is (1 - 0.5) / 0.25
    assert made[:, :, 50].max() == -2.0


def test_an_untrained_model_writes_boxes(model, processor) -> None:
    """By the grammar: each is the text of its tokens, and in the scene."""
    scenes = [draw_scene(seed) for seed in range(3)]
    images = [scene.image for scene in scenes]
    method = DualFocus(model, processor)
    for scene, result in zip(scenes, method.answer_batch(images, QUESTIONS[:3], max_new_tokens=2)):
        (box,) = parse_boxes(result.grounding_text, image_size=scene.size, convention="unit")
        assert result.box == box
        height, width = scene.size
        assert 0 <= box[0] < box[2] <= width
        assert 0 <= box[1] < box[3] <= height
        assert len(ids_of(processor.tokenizer, f" {result.grounding_text}")) == 9
        assert result.micro is not None


def test_prompts_are_the_familys_plain_format(model) -> None:
    tokenizer = make_tokenizer()
    prompter = Prompter(model, make_processor(tokenizer))
    (text,) = prompter.texts([None], ["Is the red card left of the blue card?"])
    (inputs,) = prompter.encode([Image.new("RGB", (50, 50))], [text])
    ids = inputs["input_ids"][0].tolist()
    start = ids_of(tokenizer, "USER: ")
    image = [model.config.image_token_id] * IMAGE_TOKENS
    rest = ids_of(tokenizer, "\nIs the red card left of the blue card? ASSISTANT:")
    assert ids == [tokenizer.bos_token_id, *start, *image, *rest]
    assert tokenizer.unk_token_id not in ids
