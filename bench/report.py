"""Tables of stored results: `python -m bench.report` for a terminal, with `--markdown` for the README."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from io import StringIO
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from .results import RESULTS, load, newest


def time_tables(rows: list[dict]) -> list[Table]:
    """One table per case, a line per peer."""
    tables = []
    for case_id, case_rows in _grouped(_of_kind(rows, "time"), lambda row: row["case"]["id"]):
        rounds = max((row["rounds"] for row in case_rows if row["reason"] is None), default=0)
        title = f"{case_id}  {_shape(case_rows[0]['case'])}, {rounds} rounds"
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column("peer", no_wrap=True)
        for heading in ("p20 ms", "p50 ms", "p80 ms", "ratio", "p20 .. p80"):
            table.add_column(heading, justify="right", no_wrap=True)
        for row in case_rows:
            table.add_row(row["peer"], *(_time_cells(row) if row["reason"] is None else ("not run",)))
        tables.append(table)
    return tables


def memory_table(rows: list[dict]) -> Table | None:
    """A line per peer, a column per number of keys."""
    memory_rows = _of_kind(rows, "memory")
    if not memory_rows:
        return None
    sizes = sorted({row["case"]["num_keys"] for row in memory_rows})
    case = memory_rows[0]["case"]
    title = f"Peak memory of a biased causal call, H={case['heads']} d={case['head_dim']} {case['dtype']}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("peer", no_wrap=True)
    for heading in (*(f"N={size}" for size in sizes), "grows as"):
        table.add_column(heading, justify="right")
    for peer, peer_rows in _grouped(memory_rows, lambda row: row["peer"]):
        measured = {row["case"]["num_keys"]: row for row in peer_rows if row["reason"] is None}
        cells = [f"{measured[size]['peak_bytes'] / 2**20:.1f} MiB" if size in measured else "not run" for size in sizes]
        exponent = measured[sizes[-1]]["growth_exponent"] if sizes[-1] in measured else None
        table.add_row(peer, *cells, "" if exponent is None else f"N^{exponent:.2f}")
    return table


def markdown(rows: list[dict]) -> str:
    """A line per case, a column per peer: median time and ratio."""
    time_rows = _of_kind(rows, "time")
    peers = list(dict.fromkeys(row["peer"] for row in time_rows))
    lines = [_machine_line(rows), ""]
    if time_rows:
        lines += _markdown_table(
            ["case", *peers], [_markdown_cells(case_rows, peers) for case_rows in _cases(time_rows)]
        )
        lines += [
            "",
            "Median milliseconds, and the median ratio to unbiased SDPA in the same round (20th to 80th percentile).",
        ]
    if (table := memory_table(rows)) is not None:
        columns = [[str(cell) for cell in column.cells] for column in table.columns]
        lines += ["", f"{table.title}:", ""]
        lines += _markdown_table(
            [str(column.header) for column in table.columns], [list(line) for line in zip(*columns)]
        )
    commands = dict.fromkeys(row["machine"]["command"] for row in rows)
    lines += ["", "Measured with " + " and ".join(f"`{command}`" for command in commands) + ";"]
    lines += ["printed with `python -m bench.report --markdown`."]
    return "\n".join([*lines, *_reason_lines(rows)]) + "\n"


def as_text(rows: list[dict], width: int | None = None) -> str:
    """What `python -m bench.report` prints, without colours."""
    text = StringIO()
    _print(rows, Console(file=text, width=width, color_system=None))
    return text.getvalue()


def _print(rows: list[dict], console: Console) -> None:
    console.print(_machine_line(rows), highlight=False)
    for table in (*time_tables(rows), memory_table(rows)):
        if table is not None:
            console.print(table)
    for line in _reason_lines(rows):
        console.print(line, highlight=False, markup=False)


def _machine_line(rows: list[dict]) -> str:
    machine, dates = rows[-1]["machine"], sorted({row["machine"]["date"][:10] for row in rows})
    parts = [machine["name"], f"{machine['threads']} threads" if machine["device"] == "cpu" else None]
    if machine["gpu"]:
        parts.append(f"driver {machine['gpu']['driver']}, CUDA {machine['gpu']['cuda']}")
    parts += [f"{name} {version}" for name, version in machine["versions"].items() if version]
    parts += [f"Python {machine['python']}", f"commit {machine['commit'] or 'unknown'}", " and ".join(dates)]
    return ", ".join(part for part in parts if part)


def _reason_lines(rows: list[dict]) -> list[str]:
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["reason"] is not None:
            reasons.setdefault((row["peer"], row["reason"]), []).append(row["case"]["id"])
    return [f"{peer} not run in {', '.join(ids)}: {reason}" for (peer, reason), ids in reasons.items()]


def _shape(case: dict) -> str:
    heads = f"H={case['heads']}" + (f"/{case['kv_heads']}" if case["kv_heads"] != case["heads"] else "")
    keys = f"N={case['num_keys']}" if case["is_causal"] else f"Nq={case['num_queries']} Nk={case['num_keys']}"
    return f"B={case['batch']} {heads} {keys} d={case['head_dim']}" + (" causal" if case["is_causal"] else "")


def _time_cells(row: dict) -> list[str]:
    times = [f"{row[f'{name}_ms']:.3f}" for name in ("p20", "p50", "p80")]
    if "ratio_p50" not in row:
        return times
    return [*times, f"{row['ratio_p50']:.2f}", f"{row['ratio_p20']:.2f} .. {row['ratio_p80']:.2f}"]


def _markdown_cells(case_rows: list[dict], peers: list[str]) -> list[str]:
    case, by_peer = case_rows[0]["case"], {row["peer"]: row for row in case_rows}
    cells = [f"{case['id']} ({_shape(case)})"]
    for peer in peers:
        row = by_peer.get(peer)
        if row is None or row["reason"] is not None:
            cells.append("not run")
        elif "ratio_p50" in row:
            spread = (
                f" ({row['ratio_p20']:.2f} to {row['ratio_p80']:.2f})" if row["ratio_p20"] != row["ratio_p80"] else ""
            )
            cells.append(f"{row['p50_ms']:.3g}, {row['ratio_p50']:.2f}x{spread}")
        else:
            cells.append(f"{row['p50_ms']:.3g}")
    return cells


def _markdown_table(header: list[str], lines: Iterable[list[str]]) -> list[str]:
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return ["| " + " | ".join(cells) + " |" for cells in (header, rule, *lines)]


def _of_kind(rows: list[dict], kind: str) -> list[dict]:
    return [row for row in rows if row["kind"] == kind]


def _cases(rows: list[dict]) -> list[list[dict]]:
    return [case_rows for _, case_rows in _grouped(rows, lambda row: row["case"]["id"])]


def _grouped(rows: list[dict], key: Callable[[dict], str]) -> Iterable[tuple[str, list[dict]]]:
    """In the order of first appearance."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups.items()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("--markdown", action="store_true", help="print tables for GitHub")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="folder of the stored rows (default: bench/results)"
    )
    arguments = parser.parse_args()
    groups = newest(load(arguments.results))
    if not groups:
        parser.exit(
            1,
            f"{arguments.results} holds no rows; store some with: "
            "python -m pytest bench --benchmark-only --save-results\n",
        )
    console = Console()
    for rows in groups:
        if arguments.markdown:
            print(markdown(rows))
        else:
            _print(rows, console)


if __name__ == "__main__":
    main()
