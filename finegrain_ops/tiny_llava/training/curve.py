"""The picture of a training: losses and what is right, over the minutes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

_PARTS = {
    "tower": ("colour", "shape", "letter", "dot", "count", "edges"),
    "language": ("right", "looks", "letter", "dot"),
}
_SMOOTHED_OVER = 50  # steps


def plot_curve(history: Sequence[Mapping[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (losses, shares) = plt.subplots(2, 1, sharex=True, figsize=(8, 6), layout="constrained")
    for stage, parts in _PARTS.items():
        rows = [row for row in history if row["stage"] == stage]
        for axes, names in ((losses, ("loss", "dense")), (shares, parts)):
            for name in names:
                points = [(row["seconds"] / 60, row[name]) for row in rows if name in row]
                if points:
                    minutes, values = np.array(points).T
                    axes.plot(minutes, _smoothed(values), label=f"{stage}: {name}", linewidth=1)
    losses.set(ylabel="loss", yscale="log")
    shares.set(ylabel="share that is right", xlabel="minutes of steps")
    for axes in (losses, shares):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Each value, the mean of the last few."""
    sums = np.cumsum(np.concatenate([np.zeros(1), values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - _SMOOTHED_OVER, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)
