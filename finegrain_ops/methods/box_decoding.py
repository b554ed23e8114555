"""Boxes that cannot be malformed, in about as many decoder steps as they have digits to choose.

At every choice only tokens that go on with a box of the grammar are compared. What has no alternative is not asked for:
it is run together with the choice before it (jump-forward), and so is a guess at a number's leading zero, which the
same run confirms or takes back. Forced characters are a choice all the same where a token reaches beyond them, as
"0.41" does where every number begins with "0.". Greedy. Where all is spelled out in single characters, or every number
is a token, the box is the one that the model would write if it were asked token by token, `jump_forward=False`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .box_grammar import BoxGrammar, BoxState
from .box_vocabulary import BoxVocabulary, Option
from .decoding import speak
from .prompt_tree import PromptTree, positions_in_prompts, token_rows
from .reuse import ImagePrefix, images_of


@dataclass
class _Row:
    """One box being written. Its tokens are `said`, of which the first `num_run` were run; `state` is after them.

    guess is run after them, as options one after another.
    """

    state: BoxState
    said: list[int] = field(default_factory=list)
    log_probabilities: list[float | None] = field(default_factory=list)
    text: str = ""
    num_run: int = 0
    guess: list[Option] = field(default_factory=list)

    @property
    def is_guess_complete(self) -> bool:
        return bool(self.guess) and self.guess[-1].after.is_complete

    @property
    def pending(self) -> list[int]:
        return [*self.said[self.num_run :], *(option.token for option in self.guess)]

    def say(self, option: Option, log_probability: float | None = None) -> None:
        self.said.append(option.token)
        self.log_probabilities.append(log_probability)
        self.text += option.text
        self.state = option.after


@dataclass(frozen=True)
class _Question:
    """Which of the options is likeliest, by a row's logits after the token at `column` of its pending ones; -1 is the
    last one before them.
    """

    row: int
    column: int
    options: Sequence[Option]


class _Reply(NamedTuple):
    option: Option
    log_probability: float | None  # among all tokens


class BoxSpeaker:
    """Writes a box in every row.

    Args:
        vocabulary: of the model's tokenizer, for the grammars' format.
        grammars: of each row.
        jump_forward: False asks for every token in a step of its own, forced or not.
        with_log_probabilities: False computes the logits of tokens that may come next, and no others.
        branch: of the tree; see `decoding.Speaker`.
    """

    def __init__(
        self,
        vocabulary: BoxVocabulary,
        grammars: Sequence[BoxGrammar],
        *,
        jump_forward: bool = True,
        with_log_probabilities: bool = True,
        branch: int = 0,
    ) -> None:
        self.branch = branch
        self._vocabulary = vocabulary
        self._jump_forward = jump_forward
        self._with_log_probabilities = with_log_probabilities
        self._rows = [_Row(grammar.start()) for grammar in grammars]
        self._is_first = True
        for row in self._rows:
            self._go_on(row)

    @property
    def said(self) -> list[list[int]]:
        return [row.said for row in self._rows]

    @property
    def unfed(self) -> list[list[int]]:
        """Per row, the tokens that were said and not run."""
        return [row.said[row.num_run :] for row in self._rows]

    @property
    def log_probabilities(self) -> list[list[float | None]]:
        """Per row and token, log p(w_i | w_<i) among all tokens, in float32; None where that was not heard."""
        return [row.log_probabilities for row in self._rows]

    @property
    def texts(self) -> list[str]:
        return [row.text for row in self._rows]

    @property
    def num_heard(self) -> int:
        return self._is_first + max(len(row.pending) for row in self._rows)

    def pending(self) -> list[list[int]]:
        return [[] if row.state.is_complete else row.pending for row in self._rows]

    def hear(self, tree: PromptTree, states: Tensor) -> None:
        speaking = [(i, row) for i, row in enumerate(self._rows) if not row.state.is_complete]
        questions = [question for i, row in speaking for question in self._questions(i, row)]
        replies = iter(self._replies(tree, states, questions))
        taken_back = [0] * len(self._rows)
        for i, row in speaking:
            for k in self._unheard(row):
                row.log_probabilities[k] = next(replies).log_probability
            choices = [next(replies) for _ in range(len(row.guess) + (not row.is_guess_complete))]
            guess, row.guess, row.num_run = row.guess, [], len(row.said)
            right = 0
            while right < len(guess) and guess[right].token == choices[right].option.token:
                right += 1
            for choice in choices[: right + 1]:
                row.say(*choice)
            row.num_run += right
            taken_back[i] = len(guess) - right
            self._go_on(row)
        self._is_first = False
        tree.take_back(self.branch, taken_back)

    def _go_on(self, row: _Row) -> None:
        """Says what is forced, and guesses what then comes."""
        if not self._jump_forward:
            return
        for option in self._vocabulary.sure(row.state, row.text, row.state.forced()[0]):
            row.say(option)
        state, text = row.state, row.text
        while likely := state.likely():
            after = state.after(likely)
            assert after is not None
            options = self._vocabulary.sure(state, text, likely + after.forced()[0])
            if not options:
                break
            row.guess += options
            state, text = options[-1].after, text + "".join(option.text for option in options)

    def _unheard(self, row: _Row) -> list[int]:
        """Of the tokens about to have been run, those whose predecessor is run too and that nobody has asked about."""
        if not self._with_log_probabilities:
            return []
        return [k for k in range(row.num_run, len(row.said)) if row.log_probabilities[k] is None]

    def _questions(self, i: int, row: _Row) -> list[_Question]:
        """About what was said unheard, then about each token of the guess, then about what follows."""

        num_sure = len(row.said) - row.num_run
        questions = []
        for k in self._unheard(row):
            questions.append(_Question(i, k - row.num_run - 1, [Option(row.said[k], "", row.state)]))
        state, text = row.state, row.text
        for k, option in enumerate(row.guess):
            questions.append(_Question(i, num_sure - 1 + k, self._options(state, text)))
            state, text = option.after, text + option.text
        if not row.is_guess_complete:
            questions.append(_Question(i, num_sure - 1 + len(row.guess), self._options(state, text)))
        return questions

    def _options(self, state: BoxState, text: str) -> Sequence[Option]:
        """Of which tokens the next one is: one where there is no choice."""
        return self._vocabulary.sure(state, text, state.forced()[0])[:1] or self._vocabulary.allowed(state)

    def _replies(self, tree: PromptTree, states: Tensor, questions: Sequence[_Question]) -> list[_Reply]:
        """states (B, n, hidden). Asks the device once for all."""
        if not questions:
            return []
        lengths = [len(self._rows[q.row].pending) for q in questions]
        columns = [states.shape[1] - n + q.column for n, q in zip(lengths, questions)]
        width = max(len(q.options) for q in questions)
        tokens = torch.tensor([[o.token for o in q.options] + [-1] * (width - len(q.options)) for q in questions])
        rows = torch.tensor([[q.row for q in questions], columns]).to(states.device)
        asked = states[rows[0], rows[1]]  # (questions, hidden)
        is_option, tokens = (tokens >= 0).to(states.device), tokens.clamp(min=0)
        if not self._with_log_probabilities:
            few, of_few = (indices.to(states.device) for indices in tokens.unique(return_inverse=True))
            scores = tree.logits(asked, few).float().gather(1, of_few).masked_fill(~is_option, float("-inf"))
            return [_Reply(q.options[k], None) for q, k in zip(questions, scores.argmax(1).tolist())]
        of_all = tree.logits(asked).float()
        best, which = of_all.gather(1, tokens.to(states.device)).masked_fill(~is_option, float("-inf")).max(1)
        heard = torch.stack([which.double(), (best - of_all.logsumexp(1)).double()], 1).tolist()
        return [_Reply(q.options[int(k)], probability) for q, (k, probability) in zip(questions, heard)]


def write_boxes(
    model: Any,
    inputs: Mapping[str, Any],
    vocabulary: BoxVocabulary,
    grammars: Sequence[BoxGrammar],
    prefix: ImagePrefix | None = None,
    *,
    jump_forward: bool = True,
) -> list[list[int]]:
    """The tokens of a box after each prompt.

    Args:
        inputs: the prompts, (B, P), with their images.
        vocabulary, grammars, jump_forward: see `BoxSpeaker`.
        prefix: of the same images and prompts; then only what comes after it is run.
    """
    writer = BoxSpeaker(vocabulary, grammars, jump_forward=jump_forward, with_log_probabilities=False)
    rows = token_rows(inputs, 0 if prefix is None else prefix.length)
    prompts = [tokens + first for tokens, first in zip(rows, writer.pending())]
    if prefix is not None:
        tree = PromptTree.of_prefix(prefix)
        writer.branch = tree.grow(0)
        speak(tree, [(tree.text(writer.branch, prompts), writer)])
        return writer.said
    tree, images = PromptTree(model, len(rows)), images_of(inputs)
    writer.branch = tree.grow()
    positions = positions_in_prompts(model, prompts, images)
    speak(tree, [(tree.prompt(writer.branch, prompts, positions), writer)], images)
    return writer.said
