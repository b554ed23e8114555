"""What the methods return, and the clock that times their phases."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ..boxes import Box


@dataclass(frozen=True)
class MethodResult:
    """One image's answer.

    Attributes:
        text: the answer.
        box: the region that the model named, or that was given: (x0, y0, x1, y1) in pixels of the original image, not
            expanded; None without one.
        grounding_text: what the model wrote when it was asked for a box, markup included; None where it was not asked.
        perplexity: of the answer (DualFocus, arXiv 2402.14767, Eq. 7); see perplexity.py.
        chosen: which answer this is: "cof", "macro" (from the image as it is) or "micro" (with the crop).
        timings: seconds of each phase. Images that were answered together share them.
    """

    text: str
    box: Box | None
    grounding_text: str | None
    perplexity: float
    chosen: str
    timings: dict[str, float]


class Stopwatch:
    """Seconds by phase. Waits for the device at both ends of a phase, so that its work counts where it was asked."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A phase that comes again is added up."""
        self._wait()
        start = time.perf_counter()
        yield
        self._wait()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
