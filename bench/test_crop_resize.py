"""Time of one call of `crop_resize`, ours and the peers' in the same rounds. Nothing here asserts a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .ceilings import MeasuredCeilings
from .crop_agreement import keep_correct_crops
from .crop_cases import CropCase
from .crop_inputs import make_crop_inputs
from .memory import peak_of_call_on_cuda
from .peers import crop_peers_for, start_all
from .results import RowStore, not_run_row, time_rows
from .sampling import InterleavedSampler, make_stopwatch


@torch.no_grad()
def test_crop_resize(
    crop_case: CropCase,
    benchmark: Any,
    device: torch.device,
    machine: dict,
    ceilings: MeasuredCeilings,
    store: RowStore,
    seconds_per_case: float,
    pytestconfig: pytest.Config,
) -> None:
    benchmark.group = crop_case.operation
    peers, inputs = crop_peers_for(device.type), make_crop_inputs(crop_case, device)
    calls, reasons = start_all(peers, inputs)
    calls, measured = keep_correct_crops(calls, peers, inputs, reasons)
    if not calls:
        pytest.skip(f"no peer can run this: {reasons}")
    benchmarked = next(iter(calls))  # the first peer that can is what backend="auto" takes
    if benchmark.disabled:  # --benchmark-disable: results are right, and that is all
        benchmark(calls[benchmarked])
        return

    for name, call in calls.items():
        measured[name]["peak_bytes"] = peak_of_call_on_cuda(call, device) if device.type == "cuda" else None
    sampler = InterleavedSampler(calls, benchmarked, make_stopwatch(device))
    sampler.run(benchmark, seconds_per_case, pytestconfig.getoption("--bench-rounds"))

    rows = time_rows(crop_case, machine, sampler.samples, ceilings.of_copy(), peers, measured)
    rows += [not_run_row("time", crop_case, name, machine, reason) for name, reason in reasons.items()]
    store.add(rows)
    benchmark.extra_info["peers"] = [{k: v for k, v in row.items() if k != "machine"} for row in rows]
