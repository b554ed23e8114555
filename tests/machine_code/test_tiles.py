"""The table of tiles answers every call."""

from __future__ import annotations

import pytest

from finegrain_ops.kernels.tuning import REGIMES, TABLE, tile_for

KERNELS = sorted({row.kernel for row in TABLE})


@pytest.mark.parametrize("compute_capability", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("element_size", [2, 4])
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_call_has_a_tile(kernel: str, element_size: int, compute_capability: int) -> None:
    for head_dim in range(1, 257):
        for regime in REGIMES:
            tile = tile_for(kernel, compute_capability, element_size, head_dim, regime=regime)
            assert min(tile.BLOCK_M, tile.BLOCK_N) >= 16
            assert tile.num_warps in (4, 8, 16)


def test_a_wide_value_takes_the_tile_of_its_width() -> None:
    for kernel in KERNELS:
        assert tile_for(kernel, 80, 2, 16, 200) == tile_for(kernel, 80, 2, 200)
