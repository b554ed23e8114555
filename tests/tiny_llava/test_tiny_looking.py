"""Where the language model is told to look: at the right patches, from the right tokens, by its own attention."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from finegrain_ops.tiny_llava.model import HEADS, new_model
from finegrain_ops.tiny_llava.scenes import COLOURS, LETTERS, SHAPES
from finegrain_ops.tiny_llava.tokenizer import NUMBER_WORDS, vocabulary
from finegrain_ops.tiny_llava.training.dense import patches_on
from finegrain_ops.tiny_llava.training.looking import (
    NAME_LAYER,
    SAID_LAYER,
    TOLD_HEADS,
    Watched,
    looking_loss,
    watch,
)
from finegrain_ops.tiny_llava.training.packing import IGNORED, Look, Packer

WORDS = vocabulary()
PACKER = Packer()
PLACES = ("row", "place", "image")


@pytest.fixture(scope="module")
def packed(data):
    return PACKER.scenes(data, list(range(12)), np.random.default_rng(0))


@pytest.fixture(scope="module")
def talker():
    """Untrained, with attention that differs from token to token."""
    torch.manual_seed(1)
    model = new_model(0).eval()
    model.set_attn_implementation("eager")
    return model


def attention_of(model, batch) -> tuple[torch.Tensor, ...]:
    mask = torch.zeros(batch.inputs["attention_mask"].shape).masked_fill(~batch.inputs["attention_mask"], -1e9)
    with torch.no_grad():
        output = model.model(**{**batch.inputs, "attention_mask": mask}, output_attentions=True, use_cache=False)
    return output.attentions


def test_attention_is_the_models_own(talker, packed) -> None:
    """As the model gives it where it computes it eagerly; of the image's tokens only."""
    with watch(talker) as watched:
        attentions = attention_of(talker, packed)
    rows, places, images = (torch.tensor([getattr(look, name) for look in packed.looks]) for name in PLACES)
    assert len(set(images.tolist())) > 2  # first ones, and second ones of several rows
    for layer in (NAME_LAYER, SAID_LAYER):
        found = watched.attention(layer, rows, places, images)
        assert found.shape == (len(rows), TOLD_HEADS, 64)
        assert 0 < TOLD_HEADS < HEADS
        for look, of_look in zip(packed.looks, found):
            expected = attentions[layer][look.row, :TOLD_HEADS, look.place, look.image : look.image + 64]
            torch.testing.assert_close(of_look, expected / expected.sum(-1, keepdim=True), atol=1e-5, rtol=1e-4)
    ids = packed.inputs["input_ids"]
    for look in packed.looks:
        assert (ids[look.row, look.image : look.image + 64] == WORDS.index("<image>")).all()


def test_nothing_is_watched_afterwards(talker, packed) -> None:
    def num_hooks() -> int:
        return sum(len(module._forward_hooks) for module in talker.modules())

    before = num_hooks()
    with watch(talker):
        assert num_hooks() > before
    with pytest.raises(ZeroDivisionError), watch(talker):
        raise ZeroDivisionError
    assert num_hooks() == before


def test_names_and_what_is_said_look(packed, data) -> None:
    """A name is a colour or a shape that the cards in the boxes have; what is said follows a name of the same cards,
    and goes on with an answer or a box. In the whole image.
    """
    first = min(look.image for look in packed.looks)
    in_whole = [look for look in packed.looks if look.image == first]
    names = [look for look in in_whole if look.is_name]
    said = [look for look in in_whole if not look.is_name]
    assert min(len(names), len(said)) > 12 * 5
    ids = packed.inputs["input_ids"]
    cards = [{tuple(edge / s.side for edge in card.box): card for card in s.cards} for s in data.samples[:12]]
    named: dict[tuple[int, tuple], int] = {}  # where a card is named first
    for look in names:
        word = WORDS[ids[look.row, look.place]].strip()
        of_word = [card for card in cards[look.row].values() if word in (card.colour, card.shape)]
        assert word in COLOURS or word in SHAPES
        assert {cards[look.row][box] for box in look.boxes} == set(of_word)
        for box in look.boxes:
            named[look.row, box] = min(look.place, named.get((look.row, box), look.place))
    for look in said:
        assert all(named[look.row, box] < look.place for box in look.boxes)
        assert packed.labels[look.row, look.place + 1] != IGNORED
        word = WORDS[ids[look.row, look.place]]
        assert word in (" ASSISTANT:", " [", ", ", "]", *NUMBER_WORDS) or word[1:] in (*COLOURS, *SHAPES, *LETTERS)
    looked = {(look.row, look.place + 1) for look in in_whole}
    numbers = [
        (row, place)
        for row, place in (packed.labels != IGNORED).nonzero().tolist()
        if WORDS[packed.labels[row, place]] in NUMBER_WORDS
    ]
    not_looked = [place for place in numbers if place not in looked]
    assert len(not_looked) < 0.5 * len(numbers)  # boxes of whole scenes are on no card


def test_details_are_looked_at_in_crops(data) -> None:
    """Of a crop alone, and of the second image of a row: the letter, the dot or the card that is asked about."""
    rows = list(range(24))
    crops = PACKER.crops(data, rows, np.random.default_rng(0))
    scenes = PACKER.scenes(data, rows, np.random.default_rng(0))
    first = min(look.image for look in crops.looks)
    assert {look.image for look in crops.looks} == {first} == {min(look.image for look in scenes.looks)}
    in_crops = [(crops, look) for look in crops.looks]
    in_crops += [(scenes, look) for look in scenes.looks if look.image > first]
    kinds = set()
    for batch, look in in_crops:
        asked = [WORDS[token] for token in batch.inputs["input_ids"][look.row, look.place - 8 : look.place + 1]]
        (box,) = look.boxes
        sample, is_name = data.samples[rows[look.row]], look.is_name
        parts = {}
        for shown, crop in zip(sample.shown, sample.crops):
            for name in ("box", "letter_box", "dot_box"):
                edges = getattr(sample.cards[shown], name)
                scale = [(edge - crop[k % 2]) / (crop[k % 2 + 2] - crop[k % 2]) for k, edge in enumerate(edges)]
                parts[tuple(round(edge, 6) for edge in scale)] = (name, sample.cards[shown])
        name, card = parts[tuple(round(edge, 6) for edge in box)]
        if is_name:
            assert name == "box"
            assert asked[-1].strip() in (card.colour, card.shape)
        elif asked[-1] == " ASSISTANT:":
            detail = "letter" if " letter" in asked else "dot" if " dot" in asked else ""
            assert name == (f"{detail}_box" if detail else "box")
            kinds.add(detail)
        assert patches_on(box).any()
    assert kinds == {"letter", "dot", ""}


def test_the_loss_is_the_log_of_the_share_on_the_card() -> None:
    """Written out, of attention that is given."""
    boxes = ((0.0, 0.0, 0.25, 0.25), (0.5, 0.5, 0.8, 0.6))
    looks = [Look(0, 7, True, 5, boxes[:1]), Look(1, 3, False, 5, boxes[1:]), Look(0, 9, False, 5, boxes)]
    looks.append(Look(1, 99, False, 80, boxes[:1]))  # of a second image, which counts as much as all of the first
    torch.manual_seed(0)
    shares = torch.rand(4, TOLD_HEADS, 64).softmax(-1)

    class Given(Watched):
        def attention(self, layer, rows, places, images):
            asked = list(zip(rows.tolist(), places.tolist(), images.tolist()))
            told = [k for k, look in enumerate(looks) if (look.row, look.place, look.image) in asked]
            assert len(told) == len(asked)
            assert {looks[k].is_name for k in told} == {layer == NAME_LAYER}
            return shares[told]

    loss, share = looking_loss(Given(), looks)
    on = []
    for look, of_look in zip(looks, shares):
        patches = {k for box in look.boxes for k in range(64) if patches_on(box)[k]}
        on.append([sum(float(of_head[k]) for k in patches) for of_head in of_look])
    groups = [on[0], [*on[1], *on[2]], on[3]]
    assert loss.item() == pytest.approx(np.mean([-np.mean(np.log(group)) for group in groups]), rel=1e-3)
    assert share == pytest.approx(np.mean([np.mean(group) for group in groups]), rel=1e-4)


def test_patches_on_a_card() -> None:
    """Columns 2 and 3, rows 1 to 4; half a patch beyond its centre is on it no more."""
    eighth = 1 / 8
    found = patches_on((2 * eighth, 1 * eighth, 4 * eighth, 5 * eighth)).reshape(8, 8)
    expected = np.zeros((8, 8), bool)
    expected[1:5, 2:4] = True
    assert (found == expected).all()
    reaching = patches_on((2 * eighth - 0.2 * eighth, 1 * eighth, 4 * eighth, 5 * eighth)).reshape(8, 8)
    assert reaching[2, 1]
    assert not patches_on((2 * eighth - 0.1 * eighth, 1 * eighth, 4 * eighth, 5 * eighth)).reshape(8, 8)[2, 1]


def test_looks_are_learnt(talker, data) -> None:
    """From the first weights, in a few steps of this loss alone."""
    batch = PACKER.scenes(data, [0, 1], np.random.default_rng(0))
    model = new_model(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    shares = []
    for _ in range(12):
        with watch(model) as watched:
            model.model(**batch.inputs, use_cache=False)
        loss, share = looking_loss(watched, batch.looks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        shares.append(share)
    assert shares[-1] > 2 * shares[0]
