"""How a model writes boxes: what the numbers mean and what is around them; reading, writing, and the grammar of all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..boxes import Box
from ..families import ImageGrid
from ..integrations.family import family_of
from .arguments import one_of
from .box_grammar import BoxFormat, BoxGrammar, format_of
from .grounding import BOX_CONVENTIONS, as_fractions, first_box


@dataclass(frozen=True)
class BoxStyle:
    """`grids` below are those of the image, the whole of it first (`grounding.image_grids`); only a convention that
    `needs_grids` looks at them.

    Attributes:
        convention: of `boxes.parse_boxes`, or "unit_view".
    """

    convention: str
    format: BoxFormat

    @classmethod
    def of_cof(cls, model_type: str, processor: Any, convention: str = "auto") -> BoxStyle:
        """ "auto" is what the family's released checkpoints write."""
        return cls._of(model_type, convention, family_of(model_type).box_convention(processor))

    @classmethod
    def of_dualfocus(cls, model_type: str, processor: Any, convention: str = "auto") -> BoxStyle:
        """ "auto" is 0..1 of the original image for LLaVAs, as the paper trains them, and otherwise the family's."""
        own = "unit" if model_type.startswith("llava") else family_of(model_type).box_convention(processor)
        return cls._of(model_type, convention, own)

    @classmethod
    def _of(cls, model_type: str, convention: str, auto: str) -> BoxStyle:
        convention = one_of(convention, BOX_CONVENTIONS, "box_convention")
        convention = auto if convention == "auto" else convention
        return cls(convention, format_of(model_type, convention))

    @property
    def needs_grids(self) -> bool:
        return self.convention in ("pixel", "unit_view")

    def grammar(self, image_size: tuple[int, int], grids: Sequence[ImageGrid]) -> BoxGrammar:
        """Of all boxes that lie in the image, at least in part."""
        height, width = image_size
        image = as_fractions((0.0, 0.0, float(width), float(height)), image_size, self.convention, grids)
        return BoxGrammar.of_image(self.format, self.convention, grids).covering(image)

    def text(self, box: Box, image_size: tuple[int, int], grids: Sequence[ImageGrid]) -> str:
        """A box in pixels of the original image as the model writes it, rounded, with some area."""
        numbers = self.grammar(image_size, grids).numbers_of(as_fractions(box, image_size, self.convention, grids))
        return self.format.text(numbers)

    def read(self, text: str, image_size: tuple[int, int], grids: Sequence[ImageGrid]) -> Box | None:
        """The first box of a text, in pixels of the original image."""
        return first_box(text, image_size, self.convention, grids)
