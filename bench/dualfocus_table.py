"""Of DualFocus and its peers: which phases the time goes to, and what the decoder does in them."""

from __future__ import annotations

from rich import box
from rich.table import Table

from .operations import DUALFOCUS_OPERATIONS

HEADER = ["peer", "skipped", "ms per question", "forwards", "positions", "box steps", "peak MiB", "ms of each phase"]


def work_lines(rows: list[dict]) -> list[list[str]]:
    """A line of HEADER per peer of one case that ran; all per question but the peak."""
    return [_line(row) for row in rows if row["reason"] is None]


def work_tables(rows: list[dict]) -> list[Table]:
    tables = []
    of_dualfocus = [row for row in rows if row["operation"] in DUALFOCUS_OPERATIONS]
    for case_id in dict.fromkeys(row["case"]["id"] for row in of_dualfocus):
        table = Table(
            title=f"{case_id}, of one question", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
        )
        for heading in HEADER:
            table.add_column(heading, justify="left" if heading in (HEADER[0], HEADER[-1]) else "right")
        for line in work_lines([row for row in of_dualfocus if row["case"]["id"] == case_id]):
            table.add_row(*line)
        tables.append(table)
    return tables


def _line(row: dict) -> list[str]:
    questions, batch = row["case"]["questions"], row["case"]["batch"]
    num_batches = questions / batch
    skipped, steps, peak = row.get("skipped"), row.get("box_steps"), row.get("peak_bytes")
    phases = [f"{name} {_short(ms / questions)}" for name, ms in row.get("phases_ms", {}).items()]
    return [
        row["peer"],
        "" if skipped is None else f"{skipped:.0%}",
        _short(row["p50_ms"] / questions),
        _short(row["forwards"] / num_batches),
        _short(row["positions"] / questions),
        "" if steps is None else _short(steps / num_batches),
        "" if peak is None else _short(peak / 2**20),
        ", ".join(phases),
    ]


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
