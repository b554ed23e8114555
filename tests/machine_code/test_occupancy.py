"""Resident thread blocks, computed by hand from NVIDIA's limits."""

from __future__ import annotations

import pytest

from bench.occupancy import Occupancy, occupancy


@pytest.mark.parametrize(
    ("architecture", "warps_per_block", "registers", "shared_bytes", "expected"),
    [
        # 32 * 255 registers are rounded up to 8192: two warps in each of four partitions of 16384
        (80, 4, 255, 0, Occupancy(2, 8, "registers")),
        # 4 * (40960 + 1024) are all of 164 KiB; 128 bytes more are too many
        (80, 4, 128, 40960, Occupancy(4, 16, "registers and shared memory")),
        (80, 4, 128, 40960 + 1, Occupancy(3, 12, "shared memory")),
        # nothing is reserved before sm_80; 256 bytes at a time
        (70, 4, 32, 32768, Occupancy(3, 12, "shared memory")),
        (70, 4, 32, 32768 + 1, Occupancy(2, 8, "shared memory")),
        # 168 * 32 = 5376 three times in a partition; a fourth would need 168 * 32 <= 4096
        (70, 2, 168, 0, Occupancy(6, 12, "registers")),
        (75, 8, 32, 0, Occupancy(4, 32, "warps")),
        (75, 1, 16, 0, Occupancy(16, 16, "blocks")),
        (75, 4, 64, 32768, Occupancy(2, 8, "shared memory")),
        (86, 2, 16, 0, Occupancy(16, 32, "blocks")),
        (89, 2, 16, 0, Occupancy(24, 48, "warps and blocks")),
        (90, 8, 64, 227 * 1024, Occupancy(1, 8, "shared memory")),
        (90, 8, 64, 227 * 1024 + 1, Occupancy(0, 0, "shared memory")),
        # 72 * 32 = 2304 = 9 * 256 seven times in a partition
        (90, 4, 72, 0, Occupancy(7, 28, "registers")),
    ],
)
def test_occupancy(
    architecture: int, warps_per_block: int, registers: int, shared_bytes: int, expected: Occupancy
) -> None:
    assert occupancy(architecture, warps_per_block, registers, shared_bytes) == expected
