"""Times of several calls, taken in turns.

A machine's speed drifts (neighbours, clock, heat) by more than the differences that matter here. So the calls of a case
are not measured one after the other but in rounds: each round times every call once, in an order shuffled anew, so that
no call always runs in the caches that the same other one left. What is compared is the ratio within a round.

pytest-benchmark measures one function. It owns the loop: that function is finegrain_ops, and `setup`, which it runs
untimed before each round, times the other calls. Every call, finegrain_ops included, is timed by the same stopwatch of
this file, and only these times are stored; pytest-benchmark's own table shows the wall time of finegrain_ops alone.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

Stopwatch = Callable[[Callable[[], object]], float]  # runs a call, returns its milliseconds

FEWEST_ROUNDS, MOST_ROUNDS = 15, 300
FEWEST_LONG_ROUNDS, LONG_MS = 7, 700.0  # a round of that many ms in itself averages over what disturbs it
WARMUP_ROUNDS = 2


class Percentiles(NamedTuple):
    p20: float
    p50: float
    p80: float


def percentiles(samples: list[float]) -> Percentiles:
    deciles = statistics.quantiles(samples, n=10, method="inclusive")
    return Percentiles(deciles[1], deciles[4], deciles[7])


def make_stopwatch(device: torch.device) -> Stopwatch:
    return _cuda_stopwatch(device) if device.type == "cuda" else _wall_clock


def _wall_clock(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def _cuda_stopwatch(device: torch.device) -> Stopwatch:
    """Time between two events on the device, with the L2 cache flushed before: a layer finds other layers' data in it.

    The flush also gives the host a head start. A call whose host work takes longer is charged for it, as in a model.
    """
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    flushed = torch.empty(max(4 * l2_bytes, 256 << 20), dtype=torch.uint8, device=device)

    def measure(call: Callable[[], object]) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flushed.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    return measure


class InterleavedSampler:
    """Times `calls` in shuffled rounds; pytest-benchmark calls `benchmarked`, and the others run in between."""

    def __init__(self, calls: dict[str, Callable[[], object]], benchmarked: str, stopwatch: Stopwatch) -> None:
        self.samples: dict[str, list[float]] = {name: [] for name in calls}
        self._calls = calls
        self._benchmarked = benchmarked
        self._stopwatch = stopwatch
        self._shuffle = random.Random(0).shuffle
        self._rest_of_round: list[str] = []

    def run(self, benchmark: Any, seconds: float, rounds: int | None = None) -> None:
        """Collects `rounds` samples of every call, or as many as fit into `seconds`, within bounds."""
        warm_up = sum(self._stopwatch(call) for call in self._calls.values())
        fewest = FEWEST_ROUNDS if warm_up < LONG_MS else FEWEST_LONG_ROUNDS
        rounds = rounds or min(max(int(1e3 * seconds / warm_up), fewest), MOST_ROUNDS)
        with _no_garbage_collection():
            benchmark.pedantic(
                lambda: self._sample(self._benchmarked), setup=self._until_benchmarked, rounds=WARMUP_ROUNDS + rounds
            )
            self._finish_round()
        for samples in self.samples.values():
            del samples[:WARMUP_ROUNDS]

    def _until_benchmarked(self) -> None:
        self._finish_round()
        order = list(self._calls)
        self._shuffle(order)
        turn = order.index(self._benchmarked)
        for name in order[:turn]:
            self._sample(name)
        self._rest_of_round = order[turn + 1 :]

    def _finish_round(self) -> None:
        for name in self._rest_of_round:
            self._sample(name)
        self._rest_of_round = []

    def _sample(self, name: str) -> None:
        self.samples[name].append(self._stopwatch(self._calls[name]))


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
