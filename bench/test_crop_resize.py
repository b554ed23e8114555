"""Time of one call of `crop_resize`, ours and the peers' in the same rounds. Nothing here asserts a time."""

from __future__ import annotations

import torch

from .ceilings import MeasuredCeilings
from .crop_agreement import keep_correct_crops
from .crop_cases import CropCase
from .crop_inputs import make_crop_inputs
from .measurement import Measurement
from .peers import crop_peers_for, start_all


@torch.no_grad()
def test_crop_resize(crop_case: CropCase, measurement: Measurement, ceilings: MeasuredCeilings) -> None:
    device = measurement.device
    peers, inputs = crop_peers_for(device.type), make_crop_inputs(crop_case, device)
    calls, reasons = start_all(peers, inputs)
    calls, measured = keep_correct_crops(calls, peers, inputs, reasons)
    measurement.run(crop_case, peers, calls, reasons, measured, ceilings.of_copy)
