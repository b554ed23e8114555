"""What the tests of the Triton kernels share: where they run, and tiles small enough to have several of them."""

from __future__ import annotations

import pytest
import torch

from finegrain_ops.kernels import arguments
from finegrain_ops.kernels.tuning import Tile


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 x 16 tiles: every case has several blocks of rows and of keys, and so every loop of a kernel runs."""
    monkeypatch.setattr(arguments, "tile_for", lambda *_, **__: Tile(16, 16, num_warps=1, num_stages=1))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """On a device every dtype. The interpreter is slow, so float16 is sampled there, and it computes wrong bfloat16
    products.
    """
    if "dtype" in metafunc.fixturenames:
        half = [torch.float16, torch.bfloat16]
        if not torch.cuda.is_available():
            half = [pytest.param(torch.float16, marks=pytest.mark.slow)]
        metafunc.parametrize("dtype", [torch.float32, *half], ids=str)
