"""`python -m finegrain_ops demo`: its arguments, and which pages they ask for.

cards.py       a rendered scene and the small model: plain, CoF's and DualFocus's answers beside the truth
picture.py     the same of a picture and a checkpoint of one's own
photograph.py  a photograph, and attention moved to a region of it
"""

from __future__ import annotations

import argparse
from pathlib import Path

from .usage import UsageError, check_options

PAGES = ("cards", "photograph")
_OF_CARDS = ("scene", "question", "box", "model")  # without --page, these options mean the cards
_SETUP_HINT = "the demo needs the packages of `pip install finegrain-ops[demo]`"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--page",
        choices=PAGES,
        help="default: both; the cards alone where --scene, --question, --box or --model is given",
    )
    parser.add_argument("--scene", type=int, metavar="N", help="which scene of cards, from 0 (default 2)")
    parser.add_argument("--question", help="one question in place of the page's own")
    parser.add_argument("--image", type=Path, help="a picture of your own; with --model and --question")
    parser.add_argument(
        "--model",
        help="with --image or --page photograph: a folder or hub name of a LLaVA-1.5 checkpoint; of cards: a folder "
        "with a checkpoint of the small model (default: the one that comes with the package)",
    )
    parser.add_argument(
        "--box",
        type=float,
        nargs=4,
        metavar=("X0", "Y0", "X1", "Y1"),
        help="a region in pixels of the image, in place of the one that the model names",
    )
    parser.add_argument(
        "--preset", help="whose lambda and alpha CoF takes from the paper (default llava-1.5-7b, also llava-1.5-13b)"
    )
    parser.add_argument(
        "--weight",
        type=float,
        help="lambda, which multiplies the region's attention (default: the preset's; of the photograph 4.5)",
    )
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="of an answer (default 32; about cards 8)")
    parser.add_argument("--device", help="default: cuda where there is one, otherwise cpu")
    parser.add_argument(
        "--output", type=Path, help="where the picture goes (default demo.png, of the photograph demo-photograph.png)"
    )
    parser.set_defaults(parser=parser)


def run(options: argparse.Namespace) -> int:
    """Returns the exit status; wrong arguments end with argparse's usage message."""
    try:
        import matplotlib  # noqa: F401
        import skimage  # noqa: F401
        import tqdm  # noqa: F401
        import transformers
        from PIL import Image  # noqa: F401
    except ModuleNotFoundError as missing:
        options.parser.error(f"{missing.name} is not installed; {_SETUP_HINT}")

    transformers.logging.set_verbosity_error()
    from . import cards, photograph, picture

    show = {"cards": cards.show, "photograph": photograph.show, "picture": picture.show}
    try:
        pages = _pages(options)
        outputs = _outputs(options.output, pages)
        check_options(options, outputs.values())
        for page, output in outputs.items():
            show[page](options, output)
    except UsageError as error:
        options.parser.error(str(error))
    return 0


def _pages(options: argparse.Namespace) -> tuple[str, ...]:
    if options.image is not None:
        if options.page is not None or options.scene is not None:
            raise UsageError("--image: expected neither --page nor --scene beside it, which choose other pictures")
        return ("picture",)
    if options.page is None:
        return ("cards",) if any(getattr(options, name) is not None for name in _OF_CARDS) else PAGES
    if options.page != "cards" and options.scene is not None:
        raise UsageError("--scene: expected --page cards, or no --page, since the other page shows no scene")
    return (options.page,)


def _outputs(output: Path | None, pages: tuple[str, ...]) -> dict[str, Path]:
    """Where the picture of each page goes."""
    first = Path("demo.png") if output is None else output
    second = first.with_name(f"{first.stem}-photograph{first.suffix}")
    if pages == ("photograph",):
        return {"photograph": second if output is None else output}
    return dict(zip(pages, (first, second)))
