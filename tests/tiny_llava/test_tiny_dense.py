"""The tower's half of the training: labels of patches, sheets of letters, and that a tower learns from them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from finegrain_ops.boxes import Box
from finegrain_ops.tiny_llava.model import new_model
from finegrain_ops.tiny_llava.scenes import COLOURS, LETTERS, SHAPES
from finegrain_ops.tiny_llava.tokenizer import vocabulary
from finegrain_ops.tiny_llava.training import dense
from finegrain_ops.tiny_llava.training.dense import DenseHead, dense_batch
from finegrain_ops.tiny_llava.training.packing import pixel_values
from finegrain_ops.tiny_llava.training.rendered import CROPS, ELSEWHERE, WHOLE, Sample

PATCHES = 8  # a side
NONE = -100.0  # no label
NO_LETTER, NO_DOT = float(len(LETTERS)), float(len(COLOURS))
COLOUR_NAMES = list(COLOURS)


def labels_of(sample: Sample, which: int) -> list[list[float]]:
    """Patch by patch: a card is on a patch whose centre is in it, or outside by less than 0.35 of a patch."""
    view = (0.0, 0.0, sample.side, sample.side) if which == WHOLE else sample.crops[which - 1]
    patch = [(view[k + 2] - view[k]) / PATCHES for k in (0, 1)]  # in pixels of the scene
    is_whole = [
        all(view[k] <= box[k] and box[k + 2] <= view[k + 2] for k in (0, 1))
        for card in sample.cards
        for box in (card.letter_box, card.dot_box)
    ]
    letters = [float(LETTERS.index(card.letter)) for card in sample.cards]
    dots = [float(COLOUR_NAMES.index(card.dot)) for card in sample.cards]
    rows = []
    for row in range(PATCHES):
        for column in range(PATCHES):
            x, y = view[0] + (column + 0.5) * patch[0], view[1] + (row + 0.5) * patch[1]
            corner = (view[0] + column * patch[0], view[1] + row * patch[1])
            labels = [float(len(COLOURS)), *[NONE] * 8]
            for card in sample.cards:  # the last one that fits counts
                x0, y0, x1, y1 = card.box
                outside = [max(x0 - x, x - x1) / patch[0], max(y0 - y, y - y1) / patch[1]]
                if max(outside) < 0.35:
                    labels[:2] = COLOUR_NAMES.index(card.colour), SHAPES.index(card.shape)
                    if which == WHOLE:
                        labels[5:] = (edge / sample.side for edge in card.box)
            if which == WHOLE:
                labels[4] = len(sample.cards) - 3.0  # cards, at least three
            else:
                held = [share_held(card.letter_box, corner, patch) for card in sample.cards]
                labels[2] = spot(held, letters, is_whole[::2], NO_LETTER)
                held = [share_held(card.dot_box, corner, patch) for card in sample.cards]
                labels[3] = spot(held, dots, is_whole[1::2], NO_DOT)
            rows.append(labels)
    return rows


def share_held(box: Box, corner: tuple[float, float], patch: list[float]) -> float:
    """How much of a box a patch holds."""
    lengths = [min(box[k + 2], corner[k] + patch[k]) - max(box[k], corner[k]) for k in (0, 1)]
    return math.prod(max(0.0, length) / (box[k + 2] - box[k]) for k, length in enumerate(lengths))


def spot(shares: Sequence[float], labels: Sequence[float], is_whole: Sequence[bool], nothing: float) -> float:
    """What a patch is labelled with that holds these shares of letters: the one that it holds most of, where that is a
    fifth; nothing where it is not even a fiftieth; and not at all in between, and where the image cuts the letter.
    """
    best = max(range(len(shares)), key=lambda k: shares[k])
    if shares[best] <= 0.02:
        return nothing
    return labels[best] if shares[best] > 0.2 and is_whole[best] else NONE


def which_image(data, image: np.ndarray) -> tuple[int, int]:
    """(scene, image of it)."""
    (found,) = np.argwhere((data.images == image).all((2, 3, 4)))
    return int(found[0]), int(found[1])


def test_patches_are_labelled_with_what_they_show(data) -> None:
    """In the whole scenes and in crops; and no scene twice in a batch."""
    batch = dense_batch(data, np.random.default_rng(0), 30, 0.0)
    assert (batch.images.shape, batch.images.dtype) == ((30, 112, 112, 3), np.uint8)
    assert (batch.labels.shape, batch.labels.dtype) == ((30, 64, 9), torch.float32)
    places = [which_image(data, image) for image in batch.images]
    assert len({i for i, _ in places}) == 30
    kinds = Counter(which for _, which in places)
    assert set(kinds) == {WHOLE, *CROPS}
    assert 4 < kinds[WHOLE] < 26
    assert ELSEWHERE not in kinds
    read: set[float] = set()
    for (i, which), labels in zip(places, batch.labels):
        torch.testing.assert_close(labels, torch.tensor(labels_of(data.samples[i], which)), atol=1e-5, rtol=0)
        read.update(labels[:, 2].tolist())
    assert {NONE, NO_LETTER} < read
    assert len(read) > 8


def test_a_share_of_the_batch_is_sheets(data) -> None:
    for share, expected in ((0.0, 0), (0.25, 2), (0.5, 4), (1.0, 8)):
        labels = dense_batch(data, np.random.default_rng(1), 8, share).labels
        is_sheet = (labels[:, :, 0] == NONE).all(1)
        assert is_sheet.sum() == expected
        assert (labels[is_sheet][:, :, [0, 1, 4, 5, 6, 7, 8]] == NONE).all()
        assert not (labels[~is_sheet][:, :, 0] == NONE).any()


def test_sheets_are_labelled_with_the_letter_and_the_dot_that_a_patch_shows_most_of(monkeypatch) -> None:
    """Letters are drawn as blocks here, each in a colour of its own, so that its place can be read from the pixels; the
    places of dots are read from what Pillow is told to draw on the sheet, of which the image is a part.
    """
    letters: list[tuple[str, int]] = []  # and how many pixels
    discs: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    sheets: list[Image.Image] = []
    glyph_mask = dense.glyph_mask

    class Canvas(ImageDraw.ImageDraw):
        def __init__(self, image: Image.Image) -> None:
            super().__init__(image)
            sheets.append(image)

        def ellipse(self, box, fill) -> None:
            discs.append((tuple(box), fill))
            super().ellipse(box, fill=fill)

    def block(letter: str, height: int) -> Image.Image:
        glyph = glyph_mask(letter, height).point(lambda _: 255)
        letters.append((letter, glyph.width * glyph.height))
        return glyph

    monkeypatch.setattr(dense, "glyph_mask", block)
    monkeypatch.setattr(dense, "ink_on", lambda paint: (len(letters), 1, 254))
    monkeypatch.setattr(dense, "ImageDraw", SimpleNamespace(Draw=Canvas))
    seen: list[set[float]] = [set(), set()]
    for seed in range(8):
        for of_sheet in (letters, discs, sheets):
            of_sheet.clear()
        image, labels = dense._sheet(np.random.default_rng(seed))
        left, top = place_in(np.asarray(sheets[0]), image)
        dots = [(box, fill) for box, fill in discs if box[2] - box[0] > 2]  # specks have three pixels
        assert len(letters) == len(dots) >= 16
        masks = [(image == (k + 1, 1, 254)).all(-1) for k in range(len(letters))]
        shares = [count_in_patches(mask) / size for mask, (_, size) in zip(masks, letters)]
        assert is_spotted(labels[:, 2], shares, [LETTERS.index(letter) for letter, _ in letters], NO_LETTER)
        shares = []
        for (x0, y0, x1, y1), _ in dots:
            whole = np.zeros((3 * 112, 3 * 112), bool)
            whole[112 + y0 - top : 113 + y1 - top, 112 + x0 - left : 113 + x1 - left] = True
            shares.append(count_in_patches(whole[112:224, 112:224]) / whole.sum())
        assert is_spotted(labels[:, 3], shares, [list(COLOURS.values()).index(fill) for _, fill in dots], NO_DOT)
        for of_part, labelled in zip(seen, (labels[:, 2], labels[:, 3])):
            of_part.update(labelled.tolist())
    assert seen[0] == {NONE, *map(float, range(len(LETTERS) + 1))}
    assert seen[1] == {NONE, *map(float, range(len(COLOURS) + 1))}


def place_in(sheet: np.ndarray, image: np.ndarray) -> tuple[int, int]:
    """Where in the sheet the image was cut out: x, y."""
    rows, columns = (length - 112 + 1 for length in sheet.shape[:2])
    places = [(x, y) for y in range(rows) for x in range(columns)]
    (place,) = [(x, y) for x, y in places if np.array_equal(sheet[y : y + 112, x : x + 112], image)]
    return place


def count_in_patches(mask: np.ndarray) -> np.ndarray:
    """(64,)"""
    return mask.reshape(PATCHES, 14, PATCHES, 14).sum((1, 3)).flatten()


def is_spotted(found: np.ndarray, shares: list[np.ndarray], labels: list[int], nothing: float) -> bool:
    """Whether each patch is labelled as `spot` says; where a share is a bound itself, either way is right."""
    is_whole = [share.sum() > 1 - 1e-9 for share in shares]
    num_compared = 0
    for label, of_patch in zip(found.tolist(), np.transpose(shares).tolist()):
        if min(abs(max(of_patch) - bound) for bound in (0.02, 0.2)) > 1e-6:
            num_compared += 1
            if label != spot(of_patch, labels, is_whole, nothing):
                return False
    return num_compared > 50


def test_sheets_show_letters_in_ink(data) -> None:
    image, labels = dense._sheet(np.random.default_rng(0))
    assert (image.shape, image.dtype, labels.shape) == ((112, 112, 3), np.uint8, (64, 9))
    is_ink = (image == 25).all(-1) | (image == 240).all(-1)
    of_cells = is_ink.reshape(4, 28, 4, 28).any((1, 3))
    assert of_cells.all()
    assert 0.02 < is_ink.mean() < 0.3


# --- the loss ---


def test_the_loss_is_that_of_its_parts(data) -> None:
    """Written out one patch at a time, with words looked up by their text. That a patch shows no letter, or no dot,
    counts a fifth, and not as right.
    """
    batch = dense_batch(data, np.random.default_rng(2), 8, 0.25)
    torch.manual_seed(0)
    head, features, embeddings = DenseHead(5), torch.randn(8, 64, 5), torch.randn(len(vocabulary()), 5)
    loss, right = head.loss(features, batch.labels, embeddings)

    def said(feature: torch.Tensor, words: Sequence[str], *none: torch.Tensor) -> list[float]:
        """Scores of words, and of none of them."""
        known = [float(feature @ embeddings[vocabulary().index(word)]) for word in words]
        return known + [float(score) for score in none]

    words = {name: [f" {word}" for word in of] for name, of in (("colour", COLOURS), ("shape", SHAPES))}
    words |= {"letter": [f" {word}" for word in LETTERS], "dot": words["colour"]}
    words["count"] = [" three", " four", " five", " six", " seven", " eight"]
    numbers = [f"{k / 100:.2f}" for k in range(101)]
    losses: dict[str, list[tuple[float, float]]] = {}  # with the weight of each
    hits: dict[str, list[bool]] = {}

    def count(name: str, scores: list[float], label: int, weight: float = 1.0, near: int = 0) -> None:
        log_sum = math.log(sum(map(math.exp, scores)))
        losses.setdefault(name, []).append((log_sum - scores[label], weight))
        if weight == 1.0:
            hits.setdefault(name, []).append(abs(max(range(len(scores)), key=lambda k: scores[k]) - label) <= near)

    with torch.no_grad():
        normal = features / (features.square().mean(-1, keepdim=True)).sqrt()
        for feature, labels in zip(normal.flatten(0, 1), batch.labels.flatten(0, 1).tolist()):
            nothing = head.none(feature)
            none = {"colour": nothing[:1], "shape": nothing[:0], "letter": nothing[1:2], "dot": nothing[2:]}
            none["count"] = nothing[:0]
            for name, label in zip(words, labels):
                if label != NONE:
                    is_nothing = (name, label) in (("letter", NO_LETTER), ("dot", NO_DOT))
                    seen = head.dot.weight @ feature if name == "dot" else feature
                    count(name, said(seen, words[name], *none[name]), int(label), 0.2 if is_nothing else 1.0)
            if labels[5] != NONE:
                for edge, label in zip(head.edges.weight.reshape(4, 5, 5), labels[5:]):
                    count("edges", said(edge @ feature, numbers), round(label * 100), near=2)
    means = {name: sum(a * b for a, b in of) / sum(b for _, b in of) for name, of in losses.items()}
    expected = sum(means[name] for name in ("colour", "shape", "letter", "dot", "count", "edges"))
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    assert right == pytest.approx({name: sum(of) / len(of) for name, of in hits.items()})


def test_parts_that_are_not_labelled_have_no_loss(data) -> None:
    head, features, embeddings = DenseHead(5), torch.randn(2, 64, 5), torch.randn(len(vocabulary()), 5)
    whole = torch.tensor([labels_of(data.samples[i], WHOLE) for i in (0, 1)])
    loss, right = head.loss(features, whole, embeddings)
    assert loss.isfinite()
    assert set(right) == {"colour", "shape", "count", "edges"}
    sheets = dense_batch(data, np.random.default_rng(0), 2, 1.0).labels
    loss, right = head.loss(features, sheets, embeddings)
    assert loss.isfinite()
    assert set(right) == {"letter", "dot"}


def test_a_tower_learns_a_batch(data) -> None:
    """The small model's own, from its first weights, to say what it sees in the language model's words."""
    batch = dense_batch(data, np.random.default_rng(3), 4, 0.25)
    model, head = new_model(0), DenseHead(128)
    tower, projector, words = model.model.vision_tower, model.model.multi_modal_projector, model.get_input_embeddings()
    trained = [weight for part in (tower, projector, words, head) for weight in part.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=2e-3)
    images, losses, rights = pixel_values(batch.images), [], []
    for _ in range(14):
        features = projector(tower(images).last_hidden_state[:, 1:])
        loss, right = head.loss(features, batch.labels, words.weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        rights.append(right["colour"])
    assert losses[-1] < 0.75 * losses[0]
    assert rights[-1] > 0.5 > rights[0]
