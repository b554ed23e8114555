"""Images of annotations: opened when a sample is asked for, and seen to be those that the boxes were drawn in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from .annotations.records import AnnotatedImage

ImageSource: TypeAlias = "str | Path | Callable[[AnnotatedImage], Any]"


def open_image(image: AnnotatedImage, source: ImageSource) -> Any:
    """The Pillow image, RGB.

    Args:
        image: what to open.
        source: the folder that image.path is relative to, or a function that opens the image itself.

    Raises:
        ValueError: the image has another size than its annotations say, however its EXIF data turn it: its boxes are
            somewhere else.
    """
    from PIL import Image, ImageOps

    if callable(source):
        opened = source(image)
    else:
        with Image.open(Path(source) / image.path) as file:
            file.load()
            opened = file
    # Sizes were annotated before or after EXIF's turn, of which few of these images have any.
    for turned in (opened, ImageOps.exif_transpose(opened)):
        if turned.size == image.size[::-1]:
            return turned.convert("RGB")
    raise ValueError(
        f"{image.path}: expected {image.size[1]} x {image.size[0]} pixels (width x height), as its annotations say, "
        f"got {opened.size[0]} x {opened.size[1]}"
    )
