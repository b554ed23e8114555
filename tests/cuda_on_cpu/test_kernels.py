"""Every CUDA kernel against the float64 oracle over the grid of arguments, in the simulator: with the tensor-core
instructions of sm_70, sm_75 and sm_80, and in float32. A race, an access out of bounds or a divergent barrier is an
error too.
"""

from __future__ import annotations

import pytest
import torch
from cpu_launcher import CpuLauncher

from attention_cases import ALL_CASES, Case, check_forward, check_gradients
from map_cases import ALL_MAP_CASES, MapCase, check_map, check_map_gradients
from packed_cases import (
    ALL_PACKED_CASES,
    PackedCase,
    check_packed_forward,
    check_packed_gradients,
    check_rows_in_no_sequence,
)

MACHINES = [
    pytest.param((70, torch.float16), id="sm_70"),
    pytest.param((75, torch.float16), id="sm_75", marks=pytest.mark.slow),
    pytest.param((80, torch.float16), id="sm_80"),
    pytest.param((80, torch.bfloat16), id="sm_80-bf16", marks=pytest.mark.slow),
    pytest.param((70, torch.float32), id="float32"),
]


@pytest.fixture(params=MACHINES)
def dtype(request: pytest.FixtureRequest, use_launcher) -> torch.dtype:
    architecture, dtype = request.param
    use_launcher(CpuLauncher(architecture))
    return dtype


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("case", ALL_CASES)
def test_forward(case: Case, dtype: torch.dtype) -> None:
    check_forward(case, dtype, "cuda")


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("case", ALL_CASES)
def test_gradients(case: Case, dtype: torch.dtype) -> None:
    check_gradients(case, dtype, "cuda")


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("case", ALL_PACKED_CASES)
def test_packed_forward(case: PackedCase, dtype: torch.dtype) -> None:
    check_packed_forward(case, dtype, "cuda")


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("case", ALL_PACKED_CASES)
def test_packed_gradients(case: PackedCase, dtype: torch.dtype) -> None:
    check_packed_gradients(case, dtype, "cuda")


@pytest.mark.usefixtures("small_tiles")
def test_rows_in_no_sequence(dtype: torch.dtype) -> None:
    check_rows_in_no_sequence("cuda", dtype)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("case", ALL_MAP_CASES)
def test_map(case: MapCase, dtype: torch.dtype) -> None:
    check_map(case, dtype, "cuda")


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("case", ALL_MAP_CASES)
def test_map_gradients(case: MapCase, dtype: torch.dtype) -> None:
    check_map_gradients(case, dtype, "cuda")
