"""Texts of a tree against `generate` and forwards from scratch: all that says how to choose and when to end."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import transformers

import spelling_models
import talking_llava
from finegrain_ops import UnsupportedInputError
from finegrain_ops.methods.decoding import Reciter, TextSpeaker, rules_of, speak
from finegrain_ops.methods.generation import end_tokens
from finegrain_ops.methods.perplexity import perplexity_of
from finegrain_ops.methods.prompt_tree import PromptTree, left_padded, positions_in_prompts, token_rows
from finegrain_ops.methods.reuse import images_of

QUESTIONS = ["What?", "Which one of these, and why?", "Who is it?"]
TWELVE = {"max_new_tokens": 12}
TOKENIZER = talking_llava.make_tokenizer()


@pytest.fixture(scope="module")
def model() -> Any:
    return talking_llava.make_model()


@pytest.fixture(scope="module")
def inputs() -> dict[str, Any]:
    return batch()


def batch(count: int = 3, device: str = "cpu") -> dict[str, Any]:
    """Left-padded prompts of images."""
    encoded = talking_llava.make_processor()(
        images=talking_llava.make_images(count),
        text=[f"USER: <image>\n{question} ASSISTANT:" for question in QUESTIONS[:count]],
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    return {name: value.to(device) for name, value in encoded.items()}


def opened(model: Any, inputs: dict[str, Any], trunk_only: bool = False) -> tuple[PromptTree, int, list[list[int]]]:
    """A tree whose trunk is the prompts without their last tokens, which are returned."""
    rows, images = token_rows(inputs), images_of(inputs)
    tree = PromptTree(model, len(rows))
    trunk = tree.grow()
    positions = [of_row[..., :-1] for of_row in positions_in_prompts(model, rows, images)]
    speak(tree, [(tree.prompt(trunk, [row[:-1] for row in rows], positions), None)], images)
    return tree, trunk, [row[-1:] for row in rows]


def text_speaker(model: Any, inputs: dict[str, Any], branch: int, **settings: Any) -> TextSpeaker:
    pad = end_tokens(model, settings)["pad_token_id"]
    ids, mask = left_padded(token_rows(inputs), pad, model.device)
    return TextSpeaker(rules_of(model, ids, mask, settings, TWELVE), ids, pad, branch)


def tree_says(model: Any, inputs: dict[str, Any], **settings: Any) -> tuple[TextSpeaker, PromptTree]:
    tree, branch, last = opened(model, inputs)
    speaker = text_speaker(model, inputs, branch, **settings)
    speak(tree, [(tree.text(branch, last), speaker)])
    return speaker, tree


def generate_says(model: Any, inputs: dict[str, Any], **settings: Any) -> list[list[int]]:
    """Each row with the token that ends it."""
    options = {**TWELVE, **settings}
    if "generation_config" in settings:
        options.pop("max_new_tokens")
    elif "do_sample" not in settings:
        options["do_sample"] = False
        given = options.get("logits_processor", [])
        options["logits_processor"] = transformers.LogitsProcessorList([*given, NoImage()])
    output = model.generate(**inputs, **options)
    ends = end_tokens(model, settings)["eos_token_id"]
    ends = ends if isinstance(ends, (list, tuple)) else [ends]
    rows = []
    for row in output[:, inputs["input_ids"].shape[1] :].tolist():
        end = next((k for k, token in enumerate(row) if token in ends), len(row))
        rows.append(row[: end + 1])
    return rows


def plain(model: Any, inputs: dict[str, Any]) -> list[list[int]]:
    rows = generate_says(model, inputs)
    assert all(len(row) == 12 for row in rows)
    return rows


class NoImage(transformers.LogitsProcessor):
    """What a TextSpeaker never says."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.index_fill(1, torch.tensor([talking_llava.IMAGE]), float("-inf"))


class Favour(transformers.LogitsProcessor):
    """Depends on all tokens so far, and writes into the scores as processors may."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[torch.arange(len(scores)), 4 + (input_ids.sum(1) * 7) % (scores.shape[1] - 4)] += 3.0
        return scores


class Recorder(transformers.LogitsProcessor):
    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.seen.append(input_ids.clone())
        return scores


class EndAfter(transformers.StoppingCriteria):
    """Ends each row after a token of its own."""

    def __init__(self, tokens: list[int], start: int) -> None:
        self.tokens, self.start = torch.tensor(tokens), start

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return (input_ids[:, self.start :] == self.tokens[:, None]).any(1)


SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "longer": {"max_new_tokens": 70},
    "one token": {"max_new_tokens": 1},
    "repetition_penalty": {"repetition_penalty": 1.6},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2, "max_new_tokens": 30},
    "suppress_tokens": {"suppress_tokens": [*range(100), 150]},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(130))},
    "bad_words_ids": {"bad_words_ids": [[k] for k in range(4, 130)]},
    "sequence_bias": {"sequence_bias": {(77,): 4.0, (78, 79): 9.0}},
    "forced_eos_token_id": {"forced_eos_token_id": 2},
    "exponential_decay": {"exponential_decay_length_penalty": (2, 2.0)},
    "logits_processor": {"logits_processor": [Favour()]},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_it_chooses_as_generate_does(model, inputs, name: str) -> None:
    settings = dict(SETTINGS[name])
    if "logits_processor" in settings:
        settings["logits_processor"] = transformers.LogitsProcessorList(settings["logits_processor"])
    expected = generate_says(model, inputs, **settings)
    speaker, tree = tree_says(model, inputs, **settings)
    assert speaker.said == expected
    assert (expected != plain(model, inputs)) == (name != "greedy"), "the setting does nothing"
    assert tree.forwards == 1 + max(map(len, expected))
    assert speaker.unfed == [row[-1:] for row in expected]


def test_rows_end_at_different_steps(model, inputs) -> None:
    first = plain(model, inputs)
    ends = [first[0][2], first[1][5], first[2][8]]
    settings = {"eos_token_id": ends, "pad_token_id": 9}
    expected = generate_says(model, inputs, **settings)
    speaker, tree = tree_says(model, inputs, **settings)
    assert speaker.said == expected
    assert len(set(map(len, expected))) > 1
    assert tree.forwards == 1 + max(map(len, expected))
    assert tree.tokens == sum(map(len, token_rows(inputs))) + sum(len(row) - 1 for row in expected)
    settings["min_new_tokens"] = 7
    later = generate_says(model, inputs, **settings)
    assert min(map(len, later)) > 7
    assert tree_says(model, inputs, **settings)[0].said == later


def test_processors_see_what_they_see_in_generate(model, inputs) -> None:
    """Also the rows that have ended, and the image tokens of the prompt."""
    first = plain(model, inputs)
    recorders = Recorder(), Recorder()
    for recorder, run in zip(recorders, (generate_says, tree_says)):
        settings = {"eos_token_id": [first[0][2], first[1][5]], "pad_token_id": 7}
        run(model, inputs, **settings, logits_processor=transformers.LogitsProcessorList([recorder]))
    seen = [recorder.seen for recorder in recorders]
    assert len(seen[0]) == len(seen[1]) > 1
    start = inputs["input_ids"].shape[1]
    for of_generate, ours in zip(*seen):
        is_padding = inputs["attention_mask"] == 0  # whatever the processor fills it with
        assert torch.equal(of_generate[:, :start].masked_fill(is_padding, 7), ours[:, :start])
        assert torch.equal(of_generate[:, start:], ours[:, start:])
    assert bool((ours[:, start:] == 7).any())


def test_greedy_where_nothing_is_said(inputs) -> None:
    model = talking_llava.make_model()
    greedy = plain(model, inputs)
    model.generation_config.update(do_sample=True, temperature=3.0)
    assert tree_says(model, inputs)[0].said == greedy


def test_stopping_criteria_of_each_row(model, inputs) -> None:
    first = plain(model, inputs)
    tokens = [first[0][3], first[1][6], 255]
    start = inputs["input_ids"].shape[1]
    expected = [row[: row.index(token) + 1] if token in row else row for row, token in zip(first, tokens)]
    speaker, _ = tree_says(
        model, inputs, stopping_criteria=transformers.StoppingCriteriaList([EndAfter(tokens, start)])
    )
    assert speaker.said == expected
    assert len(set(map(len, expected))) > 1
    letters = {token for row in first for token in row[1:-1] if TOKENIZER.decode([token]).strip().isascii()}
    end = min(letters)
    word = TOKENIZER.decode([end])
    speaker, _ = tree_says(model, inputs, stop_strings=[word], tokenizer=TOKENIZER)
    assert speaker.said == [row[: row.index(end) + 1] if end in row else row for row in first]
    assert min(map(len, speaker.said)) < 12
    generated = model.generate(**inputs, **TWELVE, do_sample=False, stop_strings=[word], tokenizer=TOKENIZER)
    for row, of_generate in zip(speaker.said, generated[:, start:].tolist()):
        assert row == of_generate[: len(row)]
    with pytest.raises(ValueError, match="stop strings"):
        tree_says(model, inputs, stop_strings=[word])


def test_a_generation_config_says_everything(model, inputs) -> None:
    config = transformers.GenerationConfig(
        max_new_tokens=20, repetition_penalty=1.4, eos_token_id=2, pad_token_id=0, do_sample=False
    )
    speaker, _ = tree_says(model, inputs, generation_config=config)
    assert speaker.said == generate_says(model, inputs, generation_config=copy.deepcopy(config))
    assert max(map(len, speaker.said)) == 20
    length = inputs["input_ids"].shape[1]
    assert max(map(len, tree_says(model, inputs, max_length=length + 5)[0].said)) == 5


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 1.7}, {"temperature": 2.0, "top_k": 5}, {"top_p": 0.8}, {"temperature": 0.9, "min_p": 0.05}],
    ids=str,
)
def test_samples_are_generates(model, inputs, settings: dict) -> None:
    settings = {**settings, "suppress_tokens": [talking_llava.IMAGE]}
    for seed in range(3):
        torch.manual_seed(seed)
        expected = generate_says(model, inputs, do_sample=True, **settings)
        torch.manual_seed(seed)
        speaker, _ = tree_says(model, inputs, do_sample=True, **settings)
        assert speaker.said == expected
    assert expected != plain(model, inputs)


@pytest.mark.parametrize(
    "settings",
    [{}, {"repetition_penalty": 1.6}, {"logits_processor": [Favour()]}],
    ids=["plain", "repetition_penalty", "logits_processor"],
)
def test_log_probabilities_are_the_models_own(model, inputs, settings: dict) -> None:
    """Not those of the processed scores, even where a processor changes them in place."""
    speaker, _ = tree_says(model, inputs, **settings)
    for row, prompt in enumerate(token_rows(inputs)):
        said = speaker.said[row]
        ids = torch.tensor([prompt + said])
        with torch.no_grad():
            logits = model(
                input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=inputs["pixel_values"][row : row + 1]
            ).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1)[range(len(said)), said]
        torch.testing.assert_close(torch.tensor(speaker.log_probabilities[row]), expected, rtol=0, atol=5e-5)


def test_two_texts_share_the_runs(model, inputs) -> None:
    tree, trunk, last = opened(model, inputs)
    branches = [tree.grow(trunk) for _ in range(2)]
    long, short = (
        text_speaker(model, inputs, branch, **settings)
        for branch, settings in zip(branches, ({}, {"repetition_penalty": 1.6, "max_new_tokens": 5}))
    )
    speak(tree, [(tree.text(branch, last), speaker) for branch, speaker in zip(branches, (long, short))])
    assert long.said == plain(model, inputs)
    assert short.said == generate_says(model, inputs, repetition_penalty=1.6, max_new_tokens=5)
    assert tree.forwards == 1 + 12


def test_on_a_device(device: str) -> None:
    model, inputs = talking_llava.make_model(1).to(device), batch(device=device)
    for settings in ({}, {"repetition_penalty": 1.6}):
        assert tree_says(model, inputs, **settings)[0].said == generate_says(model, inputs, **settings)


# --- what is recited --------------------------------------------------------------------------------------------------


def test_what_is_recited_is_heard(model, inputs) -> None:
    said = [[20, 21, 22], [], [30]]
    tree, trunk, last = opened(model, inputs)
    reciter = Reciter(said, trunk)
    rows = [end + row[:-1] for end, row in zip(last, said)]
    speak(tree, [(tree.text(trunk, rows), reciter)])
    assert tree.forwards == 2
    assert reciter.said == said
    assert reciter.unfed == [[22], [], [30]]
    assert reciter.num_heard == 3
    for row, prompt in enumerate(token_rows(inputs)):
        ids = torch.tensor([prompt + said[row]])
        with torch.no_grad():
            logits = model(
                input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=inputs["pixel_values"][row : row + 1]
            ).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1)[range(len(said[row])), said[row]]
        torch.testing.assert_close(torch.tensor(reciter.log_probabilities[row]), expected, rtol=0, atol=5e-5)


def test_perplexities() -> None:
    assert perplexity_of([math.log(0.5), math.log(0.125)]) == pytest.approx(4.0)
    assert perplexity_of([0.0]) == 1.0
    assert math.isnan(perplexity_of([]))
    assert math.isnan(perplexity_of([math.nan, -1.0]))
    assert perplexity_of([-math.inf, -1.0]) == math.inf
    assert perplexity_of([-800.0]) == math.inf  # beyond the largest float


# --- what generate is asked -------------------------------------------------------------------------------------------

SEVERAL = {
    "beams": {"num_beams": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "guidance": {"guidance_scale": 1.5},
    "contrastive search": {"penalty_alpha": 0.6, "top_k": 4},
    "DoLa": {"dola_layers": "low"},
    "early exit": {"assistant_early_exit": 1},
}


def asked(model: Any, inputs: dict[str, Any], **settings: Any) -> Any:
    ids, mask = left_padded(token_rows(inputs), 0, model.device)
    return rules_of(model, ids, mask, settings, TWELVE)


@pytest.mark.parametrize("name", SEVERAL)
def test_several_tokens_or_hypotheses_at_once_are_refused(model, inputs, name: str) -> None:
    with pytest.raises(UnsupportedInputError, match="generation: expected greedy search or sampling"):
        asked(model, inputs, **SEVERAL[name])


def test_what_generate_would_drop_is_refused(model, inputs) -> None:
    """transformers forgets these where it does not decode itself."""
    streamer = transformers.TextStreamer(TOKENIZER)
    for name, value in {"assistant_model": talking_llava.make_model(1), "streamer": streamer}.items():
        with pytest.raises(UnsupportedInputError, match=f"{name}: expected none"):
            asked(model, inputs, **{name: value})
        asked(model, inputs, **{name: None})


@pytest.mark.parametrize("settings", [{"nonsense": 1}, {"max_new_tokens": 0}, {"temperature": -1.0, "do_sample": True}])
def test_what_generate_refuses_is_refused(model, inputs, settings: dict) -> None:
    with pytest.raises(ValueError) as of_generate:
        model.generate(**inputs, **settings)
    with pytest.raises(ValueError) as ours:
        asked(model, inputs, **settings)
    assert str(ours.value) == str(of_generate.value)


@pytest.mark.parametrize("family", spelling_models.FAMILIES)
def test_the_model_is_not_run_and_stays_as_it_was(family: str, monkeypatch) -> None:
    model = spelling_models.make_model(family)
    image = model.config.image_token_id
    ids = torch.tensor([[1, *[image] * 4, 20, 21], [0, 0, 1, *[image] * 3, 22]])
    mask = (ids != 0).long()
    calls = talking_llava.count_calls(monkeypatch, model)
    before = [(name, {**vars(part)}) for name, part in model.named_modules()]
    config, generation_config = model.config.to_dict(), model.generation_config.to_dict()
    asked_ids = ids.clone()
    rules = rules_of(model, asked_ids, mask, {"repetition_penalty": 1.2}, TWELVE)
    rules_of(model, asked_ids, mask, {"do_sample": True, "temperature": 0.5}, TWELVE)
    assert not calls
    assert torch.equal(asked_ids, ids)
    assert not rules.is_sampling
    assert (model.config.to_dict(), model.generation_config.to_dict()) == (config, generation_config)
    for (name, attributes), (same_name, part) in zip(before, model.named_modules()):
        assert name == same_name
        assert attributes.keys() == vars(part).keys(), name
        for key, value in attributes.items():
            assert vars(part)[key] is value, f"{name}.{key}"
