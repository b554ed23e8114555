"""Checks of what callers give to the methods."""

from __future__ import annotations

from typing import Any

from ..validation import describe


def one_of(value: Any, options: tuple[str, ...], name: str) -> str:
    if value not in options:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, options))}, got {value!r}")
    return str(value)


def check_questions(images: object, questions: object) -> None:
    for name, values in (("images", images), ("questions", questions)):
        if not isinstance(values, (list, tuple)):
            raise TypeError(f"{name}: expected a list, got {describe(values)}; answer() takes one image and question")
        if not values:
            raise ValueError(f"{name}: expected at least one, got an empty list")
    if len(images) != len(questions):  # type: ignore[arg-type]
        raise ValueError(
            f"questions: expected one for each of the {len(images)} images, got {len(questions)}"  # type: ignore[arg-type]
        )
    for i, question in enumerate(questions):  # type: ignore[arg-type, var-annotated]
        if not isinstance(question, str):
            raise TypeError(f"questions[{i}]: expected a str, got {describe(question)}")
