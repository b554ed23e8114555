"""RefCOCO's files as published: a pickle of Python 2 and COCO's JSON."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from finegrain_ops.training.annotations import RefCOCO
from finegrain_ops.training.annotations.refcoco import read_plain_pickle

NAME = "COCO_train2014_000000581857"


def sentence(sent_id: int, text: str) -> dict:
    return {"sent_id": sent_id, "sent": text, "raw": text.upper(), "tokens": text.split()}


def ref(ref_id: int, *sentences: str, ann_id: int = 11, image_id: int = 581857, split: str = "train") -> dict:
    return {
        "ref_id": ref_id,
        "ann_id": ann_id,
        "image_id": image_id,
        "split": split,
        "category_id": 1,
        "file_name": f"{NAME}_{ann_id}.jpg",
        "sent_ids": list(range(len(sentences))),
        "sentences": [sentence(k, text) for k, text in enumerate(sentences)],
    }


def instances() -> dict:
    return {
        "info": {},
        "licenses": [],
        "images": [{"id": 581857, "file_name": f"{NAME}.jpg", "width": 640, "height": 427, "license": 1}],
        "annotations": [
            {"id": 11, "image_id": 581857, "category_id": 1, "bbox": [103.93, 299.99, 134.22, 177.42], "iscrowd": 0},
            {"id": 12, "image_id": 581857, "category_id": 1, "bbox": [0, 0, 10, 20.5], "iscrowd": 0},
            {"id": 13, "image_id": 581857, "category_id": 1, "bbox": [5, 5, 0, 20], "iscrowd": 0},
        ],
        "categories": [{"id": 1, "name": "person", "supercategory": "person"}],
    }


def write(folder: Path, refs, coco: dict | None = None, split_by: str = "unc", protocol: int = 2) -> Path:
    (folder / "instances.json").write_text(json.dumps(coco or instances()), encoding="utf-8")
    (folder / f"refs({split_by}).p").write_bytes(pickle.dumps(refs, protocol=protocol))
    return folder


REFS = [
    ref(0, "the lady with the blue shirt", "lady w back to us"),
    ref(1, "café à gauche", split="testA", ann_id=12),
    ref(2, " ", "corner", ann_id=12),
    ref(3, "a", "b", ann_id=99),
    ref(4, "c", image_id=7),
    ref(5, "flat", ann_id=13),
]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_sentence_of_a_ref_has_its_box(tmp_path, protocol: int) -> None:
    data = RefCOCO(write(tmp_path, REFS, protocol=protocol))
    assert data.splits == ("train", "testA")
    train = list(data.phrases("train"))
    assert [(phrase.phrase_id, phrase.phrase) for phrase in train] == [
        (0, "the lady with the blue shirt"),
        (0, "lady w back to us"),
        (2, "corner"),
    ]
    assert train[0].boxes == ((103.93, 299.99, 103.93 + 134.22, 427.0),)  # clipped below
    assert train[2].boxes == ((0.0, 0.0, 10.0, 20.5),)
    assert train[0].image.path == f"{NAME}.jpg"  # not the ref's, which has the annotation's number at its end
    assert train[0].image.size == (427, 640)
    assert [phrase.phrase for phrase in data.phrases()] == [*(phrase.phrase for phrase in train), "café à gauche"]
    assert data.skipped == {
        "ref: its sentence is empty": 1,
        "ref: its image or annotation is not in instances.json": 3,
        "ref: its box has no area in its image": 1,
    }
    with pytest.raises(ValueError, match="split: expected one of 'train', 'testA', got 'val'"):
        next(data.phrases("val"))


def test_text_of_python_2(tmp_path) -> None:
    """Its str were bytes: S'caf\\xc3\\xa9' in protocol 0."""
    path = tmp_path / "refs.p"
    path.write_bytes(b"(lp0\n(dp1\nS'sent'\np2\nS'caf\\xc3\\xa9 \\xff'\np3\nsS'id'\np4\nI7\nsS'big'\np5\nL9L\nsa.")
    assert read_plain_pickle(path) == [{"sent": "café �", "id": 7, "big": 9}]


def test_other_splits(tmp_path) -> None:
    write(tmp_path, REFS[:1], split_by="umd")
    assert len(list(RefCOCO(tmp_path, "umd").phrases())) == 2
    with pytest.raises(FileNotFoundError, match=r"expected 'refs\(google\).p' in it"):
        RefCOCO(tmp_path, "google")
    with pytest.raises(ValueError, match="split_by: expected one of 'unc', 'umd'"):
        RefCOCO(tmp_path, "../unc")


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_that_would_run_code_is_refused_and_runs_none(tmp_path) -> None:
    trap = tmp_path / "sprung"
    write(tmp_path, [*REFS[:1], Trap(trap)])
    with pytest.raises(ValueError, match=r"refs\(unc\).p: expected a pickled list of plain data, got it refers to "):
        RefCOCO(tmp_path)
    assert not trap.exists()
    pickle.loads(pickle.dumps(Trap(trap)))
    assert trap.exists()  # that is what it would have done


@pytest.mark.parametrize("content", [b"", b"not a pickle", pickle.dumps(REFS)[:-9], pickle.dumps({"a": 1})])
def test_broken_pickles_are_named(tmp_path, content: bytes) -> None:
    write(tmp_path, [])
    (tmp_path / "refs(unc).p").write_bytes(content)
    with pytest.raises(ValueError, match=r"refs\(unc\).p: expected a pickled list"):
        RefCOCO(tmp_path)


BROKEN = {
    "no ann_id": (lambda refs, coco: refs[0].pop("ann_id"), r"refs\(unc\).p, ref 0: expected 'ann_id'"),
    "sentence is text": (
        lambda refs, coco: refs[1].update(sentences=["a"]),
        r"ref 1, sentence 0: expected an object with 'sent', got str 'a'",
    ),
    "no annotations": (lambda refs, coco: coco.pop("annotations"), r"instances.json: expected 'annotations'"),
    "three numbers": (
        lambda refs, coco: coco["annotations"][1].update(bbox=[1, 2, 3]),
        r"instances.json, annotation 1: expected 'bbox' to be \[x, y, width, height\]",
    ),
    "text in a box": (
        lambda refs, coco: coco["annotations"][0].update(bbox=[1, 2, 3, "4"]),
        r"annotation 0: expected 'bbox' to be",
    ),
    "no height": (lambda refs, coco: coco["images"][0].pop("height"), r"instances.json, image 0: expected 'height'"),
}


@pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=BROKEN)
def test_a_file_of_another_form_is_named_with_its_record(tmp_path, change, message: str) -> None:
    refs, coco = pickle.loads(pickle.dumps(REFS)), instances()
    change(refs, coco)
    with pytest.raises(ValueError, match=message):
        RefCOCO(write(tmp_path, refs, coco))
