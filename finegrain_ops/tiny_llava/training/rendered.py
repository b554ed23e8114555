"""The training scenes as the model sees them, rendered once into a file: the whole scene, crops of two of its cards,
and a crop of somewhere else, 112 x 112 each.

Crops are those that DualFocus makes of boxes that are a little off, as a model's are.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from ... import regions
from ...boxes import Box
from ...regions import dualfocus_crops
from .. import drawing, scenes, tokenizer
from ..scenes import CROWDED, PLAIN, Card, Scene, draw_scene, seed_of
from ..tokenizer import IMAGE_SIDE

SHARE_CROWDED = 0.2
WHOLE, CROPS, ELSEWHERE = 0, (1, 2), 3  # which of a scene's images is which
NUM_IMAGES = 4


@dataclass(frozen=True)
class Sample:
    """A scene of which only small images are left.

    Attributes:
        cards: with boxes in pixels of the scene.
        side: of the scene.
        shown: the cards that its crops show.
        crop_boxes: the box that each crop was made around, and the crop: of CROPS, then of ELSEWHERE.
    """

    cards: tuple[Card, ...]
    side: float
    shown: tuple[int, int]
    crop_boxes: tuple[Box, ...]
    crops: tuple[Box, ...]


class RenderedScenes:
    """The first `count` scenes of a split, rendered into `folder` where they are not there yet.

    Args:
        workers: processes that render.
    """

    def __init__(self, folder: Path, split: str, count: int, workers: int) -> None:
        self._images_path, self._samples_path = folder / f"{split}.npy", folder / f"{split}.jsonl"
        self._facts = {"split": split, "count": count, "source": _fingerprint()}
        if not self._is_there():
            folder.mkdir(parents=True, exist_ok=True)
            self._render(split, count, workers)
        self.images = np.load(self._images_path, mmap_mode="r")  # (count, NUM_IMAGES, 112, 112, 3) uint8
        with self._samples_path.open() as lines:
            next(lines)
            self.samples = [_sample(json.loads(line)) for line in lines]

    def __len__(self) -> int:
        return len(self.samples)

    def _is_there(self) -> bool:
        """The file of samples is renamed into its place when all is written."""
        if not self._samples_path.exists() or not self._images_path.exists():
            return False
        with self._samples_path.open() as lines:
            return bool(json.loads(next(lines)) == self._facts)

    def _render(self, split: str, count: int, workers: int) -> None:
        self._samples_path.unlink(missing_ok=True)  # its images are about to be overwritten
        shape = (count, NUM_IMAGES, IMAGE_SIDE, IMAGE_SIDE, 3)
        images = np.lib.format.open_memmap(self._images_path, "w+", np.uint8, shape)
        unfinished = self._samples_path.with_suffix(".unfinished")
        seeds = [seed_of(split, i) for i in range(count)]
        with multiprocessing.get_context("spawn").Pool(workers) as pool, unfinished.open("w") as lines:
            lines.write(json.dumps(self._facts) + "\n")
            rendered = pool.imap(render_sample, seeds, chunksize=64)
            for i, (of_scene, sample) in enumerate(tqdm(rendered, "rendering scenes", count, unit="scene")):
                images[i] = of_scene
                lines.write(json.dumps(asdict(sample)) + "\n")
        images.flush()
        unfinished.replace(self._samples_path)


def render_sample(seed: int) -> tuple[np.ndarray, Sample]:
    """The images of one training scene, (NUM_IMAGES, 112, 112, 3) uint8, and the rest of it."""
    rng = np.random.default_rng((seed, 1))
    scene = draw_scene(seed, CROWDED if rng.random() < SHARE_CROWDED else PLAIN)
    side = float(scene.image.width)
    shown = tuple(int(i) for i in rng.permutation(len(scene.cards))[:2])
    boxes = [about(scene.cards[i].box, side, rng) for i in shown]
    boxes.append(_elsewhere(scene, rng))
    crops = [tuple(map(float, crop)) for crop in dualfocus_crops(boxes, scene.size).tolist()]
    images = [scene.image.resize((IMAGE_SIDE, IMAGE_SIDE), Image.Resampling.BICUBIC)]
    images += [
        scene.image.crop(tuple(map(int, crop))).resize((IMAGE_SIDE, IMAGE_SIDE), Image.Resampling.BICUBIC)
        for crop in crops
    ]
    sample = Sample(scene.cards, side, (shown[0], shown[1]), tuple(boxes), tuple(crops))  # type: ignore[arg-type]
    return np.stack([np.asarray(image) for image in images]), sample


def about(box: Box, side: float, rng: np.random.Generator) -> Box:
    """A box that is a little off: 0.9 to 1.3 times as large, its centre moved by up to an eighth."""
    width = (box[2] - box[0]) * rng.uniform(0.9, 1.3)
    centre = [(box[k] + box[k + 2]) / 2 + rng.uniform(-0.125, 0.125) * (box[2] - box[0]) for k in (0, 1)]
    edges = [*(c - width / 2 for c in centre), *(c + width / 2 for c in centre)]
    x0, y0, x1, y1 = (float(min(max(edge, 0.0), side)) for edge in edges)
    return x0, y0, x1, y1


def _elsewhere(scene: Scene, rng: np.random.Generator) -> Box:
    """A box of a card's size, anywhere."""
    side = float(scene.image.width)
    width = float(rng.uniform(0.12, 0.25)) * side
    x, y = rng.uniform(0, side - width, 2).tolist()
    return x, y, x + width, y + width


def _sample(facts: dict[str, Any]) -> Sample:
    cards = tuple(_card(card) for card in facts["cards"])
    boxes, crops = (tuple(map(tuple, facts[name])) for name in ("crop_boxes", "crops"))
    return Sample(cards, facts["side"], tuple(facts["shown"]), boxes, crops)


def _card(facts: dict[str, Any]) -> Card:
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in facts.items()}
    return Card(**values)


def _fingerprint() -> str:
    """Of the code that draws: what was rendered by other code is rendered anew."""
    paths: Sequence[Any] = (scenes.__file__, drawing.__file__, regions.__file__, tokenizer.__file__, __file__)
    return hashlib.sha256(b"".join(Path(path).read_bytes() for path in paths)).hexdigest()
