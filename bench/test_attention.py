"""Time of one forward call, ours and the peers' in the same rounds. Nothing here asserts a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .agreement import reference, tolerance, worst_row_error
from .cases import AttentionCase, CaseInputs, make_inputs
from .memory import peak_of_call_on_cuda
from .peers import Call, PeerUnavailable, peers_for
from .results import not_run_row, time_row
from .sampling import InterleavedSampler, make_stopwatch

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # of torch.compile, about torch itself


@torch.no_grad()
def test_attention(
    case: AttentionCase,
    benchmark: Any,
    device: torch.device,
    machine: dict,
    rows: list[dict],
    pytestconfig: pytest.Config,
) -> None:
    inputs = make_inputs(case, device)
    calls, reasons = _prepare(inputs)
    errors = _verify(calls, inputs)
    benchmarked = next(iter(calls))  # the first peer that can is what backend="auto" takes
    if benchmark.disabled:  # --benchmark-disable: results are right, and that is all
        benchmark(calls[benchmarked])
        return

    peaks = {
        name: peak_of_call_on_cuda(call, device) if device.type == "cuda" else None for name, call in calls.items()
    }
    sampler = InterleavedSampler(calls, benchmarked, make_stopwatch(device))
    sampler.run(benchmark, pytestconfig.getoption("--bench-seconds"), pytestconfig.getoption("--bench-rounds"))

    case_rows = [
        time_row(case, name, machine, sampler.samples, error=errors[name], peak_bytes=peaks[name]) for name in calls
    ]
    case_rows += [not_run_row("time", case, name, machine, reason) for name, reason in reasons.items()]
    rows += case_rows
    benchmark.extra_info["peers"] = [{k: v for k, v in row.items() if k != "machine"} for row in case_rows]


def _prepare(inputs: CaseInputs) -> tuple[dict[str, Call], dict[str, str]]:
    """The calls that can run, ours first, and for the others the reason why not."""
    calls, reasons = {}, {}
    for peer in peers_for(inputs.query.device.type):
        try:
            calls[peer.name] = peer.prepare(inputs)
            calls[peer.name]()
        except PeerUnavailable as unavailable:
            reasons[peer.name] = str(unavailable)
        except torch.OutOfMemoryError:
            calls.pop(peer.name, None)
            reasons[peer.name] = "out of memory"
            torch.cuda.empty_cache()
    return calls, reasons


def _verify(calls: dict[str, Call], inputs: CaseInputs) -> dict[str, float]:
    """The error of every peer; a test that fails here takes no time of anyone."""
    expected = {is_biased: reference(inputs, is_biased) for is_biased in (True, False)}
    is_biased = {peer.name: peer.is_biased for peer in peers_for(inputs.query.device.type)}
    errors = {name: worst_row_error(call(), expected[is_biased[name]]) for name, call in calls.items()}
    wrong = {name: error for name, error in errors.items() if error > tolerance(inputs.case.dtype)}
    assert not wrong, f"wrong by more than {tolerance(inputs.case.dtype):.1e}, so nothing is timed: {wrong}"
    return errors
