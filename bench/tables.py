"""What a person reads of stored rows in a terminal, and the parts that the README's tables share with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from io import StringIO

from rich import box
from rich.console import Console
from rich.table import Table

from .dualfocus_table import work_tables
from .peers import SDPA_EFFICIENT_MASK


def time_tables(rows: list[dict]) -> list[Table]:
    """One table per case, a line per peer that ran."""
    tables = []
    measured = [row for row in of_kind(rows, "time") if row["reason"] is None]
    for case_id, case_rows in grouped(measured, lambda row: row["case"]["id"]):
        first = case_rows[0]
        title = f"{case_id}  {shape(first['case'])}, {first['rounds']} rounds, ratio to {first['base']}"
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column("peer", no_wrap=True)
        headings = ["ms", "ratio", "p20 .. p80", "speed", "share"]
        headings += ["to mask"] if any(mask_ratio(row) is not None for row in case_rows) else []
        headings += ["levels off"] if any("levels_off" in row for row in case_rows) else []
        for heading in headings:
            table.add_column(heading, justify="right", no_wrap=True)
        for row in case_rows:
            to_mask = mask_ratio(row)
            cells = [f"{to_mask:.2f}"] if to_mask is not None else []
            cells += [f"{row['levels_off']:g} of {row['levels_allowed']:g}"] if "levels_off" in row else []
            table.add_row(row["peer"], *_time_cells(row), *cells)
        tables.append(table)
    return tables


def memory_table(rows: list[dict]) -> Table | None:
    """A line per peer that ran, a column per number of keys."""
    memory_rows = [row for row in of_kind(rows, "memory") if row["reason"] is None]
    if not memory_rows:
        return None
    sizes = sorted({row["case"]["num_keys"] for row in memory_rows})
    case = memory_rows[0]["case"]
    title = f"Peak memory of a biased causal call, H={case['heads']} d={case['head_dim']} {case['dtype']}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("peer", no_wrap=True)
    for heading in (*(f"N={size}" for size in sizes), "grows as"):
        table.add_column(heading, justify="right")
    for peer, peer_rows in grouped(memory_rows, lambda row: row["peer"]):
        measured = {row["case"]["num_keys"]: row for row in peer_rows}
        cells = [f"{measured[size]['peak_bytes'] / 2**20:.1f} MiB" if size in measured else "not run" for size in sizes]
        exponent = measured[sizes[-1]]["growth_exponent"] if sizes[-1] in measured else None
        table.add_row(peer, *cells, "" if exponent is None else f"N^{exponent:.2f}")
    return table


def as_text(rows: list[dict], width: int | None = None) -> str:
    """What `python -m bench.report` prints, without colours."""
    text = StringIO()
    print_tables(rows, Console(file=text, width=width, color_system=None))
    return text.getvalue()


def print_tables(rows: list[dict], console: Console) -> None:
    console.print(machine_line(rows), highlight=False)
    measured = [row for row in of_kind(rows, "time") if row["reason"] is None]
    for table in (*time_tables(rows), *work_tables(measured), memory_table(rows)):
        if table is not None:
            console.print(table)
    for line in reason_lines(rows):
        console.print(line, highlight=False, markup=False)


def machine_line(rows: list[dict]) -> str:
    machine, dates = rows[-1]["machine"], sorted({row["machine"]["date"][:10] for row in rows})
    parts = [machine["name"], f"{machine['threads']} threads" if machine["device"] == "cpu" else None]
    if machine["gpu"]:
        parts.append(f"driver {machine['gpu']['driver']}, CUDA {machine['gpu']['cuda']}")
    parts += [f"{name} {version}" for name, version in machine["versions"].items() if version]
    parts += [f"Python {machine['python']}", f"commit {machine['commit'] or 'unknown'}", " and ".join(dates)]
    return ", ".join(part for part in parts if part)


def reason_lines(rows: list[dict]) -> list[str]:
    """Who was not run and why: one line per reason."""
    not_run = [row for row in rows if row["reason"] is not None]
    lines = []
    for reason, reason_rows in grouped(not_run, lambda row: row["reason"]):
        peers, ids = (list(dict.fromkeys(of(row) for row in reason_rows)) for of in (_peer, _case_id))
        lines.append(f"{', '.join(peers)} not run in {_listed(ids)}: {reason}")
    return lines


def _listed(ids: list[str]) -> str:
    return ", ".join(ids) if len(ids) <= 3 else f"{ids[0]} and {len(ids) - 1} more cases"


def shape(case: dict) -> str:
    if "prompt_tokens" in case:
        return _model_shape(case)
    return _crop_shape(case) if "num_boxes" in case else _attention_shape(case)


def _model_shape(case: dict) -> str:
    model = case["shape"]
    heads = f"{model['heads']}" + (f"/{model['kv_heads']}" if model["kv_heads"] != model["heads"] else "")
    batch = f"B={case['batch']}{' padded' if case.get('is_padded') else ''} N={case['prompt_tokens']}"
    return f"{batch}, {model['layers']} layers of {model['hidden']}, {heads} heads"


def _crop_shape(case: dict) -> str:
    sizes, sides = case["image_sizes"], case["sides"]
    images = f"{sizes[0][1]}x{sizes[0][0]}" if len(sizes) == 1 else f"{len(sizes)} images"
    boxes = f"K={case['num_boxes']} of " + ("nearly all" if sides is None else f"{sides[0]} to {sides[1]} px")
    planes = ", planes" if case["layout"] == "planes" else ""
    return f"{boxes} in {images}{planes}, to {case['size']}x{case['size']}"


def _attention_shape(case: dict) -> str:
    heads = f"H={case['heads']}" + (f"/{case['kv_heads']}" if case["kv_heads"] != case["heads"] else "")
    keys = f"N={case['num_keys']}" if case["is_causal"] else f"Nq={case['num_queries']} Nk={case['num_keys']}"
    lengths, read_rows = case.get("lengths"), case.get("read_rows")
    parts = [f"B={case['batch']} {heads} {keys} d={case['head_dim']}"]
    parts += ["causal"] * case["is_causal"]
    parts += [f"in {len(lengths)} sequences"] if lengths else []
    parts += [f"{read_rows} rows read"] if read_rows else []
    return " ".join(parts)


def has_speed(row: dict) -> bool:
    """Not the rows that are older than these fields, nor what did not run."""
    return "share_of_ceiling" in row or "tokens_per_s" in row


def speed(row: dict) -> tuple[str, str]:
    """TFLOP/s, of what memory binds GB/s, and the share of the ceiling; tokens per second; empty for rows without."""
    if not has_speed(row):
        return "", ""
    if "tokens_per_s" in row:
        return f"{row['tokens_per_s']:.4g} tokens/s", ""
    value = f"{row['gb_per_s']:.3g} GB/s" if "gb_per_s" in row else f"{row['tflops']:.3g} TFLOP/s"
    return value, f"{row['share_of_ceiling']:.0%}"


def mask_ratio(row: dict) -> float | None:
    """Of ours, the median ratio to SDPA's memory-efficient kernel with a mask, where the base is another peer."""
    ratios = row.get("ratios", {}).get(SDPA_EFFICIENT_MASK)
    return None if ratios is None or row.get("base") == SDPA_EFFICIENT_MASK else ratios[1]


def _time_cells(row: dict) -> list[str]:
    ratios = ["", ""]
    if "ratio_p50" in row:
        ratios = [f"{row['ratio_p50']:.2f}", f"{row['ratio_p20']:.2f} .. {row['ratio_p80']:.2f}"]
    return [f"{row['p50_ms']:.3f}", *ratios, *speed(row)]


def _peer(row: dict) -> str:
    return row["peer"]


def _case_id(row: dict) -> str:
    return row["case"]["id"]


def of_kind(rows: list[dict], kind: str) -> list[dict]:
    return [row for row in rows if row["kind"] == kind]


def grouped(rows: list[dict], key: Callable[[dict], str]) -> Iterable[tuple[str, list[dict]]]:
    """In the order of first appearance."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups.items()
