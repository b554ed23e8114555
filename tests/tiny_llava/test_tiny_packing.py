"""A packed row is its conversations one by one: the tokens that the methods feed, and the model's logits of them."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finegrain_ops import DualFocus
from finegrain_ops.methods import dualfocus_passes
from finegrain_ops.tiny_llava.questions import AMBIGUOUS, BOXED_KINDS, KINDS, LOCAL_KINDS, questions_about
from finegrain_ops.tiny_llava.scenes import CROWDED, PLAIN, Scene, draw_scene, seed_of
from finegrain_ops.tiny_llava.tokenizer import NUMBER_WORDS, vocabulary
from finegrain_ops.tiny_llava.training.packing import IGNORED, Packer, pixel_values
from finegrain_ops.tiny_llava.training.rendered import CROPS, ELSEWHERE, WHOLE, RenderedScenes
from packed_conversations import Conversation, Reader, logits_of

ROWS = list(range(32))
PACKER = Packer()


@pytest.fixture(scope="module")
def reader(model, processor) -> Reader:
    return Reader(model, processor)


@pytest.fixture(scope="module")
def packed(data):
    """One row for each of 32 scenes."""
    return Packer().scenes(data, ROWS, np.random.default_rng(2))


@pytest.fixture(scope="module")
def said(packed, data, reader) -> list[list[Conversation]]:
    """What each row says."""
    return [reader.conversations(packed, i, data.samples[i]) for i in ROWS]


@pytest.fixture(scope="module")
def packed_crops(data):
    return Packer().crops(data, ROWS, np.random.default_rng(1))


@pytest.fixture(scope="module")
def said_of_crops(packed_crops, data, reader) -> list[list[Conversation]]:
    return [reader.conversations(packed_crops, i, data.samples[i]) for i in ROWS]


def scene_of(data: RenderedScenes, i: int) -> Scene:
    """Drawn again."""
    scenes = [draw_scene(seed_of("train", i), difficulty) for difficulty in (PLAIN, CROWDED)]
    return next(scene for scene in scenes if scene.cards == data.samples[i].cards)


def second_round(row: list[Conversation]) -> Conversation:
    (found,) = [conversation for conversation in row if conversation.form.startswith("two rounds")]
    return found


# --- what is said ---


@pytest.mark.parametrize("of", ["scenes", "crops"])
def test_conversations_are_the_methods_and_learn_answers_alone(of: str, request) -> None:
    """Reader has each of them token by token and label by label; here, that nothing else is in the rows."""
    name = "packed" if of == "scenes" else "packed_crops"
    batch, rows = request.getfixturevalue(name), request.getfixturevalue("said" if of == "scenes" else "said_of_crops")
    for i, row in enumerate(rows):
        read = torch.zeros(batch.labels.shape[1], dtype=torch.bool)
        for conversation in row:
            read[conversation.places] = True
        assert (batch.inputs["input_ids"][i, ~read] == 0).all()  # padding
        assert (batch.labels[i, ~read] == IGNORED).all()
        length = int(read.sum())
        assert read[:length].all()  # on the right
        mask = batch.inputs["attention_mask"][i, 0]
        assert not mask[:length, length:].any()
        assert not mask[length:, :length].any()
        assert mask.diagonal().all()  # no row of a softmax is empty
        assert (batch.labels[i] != IGNORED).sum() > 0
    assert batch.inputs["attention_mask"].dtype == torch.bool


def test_what_is_asked_about_a_scene(said, data) -> None:
    """Each kind where there is one, letters and dots less often; colours, shapes and which is left of which twice where
    there are two; as many boxes of each; one conversation of two rounds; and names of cards, by a colour or shape that
    no other has.
    """
    num_unreadable, num_boxes = 0, set()
    for row, sample in zip(said, data.samples):
        found = questions_about(sample.cards, sample.side)
        there_are = {kind for kind in found if found[kind]}
        plain = Counter(c.question.kind for c in row if c.form == "plain")
        for kind, count in plain.items():
            assert count == (min(2, len(found[kind])) if kind in ("colour", "shape", "left_of") else 1)
        asked = [c.question.text for c in row if c.form == "plain"]
        assert len(set(asked)) == len(asked)
        assert {"caption", *there_are} - set(LOCAL_KINDS) <= set(plain) <= {"caption", *there_are}
        num_unreadable += sum(plain[kind] for kind in LOCAL_KINDS)
        forms = Counter(c.form for c in row if c.form != "plain")
        elsewhere = forms.pop("box, elsewhere", 0) + forms.pop("box, given", 0)
        assert elsewhere == forms.pop("two rounds, elsewhere", 0) + forms.pop("two rounds, given", 0)
        assert forms["two rounds"] + elsewhere == 1
        num_alone = [
            sum(words.count(word) == 1 for word in words)
            for words in ([card.colour for card in sample.cards], [card.shape for card in sample.cards])
        ]
        named = [c.question.text for c in row if c.form == "name"]
        assert sorted(named) == sorted(c.question.text for c in row if c.form == "name, box")
        assert len(set(named)) == len(named) == sum(min(2, count) for count in num_alone)
        num_boxes.add((forms["box"] + elsewhere, forms["grounding"]))
    assert 0.1 < num_unreadable / (2 * len(said)) < 0.6
    ((num_first, num_grounding),) = num_boxes
    assert num_first > 1  # the first round of two is one of them
    assert num_grounding > 0


def test_all_kinds_of_second_rounds(said) -> None:
    seconds = [second_round(row) for row in said]
    assert {c.form for c in seconds} - {"two rounds, given"} == {"two rounds", "two rounds, elsewhere"}
    assert all(c.question.kind == AMBIGUOUS for c in seconds if c.form == "two rounds, given")
    of_crops = [c for c in seconds if c.question.kind in BOXED_KINDS]
    assert 0.5 < len(of_crops) / len(seconds) < 0.9
    assert 0 < sum(c.form == "two rounds, elsewhere" for c in of_crops) < 0.3 * len(of_crops)
    assert {c.question.kind for c in of_crops} == set(BOXED_KINDS)


def test_every_kind_is_asked_for_its_box(said) -> None:
    kinds = Counter(c.question.kind for row in said for c in row if c.form in ("box", "grounding"))
    assert set(kinds) == set(KINDS)
    assert sum(kinds[kind] for kind in BOXED_KINDS) > 0.6 * kinds.total()


def test_of_an_ambiguous_question_the_box_on_the_left_is_learnt(data, reader) -> None:
    """In the second round, whose crop shows either, the other one's box is given."""
    num_learnt, num_given = 0, 0
    for seed in range(3, 6):
        batch = Packer().scenes(data, ROWS, np.random.default_rng(seed))
        for i, sample in enumerate(data.samples[: len(ROWS)]):
            for c in reader.conversations(batch, i, sample):
                if c.question.kind == AMBIGUOUS and c.form.startswith(("box", "grounding")):
                    centres = [sample.cards[k].centre[0] for k in c.question.candidates]
                    is_left = sample.cards[c.question.card].centre[0] == min(centres)
                    num_learnt += is_left
                    num_given += c.form == "box, given"
                    assert is_left == (c.form in ("box", "grounding")) or c.form == "box, elsewhere"
    assert num_learnt > 5
    assert num_given > 0


def test_a_box_of_somewhere_else_is_not_learnt_but_the_answer_is(said, packed) -> None:
    found = [(i, c) for i, row in enumerate(said) for c in row if c.form == "two rounds, elsewhere"]
    assert found
    for i, conversation in found:
        learnt = packed.labels[i, conversation.places]
        (answer, end) = learnt[learnt != IGNORED].tolist()
        assert (answer, end) == tuple(conversation.ids[-2:])


def test_crops_are_asked_about_the_card_that_they_show(said_of_crops, packed_crops, data) -> None:
    for i, row in enumerate(said_of_crops):
        sample = data.samples[i]
        (shown,) = {c.question.card for c in row}
        which = CROPS[sample.shown.index(shown)]
        assert torch.equal(packed_crops.inputs["pixel_values"][i], pixel_values(data.images[[i], which])[0])
        assert {c.form for c in row} == {"plain"}
        asked = questions_about(sample.cards, sample.side)
        expected = {q.text for kind in BOXED_KINDS if kind != AMBIGUOUS for q in asked[kind] if q.card == shown}
        assert Counter(c.question.text for c in row) == Counter(expected)
    assert len(packed_crops.inputs["pixel_values"]) == len(ROWS)
    assert {data.samples[i].shown.index(row[0].question.card) for i, row in enumerate(said_of_crops)} == {0, 1}


def test_the_second_image_is_the_one_that_its_round_is_about(said, packed, data) -> None:
    pixels = packed.inputs["pixel_values"].unflatten(0, (len(ROWS), 2))
    for i, row in enumerate(said):
        conversation, sample = second_round(row), data.samples[i]
        if conversation.question.card is None:
            second = WHOLE
        elif conversation.form == "two rounds, elsewhere":
            second = ELSEWHERE
        else:
            second = CROPS[sample.shown.index(conversation.question.card)]
        expected = pixel_values(data.images[i, [WHOLE, second]])
        assert torch.equal(pixels[i], expected)


def test_batches_are_drawn_from_the_generator(data) -> None:
    first, again, other = (Packer().scenes(data, [0, 1, 2], np.random.default_rng(seed)) for seed in (0, 0, 1))
    for name, value in first.inputs.items():
        assert torch.equal(again.inputs[name], value), name
    assert torch.equal(again.labels, first.labels)
    assert first.labels.shape != other.labels.shape or not torch.equal(first.labels, other.labels)


@given(st.integers(100, 700), st.lists(st.floats(0, 1), min_size=4, max_size=4))
@settings(max_examples=60, deadline=None)
def test_boxes_are_written_as_the_methods_write_them(side: int, edges: list[float]) -> None:
    """To the nearest hundredth, as `BoxStyle` does; which never writes one without area, and no card has none."""
    x0, x1 = sorted(edges[:2])
    y0, y1 = sorted(edges[2:])
    box = (x0 * side, y0 * side, x1 * side, y1 * side)
    words = vocabulary()
    said = [words[token] for token in PACKER._box(box, float(side))]
    assert [said[k] for k in (0, 2, 4, 6, 8)] == [" [", ", ", ", ", ", ", "]"]
    for word, edge in zip((said[k] for k in (1, 3, 5, 7)), (x0, y0, x1, y1)):
        assert word in NUMBER_WORDS
        assert abs(float(word) - edge) <= 0.005 + 1e-9


# --- what the model makes of it ---


def test_logits_are_those_of_each_conversation_alone(model, reader, processor, data) -> None:
    """With the pixels that the processor makes of the scene and of its crop, as at inference."""
    chosen = [0, 3]
    batch = Packer().scenes(data, chosen, np.random.default_rng(4))
    packed = logits_of(model, batch.inputs)
    lengths, num_different = set(), 0
    for row, i in enumerate(chosen):
        sample, scene = data.samples[i], scene_of(data, i)
        conversations = reader.conversations(batch, row, sample)
        lengths.add(max(int(c.places[-1]) for c in conversations))
        for conversation in conversations:
            images = [scene.image]
            if conversation.form.startswith("two rounds"):
                images.append(_second_image(conversation, scene, sample))
            alone = _alone(model, processor, conversation, images)
            of_row = packed[row, conversation.places]
            torch.testing.assert_close(of_row, alone, atol=1e-4, rtol=1e-4)
            num_different += int(alone.std() > 0.1)
    assert len(lengths) > 1  # so that there was padding
    assert num_different > 15  # and that logits say something


def test_logits_of_crops_are_those_of_each_conversation_alone(model, reader, processor, data) -> None:
    chosen = [1, 2]
    batch = Packer().crops(data, chosen, np.random.default_rng(0))
    packed = logits_of(model, batch.inputs)
    for row, i in enumerate(chosen):
        sample, scene = data.samples[i], scene_of(data, i)
        for conversation in reader.conversations(batch, row, sample):
            crop = sample.crops[sample.shown.index(conversation.question.card)]
            alone = _alone(model, processor, conversation, [scene.image.crop(tuple(map(int, crop)))])
            torch.testing.assert_close(packed[row, conversation.places], alone, atol=1e-4, rtol=1e-4)


def _second_image(conversation: Conversation, scene: Scene, sample):
    if conversation.question.card is None:
        return scene.image
    at = -1 if conversation.form.endswith("elsewhere") else sample.shown.index(conversation.question.card)
    return scene.image.crop(tuple(map(int, sample.crops[at])))


def _alone(model, processor, conversation: Conversation, images: list) -> torch.Tensor:
    pixels = processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
    ids = torch.tensor([conversation.ids])
    return logits_of(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels})[0]


def test_dualfocus_feeds_what_was_packed(model, processor, said, data, monkeypatch) -> None:
    """With the true box given in place of the model's: up to the second answer, token by token."""
    fed: list[list[list[int]]] = []
    positions = dualfocus_passes.positions_in_prompts
    monkeypatch.setattr(
        dualfocus_passes, "positions_in_prompts", lambda m, rows, images: fed.append(rows) or positions(m, rows, images)
    )
    method = DualFocus(model, processor)
    num_fed = 0
    for i, row in enumerate(said[:8]):
        conversation = second_round(row)
        if conversation.form == "two rounds":
            scene, question = scene_of(data, i), conversation.question
            method.answer(scene.image, question.text, box=question.box(scene), max_new_tokens=1)
            assert fed[-1] == [conversation.ids[:-2]]  # the answer and its end
            num_fed += 1
    assert num_fed > 3
