"""Boxes written by random models: tokens and probabilities of forwards from scratch, and how much was run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import spelling_models
import talking_llava
from finegrain_ops.methods.box_decoding import BoxSpeaker, write_boxes
from finegrain_ops.methods.box_grammar import JSON, LIST, LIST_OF_THOUSANDTHS, MARKUP, BoxFormat, BoxGrammar
from finegrain_ops.methods.box_vocabulary import BoxVocabulary
from finegrain_ops.methods.decoding import speak
from finegrain_ops.methods.prompt_tree import PromptTree, positions_in_prompts, token_rows
from finegrain_ops.methods.reuse import ImagePrefix, align_after_images, images_of

FORMATS = {"list": LIST, "thousandths": LIST_OF_THOUSANDTHS, "markup": MARKUP, "json": JSON}
HIGHEST = {"list": [(100, 100)] * 3, "json": [(48, 48), (7, 90), (130, 11)]}  # of each row; 1000 elsewhere
QUESTIONS = ["What?", "Which one of these, and why?", "Who is it?"]
TOKENIZER = talking_llava.make_tokenizer()


def vocabulary(kind: str) -> BoxVocabulary:
    return BoxVocabulary(TOKENIZER, FORMATS[kind])


def grammars(kind: str) -> list[BoxGrammar]:
    return [BoxGrammar(FORMATS[kind], highest) for highest in HIGHEST.get(kind, [(1000, 1000)] * 3)]


def batch(questions: Sequence[str] = QUESTIONS, device: str = "cpu") -> dict[str, Any]:
    """Left-padded prompts of three images."""
    inputs = talking_llava.make_processor()(
        images=talking_llava.make_images(len(questions)),
        text=[f"USER: <image>\n{question} ASSISTANT:" for question in questions],
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    return {name: value.to(device) for name, value in inputs.items()}


@contextmanager
def preferring(model: Any, **by_text: float) -> Iterator[None]:
    """Adds to the logits of some tokens, wherever the model computes logits."""
    bias = torch.zeros(model.lm_head.weight.shape[0], device=model.device)
    for text, value in by_text.items():
        bias[TOKENIZER.encode(text, add_special_tokens=False)] += value
    hook = model.lm_head.register_forward_hook(lambda _, __, logits: logits + bias)
    yield
    hook.remove()


def write(model: Any, inputs: dict[str, Any], kind: str, **options: bool) -> tuple[BoxSpeaker, PromptTree]:
    """As `write_boxes`, which returns the tokens only."""
    speaker = BoxSpeaker(vocabulary(kind), grammars(kind), **options)
    prompts = [row + first for row, first in zip(token_rows(inputs), speaker.pending())]
    tree, images = PromptTree(model, len(prompts)), images_of(inputs)
    speaker.branch = tree.grow()
    opening = tree.prompt(speaker.branch, prompts, positions_in_prompts(model, prompts, images))
    speak(tree, [(opening, speaker)], images)
    return speaker, tree


@torch.no_grad()
def logits_from_scratch(model: Any, inputs: dict[str, Any], row: int, said: list[int]) -> torch.Tensor:
    """In front of each token of `said`, (N, vocabulary), of the row alone."""
    prompt = token_rows(inputs)[row]
    ids = torch.tensor([prompt + said], device=model.device)
    pixels = inputs["pixel_values"][row : row + 1]
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels).logits[0]
    return logits[len(prompt) - 1 : -1].float().cpu()


def assert_best(model: Any, inputs: dict[str, Any], speaker: BoxSpeaker, kind: str) -> None:
    letters = {text: TOKENIZER.encode(text, add_special_tokens=False)[0] for text in map(chr, range(32, 127))}
    for row, grammar in enumerate(grammars(kind)):
        said, state = speaker.said[row], grammar.start()
        logits = logits_from_scratch(model, inputs, row, said)
        for k, (token, of_step) in enumerate(zip(said, logits)):
            allowed = {letters[character]: character for character in state.next_characters()}
            assert token == max(allowed, key=lambda option: of_step[option])
            heard = speaker.log_probabilities[row][k]
            if heard is not None:
                assert heard == pytest.approx(float(of_step.log_softmax(0)[token]), abs=5e-5)
            state = state.after(allowed[token])
        assert state.is_complete
        assert None not in speaker.log_probabilities[row][: len(said) - len(speaker.unfed[row]) + 1]


@pytest.mark.parametrize("kind", FORMATS)
def test_without_log_probabilities_the_head_computes_no_logits_but_of_options(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs, forward, sizes = talking_llava.make_model(), batch(), torch.nn.functional.linear, []

    def counted(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        sizes.append(len(weight))
        return forward(hidden, weight, bias)

    expected = write(model, inputs, kind)[0]
    monkeypatch.setattr(torch.nn.functional, "linear", counted)
    speaker, _ = write(model, inputs, kind, with_log_probabilities=False)
    vocabulary_size = len(model.lm_head.weight)
    assert vocabulary_size not in sizes
    assert any(size < vocabulary_size / 4 for size in sizes)
    assert (speaker.said, speaker.unfed, speaker.texts) == (expected.said, expected.unfed, expected.texts)
    assert {heard for row in speaker.log_probabilities for heard in row} == {None}


@pytest.mark.parametrize("change", ["none", "bias", "hook", "pre-hook", "method", "class"])
def test_logits_of_some_tokens_are_those_of_the_head_whatever_it_is(change: str) -> None:
    model = talking_llava.make_model()
    head = model.lm_head
    if change == "bias":
        head.bias = torch.nn.Parameter(torch.linspace(-1, 1, head.out_features))
    elif change == "hook":
        head.register_forward_hook(lambda _, __, logits: logits.tanh())
    elif change == "pre-hook":
        head.register_forward_pre_hook(lambda _, arguments: (2 * arguments[0],))
    elif change == "method":
        head.forward = lambda hidden: hidden @ head.weight.T.cos()
    elif change == "class":
        model.lm_head = torch.nn.Sequential(head, torch.nn.Tanh())
    tree, hidden = PromptTree(model, 1), torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([7, 250, 7, 0])
    torch.testing.assert_close(tree.logits(hidden, tokens), model.lm_head(hidden)[..., tokens].detach())


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", FORMATS)
def test_the_box_is_that_of_forwards_from_scratch(kind: str, seed: int, device: str) -> None:
    model, inputs = talking_llava.make_model(seed).to(device), batch(device=device)
    speaker, tree = write(model, inputs, kind)
    assert_best(model, inputs, speaker, kind)
    slow, slow_tree = write(model, inputs, kind, jump_forward=False)
    assert slow.said == speaker.said
    assert_best(model, inputs, slow, kind)
    assert slow_tree.forwards == max(map(len, slow.said))
    assert tree.forwards < slow_tree.forwards
    if seed == 0:
        assert write_boxes(model, inputs, vocabulary(kind), grammars(kind)) == speaker.said


PREFERENCES = {
    "no space, 1 after 0": {"[": 60.0, "1": 60.0},
    "space, 1": {" ": 60.0, "1": 60.0},
    "9": {"9": 60.0},
    "0, then 1.00": {"0": 20.0, "1": 25.0},
    "0, or else 1": {"0": 60.0, " ": 60.0, "1": 30.0},
}


@pytest.mark.parametrize("preference", PREFERENCES)
@pytest.mark.parametrize("kind", ["list", "thousandths"])
def test_guesses_taken_back_leave_no_trace(kind: str, preference: str) -> None:
    model, inputs = talking_llava.make_model(), batch()
    with preferring(model, **PREFERENCES[preference]):
        speaker, tree = write(model, inputs, kind)
        assert_best(model, inputs, speaker, kind)
        if preference == "no space, 1 after 0" and kind == "list":
            assert speaker.texts == ["[0.11, 0.11, 1.00, 1.00]"] * 3
            assert tree.forwards == 7  # the space taken back, 4 digits, two guesses of 0 taken back
        if preference == "9":
            assert all(text.lstrip().startswith("[0.99") for text in speaker.texts)
        if preference == "0, or else 1" and kind == "list":
            assert speaker.texts == [" [0.00, 0.00, 0.01, 0.01]"] * 3
            assert tree.forwards == 8
        # What the cache holds of each row is what was said and run, after its prompt.
        for row, prompt in enumerate(token_rows(inputs)):
            seen = int((tree._branch[row] == speaker.branch).sum())
            assert seen == len(prompt) + len(speaker.said[row]) - len(speaker.unfed[row])


def test_a_list_of_hundredths_takes_eight_choices() -> None:
    model, inputs = talking_llava.make_model(), batch()
    for space in (60.0, -60.0):
        with preferring(model, **{" ": space, "1": -60.0}):
            speaker, tree = write(model, inputs, "list")
            _, slow = write(model, inputs, "list", jump_forward=False)
        assert not any("1" in text for text in speaker.texts)
        assert tree.forwards <= (8 if space > 0 else 9)
        assert 2 * tree.forwards <= slow.forwards


@pytest.mark.parametrize("kind", FORMATS)
def test_from_a_prefix_only_what_follows_it_is_run(kind: str) -> None:
    model = talking_llava.make_model(1)
    inputs = align_after_images(batch(), model)
    others = align_after_images(batch([f"{question} Really?" for question in QUESTIONS]), model)
    prefix = ImagePrefix.prefill(model, others)
    before = [(keys.clone(), values.clone()) for keys, values in prefix.states]
    widths: list[int] = []
    hook = model.model.language_model.norm.register_forward_hook(lambda _, __, out: widths.append(out.shape[1]))
    said = write_boxes(model, inputs, vocabulary(kind), grammars(kind), prefix)
    of_prefix, widths[:] = widths.copy(), []
    assert said == write_boxes(model, inputs, vocabulary(kind), grammars(kind))
    hook.remove()
    # Both first runs hold the tokens that are forced at once, or guessed; a prefix's columns of padding are gone.
    first = len(BoxSpeaker(vocabulary(kind), grammars(kind)).pending()[0])
    after = [row[prefix.length - int((1 - mask).sum()) :] for row, mask in zip(token_rows(inputs), prefix.mask.int())]
    assert of_prefix[0] == max(map(len, after)) + first
    assert widths[0] == max(map(len, token_rows(inputs))) + first
    assert of_prefix[1:] == widths[1:]
    for (keys, values), (old_keys, old_values) in zip(prefix.states, before):
        assert torch.equal(keys, old_keys)
        assert torch.equal(values, old_values)


@pytest.mark.parametrize("written", [MARKUP, LIST])
def test_special_tokens_of_the_markup(written: BoxFormat) -> None:
    family = "Qwen2-VL"
    model, processor = spelling_models.make_model(family), spelling_models.make_processor(family)
    inputs = processor(
        images=spelling_models.make_images(2),
        text=[f"[user]<|vision_start|><|image_pad|><|vision_end|>{text}[assistant]" for text in ("What?", "Why so?")],
        padding=True,
        return_tensors="pt",
    )
    units = 1000 if written is MARKUP else 100
    of_rows = [BoxGrammar(written, (units, units))] * 2
    tokenizer = processor.tokenizer
    said = write_boxes(model, inputs, BoxVocabulary(tokenizer, written), of_rows)
    assert said == write_boxes(model, inputs, BoxVocabulary(tokenizer, written), of_rows, jump_forward=False)
    for row in said:
        text = tokenizer.decode(row, skip_special_tokens=False)
        assert of_rows[0].start().after(text).is_complete
        if written is MARKUP:
            assert tokenizer.convert_ids_to_tokens([row[0], row[-1]]) == ["<|box_start|>", "<|box_end|>"]
            assert len(row) == len(text) - len("<|box_start|><|box_end|>") + 2
