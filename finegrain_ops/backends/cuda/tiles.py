"""The one table of tiles of the CUDA C++ kernels, compiled into them as numbers.

A thread block of `warps` owns 16 * warps * row_blocks rows (queries; in attention_backward_keys and attention_map,
keys) and walks through tiles of `step` of the others. `blocks` is how many of them a multiprocessor holds at least
(__launch_bounds__), from which the compiler takes how many registers a thread may have.

A row is chosen by kernel, architecture, bytes per element and width (the head dimension, padded). Rows of sm_80 serve
all later architectures, so that machine code for sm_80 runs with the same tile on sm_86. The tiles are the largest
steps with which at least 8 warps fit a multiprocessor's shared memory, where there are any.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

WIDTHS = (32, 64, 80, 96, 112, 128)
CLASSES = (70, 75, 80)  # architectures that have rows of their own: these have different matrix instructions


def class_of(architecture: int) -> int:
    return max(known for known in CLASSES if known <= architecture)


# KiB of shared memory that a thread block may ask for.
SHARED_KIB = {
    70: 96,
    72: 96,
    75: 64,
    80: 163,
    86: 99,
    87: 163,
    88: 163,
    89: 99,
    90: 227,
    100: 227,
    101: 227,
    103: 227,
    110: 227,
    120: 99,
    121: 99,
}

# How many tiles of a block's own rows, and of those it walks through, lie in shared memory.
_TILES_IN_SHARED_MEMORY = {
    "attention_forward": (1, 2),
    "attention_forward-long": (1, 2),
    "attention_rows": (1, 1),
    "attention_rows-of_map": (1, 1),
    "attention_backward_query": (2, 2),
    "attention_backward_query-of_map": (1, 1),
    "attention_backward_keys": (2, 2),
    "attention_backward_keys-of_map": (1, 1),
    "attention_map": (1, 1),
}
KERNELS = tuple(_TILES_IN_SHARED_MEMORY)  # with what tells variants of one kernel apart


@dataclass(frozen=True)
class Tile:
    warps: int
    row_blocks: int
    step: int
    blocks: int

    @property
    def rows(self) -> int:
        return 16 * self.warps * self.row_blocks


@dataclass(frozen=True)
class Row:
    """The tile of one kernel for widths up to `width`, from `architecture` on until the next one that has rows."""

    kernel: str
    architecture: int
    element_size: int
    width: int
    tile: Tile


def _row(kernel: str, architecture: int, element_size: int, width: int, tile: tuple[int, int, int, int]) -> Row:
    return Row(kernel, architecture, element_size, width, Tile(*tile))


# merge_splits has no tile: a warp adds up one row.
MERGE_TILE = Tile(warps=4, row_blocks=1, step=0, blocks=1)
# Nor has crop_weights: a thread owns a row or column of a result. A thread block of crop_resize makes CROP_PLACES x
# CROP_PLACES of one, from `step` rows or columns of the image at a time. By bytes of a level in shared memory.
WEIGHTS_TILE = Tile(warps=4, row_blocks=1, step=0, blocks=1)
CROP_TILES = {1: Tile(warps=8, row_blocks=1, step=32, blocks=3), 4: Tile(warps=8, row_blocks=1, step=16, blocks=3)}
CROP_PLACES = 32
_CROP_PITCH = {1: 132, 4: 67}  # csrc/crop_resize.cuh

# fmt: off
#         kernel                           from bytes width (warps, row_blocks, step, blocks)
TABLE = (
    _row("attention_forward",            70, 2, 96,  (4, 1, 64, 2)),
    _row("attention_forward",            70, 2, 112, (4, 1, 48, 2)),
    _row("attention_forward",            70, 2, 128, (4, 1, 32, 2)),
    _row("attention_forward",            70, 4, 64,  (4, 1, 32, 2)),
    _row("attention_forward",            70, 4, 96,  (4, 1, 16, 2)),
    _row("attention_forward",            70, 4, 128, (4, 1, 16, 1)),
    _row("attention_forward",            75, 2, 64,  (4, 1, 64, 2)),
    _row("attention_forward",            75, 2, 112, (4, 1, 32, 2)),
    _row("attention_forward",            75, 2, 128, (8, 1, 32, 1)),
    _row("attention_forward",            75, 4, 32,  (4, 1, 32, 2)),
    _row("attention_forward",            75, 4, 64,  (4, 1, 16, 2)),
    _row("attention_forward",            75, 4, 128, (4, 1, 16, 1)),
    _row("attention_forward",            80, 2, 128, (4, 1, 64, 2)),
    _row("attention_forward",            80, 4, 64,  (4, 1, 32, 2)),
    _row("attention_forward",            80, 4, 128, (4, 1, 16, 2)),

    _row("attention_forward-long",       70, 2, 32,  (4, 2, 64, 2)),
    _row("attention_forward-long",       70, 2, 64,  (4, 2, 48, 2)),
    _row("attention_forward-long",       70, 2, 80,  (4, 2, 32, 2)),
    _row("attention_forward-long",       70, 2, 96,  (8, 2, 32, 1)),
    _row("attention_forward-long",       70, 2, 128, (4, 2, 16, 2)),
    _row("attention_forward-long",       75, 2, 32,  (4, 2, 64, 2)),
    _row("attention_forward-long",       75, 2, 64,  (8, 2, 64, 1)),
    _row("attention_forward-long",       75, 2, 80,  (8, 2, 32, 1)),
    _row("attention_forward-long",       75, 2, 96,  (8, 2, 16, 1)),
    _row("attention_forward-long",       75, 2, 128, (4, 2, 16, 1)),
    _row("attention_forward-long",       80, 2, 64,  (4, 2, 64, 2)),
    _row("attention_forward-long",       80, 2, 96,  (4, 2, 32, 2)),
    _row("attention_forward-long",       80, 2, 112, (4, 2, 16, 2)),
    _row("attention_forward-long",       80, 2, 128, (4, 2, 32, 2)),

    _row("attention_rows",               70, 2, 128, (4, 1, 64, 2)),
    _row("attention_rows",               70, 4, 64,  (4, 1, 32, 2)),
    _row("attention_rows",               70, 4, 128, (4, 1, 16, 2)),
    _row("attention_rows",               75, 2, 96,  (4, 1, 64, 2)),
    _row("attention_rows",               75, 2, 128, (4, 1, 32, 2)),
    _row("attention_rows",               75, 4, 64,  (4, 1, 32, 2)),
    _row("attention_rows",               75, 4, 96,  (4, 1, 16, 2)),
    _row("attention_rows",               75, 4, 128, (4, 1, 16, 1)),
    _row("attention_rows",               80, 2, 128, (4, 1, 64, 2)),
    _row("attention_rows",               80, 4, 64,  (4, 1, 32, 2)),
    _row("attention_rows",               80, 4, 128, (4, 1, 16, 2)),

    _row("attention_rows-of_map",        70, 2, 128, (4, 1, 64, 2)),
    _row("attention_rows-of_map",        70, 4, 64,  (4, 1, 32, 2)),
    _row("attention_rows-of_map",        70, 4, 128, (4, 1, 16, 2)),
    _row("attention_rows-of_map",        75, 2, 96,  (4, 1, 64, 2)),
    _row("attention_rows-of_map",        75, 2, 128, (4, 1, 32, 2)),
    _row("attention_rows-of_map",        75, 4, 64,  (4, 1, 32, 2)),
    _row("attention_rows-of_map",        75, 4, 96,  (4, 1, 16, 2)),
    _row("attention_rows-of_map",        75, 4, 128, (4, 1, 16, 1)),
    _row("attention_rows-of_map",        80, 2, 128, (4, 1, 64, 2)),
    _row("attention_rows-of_map",        80, 4, 64,  (4, 1, 32, 2)),
    _row("attention_rows-of_map",        80, 4, 128, (4, 1, 16, 2)),

    _row("attention_backward_query",     70, 2, 80,  (4, 1, 64, 2)),
    _row("attention_backward_query",     70, 2, 112, (4, 1, 32, 2)),
    _row("attention_backward_query",     70, 2, 128, (8, 1, 32, 1)),
    _row("attention_backward_query",     70, 4, 32,  (4, 1, 32, 2)),
    _row("attention_backward_query",     70, 4, 64,  (4, 1, 16, 2)),
    _row("attention_backward_query",     70, 4, 128, (4, 1, 16, 1)),
    _row("attention_backward_query",     75, 2, 32,  (4, 1, 64, 2)),
    _row("attention_backward_query",     75, 2, 64,  (4, 1, 32, 2)),
    _row("attention_backward_query",     75, 2, 80,  (8, 1, 32, 1)),
    _row("attention_backward_query",     75, 2, 96,  (8, 1, 16, 1)),
    _row("attention_backward_query",     75, 2, 128, (4, 1, 32, 1)),
    _row("attention_backward_query",     75, 4, 32,  (4, 1, 32, 2)),
    _row("attention_backward_query",     75, 4, 64,  (4, 1, 32, 1)),
    _row("attention_backward_query",     75, 4, 96,  (4, 1, 16, 1)),
    _row("attention_backward_query",     75, 4, 128, (2, 1, 16, 1)),
    _row("attention_backward_query",     80, 2, 128, (4, 1, 64, 2)),
    _row("attention_backward_query",     80, 4, 64,  (4, 1, 32, 2)),
    _row("attention_backward_query",     80, 4, 96,  (4, 1, 16, 2)),
    _row("attention_backward_query",     80, 4, 128, (2, 1, 16, 3)),

    _row("attention_backward_query-of_map", 70, 2, 128, (4, 1, 64, 2)),
    _row("attention_backward_query-of_map", 70, 4, 64,  (4, 1, 32, 2)),
    _row("attention_backward_query-of_map", 70, 4, 128, (4, 1, 16, 2)),
    _row("attention_backward_query-of_map", 75, 2, 96,  (4, 1, 64, 2)),
    _row("attention_backward_query-of_map", 75, 2, 128, (4, 1, 32, 2)),
    _row("attention_backward_query-of_map", 75, 4, 64,  (4, 1, 32, 2)),
    _row("attention_backward_query-of_map", 75, 4, 96,  (4, 1, 16, 2)),
    _row("attention_backward_query-of_map", 75, 4, 128, (4, 1, 16, 1)),
    _row("attention_backward_query-of_map", 80, 2, 128, (4, 1, 64, 2)),
    _row("attention_backward_query-of_map", 80, 4, 64,  (4, 1, 32, 2)),
    _row("attention_backward_query-of_map", 80, 4, 128, (4, 1, 16, 2)),

    _row("attention_backward_keys",      70, 2, 80,  (4, 1, 32, 2)),
    _row("attention_backward_keys",      70, 2, 96,  (4, 1, 16, 2)),
    _row("attention_backward_keys",      70, 2, 112, (4, 1, 32, 2)),
    _row("attention_backward_keys",      70, 2, 128, (8, 1, 32, 1)),
    _row("attention_backward_keys",      70, 4, 32,  (4, 1, 32, 2)),
    _row("attention_backward_keys",      70, 4, 64,  (4, 1, 16, 2)),
    _row("attention_backward_keys",      70, 4, 128, (4, 1, 16, 1)),
    _row("attention_backward_keys",      75, 2, 64,  (4, 1, 32, 2)),
    _row("attention_backward_keys",      75, 2, 80,  (4, 1, 16, 2)),
    _row("attention_backward_keys",      75, 2, 96,  (8, 1, 16, 1)),
    _row("attention_backward_keys",      75, 2, 128, (4, 1, 16, 1)),
    _row("attention_backward_keys",      75, 4, 32,  (4, 1, 32, 2)),
    _row("attention_backward_keys",      75, 4, 96,  (4, 1, 16, 1)),
    _row("attention_backward_keys",      75, 4, 128, (2, 1, 16, 1)),
    _row("attention_backward_keys",      80, 2, 128, (4, 1, 32, 2)),
    _row("attention_backward_keys",      80, 4, 64,  (4, 1, 32, 2)),
    _row("attention_backward_keys",      80, 4, 96,  (4, 1, 16, 2)),
    _row("attention_backward_keys",      80, 4, 128, (2, 1, 16, 3)),

    _row("attention_backward_keys-of_map", 70, 2, 128, (4, 1, 32, 2)),
    _row("attention_backward_keys-of_map", 70, 4, 32,  (4, 1, 32, 2)),
    _row("attention_backward_keys-of_map", 70, 4, 128, (4, 1, 16, 2)),
    _row("attention_backward_keys-of_map", 75, 2, 128, (4, 1, 32, 2)),
    _row("attention_backward_keys-of_map", 75, 4, 32,  (4, 1, 32, 2)),
    _row("attention_backward_keys-of_map", 75, 4, 96,  (4, 1, 16, 2)),
    _row("attention_backward_keys-of_map", 75, 4, 128, (4, 1, 16, 1)),
    _row("attention_backward_keys-of_map", 80, 2, 128, (4, 1, 32, 2)),
    _row("attention_backward_keys-of_map", 80, 4, 64,  (4, 1, 32, 2)),
    _row("attention_backward_keys-of_map", 80, 4, 128, (4, 1, 16, 2)),

    _row("attention_map",                70, 2, 128, (4, 1, 64, 2)),
    _row("attention_map",                70, 4, 64,  (4, 1, 32, 2)),
    _row("attention_map",                70, 4, 128, (4, 1, 16, 2)),
    _row("attention_map",                75, 2, 96,  (4, 1, 64, 2)),
    _row("attention_map",                75, 2, 128, (4, 1, 32, 2)),
    _row("attention_map",                75, 4, 64,  (4, 1, 32, 2)),
    _row("attention_map",                75, 4, 96,  (4, 1, 16, 2)),
    _row("attention_map",                75, 4, 128, (4, 1, 16, 1)),
    _row("attention_map",                80, 2, 128, (4, 1, 64, 2)),
    _row("attention_map",                80, 4, 64,  (4, 1, 32, 2)),
    _row("attention_map",                80, 4, 128, (4, 1, 16, 2)),
)
# fmt: on


@functools.lru_cache(maxsize=1024)
def tile_for(kernel: str, architecture: int, element_size: int, width: int) -> Tile:
    """The newest architecture's row that is not newer than the GPU, of those the narrowest that is wide enough."""
    if kernel == "merge_splits":
        return MERGE_TILE
    if kernel == "crop_weights":
        return WEIGHTS_TILE
    if kernel == "crop_resize":
        return CROP_TILES[_stored_size(element_size)]
    rows = [
        row
        for row in TABLE
        if (row.kernel, row.element_size) == (kernel, element_size)
        and row.architecture <= architecture
        and width <= row.width
    ]
    if not rows:
        raise ValueError(f"no tile for {kernel} with {element_size}-byte elements, width {width}, sm_{architecture}")
    return max(rows, key=lambda row: (row.architecture, -row.width)).tile


def _stored_size(element_size: int) -> int:
    """Bytes of a level in shared memory: images of any floating type have it in float32."""
    return 1 if element_size == 1 else 4


def shared_bytes(kernel: str, tile: Tile, element_size: int, width: int) -> int:
    """What csrc/tiles.cuh hands out: tiles with an odd number of 16-byte units per row, floats for each row of the
    step, scratch. For crop_resize: what is known of the tile, pixels of a step and their levels after the first pass.
    """
    if kernel in ("merge_splits", "crop_weights"):
        return 0
    if kernel == "crop_resize":
        size = _stored_size(element_size)
        return 256 + 3 * tile.step * (_CROP_PITCH[size] + CROP_PLACES) * size
    own, step = _TILES_IN_SHARED_MEMORY[kernel]
    row_bytes = ((width * element_size // 16) | 1) * 16
    return (own * tile.rows + step * tile.step) * row_bytes + 8 * tile.step * 4 + 128
