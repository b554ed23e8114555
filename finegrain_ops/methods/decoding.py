"""Several texts written at once from one `PromptTree`: each step runs the decoder once for all that are not finished.

A speaker says what its rows want to run next, and hears the hidden states of that, from which it takes the logits that
it needs. `TextSpeaker` writes freely, as `generate` would; `box_decoding.BoxSpeaker` writes boxes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.stopping_criteria import StoppingCriteriaList, StopStringCriteria

from ..errors import UnsupportedInputError
from .generation import GREEDY, with_defaults
from .prompt_tree import PromptTree, Segment

_NOT_SAID = ("prompt_lookup_num_tokens", "assistant_early_exit", "guidance_scale", "dola_layers", "penalty_alpha")
# What generate drops, like the tokenizer of stop_strings, where another decodes in its place.
_FORGOTTEN = ("assistant_model", "streamer")


class Speaker(Protocol):
    """Writes one branch of every row.

    Attributes:
        branch: of the tree.
    """

    branch: int

    @property
    def num_heard(self) -> int:
        """The hidden states of how many of the last tokens it wants."""

    def pending(self) -> list[list[int]]:
        """What each row runs next; [] for rows that are finished."""

    def hear(self, tree: PromptTree, states: Tensor) -> None:
        """(B, num_heard, hidden): of the last tokens of `pending`, right-aligned; before the first, of the prompt's."""


def speak(
    tree: PromptTree, opening: Sequence[tuple[Segment, Speaker | None]], images: Mapping[str, Any] | None = None
) -> None:
    """Runs the segments of `opening` together, then lets their speakers write until all are finished.

    Args:
        opening: segments with the speakers that go on from them; None for what is only read.
        images: see `PromptTree.run`.
    """
    turn = list(opening)
    speakers = [speaker for _, speaker in opening if speaker is not None]
    while turn:
        hidden = tree.run([segment for segment, _ in turn], images)
        for states, (_, speaker) in zip(hidden, turn):
            if speaker is not None:
                speaker.hear(tree, states[:, -speaker.num_heard :])
        images = None
        waiting = [(speaker, speaker.pending()) for speaker in speakers]
        turn = [(tree.text(speaker.branch, rows), speaker) for speaker, rows in waiting if any(rows)]


@dataclass(frozen=True)
class Rules:
    """How `generate` would choose and end, as it prepares it."""

    processors: Any  # transformers' LogitsProcessorList
    criteria: Any  # StoppingCriteriaList
    is_sampling: bool
    image_token: int  # never said: it would be taken for an image where it is run again beside one


@torch.no_grad()
def rules_of(
    model: Any, ids: Tensor, mask: Tensor, generation: Mapping[str, Any], defaults: Mapping[str, Any]
) -> Rules:
    """Asks `generate` how it would go on from these prompts (B, P), without running the model.

    Raises:
        UnsupportedInputError: settings by which several tokens or hypotheses are alive at once; a streamer.
        ValueError: what generate itself refuses.
    """
    settings = with_defaults(generation, {**GREEDY, **defaults})
    for name in _FORGOTTEN:
        if settings.get(name) is not None:
            raise UnsupportedInputError(f"{name}: expected none, since generate itself does not run here; leave it out")
    of_strings: list[StopStringCriteria] = []
    tokenizer = settings.pop("tokenizer", None)
    if tokenizer is not None and settings.get("stop_strings") is not None:
        of_strings = [StopStringCriteria(tokenizer, settings.pop("stop_strings"))]
    prepared: list[Rules] = []

    def instead_of_decoding(
        model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any, **_: Any
    ) -> Tensor:
        mode = generation_config.get_generation_mode()
        others = [name for name in _NOT_SAID if getattr(generation_config, name, None) not in (None, 1.0)]
        if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE) or others:
            came = f"{others[0]} = {getattr(generation_config, others[0])}" if others else mode.value
            raise UnsupportedInputError(
                f"generation: expected greedy search or sampling, which go on token by token, got {came}"
            )
        is_sampling = mode is GenerationMode.SAMPLE
        criteria = StoppingCriteriaList([*stopping_criteria, *of_strings])
        prepared.append(Rules(logits_processor, criteria, is_sampling, model.config.image_token_id))
        return input_ids

    # No image is shown here, so there must be no token of one; nothing that is prepared depends on which they are.
    shown = ids.masked_fill(ids == model.config.image_token_id, 0)
    model.generate(input_ids=shown, attention_mask=mask, custom_generate=instead_of_decoding, **settings)
    return prepared[0]


class TextSpeaker:
    """Writes text as `generate` does: greedy or sampled, with its processors and stopping criteria; but no image token.

    Attributes:
        said: per row, the tokens, with the one that ends them.
        log_probabilities: per row and token, log p(w_i | w_<i) of the model's own logits, in float32.
        unfed: per row, the tokens that were said and not run.

    Args:
        ids: (B, P), the prompts as `rules` was asked about them.
        pad: the token that fills rows that have ended.
    """

    num_heard = 1

    def __init__(self, rules: Rules, ids: Tensor, pad: int, branch: int = 0) -> None:
        self.branch = branch
        self.said: list[list[int]] = [[] for _ in ids]
        self.log_probabilities: list[list[float]] = [[] for _ in ids]
        self.unfed: list[list[int]] = [[] for _ in ids]
        self._rules = rules
        self._ids = ids
        self._pad = pad
        self._is_done = [False] * len(ids)

    def pending(self) -> list[list[int]]:
        return [[] if done else said[-1:] for said, done in zip(self.said, self._is_done)]

    def hear(self, tree: PromptTree, states: Tensor) -> None:
        raw = tree.logits(states[:, -1]).float()
        scores = self._rules.processors(self._ids, raw.clone())
        scores[:, self._rules.image_token] = -math.inf
        if self._rules.is_sampling:
            tokens = torch.multinomial(scores.softmax(-1), 1)[:, 0]
        else:
            tokens = scores.argmax(-1)
        is_done = torch.tensor(self._is_done, device=tokens.device)
        tokens = tokens.masked_fill(is_done, self._pad)
        self._ids = torch.cat([self._ids, tokens[:, None]], 1)
        ends = self._rules.criteria(self._ids, scores)
        log_probabilities = raw.gather(1, tokens[:, None])[:, 0] - raw.logsumexp(1)
        # Together, so that a device is waited for once.
        heard = torch.stack([tokens.double(), log_probabilities.double(), ends.double()], 1).tolist()
        for row, (token, log_probability, end) in enumerate(heard):
            if self._is_done[row]:
                continue
            self.said[row].append(int(token))
            self.log_probabilities[row].append(log_probability)
            self.unfed[row] = [int(token)]
            self._is_done[row] = bool(end)


class Reciter:
    """Says what it was given, which is run with its prompt but for the last token of each row; it hears how likely that
    was. Attributes as of TextSpeaker.
    """

    def __init__(self, said: Sequence[Sequence[int]], branch: int = 0) -> None:
        self.branch = branch
        self.said = [list(row) for row in said]
        self.log_probabilities: list[list[float]] = [[] for _ in said]
        self.unfed = [row[-1:] for row in self.said]
        self._pending = [row[:-1] for row in self.said]

    @property
    def num_heard(self) -> int:
        return max(map(len, self.said))

    def pending(self) -> list[list[int]]:
        return self._pending

    def hear(self, tree: PromptTree, states: Tensor) -> None:
        self._pending = [[] for _ in self.said]
        width = states.shape[1]
        tokens = torch.tensor([[0] * (width - len(row)) + row for row in self.said], device=states.device)
        raw = tree.logits(states).float()
        heard = (raw.gather(2, tokens[:, :, None])[:, :, 0] - raw.logsumexp(2)).tolist()
        self.log_probabilities = [of_row[width - len(row) :] for of_row, row in zip(heard, self.said)]
