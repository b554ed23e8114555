"""The places in documents that hold generated tables, between two comments."""

from __future__ import annotations

from pathlib import Path


def markers(name: str) -> tuple[str, str]:
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def replace_between(text: str, name: str, section: str) -> str:
    """`text` with `section` between the markers of `name`, and otherwise as it was.

    Raises:
        ValueError: the markers are not there exactly once, in order.
    """
    begin, end = markers(name)
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"expected exactly one {begin} and after it one {end}")
    before, _, rest = text.partition(begin)
    return f"{before}{begin}\n{section.strip()}\n{end}{rest.partition(end)[2]}"


def update(document: Path, name: str, section: str) -> None:
    document.write_text(replace_between(document.read_text("utf-8"), name, section), "utf-8")
