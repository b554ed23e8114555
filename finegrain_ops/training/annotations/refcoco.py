"""RefCOCO, RefCOCO+ and RefCOCOg (Kazemzadeh et al., EMNLP 2014; Mao et al., CVPR 2016) from the published files.

    refs(unc).p       a pickled list of {"ref_id": 0, "ann_id": 1719310, "image_id": 581857, "split": "train",
                      "category_id": 1, "file_name": "COCO_train2014_000000581857_16.jpg", "sentences": [{"sent_id": 0,
                      "sent": "the lady with the blue shirt", "raw": ..., "tokens": [...]}, ...], ...}
    instances.json    COCO: {"images": [{"id", "file_name", "width", "height", ...}], "annotations": [{"id", "bbox":
                      [x, y, width, height], "image_id", "category_id", ...}], "categories": [{"id", "name", ...}]}

RefCOCO and RefCOCO+ were split by unc (train, val, testA, testB), RefCOCOg by umd (train, val, test) and google (train,
val). The file_name of a ref ends in the number of its annotation; the image's own is in instances.json.
"""

from __future__ import annotations

import collections
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...boxes import Box
from ...validation import describe
from .json_records import read_json
from .records import AnnotatedImage, BoxedPhrase, clipped, field, image_size, require_file

SPLITTERS = ("unc", "umd", "google", "berkeley")


class RefCOCO:
    """The refs of one data set, read at once: some 50 000.

    Args:
        folder: with instances.json and refs(<split_by>).p.
        split_by: "unc", "umd", "google" or "berkeley".

    Attributes:
        splits: the names of the splits that there are.
        skipped: how many records were passed over, by reason; see records.py.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: a file does not have its published form; names it and the record.
    """

    def __init__(self, folder: str | Path, split_by: str = "unc") -> None:
        if split_by not in SPLITTERS:
            raise ValueError(f"split_by: expected one of {', '.join(map(repr, SPLITTERS))}, got {split_by!r}")
        self.skipped: collections.Counter[str] = collections.Counter()
        folder = Path(folder)
        path = require_file(folder, ["instances.json"])
        instances = read_json(path)
        self._images = _images(instances, path)
        self._boxes = _boxes(instances, path)
        path = require_file(folder, [f"refs({split_by}).p"])
        self._phrases: dict[str, list[BoxedPhrase]] = {}
        for i, ref in enumerate(read_plain_pickle(path)):
            self._add(ref, f"{path}, ref {i}")
        self.splits = tuple(self._phrases)

    def phrases(self, split: str | None = None) -> Iterator[BoxedPhrase]:
        """Every sentence of every ref with the ref's box; of one split, or of all."""
        if split is not None and split not in self._phrases:
            raise ValueError(f"split: expected one of {', '.join(map(repr, self._phrases))}, got {split!r}")
        for name, phrases in self._phrases.items():
            if split in (None, name):
                yield from phrases

    def _add(self, ref: Any, where: str) -> None:
        phrases = self._phrases.setdefault(field(ref, ["split"], str, where), [])
        sentences = field(ref, ["sentences"], (list, tuple), where)
        image = self._images.get(field(ref, ["image_id"], int, where))
        box = self._boxes.get(field(ref, ["ann_id"], int, where))
        if image is None or box is None:
            self.skipped["ref: its image or annotation is not in instances.json"] += len(sentences)
            return
        inside = clipped(box, image.size)
        if inside is None:
            self.skipped["ref: its box has no area in its image"] += len(sentences)
            return
        ref_id = field(ref, ["ref_id"], int, where)
        for k, sentence in enumerate(sentences):
            text = field(sentence, ["sent"], str, f"{where}, sentence {k}").strip()
            if text:
                phrases.append(BoxedPhrase(image, text, (inside,), ref_id))
            else:
                self.skipped["ref: its sentence is empty"] += 1


class _PlainUnpickler(pickle.Unpickler):
    """Containers, texts and numbers need no global name; anything else would run code."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")


def read_plain_pickle(path: Path) -> list[Any]:
    """A pickled list that holds nothing but lists, tuples, sets, dicts, text, bytes, numbers, booleans and None.

    Unpickling anything else could run code from the file, and is refused before it does. Text of Python 2 is read as
    UTF-8.

    Raises:
        ValueError: the file is no such pickle.
    """
    with path.open("rb") as file:
        try:
            read = _PlainUnpickler(file, encoding="utf-8", errors="replace").load()
        except Exception as error:  # a broken pickle raises nearly anything
            raise ValueError(
                f"{path}: expected a pickled list of plain data, got {error or type(error).__name__}"
            ) from error
    if not isinstance(read, list):
        raise ValueError(f"{path}: expected a pickled list, got {describe(read)}")
    return read


def _images(instances: Any, path: Path) -> dict[int, AnnotatedImage]:
    images = {}
    for i, record in enumerate(field(instances, ["images"], list, str(path))):
        where = f"{path}, image {i}"
        image_id = field(record, ["id"], int, where)
        images[image_id] = AnnotatedImage(image_id, field(record, ["file_name"], str, where), image_size(record, where))
    return images


def _boxes(instances: Any, path: Path) -> dict[int, Box]:
    boxes = {}
    for i, record in enumerate(field(instances, ["annotations"], list, str(path))):
        where = f"{path}, annotation {i}"
        box = field(record, ["bbox"], list, where)
        if len(box) != 4 or not all(isinstance(side, (int, float)) for side in box):
            raise ValueError(f"{where}: expected 'bbox' to be [x, y, width, height], got {describe(box)}")
        x, y, width, height = map(float, box)
        boxes[field(record, ["id"], int, where)] = (x, y, x + width, y + height)
    return boxes
