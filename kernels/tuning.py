"""The one table of tile shapes.

A row is chosen by compute capability, bytes per element and the padded head dimension. Its comment says where it comes
from: `estimate` rows are sized so that the pipeline's shared memory fits the architecture and the accumulators its
registers, checked against the compiled machine code (tests/machine_code: nothing spilled in a hot loop), and await a
measurement. Rows from 80 also fit the 99 KiB of shared memory of sm_86 and sm_89.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """BLOCK_M query rows by BLOCK_N keys per program."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


# (compute capability from, element bytes, padded head dim up to): Tile                               source
_FORWARD = {
    (80, 2, 32): Tile(128, 64, num_warps=4, num_stages=3),  # estimate
    (80, 2, 64): Tile(128, 64, num_warps=8, num_stages=3),  # estimate
    (80, 2, 128): Tile(128, 32, num_warps=8, num_stages=3),  # estimate; 128 x 64 spills with a gate or odd dimensions
    (80, 2, 256): Tile(64, 16, num_warps=8, num_stages=2),  # estimate; 64 x 32 spills with gate and padding
    (80, 4, 64): Tile(32, 32, num_warps=8, num_stages=2),  # estimate; IEEE float32 has no tensor cores
    (80, 4, 128): Tile(32, 16, num_warps=8, num_stages=2),  # estimate
    (80, 4, 256): Tile(16, 16, num_warps=8, num_stages=1),  # estimate
    (90, 2, 64): Tile(128, 128, num_warps=8, num_stages=3),  # estimate
    (90, 2, 128): Tile(128, 64, num_warps=8, num_stages=3),  # estimate
    (90, 2, 256): Tile(64, 32, num_warps=8, num_stages=2),  # estimate
    (120, 2, 32): Tile(128, 64, num_warps=4, num_stages=3),  # estimate; as 80
    (120, 2, 64): Tile(128, 64, num_warps=8, num_stages=3),  # estimate; as 80: shared memory is 99 KiB again
    (120, 2, 128): Tile(128, 32, num_warps=8, num_stages=3),  # estimate; as 80
    (120, 2, 256): Tile(64, 16, num_warps=8, num_stages=2),  # estimate; as 80
}


def forward_tile(compute_capability: int, element_size: int, head_dim: int) -> Tile:
    """The tile for a forward pass; head_dim is the larger of the padded dimensions of key and value."""
    rows = [row for row in _FORWARD if row[0] <= max(compute_capability, 80) and row[1] == element_size]
    newest = sorted(rows, key=lambda row: (-row[0], row[2]))
    return _FORWARD[next(row for row in newest if head_dim <= row[2])]
