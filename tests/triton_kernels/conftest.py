"""What the tests of the Triton kernels share: where they run, and tiles small enough to have several of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from finegrain_ops.kernels import arguments
from finegrain_ops.kernels.tuning import Tile
from ptx import chosen_capability


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() and chosen_capability() is None else "cpu"


@pytest.fixture(autouse=True)
def as_ptx() -> Iterator[None]:
    """With FINEGRAIN_PTX=80, say, executes what Triton compiles for that compute capability (tests/ptx), which must do
    nothing there that a GPU would not forgive.
    """
    capability = chosen_capability()
    if capability is None:
        yield
        return
    from ptx.project import on_ptx
    from ptx.triton_kernels import NOT_OURS

    with on_ptx(capability) as runner:
        yield
    assert set(runner.report.kinds()) <= NOT_OURS, str(runner.report)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 x 16 tiles: every case has several blocks of rows and of keys, and so every loop of a kernel runs."""
    monkeypatch.setattr(arguments, "tile_for", lambda *_, **__: Tile(16, 16, num_warps=1, num_stages=1))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """On a device every dtype, and so in its PTX. The interpreter is slow, so float16 is sampled there, and it computes
    wrong bfloat16 products.
    """
    if "dtype" in metafunc.fixturenames:
        half = [torch.float16, torch.bfloat16]
        if not torch.cuda.is_available() and chosen_capability() is None:
            half = [pytest.param(torch.float16, marks=pytest.mark.slow)]
        metafunc.parametrize("dtype", [torch.float32, *half], ids=str)
