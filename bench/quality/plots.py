"""Plots of stored rows, with 95 % intervals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt

from finegrain_ops.tiny_llava.questions import AMBIGUOUS, CHANCE

from .cof import BOXES, WEIGHTS
from .dualfocus import BOXES as DUALFOCUS_BOXES
from .dualfocus import THRESHOLDS
from .rows import Row, pooled
from .tables import COF_NAMES, GROUPS, SETTLED, SHOWN_WEIGHT, Table

_COLOURS = {"predicted": "#d62728", "oracle": "#2ca02c", "wrong": "#7f7f7f", "none": "#1f77b4"}
_DPI = 110


def write_plots(rows: Sequence[Row], folder: Path) -> dict[str, str]:
    """The file name of each, by what it shows."""
    folder.mkdir(parents=True, exist_ok=True)
    table = Table(rows)
    drawn = {"kinds": _kinds, "cof": _cof, "boxes": _boxes, "thresholds": _thresholds}
    names = {}
    for name, draw in drawn.items():
        figure = draw(table)
        figure.savefig(folder / f"{name}.png", dpi=_DPI)
        plt.close(figure)
        names[name] = f"{name}.png"
    return names


def _kinds(table: Table) -> Any:
    """What each method answers, kind by kind."""
    methods = {
        "plain": ("plain", {}),
        f"CoF, λ = {SHOWN_WEIGHT:g}": ("cof", {"boxes": "predicted", "weight": SHOWN_WEIGHT}),
        "DualFocus": ("dualfocus", {"answer": "chosen", "boxes": "predicted", "threshold": 0.0}),
    }
    figure, axes = plt.subplots(figsize=(10, 4), layout="constrained")
    width = 0.8 / len(methods)
    for k, (name, (method, setting)) in enumerate(methods.items()):
        found = [table.find(*part, method, **setting) for part in table.parts]
        places = [i + (k - 1) * width for i in range(len(found))]
        axes.bar(places, [row.accuracy for row in found], width, yerr=_errors(found), capsize=2, label=name)
    for i, (_, kind) in enumerate(table.parts):
        chance = axes.hlines(CHANCE[kind], i - 0.45, i + 0.45, "black", linestyles="dotted", linewidth=1)
    chance.set_label("chance")
    labels = [kind if difficulty == "plain" else f"{kind},\n{difficulty}" for difficulty, kind in table.parts]
    axes.set_xticks(range(len(labels)), labels, fontsize=8)
    axes.set(ylabel="right answers", ylim=(0, 1.02))
    axes.legend(fontsize=8, ncols=4, loc="lower center")
    return figure


def _cof(table: Table) -> Any:
    """Lambda, for each kind of box: where it steers, and what it costs."""
    parts = [part for part in table.parts if part[1] in (AMBIGUOUS, "colour", "count", "shape", "leftmost")]
    columns = min(4, len(parts))
    figure, grid = plt.subplots(
        -(-len(parts) // columns), columns, figsize=(11, 5.5), sharex=True, sharey=True, layout="constrained"
    )
    for axes, (difficulty, kind) in zip(grid.flat, parts):
        for which in BOXES:
            found = [table.find(difficulty, kind, "cof", boxes=which, weight=weight) for weight in WEIGHTS]
            shares = [row.accuracy for row in found]
            axes.errorbar(WEIGHTS, shares, _errors(found), color=_COLOURS[which], capsize=2, label=COF_NAMES[which])
        axes.set(title=kind if difficulty == "plain" else f"{kind}, {difficulty}", xscale="log", ylim=(0, 1.02))
        axes.set_xticks(WEIGHTS, [f"{weight:g}" for weight in WEIGHTS])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    for axes in list(grid.flat)[len(parts) :]:
        axes.set_visible(False)
    grid.flat[0].legend(fontsize=8)
    figure.supxlabel("λ")
    figure.supylabel("right answers")
    return figure


def _boxes(table: Table) -> Any:
    """DualFocus's choice with boxes that are off."""
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    for group, kinds in GROUPS.items():
        found = [
            table.pool(kinds, "dualfocus", answer="chosen", boxes=which, threshold=0.0) for which in DUALFOCUS_BOXES
        ]
        axes.errorbar(
            DUALFOCUS_BOXES, [row.accuracy for row in found], _errors(found), capsize=2, marker="o", label=group
        )
    axes.set(ylabel="right answers", ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def _thresholds(table: Table) -> Any:
    """What skipping sure answers costs."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    rows = []
    for threshold in (0.0, *THRESHOLDS):
        found = [
            table.find("plain", kind, "dualfocus", answer="chosen", boxes="predicted", threshold=threshold)
            for kind in SETTLED
        ]
        rows.append(pooled(found))
    skipped = [row.facts.get("skipped", 0.0) for row in rows]
    axes.errorbar(skipped, [row.accuracy for row in rows], _errors(rows), capsize=2, marker="o")
    for share, row, threshold in zip(skipped, rows, (0.0, *THRESHOLDS)):
        axes.annotate(f"{threshold:g}", (share, row.accuracy), textcoords="offset points", xytext=(4, 6), fontsize=8)
    axes.set(xlabel="share of micro passes skipped", ylabel="right answers", xlim=(-0.02, 1.02))
    axes.grid(alpha=0.3)
    return figure


def _errors(rows: Sequence[Row]) -> list[list[float]]:
    """Below and above each share."""
    shares = [(row.accuracy, *row.interval) for row in rows]
    return [[share - low for share, low, _ in shares], [high - share for share, _, high in shares]]
