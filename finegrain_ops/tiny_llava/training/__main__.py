"""Trains the small LLaVA from nothing: `python -m finegrain_ops.tiny_llava.training`. Killed, the same command goes
on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table

from ..checkpoint import save
from ..tokenizer import make_processor, make_tokenizer
from .curve import plot_curve
from .loop import Run, Settings
from .validation import validate

_VALIDATE_EVERY = 1200  # steps of the stages in which the model talks


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m finegrain_ops.tiny_llava.training", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("build/tiny_llava"), help="scenes (3.6 GB) and state")
    parser.add_argument("--output", type=Path, help="where the checkpoint goes; default: checkpoint/ in the folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bfloat16", action="store_true", help="for processors with AVX-512 BF16 or AMX: faster there")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(options.threads)
    run = Run(options.folder, Settings(seed=options.seed, bfloat16=options.bfloat16), workers=options.threads)
    processor = make_processor(make_tokenizer())
    for stage, step in run.train():
        if stage != "tower" and step % _VALIDATE_EVERY == 0 and not run.is_finished:
            show(validate(run.model, processor, 64), f"{stage}: after {step} steps, {run.seconds / 60:.1f} minutes")
    accuracy = validate(run.model, processor, 400)
    show(accuracy, f"trained in {run.seconds / 60:.1f} minutes of steps")
    output = options.output or options.folder / "checkpoint"
    save(run.model, processor, output, {"minutes": run.seconds / 60, "seed": options.seed, "validation": accuracy})
    plot_curve(run.history, options.folder / "curve.png")
    (options.folder / "history.jsonl").write_text("".join(json.dumps(facts) + "\n" for facts in run.history))
    print(f"Checkpoint: {output}. Curve: {options.folder / 'curve.png'}.")


def show(accuracy: dict[str, dict[str, float]], title: str) -> None:
    table = Table(title=title, title_justify="left")
    for column in ("kind", *next(iter(accuracy.values()))):
        table.add_column(column)
    for kind, row in accuracy.items():
        table.add_row(kind, *(f"{share:.1%}" for share in row.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
