"""Records of a large JSON file, one for each image, read when they are asked for.

The files of Visual Genome are lists with an element per image, hundreds of megabytes long. They are gone through once,
a piece at a time, to see where each element lies; from then on an element is read and parsed alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .records import field

_CHUNK = 1 << 20  # characters at a time; an element may be longer
_SPACES = re.compile(r"[ \t\r\n]*")


class JsonRecords:
    """The elements of a JSON list of objects, by image.

    Holds the places of the elements, not the elements, and no open file: it is small, and may be handed to the workers
    of a DataLoader.

    Args:
        path: the file, UTF-8.
        id_keys: the key of an element that names its image, the first that it has.

    Raises:
        ValueError: the file is no JSON list of objects, or one of them lacks its id; names the file and the element.
    """

    def __init__(self, path: Path, id_keys: Sequence[str]) -> None:
        self.path = path
        self._spans: dict[int, list[tuple[int, int, int]]] = {}  # image -> (element, first byte, length)
        for i, (start, length, record) in enumerate(_elements(path)):
            image_id = field(record, id_keys, int, self.where(i))
            self._spans.setdefault(image_id, []).append((i, start, length))

    def __iter__(self) -> Iterator[int]:
        """The ids of the images, in the order of the file."""
        return iter(self._spans)

    def __contains__(self, image_id: object) -> bool:
        return image_id in self._spans

    def of_image(self, image_id: int) -> list[tuple[str, Any]]:
        """The elements of an image, in general one, each with words for where it is; none for an unknown image."""
        spans = self._spans.get(image_id, ())
        if not spans:
            return []
        found = []
        with self.path.open("rb") as file:
            for i, start, length in spans:
                file.seek(start)
                found.append((self.where(i), json.loads(file.read(length))))
        return found

    def where(self, element: int) -> str:
        return f"{self.path}, element {element}"


def read_json(path: Path) -> Any:
    """A whole file, for those that are small.

    Raises:
        ValueError: it is no JSON, and where.
    """
    with path.open(encoding="utf-8") as file:
        try:
            return json.load(file)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: expected JSON, got {error}") from error


def _elements(path: Path) -> Iterator[tuple[int, int, Any]]:
    """(first byte, bytes, element) of each element of a JSON list."""
    decoder = json.JSONDecoder()
    with path.open(encoding="utf-8", newline="") as file:  # newline="": bytes are counted
        text = _Text(file, path)
        if text.peek() != "[":
            raise text.error("a JSON list, with an element for each image")
        text.take(1)
        is_first = True
        while text.peek() != "]":
            if not is_first:
                if text.peek() != ",":
                    raise text.error("a comma or the end of the list")
                text.take(1)
                text.peek()
            start = text.bytes
            while True:
                try:
                    element, end = decoder.raw_decode(text.buffer, text.at)
                    break
                except json.JSONDecodeError as error:
                    if not text.more():
                        raise text.error(f"JSON ({error.msg})") from error
            text.take(end - text.at)
            yield start, text.bytes - start, element
            is_first = False


class _Text:
    """A file as far as it has been read: `buffer`, of which `at` characters are done with; `bytes` is where in the file
    that is.
    """

    def __init__(self, file: Any, path: Path) -> None:
        self.buffer, self.at, self.bytes = "", 0, 0
        self._file, self._path = file, path

    def peek(self) -> str:
        """The next character that is no space; "" at the end."""
        while True:
            match = _SPACES.match(self.buffer, self.at)
            self.take(match.end() - self.at if match else 0)
            if self.at < len(self.buffer) or not self.more():
                return self.buffer[self.at : self.at + 1]

    def take(self, count: int) -> None:
        self.bytes += len(self.buffer[self.at : self.at + count].encode())
        self.at += count

    def more(self) -> bool:
        """Reads on, as much again as there is, so that the time stays linear in the length of an element."""
        rest = self.buffer[self.at :]
        try:
            read = self._file.read(max(_CHUNK, len(rest)))
        except UnicodeDecodeError as error:
            raise ValueError(f"{self._path}: expected UTF-8, got {error}") from error
        self.buffer, self.at = rest + read, 0
        return bool(read)

    def error(self, expected: str) -> ValueError:
        found = self.buffer[self.at : self.at + 20]
        return ValueError(
            f"{self._path}: expected {expected} at byte {self.bytes}, got {found!r}; download the file again"
        )
