"""Time of one call of every operation, ours and the peers' in the same rounds. Nothing here asserts a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .agreement import keep_correct
from .cases import AttentionCase
from .ceilings import MeasuredCeilings
from .inputs import make_inputs
from .memory import peak_of_call_on_cuda
from .operations import BACKWARD
from .peers import peers_for, start_all
from .results import RowStore, not_run_row, time_rows
from .sampling import InterleavedSampler, make_stopwatch

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # of torch.compile, about torch itself


def test_attention(
    case: AttentionCase,
    benchmark: Any,
    device: torch.device,
    machine: dict,
    ceilings: MeasuredCeilings,
    store: RowStore,
    seconds_per_case: float,
    pytestconfig: pytest.Config,
) -> None:
    benchmark.group = case.operation
    peers = peers_for(case.operation, device.type)
    with torch.set_grad_enabled(case.operation == BACKWARD):
        inputs = make_inputs(case, device)
        calls, reasons = start_all(peers, inputs)
        calls, row_errors = keep_correct(calls, peers, inputs, reasons)
        if not calls:
            pytest.skip(f"no peer can run this: {reasons}")
        benchmarked = next(iter(calls))  # the first peer that can is what backend="auto" takes
        if benchmark.disabled:  # --benchmark-disable: results are right, and that is all
            benchmark(calls[benchmarked])
            return

        measured = {
            name: {
                "error": row_errors[name],
                "peak_bytes": peak_of_call_on_cuda(call, device) if device.type == "cuda" else None,
            }
            for name, call in calls.items()
        }
        sampler = InterleavedSampler(calls, benchmarked, make_stopwatch(device))
        sampler.run(benchmark, seconds_per_case, pytestconfig.getoption("--bench-rounds"))

    rows = time_rows(case, machine, sampler.samples, ceilings.of(case.dtype), peers, measured)
    rows += [not_run_row("time", case, name, machine, reason) for name, reason in reasons.items()]
    store.add(rows)
    benchmark.extra_info["peers"] = [{k: v for k, v in row.items() if k != "machine"} for row in rows]
