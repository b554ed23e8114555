"""The Triton kernels of `crop_resize`. On a CPU they run in Triton's interpreter (TRITON_INTERPRET=1), to check
numbers, not to be fast.
"""

from __future__ import annotations

from torch import Tensor

from ..triton import device_reasons, on_device_of, unavailable_reasons
from .interface import CropCall, CropFeatures

__all__ = ["crop_resize", "not_supported_reasons", "unavailable_reasons"]


def not_supported_reasons(features: CropFeatures) -> list[str]:
    return device_reasons(features.device_type, features.device_index, subject="images are")


def crop_resize(call: CropCall) -> Tensor:
    # It imports triton, so it is imported when it is first called.
    from ...kernels import crop_resize as kernels

    with on_device_of(call.boxes):
        return kernels.crop_resize(call)
