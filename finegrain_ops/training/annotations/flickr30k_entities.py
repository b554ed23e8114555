"""Flickr30k Entities (Plummer et al., ICCV 2015) from the published files: captions whose phrases have boxes.

    Sentences/1000092795.txt     a caption in each line: "[/EN#1/people Two young guys] with [/EN#2/bodyparts shaggy
                                 hair] look at [/EN#3/bodyparts their hands] ." A chain of entities, here 1, 2 and 3, is
                                 the same thing in all captions of an image; chain 0 is nothing that can be seen
    Annotations/1000092795.xml   <size><width/><height/><depth/></size>, and for each box or lack of one an
                                 <object><name>1</name> ... with one name for each chain that it belongs to, and
                                 <bndbox><xmin/><ymin/><xmax/><ymax/></bndbox>, or <scene>1</scene> (the phrase is
                                 about the whole scene) and <nobndbox>1</nobndbox> (it has no box)
    train.txt, val.txt, test.txt the names of the images of a split

Boxes are written in pixels that are counted from 1, both ends included: xmin = 1, xmax = 333 is all of an image of 333
columns, here (0, 333).
"""

from __future__ import annotations

import collections
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from ...boxes import Box
from .records import AnnotatedImage, BoxedCaption, BoxedPhrase, clipped

_ENTITY = re.compile(r"\[/EN#(?P<chain>\d+)(?:/[^\s/\]]+)+\s(?P<phrase>[^\[\]]*)\]")
_CORNERS = ("xmin", "ymin", "xmax", "ymax")


@dataclass(frozen=True)
class ImageEntities:
    """What an annotation file says: the boxes of each chain, and the chains that are about the scene or have none."""

    image: AnnotatedImage
    boxes: dict[str, tuple[Box, ...]]
    scenes: frozenset[str]
    without_box: frozenset[str]


class Flickr30kEntities:
    """The annotations in a folder; an image's files are read when it is its turn.

    Args:
        folder: with the folders Sentences and Annotations, and the lists of the splits where one is asked for.

    Attributes:
        skipped: how many records were passed over so far, by reason; see records.py.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: a file does not have its published form; names it and the line or object.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.skipped: collections.Counter[str] = collections.Counter()

    def captions(self, split: str | None = None) -> Iterator[BoxedCaption]:
        """Every caption, with those of its phrases that have boxes, image by image.

        Args:
            split: "train", "val" or "test"; None: every image that has a file in Sentences.
        """
        for name in self._names(split):
            entities = self.entities(name)
            path = self.folder / "Sentences" / f"{name}.txt"
            for i, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
                if line.strip():
                    yield self._caption(line.strip(), entities, f"{path}, line {i + 1}")

    def phrases(self, split: str | None = None) -> Iterator[BoxedPhrase]:
        """Every phrase of every caption that has boxes."""
        for caption in self.captions(split):
            yield from caption.phrases

    def entities(self, name: str) -> ImageEntities:
        """What the annotation file of an image says."""
        path = self.folder / "Annotations" / f"{name}.xml"
        try:
            root = ElementTree.parse(path).getroot()
        except ElementTree.ParseError as error:
            raise ValueError(f"{path}: expected XML, got {error}") from error
        size = tuple(_whole(root.find(f"size/{side}"), f"{path}, size/{side}") for side in ("height", "width"))
        image = AnnotatedImage(name, f"{name}.jpg", (size[0], size[1]))
        boxes: dict[str, list[Box]] = {}
        marked: dict[str, set[str]] = {"scene": set(), "nobndbox": set()}
        for i, item in enumerate(root.findall("object")):
            where = f"{path}, object {i}"
            chains = [(chain.text or "").strip() for chain in item.findall("name")]
            if not chains or not all(chains):
                raise ValueError(f"{where}: expected the name of a chain of entities")
            for mark, found in marked.items():
                if (item.findtext(mark) or "0").strip() == "1":
                    found.update(chains)
            corners = item.find("bndbox")
            if corners is None:
                continue
            x0, y0, x1, y1 = (_whole(corners.find(corner), f"{where}, {corner}") for corner in _CORNERS)
            box = clipped((x0 - 1.0, y0 - 1.0, float(x1), float(y1)), image.size)
            if box is None:
                self.skipped["box: it has no area in its image"] += 1
                continue
            for chain in chains:
                boxes.setdefault(chain, []).append(box)
        return ImageEntities(
            image,
            {chain: tuple(found) for chain, found in boxes.items()},
            frozenset(marked["scene"]),
            frozenset(marked["nobndbox"]),
        )

    def _names(self, split: str | None) -> list[str]:
        if split is None:
            return sorted(path.stem for path in (self.folder / "Sentences").glob("*.txt"))
        names = (self.folder / f"{split}.txt").read_text(encoding="utf-8").split()
        return [name.removesuffix(".jpg") for name in names]

    def _caption(self, line: str, entities: ImageEntities, where: str) -> BoxedCaption:
        text, phrases, spans, end = "", [], [], 0
        for match in _ENTITY.finditer(line):
            text += _without_markup(line[end : match.start()], where)
            chain, phrase, end = match["chain"], match["phrase"].strip(), match.end()
            boxes = entities.boxes.get(chain)
            if boxes and phrase:
                phrases.append(BoxedPhrase(entities.image, phrase, boxes, chain))
                spans.append((len(text), len(text) + len(phrase)))
            else:
                self.skipped["phrase: it has no box"] += 1
            text += phrase
        text += _without_markup(line[end:], where)
        return BoxedCaption(entities.image, text, tuple(phrases), tuple(spans))


def _without_markup(text: str, where: str) -> str:
    if "[/EN#" in text:
        raise ValueError(f'{where}: expected entities as "[/EN#1/people Two men]", got {text!r}')
    return text


def _whole(element: ElementTree.Element | None, where: str) -> int:
    text = "" if element is None else (element.text or "")
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{where}: expected a whole number, got {text!r}") from None
