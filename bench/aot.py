"""Compiles every shipped configuration of the kernels for sm_80 and sm_90, and holds it to the committed table:
`make aot`, or `python -m bench.aot`. No GPU is needed.

It fails on registers put into memory (spills), half-precision loops without tensor cores, more shared memory than there
is, serialized wgmma, a forward kernel beyond the limits of aot_table.py, and code that is worse than the table says,
bench/results/machine-code.json, which --accept writes.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .aot_configurations import Configuration
    from .aot_crops import CropConfiguration
    from .aot_table import Entry, Finding

# What needs triton is imported when it is there.

_ACCEPT = "If that is as it should be: make aot AOT_FLAGS=--accept, and commit bench/results/machine-code.json."
_RULES = "Rules cannot be accepted; another tile in kernels/tuning.py may keep them."


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    if importlib.util.find_spec("triton") is None:
        print("triton, which exists for Linux only, is not installed: nothing to compile.")
        return 0
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("Nothing is compiled under TRITON_INTERPRET=1; unset it.", file=sys.stderr)
        return 1
    return _show() if options.show else _compile_and_compare(options)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.aot", description=__doc__.split("\n\n")[0])
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--accept", action="store_true", help="write the table, unless a rule is broken")
    action.add_argument("--show", action="store_true", help="print the committed table, and compile nothing")
    action.add_argument("--all", action="store_true", help="further features and dtypes too, held to the rules only")
    action.add_argument("--only", metavar="WORDS", help='the configurations with all these words, like "forward sm_90"')
    parser.add_argument(
        "--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes (default: %(default)s)"
    )
    return parser.parse_args(arguments)


def _show() -> int:
    from rich.console import Console

    from .aot_table import PATH, Table

    table = Table.load()
    if table is None:
        print(f"{PATH} is not there. {_ACCEPT}", file=sys.stderr)
        return 1
    # In a file or a pipe nothing is cut off.
    Console(width=None if sys.stdout.isatty() else 400).print(table.render())
    return 0


def _compile_and_compare(options: argparse.Namespace) -> int:
    import triton

    from .aot_configurations import configurations
    from .aot_crops import crop_configurations
    from .aot_table import (
        PATH,
        Finding,
        Table,
        broken_limit,
        broken_rules,
        differences,
        left_over,
        limited_configurations,
    )

    chosen, limited = [*configurations(), *crop_configurations()], limited_configurations()
    every = [*configurations(every=True), *crop_configurations(every=True)] if options.all else []
    further = [c for c in every if c not in set(chosen)]
    if options.only:
        words = options.only.split()
        chosen, limited = ([c for c in cs if set(words) <= set(str(c).split())] for cs in (chosen, limited))
        if not chosen + limited:
            print(f"No configuration has all the words of {options.only!r}.", file=sys.stderr)
            return 1
    entries, findings = compile_all(chosen + limited + further, options.jobs)

    findings += [f for c, entry in entries.items() for f in broken_rules(c, entry)]
    findings += [f for c in limited if c in entries for f in broken_limit(c, entries[c])]
    compiled = Table(triton.__version__, {str(c): entries[c] for c in chosen if c in entries})
    table = Table.load()
    if options.accept:
        if findings:
            return _report(findings, len(entries))
        compiled.save()
        print(f"Wrote {len(compiled.entries)} configurations to {PATH}.")
        return 0
    if table is None:
        findings.append(Finding(PATH.name, "there is no table to compare with"))
    else:
        same_triton = table.triton == compiled.triton
        for name, entry in compiled.entries.items():
            findings += differences(name, entry, table.entries.get(name), same_triton)
        if not options.only:
            findings += left_over(table, {str(c) for c in chosen})
        if not same_triton:
            print(f"The table is of triton {table.triton}, this is {compiled.triton}: longer loops are no failures.")
    return _report(findings, len(entries))


def compile_all(
    chosen: Sequence[Configuration | CropConfiguration], jobs: int
) -> tuple[dict[Configuration | CropConfiguration, Entry], list[Finding]]:
    """In the order of `chosen`; findings are those that do not compile."""
    from tqdm import tqdm

    from .aot_table import Finding

    compiled, failed = {}, []
    # spawn: a forked process inherits torch's threads, but not what they hold.
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(_compile, configuration): configuration for configuration in chosen}
        for future in tqdm(as_completed(futures), "compiling", len(futures), unit="", smoothing=0.05, mininterval=1):
            try:
                compiled[futures[future]] = future.result()
            except Exception as error:
                # Whatever a compiler raises; the other configurations are still worth a look.
                what = f"it does not compile: {type(error).__name__}: {str(error).splitlines()[0]}"
                failed.append(Finding(str(futures[future]), what, is_rule=True))
    return {configuration: compiled[configuration] for configuration in chosen if configuration in compiled}, failed


def _compile(configuration: Configuration | CropConfiguration) -> Entry:
    from .aot_table import Entry

    return Entry.of(*configuration.compile())


def _report(findings: Sequence[Finding], number: int) -> int:
    """Prints what was found; the exit status."""
    failures = [finding for finding in findings if not finding.is_note]
    for title, group in (
        ("Longer loops, by another triton", [f for f in findings if f.is_note]),
        ("Broken rules", [f for f in failures if f.is_rule]),
        ("Other than the table", [f for f in failures if not f.is_rule]),
    ):
        if group:
            print(f"{title}:", *(f"  {f.configuration}: {f.what}" for f in group), sep="\n")
    if any(f.is_rule for f in failures):
        print(_RULES)
    if any(not f.is_rule for f in failures):
        print(_ACCEPT)
    print(f"{number} configurations compiled, {len(failures)} failures.")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
