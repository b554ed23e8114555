"""Time of whole answers, patched and not, prefill and decode apart. Nothing here asserts a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .ceilings import MeasuredCeilings
from .generate_agreement import keep_right_answers, require_same_answers
from .generate_cases import GenerateCase
from .generate_inputs import make_cof_inputs, make_generate_inputs
from .memory import peak_of_call_on_cuda
from .operations import COF
from .peers import peers_for, start_all
from .results import RowStore, not_run_row, time_rows
from .sampling import InterleavedSampler, make_stopwatch

pytest.importorskip("transformers", reason="models are those of transformers")


@torch.no_grad()
def test_generate(
    generate_case: GenerateCase,
    benchmark: Any,
    device: torch.device,
    machine: dict,
    ceilings: MeasuredCeilings,
    store: RowStore,
    seconds_per_case: float,
    pytestconfig: pytest.Config,
) -> None:
    benchmark.group = generate_case.operation
    peers, is_cof = peers_for(generate_case.operation, device.type), generate_case.operation == COF
    inputs = (make_cof_inputs if is_cof else make_generate_inputs)(generate_case, device)
    calls, reasons = start_all(peers, inputs)
    measured = require_same_answers(calls) if is_cof else keep_right_answers(calls, generate_case.dtype)
    benchmarked = next(iter(calls))  # ours, with a bias
    if benchmark.disabled:  # --benchmark-disable: results are right, and that is all
        benchmark(calls[benchmarked])
        return

    for name, call in calls.items():
        measured[name]["peak_bytes"] = peak_of_call_on_cuda(call, device) if device.type == "cuda" else None
    sampler = InterleavedSampler(calls, benchmarked, make_stopwatch(device))
    sampler.run(benchmark, 2 * seconds_per_case, pytestconfig.getoption("--bench-rounds"))

    rows = time_rows(generate_case, machine, sampler.samples, ceilings.of_copy(), peers, measured)
    rows += [not_run_row("time", generate_case, name, machine, reason) for name, reason in reasons.items()]
    store.add(rows)
    benchmark.extra_info["peers"] = [{k: v for k, v in row.items() if k != "machine"} for row in rows]
