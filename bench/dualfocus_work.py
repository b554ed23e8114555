"""What a call of a peer of DualFocus does: its answers, and how often and over how much the decoder ran for them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from .dualfocus_inputs import DualFocusInputs, watched_boxes
from .memory import peak_of_call_on_cpu
from .operations import DUALFOCUS
from .peers import Call
from .peers.dualfocus import NAIVE

_FEWEST_BATCHES = 6  # over which the time of phases is taken


@dataclass
class Observed:
    """One call, or several: `results` of the first; the rest of one call.

    forwards: of the decoder. positions: that went through it, padding counted. box_steps: in which boxes were written.
    phases: seconds, by name; of several calls the median. work: by phase, forwards and tokens of ours.
    """

    results: list[Any]
    forwards: int
    positions: int
    box_steps: int
    phases: dict[str, float] = field(default_factory=dict)
    work: dict[str, tuple[int, int]] = field(default_factory=dict)

    def fields(self, inputs: DualFocusInputs) -> dict[str, Any]:
        """Of a row; per call, which answers all questions of the case."""
        fields: dict[str, Any] = {"forwards": self.forwards, "positions": self.positions}
        fields["model_bytes"] = sum(p.numel() * p.element_size() for p in inputs.model.parameters())
        if self.box_steps:
            fields["box_steps"] = self.box_steps
        if self.phases:
            fields["phases_ms"] = {name: round(1e3 * seconds, 3) for name, seconds in self.phases.items()}
        if self.work:
            fields["phases_forwards"] = {name: forwards for name, (forwards, _) in self.work.items()}
            fields["phases_tokens"] = {name: tokens for name, (_, tokens) in self.work.items()}
            fields["skipped"] = sum(result.reason == "confident" for result in self.results) / len(self.results)
        return fields


def observe(inputs: DualFocusInputs, name: str, call: Call) -> Observed:
    with _counted(inputs.model) as counts, watched_boxes() as speakers:
        results = call()
    steps = sum(speaker.num_steps for speaker in speakers)
    if name == NAIVE:
        steps = sum(max(map(len, inputs.boxes_written[part])) for part in inputs.batches())
    observed = Observed(results, counts[0], counts[1], steps)
    if not hasattr(results[0], "timings"):
        return observed
    batches = list(inputs.batches())
    timed = [_summed(results, batches, _timings)]
    timed += [_summed(call(), batches, _timings) for _ in range(_FEWEST_BATCHES // len(batches) - 1)]
    observed.phases = {name: statistics.median(one[name] for one in timed) for name in timed[0]}
    if hasattr(results[0], "work"):
        forwards, tokens = (_summed(results, batches, of) for of in (_forwards, _tokens))
        observed.work = {name: (int(forwards[name]), int(tokens[name])) for name in forwards}
    return observed


def measured_fields(inputs: DualFocusInputs, calls: Mapping[str, Call], observed: Mapping[str, Observed]) -> dict:
    """Of each peer's row; on a CPU, but for sweeps, its peak memory too."""
    fields = {name: observed[name].fields(inputs) for name in calls}
    if inputs.device.type == "cpu" and inputs.case.operation == DUALFOCUS:
        for name, call in calls.items():
            fields[name]["peak_bytes"] = peak_of_call_on_cpu(call)
    return fields


@contextmanager
def _counted(model: Any) -> Iterator[list[int]]:
    """[runs of the decoder, positions that it ran over]."""
    counts = [0, 0]

    def count(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        counts[0] += 1
        counts[1] += kwargs["inputs_embeds"].shape[:2].numel()

    hook = model.model.language_model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield counts
    finally:
        hook.remove()


def _summed(results: list[Any], batches: list[slice], values: Callable[[Any], Mapping[str, float]]) -> dict[str, float]:
    """Over batches; the results of a batch share these values."""
    total: dict[str, float] = {}
    for part in batches:
        for name, value in values(results[part][0]).items():
            total[name] = total.get(name, 0) + value
    return total


def _timings(result: Any) -> Mapping[str, float]:
    return result.timings


def _forwards(result: Any) -> Mapping[str, float]:
    return {name: work.forwards for name, work in result.work.items()}


def _tokens(result: Any) -> Mapping[str, float]:
    return {name: work.tokens for name, work in result.work.items()}
