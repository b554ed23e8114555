"""Kernels broken on purpose: in their PTX, an instruction at a time, and in their source.

A harness that lets a mutant pass, and tests that do, would let a bug pass.
"""

from __future__ import annotations

import contextlib
import importlib
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import finegrain_ops
from finegrain_ops import kernels

from .launches import Launch

_KINDS = {
    "barrier": r"(bar|barrier)\.",
    "wait for copies": r"cp\.async\.wait_",
    "proxy fence": r"fence\.proxy\.async",
    "wait for wgmma": r"wgmma\.wait_group",
}
# What a load, a store or a copy is guarded by: whether the row, the key or the column exists.
_GUARDED = re.compile(r"^(\s*)@!?%p\d+\s+((?:ld|st)\.(?:volatile\.)?(?:global|shared)|cp\.async)\b")
MASK = "mask"
KINDS = (*_KINDS, MASK)


def lines_of(kind: str, ptx: str, run: Launch) -> list[int]:
    """The lines of the PTX that a mutant of this kind changes, one each: of those that `run`, of this PTX, executed."""
    pattern = _GUARDED if kind == MASK else re.compile(rf"\s*(@!?%p\d+\s+)?{_KINDS[kind]}")
    lines = [number for number, line in enumerate(ptx.splitlines()) if pattern.match(line)]
    indices = [instruction.index for instruction in run.code if pattern.match(instruction.text)]
    if len(lines) != len(indices):
        raise ValueError(f"{len(lines)} lines of the text, and {len(indices)} instructions")
    return [number for number, index in zip(lines, indices) if index in run.coverage.executed]


def without(kind: str, ptx: str, line: int) -> str:
    """The PTX with that line gone, or with its guard gone."""
    lines = ptx.splitlines()
    lines[line] = _GUARDED.sub(r"\1\2", lines[line]) if kind == MASK else ""
    return "\n".join(lines)


def mutation_of(kernel: str, change: Callable[[str], str]) -> Callable[[str, str], str]:
    """For Runner(mutate=…): changes the PTX of one kernel."""
    return lambda name, ptx: change(ptx) if name == kernel else ptx


@dataclass(frozen=True)
class SourceMutant:
    """One piece of text in a file of kernels/, which occurs there once, and what it becomes."""

    file: str
    old: str
    new: str


@contextlib.contextmanager
def mutated_kernels(*mutants: SourceMutant) -> Iterator[None]:
    """Within this, `finegrain_ops.kernels` is a copy with the mutants in it."""
    prefix = kernels.__name__
    originals = {name: module for name, module in sys.modules.items() if (name + ".").startswith(prefix + ".")}
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "kernels")
        shutil.copytree(next(iter(kernels.__path__)), copy, ignore=shutil.ignore_patterns("__pycache__"))
        for mutant in mutants:
            text = (copy / mutant.file).read_text()
            if text.count(mutant.old) != 1:
                raise ValueError(f"{mutant.file} has {text.count(mutant.old)} times: {mutant.old}")
            (copy / mutant.file).write_text(text.replace(mutant.old, mutant.new))
        broken = type(kernels)(prefix)
        broken.__path__ = [str(copy)]
        for name in originals:
            del sys.modules[name]
        sys.modules[prefix] = finegrain_ops.kernels = broken
        importlib.invalidate_caches()
        try:
            yield
        finally:
            for name in [name for name in sys.modules if (name + ".").startswith(prefix + ".")]:
                del sys.modules[name]
            sys.modules.update(originals)
            finegrain_ops.kernels = originals[prefix]
