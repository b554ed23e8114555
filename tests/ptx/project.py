"""finegrain_ops' own backends on CPU tensors, their kernels executed as PTX.

with on_ptx(90) as runner:
    output = finegrain_ops.reweighted_attention(query, key, value, backend="triton")
assert not runner.report.findings, runner.report
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any
from unittest import mock

from torch import Tensor

from finegrain_ops import backends
from finegrain_ops.backends import triton as triton_backend
from finegrain_ops.backends.cuda import machine as cuda_machine

from .cuda_kernels import PtxLauncher
from .triton_kernels import Runner

# Where a call has no bias, say, a kernel is given one of these tensors in its place; the first of them is the real one.
_STAND_INS = ("query_ptr", "row_lse_ptr", "lse_ptr", "record_ptr")
_MAY_BE_ONE = {"query_ptr", "key_ptr", "value_ptr"}


def unread_pointers(kernel: str, tensors: dict[str, Tensor]) -> set[str]:
    """The arguments that only hold another one's tensor, and that the kernel must not read."""
    names: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)
    unread: set[str] = set()
    for same in names.values():
        if real := next((name for name in _STAND_INS if name in same), None):
            unread |= set(same) - ({real} | (_MAY_BE_ONE if real in _MAY_BE_ONE else set()))
    return unread


@contextlib.contextmanager
def on_ptx(compute_capability: int = 80, **options: Any) -> Iterator[Runner]:
    """Makes backend="triton" compile for a GPU of this compute capability, and run CPU tensors.

    `options`: a Runner's.
    """
    refuse, inputs = triton_backend.not_supported_reasons, triton_backend._inputs

    def reasons(features: Any) -> list[str]:
        return [reason for reason in refuse(features) if "interpreter" not in reason]

    def inputs_of_this_gpu(call: Any) -> Any:
        return dataclasses.replace(inputs(call), compute_capability=compute_capability)

    with (
        mock.patch.object(triton_backend, "_interpreted", return_value=True),  # it lets CPU tensors through
        mock.patch.object(triton_backend, "not_supported_reasons", reasons),
        mock.patch.object(triton_backend, "_inputs", inputs_of_this_gpu),
        _without_remembered_backends(),
        Runner(compute_capability, **{"unread": unread_pointers, **options}) as runner,
    ):
        yield runner


@contextlib.contextmanager
def on_cuda_ptx(architecture: int = 75, **options: Any) -> Iterator[PtxLauncher]:
    """Makes backend="cuda" compile for this architecture, and run CPU tensors. `options`: a PtxLauncher's."""
    launcher = PtxLauncher(architecture, **options)
    with (
        mock.patch.object(cuda_machine, "unavailable_reasons", return_value=[]),
        mock.patch.object(cuda_machine, "device_reasons", return_value=[]),
        mock.patch.object(cuda_machine, "launcher", return_value=launcher),
        _without_remembered_backends(),
    ):
        yield launcher


@contextlib.contextmanager
def _without_remembered_backends() -> Iterator[None]:
    """Which backend takes which call is remembered by the package."""
    backends.select.cache_clear()
    try:
        yield
    finally:
        backends.select.cache_clear()
