"""Stored rows as tables for GitHub, and the place in the README that holds them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from .cases import cases_for
from .crop_cases import crop_cases_for
from .dualfocus_cases import dualfocus_cases_for
from .dualfocus_table import HEADER, work_lines
from .generate_cases import generate_cases_for
from .operations import BOUND_BY_MEMORY, DUALFOCUS_OPERATIONS, OPERATIONS, TITLES, WHOLE_ANSWERS
from .peers import ours, ours_unbiased
from .tables import (
    grouped,
    has_speed,
    machine_line,
    mask_ratio,
    memory_table,
    of_kind,
    reason_lines,
    shape,
    speed,
)

SECTION = "benchmark table"
_MOST_LINES = 14  # of more cases only the quick set is shown
_OURS = "finegrain_ops"


def markdown(rows: list[dict], images: dict[str, str] | None = None) -> str:
    """The tables of one machine, grouped by operation; `images`: the address of an operation's plot."""
    lines = [machine_line(rows), *_ceiling_lines(rows)]
    for operation in OPERATIONS:
        time_rows = [row for row in of_kind(rows, "time") if row["operation"] == operation]
        if any(row["reason"] is None for row in time_rows):
            lines += ["", f"**{TITLES[operation]}.** {_summary(time_rows)}", "", *_operation_table(time_rows)]
        if operation in DUALFOCUS_OPERATIONS:
            lines += _work(time_rows)
        if images and operation in images:
            lines += ["", f"![{TITLES[operation]}]({images[operation]})"]
    if (table := memory_table(rows)) is not None:
        columns = [[str(cell) for cell in column.cells] for column in table.columns]
        lines += ["", f"{table.title}:", ""]
        lines += _table([str(column.header) for column in table.columns], [list(line) for line in zip(*columns)])
    if reasons := reason_lines(rows):
        lines += ["", "<details><summary>Not run</summary>", "", *(f"- {line}" for line in reasons), "", "</details>"]
    commands = dict.fromkeys(row["machine"]["command"] for row in rows)
    lines += ["", "Measured with " + " and ".join(f"`{command}`" for command in commands) + ";"]
    lines += ["printed with `python -m bench.report --markdown`."]
    return "\n".join(lines) + "\n"


def _ceiling_lines(rows: list[dict]) -> list[str]:
    matmul = {row["case"]["dtype"]: row["ceiling_tflops"] for row in rows if "ceiling_tflops" in row}
    copy = next((row["ceiling_gb_per_s"] for row in rows if "ceiling_gb_per_s" in row), None)
    parts = [f"{dtype} matrix product {tflops:.3g} TFLOP/s" for dtype, tflops in matmul.items()]
    parts += [] if copy is None else [f"copy {copy:.4g} GB/s"]
    return ["", f"Ceilings measured in the same run: {', '.join(parts)}."] if parts else []


def _summary(rows: list[dict]) -> str:
    """What the columns are, and over all cases ours against the base and against our own kernel without bias."""
    operation = rows[0]["operation"]
    by_operation = "GB/s (of the copy)" if operation in BOUND_BY_MEMORY else "TFLOP/s (of the matrix product)"
    if operation in WHOLE_ANSWERS:
        by_operation = "tokens per second"
    bases = dict.fromkeys(row["base"] for row in rows if row["reason"] is None and row.get("base"))
    text = f"Median ms and its ratio to {' or '.join(bases)} in the same round (20th to 80th percentile)"
    text += f", and {by_operation}." if any(map(has_speed, rows)) else "."
    cases = _cases(rows)
    ours = [first for case_rows in cases if (first := _first_of_ours(case_rows)) is not None]
    for name, ratios in (
        (" or ".join(bases), [row["ratio_p50"] for row in ours if "ratio_p50" in row]),
        ("our own kernel without bias", [row["own"] for row in map(_with_own_ratio, ours) if row["own"]]),
    ):
        if len(ratios) > 1:
            text += f" Over {len(ratios)} cases ours / {name} is {statistics.median(ratios):.2f}, "
            text += f"from {min(ratios):.2f} to {max(ratios):.2f}."
    text += _levels_off(rows)
    if len(shown := _shown(cases)) < len(cases):
        text += f" {len(shown)} of {len(cases)} cases are shown; bench/results/ has all."
    return text


def _work(rows: list[dict]) -> list[str]:
    """Of DualFocus a table per case, a line per peer."""
    lines = []
    for case_rows in _cases(rows):
        lines += ["", f"{_name(case_rows[0]['case'])}, of one question:", "", *_table(HEADER, work_lines(case_rows))]
    return lines


def _levels_off(rows: list[dict]) -> str:
    """How far from Pillow's the results of `crop_resize` and its peers are."""
    most: dict[float, dict[str, None]] = {}
    peers = grouped([row for row in rows if "levels_off" in row], lambda row: row["peer"])
    for peer, peer_rows in peers:
        most.setdefault(max(row["levels_off"] for row in peer_rows), {})[peer] = None
    parts = [f"{levels:g} ({', '.join(names)})" for levels, names in sorted(most.items())]
    return f" Levels off Pillow's at most: {', '.join(parts)}." if parts else ""


def _with_own_ratio(row: dict) -> dict:
    """`own`: the median ratio to the same backend without bias, None where that did not run."""
    ratio = row.get("ratios", {}).get(ours_unbiased(row["peer"].removeprefix(f"{_OURS} ")))
    return row | {"own": None if ratio is None else ratio[1]}


def _first_of_ours(case_rows: list[dict]) -> dict | None:
    """What backend="auto" takes."""
    ran = (row["peer"] for row in case_rows if row["reason"] is None)
    first = next((peer for peer in ran if peer.startswith(_OURS) and not peer.endswith("unbiased")), None)
    return next((row for row in case_rows if row["peer"] == first), None)


def _operation_table(rows: list[dict]) -> list[str]:
    """A line per case, a column per peer that ran in any; ours with spread and speed."""
    peers = list(dict.fromkeys(row["peer"] for row in rows if row["reason"] is None))
    has_own = any(_with_own_ratio(row)["own"] for row in rows)
    speed_is_known = any(map(has_speed, rows))
    has_mask = any(_cuda_to_mask(case_rows) is not None for case_rows in _cases(rows))
    header = ["case", *(["ours, speed"] if speed_is_known else []), *(["ours / own unbiased"] if has_own else [])]
    header += [*(["cuda / memory-efficient with mask"] if has_mask else []), *peers]
    lines = []
    for case_rows in _shown(_cases(rows)):
        case, by_peer, ours = case_rows[0]["case"], {row["peer"]: row for row in case_rows}, _first_of_ours(case_rows)
        line = [f"{_name(case)} ({shape(case)})"]
        if speed_is_known:
            line.append("" if ours is None else _speed_cell(ours))
        if has_own:
            own = None if ours is None else _with_own_ratio(ours)["own"]
            line.append("" if own is None else f"{own:.3f}x")
        if has_mask:
            to_mask = _cuda_to_mask(case_rows)
            line.append("" if to_mask is None else f"{to_mask:.2f}x")
        lines.append(line + [_cell(by_peer.get(peer)) for peer in peers])
    return _table(header, lines)


def _cuda_to_mask(case_rows: list[dict]) -> float | None:
    return next((mask_ratio(row) for row in case_rows if row["peer"] == ours("cuda")), None)


def _speed_cell(row: dict) -> str:
    value, share = speed(row)
    return f"{value} ({share})" if share else value


def _name(case: dict) -> str:
    return f"{case['name']}-{case['dtype']}"


def _cell(row: dict | None) -> str:
    if row is None or row["reason"] is not None:
        return "not run"
    if "ratio_p50" not in row:
        return f"{row['p50_ms']:.3g}"
    has_spread = row["peer"].startswith(_OURS) and row["ratio_p20"] != row["ratio_p80"]
    spread = f" ({row['ratio_p20']:.2f} to {row['ratio_p80']:.2f})" if has_spread else ""
    return f"{row['p50_ms']:.3g}, {row['ratio_p50']:.2f}x{spread}"


def _table(header: list[str], lines: Iterable[list[str]]) -> list[str]:
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return ["| " + " | ".join(cells) + " |" for cells in (header, rule, *lines)]


def _shown(cases: list[list[dict]]) -> list[list[dict]]:
    if len(cases) <= _MOST_LINES:
        return cases
    device_type = cases[0][0]["machine"]["device"]
    finders = (cases_for, crop_cases_for, generate_cases_for, dualfocus_cases_for)
    quick = {case.id for find in finders for case in find(device_type, "quick")}
    return [case_rows for case_rows in cases if case_rows[0]["case"]["id"] in quick] or cases[:_MOST_LINES]


def _cases(rows: list[dict]) -> list[list[dict]]:
    return [case_rows for _, case_rows in grouped(rows, lambda row: row["case"]["id"])]
