"""Compiles the CUDA C++ kernels for sm_70, sm_75, sm_80 and sm_90, and holds their machine code to the committed table:
`make aot`, or `python -m bench.cuda_aot`. No GPU is needed.

It fails on registers put into memory (spills), half-precision kernels without tensor cores, tiles that are not loaded
128 bits at a time, more shared memory than there is, fewer resident thread blocks than a tile promises, and code that
is worse than the table says, bench/results/cuda-machine-code.json, which --accept writes.

nvcc compiles for the architectures it knows, NVRTC for the others: sm_70 with CUDA 13, and all of them without nvcc.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import os
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TYPE_CHECKING

from finegrain_ops.backends.cuda.variants import all_variants

if TYPE_CHECKING:
    from finegrain_ops.backends.cuda.variants import Variant

    from .cuda_aot_table import CudaEntry, Finding

# What needs triton, whose wheel brings the disassemblers, is imported when it is there.

_ACCEPT = (
    "If that is as it should be: make aot CUDA_AOT_FLAGS=--accept, and commit bench/results/cuda-machine-code.json."
)
_SAMPLED = {"half_t": (64, 128), "bfloat16_t": (128,), "float": (64,)}  # widths
_RULES = "Rules cannot be accepted; another tile in finegrain_ops/backends/cuda/tiles.py may keep them."


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    if importlib.util.find_spec("triton") is None:
        print("triton, which exists for Linux only and brings the disassemblers, is not installed: nothing to compile.")
        return 0
    if options.show or options.markdown:
        return _show(options.markdown)
    return _compile_and_compare(options)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.cuda_aot", description=__doc__.split("\n\n")[0])
    action = parser.add_mutually_exclusive_group()
    action.add_argument(
        "--accept", action="store_true", help="compile all and write the table, unless a rule is broken"
    )
    action.add_argument("--show", action="store_true", help="print the committed table, and compile nothing")
    action.add_argument("--markdown", action="store_true", help="write part of it into docs/cuda.md; compile nothing")
    action.add_argument("--all", action="store_true", help="every variant, not only the sample")
    action.add_argument(
        "--only", metavar="WORDS", help='the variants with all these words, like "attention_forward half_t sm_90 long"'
    )
    parser.add_argument(
        "--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes (default: %(default)s)"
    )
    return parser.parse_args(arguments)


def _show(as_markdown: bool) -> int:
    from rich.console import Console

    from . import cuda_aot_markdown
    from .cuda_aot_table import PATH, CudaTable

    table = CudaTable.load()
    if table is None:
        print(f"{PATH} is not there. {_ACCEPT}", file=sys.stderr)
        return 1
    if as_markdown:
        cuda_aot_markdown.update(table)
        print(f"Wrote a part of the table into {cuda_aot_markdown.DOCUMENT}.")
    else:
        # In a file or a pipe nothing is cut off.
        Console(width=None if sys.stdout.isatty() else 400).print(table.render())
    return 0


def sample(variants: Iterable[Variant]) -> list[Variant]:
    """What is compiled without --all: every kernel for every architecture, at the widths most models have. The table
    was made of all widths, and fails when it is older than the sources.
    """
    return [v for v in variants if v.kernel == "merge_splits" or v.is_of_crops or v.width in _SAMPLED[v.element]]


def _chosen(options: argparse.Namespace) -> list[Variant]:
    from .cuda_aot_table import ARCHITECTURES

    variants = all_variants(ARCHITECTURES)
    if options.only:
        words = set(options.only.split())
        return [variant for variant in variants if words <= set(variant.name.split("-"))]
    return variants if options.all or options.accept else sample(variants)


def _compile_and_compare(options: argparse.Namespace) -> int:
    from .cuda_aot_table import (
        ARCHITECTURES,
        PATH,
        CudaTable,
        Finding,
        broken_rules,
        differences,
        left_over,
        sources_digest,
    )

    chosen = _chosen(options)
    if not chosen:
        print(f"No variant has all the words of {options.only!r}.", file=sys.stderr)
        return 1
    chosen, missing = _with_compiler(chosen)
    entries, findings = compile_all(chosen, options.jobs)
    findings += [finding for variant, entry in entries.items() for finding in broken_rules(variant, entry)]
    if options.accept:
        if findings or missing:
            if missing:
                print("The table is of every architecture; nothing is written.")
            return _report(findings, len(entries)) or 1
        CudaTable({variant.name: entry for variant, entry in entries.items()}, sources_digest()).save()
        print(f"Wrote {len(entries)} variants to {PATH}.")
        return 0
    table = CudaTable.load()
    if table is None:
        findings.append(Finding(PATH.name, "there is no table to compare with"))
    else:
        if table.sources != sources_digest():
            findings.append(Finding(PATH.name, "csrc/ or the tiles have changed since it was made of all variants"))
        for variant, entry in entries.items():
            findings += differences(variant.name, entry, table.entries.get(variant.name))
        findings += left_over(table, {variant.name for variant in all_variants(ARCHITECTURES)})
    return _report(findings, len(entries))


def _with_compiler(chosen: Sequence[Variant]) -> tuple[list[Variant], list[int]]:
    """Those that a compiler here knows, and the architectures that none does. Prints who compiles what."""
    from finegrain_ops.backends.cuda.compiler import CompileError

    from .cuda_machine_code import compiler_for, nvcc_path

    if nvcc_path() is None:
        print("There is no nvcc, on PATH or in CUDA_HOME: NVRTC compiles all.")
    missing = []
    for architecture in dict.fromkeys(variant.architecture for variant in chosen):
        try:
            print(f"sm_{architecture}: {compiler_for(architecture)}")
        except CompileError as error:
            print(f"sm_{architecture}: not compiled. {error}")
            missing.append(architecture)
    return [variant for variant in chosen if variant.architecture not in missing], missing


def compile_all(chosen: Sequence[Variant], jobs: int) -> tuple[dict[Variant, CudaEntry], list[Finding]]:
    """In the order of `chosen`; findings are those that do not compile."""
    from tqdm import tqdm

    from .cuda_aot_table import Finding

    compiled, failed = {}, []
    # spawn: a forked process inherits torch's threads, but not what they hold.
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(_compile, variant): variant for variant in chosen}
        for future in tqdm(as_completed(futures), "compiling", len(futures), unit="", smoothing=0.05, mininterval=1):
            try:
                compiled[futures[future]] = future.result()
            except Exception as error:
                # Whatever a compiler raises; the other variants are still worth a look.
                what = f"it does not compile: {type(error).__name__}: {error}"
                failed.append(Finding(futures[future].name, what, is_rule=True))
    return {variant: compiled[variant] for variant in chosen if variant in compiled}, failed


def _compile(variant: Variant) -> CudaEntry:
    from .cuda_aot_table import CudaEntry
    from .cuda_machine_code import compile_cubin, read_cubin

    return CudaEntry.of(variant, read_cubin(compile_cubin(variant)))


def _report(findings: Sequence[Finding], number: int) -> int:
    """Prints what was found; the exit status."""
    failures = [finding for finding in findings if not finding.is_note]
    for title, group in (
        ("Worse, by another compiler than the table's, which is no failure", [f for f in findings if f.is_note]),
        ("Broken rules", [f for f in failures if f.is_rule]),
        ("Other than the table", [f for f in failures if not f.is_rule]),
    ):
        if group:
            print(f"{title}:", *(f"  {f.configuration}: {f.what}" for f in group), sep="\n")
    if any(f.is_rule for f in failures):
        print(_RULES)
    if any(not f.is_rule for f in failures):
        print(_ACCEPT)
    print(f"{number} variants compiled, {len(failures)} failures.")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
