"""What each family of models makes of an image: through which steps its pixels go, and which token shows which of them.

| family               | preprocessing                                      | tokens                                   |
|----------------------|----------------------------------------------------|------------------------------------------|
| llava                | shorter side to 336, 336 x 336 cut from the centre | 24 x 24                                  |
| llava, do_pad=True   | padded to a square, resized to 336 x 336           | 24 x 24                                  |
| llava_next           | resized to 336 x 336                               | 24 x 24                                  |
|                      | and resized and padded to some tiles of 336 x 336  | 24 x 24 each, without whole rows of them |
|                      |                                                    | that are padding, a newline after a row  |
| instructblip, blip2  | resized to 224 x 224                               | CLS + 16 x 16, keys of the Q-Former      |
| qwen_vl              | resized to 448 x 448                               | 32 x 32, resampled by 16 x 16 queries    |
| qwen2_vl, qwen2_5_vl | `smart_resize` to multiples of 28                  | height / 28 x width / 28 after the merge |
| qwen3_vl             | `smart_resize` to multiples of 32                  | height / 32 x width / 32 after the merge |

Tokens are row major. The defaults are those of the released checkpoints; a processor that was set otherwise needs its
own numbers here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from .geometry import PixelMap, check_image_size, token_masks, token_ranges


@dataclass(frozen=True)
class ImageGrid:
    """One image as its model sees it: `leading` keys that show nothing in particular (CLS), then a grid of tokens."""

    pixels: PixelMap
    token_size: tuple[int, int]  # side of a token in processed pixels, (height, width)
    leading: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of tokens."""
        return self.pixels.size[0] // self.token_size[0], self.pixels.size[1] // self.token_size[1]

    @property
    def num_keys(self) -> int:
        return self.leading + self.shape[0] * self.shape[1]

    def ranges(self, boxes: Tensor | Sequence[Sequence[float]]) -> Tensor:
        """(K, 4) int64; see geometry.token_ranges."""
        return token_ranges(boxes, self.pixels, self.token_size)

    def masks(self, boxes: Tensor | Sequence[Sequence[float]]) -> Tensor:
        """(K, rows, columns) bool; see geometry.token_masks."""
        return token_masks(boxes, self.pixels, self.token_size)

    def key_masks(self, boxes: Tensor | Sequence[Sequence[float]]) -> Tensor:
        """M of CoF (arXiv 2412.16869, Sec. II-C) for each box: (K, num_keys) bool, False for the leading keys."""
        return F.pad(self.masks(boxes).flatten(1), (self.leading, 0))


def llava(image_size: tuple[int, int], *, do_pad: bool = False, side: int = 336, patch_size: int = 14) -> ImageGrid:
    """LLaVA-1.5 (Liu et al., arXiv 2310.03744): do_pad=True as the authors', False as transformers' checkpoints."""
    pixels = _of_image(image_size)
    if do_pad:
        pixels = pixels.pad_to_square().resize(side, side)
    else:
        pixels = pixels.resize_shortest_edge(side).center_crop(side, side)
    return ImageGrid(pixels, (patch_size, patch_size))


LLAVA_NEXT_PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))


def llava_next(
    image_size: tuple[int, int],
    *,
    side: int = 336,
    patch_size: int = 14,
    grid_pinpoints: Sequence[tuple[int, int]] = LLAVA_NEXT_PINPOINTS,
) -> tuple[ImageGrid, ImageGrid]:
    """LLaVA-NeXT (Liu et al., 2024): the grid of the whole image, and that of its tiles put together.

    The tiles hold the image resized within the best of `grid_pinpoints`, (height, width) each, and padded. Of their
    rows or columns of tokens as many go, alike on both sides, as are padding by the image's own proportions: a rounded
    number, so that a row of padding may stay, and one that shows the edge of the image may go.

    The tokens of an image are those of the first grid, then those of the second, where a newline ends every row.
    """
    image, tiles = _of_image(image_size), in_best_resolution(image_size, grid_pinpoints)
    rows, columns = _without_padding(image.size, tiles.size[0] // patch_size, tiles.size[1] // patch_size)
    tiles = tiles.center_crop(rows * patch_size, columns * patch_size)
    token_size = patch_size, patch_size
    return ImageGrid(image.resize(side, side), token_size), ImageGrid(tiles, token_size)


def in_best_resolution(image_size: tuple[int, int], grid_pinpoints: Sequence[Sequence[int]]) -> PixelMap:
    """Where LLaVA-NeXT's tiles, put together, have the pixels of an image: resized within the best of `grid_pinpoints`
    and padded on all sides.
    """
    height, width = best_resolution(image_size, grid_pinpoints)
    return _of_image(image_size).resize_within(height, width).pad(height, width)


def best_resolution(image_size: tuple[int, int], grid_pinpoints: Sequence[Sequence[int]]) -> tuple[int, int]:
    """The (height, width) into which most of the image's own pixels fit, and of several such the smallest, the first.

    Computed in floats as transformers' `select_best_resolution` does.
    """

    def fits(pinpoint: Sequence[int]) -> tuple[int, int]:
        scale = min(pinpoint[1] / image_size[1], pinpoint[0] / image_size[0])
        pixels = min(int(image_size[1] * scale) * int(image_size[0] * scale), image_size[0] * image_size[1])
        return pixels, pixels - pinpoint[0] * pinpoint[1]

    height, width = max(grid_pinpoints, key=fits)
    return height, width


def _without_padding(image_size: tuple[int, int], rows: int, columns: int) -> tuple[int, int]:
    """How many of the rows and columns of tokens stay, computed in floats as transformers' `unpad_image` does."""
    if image_size[1] / image_size[0] > columns / rows:
        shown = int(round(image_size[0] * (columns / image_size[1]), 7))
        return rows - (rows - shown) // 2 * 2, columns
    shown = int(round(image_size[1] * (rows / image_size[0]), 7))
    return rows, columns - (columns - shown) // 2 * 2


def instructblip(image_size: tuple[int, int]) -> ImageGrid:
    """InstructBLIP (Dai et al., arXiv 2305.06500): the ViT's 257 keys, to which the Q-Former attends."""
    return ImageGrid(_of_image(image_size).resize(224, 224), (14, 14), leading=1)


def blip2(image_size: tuple[int, int]) -> ImageGrid:
    """BLIP-2 (Li et al., arXiv 2301.12597): the same ViT as InstructBLIP."""
    return instructblip(image_size)


def qwen_vl(image_size: tuple[int, int]) -> ImageGrid:
    """Qwen-VL (Bai et al., arXiv 2308.12966): the place of each query of its resampler."""
    return ImageGrid(_of_image(image_size).resize(448, 448), (28, 28))


def qwen2_vl(image_size: tuple[int, int], *, min_pixels: int = 56 * 56, max_pixels: int = 12845056) -> ImageGrid:
    """Qwen2-VL (Wang et al., arXiv 2409.12191)."""
    return ImageGrid(_of_image(image_size).smart_resize(28, min_pixels, max_pixels), (28, 28))


def qwen2_5_vl(image_size: tuple[int, int], *, min_pixels: int = 56 * 56, max_pixels: int = 12845056) -> ImageGrid:
    """Qwen2.5-VL (Bai et al., arXiv 2502.13923): as Qwen2-VL."""
    return qwen2_vl(image_size, min_pixels=min_pixels, max_pixels=max_pixels)


def qwen3_vl(image_size: tuple[int, int], *, min_pixels: int = 65536, max_pixels: int = 16777216) -> ImageGrid:
    """Qwen3-VL (arXiv 2511.21631): patches of 16 instead of 14 pixels."""
    return ImageGrid(_of_image(image_size).smart_resize(32, min_pixels, max_pixels), (32, 32))


def _of_image(image_size: tuple[int, int]) -> PixelMap:
    return PixelMap.of_image(check_image_size(image_size, "image_size"))
