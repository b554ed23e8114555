"""Measures what the methods do to the answers of the small model on held-out scenes, and writes tables and plots:
`python -m bench.quality` (make eval).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.markdown import Markdown

from bench.machine import describe_machine
from bench.markers import replace_between, update
from finegrain_ops.tiny_llava.checkpoint import WEIGHTS, WEIGHTS_FILE, CheckpointError, facts_of

from .measure import PARTS, Part, measure, read_rows, write_rows
from .plots import write_plots
from .tables import report, summary

RESULTS = Path(__file__).resolve().parent.parent / "results" / "quality"
ROWS, REPORT = "rows.jsonl", "README.md"
SECTION = "quality table"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description=__doc__)
    parser.add_argument("--count", type=int, default=400, help="questions of each kind (default 400)")
    parser.add_argument("--split", default="test", help="which scenes: test (default) or validation")
    parser.add_argument("--model", type=Path, default=WEIGHTS, help="a checkpoint that was trained by the same command")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of rows, tables and plots")
    parser.add_argument("--readme", type=Path, help="a file whose table is put in place too")
    parser.add_argument("--stored", action="store_true", help="make tables and plots of the rows that are there")
    options = parser.parse_args(arguments)
    if options.count < 1:
        parser.error(f"--count: expected at least 1, got {options.count}")
    if options.readme:
        try:  # now, not after all questions
            replace_between(options.readme.read_text("utf-8"), SECTION, "")
        except (OSError, ValueError) as error:
            parser.error(f"--readme: {error}")
    transformers.logging.set_verbosity_error()
    if not options.stored:
        try:
            trained = facts_of(options.model)
        except CheckpointError as error:
            parser.error(f"--model: {error}")
        parts = [Part(difficulty, kind, options.count, options.split, str(options.model)) for difficulty, kind in PARTS]
        rows = [row for of_part in measure(parts, options.workers) for row in of_part]
        rows.sort(key=lambda row: PARTS.index((row.difficulty, row.kind)))
        command = f"python -m bench.quality --count {options.count} --split {options.split}"
        facts = describe_machine(torch.device("cpu"), command) | {
            "weights": trained["sha256"][WEIGHTS_FILE],
            "split": options.split,
        }
        write_rows(options.output / ROWS, rows, facts)
    rows, facts = read_rows(options.output / ROWS)
    images = write_plots(rows, options.output)
    (options.output / REPORT).write_text(report(rows, facts, images), "utf-8")
    if options.readme:
        update(options.readme, SECTION, summary(rows, facts))
    Console().print(Markdown(summary(rows, facts)))
    print(f"Tables: {options.output / REPORT}")


if __name__ == "__main__":
    main()
