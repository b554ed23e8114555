"""The one table of tiles: BLOCK_M rows by BLOCK_N keys per program, warps and pipeline stages.

A row is chosen by kernel, compute capability, bytes per element and the width of the head dimension (its parts added
up, head_dim.py), and holds a tile for each regime, since each takes registers of its own:

    plain    a batch of equal lengths, a head dimension that fills its parts, a scale above 0
    packed   the same, with sequences of different lengths
    uneven   a head dimension that fills its parts only partly (72, 88, 104, 120), or a scale of 0 or less;
             batched or packed
    gated    with a row gate; batched or packed, even or not

`source` says where the tiles come from. "no spills": the first of a list, ordered by arithmetic per byte, whose
machine code keeps every variant in registers and within 99 KiB (sm_80, whose rows sm_86 and sm_89 share) or 227 KiB
(sm_90) of shared memory; `make aot` checks that it stays so. "measured" rows say on which GPU. Nothing is tuned at a
user's first call.
"""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass

from .head_dim import split_head_dim

# How every kernel is launched: a product and a sum become one fused multiply-add only where the kernel says tl.fma.
# What a compiler may contract, it contracts differently in every version, and differently in the lanes of a warp, which
# then store sums one unit in the last place apart to one address.
EXACT = {"enable_fp_fusion": False}


@dataclass(frozen=True)
class Tile:
    """BLOCK_M query rows by BLOCK_N keys per program."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int

    def launch_arguments(self) -> dict[str, int]:
        return asdict(self) | EXACT


REGIMES = ("plain", "packed", "uneven", "gated")


@dataclass(frozen=True)
class Row:
    """Tiles of one kernel for widths up to `width` on GPUs from `compute_capability` on (until a newer row begins)."""

    kernel: str
    compute_capability: int
    element_size: int
    width: int
    plain: Tile
    packed: Tile
    uneven: Tile
    gated: Tile
    source: str


def _row(
    kernel: str,
    compute_capability: int,
    element_size: int,
    width: int,
    plain: tuple[int, int, int, int],
    packed: tuple[int, int, int, int] | None = None,
    uneven: tuple[int, int, int, int] | None = None,
    gated: tuple[int, int, int, int] | None = None,
    source: str = "no spills",
) -> Row:
    """A regime that is left out takes the tile before it."""
    packed = packed or plain
    uneven = uneven or packed
    tiles = (Tile(*tile) for tile in (plain, packed, uneven, gated or uneven))
    return Row(kernel, compute_capability, element_size, width, *tiles, source)


# fmt: off
#         kernel      from bytes width  plain             packed            uneven            gated
TABLE = (
    _row("forward",        80, 2, 64,  (128, 64, 8, 3)),
    _row("forward",        80, 2, 96,  (128, 64, 8, 3),  (128, 64, 8, 3),  (128, 64, 8, 3),  (128, 32, 8, 3)),
    _row("forward",        80, 2, 112, (128, 64, 8, 3),  (128, 64, 8, 3),  (128, 32, 8, 3),  (128, 32, 8, 3)),
    _row("forward",        80, 2, 128, (128, 64, 8, 3),  (128, 64, 8, 3),  (128, 32, 8, 3),  (64, 32, 8, 2)),
    _row("forward",        80, 2, 256, (64, 32, 8, 2)),
    _row("forward",        90, 2, 64,  (128, 128, 8, 3), (128, 128, 8, 3), (128, 128, 8, 3), (128, 64, 8, 3)),
    _row("forward",        90, 2, 96,  (128, 128, 8, 2), (128, 128, 8, 2), (128, 128, 8, 2), (128, 64, 8, 3)),
    _row("forward",        90, 2, 112, (128, 128, 8, 2), (128, 64, 8, 3)),
    _row("forward",        90, 2, 128, (128, 64, 8, 3),  (128, 64, 8, 3),  (128, 64, 8, 2),  (128, 32, 8, 2)),
    _row("forward",        90, 2, 256, (64, 32, 8, 2)),
    _row("forward",        80, 4, 64,  (64, 32, 8, 2),   (64, 32, 8, 2),   (32, 32, 4, 1),   (32, 32, 4, 1)),
    _row("forward",        80, 4, 128, (32, 16, 8, 2),   (32, 16, 8, 2),   (32, 16, 8, 2),   (16, 16, 8, 1)),
    _row("forward",        80, 4, 256, (16, 16, 8, 1),   (16, 16, 8, 1),   (16, 16, 8, 1),   (16, 16, 8, 2)),

    _row("backward_query", 80, 2, 64,  (128, 64, 8, 3),  (128, 64, 8, 3),  (128, 64, 8, 3),  (128, 32, 8, 3)),
    _row("backward_query", 80, 2, 112, (128, 32, 8, 2),  (128, 32, 8, 2),  (128, 32, 8, 2),  (64, 32, 8, 2)),
    _row("backward_query", 80, 2, 128, (64, 64, 4, 2),   (128, 32, 8, 2),  (128, 32, 8, 2),  (64, 32, 4, 2)),
    _row("backward_query", 80, 2, 256, (64, 16, 8, 2)),
    _row("backward_query", 90, 2, 64,  (128, 128, 8, 2), (128, 128, 8, 2), (128, 64, 8, 3)),
    _row("backward_query", 90, 2, 112, (128, 64, 8, 3),  (128, 64, 8, 3),  (128, 64, 8, 3),  (128, 32, 8, 2)),
    _row("backward_query", 90, 2, 128, (128, 64, 8, 3),  (128, 64, 8, 3),  (128, 32, 8, 2),  (128, 32, 8, 2)),
    _row("backward_query", 90, 2, 256, (32, 32, 8, 2),   (32, 32, 8, 2),   (32, 16, 4, 2),   (32, 16, 4, 2)),
    _row("backward_query", 80, 4, 64,  (64, 32, 8, 2),   (64, 32, 8, 2),   (32, 32, 8, 2),   (16, 32, 4, 1)),
    _row("backward_query", 80, 4, 128, (16, 16, 8, 1)),
    _row("backward_query", 80, 4, 256, (16, 16, 16, 2)),

    _row("backward_keys",  80, 2, 64,  (32, 128, 8, 3)),
    _row("backward_keys",  80, 2, 96,  (32, 128, 8, 2),  (32, 128, 8, 2),  (32, 128, 8, 2),  (16, 64, 8, 2)),
    _row("backward_keys",  80, 2, 112, (32, 32, 8, 2),   (16, 32, 4, 2)),
    _row("backward_keys",  80, 2, 128, (64, 64, 8, 2)),
    _row("backward_keys",  80, 2, 256, (32, 32, 8, 2)),
    _row("backward_keys",  90, 2, 64,  (64, 128, 8, 3)),
    _row("backward_keys",  90, 2, 112, (32, 128, 8, 2)),
    _row("backward_keys",  90, 2, 128, (32, 128, 8, 3),  (32, 64, 8, 2),   (32, 64, 8, 2),   (16, 64, 8, 2)),
    _row("backward_keys",  90, 2, 256, (32, 32, 8, 2)),
    _row("backward_keys",  80, 4, 64,  (32, 32, 8, 2)),
    _row("backward_keys",  80, 4, 128, (32, 16, 8, 2)),
    _row("backward_keys",  80, 4, 256, (16, 16, 8, 1)),

    # On sm_90, with the loads of a second stage ptxas would let the wgmma of this one wait for one another (C7515).
    _row("map_backward_query", 80, 2, 64,  (128, 64, 8, 3)),
    _row("map_backward_query", 80, 2, 112, (128, 32, 8, 2), (128, 32, 8, 2), (128, 32, 8, 2), (64, 32, 8, 2)),
    _row("map_backward_query", 80, 2, 128, (64, 64, 4, 2),  (64, 64, 4, 2),  (128, 32, 8, 2), (64, 32, 4, 2)),
    _row("map_backward_query", 80, 2, 256, (64, 16, 8, 2)),
    _row("map_backward_query", 90, 2, 64,  (128, 64, 8, 1)),
    _row("map_backward_query", 90, 2, 128, (128, 64, 8, 1), (128, 64, 8, 1), (128, 32, 8, 1), (128, 32, 8, 1)),
    _row("map_backward_query", 90, 2, 256, (32, 32, 8, 2),  (32, 32, 8, 2),  (32, 16, 4, 2),  (32, 16, 4, 2)),
    _row("map_backward_query", 80, 4, 64,  (32, 32, 8, 2),  (32, 32, 8, 2),  (32, 32, 8, 2),  (16, 32, 4, 1)),
    _row("map_backward_query", 80, 4, 128, (16, 16, 8, 1)),
    _row("map_backward_query", 80, 4, 256, (16, 16, 16, 2)),

    _row("map_rows",       80, 2, 64,  (128, 128, 8, 3), (128, 128, 8, 3), (128, 128, 8, 3), (128, 64, 8, 3)),
    _row("map_rows",       80, 2, 128, (128, 64, 8, 3)),
    _row("map_rows",       80, 2, 256, (128, 32, 8, 2)),
    _row("map_rows",       90, 2, 128, (128, 64, 8, 3)),
    _row("map_rows",       90, 2, 256, (128, 64, 8, 2)),
    _row("map_rows",       80, 4, 64,  (32, 32, 8, 2)),
    _row("map_rows",       80, 4, 128, (32, 16, 8, 2)),
    _row("map_rows",       80, 4, 256, (16, 16, 8, 2)),
    _row("map_columns",    80, 2, 64,  (128, 128, 8, 3), (128, 128, 8, 3), (128, 128, 8, 3), (64, 128, 8, 3)),
    _row("map_columns",    80, 2, 128, (64, 128, 8, 3)),
    _row("map_columns",    80, 2, 256, (32, 128, 8, 2)),
    _row("map_columns",    90, 2, 64,  (128, 128, 8, 3)),
    _row("map_columns",    90, 2, 128, (128, 128, 8, 3), (128, 128, 8, 3), (128, 128, 8, 3), (64, 128, 8, 3)),
    _row("map_columns",    90, 2, 256, (64, 128, 8, 2)),
    _row("map_columns",    80, 4, 64,  (32, 32, 8, 2)),
    _row("map_columns",    80, 4, 128, (32, 16, 8, 2)),
    _row("map_columns",    80, 4, 256, (16, 16, 8, 2)),

    # The rows of a KV group: 16, or 32 and 64 (wide). BLOCK_M is the largest; attention_decode.py takes what it needs.
    _row("decode",         80, 2, 128, (16, 64, 4, 3)),
    _row("decode",         80, 2, 256, (16, 64, 8, 2)),
    _row("decode",         80, 4, 64,  (16, 32, 4, 2)),
    _row("decode",         80, 4, 128, (16, 32, 8, 2)),
    _row("decode",         80, 4, 256, (16, 16, 8, 2)),
    _row("decode_wide",    80, 2, 128, (64, 64, 8, 2)),
    _row("decode_wide",    80, 2, 256, (64, 16, 8, 2)),
    _row("decode_wide",    90, 2, 128, (64, 64, 8, 2)),
    _row("decode_wide",    90, 2, 256, (64, 32, 8, 1)),
    _row("decode_wide",    80, 4, 64,  (64, 32, 8, 2)),
    _row("decode_wide",    80, 4, 128, (64, 16, 8, 1)),
    _row("decode_wide",    80, 4, 256, (64, 16, 16, 1)),
)
# fmt: on


@functools.lru_cache(maxsize=1024)
def tile_for(kernel: str, compute_capability: int, element_size: int, *head_dims: int, regime: str = "plain") -> Tile:
    """The tile of `kernel` for the widest of the head dimensions (of key, and of value where they differ)."""
    width = max(sum(split_head_dim(dim)) for dim in head_dims)
    row = row_for(kernel, compute_capability, element_size, width)
    tile: Tile = getattr(row, regime)
    return tile


def row_for(kernel: str, compute_capability: int, element_size: int, width: int) -> Row:
    """The newest architecture's row that is not newer than the GPU, of those the narrowest that is wide enough."""
    architecture = max(80, _shared_memory_as(compute_capability))
    rows = [r for r in TABLE if r.kernel == kernel and r.element_size == element_size and width <= r.width]
    return max(
        (r for r in rows if r.compute_capability <= architecture), key=lambda r: (r.compute_capability, -r.width)
    )


def _shared_memory_as(compute_capability: int) -> int:
    """sm_120 is newer than sm_90, yet has no wgmma and 99 KiB of shared memory: it takes the rows of sm_80."""
    return 80 if compute_capability >= 120 else compute_capability


# Of crop_resize, on every GPU: BLOCK_M rows by BLOCK_N columns of the result. Unmeasured: small, so that a large crop
# is the work of many programs, and of few registers, so that four of these or more share a multiprocessor.
CROP_TILE = Tile(16, 32, 4, 1)


def decode_splits(programs: int, num_keys: int, num_processors: int, block_n: int) -> int:
    """Into how many parts the keys of each head are dealt, so that every processor has two to read at least.

    A part has two blocks of keys at least, and there are no more than 64, which the merge holds at once.
    """
    wanted = -(-2 * num_processors // programs)
    return max(1, min(wanted, num_keys // (2 * block_n), 64))
