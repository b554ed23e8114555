"""DualFocus's ambiguity filter (arXiv 2402.14767, Sec. 3.2): questions that match several objects of their image.

"What is the color of the person's shirt?" cannot be asked of an image with several people. A question is ambiguous here
where it names, in the singular, a category of which its image has several objects: the paper gives no more than the
example. The plural asks about all of them, and Fig. 8 keeps such questions ("the both clocks", "the people"), whose box
is around all.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .annotations.records import BoxedPhrase, BoxedQuestion
from .filters import repeated_mask

__all__ = ["ambiguity_mask", "singular"]

_WORD = re.compile(r"[^\W\d_]+")  # letters of any script: "person's" is "person" and "s"
_IRREGULAR = {
    "people": "person",
    "men": "man",
    "women": "woman",
    "children": "child",
    "feet": "foot",
    "teeth": "tooth",
    "geese": "goose",
    "mice": "mouse",
    "oxen": "ox",
    "leaves": "leaf",
    "loaves": "loaf",
    "knives": "knife",
    "shelves": "shelf",
    "wolves": "wolf",
    "calves": "calf",
    "halves": "half",
    "scarves": "scarf",
    "hooves": "hoof",
    "buses": "bus",
    "lenses": "lens",
    "tomatoes": "tomato",
    "potatoes": "potato",
    "movies": "movie",
    "cookies": "cookie",
}
_ENDINGS = (("ies", "y"), ("sses", "ss"), ("shes", "sh"), ("ches", "ch"), ("xes", "x"), ("zes", "z"))
_NO_PLURALS = ("ss", "us", "is")  # grass, cactus, tennis

_Name = tuple[str, ...]  # words in the singular


def ambiguity_mask(
    questions: Sequence[BoxedQuestion], objects: Mapping[int | str, Sequence[BoxedPhrase]], *, same: float = 0.5
) -> Tensor:
    """(len(questions),) bool, True where a question is kept: it names, in the singular, no category of which its image
    has several objects.

    Args:
        questions: of any images.
        objects: for each image_id its objects; an image without any makes no question ambiguous.
        same: two boxes of a category with an IoU of at least this are the same object.

    Names and questions are compared word by word in the singular, names of several words ("tennis ball") too; where a
    longer name is in the question, the shorter ones in it do not count ("ball").
    """
    are_several = _categories({question.image.image_id for question in questions}, objects, same)
    kept = [not _names_several(question.question, are_several[question.image.image_id]) for question in questions]
    return torch.tensor(kept, dtype=torch.bool)


def singular(word: str) -> str:
    """The singular of an English noun in lower case, by its ending and a few exceptions."""
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if word.endswith("men") and word not in ("specimen", "abdomen"):  # firemen, and women
        return word[:-2] + "an"
    for ending, replacement in _ENDINGS:
        if word.endswith(ending) and len(word) > len(ending) + 1:
            return word[: -len(ending)] + replacement
    if word.endswith("s") and len(word) > 3 and not word.endswith(_NO_PLURALS):
        return word[:-1]
    return word


def _categories(
    image_ids: set[int | str], objects: Mapping[int | str, Sequence[BoxedPhrase]], same: float
) -> dict[int | str, dict[_Name, bool]]:
    """For each image the names of its objects, and whether there are several of that name."""
    categories: dict[_Name, int] = {}
    names, image_of, category_of, boxes = [], [], [], []
    ids = list(image_ids)
    for i, image_id in enumerate(ids):
        for found in objects.get(image_id, ()):
            for name in dict.fromkeys(_name(words) for words in found.names or (found.phrase,)):
                for box in found.boxes:
                    names.append(name)
                    image_of.append(i)
                    category_of.append(categories.setdefault(name, len(categories)))
                    boxes.append(box)
    several: dict[int | str, dict[_Name, bool]] = {image_id: {} for image_id in ids}
    mask = repeated_mask(boxes, image_of, category_of, same=same) if boxes else torch.zeros(0)
    for name, i, is_repeated in zip(names, image_of, mask.tolist()):
        several[ids[i]][name] = is_repeated
    return several


def _names_several(question: str, are_several: Mapping[_Name, bool]) -> bool:
    """Whether the question names, in the singular, one of those that there are several of."""
    words = _words(question)
    singulars = [singular(word) for word in words]
    longest = max(map(len, are_several), default=0)
    start = 0
    while start < len(words):
        for end in range(min(start + longest, len(words)), start, -1):
            is_several = are_several.get(tuple(singulars[start:end]))
            if is_several is not None:
                if is_several and words[end - 1] == singulars[end - 1]:
                    return True
                start = end - 1
                break
        start += 1
    return False


def _name(text: str) -> _Name:
    return tuple(map(singular, _words(text)))


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())
