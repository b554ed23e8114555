"""Conversations about one scene, packed into one row: the image once, and all that is said about it after it.

    image
      a colour or shape, what else the card is  each of these goes on from the image alone
      question, answer
      "provide the box ...", box
        crop, "combine ...", answer             DualFocus's second round goes on from its first
      question, "... in JSON format", box       CoF's

A token sees what lies on its own way to the image, and positions count along that way. So a packed row trains exactly
what its conversations would one by one, and its tokens are those that the methods feed at inference; but for names of
cards without a question. Those need one look from the word to the image, where a question needs another from the answer
to the word, and questions are learnt when the first is there.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from ...boxes import Box
from ...methods.dualfocus import BOX_PROMPT, COMBINE_PROMPT
from ...methods.grounding import GROUNDING_PROMPT
from ..questions import AMBIGUOUS, BOXED_KINDS, KINDS, LOCAL_KINDS, Question, QuestionsByKind, caption, questions_about
from ..tokenizer import IMAGE_MEAN, IMAGE_STD, IMAGE_TOKENS, NUMBER_WORDS, make_tokenizer, vocabulary
from .dense import shares, view_of
from .rendered import CROPS, ELSEWHERE, WHOLE, RenderedScenes, Sample

IGNORED = -100
_T = TypeVar("_T")

_NUM_ASKED = {"colour": 2, "shape": 2, "left_of": 2}  # of the whole image, where there are as many; of others one
_NUM_NAMED = 2  # cards, by colour and by shape
_SHARE_UNREADABLE = 0.25  # how often letters and dots are asked of the whole image, so that the model learns its doubt
_SHARE_WHOLE = 0.3  # of second rounds: those about the whole scene, whose crop is the whole scene
_SHARE_ELSEWHERE = 0.12  # of second rounds: those with a crop of somewhere else
_WHOLE_KINDS = tuple(kind for kind in KINDS if kind not in BOXED_KINDS)


class Look(NamedTuple):
    """Where a token should look.

    Attributes:
        row, place: of the token.
        is_name: it is the word by which the card is named, not what is said about the card.
        image: the place of the first token of the image that it should look at.
        boxes: of what it should look at, as shares of that image.
    """

    row: int
    place: int
    is_name: bool
    image: int
    boxes: tuple[Box, ...]


@dataclass(frozen=True)
class _Segment:
    """Tokens that go on from another segment's end.

    Attributes:
        num_given: how many of the first are not learnt.
        parent: the index of the segment before; -1 for the first.
        name: the token, of those given, by which a card is named.
        named: the boxes of the cards that it fits, as shares of the image.
        shown: the boxes of what is said.
        image: the first token of an image of its own; None: it is about the row's first.
    """

    tokens: Sequence[int]
    num_given: int
    parent: int
    name: int | None = None
    named: tuple[Box, ...] = ()
    shown: tuple[Box, ...] = ()
    image: int | None = None

    def looks(self, row: int, start: int, first_image: int) -> list[Look]:
        """Of the name, and of all that a learnt token is said after.

        Args:
            start: the first token's place.
            first_image: the place of the row's first image.
        """
        if self.name is None:
            return []
        image = first_image if self.image is None else start + self.image
        said = range(self.num_given - 1, len(self.tokens) - 1)
        looks = [Look(row, start + k, False, image, self.shown) for k in said if k != self.name]
        return [Look(row, start + self.name, True, image, self.named), *looks]


class PackedBatch(NamedTuple):
    inputs: dict[str, Tensor]  # of the model
    labels: Tensor  # (B, L), -100 where nothing is learnt
    looks: list[Look]


class Packer:
    """Makes batches of one tokenizer's tokens."""

    def __init__(self) -> None:
        tokenizer = make_tokenizer()
        self._encode = functools.lru_cache(maxsize=None)(
            lambda text: tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
        )
        self._pad = tokenizer.pad_token_id
        self._end = (tokenizer.eos_token_id,)
        self._image = tokenizer.vocab["<image>"]
        self._turn = (*self._encode("USER: "), *(self._image,) * IMAGE_TOKENS, *self._encode("\n"))
        self._opening = (tokenizer.bos_token_id, *self._turn)
        self._first_image = self._opening.index(self._image)
        self.is_number = torch.tensor([word in NUMBER_WORDS for word in vocabulary()])  # (words,)

    def scenes(self, data: RenderedScenes, indices: Sequence[int], rng: np.random.Generator) -> PackedBatch:
        """Whole scenes, each with a second image."""
        rows, images = [], []
        for i in indices:
            segments, second = self._about_scene(data.samples[i], rng)
            rows.append(segments)
            images += [data.images[i, WHOLE], data.images[i, second]]
        return self._batch(rows, images)

    def crops(self, data: RenderedScenes, indices: Sequence[int], rng: np.random.Generator) -> PackedBatch:
        """Crops alone, with questions about the card that they show."""
        rows, images = [], []
        for i in indices:
            which = int(rng.integers(len(CROPS)))
            rows.append(self._about_crop(data.samples[i], which))
            images.append(data.images[i, CROPS[which]])
        return self._batch(rows, images)

    def _about_crop(self, sample: Sample, which: int) -> list[_Segment]:
        segments = [_Segment(self._opening, len(self._opening), -1)]
        for question in _questions_on(_questions(sample), sample.shown[which]):
            if question.kind != AMBIGUOUS:
                answered = self._answered(question.text, question.answer)
                segments.append(self._looking(answered, question, sample, CROPS[which]))
        return segments

    def _about_scene(self, sample: Sample, rng: np.random.Generator) -> tuple[list[_Segment], int]:
        """Also which image is the second one."""
        questions = _questions(sample)
        said = caption(sample.cards)
        segments = [_Segment(self._opening, len(self._opening), -1), self._answered(said.text, said.answer)]
        for kind in KINDS:
            if kind not in LOCAL_KINDS or rng.random() < _SHARE_UNREADABLE:
                for k in rng.permutation(len(questions[kind]))[: _NUM_ASKED.get(kind, 1)]:
                    segments.append(self._seen(questions[kind][k], sample))
        # The kind is drawn first: some have many questions, others one. What is named by its shape is the hardest to
        # find, and asked for most.
        for prompt in (BOX_PROMPT, BOX_PROMPT, GROUNDING_PROMPT):
            of_kinds = _WHOLE_KINDS if rng.random() < 0.15 else (*BOXED_KINDS, "colour", "colour")
            of_kind = questions[_one(rng, [kind for kind in of_kinds if questions[kind]])]
            question = _one(rng, [question for question in of_kind if _is_first(question, sample)])
            segments.append(self._located(prompt, question, sample))
        segments += self._named(sample, rng)
        return segments, self._two_rounds(segments, sample, questions, rng)

    def _named(self, sample: Sample, rng: np.random.Generator) -> list[_Segment]:
        """A card's colour or shape, where no other card has it; after it the shape or the colour, and the box."""
        segments = []
        for name, other in (("colour", "shape"), ("shape", "colour")):
            words = [getattr(card, name) for card in sample.cards]
            alone = [card for card in sample.cards if words.count(getattr(card, name)) == 1]
            for k in rng.permutation(len(alone))[:_NUM_NAMED]:
                word = self._encode(f" {getattr(alone[k], name)}")
                box = self._box(alone[k].box, sample.side)
                boxes = (shares(alone[k].box, view_of(sample, WHOLE)),)
                segments.append(_Segment((*word, *self._encode(f" {getattr(alone[k], other)}")), 1, 0, 0, boxes, boxes))
                segments.append(_Segment((*word, *box), 2, 0, 0, boxes, boxes))  # the box's bracket is given too
        return segments

    def _two_rounds(
        self, segments: list[_Segment], sample: Sample, questions: QuestionsByKind, rng: np.random.Generator
    ) -> int:
        """Appends DualFocus's conversation; gives the image of its second round."""
        if rng.random() < _SHARE_WHOLE:
            question = _one(rng, questions[_one(rng, [kind for kind in _WHOLE_KINDS if questions[kind]])])
            second = WHOLE
            first_round = self._located(BOX_PROMPT, question, sample)
        else:
            which = int(rng.integers(len(CROPS)))
            on_card = _questions_on(questions, sample.shown[which])
            kinds = sorted({question.kind for question in on_card})
            # What only the crop shows is asked more often.
            kind = _one(rng, kinds + [kind for kind in kinds if kind in LOCAL_KINDS])
            question = _one(rng, [question for question in on_card if question.kind == kind])
            if rng.random() < _SHARE_ELSEWHERE:
                second = ELSEWHERE
                first_round = self._located(BOX_PROMPT, question, sample, sample.crop_boxes[-1])
            else:
                second = CROPS[which]
                given = None if _is_first(question, sample) else _true_box(question, sample)
                first_round = self._located(BOX_PROMPT, question, sample, given)
        segments.append(first_round)
        asked = COMBINE_PROMPT.replace("{question}", question.text)
        answered = self._answered(asked, question.answer, len(segments) - 1)
        if second in CROPS:
            answered = self._looking(answered, question, sample, second)
        segments.append(answered)
        return second

    # --- segments ---

    def _seen(self, question: Question, sample: Sample) -> _Segment:
        """What the whole image answers, if it can."""
        return self._looking(self._answered(question.text, question.answer), question, sample)

    def _looking(self, segment: _Segment, question: Question, sample: Sample, which: int = WHOLE) -> _Segment:
        """The same, with where it looks if it is about a card. A letter or a dot is looked at in crops alone."""
        if question.card is None:
            return segment
        cards = [sample.cards[k] for k in (question.candidates if which == WHOLE else (question.card,))]
        is_of_shape = question.kind in ("colour", AMBIGUOUS)
        (word,) = self._encode(f" {cards[0].shape if is_of_shape else cards[0].colour}")
        view = view_of(sample, which)
        named = tuple(shares(card.box, view) for card in cards)
        shown = named
        if which != WHOLE and question.kind in LOCAL_KINDS:
            shown = (shares(cards[0].letter_box if question.kind == "letter" else cards[0].dot_box, view),)
        image = segment.tokens.index(self._image) if self._image in segment.tokens else None
        return replace(segment, name=segment.tokens.index(word), named=named, shown=shown, image=image)

    def _answered(self, question: str, answer: str, parent: int = 0) -> _Segment:
        """After another answer it begins a turn of its own, with an image."""
        asked = (*(self._turn if parent else ()), *self._encode(question), *self._encode(" ASSISTANT:"))
        return _Segment((*asked, *self._encode(f" {answer}"), *self._end), len(asked), parent)

    def _located(self, prompt: str, question: Question, sample: Sample, given: Box | None = None) -> _Segment:
        """With a box that is given, nothing is learnt."""
        box = given or _true_box(question, sample)
        asked = (*self._encode(prompt.replace("{question}", question.text)), *self._encode(" ASSISTANT:"))
        tokens = (*asked, *self._box(box, sample.side), *self._end)
        if given is not None:
            return _Segment(tokens, len(tokens), 0)
        segment = self._looking(_Segment(tokens, len(asked), 0), question, sample)
        return replace(segment, shown=(shares(box, view_of(sample, WHOLE)),))

    def _box(self, box: Box, side: float) -> tuple[int, ...]:
        numbers = [NUMBER_WORDS[min(max(round(edge / side * 100), 0), 100)] for edge in box]
        return self._encode(f" [{', '.join(numbers)}]")

    # --- rows ---

    def _batch(self, rows: Sequence[Sequence[_Segment]], images: Sequence[np.ndarray]) -> PackedBatch:
        length = max(sum(len(segment.tokens) for segment in row) for row in rows)
        num_segments = max(map(len, rows)) + 1  # the last one is padding
        ids = np.full((len(rows), length), self._pad, np.int64)
        positions = np.zeros((len(rows), length), np.int64)
        labels = np.full((len(rows), length), IGNORED, np.int64)
        which = np.full((len(rows), length), num_segments - 1, np.int64)
        sees = np.zeros((len(rows), num_segments, num_segments), bool)  # a segment, and those before it on its way
        sees[:, -1, -1] = True
        looks: list[Look] = []
        for i, row in enumerate(rows):
            at = 0
            ends: list[int] = []  # positions
            for k, segment in enumerate(row):
                start = 0 if segment.parent < 0 else ends[segment.parent]
                end = at + len(segment.tokens)
                ids[i, at:end] = segment.tokens
                positions[i, at:end] = np.arange(start, start + len(segment.tokens))
                labels[i, at + segment.num_given : end] = segment.tokens[segment.num_given :]
                which[i, at:end] = k
                looks += segment.looks(i, at, self._first_image)
                ends.append(start + len(segment.tokens))
                at = end
                if segment.parent >= 0:
                    sees[i, k] = sees[i, segment.parent]
                sees[i, k, k] = True
        of = torch.from_numpy(which)
        mask = torch.from_numpy(sees)[torch.arange(len(rows))[:, None, None], of[:, :, None], of[:, None, :]]
        mask &= torch.ones(length, length, dtype=torch.bool).tril()
        inputs = {
            "input_ids": torch.from_numpy(ids),
            "position_ids": torch.from_numpy(positions),
            "attention_mask": mask[:, None],
            "pixel_values": pixel_values(np.stack(images)),
        }
        return PackedBatch(inputs, torch.from_numpy(labels), looks)


def pixel_values(images: np.ndarray) -> Tensor:
    """(B, 112, 112, 3) uint8 as the processor gives them, (B, 3, 112, 112) float32."""
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - IMAGE_MEAN) / IMAGE_STD


def _questions(sample: Sample) -> QuestionsByKind:
    return questions_about(sample.cards, sample.side)


def _questions_on(questions: QuestionsByKind, card: int) -> list[Question]:
    return [question for kind in BOXED_KINDS for question in questions[kind] if question.card == card]


def _is_first(question: Question, sample: Sample) -> bool:
    """Of those that an ambiguous question fits, the card on the left is the one whose box is given. Either would be
    right, but of a box that is now this one's and now that one's each number is a guess.
    """
    centres = [sample.cards[k].centre[0] for k in question.candidates]
    return question.card is None or sample.cards[question.card].centre[0] == min(centres)


def _true_box(question: Question, sample: Sample) -> Box:
    return view_of(sample, WHOLE) if question.card is None else sample.cards[question.card].box


def _one(rng: np.random.Generator, options: Sequence[_T]) -> _T:
    return options[int(rng.integers(len(options)))]
