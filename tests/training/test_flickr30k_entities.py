"""Flickr30k Entities' files as published."""

from __future__ import annotations

from pathlib import Path

import pytest

from finegrain_ops.training.annotations import Flickr30kEntities

SENTENCES = """\
[/EN#1/people Two young guys] with [/EN#2/bodyparts shaggy hair] look at [/EN#3/bodyparts their hands] in [/EN#8/scene the yard] .
[/EN#6/people A man] in [/EN#7/clothing a blue shirt] standing in [/EN#9/scene a garden] near [/EN#0/notvisual each other]
[/EN#1/bodyparts/people Zwei Männer] .

No entity ( at [all] ) .
"""  # noqa: E501
BOX = "<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox>"
ANNOTATIONS = f"""\
<annotation>
  <filename>1000092795.jpg</filename>
  <size><width>333</width><height>500</height><depth>3</depth></size>
  <object><name>1</name>{BOX.format(159, 125, 219, 335)}</object>
  <object><name>1</name><name>6</name>{BOX.format(1, 1, 333, 500)}</object>
  <object><name>7</name>{BOX.format(20, 20, 20, 20)}</object>
  <object><name>2</name>{BOX.format(40, 20, 30, 20)}</object>
  <object><name>8</name><scene>1</scene><nobndbox>1</nobndbox></object>
  <object><name>3</name><scene>0</scene><nobndbox>1</nobndbox></object>
  <object><name>9</name><scene>1</scene><nobndbox>0</nobndbox>{BOX.format(1, 400, 333, 500)}</object>
</annotation>
"""


def write(folder: Path, sentences: str = SENTENCES, annotations: str = ANNOTATIONS, name: str = "1000092795") -> Path:
    for kind, ending, text in (("Sentences", "txt", sentences), ("Annotations", "xml", annotations)):
        (folder / kind).mkdir(exist_ok=True)
        (folder / kind / f"{name}.{ending}").write_text(text, encoding="utf-8")
    return folder


def test_captions_have_phrases_with_boxes(tmp_path) -> None:
    data = Flickr30kEntities(write(tmp_path))
    captions = list(data.captions())
    assert [caption.text for caption in captions] == [
        "Two young guys with shaggy hair look at their hands in the yard .",
        "A man in a blue shirt standing in a garden near each other",
        "Zwei Männer .",
        "No entity ( at [all] ) .",
    ]
    for caption in captions:
        assert [caption.text[start:end] for start, end in caption.spans] == [p.phrase for p in caption.phrases]
    assert [[phrase.phrase for phrase in caption.phrases] for caption in captions] == [
        ["Two young guys"],
        ["A man", "a blue shirt", "a garden"],
        ["Zwei Männer"],
        [],
    ]
    guys = captions[0].phrases[0]
    assert guys.boxes == ((158, 124, 219, 335), (0, 0, 333, 500))  # 1 to 333 is the whole of 333 columns
    assert captions[1].phrases[0].boxes == ((0, 0, 333, 500),)
    assert captions[1].phrases[1].boxes == ((19, 19, 20, 20),)  # one pixel
    assert (guys.phrase_id, guys.image.image_id, guys.image.path, guys.image.size) == (
        "1",
        "1000092795",
        "1000092795.jpg",
        (500, 333),
    )
    assert data.skipped == {"box: it has no area in its image": 1, "phrase: it has no box": 4}


def test_chains_about_the_scene_and_without_boxes(tmp_path) -> None:
    entities = Flickr30kEntities(write(tmp_path)).entities("1000092795")
    assert entities.scenes == {"8", "9"}
    assert entities.without_box == {"3", "8"}
    assert sorted(entities.boxes) == ["1", "6", "7", "9"]


def test_a_split_is_the_images_in_its_list(tmp_path) -> None:
    for name in ("2", "10", "30"):
        write(tmp_path, name=name)
    (tmp_path / "val.txt").write_text("30\n2\n")
    data = Flickr30kEntities(tmp_path)
    assert list(dict.fromkeys(caption.image.image_id for caption in data.captions("val"))) == ["30", "2"]
    assert list(dict.fromkeys(caption.image.image_id for caption in data.captions())) == ["10", "2", "30"]
    assert [phrase.phrase for phrase in data.phrases("val")][:2] == ["Two young guys", "A man"]
    with pytest.raises(FileNotFoundError, match=r"test.txt"):
        list(data.captions("test"))


def changed(old: str, new: str, text: str = ANNOTATIONS) -> str:
    assert old in text
    return text.replace(old, new, 1)


BROKEN = {
    "no XML": (SENTENCES, "<annotation>", r"1000092795.xml: expected XML, got no element found"),
    "no size": (SENTENCES, changed("<width>333</width>", ""), r"xml, size/width: expected a whole number, got ''"),
    "no corner": (SENTENCES, changed("<ymax>335</ymax>", ""), r"xml, object 0, ymax: expected a whole number, got ''"),
    "half a pixel": (SENTENCES, changed("159", "159.5"), r"xml, object 0, xmin: expected a whole number, got '159.5'"),
    "no name": (SENTENCES, changed("<name>7</name>", ""), r"xml, object 2: expected the name of a chain of entities"),
    "no end": (
        changed("a blue shirt]", "a blue shirt", SENTENCES),
        ANNOTATIONS,
        r"1000092795.txt, line 2: expected entities as .*, got ' in \[/EN#7/clothing a blue",
    ),
    "no type": (changed("#1/people ", "#1 ", SENTENCES), ANNOTATIONS, r"1000092795.txt, line 1: expected entities as"),
}


@pytest.mark.parametrize(("sentences", "annotations", "message"), BROKEN.values(), ids=BROKEN)
def test_a_file_of_another_form_is_named_with_its_place(tmp_path, sentences, annotations, message: str) -> None:
    data = Flickr30kEntities(write(tmp_path, sentences, annotations))
    with pytest.raises(ValueError, match=message):
        list(data.captions())
