"""The CUDA kernels of csrc/ on a CPU, through the package's own operators: only the launch itself is replaced."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import simulator
from cpu_launcher import CpuLauncher

from finegrain_ops import backends
from finegrain_ops.backends.cuda import launches, machine, tiles, variants
from finegrain_ops.backends.cuda.tiles import Tile


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if reason := simulator.missing():
        for item in items:  # of the whole session
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def use_launcher(monkeypatch: pytest.MonkeyPatch) -> Iterator:
    """Makes backend="cuda" run CPU tensors through a launcher."""

    def use(launcher: CpuLauncher) -> CpuLauncher:
        monkeypatch.setattr(machine, "unavailable_reasons", lambda: [])
        monkeypatch.setattr(machine, "device_reasons", lambda device_type, index, subject="": [])
        monkeypatch.setattr(machine, "launcher", lambda device: launcher)
        backends.select.cache_clear()
        return launcher

    yield use
    monkeypatch.undo()
    backends.select.cache_clear()


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two warps, steps of 16: every case has several blocks of rows and of keys, and warps without rows."""

    def tile(kernel: str, *_: int) -> Tile:
        if kernel == "merge_splits":
            return tiles.MERGE_TILE
        return Tile(warps=2, row_blocks=2 if kernel.endswith("-long") else 1, step=16, blocks=1)

    launches._variant.cache_clear()  # variants remember their tiles
    monkeypatch.setattr(variants.tiles, "tile_for", tile)
    yield
    launches._variant.cache_clear()
