"""The committed table of the CUDA kernels' machine code, the rules that hold whatever it says, and when code is worse
than it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from rich import box
from rich.table import Table as RichTable

from finegrain_ops.backends.cuda import sources
from finegrain_ops.backends.cuda.tiles import SHARED_KIB
from finegrain_ops.backends.cuda.variants import Variant, all_variants

from .aot_table import Finding
from .cuda_machine_code import CudaCode
from .occupancy import occupancy

PATH = Path(__file__).resolve().parent / "results" / "cuda-machine-code.json"
ARCHITECTURES = (70, 75, 80, 90)
MATRIX_SHAPE = {70: "884", 75: "1688", 80: "16816", 90: "16816"}
# What spills with every tile that fits, and how many LDL and STL it may have: two gradients of 128 sums each leave
# float32 on sm_70 a few registers short.
KNOWN_SPILLS = {"attention_backward_keys-float-112-sm_70": 7, "attention_backward_keys-float-128-sm_70": 11}
LONGER = 1.02  # a loop by more than this is worse; less is a matter of how instructions were put in order


def tile_text(variant: Variant) -> str:
    tile = variant.tile
    return f"{variant.rows}x{tile.step}, {tile.warps} warps, {tile.blocks} blocks"


def sources_digest() -> str:
    """Of csrc/ without its comments and line breaks, and of the tiles: the table is out of date when these change. So,
    day by day, a sample is enough to compile.
    """
    result = hashlib.sha256()
    for path in sorted(sources.folder().glob("*.cuh")):
        code = re.sub(r"//.*", "", path.read_text(encoding="utf-8"))
        result.update(f"{path.name} {' '.join(code.split())}\n".encode())
    result.update(json.dumps({v.name: v.defines() for v in all_variants(ARCHITECTURES)}).encode())
    return result.hexdigest()


@dataclass(frozen=True)
class CudaEntry:
    compiler: str
    tile: str
    registers: int
    stack_bytes: int
    spilled_bytes: int | None  # as ptxas counts them; None where NVRTC does not say
    spills: int  # LDL and STL
    shared_bytes: int  # static and dynamic
    blocks: int  # that a multiprocessor holds, and the warps in them
    warps: int
    limited_by: str
    matrix: Mapping[str, int]  # tensor-core instructions by opcode
    ffma: int
    wide_global_loads: int
    wide_shared_loads: int
    loop: str  # "HMMA 534": the longest around matrix products; "" where there is none
    disagreement: str = ""

    @staticmethod
    def of(variant: Variant, code: CudaCode) -> CudaEntry:
        static = code.static_shared_bytes
        if variant.architecture >= 90:  # there cuobjdump counts what the system keeps of a block, as occupancy() does
            static = max(static - 1024, 0)
        shared_bytes = static + variant.shared_bytes
        resident = occupancy(variant.architecture, variant.tile.warps, code.registers, shared_bytes)
        return CudaEntry(
            compiler=code.compiler,
            tile=tile_text(variant),
            registers=code.registers,
            stack_bytes=code.stack_bytes,
            spilled_bytes=code.spilled_bytes,
            spills=code.spills,
            shared_bytes=shared_bytes,
            blocks=resident.blocks,
            warps=resident.warps,
            limited_by=resident.limited_by,
            matrix=code.matrix,
            ffma=code.ffma,
            wide_global_loads=code.wide_global_loads,
            wide_shared_loads=code.wide_shared_loads,
            loop=max(code.loops, key=lambda loop: int(loop.split()[1]), default=""),
            disagreement=code.disagreement,
        )

    @property
    def loop_length(self) -> int:
        return int(self.loop.split()[1]) if self.loop else 0


@dataclass(frozen=True)
class CudaTable:
    """Entries by the name of their variant, and what they were compiled from."""

    entries: Mapping[str, CudaEntry]
    sources: str = ""  # sources_digest

    @staticmethod
    def load(path: Path | None = None) -> CudaTable | None:
        """None where there is no file yet."""
        path = path or PATH
        if not path.exists():
            return None
        stored = json.loads(path.read_text())
        digest = stored.pop("sources", "")
        return CudaTable({name: CudaEntry(**entry) for name, entry in stored.items()}, digest)

    def save(self, path: Path | None = None) -> None:
        """A line per variant, in the order of `entries`."""
        lines = [f'"sources": {json.dumps(self.sources)}']
        for name, entry in self.entries.items():
            stored = asdict(entry)
            del stored["disagreement"]  # a broken rule, which is never written
            lines.append(f"{json.dumps(name)}: {json.dumps(stored)}")
        (path or PATH).write_text("{\n" + ",\n".join(lines) + "\n}\n")

    def render(self) -> RichTable:
        """For a terminal."""
        table = RichTable(title="Machine code of the CUDA kernels", title_justify="left", box=box.SIMPLE_HEAD)
        for heading in ("variant", "tile"):
            table.add_column(heading, no_wrap=True)
        for heading in ("registers", "spills", "shared", "warps resident"):
            table.add_column(heading, justify="right", no_wrap=True)
        for heading in ("limited by", "products", "longest loop", "by"):
            table.add_column(heading, no_wrap=True)
        for name, entry in self.entries.items():
            products = ", ".join(f"{number} {opcode}" for opcode, number in entry.matrix.items())
            table.add_row(
                name,
                entry.tile,
                str(entry.registers),
                str(entry.spills),
                f"{entry.shared_bytes / 1024:.1f} KiB",
                f"{entry.warps} in {entry.blocks}",
                entry.limited_by,
                products or f"{entry.ffma} FFMA",
                entry.loop,
                entry.compiler,
            )
        return table


def broken_rules(variant: Variant, entry: CudaEntry) -> list[Finding]:
    """Those that hold whatever the table says."""
    limit = _shared_limit(variant.architecture)
    broken = []
    does_spill, known = entry.stack_bytes or entry.spilled_bytes or entry.spills, KNOWN_SPILLS.get(variant.name)
    if known is not None and not does_spill:
        broken.append("it spills no more: take it out of KNOWN_SPILLS in bench/cuda_aot_table.py")
    if does_spill and (known is None or entry.spills > known):
        broken.append(
            f"spills: {entry.stack_bytes} bytes of stack, {entry.spilled_bytes or 0} bytes by ptxas, "
            f"{entry.spills} LDL and STL; {entry.registers} registers at {entry.tile}"
        )
    if entry.disagreement:
        broken.append(entry.disagreement)
    if entry.shared_bytes > limit:
        broken.append(f"{entry.shared_bytes} bytes of shared memory, and {limit} are there")
    if entry.blocks < variant.tile.blocks:
        broken.append(
            f"a multiprocessor holds {entry.blocks} blocks, and the tile promises {variant.tile.blocks}: "
            f"{entry.limited_by}, {entry.registers} registers, {entry.shared_bytes} bytes of shared memory"
        )
    if variant.kernel != "merge_splits" and not variant.is_of_crops:  # which neither multiply matrices nor load tiles
        broken += _missing(variant, entry)
    return [Finding(variant.name, what, is_rule=True) for what in broken]


def _missing(variant: Variant, entry: CudaEntry) -> list[str]:
    missing = []
    if variant.element == "float":
        if entry.matrix:
            missing.append(f"float32 in tensor cores: {_products(entry)}")
        if not entry.ffma:
            missing.append("no FFMA")
    else:
        shape, is_bfloat16 = MATRIX_SHAPE[variant.architecture], variant.element == "bfloat16_t"
        right = [o for o in entry.matrix if o.split(".")[1] == shape and ("BF16" in o.split(".")) == is_bfloat16]
        if len(right) != len(entry.matrix) or not right:
            missing.append(f"HMMA.{shape} of {variant.element} expected, got {_products(entry)}")
    if not entry.loop:
        missing.append("no loop with matrix products was found")
    if not entry.wide_global_loads:
        missing.append("no 128-bit load from global memory")
    if not entry.wide_shared_loads:
        missing.append("no 128-bit load from shared memory")
    return missing


def _products(entry: CudaEntry) -> str:
    return ", ".join(f"{number} {opcode}" for opcode, number in entry.matrix.items()) or "none"


def _shared_limit(architecture: int) -> int:
    """Code for sm_80 runs on sm_86 and sm_89 too."""
    return 1024 * min(SHARED_KIB[a] for a in ((80, 86, 89) if architecture == 80 else (architecture,)))


def differences(name: str, entry: CudaEntry, accepted: CudaEntry | None) -> list[Finding]:
    """What is worse than in the table. Another compiler may well need more registers or instructions: only noted."""
    if accepted is None:
        return [Finding(name, "it is not in the table")]
    if entry.tile != accepted.tile:
        return [Finding(name, f"another tile: {entry.tile}, was {accepted.tile}; {_change(accepted, entry)}")]
    worse = []
    if entry.warps < accepted.warps:
        worse.append(f"fewer warps resident, by {entry.limited_by}")
    if entry.loop_length > LONGER * accepted.loop_length:
        worse.append("a longer loop")
    is_note = entry.compiler != accepted.compiler
    return [Finding(name, f"{what}: {_change(accepted, entry)}", is_note=is_note) for what in worse]


def _change(accepted: CudaEntry, entry: CudaEntry) -> str:
    def text(e: CudaEntry) -> str:
        return f"{e.registers} registers, {e.warps} warps resident, loop {e.loop or 'none'}"

    return f"{text(entry)}; was {text(accepted)}"


def left_over(table: CudaTable, names: set[str]) -> list[Finding]:
    return [Finding(name, "it is in the table, and nothing ships it") for name in table.entries if name not in names]
