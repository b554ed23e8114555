"""Stored results: `python -m bench.report` prints them; its options make tables for GitHub, the README's, and plots."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from rich.console import Console

from .markdown import SECTION, markdown
from .markers import update
from .results import RESULTS, load, newest
from .tables import print_tables


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("--markdown", action="store_true", help="print tables for GitHub")
    parser.add_argument("--readme", type=Path, metavar="FILE", help="put the tables between the markers of FILE")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="draw PNGs into FOLDER; --readme then shows them")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="folder of the stored rows (default: bench/results)"
    )
    options = parser.parse_args(arguments)
    groups = newest(load(options.results))
    if not groups:
        parser.exit(
            1,
            f"{options.results} holds no rows; store some with: "
            "python -m pytest bench --benchmark-only --save-results\n",
        )
    plots = [_plots(rows, options.plots) for rows in groups]
    if options.readme:
        beside = options.readme.resolve().parent
        tables = "\n".join(markdown(rows, _addresses(p, beside)) for rows, p in zip(groups, plots))
        update(options.readme, SECTION, tables)
    if options.markdown:
        print("\n".join(markdown(rows) for rows in groups))
    elif not (options.readme or options.plots):
        for rows in groups:
            print_tables(rows, Console())


def _plots(rows: list[dict], folder: Path | None) -> dict[str, Path]:
    if folder is None:
        return {}
    from .plots import write_plots  # matplotlib, which those who only measure need not have

    return write_plots(rows, folder)


def _addresses(plots: dict[str, Path], beside: Path) -> dict[str, str]:
    return {operation: Path(os.path.relpath(path.resolve(), beside)).as_posix() for operation, path in plots.items()}


if __name__ == "__main__":
    main()
