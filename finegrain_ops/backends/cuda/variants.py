"""The kernels as they are compiled: one variant for each element type, width, architecture and set of options."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from . import tiles
from .tiles import WIDTHS, Tile

# As the kernels name them; bytes per element and the oldest architecture that has instructions for them.
ELEMENTS = {"half_t": (2, 70), "bfloat16_t": (2, 80), "float": (4, 70)}
# Of images, for every architecture: they are only converted.
CROP_ELEMENTS = {"byte_t": 1, "half_t": 2, "bfloat16_t": 2, "float": 4}
KERNELS = (
    "attention_forward",
    "attention_rows",
    "attention_backward_query",
    "attention_backward_keys",
    "attention_map",
    "merge_splits",
)
CROP_KERNELS = ("crop_weights", "crop_resize")
WITH_OF_MAP = ("attention_rows", "attention_backward_query", "attention_backward_keys")
OLDEST_ARCHITECTURE = 70


def width_for(head_dim: int) -> int | None:
    """The width of the variants that take this head dimension; None where it is too large for all of them."""
    return next((width for width in WIDTHS if head_dim <= width), None)


def has_long(kernel: str, element: str) -> bool:
    """Whether there is a variant with more rows per warp for calls with many rows."""
    return kernel == "attention_forward" and ELEMENTS[element][0] == 2


@dataclass(frozen=True)
class Variant:
    kernel: str
    element: str
    width: int  # 128 for merge_splits, which has no other; 0 for the kernels of crops, which have none
    architecture: int  # 10 * compute capability
    long: bool = False
    of_map: bool = False  # for the gradient of an attention map

    def __post_init__(self) -> None:
        if self.is_of_crops:
            elements = ("float",) if self.kernel == "crop_weights" else tuple(CROP_ELEMENTS)
            if self.element not in elements or self.width or self.options or self.architecture < OLDEST_ARCHITECTURE:
                raise ValueError(f"no such kernel: {self}")
            return
        if self.kernel not in KERNELS or self.element not in ELEMENTS or self.width not in WIDTHS:
            raise ValueError(f"no such kernel: {self}")
        if self.kernel == "merge_splits" and self.width != 128:
            raise ValueError(f"merge_splits has only the width 128, got {self.width}")
        if self.architecture < ELEMENTS[self.element][1]:
            raise ValueError(f"{self.element} needs sm_{ELEMENTS[self.element][1]}, got sm_{self.architecture}")
        if self.long and not has_long(self.kernel, self.element):
            raise ValueError(f"{self.kernel} of {self.element} has no long variant")
        if self.of_map and self.kernel not in WITH_OF_MAP:
            raise ValueError(f"{self.kernel} has no variant of_map")

    @property
    def is_of_crops(self) -> bool:
        return self.kernel in CROP_KERNELS

    @property
    def entry(self) -> str:
        return self.kernel

    @property
    def source(self) -> str:
        return f"{self.kernel}.cuh"

    @property
    def options(self) -> str:
        return "-long" * self.long + "-of_map" * self.of_map

    @property
    def name(self) -> str:
        width = "" if self.is_of_crops else f"-{self.width}"
        return f"{self.kernel}-{self.element}{width}-sm_{self.architecture}{self.options}"

    @property
    def element_size(self) -> int:
        return CROP_ELEMENTS[self.element] if self.is_of_crops else ELEMENTS[self.element][0]

    @property
    def _tile_name(self) -> str:
        return self.kernel + self.options if self.kernel + self.options in tiles.KERNELS else self.kernel

    @functools.cached_property
    def tile(self) -> Tile:
        return tiles.tile_for(self._tile_name, self.architecture, self.element_size, self.width)

    @functools.cached_property
    def threads(self) -> int:
        return 32 * self.tile.warps

    @functools.cached_property
    def rows(self) -> int:
        """Rows of the tile that a thread block owns; for crops, rows or columns of a result."""
        if self.kernel == "crop_weights":
            return self.threads
        return tiles.CROP_PLACES if self.kernel == "crop_resize" else self.tile.rows

    @functools.cached_property
    def shared_bytes(self) -> int:
        return tiles.shared_bytes(self._tile_name, self.tile, self.element_size, self.width)

    def defines(self) -> dict[str, str | int]:
        return {
            "FINEGRAIN_ELEMENT": self.element,
            "FINEGRAIN_WIDTH": self.width,
            "FINEGRAIN_WARPS": self.tile.warps,
            "FINEGRAIN_ROW_BLOCKS": self.tile.row_blocks,
            "FINEGRAIN_STEP": self.tile.step,
            "FINEGRAIN_BLOCKS": self.tile.blocks,
            "FINEGRAIN_OF_MAP": int(self.of_map),
            "FINEGRAIN_SHARED_BYTES": self.shared_bytes,
        }


def all_variants(architectures: Iterable[int]) -> list[Variant]:
    return [variant for architecture in architectures for variant in _variants_of(architecture)]


def _variants_of(architecture: int) -> Iterator[Variant]:
    for element, (_, oldest) in ELEMENTS.items():
        if architecture < oldest:
            continue
        for kernel in KERNELS:
            if kernel == "merge_splits":
                yield Variant(kernel, element, 128, architecture)
                continue
            for width in WIDTHS:
                yield Variant(kernel, element, width, architecture)
                if has_long(kernel, element):
                    yield Variant(kernel, element, width, architecture, long=True)
                if kernel in WITH_OF_MAP:
                    yield Variant(kernel, element, width, architecture, of_map=True)
    yield Variant("crop_weights", "float", 0, architecture)
    for element in CROP_ELEMENTS:
        yield Variant("crop_resize", element, 0, architecture)
