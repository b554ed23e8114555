"""No time is taken of crops that are wrong: every peer is first compared with Pillow, or where that is not installed
with finegrain_ops' definition of it.

The difference is given in levels, 0..255, as if the results were not normalised. Each peer says how many a pixel may be
off: those that are exact 0, but for the rounding of the result's dtype. On average none may be off by more than results
are that are not rounded to levels; crops that lie a pixel beside the right ones are.
"""

from __future__ import annotations

import importlib.util
from typing import NamedTuple

import torch
from torch import Tensor

import finegrain_ops

from .crop_inputs import MEAN, RESCALE, STD, CropInputs
from .peers import Call, CropPeer

# A level off after rounding is 1; sums in float32 differ by less than a thousandth.
_ROUNDING_OF_SUMS = 0.01
MOST_ON_AVERAGE = 0.4  # seen: 0.29 unrounded, and 0.5 of small crops of a soft image that are moved by one pixel
_ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def expected_crops(inputs: CropInputs) -> Tensor:
    """(K, 3, size, size) float32."""
    size = inputs.case.size
    if importlib.util.find_spec("PIL") is None:
        return _definition(inputs)
    import numpy as np
    from PIL import Image

    images, levels = inputs.pil_images(), []
    for box, index in zip(inputs.boxes, inputs.image_index):
        crop = images[index].crop(box).resize((size, size), Image.Resampling.BICUBIC)
        levels.append(torch.from_numpy(np.array(crop)).permute(2, 0, 1))
    return torch.stack(levels).to(inputs.device) * inputs.multiplier + inputs.offset


def _definition(inputs: CropInputs) -> Tensor:
    return finegrain_ops.crop_resize(
        inputs.images,
        inputs.boxes_tensor,
        inputs.image_index_tensor,
        size=inputs.case.size,
        rescale=RESCALE,
        mean=MEAN,
        std=STD,
        backend="reference",
    )


class LevelsOff(NamedTuple):
    most: float  # of any pixel
    mean: float


def levels_off(result: Tensor, expected: Tensor, inputs: CropInputs) -> LevelsOff:
    """Beyond what rounding to the result's dtype explains; infinite for another shape, dtype or device, and for NaN."""
    wanted = (expected.shape, inputs.case.dtype, inputs.device)
    if (result.shape, result.dtype, result.device) != wanted:
        return LevelsOff(float("inf"), float("inf"))
    difference = (result.float() - expected).abs() - _ROUNDING[result.dtype] * expected.abs()
    off = (difference.clamp(min=0.0) / inputs.multiplier).nan_to_num(nan=float("inf"))
    return LevelsOff(off.max().item(), off.mean().item())


def keep_correct_crops(
    calls: dict[str, Call], peers: list[CropPeer], inputs: CropInputs, reasons: dict[str, str]
) -> tuple[dict[str, Call], dict[str, dict]]:
    """The calls whose result is right, and for their rows how far off they are; why another is not kept goes to
    `reasons`.

    One of ours that is wrong fails the test, and then nobody's time is taken.
    """
    expected, kept, fields = expected_crops(inputs), {}, {}
    for peer in (peer for peer in peers if peer.name in calls):
        off = levels_off(calls[peer.name](), expected, inputs)
        is_right = off.most <= peer.levels + _ROUNDING_OF_SUMS and off.mean <= MOST_ON_AVERAGE
        assert is_right or not peer.is_ours, f"{peer.name} is {off.most:.2f} levels off, so nothing is timed"
        if is_right:
            kept[peer.name] = calls[peer.name]
            fields[peer.name] = {"levels_off": round(off.most, 1), "levels_allowed": peer.levels}
        else:
            reasons[peer.name] = (
                f"its result is up to {off.most:.0f} levels off Pillow's, {off.mean:.1f} on average; allowed are "
                f"{peer.levels:g} and {MOST_ON_AVERAGE}"
            )
    return kept, fields
