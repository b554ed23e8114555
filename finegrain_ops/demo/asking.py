"""One question asked three ways: as it is, through CoF and through DualFocus, and how long each took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from ..boxes import Box
from ..methods.cof import CoF, CoFResult
from ..methods.dualfocus import DualFocus, DualFocusResult
from ..methods.generation import GREEDY
from ..methods.prompting import Prompter
from ..methods.results import Stopwatch

METHODS = ("plain", "CoF", "DualFocus")
TICK_AND_CROSS = ("✓", "✗")


@dataclass(frozen=True)
class Query:
    """A question about an image.

    Attributes:
        kind: what sort of question it is; "" where that is unknown.
        truths: every right answer; () where that is unknown.
        box: what is given to CoF and DualFocus in place of the model's own box.
    """

    text: str
    kind: str = ""
    truths: tuple[str, ...] = ()
    box: Box | None = None


@dataclass(frozen=True)
class Answers:
    """What came of one query.

    Attributes:
        seconds: by method, from image and text to text.
    """

    query: Query
    plain: str
    cof: CoFResult
    dualfocus: DualFocusResult
    seconds: Mapping[str, float]

    def text(self, method: str) -> str:
        return {"plain": self.plain, "CoF": self.cof.text, "DualFocus": self.dualfocus.text}[method]

    def is_right(self, method: str) -> bool | None:
        """None where the truth is unknown."""
        return self.text(method) in self.query.truths if self.query.truths else None

    def marked(self, method: str, marks: tuple[str, str] = TICK_AND_CROSS) -> str:
        """The text, after the first mark where it is right and the second where it is wrong."""
        is_right = self.is_right(method)
        mark = "" if is_right is None else f"{marks[0] if is_right else marks[1]} "
        return mark + self.text(method)


class Asker:
    """Asks one model all three ways.

    Args:
        weight: lambda, before that of the preset.

    Raises:
        TypeError, ValueError, NotImplementedError: a method does not take this model, or there is no such preset.
    """

    def __init__(
        self, model: Any, processor: Any, *, preset: str | None, weight: float | None, max_new_tokens: int
    ) -> None:
        own = {} if weight is None else {"weight": weight}
        self.model = model
        self.prompter = Prompter(model, processor)
        self.cof = CoF.from_preset("llava-1.5-7b" if preset is None else preset, model, processor, **own)
        self.dualfocus = DualFocus(model, processor)
        self._max_new_tokens = max_new_tokens

    def ask_all(self, image: Any, queries: Sequence[Query]) -> list[Answers]:
        """One after the other, after a warm-up. Whatever comes is in the result."""
        with tqdm(total=1 + len(queries), desc="asking", unit="question", delay=2, leave=False) as bar:
            self.ask(image, queries[0])
            bar.update()
            answers = []
            for query in queries:
                answers.append(self.ask(image, query))
                bar.update()
        return answers

    def ask(self, image: Any, query: Query) -> Answers:
        watch = Stopwatch(self.model.device)
        with watch.phase("plain"):
            plain = self._ask_plainly(image, query.text)
        with watch.phase("CoF"):
            cof = self.cof.answer(image, query.text, boxes=query.box, max_new_tokens=self._max_new_tokens)
        with watch.phase("DualFocus"):
            dualfocus = self.dualfocus.answer(image, query.text, box=query.box, max_new_tokens=self._max_new_tokens)
        return Answers(query, plain, cof, dualfocus, watch.seconds)

    def _ask_plainly(self, image: Any, question: str) -> str:
        """transformers' own `generate`; the model is not patched here."""
        (inputs,) = self.prompter.encode([image], self.prompter.texts([image], [question]))
        with torch.inference_mode():
            tokens = self.model.generate(**inputs, **GREEDY, max_new_tokens=self._max_new_tokens)
        return self.prompter.decode(tokens[0, inputs["input_ids"].shape[1] :])
