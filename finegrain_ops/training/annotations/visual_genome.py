"""Visual Genome (Krishna et al., IJCV 2017): questions, regions and objects with their boxes, from the published JSON.

    image_data.json             [{"image_id": 1, "width": 800, "height": 600, "url": ".../VG_100K_2/1.jpg", ...}, ...]
    question_answers.json       [{"id": 1, "qas": [{"qa_id": 986768, "image_id": 1, "question": "What color is the
                                clock?", "answer": "Green.", "q_objects": [], "a_objects": []}, ...]}, ...]
    qa_to_region_mapping.json   {"986768": 1382, ...}: questions asked about a region
    region_descriptions.json    [{"id": 1, "regions": [{"region_id": 1382, "image_id": 1, "phrase": "the clock is
                                green", "x": 421, "y": 57, "width": 82, "height": 139}, ...]}, ...]
    objects.json                [{"image_id": 1, "objects": [{"object_id": 1058498, "x": 421, "y": 91, "w": 79,
                                "h": 339, "names": ["clock"], ...}, ...]}, ...]

The releases differ in their keys, and all are read: "id" or "image_id" for an image, "id" or its own name for anything
else; "w" and "h" or "width" and "height"; "names" or one "name". The objects of a question are "q_objects" and
"a_objects" (1.2), each an object of objects.json with its box, or "question_objects" and "answer_objects" (1.0) or
"question_synsets" and "answer_synsets" (the data's own readme), which give names ("entity_name") only: such a name is
looked up among the objects of the image.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ...boxes import Box
from ...validation import describe
from .json_records import JsonRecords, read_json
from .records import AnnotatedImage, BoxedPhrase, BoxedQuestion, clipped, field, image_size, number, require_file

BOX_SOURCES = ("region", "objects")

_IMAGE = ("image_id", "id")
_OBJECTS_OF_QUESTIONS = (
    "q_objects",
    "a_objects",
    "question_objects",
    "answer_objects",
    "question_synsets",
    "answer_synsets",
)
_FILES = {
    "question_answers": ("question_answers.json",),
    "regions": ("region_descriptions.json",),
    "objects": ("objects.json", "objects_v1_2.json"),
}
_IDS = {"regions": ("region_id", "id"), "objects": ("object_id", "id")}


class VisualGenome:
    """The annotations in a folder. Files are read when they are needed, and of large ones a record at a time.

    Args:
        folder: with image_data.json, and of the other files above those that the methods called need.

    Attributes:
        images: id -> AnnotatedImage; `path` is the end of the url, VG_100K/2.jpg or VG_100K_2/1.jpg.
        skipped: how many records were passed over so far, by reason; see records.py.

    Raises:
        FileNotFoundError: a file that is needed is not there.
        ValueError: a file does not have its published form; names it and the record.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.skipped: collections.Counter[str] = collections.Counter()
        self._records: dict[str, JsonRecords] = {}
        self._region_of: dict[int, int] | None = None
        self.images = self._read_images()

    def questions(self, boxes_from: Sequence[str] = BOX_SOURCES) -> Iterator[BoxedQuestion]:
        """Every question that has a box, image by image.

        Args:
            boxes_from: the sources of boxes in order of preference; a question takes those of the first that has any.
                "region": the region that the question was asked about. "objects": the objects that it and its answer
                name. [] asks for no boxes and gives all questions, without.
        """
        for source in boxes_from:
            if source not in BOX_SOURCES:
                raise ValueError(f"boxes_from: expected some of {', '.join(map(repr, BOX_SOURCES))}, got {source!r}")
        for image_id in self._of("question_answers"):
            image = self.images.get(image_id)
            for where, record in self._of("question_answers").of_image(image_id):
                questions = field(record, ["qas"], list, where)
                if image is None:
                    self.skipped["question: its image is not in image_data.json"] += len(questions)
                    continue
                boxes_of = _BoxesOfQuestions(self, image, boxes_from)
                for k, question in enumerate(questions):
                    read = self._question(image, question, boxes_of, f"{where}, question {k}")
                    if read is not None:
                        yield read

    def regions(self) -> Iterator[BoxedPhrase]:
        """Every region with its description, image by image."""
        for image_id in self._of("regions"):
            yield from self.regions_of(image_id)

    def regions_of(self, image_id: int) -> list[BoxedPhrase]:
        """The regions of an image; none for an image without any."""
        return self._phrases("regions", image_id)

    def objects(self) -> Iterator[BoxedPhrase]:
        """Every object, image by image; `phrase` is the first of its `names`."""
        for image_id in self._of("objects"):
            yield from self.objects_of(image_id)

    def objects_of(self, image_id: int) -> list[BoxedPhrase]:
        """The objects of an image; none for an image without any."""
        return self._phrases("objects", image_id)

    # --- how ---

    def _of(self, name: str) -> JsonRecords:
        if name not in self._records:
            self._records[name] = JsonRecords(require_file(self.folder, _FILES[name]), _IMAGE)
        return self._records[name]

    def _read_images(self) -> dict[int, AnnotatedImage]:
        path = require_file(self.folder, ["image_data.json"])
        records = read_json(path)
        if not isinstance(records, list):
            raise ValueError(f"{path}: expected a list with an object for each image, got {describe(records)}")
        images = {}
        for i, record in enumerate(records):
            where = f"{path}, element {i}"
            image_id = field(record, _IMAGE, int, where)
            url = field(record, ["url"], str, where)
            images[image_id] = AnnotatedImage(image_id, "/".join(url.split("/")[-2:]), image_size(record, where))
        return images

    def _question(
        self, image: AnnotatedImage, record: Any, boxes_of: _BoxesOfQuestions, where: str
    ) -> BoxedQuestion | None:
        question_id = int(field(record, ["qa_id", "id"], int, where))
        question, answer = (field(record, [key], str, where).strip() for key in ("question", "answer"))
        if not question or not answer:
            self.skipped["question: it or its answer is empty"] += 1
            return None
        boxes = boxes_of(question_id, record, where)
        if boxes is None:
            self.skipped["question: it has no box in its image"] += 1
            return None
        return BoxedQuestion(image, question_id, question, answer, boxes)

    def _phrases(self, name: str, image_id: int) -> list[BoxedPhrase]:
        image, phrases = self.images.get(image_id), []
        for where, record in self._of(name).of_image(image_id):
            items = field(record, [name], list, where)
            if image is None:
                self.skipped[f"{name}: its image is not in image_data.json"] += len(items)
                continue
            for k, item in enumerate(items):
                names = _names(item, f"{where}, {name} {k}")
                box = clipped(_box(item, f"{where}, {name} {k}"), image.size)
                if not names:
                    self.skipped[f"{name}: its phrase is empty"] += 1
                elif box is None:
                    self.skipped[f"{name}: its box has no area in its image"] += 1
                else:
                    phrase_id = field(item, _IDS[name], int, f"{where}, {name} {k}")
                    phrases.append(BoxedPhrase(image, names[0], (box,), phrase_id, names))
        return phrases

    def _read_mapping(self) -> dict[int, int]:
        """Question -> region."""
        if self._region_of is None:
            path = require_file(self.folder, ["qa_to_region_mapping.json"])
            records = read_json(path)
            if not isinstance(records, dict):
                raise ValueError(f"{path}: expected an object with a region for each question, got {describe(records)}")
            try:
                self._region_of = {int(question): int(region) for question, region in records.items()}
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path}: expected whole numbers, ids of questions and regions, got {error}") from None
        return self._region_of


class _BoxesOfQuestions:
    """The boxes of the questions of one image, whose regions and objects are read at most once."""

    def __init__(self, genome: VisualGenome, image: AnnotatedImage, sources: Sequence[str]) -> None:
        self._genome, self._image, self._sources = genome, image, sources
        self._phrases: dict[str, list[BoxedPhrase]] = {}

    def __call__(self, question_id: int, record: Any, where: str) -> tuple[Box, ...] | None:
        """Of the first source that has any; () where no source was asked for, None where none has."""
        for source in self._sources:
            if source == "region":
                boxes = self._of_region(question_id)
            else:
                boxes = self._of_objects(record, where)
            if boxes:
                return tuple(dict.fromkeys(boxes))
        return None if self._sources else ()

    def _of_region(self, question_id: int) -> list[Box]:
        region = self._genome._read_mapping().get(question_id)
        if region is None:
            return []
        return [box for phrase in self._read("regions") if phrase.phrase_id == region for box in phrase.boxes]

    def _of_objects(self, record: Any, where: str) -> list[Box]:
        boxes = []
        for key in _OBJECTS_OF_QUESTIONS:
            for item in field(record, [key], list, where) if key in record else ():
                if "entity_name" in item:
                    name = field(item, ["entity_name"], str, where).lower()
                    phrases = [phrase for phrase in self._read("objects") if name in map(str.lower, phrase.names)]
                    boxes += [box for phrase in phrases for box in phrase.boxes]
                else:
                    box = clipped(_box(item, f"{where}, {key}"), self._image.size)
                    boxes += [] if box is None else [box]
        return boxes

    def _read(self, name: str) -> list[BoxedPhrase]:
        if name not in self._phrases:
            read = {"regions": self._genome.regions_of, "objects": self._genome.objects_of}[name]
            self._phrases[name] = read(int(self._image.image_id))
        return self._phrases[name]


def _names(record: Any, where: str) -> tuple[str, ...]:
    """What something is called, without blanks; () for nothing."""
    found = field(record, ["phrase", "names", "name"], (str, list), where)
    names = [found] if isinstance(found, str) else found
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"{where}: expected names to be a list of str, got {describe(found)}")
    return tuple(name.strip() for name in names if name.strip())


def _box(record: Any, where: str) -> Box:
    x, y = number(record, "x", where=where), number(record, "y", where=where)
    width, height = number(record, "w", "width", where=where), number(record, "h", "height", where=where)
    return x, y, x + width, y + height
