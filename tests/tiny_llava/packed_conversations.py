"""What may stand in a packed row, from the methods' own prompts; and a packed row taken apart by its mask alone."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from finegrain_ops.boxes import Box
from finegrain_ops.methods.box_style import BoxStyle
from finegrain_ops.methods.dualfocus import BOX_PROMPT, COMBINE_PROMPT
from finegrain_ops.methods.grounding import GROUNDING_PROMPT, image_grids
from finegrain_ops.methods.prompting import Prompter, fill
from finegrain_ops.tiny_llava.questions import Question, caption, questions_about
from finegrain_ops.tiny_llava.training.packing import IGNORED, PackedBatch
from finegrain_ops.tiny_llava.training.rendered import Sample

ANYTHING = Image.new("RGB", (112, 112))


class Conversation(NamedTuple):
    """Tokens from the beginning to the end of the last answer.

    Attributes:
        form: "plain"; "box" and "grounding", which ask for one; "two rounds" of DualFocus. With ", elsewhere" where the
            box is not the true one, ", given" where it is but is not learnt. "name", "name, box": a card's colour or
            shape, and what follows it.
        places: of the tokens in the row.
    """

    form: str
    question: Question
    ids: list[int]
    labels: list[int]
    places: Tensor


class Reader:
    """Knows the conversations of one model."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.prompter = Prompter(model, processor)
        self._processor = processor
        self._dualfocus, self._cof = BoxStyle.of_dualfocus("llava", processor), BoxStyle.of_cof("llava", processor)
        self._end = [processor.tokenizer.eos_token_id]
        self._pad = processor.tokenizer.pad_token_id
        self._made = processor.image_processor(images=[ANYTHING], return_tensors="pt")
        self._first = functools.cache(self._uncached_first)
        self._second = functools.cache(self._uncached_second)
        self._said = functools.cache(self._uncached_said)

    def conversations(self, batch: PackedBatch, i: int, sample: Sample) -> list[Conversation]:
        """Of row i, each up to the end of an answer, or to a token that no other sees.

        Raises:
            AssertionError: one of them is none that could be about the sample.
        """
        inputs = batch.inputs
        ids, mask = inputs["input_ids"][i], inputs["attention_mask"][i, 0]
        found = []
        is_unseen = (mask.sum(0) == 1) & (ids != self._pad)
        for end in ((ids == self._end[0]) | is_unseen).nonzero()[:, 0].tolist():
            places = mask[end].nonzero()[:, 0]
            assert places[-1] == end
            assert inputs["position_ids"][i, places].tolist() == list(range(len(places)))
            found.append(self._recognised(ids[places].tolist(), batch.labels[i, places].tolist(), places, sample))
        return found

    def _recognised(self, ids: list[int], labels: list[int], places: Tensor, sample: Sample) -> Conversation:
        text = self.prompter.tokenizer.decode(ids)
        if "ASSISTANT" not in text:
            return self._named(ids, labels, places, sample)
        of_kinds = questions_about(sample.cards, sample.side).values()
        for question in [*itertools.chain.from_iterable(of_kinds), caption(sample.cards)]:
            if f"{question.text} ASSISTANT:" not in text and f"{question.text}\n" not in text:
                continue
            for form, parts in self._forms(question, sample, text):
                expected = [token for tokens, _ in parts for token in tokens]
                learnt = [token if is_learnt else IGNORED for tokens, is_learnt in parts for token in tokens]
                if (ids, labels) == (expected, learnt):
                    return Conversation(form, question, ids, labels, places)
        short = text.replace("<image>" * 64, "<image>")
        raise AssertionError(f"no method says this, or not these are the labels: {short!r}, {labels}")

    def _named(self, ids: list[int], labels: list[int], places: Tensor, sample: Sample) -> Conversation:
        *opening, _ = self._first("")  # what an empty question ends with is " ASSISTANT:"
        for k, card in enumerate(sample.cards):
            for word, rest in ((card.colour, card.shape), (card.shape, card.colour)):
                if sum(word in (other.colour, other.shape) for other in sample.cards) > 1:
                    continue
                bracket, *numbers = self._box(self._dualfocus, card.box, int(sample.side))[:-1]
                given = [*opening, *self._said(f" {word}")[:-1]]
                for form, start, learnt in (
                    ("name", given, self._said(f" {rest}")[:-1]),
                    ("name, box", [*given, bracket], numbers),
                ):
                    if (ids, labels) == ([*start, *learnt], [*(IGNORED for _ in start), *learnt]):
                        return Conversation(form, Question(form, word, rest, k), ids, labels, places)
        raise AssertionError(f"no card is named so, or not these are the labels: {ids[len(opening) :]}, {labels}")

    def _forms(
        self, question: Question, sample: Sample, text: str
    ) -> Iterator[tuple[str, list[tuple[list[int], bool]]]]:
        """Those that a text like this may have; each a list of tokens and whether they are learnt."""
        answer = (self._said(f" {question.answer}"), True)
        if "bounding box" not in text:
            yield "plain", [(self._first(question.text), False), answer]
            return
        box = (0.0, 0.0, sample.side, sample.side) if question.card is None else sample.cards[question.card].box
        if "JSON" in text:
            asked = self._first(fill(GROUNDING_PROMPT, question.text))
            yield "grounding", [(asked, False), (self._box(self._cof, box, int(sample.side)), True)]
            return
        asked = self._first(fill(BOX_PROMPT, question.text))
        second = [(self._second(fill(COMBINE_PROMPT, question.text)), False), answer]
        for form, of, is_learnt in (
            ("", box, True),
            (", given", box, False),
            (", elsewhere", sample.crop_boxes[-1], False),
        ):
            first = [(asked, False), (self._box(self._dualfocus, of, int(sample.side)), is_learnt)]
            yield f"box{form}", first
            yield f"two rounds{form}", [*first, *second]

    def _uncached_first(self, question: str) -> list[int]:
        (text,) = self.prompter.texts([ANYTHING], [question])
        (inputs,) = self.prompter.encode([ANYTHING], [text])
        return inputs["input_ids"][0].tolist()

    def _uncached_second(self, question: str) -> list[int]:
        """Without the end of the first answer."""
        inputs = self.prompter.encode_follow_ups([self.prompter.follow_up(question)], [ANYTHING], self._made)
        end, *rest = inputs["input_ids"][0].tolist()
        assert [end] == self._end
        return rest

    def _uncached_said(self, text: str) -> list[int]:
        return [*self.prompter.tokenizer(text, add_special_tokens=False)["input_ids"], *self._end]

    def _box(self, style: BoxStyle, box: Box, side: int) -> list[int]:
        size = (side, side)
        inputs = {**self._made, "input_ids": torch.tensor([self._first("")])}
        (grids,) = image_grids(self.prompter.model, self._processor, inputs, [size])
        return self._said(f" {style.text(box, size, grids)}")


def logits_of(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits
