"""Time of one call of every operation, ours and the peers' in the same rounds. Nothing here asserts a time."""

from __future__ import annotations

import pytest
import torch

from .agreement import keep_correct
from .cases import AttentionCase
from .ceilings import MeasuredCeilings
from .inputs import make_inputs
from .measurement import Measurement
from .operations import BACKWARD
from .peers import peers_for, start_all

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # of torch.compile, about torch itself


def test_attention(case: AttentionCase, measurement: Measurement, ceilings: MeasuredCeilings) -> None:
    peers = peers_for(case.operation, measurement.device.type)
    with torch.set_grad_enabled(case.operation == BACKWARD):
        inputs = make_inputs(case, measurement.device)
        calls, reasons = start_all(peers, inputs)
        calls, row_errors = keep_correct(calls, peers, inputs, reasons)
        measured = {name: {"error": row_errors[name]} for name in calls}
        measurement.run(case, peers, calls, reasons, measured, lambda: ceilings.of(case.dtype))
