"""Command line: `python -m finegrain_ops info | demo`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m finegrain_ops", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, devices, and for every backend whether it can run here and why not")
    demo_parser = commands.add_parser(
        "demo", help="a small LLaVA answers plainly, through CoF and through DualFocus; attention moves on a photograph"
    )

    from . import demo

    demo.add_arguments(demo_parser)
    options = parser.parse_args(arguments)
    if options.command == "info":
        from . import info

        info.show()
        return 0
    return demo.run(options)


if __name__ == "__main__":
    sys.exit(main())
