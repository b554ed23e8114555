"""The annotations that DualFocus and TinyGroundingGPT were trained on, from their files as published.

One reader per data set (visual_genome.py, refcoco.py, flickr30k_entities.py), all of which give the records of
records.py. json_records.py reads JSON files that are too large to be held.
"""

from __future__ import annotations

from .flickr30k_entities import Flickr30kEntities
from .records import AnnotatedImage, BoxedCaption, BoxedPhrase, BoxedQuestion
from .refcoco import RefCOCO
from .visual_genome import VisualGenome

__all__ = [
    "AnnotatedImage",
    "BoxedCaption",
    "BoxedPhrase",
    "BoxedQuestion",
    "Flickr30kEntities",
    "RefCOCO",
    "VisualGenome",
]
