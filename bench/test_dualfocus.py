"""Time of DualFocus, its naive form and one plain answer, and of thresholds that skip more and more questions. Nothing
here asserts a time.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from .ceilings import MeasuredCeilings
from .dualfocus_agreement import require_same_answers
from .dualfocus_cases import DualFocusCase
from .dualfocus_inputs import make_dualfocus_inputs
from .dualfocus_work import measured_fields, observe
from .measurement import Measurement
from .operations import DUALFOCUS_ADAPTIVE
from .peers import peers_for, start_all

pytest.importorskip("transformers", reason="models are those of transformers")

_ROUNDS_OF_SWEEPS = 3  # each averages over all questions


@torch.no_grad()
def test_dualfocus(dualfocus_case: DualFocusCase, measurement: Measurement, ceilings: MeasuredCeilings) -> None:
    case, device = dualfocus_case, measurement.device
    peers = peers_for(case.operation, device.type)
    inputs = make_dualfocus_inputs(case, device)
    calls, reasons = start_all(peers, inputs)
    observed = {name: observe(inputs, name, call) for name, call in calls.items()}
    require_same_answers({name: of_call.results for name, of_call in observed.items()}, case.dtype)
    measured = (
        {name: {} for name in calls} if measurement.benchmark.disabled else measured_fields(inputs, calls, observed)
    )
    if case.operation == DUALFOCUS_ADAPTIVE:
        measurement = replace(measurement, rounds=measurement.rounds or _ROUNDS_OF_SWEEPS)
    else:
        measurement = replace(measurement, seconds=2 * measurement.seconds)
    measurement.run(case, peers, calls, reasons, measured, ceilings.of_copy)
