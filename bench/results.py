"""What a row of results holds, and how rows are stored: JSON Lines in bench/results/, one file per kind of machine."""

from __future__ import annotations

import json
import re
from pathlib import Path

from .cases import AttentionCase
from .peers import SDPA_UNBIASED
from .sampling import percentiles

RESULTS = Path(__file__).resolve().parent / "results"


def time_row(
    case: AttentionCase, peer: str, machine: dict, samples: dict[str, list[float]], **measured: object
) -> dict:
    """`ratio_*` are percentiles of the ratio to unbiased SDPA within a round, not ratios of percentiles."""
    times = samples[peer]
    row = _row("time", case, peer, machine) | {"rounds": len(times), **measured}
    row |= {f"{name}_ms": round(ms, 5) for name, ms in percentiles(times)._asdict().items()}
    if SDPA_UNBIASED in samples:
        ratios = [time / floor for time, floor in zip(times, samples[SDPA_UNBIASED])]
        row |= {f"ratio_{name}": round(ratio, 4) for name, ratio in percentiles(ratios)._asdict().items()}
    return row


def memory_row(case: AttentionCase, peer: str, machine: dict, peak_bytes: int, growth_exponent: float | None) -> dict:
    """`growth_exponent` is from half as many keys to these: 1 is linear, 2 quadratic."""
    exponent = None if growth_exponent is None else round(growth_exponent, 3)
    return _row("memory", case, peer, machine) | {"peak_bytes": peak_bytes, "growth_exponent": exponent}


def not_run_row(kind: str, case: AttentionCase, peer: str, machine: dict, reason: str) -> dict:
    return _row(kind, case, peer, machine) | {"reason": reason}


def _row(kind: str, case: AttentionCase, peer: str, machine: dict) -> dict:
    return {"kind": kind, "case": case.parameters(), "peer": peer, "reason": None, "machine": machine}


def path_for(machine: dict, folder: Path = RESULTS) -> Path:
    slug = re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm|c)\)", "", machine["name"].lower())).strip("-")
    return folder / f"attention-{slug}.jsonl"


def append(rows: list[dict], folder: Path = RESULTS) -> list[Path]:
    """Adds the rows to the files of their machines and returns those."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for row in rows:
        path = path_for(row["machine"], folder)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if path not in paths:
            paths.append(path)
    return paths


def load(folder: Path = RESULTS) -> list[dict]:
    lines = [line for path in sorted(folder.glob("*.jsonl")) for line in path.read_text("utf-8").splitlines()]
    return [json.loads(line) for line in lines if line]


def newest(rows: list[dict]) -> list[list[dict]]:
    """Per machine the rows of its newest commit, of each case the newest run: never two commits in one table."""
    machines: dict[tuple, list[dict]] = {}
    for row in sorted(rows, key=lambda row: row["machine"]["date"]):
        machine = row["machine"]
        machines.setdefault((machine["name"], machine["device"], machine["threads"]), []).append(row)

    groups = []
    for machine_rows in machines.values():
        commit = machine_rows[-1]["machine"]["commit"]
        of_commit = [row for row in machine_rows if row["machine"]["commit"] == commit]
        last_run = {row["case"]["id"]: row["machine"]["date"] for row in of_commit}
        groups.append([row for row in of_commit if row["machine"]["date"] == last_run[row["case"]["id"]]])
    return groups
