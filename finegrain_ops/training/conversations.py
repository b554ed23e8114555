"""Conversations of several rounds, each with an image, as rows of a batch: exactly the tokens that inference feeds.

    round 1: [prompt: image and question][answer]
    round 2: [what the chat writes between an answer and the next: end of turn, image and question][answer][end]

Each piece is tokenised alone, as at inference, where answers come from the model and prompts from a `Prompter`; the
same Prompter makes them here. Labels are the answers' tokens, and after each answer the token that ends it, -100
elsewhere. That end is the target also where the chat writes something else after an answer: a model stops by itself,
and what follows is put in the place of its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..methods.prompting import Prompter, Template
from ..validation import describe

__all__ = ["IGNORED", "ConversationBatch", "answer_rounds", "end_of_answers", "prompter_on_cpu", "round_losses"]

IGNORED = -100  # the label of no loss, as in transformers


def prompter_on_cpu(model: Any, processor: Any, template: Template | None = None) -> Prompter:
    """A Prompter for the workers of a DataLoader: it knows the model's configuration, not the model or its device."""
    facts = SimpleNamespace(
        config=model.config,
        generation_config=getattr(model, "generation_config", None),
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    return Prompter(facts, processor, template)


def end_of_answers(model: Any, prompter: Prompter) -> int:
    """The token that a model ends its answers with: what the chat writes after one where that ends a text, and
    otherwise the tokenizer's end-of-sequence token.

    Raises:
        ValueError: the tokenizer has no such token.
        UnsupportedModelError: the model takes no second image.
    """
    tokenizer = prompter.tokenizer
    if tokenizer.eos_token_id is None:
        raise ValueError(f"processor: expected a tokenizer with an eos_token, got {type(tokenizer).__name__} without")
    known = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = known if isinstance(known, list) else [known]
    first = tokenizer(prompter.follow_up("?"), add_special_tokens=False)["input_ids"][0]
    return int(first if first in ends else tokenizer.eos_token_id)


class ConversationBatch:
    """A batch in the making: `ask` and `answer` in turn, then `finish`.

    Args:
        prompter: of the model; see prompter_on_cpu.
        end: the token that ends an answer; see end_of_answers.
        num_rows: how many conversations there are.
    """

    def __init__(self, prompter: Prompter, end: int, num_rows: int) -> None:
        self._prompter, self._end = prompter, end
        self._rows = [_Row() for _ in range(num_rows)]

    def ask(self, questions: Sequence[str], images: Sequence[Any]) -> dict[str, Tensor]:
        """The first question of every conversation, about an image each. Gives the round's inputs."""
        self._require_plain(questions, "questions")
        texts = self._prompter.texts(images, questions)
        (inputs,) = self._prompter.encode(images, texts)
        self._append(range(len(self._rows)), inputs)
        return inputs

    def ask_more(self, rows: Sequence[int], questions: Sequence[str], images: Sequence[Any], made: Any) -> None:
        """A further question in some of the conversations, which have an answer already.

        Args:
            rows: of which conversations.
            images: one for each; only their number is looked at.
            made: what the image processor would make of the images to show, as `preprocess` gives it.
        """
        self._require_plain(questions, "questions")
        texts = [self._prompter.follow_up(question) for question in questions]
        self._append(rows, self._prompter.encode_follow_ups(texts, images, made))
        for row in rows:
            # The model's own choice after the answer before, whatever the chat puts there.
            self._rows[row].labels[-1][0] = self._end

    def answer(self, rows: Sequence[int], answers: Sequence[str]) -> None:
        """What the assistant says in some of the conversations; "" is only the end."""
        self._require_plain(answers, "answers")
        tokenizer = self._prompter.tokenizer
        for row, answer in zip(rows, answers):
            ids = tokenizer(answer, add_special_tokens=False)["input_ids"] if answer else []
            self._add(row, torch.tensor(ids, dtype=torch.int64), is_answer=True)

    def finish(self) -> dict[str, Tensor]:
        """The batch, padded on the right: input_ids, attention_mask and labels (B, P), and what the model wants of the
        images, in the order in which the rows show them.
        """
        for row in range(len(self._rows)):
            self._add(row, torch.tensor([self._end]), is_answer=True)
        pad = self._prompter.tokenizer.pad_token_id
        ids = [torch.cat(row.ids) for row in self._rows]
        batch = {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self._end if pad is None else pad),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": pad_sequence([torch.cat(row.labels) for row in self._rows], True, IGNORED),
        }
        for name in self._rows[0].by_token:
            batch[name] = pad_sequence([torch.cat(row.by_token[name]) for row in self._rows], batch_first=True)
        images = [image for row in self._rows for image in row.images]
        return batch | {name: _joined([image[name] for image in images]) for name in images[0]}

    # --- how ---

    def _append(self, rows: Sequence[int], inputs: dict[str, Tensor]) -> None:
        """One row of `inputs`, without its padding, to each of the conversations, and one image."""
        by_token = {name for name in inputs if name.endswith("token_type_ids")}
        by_image = {
            name: value for name, value in inputs.items() if name not in by_token | {"input_ids", "attention_mask"}
        }
        # Of Qwen2-VL all patches are in one list.
        counts = by_image["image_grid_thw"].prod(1).tolist() if "image_grid_thw" in by_image else 1
        split = {name: value.split(counts if name == "pixel_values" else 1) for name, value in by_image.items()}
        for i, row in enumerate(rows):
            kept = inputs["attention_mask"][i].bool()
            self._add(row, inputs["input_ids"][i][kept], {name: inputs[name][i][kept] for name in by_token})
            self._rows[row].images.append({name: values[i] for name, values in split.items()})

    def _add(
        self, row: int, ids: Tensor, by_token: dict[str, Tensor] | None = None, *, is_answer: bool = False
    ) -> None:
        to = self._rows[row]
        for name in by_token or to.by_token:
            # Answers are text: type 0.
            to.by_token.setdefault(name, []).append(by_token[name] if by_token else torch.zeros_like(ids))
        to.ids.append(ids)
        to.labels.append(ids.clone() if is_answer else torch.full_like(ids, IGNORED))

    def _require_plain(self, texts: Sequence[str], name: str) -> None:
        """Text of a data set that holds the model's special tokens would become images and turns."""
        tokenizer = self._prompter.tokenizer
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(f"{name}[{i}]: expected a str, got {describe(text)}")
            for token in tokenizer.all_special_tokens:
                if token in text:
                    raise ValueError(f"{name}[{i}]: expected text without the special token {token!r}, got {text!r}")


@dataclass
class _Row:
    """The pieces of a conversation."""

    ids: list[Tensor] = field(default_factory=list)
    labels: list[Tensor] = field(default_factory=list)
    by_token: dict[str, list[Tensor]] = field(default_factory=dict)
    images: list[dict[str, Tensor]] = field(default_factory=list)


def answer_rounds(labels: Tensor) -> Tensor:
    """Which answer of its row each label belongs to, (B, P) int64: 1 for the first, 2 for the second, 0 for none."""
    is_label = labels != IGNORED
    begins = is_label & ~F.pad(is_label, (1, 0))[:, :-1]
    return begins.cumsum(1) * is_label


def round_losses(logits: Tensor, labels: Tensor, rounds: Tensor) -> Tensor:
    """The mean cross-entropy over the tokens of each round, (rounds.max(),) float32; NaN for a round without any. For
    logging: the loss to train on is the model's.

    Args:
        logits: (B, P, vocabulary), of positions that predict the next.
        labels: (B, P) int64, -100 for no loss, not shifted.
        rounds: (B, P) int64 as `answer_rounds` gives it.
    """
    loss = F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="none"
    )
    one_hot = F.one_hot(rounds[:, 1:].flatten())[:, 1:].to(loss.dtype)  # (B * (P - 1), rounds)
    return loss @ one_hot / one_hot.sum(0)


def _joined(values: Sequence[Tensor]) -> Tensor:
    """One after the other; LLaVA-NeXT's tiles, whose number differs, padded with zeros."""
    if values[0].dim() == 5:
        most = max(value.shape[1] for value in values)
        values = [F.pad(value, (0, 0) * 3 + (0, most - value.shape[1])) for value in values]
    return torch.cat(list(values))
