"""Compiles the CUDA C++ kernels for the GPU that is here, before tests and benchmarks need them; says how long it took.

`python -m bench.cuda_variants` takes them from the cache where they are there already. Beside those for the GPU itself
it compiles some that keep to the instructions of V100 and T4, with which tests/cuda_backend/test_on_device.py runs
their code on later GPUs. Each in a process: NVRTC compiles one at a time in a process, in however many threads.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import time
from collections.abc import Iterable, Sequence

from finegrain_ops import backends
from finegrain_ops.backends.cuda import cache, compiler, machine, sources
from finegrain_ops.backends.cuda.variants import Variant, all_variants

Task = tuple[Variant, int | None]  # what `image` is given

OLDER = (70, 75)  # architectures with instructions of their own; from sm_80 on they are those of the GPU itself
OLDER_WIDTHS = (32, 64, 80, 128)  # widths of which they are compiled; tests of others compile them when they run
_FROM = 80


def image(variant: Variant, runs_on: int | None = None) -> bytes:
    """Machine code for the variant's GPU, or, with the instructions that this one has, for a later one."""
    if runs_on is None:
        return machine.image(variant)
    identity = (sources.current_digest(), compiler.version_text(), *compiler.options(variant, runs_on))
    name = cache.entry_name(f"{variant.name}-on-sm_{runs_on}", *identity)
    if (cached := cache.load(name)) is not None:
        return cached
    compiled = compiler.compile(variant, runs_on)
    cache.store(name, compiled)
    return compiled


def older_variants(architecture: int) -> list[Task]:
    """V100's and T4's, for a GPU of `architecture`; not those of crops, which need no instructions of their own."""
    if architecture < _FROM:
        return []
    return [
        (variant, architecture)
        for variant in all_variants(OLDER)
        if variant.kernel == "merge_splits"
        or (
            not variant.is_of_crops
            and variant.width in OLDER_WIDTHS[: len(OLDER_WIDTHS) if variant.element == "half_t" else 2]
        )
    ]


def tasks_for(architecture: int) -> list[Task]:
    return [*((variant, None) for variant in all_variants([architecture])), *older_variants(architecture)]


def compile_all(tasks: Sequence[Task], jobs: int) -> tuple[float, list[str]]:
    """Seconds, and what could not be compiled."""
    start = time.monotonic()
    context = multiprocessing.get_context("spawn" if os.name == "nt" else "forkserver")
    if os.name != "nt":
        context.set_forkserver_preload(["bench.cuda_variants"])  # torch is imported once
    with context.Pool(min(jobs, len(tasks)), _be_quiet) as pool:
        problems = [problem for problem in pool.imap_unordered(_compile, _largest_first(tasks)) if problem]
    return time.monotonic() - start, problems


def _largest_first(tasks: Iterable[Task]) -> list[Task]:
    return sorted(tasks, key=lambda task: (task[0].long, task[0].width), reverse=True)


def _be_quiet() -> None:
    logging.getLogger("finegrain_ops").setLevel(logging.ERROR)


def _compile(task: Task) -> str | None:
    try:
        image(*task)
    except Exception as error:
        return f"{task[0].name}: {type(error).__name__}: {error}"
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.cuda_variants", description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)")
    options = parser.parse_args(arguments)
    if reasons := backends.load("cuda").unavailable_reasons():
        print(f"CUDA C++ kernels are left out: {'; '.join(reasons)}.")
        return 0
    import torch

    major, minor = torch.cuda.get_device_capability(0)
    tasks = tasks_for(10 * major + minor)
    seconds, problems = compile_all(tasks, options.jobs)
    print(
        f"CUDA C++ kernels: {len(tasks) - len(problems)} of {len(tasks)} variants compiled, or found compiled, "
        f"in {seconds:.1f} s by {options.jobs} processes ({machine.way()})."
    )
    for problem in problems:
        print(problem)
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
