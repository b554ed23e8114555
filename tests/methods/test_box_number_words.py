"""Boxes where a number of two decimals is one token: "0." is forced by the grammar, and no token of it must be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import talking_llava
from finegrain_ops.methods.box_decoding import write_boxes
from finegrain_ops.methods.box_grammar import LIST, BoxGrammar
from finegrain_ops.methods.box_vocabulary import BoxVocabulary
from finegrain_ops.methods.prompt_tree import PromptTree, token_rows

PIECES = r"[01]\.\d\d| ?[A-Za-z]+:?| \[|, |[\s\S]"
WORDS = [" [", "[", "]", ", ", *"0123456789", ".", *(f"{n / 100:.2f}" for n in range(101))]
MODEL = talking_llava.make_model()
FREE = [token for token in range(10, 400) if token != MODEL.config.image_token_id][: len(WORDS)]
IDS = dict(zip(WORDS, FREE))
GRAMMAR = BoxGrammar(LIST, (100, 100))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Words at ids of the model's vocabulary, in which everything else has no meaning here."""
    size = MODEL.get_input_embeddings().weight.shape[0]
    vocabulary = {f"<{i}>": i for i in range(size) if i not in FREE} | IDS
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<0>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(PIECES), "isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<0>", clean_up_tokenization_spaces=False)


@pytest.fixture(scope="module")
def inputs() -> dict[str, Any]:
    return dict(
        talking_llava.make_processor()(
            images=talking_llava.make_images(3),
            text=[
                f"USER: <image>\n{question} ASSISTANT:" for question in ("What?", "Which one, and why?", "Who is it?")
            ],
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
    )


def allowed_tokens(text: str) -> list[str]:
    """By trying: the words after which a box can still come."""
    state = GRAMMAR.start().after(text)
    assert state is not None
    return [word for word in WORDS if state.after(word) is not None]


@torch.no_grad()
def likeliest_box(inputs: dict[str, Any], row: int, favour: torch.Tensor) -> list[int]:
    """Token by token, each forward from scratch."""
    prompt, text, said = token_rows(inputs)[row], "", []
    while not (GRAMMAR.start().after(text)).is_complete:
        ids = torch.tensor([prompt + said])
        pixels = inputs["pixel_values"][row : row + 1]
        logits = MODEL(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels).logits[0, -1] + favour
        best = max(allowed_tokens(text), key=lambda word: float(logits[IDS[word]]))
        said.append(IDS[best])
        text += best
    return said


@pytest.mark.parametrize("favoured", ["none", "numbers", "characters"])
@pytest.mark.parametrize("jump_forward", [True, False])
def test_the_box_is_the_likeliest_by_tokens(
    tokenizer: PreTrainedTokenizerFast, inputs: dict[str, Any], favoured: str, jump_forward: bool
) -> None:
    """Also of a model that likes number words, or one that likes to spell."""
    favour = torch.zeros(MODEL.get_input_embeddings().weight.shape[0])
    for word, token in IDS.items():
        if (favoured == "numbers" and len(word) == 4) or (favoured == "characters" and len(word) == 1):
            favour[token] = 5.0
    hook = MODEL.lm_head.register_forward_hook(lambda _, __, logits: logits + favour)
    try:
        boxes = write_boxes(MODEL, inputs, BoxVocabulary(tokenizer, LIST), [GRAMMAR] * 3, jump_forward=jump_forward)
    finally:
        hook.remove()
    assert boxes == [likeliest_box(inputs, row, favour) for row in range(3)]


def test_a_number_word_takes_one_choice(
    tokenizer: PreTrainedTokenizerFast, inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lead and four numbers; brackets and commas run along, and nothing is guessed that is no word."""
    favour = torch.zeros(MODEL.get_input_embeddings().weight.shape[0])
    for word in (*(f"{n / 100:.2f}" for n in range(101)), " ["):
        favour[IDS[word]] = 50.0
    trees: list[PromptTree] = []
    build = PromptTree.__init__

    def kept(self: PromptTree, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        trees.append(self)

    monkeypatch.setattr(PromptTree, "__init__", kept)
    hook = MODEL.lm_head.register_forward_hook(lambda _, __, logits: logits + favour)
    try:
        boxes = write_boxes(MODEL, inputs, BoxVocabulary(tokenizer, LIST), [GRAMMAR] * 3)
    finally:
        hook.remove()
    assert {len(box) for box in boxes} == {9}
    (tree,) = trees
    prompts = sum(map(len, token_rows(inputs)))
    assert tree.forwards == 4
    assert tree.tokens == prompts + 3 * (1 + 2 + 2 + 2)  # " [", and three times a number with ", "
