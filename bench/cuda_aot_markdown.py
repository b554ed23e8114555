"""Part of the table of the CUDA kernels' machine code, in docs/cuda.md."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from finegrain_ops.backends.cuda.variants import ELEMENTS, Variant, all_variants

from . import markers
from .cuda_aot_table import ARCHITECTURES, CudaEntry, CudaTable
from .occupancy import most_warps

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "cuda.md"
SECTION = "machine code"
WIDTHS = (64, 128)
_NAMES = {"half_t": "float16", "bfloat16_t": "bfloat16", "float": "float32", "byte_t": "uint8"}


def update(table: CudaTable, document: Path | None = None) -> None:
    markers.update(document or DOCUMENT, SECTION, markdown(table))


def markdown(table: CudaTable) -> str:
    entries = table.entries
    spilling = sum(bool(entry.spills or entry.stack_bytes) for entry in entries.values())
    lines = [
        f"{len(entries)} variants, {spilling or 'none'} of them with registers spilled to memory. Compiled by "
        f"{_compilers(entries)}.",
        "",
        "A cell holds registers per thread, KiB of shared memory per thread block, and warps resident on a "
        "multiprocessor of those it has room for; then, where there are any, LDL and STL instructions (spills).",
    ]
    for element in ELEMENTS:
        architectures = [a for a in ARCHITECTURES if a >= ELEMENTS[element][1]]
        lines += ["", f"**{_NAMES[element]}**", ""]
        lines.append("| kernel | width | " + " | ".join(f"sm_{a}" for a in architectures) + " |")
        lines.append("|---|---:|" + "---:|" * len(architectures))
        for name, width in _lines_of(element):
            cells = [_cell(entries.get(_name(name, element, width, a)), a) for a in architectures]
            lines.append(f"| {name} | {width} | " + " | ".join(cells) + " |")
    architectures = list(ARCHITECTURES)
    lines += ["", "**crops**", "", "| kernel | images | " + " | ".join(f"sm_{a}" for a in architectures) + " |"]
    lines.append("|---|---|" + "---:|" * len(architectures))
    for variant in all_variants(ARCHITECTURES[-1:]):
        if variant.is_of_crops:
            images = "all" if variant.kernel == "crop_weights" else _NAMES[variant.element]
            cells = [_cell(entries.get(replace(variant, architecture=a).name), a) for a in architectures]
            lines.append(f"| {variant.kernel} | {images} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Made with `make aot CUDA_AOT_FLAGS=--accept` and `python -m bench.cuda_aot --markdown`; all widths are in "
        "`bench/results/cuda-machine-code.json`, and `python -m bench.cuda_aot --show` prints them.",
    ]
    return "\n".join(lines) + "\n"


def _lines_of(element: str) -> list[tuple[str, int]]:
    """Kernels with their options, and widths."""
    newest: Iterable[Variant] = all_variants(ARCHITECTURES[-1:])
    return [(v.kernel + v.options, v.width) for v in newest if v.element == element and v.width in WIDTHS]


def _name(kernel: str, element: str, width: int, architecture: int) -> str:
    kernel, dash, option = kernel.partition("-")
    return f"{kernel}-{element}-{width}-sm_{architecture}{dash}{option}"


def _cell(entry: CudaEntry | None, architecture: int) -> str:
    if entry is None:
        return ""
    spills = f", {entry.spills} spills" if entry.spills else ""
    return f"{entry.registers}, {entry.shared_bytes / 1024:.1f}, {entry.warps}/{most_warps(architecture)}{spills}"


def _compilers(entries: dict[str, CudaEntry]) -> str:
    by_compiler: dict[str, set[str]] = {}
    for name, entry in entries.items():
        by_compiler.setdefault(entry.compiler, set()).add(next(x for x in name.split("-") if x.startswith("sm_")))
    return " and ".join(f"{compiler} ({', '.join(sorted(names))})" for compiler, names in by_compiler.items())
