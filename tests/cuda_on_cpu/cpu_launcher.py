"""Launches the CUDA kernels in the simulator, in the place of finegrain_ops/backends/cuda/driver.py."""

from __future__ import annotations

import ctypes
import os

import simulator

from finegrain_ops.backends.cuda import sources
from finegrain_ops.backends.cuda.variants import Variant

# What each kernel writes; it may read all else that its arguments point to, and nothing more.
WRITTEN = {
    "attention_forward": {"output", "lse"},
    "merge_splits": {"output", "lse"},
    "attention_rows": {"lse", "delta"},
    "attention_map": {"map"},
    "attention_backward_query": {"grad_query", "delta"},
    "attention_backward_keys": {"grad_key", "grad_value", "grad_bias"},
    "crop_weights": {"records", "taps", "weights"},
    "crop_resize": {"result"},
}


class CpuLauncher:
    """As `machine.Launcher`; every launch runs the warps in another order.

    overrides: texts that replace files of csrc/, for tests that break a kernel on purpose.
    FINEGRAIN_SIMULATOR_SANITIZER=address in the environment: AddressSanitizer instead of the simulator's own checks.
    """

    def __init__(self, architecture: int, overrides: dict[str, str] | None = None) -> None:
        self.architecture = architecture
        self.num_processors = 8
        self.overrides = overrides
        self.sanitizer = os.environ.get("FINEGRAIN_SIMULATOR_SANITIZER", "race")
        self.launched: list[Variant] = []

    def launch(self, variant: Variant, grid: tuple[int, int, int], arguments: ctypes.Structure) -> None:
        defines = {**variant.defines(), "FINEGRAIN_ARCH": 10 * variant.architecture}
        source = str(sources.folder() / variant.source)
        kernel = simulator.build(source, variant.entry, defines, sanitizer=self.sanitizer, overrides=self.overrides)
        buffers = []
        for name, tensor in arguments.tensors.items():  # type: ignore[attr-defined]
            buffers.append(simulator.buffer_of(tensor, writable=name in WRITTEN[variant.kernel]))
        kernel.launch(grid, variant.threads, variant.shared_bytes, arguments, buffers, seed=len(self.launched))
        self.launched.append(variant)
