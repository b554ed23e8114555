"""Time of whole answers, patched and not, prefill and decode apart. Nothing here asserts a time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from .ceilings import MeasuredCeilings
from .generate_agreement import keep_right_answers, require_same_answers
from .generate_cases import GenerateCase
from .generate_inputs import make_cof_inputs, make_generate_inputs
from .measurement import Measurement
from .operations import COF
from .peers import peers_for, start_all

pytest.importorskip("transformers", reason="models are those of transformers")


@torch.no_grad()
def test_generate(generate_case: GenerateCase, measurement: Measurement, ceilings: MeasuredCeilings) -> None:
    device, is_cof = measurement.device, generate_case.operation == COF
    peers = peers_for(generate_case.operation, device.type)
    inputs = (make_cof_inputs if is_cof else make_generate_inputs)(generate_case, device)
    calls, reasons = start_all(peers, inputs)
    measured = require_same_answers(calls) if is_cof else keep_right_answers(calls, generate_case.dtype)
    twice_as_long = replace(measurement, seconds=2 * measurement.seconds)
    twice_as_long.run(generate_case, peers, calls, reasons, measured, ceilings.of_copy)
