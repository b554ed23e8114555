"""Boxes written from logits that are made up: what is asked, guessed and taken back, against a search token by token.

The made-up model prefers a text that was drawn and is random elsewhere; it checks what it is asked to run.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("hypothesis", reason="hypothesis draws the boxes")
from hypothesis import given, settings
from hypothesis import strategies as st

import spelling_models
from box_tokenizers import byte_bpe
from finegrain_ops.methods.box_decoding import BoxSpeaker
from finegrain_ops.methods.box_grammar import JSON, LIST, LIST_OF_THOUSANDTHS, MARKUP, BoxFormat, BoxGrammar
from finegrain_ops.methods.box_vocabulary import BoxVocabulary

FORMATS = {"list": LIST, "thousandths": LIST_OF_THOUSANDTHS, "markup": MARKUP, "json": JSON}
TOKENIZER = spelling_models.make_tokenizer("<|image_pad|>")
VOCABULARIES = {name: BoxVocabulary(TOKENIZER, written) for name, written in FORMATS.items()}
SIDES = st.sampled_from([1, 2, 10, 100, 101]) | st.integers(1, 1000)
MERGED = byte_bpe()
OF_MERGED = BoxVocabulary(MERGED, LIST)
BRANCH = 3


@functools.cache
def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


class MadeUpTree:
    """A model and a tree of rows without a prompt; `scripts` are what it prefers to say."""

    def __init__(self, scripts: list[str], seed: int = 0, vocabulary_size: int = len(TOKENIZER)) -> None:
        self.scripts = [ids(script) for script in scripts]
        self.run: list[list[int]] = [[] for _ in scripts]
        self.turns = 0
        self.wrong_guesses = 0
        self._seed = seed
        self._size = vocabulary_size
        self._known: dict[tuple[int, ...], Tensor] = {}

    def logits_after(self, row: int, tokens: list[int]) -> Tensor:
        """(vocabulary,)"""
        key = (self._seed, row, *tokens)
        if key not in self._known:
            logits = 3 * np.random.default_rng(key).standard_normal(self._size, dtype=np.float32)
            script, n = self.scripts[row], len(tokens)
            if n < len(script) and tokens == script[:n]:
                logits[script[n]] += 30
            self._known[key] = torch.from_numpy(logits)
        return self._known[key]

    def write(self, speaker: BoxSpeaker) -> None:
        """As `speak`; columns that must not be looked at are NaN."""
        is_first = True
        while any(pending := speaker.pending()) or is_first:
            self.turns += 1
            assert self.turns < 100
            width = max(map(len, pending)) + is_first
            heard = torch.full((len(pending), width, self._size), float("nan"))
            for row, tokens in enumerate(pending):
                before = self.run[row]
                for k in range(0 if is_first else 1, len(tokens) + 1):
                    heard[row, width - 1 - len(tokens) + k] = self.logits_after(row, before + tokens[:k])
                before += tokens
            assert speaker.num_heard >= width
            assert speaker.num_heard == width or len(pending) > 1 or not pending[0]  # rows that are done may be longer
            speaker.hear(self, heard[:, -speaker.num_heard :])
            is_first = False
            for row, said in zip(self.run, speaker.said):
                assert row == said[: len(row)]

    @staticmethod
    def logits(states: torch.Tensor, tokens: torch.Tensor | None = None) -> torch.Tensor:
        """What it gives out as hidden states are logits already."""
        return states if tokens is None else states[..., tokens]

    def take_back(self, branch: int, counts: list[int]) -> None:
        assert branch == BRANCH
        for row, count in zip(self.run, counts):
            self.wrong_guesses += count > 0
            assert 0 <= count <= len(row)
            del row[len(row) - count :]

    def best_box(self, row: int, grammar: BoxGrammar) -> list[int]:
        """Asked token by token, where every character is a token and so are the marks of the markup."""
        state, tokens = grammar.start(), []
        while following := state.next_characters():
            mark = next((m for m in ("<|box_start|>", "<|box_end|>") if following == "<" and state.after(m)), None)
            options = [mark] if mark else list(following)
            logits = self.logits_after(row, tokens).tolist()
            best = max(options, key=lambda text: logits[ids(text)[0]])
            tokens += ids(best)
            state = state.after(best)
        return tokens


@st.composite
def scripts(draw: st.DrawFn, written: BoxFormat) -> tuple[BoxGrammar, str]:
    """A grammar and one of its texts, or the beginning of one."""
    units = 10**written.decimals if written.decimals else 1000
    highest = draw(st.just((units, units)) | st.tuples(SIDES, SIDES))
    low = [draw(st.integers(0, side - 1) | st.just(side - 1)) for side in highest]
    high = [draw(st.integers(edge + 1, side) | st.just(side)) for edge, side in zip(low, highest)]
    lead = draw(st.sampled_from(["", " "])) if written.may_lead_with_space else ""
    text = lead + written.text([*low, *high])
    return BoxGrammar(written, highest), text[: draw(st.just(len(text)) | st.integers(0, len(text)))]


def write(
    kind: str, drawn: list[tuple[BoxGrammar, str]], seed: int = 0, jump_forward: bool = True
) -> tuple[BoxSpeaker, MadeUpTree]:
    tree = MadeUpTree([text for _, text in drawn], seed)
    grammars = [grammar for grammar, _ in drawn]
    speaker = BoxSpeaker(VOCABULARIES[kind], grammars, jump_forward=jump_forward, branch=BRANCH)
    tree.write(speaker)
    return speaker, tree


@pytest.mark.parametrize("jump_forward", [True, False])
@pytest.mark.parametrize("kind", FORMATS)
@settings(max_examples=12, deadline=None)
@given(st.integers(0, 1000), st.data())
def test_each_token_is_the_likeliest(kind: str, jump_forward: bool, seed: int, data: st.DataObject) -> None:
    drawn = data.draw(st.lists(scripts(FORMATS[kind]), min_size=1, max_size=3))
    speaker, tree = write(kind, drawn, seed, jump_forward)
    for row, (grammar, _) in enumerate(drawn):
        said = speaker.said[row]
        assert said == tree.best_box(row, grammar)
        assert speaker.texts[row] == TOKENIZER.decode(said, skip_special_tokens=False)
        assert grammar.start().after(speaker.texts[row]).is_complete
        assert speaker.unfed[row] == said[len(tree.run[row]) :]
        assert len(speaker.log_probabilities[row]) == len(said)
        for k, heard in enumerate(speaker.log_probabilities[row]):
            is_asked = not jump_forward or grammar.format.may_lead_with_space
            if k > len(tree.run[row]) or not (tree.run[row] or is_asked):
                assert heard is None  # the token before it was not run, or nobody was asked at all
            else:
                expected = tree.logits_after(row, said[:k]).log_softmax(0)[said[k]]
                assert abs(heard - float(expected)) < 1e-4
        if not jump_forward:
            assert None not in speaker.log_probabilities[row]
            assert len(speaker.unfed[row]) == 1
    if not jump_forward:
        assert tree.turns == max(map(len, speaker.said))
        assert tree.wrong_guesses == 0


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.booleans(), scripts(LIST))
def test_tokens_of_several_characters(seed: int, jump_forward: bool, drawn: tuple[BoxGrammar, str]) -> None:
    """Where more than one character may follow, the likeliest of all tokens that go on with a box is taken."""
    grammar = drawn[0]
    tree = MadeUpTree([""], seed, vocabulary_size=len(MERGED))
    speaker = BoxSpeaker(OF_MERGED, [grammar], jump_forward=jump_forward, branch=BRANCH)
    tree.write(speaker)
    (said,) = speaker.said
    state = grammar.start()
    for k, token in enumerate(said):
        logits = tree.logits_after(0, said[:k]).tolist()
        if len(state.next_characters()) > 1:
            texts = {i: piece.replace("\u0120", " ") for piece, i in MERGED.get_vocab().items()}
            assert token == max((i for i, text in texts.items() if state.after(text)), key=lambda i: logits[i])
        heard = speaker.log_probabilities[0][k]
        assert (heard is None) == (k > len(tree.run[0]))
        if heard is not None:
            assert abs(heard - float(torch.tensor(logits).log_softmax(0)[token])) < 1e-4
        state = state.after(MERGED.convert_ids_to_tokens(token).replace("\u0120", " "))
    assert state.is_complete
    assert speaker.texts == [MERGED.decode(said)]


LISTS = st.tuples(*[st.integers(0, 99)] * 4).filter(lambda box: box[0] < box[2] and box[1] < box[3])


@settings(max_examples=12, deadline=None)
@given(st.lists(LISTS, min_size=1, max_size=3), st.sampled_from(["", " "]))
def test_a_list_takes_one_turn_for_each_digit_that_may_be_chosen(boxes: list[tuple[int, ...]], lead: str) -> None:
    drawn = [(BoxGrammar(LIST, (100, 100)), lead + LIST.text(box)) for box in boxes]
    speaker, tree = write("list", drawn)
    assert speaker.texts == [text for _, text in drawn]
    assert tree.turns <= 8 + (lead == "")  # two digits each; the space is a guess
    _, slow = write("list", drawn, jump_forward=False)
    assert slow.turns == 24 + len(lead)
    assert 2 * tree.turns <= slow.turns
    assert tree.wrong_guesses == (lead == "") * len(boxes)


@pytest.mark.parametrize(
    ("text", "wrong_guesses", "turns"),
    [
        (" [0.25, 0.50, 0.75, 0.90]", 0, 8),
        ("[0.25, 0.50, 0.75, 0.90]", 1, 9),  # no space
        (" [0.25, 0.50, 1.00, 0.90]", 1, 7),  # not 0 but 1, which says the rest: 0.2 5 0.5 0 1 0.9 0
        (" [0.25, 0.50, 1.00, 1.00]", 2, 6),
        (" [0.25, 0.98, 0.75, 0.99]", 0, 7),  # the guess of y1's 0 is the rest of the box
        (" [0.25, 0.98, 0.75, 1.00]", 1, 7),
        (" [0.98, 0.98, 0.99, 0.99]", 0, 5),
        (" [0.99, 0.99, 1.00, 1.00]", 0, 4),  # nothing to guess
    ],
)
def test_guesses_that_were_wrong_cost_a_turn(text: str, wrong_guesses: int, turns: int) -> None:
    speaker, tree = write("list", [(BoxGrammar(LIST, (100, 100)), text)])
    assert speaker.texts == [text]
    assert tree.wrong_guesses == wrong_guesses
    assert tree.turns == turns


def test_several_guesses_are_made_at_once() -> None:
    """A space, and the 0 of an x0 that may also be 1."""
    speaker, tree = write("list", [(BoxGrammar(LIST, (250, 250)), " [0.25, 0.50, 0.75, 0.90]")])
    assert speaker.texts == [" [0.25, 0.50, 0.75, 0.90]"]
    assert (tree.turns, tree.wrong_guesses) == (8, 0)
    speaker, tree = write("list", [(BoxGrammar(LIST, (250, 250)), " [1.25, 0.50, 2.25, 0.90]")])
    assert speaker.texts == [" [1.25, 0.50, 2.25, 0.90]"]
    assert (tree.turns, tree.wrong_guesses) == (10, 1)  # of x1's three digits 0 is none, so nothing is guessed


def test_what_is_not_run_of_a_box() -> None:
    """Its end, where that is forced: nobody needs the logits after it."""
    grammar = BoxGrammar(LIST, (100, 100))
    speaker, _ = write("list", [(grammar, " [0.25, 0.50, 0.75, 0.90]"), (grammar, " [0.25, 0.98, 0.75, 0.99]")])
    assert speaker.unfed == [ids("0]"), []]
    assert speaker.log_probabilities[0][-1] is None
    assert None not in [*speaker.log_probabilities[0][:-1], *speaker.log_probabilities[1]]


def test_a_box_without_a_choice_is_said_at_once() -> None:
    grammar = BoxGrammar(JSON, (1, 1))
    speaker, _ = write("json", [(grammar, "")])
    assert speaker.texts == ['{"bbox_2d": [0, 0, 1, 1]}']
    assert speaker.said == [ids(speaker.texts[0])]
