"""Values of image tokens as a map in the image's own pixels."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from ..families import ImageGrid
from ..geometry import AxisMap


@dataclass(frozen=True)
class ImageMap:
    """values (rows, columns) float32 over `extent`, (x0, y0, x1, y1) in pixels of the original image. It may reach
    beyond the image where the processor pads, and leave out what it crops away.
    """

    values: Tensor
    extent: tuple[float, float, float, float]


def image_map(grids: Sequence[tuple[ImageGrid, Tensor]]) -> ImageMap:
    """One map of the grids of an image, each with (rows * columns,) values; the last grid is the finest.

    What a token of a coarser grid has is spread evenly over its place.
    """
    finest = grids[-1][0]
    total = torch.zeros(finest.shape)
    for grid, values in grids:
        on_grid = values.float().reshape(grid.shape)
        if grid is finest:
            total = total + on_grid
        else:
            y = _shares(_edges(grid.pixels.y, grid.token_size[0]), _edges(finest.pixels.y, finest.token_size[0]))
            x = _shares(_edges(grid.pixels.x, grid.token_size[1]), _edges(finest.pixels.x, finest.token_size[1]))
            total = total + y.T @ on_grid @ x
    y, x = _edges(finest.pixels.y, finest.token_size[0]), _edges(finest.pixels.x, finest.token_size[1])
    return ImageMap(total, (float(x[0]), float(y[0]), float(x[-1]), float(y[-1])))


def _edges(axis: AxisMap, token: int) -> list[Fraction]:
    """The borders of the tokens along an axis, in pixels of the original image."""
    return [(Fraction(i * token) - axis.shift) / axis.scale for i in range(axis.length // token + 1)]


def _shares(coarse: list[Fraction], fine: list[Fraction]) -> Tensor:
    """(coarse tokens, fine tokens): the share of each coarse one that lies in each fine one. What lies beyond all fine
    ones, where LLaVA-NeXT cuts the edge of an image off its tiles, goes to those at the border.
    """
    fine = [min(fine[0], coarse[0]), *fine[1:-1], max(fine[-1], coarse[-1])]
    shares = [
        [float(max(Fraction(0), min(c1, f1) - max(c0, f0)) / (c1 - c0)) for f0, f1 in itertools.pairwise(fine)]
        for c0, c1 in itertools.pairwise(coarse)
    ]
    return torch.tensor(shares)
