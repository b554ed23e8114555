"""What a row of results holds, and how rows are stored: JSON Lines in bench/results/, one file per kind of machine."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from .cases import AttentionCase
from .ceilings import Ceilings
from .crop_cases import CropCase
from .dualfocus_cases import DualFocusCase
from .generate_cases import GenerateCase
from .operations import CROP_RESIZE, DUALFOCUS_OPERATIONS, FORWARD, GENERATE_OPERATIONS, READ_OUT, speed
from .peers import SDPA_UNBIASED, Peer, base_peer
from .sampling import Percentiles, percentiles

Case = AttentionCase | CropCase | GenerateCase | DualFocusCase

RESULTS = Path(__file__).resolve().parent / "results"


def time_rows(
    case: Case,
    machine: dict,
    samples: dict[str, list[float]],
    ceilings: Ceilings,
    peers: Sequence[Peer],
    measured: dict[str, dict],
) -> list[dict]:
    """A row per peer in `samples`; `measured` holds further fields of each.

    `ratio_*` are percentiles of the ratio to the base peer within a round, not ratios of percentiles. Our own rows hold
    such percentiles for every other peer as well.
    """
    base = base_peer(case.operation, samples)
    rows = []
    for peer in (peer for peer in peers if peer.name in samples):
        times = samples[peer.name]
        row = _row("time", case, peer.name, machine) | {"rounds": len(times), **measured[peer.name]}
        row |= {f"{name}_ms": round(ms, 5) for name, ms in percentiles(times)._asdict().items()}
        row |= speed(_work_of(peer, case), row["p50_ms"], ceilings)
        row["base"] = base
        if base is not None:
            ratio = _ratio(times, samples[base])
            row |= {f"ratio_{name}": value for name, value in ratio._asdict().items()}
        if peer.is_ours:
            row["ratios"] = {other: list(_ratio(times, samples[other])) for other in samples if other != peer.name}
        rows.append(row)
    return rows


def _work_of(peer: Peer, case: Case) -> Case:
    """What it computes: beside read-outs, which may be of a few rows, a whole forward pass is timed."""
    if isinstance(case, AttentionCase) and case.operation == READ_OUT and not peer.gives_key_sums:
        return replace(case, operation=FORWARD, read_rows=None)
    return case


def _ratio(times: list[float], others: list[float]) -> Percentiles:
    """Of the same rounds."""
    ratios = percentiles([time / other for time, other in zip(times, others)])
    return Percentiles(*(round(ratio, 4) for ratio in ratios))


def memory_row(case: AttentionCase, peer: str, machine: dict, peak_bytes: int, growth_exponent: float | None) -> dict:
    """`growth_exponent` is from half as many keys to these: 1 is linear, 2 quadratic."""
    exponent = None if growth_exponent is None else round(growth_exponent, 3)
    return _row("memory", case, peer, machine) | {"peak_bytes": peak_bytes, "growth_exponent": exponent}


def not_run_row(kind: str, case: Case, peer: str, machine: dict, reason: str) -> dict:
    return _row(kind, case, peer, machine) | {"reason": reason}


def _row(kind: str, case: Case, peer: str, machine: dict) -> dict:
    return {
        "kind": kind,
        "operation": case.operation,
        "case": case.parameters(),
        "peer": peer,
        "reason": None,
        "machine": machine,
    }


@dataclass
class RowStore:
    """The rows of a run; with a folder each is in its file as soon as it is added, so that a killed run keeps it."""

    folder: Path | None = None
    rows: list[dict] = field(default_factory=list)
    paths: list[Path] = field(default_factory=list)

    def add(self, rows: list[dict]) -> None:
        self.rows += rows
        if self.folder is not None:
            self.paths += [path for path in append(rows, self.folder) if path not in self.paths]


def slug(machine: dict) -> str:
    """The name of a CPU or GPU as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm|c)\)", "", machine["name"].lower())).strip("-")


def operator(row: dict) -> str:
    if row["operation"] in GENERATE_OPERATIONS:
        return "generate"
    if row["operation"] in DUALFOCUS_OPERATIONS:
        return str(row["operation"])  # the sweep takes long, and is measured when nothing else is
    return "crop-resize" if row["operation"] == CROP_RESIZE else "attention"


def path_for(row: dict, folder: Path = RESULTS) -> Path:
    return folder / f"{operator(row)}-{slug(row['machine'])}.jsonl"


def append(rows: list[dict], folder: Path = RESULTS) -> list[Path]:
    """Adds the rows to the files of their operators and machines and returns those."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for row in rows:
        path = path_for(row, folder)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if path not in paths:
            paths.append(path)
    return paths


def load(folder: Path = RESULTS) -> list[dict]:
    """Rows from before there were several operations are forward passes, with a ratio to unbiased SDPA."""
    lines = [line for path in sorted(folder.glob("*.jsonl")) for line in path.read_text("utf-8").splitlines()]
    rows = [json.loads(line) for line in lines if line]
    return [row if "operation" in row else {"operation": FORWARD, "base": SDPA_UNBIASED} | row for row in rows]


def newest(rows: list[dict]) -> list[list[dict]]:
    """Per operator and machine the rows of its newest commit, of each case the newest run: never two commits in one
    table.
    """
    machines: dict[tuple, list[dict]] = {}
    for row in sorted(rows, key=lambda row: row["machine"]["date"]):
        machine = row["machine"]
        key = (operator(row), machine["name"], machine["device"], machine["threads"])
        machines.setdefault(key, []).append(row)

    groups = []
    for machine_rows in machines.values():
        commit = machine_rows[-1]["machine"]["commit"]
        of_commit = [row for row in machine_rows if row["machine"]["commit"] == commit]
        last_run = {row["case"]["id"]: row["machine"]["date"] for row in of_commit}
        groups.append([row for row in of_commit if row["machine"]["date"] == last_run[row["case"]["id"]]])
    return groups
