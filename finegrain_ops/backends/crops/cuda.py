"""The CUDA C++ kernels of csrc/, for GPUs that Triton does not support (V100, T4); they run on later ones too."""

from __future__ import annotations

from torch import Tensor

from ..cuda import crop_launches, machine
from .interface import CropCall, CropFeatures


def unavailable_reasons() -> list[str]:
    return machine.unavailable_reasons()


def not_supported_reasons(features: CropFeatures) -> list[str]:
    return machine.device_reasons(features.device_type, features.device_index, subject="images are")


def crop_resize(call: CropCall) -> Tensor:
    result = call.new_result()
    crop_launches.crop_resize(machine.launcher(result.device), call, result)
    return result
