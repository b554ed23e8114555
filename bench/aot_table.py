"""The committed table of machine code, and when code is worse than it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.table import Table as RichTable

from finegrain_ops.kernels.tuning import Tile

from .aot_configurations import Configuration
from .aot_crops import CropConfiguration
from .machine_code import SHARED_MEMORY_LIMIT, MachineCode

PATH = Path(__file__).resolve().parent / "results" / "machine-code.json"
_SPEED = {"FFMA": 0, "HMMA": 1, "HGMMA": 2}

# Of the forward kernel at this tile, head dimension 128 and half precision, whatever tile is shipped: which loop, the
# first or the second, may have how many instructions.
LIMITED_TILE = Tile(128, 64, 8, 3)
LIMITS = {(80, "no bias"): (0, 515), (80, "bias"): (1, 545), (90, "no bias"): (0, 345), (90, "bias"): (1, 375)}


@dataclass(frozen=True)
class Entry:
    tile: str
    registers: int
    stack_bytes: int
    spills: int
    shared_bytes: int
    serialized: bool
    loops: tuple[str, ...]  # "HMMA 534": what makes the products, and how many instructions there are in all

    @staticmethod
    def of(tile: Tile, code: MachineCode) -> Entry:
        return Entry(
            f"{tile.BLOCK_M}x{tile.BLOCK_N}, {tile.num_warps} warps, {tile.num_stages} stages",
            code.registers,
            code.stack_bytes,
            code.spills,
            code.shared_bytes,
            code.serialized,
            tuple(f"{loop.opcode} {loop.instructions}" for loop in code.loops),
        )

    @property
    def opcodes(self) -> list[str]:
        return [loop.split()[0] for loop in self.loops]

    @property
    def lengths(self) -> list[int]:
        return [int(loop.split()[1]) for loop in self.loops]


@dataclass(frozen=True)
class Table:
    """Entries by the name of their configuration, as one version of triton, and so of ptxas, compiled them."""

    triton: str
    entries: Mapping[str, Entry]

    @staticmethod
    def load(path: Path | None = None) -> Table | None:
        """None where there is no file yet."""
        path = path or PATH
        if not path.exists():
            return None
        stored = json.loads(path.read_text())
        entries = {name: Entry(**{**e, "loops": tuple(e["loops"])}) for name, e in stored["configurations"].items()}
        return Table(stored["triton"], entries)

    def save(self, path: Path | None = None) -> None:
        """A line per configuration, in the order of `entries`."""
        lines = [f"{json.dumps(name)}: {json.dumps(vars(entry))}" for name, entry in self.entries.items()]
        (path or PATH).write_text(
            f'{{\n"triton": {json.dumps(self.triton)},\n"configurations": {{\n' + ",\n".join(lines) + "\n}\n}\n"
        )

    def render(self) -> RichTable:
        """For a terminal."""
        table = RichTable(title=f"Machine code by triton {self.triton}", title_justify="left", box=box.SIMPLE_HEAD)
        table.add_column("configuration", no_wrap=True)
        table.add_column("tile", no_wrap=True)
        for heading in ("registers", "spills", "shared"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("instructions in its loops", no_wrap=True)
        for name, entry in self.entries.items():
            shared = f"{entry.shared_bytes / 1024:.1f} KiB"
            loops = ", ".join(entry.loops) + (" serialized" if entry.serialized else "")
            table.add_row(name, entry.tile, str(entry.registers), str(entry.spills), shared, loops)
        return table


@dataclass(frozen=True)
class Finding:
    """`--accept` cannot help where code breaks a rule; a difference from the table is for a person to accept."""

    configuration: str
    what: str
    is_rule: bool = False
    is_note: bool = False  # reported, and no failure


def broken_rules(configuration: Configuration | CropConfiguration, entry: Entry) -> list[Finding]:
    """Those that hold whatever the table says."""
    limit = SHARED_MEMORY_LIMIT[configuration.compute_capability]
    broken = []
    if entry.stack_bytes or entry.spills:
        broken.append(f"spills: {entry.stack_bytes} bytes of stack, {entry.spills} accesses")
    if configuration.has_products and not entry.loops:
        broken.append("no loop with matrix products was found")
    if configuration.is_half_precision and "FFMA" in entry.opcodes:
        broken.append(f"no tensor-core instruction in a loop: {', '.join(entry.loops)}")
    if entry.shared_bytes > limit:
        broken.append(f"{entry.shared_bytes} bytes of shared memory, and {limit} are there")
    if entry.serialized:
        broken.append("its wgmma instructions are serialized")
    return [Finding(str(configuration), what, is_rule=True) for what in broken]


def limited_configurations() -> list[Configuration]:
    return [
        Configuration("forward", capability, dtype, 128, features, LIMITED_TILE)
        for dtype in ("fp16", "bf16")
        for capability, features in LIMITS
    ]


def broken_limit(configuration: Configuration, entry: Entry) -> list[Finding]:
    loop, limit = LIMITS[configuration.compute_capability, configuration.features]
    length = entry.lengths[loop] if loop < len(entry.lengths) else None
    if length is not None and length <= limit:
        return []
    return [
        Finding(str(configuration), f"{length} instructions in its hot loop, at most {limit} allowed", is_rule=True)
    ]


def differences(name: str, entry: Entry, accepted: Entry | None, same_triton: bool) -> list[Finding]:
    """What is worse than in the table. Another version of triton may well compile longer loops: that is only noted."""
    if accepted is None:
        return [Finding(name, "it is not in the table")]
    found = []
    if any(_SPEED[new] < _SPEED[old] for new, old in zip(entry.opcodes, accepted.opcodes)):
        found.append(Finding(name, f"slower instructions: {_change(accepted, entry)}"))
    if entry.tile != accepted.tile:
        found.append(Finding(name, f"another tile: {entry.tile}, was {accepted.tile}; {_change(accepted, entry)}"))
    elif len(entry.loops) != len(accepted.loops):
        found.append(Finding(name, f"other loops: {_change(accepted, entry)}", is_note=not same_triton))
    elif any(new > old for new, old in zip(entry.lengths, accepted.lengths)):
        found.append(Finding(name, f"a longer loop: {_change(accepted, entry)}", is_note=not same_triton))
    return found


def _change(accepted: Entry, entry: Entry) -> str:
    return f"{', '.join(entry.loops)}; was {', '.join(accepted.loops)}"


def left_over(table: Table, names: set[str]) -> list[Finding]:
    return [Finding(name, "it is in the table, and nothing ships it") for name in table.entries if name not in names]
