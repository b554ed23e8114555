"""`crop_resize` itself, a peer per backend."""

from __future__ import annotations

from torch import Tensor

import finegrain_ops
from finegrain_ops.backends import crop_preference

from ..crop_inputs import MEAN, RESCALE, STD, CropInputs
from .finegrain import ours
from .interface import Call, CropPeer, Prepare

NEAR = "interpolate"  # the backend that needs exact=False
_NEAR_LEVELS = 3.0  # as crop_resize promises


def crop_peers(device_type: str) -> list[CropPeer]:
    """The exact ones first, in the order in which backend="auto" prefers them."""
    exact = [name for name in crop_preference(device_type) if name not in ("reference", NEAR)]
    absent = ["cuda"] if device_type == "cpu" else []
    near = [NEAR] if device_type == "cpu" else []
    return [
        *(CropPeer(ours(name), _crop_resize(name), is_ours=True) for name in exact),
        *(CropPeer(ours_near(name), _crop_resize(name), is_ours=True, levels=_NEAR_LEVELS) for name in near),
        *(CropPeer(ours(name), _crop_resize(name), is_ours=True, needs_cuda=True) for name in absent),
    ]


def ours_near(backend: str) -> str:
    return f"{ours(backend)}, exact=False"


def _crop_resize(backend: str) -> Prepare:
    def prepare(inputs: CropInputs) -> Call:
        images: Tensor | list[Tensor] = inputs.images if len(inputs.images) > 1 else inputs.images[0][None]
        boxes, case = inputs.boxes_tensor, inputs.case
        index = inputs.image_index_tensor if len(inputs.images) > 1 else None
        exact = backend != NEAR
        return lambda: finegrain_ops.crop_resize(
            images,
            boxes,
            index,
            size=case.size,
            rescale=RESCALE,
            mean=MEAN,
            std=STD,
            dtype=case.dtype,
            exact=exact,
            backend=backend,
        )

    return prepare
