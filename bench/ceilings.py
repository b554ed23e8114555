"""What this machine reaches at best, measured in the same run as the cases: a matrix product and a copy."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from .sampling import make_stopwatch

_MATMUL_SIZE = {"cuda": 8192, "cpu": 2048}
_COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 28}
_ROUNDS = 8


class Ceilings(NamedTuple):
    matmul_tflops: float | None  # torch.matmul of two square matrices of random numbers, in the dtype of the case
    copy_gb_per_s: float  # Tensor.copy_ on the device; bytes read and bytes written both count


class MeasuredCeilings:
    """Measures each ceiling when it is first asked for."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copy: float | None = None
        self._matmul: dict[torch.dtype, float] = {}

    def of(self, dtype: torch.dtype) -> Ceilings:
        if dtype not in self._matmul:
            self._matmul[dtype] = matmul_tflops(self._device, dtype, _MATMUL_SIZE[self._device.type])
        return Ceilings(self._matmul[dtype], self.of_copy().copy_gb_per_s)

    def of_copy(self) -> Ceilings:
        """For operations without a matrix product to compare with."""
        if self._copy is None:
            self._copy = copy_gb_per_s(self._device, _COPY_BYTES[self._device.type])
        return Ceilings(None, self._copy)


def matmul_tflops(device: torch.device, dtype: torch.dtype, size: int) -> float:
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _least_ms(lambda: left @ right, device) / 1e9


def copy_gb_per_s(device: torch.device, num_bytes: int) -> float:
    source, target = (torch.zeros(num_bytes, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * num_bytes / _least_ms(lambda: target.copy_(source), device) / 1e6


def _least_ms(call: Callable[[], object], device: torch.device) -> float:
    stopwatch = make_stopwatch(device)
    return min(stopwatch(call) for _ in range(_ROUNDS))
