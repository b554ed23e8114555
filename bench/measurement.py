"""From calls that are known to be right to stored rows: what every benchmark of times does after that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from .ceilings import Ceilings
from .memory import peak_of_call_on_cuda
from .peers import Call, Peer
from .results import Case, RowStore, not_run_row, time_rows
from .sampling import InterleavedSampler, make_stopwatch


@dataclass(frozen=True)
class Measurement:
    """Of one case. `benchmark` is pytest-benchmark's fixture, or its stand-in."""

    benchmark: Any
    device: torch.device
    machine: dict
    store: RowStore
    seconds: float
    rounds: int | None

    def run(
        self,
        case: Case,
        peers: Sequence[Peer],
        calls: dict[str, Call],
        reasons: dict[str, str],
        measured: dict[str, dict],
        ceilings: Callable[[], Ceilings],
    ) -> None:
        """Times `calls` in turns and stores a row of each peer; `measured` holds further fields, `reasons` why others
        did not run. With --benchmark-disable results are right, and that is all.
        """
        self.benchmark.group = case.operation
        if not calls:
            pytest.skip(f"no peer can run this: {reasons}")
        benchmarked = next(iter(calls))  # ours, and the first that can is what backend="auto" takes
        if self.benchmark.disabled:
            self.benchmark(calls[benchmarked])
            return
        on_cuda = self.device.type == "cuda"
        measured = {
            name: {"peak_bytes": peak_of_call_on_cuda(call, self.device) if on_cuda else None, **measured[name]}
            for name, call in calls.items()
        }
        sampler = InterleavedSampler(calls, benchmarked, make_stopwatch(self.device))
        sampler.run(self.benchmark, self.seconds, self.rounds)
        rows = time_rows(case, self.machine, sampler.samples, ceilings(), peers, measured)
        rows += [not_run_row("time", case, name, self.machine, reason) for name, reason in reasons.items()]
        self.store.add(rows)
        self.benchmark.extra_info["peers"] = [{k: v for k, v in row.items() if k != "machine"} for row in rows]
