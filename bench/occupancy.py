"""How many thread blocks a multiprocessor holds at once, from what one of them needs: the arithmetic of NVIDIA's
cuda_occupancy.h, with the limits of the CUDA C++ Programming Guide, "Compute Capabilities".
"""

from __future__ import annotations

from dataclasses import dataclass

_REGISTERS = 65536
_REGISTERS_AT_A_TIME = 256  # given to a warp
_PARTITIONS = 4  # of a multiprocessor; a warp's registers are all in one
_MOST_REGISTERS_PER_THREAD = 255


@dataclass(frozen=True)
class Limits:
    """Of one multiprocessor."""

    warps: int
    blocks: int
    shared_bytes: int
    shared_bytes_reserved: int  # of each block, by the system
    shared_bytes_at_a_time: int


_LIMITS = {
    70: Limits(64, 32, 96 * 1024, 0, 256),
    75: Limits(32, 16, 64 * 1024, 0, 256),
    80: Limits(64, 32, 164 * 1024, 1024, 128),
    86: Limits(48, 16, 100 * 1024, 1024, 128),
    89: Limits(48, 24, 100 * 1024, 1024, 128),
    90: Limits(64, 32, 228 * 1024, 1024, 128),
}


@dataclass(frozen=True)
class Occupancy:
    blocks: int
    warps: int
    limited_by: str  # what the next block would lack, several joined by " and "


def occupancy(architecture: int, warps_per_block: int, registers: int, shared_bytes: int) -> Occupancy:
    """`registers` of a thread; `shared_bytes` of a block, static and dynamic."""
    limits = _LIMITS[architecture]
    registers_per_warp = _round_up(32 * registers, _REGISTERS_AT_A_TIME)
    warps_with_registers = _PARTITIONS * (_REGISTERS // _PARTITIONS // registers_per_warp)
    shared = _round_up(shared_bytes + limits.shared_bytes_reserved, limits.shared_bytes_at_a_time)
    allowed = {
        "registers": warps_with_registers // warps_per_block if registers <= _MOST_REGISTERS_PER_THREAD else 0,
        "warps": limits.warps // warps_per_block,
        "blocks": limits.blocks,
    }
    if shared:
        allowed["shared memory"] = limits.shared_bytes // shared
    blocks = min(allowed.values())
    limited_by = " and ".join(name for name, number in allowed.items() if number == blocks)
    return Occupancy(blocks, blocks * warps_per_block, limited_by)


def most_warps(architecture: int) -> int:
    return _LIMITS[architecture].warps


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
