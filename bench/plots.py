"""Plots of stored rows: TFLOP/s, for what memory binds GB/s, over the number of keys or boxes; a PNG per machine and
operation.

A facet per kind of case, dtype and head dimension: lines where there are several sizes, bars where there is one. Where
some kind was swept over three sizes or more, only such sweeps are drawn. What runs without a bias is dashed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator

from .operations import BOUND_BY_MEMORY, CROP_RESIZE, OPERATIONS, TITLES, WHOLE_ANSWERS
from .results import slug
from .tables import has_speed, machine_line

_COLUMNS = 4
_SWEEP = 3  # sizes
# Ours is drawn on top, in red; colours go by the name, so that a peer has the same in every figure.
_COLORS = {
    "finegrain_ops triton": "#d62728",
    "finegrain_ops cuda": "#7f0000",
    "finegrain_ops sdpa": "#d62728",  # on a CPU
    "finegrain_ops reference": "#d62728",  # the read-out on a CPU
    "finegrain_ops reference, lse given": "#ff9896",
    "finegrain_ops triton, lse given": "#ff9896",
    "one forward, finegrain_ops triton": "#1f77b4",
    "one forward, finegrain_ops sdpa": "#1f77b4",
    "one forward, finegrain_ops sdpa (rank trick)": "#aec7e8",
    "finegrain_ops sdpa (rank trick)": "#ff9896",
    "finegrain_ops triton unbiased": "#8c564b",
    "finegrain_ops cuda unbiased": "#c49c94",
    "SDPA unbiased": "#aec7e8",
    "SDPA unbiased, per sequence": "#aec7e8",
    "SDPA flash unbiased": "#1f77b4",
    "SDPA cuDNN unbiased": "#17becf",
    "SDPA nested tensor unbiased": "#1f77b4",
    "torch varlen_attn unbiased": "#17becf",
    "SDPA with mask tensor": "#2ca02c",
    "SDPA with mask tensor, per sequence": "#2ca02c",
    "SDPA memory-efficient with mask": "#2ca02c",
    "eager": "#7f7f7f",
    "eager, per sequence": "#7f7f7f",
    "FlexAttention": "#ff7f0e",
    "flash-attn unbiased": "#9467bd",
    "FLA unbiased": "#bcbd22",
    "FlashInfer unbiased": "#e377c2",
    "finegrain_ops pillow": "#d62728",
    "finegrain_ops interpolate, exact=False": "#ff7f0e",
    "Pillow + numpy, two threads": "#1f77b4",
    "Pillow + numpy, one thread": "#aec7e8",
    "Pillow, two threads, and copy": "#1f77b4",
    "Pillow, one thread, and copy": "#aec7e8",
    "transformers CLIPImageProcessorPil": "#9467bd",
    "transformers CLIPImageProcessorPil and copy": "#9467bd",
    "transformers CLIPImageProcessor (torchvision)": "#c5b0d5",
    "F.interpolate uint8": "#2ca02c",
    "F.interpolate uint8, two threads": "#98df8a",
    "F.interpolate float32": "#bcbd22",
}
_OTHER_COLOR = "#c7c7c7"


def write_plots(rows: list[dict], folder: Path) -> dict[str, Path]:
    """Draws the rows of one machine; returns the file of every operator's operation that has rows with a speed."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for operation in (o for o in OPERATIONS if o not in WHOLE_ANSWERS):
        measured = [row for row in rows if row["operation"] == operation and has_speed(row)]
        if measured:
            paths[operation] = folder / f"{slug(measured[0]['machine'])}-{operation}.png"
            _figure(measured).savefig(paths[operation], dpi=110, metadata={"Software": None})
    return paths


def _figure(rows: list[dict]) -> Figure:
    operation = rows[0]["operation"]
    facets = _facets(rows)
    columns = min(_COLUMNS, len(facets))
    lines = -(-len(facets) // columns)
    figure = Figure(figsize=(max(7.0, 3.4 * columns), 2.7 * lines + 1.8), layout="constrained")
    figure.suptitle(f"{TITLES[operation]}\n{machine_line(rows)}", fontsize=9, wrap=True)
    all_axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for (title, facet_rows), axes in zip(facets, all_axes):
        axes.set_title(title, fontsize=9)
        _draw(axes, facet_rows)
    for axes in all_axes[len(facets) :]:
        axes.set_visible(False)
    for axes in all_axes[: len(facets) : columns]:
        axes.set_ylabel("GB/s" if operation in BOUND_BY_MEMORY else "TFLOP/s")
    peers = _peers(row for _, facet_rows in facets for row in facet_rows)
    handles = [Line2D([], [], color=_color(peer), linestyle=_style(peer), linewidth=3, label=peer) for peer in peers]
    handles.append(Line2D([], [], color="black", linestyle=":", label=f"{_ceiling_name(operation)} of the same run"))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, columns + 1), fontsize=8, frameon=False)
    return figure


def _facets(rows: list[dict]) -> list[tuple[str, list[dict]]]:
    """(title, rows), sorted by kind of case, dtype and head dimension, of crops side of the result."""
    prefix, length = ("to ", "size") if _is_crops(rows[0]) else ("d=", "head_dim")
    facets: dict[tuple, list[dict]] = {}
    for row in rows:
        case = row["case"]
        kind = re.sub(r"-[ndk]\d+", "", case["name"])
        facets.setdefault((kind, case["dtype"], case[length]), []).append(row)
    sweeps = {key: facet for key, facet in facets.items() if len(_sizes(facet)) >= _SWEEP}
    chosen = sweeps or facets
    return [(f"{kind}, {dtype}, {prefix}{last}", chosen[kind, dtype, last]) for kind, dtype, last in sorted(chosen)]


def _draw(axes: Axes, rows: list[dict]) -> None:
    sizes = _sizes(rows)
    if len(sizes) == 1:
        _draw_bars(axes, rows)
    else:
        _draw_lines(axes, rows, sizes)
    highest = max(_speed(row) for row in rows)
    ceiling = max(row.get("ceiling_gb_per_s", row.get("ceiling_tflops", 0.0)) for row in rows)
    if ceiling < 3 * highest:  # else it would flatten the rest
        axes.axhline(ceiling, color="black", linestyle=":", linewidth=1)
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", alpha=0.3)
    axes.tick_params(labelsize=8)


def _draw_bars(axes: Axes, rows: list[dict]) -> None:
    by_peer = {row["peer"]: row for row in rows}
    peers = _peers(rows)
    axes.bar(range(len(peers)), [_speed(by_peer[peer]) for peer in peers], color=[_color(peer) for peer in peers])
    axes.set_xticks([])
    axes.set_xlabel(f"{_axis(rows)} = {_size(rows[0])}", fontsize=8)


def _draw_lines(axes: Axes, rows: list[dict], sizes: list[int]) -> None:
    for peer in reversed(_peers(rows)):  # ours on top
        points = sorted((_size(row), _speed(row)) for row in rows if row["peer"] == peer)
        width = 2.2 if peer.startswith("finegrain_ops") else 1.2
        axes.plot(*zip(*points), color=_color(peer), linestyle=_style(peer), linewidth=width, marker="o", markersize=3)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(sizes))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(sizes, [f"{size // 1024}k" if size % 1024 == 0 else str(size) for size in sizes])
    axes.set_xlabel(_axis(rows), fontsize=8)


def _speed(row: dict) -> float:
    return row["gb_per_s"] if "gb_per_s" in row else row["tflops"]


def _ceiling_name(operation: str) -> str:
    return "copy" if operation in BOUND_BY_MEMORY else "matrix product"


def _axis(rows: list[dict]) -> str:
    return "boxes" if _is_crops(rows[0]) else "N"


def _size(row: dict) -> int:
    """Number of boxes or of keys."""
    return row["case"]["num_boxes" if _is_crops(row) else "num_keys"]


def _is_crops(row: dict) -> bool:
    return row["operation"] == CROP_RESIZE


def _sizes(rows: list[dict]) -> list[int]:
    return sorted({_size(row) for row in rows})


def _peers(rows: Iterable[dict]) -> list[str]:
    """In the order of the rows, which is ours first."""
    return list(dict.fromkeys(row["peer"] for row in rows))


def _style(peer: str) -> str:
    return "--" if "unbiased" in peer else "-"


def _color(peer: str) -> str:
    return _COLORS.get(peer, _OTHER_COLOR)
