"""Visual Genome's files as published, in both generations of their keys, and broken ones."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finegrain_ops.training.annotations import VisualGenome, json_records
from finegrain_ops.training.annotations.json_records import JsonRecords

URL = "https://cs.stanford.edu/people/rak248/"
IMAGES = [
    {"image_id": 1, "url": f"{URL}VG_100K_2/1.jpg", "width": 800, "height": 600, "coco_id": None, "flickr_id": None},
    {"image_id": 2, "url": f"{URL}VG_100K/2.jpg", "width": 300, "height": 200, "coco_id": 5, "flickr_id": 6},
]
CLOCK = {"object_id": 58, "x": 421, "y": 91, "w": 79, "h": 339, "names": ["clock"], "synsets": ["clock.n.01"]}
STREET = {"object_id": 59, "x": 0, "y": 400, "w": 900, "h": 100, "names": ["street", "road"], "synsets": []}
LOST = {"object_id": 60, "x": 10, "y": -50, "w": 20, "h": 50, "names": ["bird"], "synsets": []}
NAMELESS = {"object_id": 61, "x": 10, "y": 5, "w": 20, "h": 50, "names": [" "], "synsets": []}


def qa(qa_id: int, question: str = "What color is the clock?", answer: str = "Green.", image_id: int = 1, **objects):
    return {"qa_id": qa_id, "image_id": image_id, "question": question, "answer": answer, **objects}


@pytest.fixture
def files() -> dict:
    region = {"region_id": 1382, "image_id": 1, "phrase": "the clock is green", "x": 421, "y": 57, "width": 82}
    outside = {"region_id": 1383, "image_id": 1, "phrase": "the moon", "x": 800, "y": 0, "width": 5, "height": 5}
    return {
        "image_data": IMAGES,
        "question_answers": [
            {
                "id": 1,
                "qas": [
                    qa(10, a_objects=[], q_objects=[]),
                    qa(11, "Where is the clock?", "On the street.", q_objects=[CLOCK], a_objects=[STREET]),
                    qa(12, "Warum läuft die Uhr?", "Ōkii 🕰.", q_objects=[STREET], a_objects=[]),
                    qa(13, "Where is the bird?", "Above.", q_objects=[LOST], a_objects=[]),
                    qa(14, "  ", "Above."),
                    qa(15, "Why?", ""),
                ],
            },
            {"id": 3, "qas": [qa(16, image_id=3), qa(17, image_id=3)]},
            {"id": 2, "qas": []},
        ],
        "qa_to_region_mapping": {"10": 1382, "12": 1383},
        "region_descriptions": [{"id": 1, "regions": [{**region, "height": 139}, outside]}],
        "objects": [{"image_id": 1, "objects": [CLOCK, STREET, LOST, NAMELESS], "image_url": ""}],
    }


def write(folder: Path, files: dict, **json_options) -> Path:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content, **json_options), encoding="utf-8")
    return folder


def test_a_question_takes_the_box_of_its_region_or_of_its_objects(tmp_path, files) -> None:
    genome = VisualGenome(write(tmp_path, files))
    questions = list(genome.questions())
    assert [question.question_id for question in questions] == [10, 11, 12]
    region, objects, clipped = questions
    assert (region.question, region.answer) == ("What color is the clock?", "Green.")
    assert region.boxes == ((421, 57, 503, 196),)
    assert objects.boxes == ((421, 91, 500, 430), (0, 400, 800, 500))  # what is outside of the image is cut off
    assert objects.box == (0, 91, 800, 500)
    assert clipped.boxes == ((0, 400, 800, 500),)  # its region is outside of the image, and its objects are next
    assert clipped.answer == "Ōkii 🕰."
    assert region.image.path == "VG_100K_2/1.jpg"
    assert region.image.size == (600, 800)
    assert genome.skipped == {
        "question: it or its answer is empty": 2,
        "question: it has no box in its image": 1,
        "question: its image is not in image_data.json": 2,
        "regions: its box has no area in its image": 1,
    }


def test_the_caller_says_where_boxes_come_from(tmp_path, files) -> None:
    genome = VisualGenome(write(tmp_path, files))
    assert [question.question_id for question in genome.questions(["region"])] == [10]
    assert [question.question_id for question in genome.questions(["objects"])] == [11, 12]
    assert [(q.question_id, q.boxes) for q in genome.questions([])] == [(10, ()), (11, ()), (12, ()), (13, ())]
    assert next(genome.questions([])).box is None
    files["question_answers"][0]["qas"][0]["q_objects"] = [LOST, CLOCK]
    genome = VisualGenome(write(tmp_path, files))
    assert next(genome.questions(["objects", "region"])).boxes == ((421, 91, 500, 430),)
    with pytest.raises(ValueError, match="boxes_from: expected some of 'region', 'objects', got 'regions'"):
        next(genome.questions(["regions"]))


def test_the_keys_of_the_first_release(tmp_path) -> None:
    entity = {"entity_name": "Clock", "entity_idx_start": 18, "entity_idx_end": 23, "synset_name": "clock.n.01"}
    files = {
        "image_data": [{"id": 1, "url": f"{URL}VG_100K_2/1.jpg", "width": 800, "height": 600}],
        "question_answers": [{"image_id": 1, "qas": [{**qa(10), "question_objects": [entity], "answer_objects": []}]}],
        "region_descriptions": [
            {"image_id": 1, "regions": [{"id": 7, "phrase": "a", "x": 1, "y": 2, "width": 3, "height": 4}]}
        ],
        "objects": [
            {
                "id": 1,
                "objects": [
                    {"id": 58, "x": 421, "y": 91, "width": 79, "height": 339, "name": "clock"},
                    {"id": 59, "x": 1, "y": 1, "width": 2, "height": 2, "name": "clocks"},
                ],
            }
        ],
    }
    genome = VisualGenome(write(tmp_path, files))
    assert [question.boxes for question in genome.questions(["objects"])] == [((421, 91, 500, 430),)]
    assert [(region.phrase_id, region.boxes) for region in genome.regions()] == [(7, ((1, 2, 4, 6),))]
    files["question_answers"][0]["qas"][0] = {**qa(10), "question_synsets": [{"entity_name": "clocks"}]}
    genome = VisualGenome(write(tmp_path, files))
    assert next(genome.questions(["objects"])).boxes == ((1, 1, 3, 3),)


def test_regions_and_objects(tmp_path, files) -> None:
    genome = VisualGenome(write(tmp_path, files))
    assert [(region.phrase, region.boxes) for region in genome.regions()] == [
        ("the clock is green", ((421, 57, 503, 196),))
    ]
    assert [(found.phrase, found.names, found.phrase_id) for found in genome.objects()] == [
        ("clock", ("clock",), 58),
        ("street", ("street", "road"), 59),
    ]
    assert genome.objects_of(2) == []
    assert genome.skipped == {
        "regions: its box has no area in its image": 1,
        "objects: its box has no area in its image": 1,
        "objects: its phrase is empty": 1,
    }


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((-10, -20, 30, 40), (0, 0, 20, 20)),
        ((790, 590, 30, 40), (790, 590, 800, 600)),
        ((-5, -5, 900, 900), (0, 0, 800, 600)),
        ((0, 0, 800, 600), (0, 0, 800, 600)),
        ((5.5, 6.25, 1, 1), (5.5, 6.25, 6.5, 7.25)),
    ],
)
def test_boxes_are_clipped_to_their_image(tmp_path, files, box, expected) -> None:
    sides = dict(zip(("x", "y", "width", "height"), box))
    write(tmp_path, changed(files, "region_descriptions", lambda r: r[0]["regions"][0].update(sides)))
    assert [region.boxes for region in VisualGenome(tmp_path).regions()] == [(expected,)]


def changed(files: dict, name: str, change) -> dict:
    copy = json.loads(json.dumps(files))
    change(copy[name])
    return copy


BROKEN = {
    "no size": ("image_data", lambda r: r[1].pop("width"), "element 1: expected 'width', got only 'image_id', 'url'"),
    "size of 0": ("image_data", lambda r: r[0].update(width=0), "element 0: expected a positive height and width"),
    "id is text": ("image_data", lambda r: r[0].update(image_id="1"), "expected 'image_id' to be int, got str '1'"),
    "no qas": ("question_answers", lambda r: r[0].pop("qas"), "element 0: expected 'qas', got only 'id'"),
    "answer is a number": (
        "question_answers",
        lambda r: r[0]["qas"][1].update(answer=3),
        "element 0, question 1: expected 'answer' to be str, got int 3",
    ),
    "question is a list": (
        "question_answers",
        lambda r: r[0]["qas"].insert(0, []),
        "question 0: expected an object with 'qa_id' or 'id', got list",
    ),
    "no id": ("region_descriptions", lambda r: r[0].pop("id"), "element 0: expected 'image_id' or 'id', got only"),
    "x is text": (
        "region_descriptions",
        lambda r: r[0]["regions"][0].update(x="421"),
        "element 0, regions 0: expected 'x' to be a number, got str '421'",
    ),
    "object without height": (
        "question_answers",
        lambda r: r[0]["qas"][1]["q_objects"][0].pop("h"),
        "question 1, q_objects: expected 'h' or 'height'",
    ),
    "region is text": ("qa_to_region_mapping", lambda r: r.update({"10": "x"}), "expected whole numbers, ids of"),
}


@pytest.mark.parametrize(("name", "change", "message"), BROKEN.values(), ids=BROKEN)
def test_a_file_of_another_form_is_named_with_its_record(tmp_path, files, name: str, change, message: str) -> None:
    write(tmp_path, changed(files, name, change))
    with pytest.raises(ValueError, match=f"{name}.json") as error:
        list(VisualGenome(tmp_path).questions())
    assert message in str(error.value)


def test_names_must_be_text(tmp_path, files) -> None:
    write(tmp_path, changed(files, "objects", lambda r: r[0]["objects"][1].update(names=[3])))
    with pytest.raises(ValueError, match=r"objects.json, element 0, objects 1: expected names to be a list of str"):
        list(VisualGenome(tmp_path).objects())


def test_numbers_that_are_none_are_skipped(tmp_path, files) -> None:
    """Python writes NaN into JSON, and reads it."""
    write(tmp_path, changed(files, "region_descriptions", lambda r: r[0]["regions"][0].update(x=float("nan"))))
    genome = VisualGenome(tmp_path)
    assert list(genome.regions()) == []
    assert genome.skipped["regions: its box has no area in its image"] == 2


def test_a_missing_file_is_missed_when_it_is_needed(tmp_path, files) -> None:
    del files["objects"], files["qa_to_region_mapping"]
    genome = VisualGenome(write(tmp_path, files))
    assert [question.question_id for question in genome.questions(["objects"])] == [11, 12]
    with pytest.raises(FileNotFoundError, match=r"expected 'qa_to_region_mapping.json' in it"):
        next(genome.questions())
    with pytest.raises(FileNotFoundError, match=r"'objects.json' or 'objects_v1_2.json'"):
        genome.objects_of(1)


TEXTS = {
    "an object": ('{"id": 1}', r"expected a JSON list, with an element for each image at byte 0, got '\{"),
    "nothing": ("", r"expected a JSON list, with an element for each image at byte 0, got ''"),
    "cut short": ('[{"id": 1}, {"id": 2, "ä": ', r"expected JSON \(.*\) at byte 12"),
    "no end": ('[{"id": 1}', "expected a comma or the end of the list at byte 10, got ''"),
    "no comma": ('[{"id": 1} {"id": 2}]', "expected a comma or the end of the list at byte 11"),
    "numbers": ("[1, 2]", "element 0: expected an object with 'id', got int 1"),
    "comma at the end": ('[{"id": 1},]', "expected JSON"),
}


@pytest.mark.parametrize(("text", "message"), TEXTS.values(), ids=TEXTS)
def test_files_that_are_no_list_of_records(tmp_path, text: str, message: str) -> None:
    path = tmp_path / "objects.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"objects\.json") as error:
        JsonRecords(path, ["id"])
    assert error.match(message)


def test_a_file_that_is_not_utf_8_is_named(tmp_path) -> None:
    path = tmp_path / "objects.json"
    path.write_bytes(b'[{"id": 1, "name": "\xff"}]')
    with pytest.raises(ValueError, match=r"objects.json: expected UTF-8"):
        JsonRecords(path, ["id"])


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
elements = st.lists(st.dictionaries(st.text(), values, max_size=3), max_size=6)


@given(elements, st.sampled_from([1, 2, 7, 64]), st.sampled_from([None, 1]), st.booleans(), st.booleans())
@settings(deadline=None, max_examples=150)
def test_any_list_is_read_as_json_reads_it(
    tmp_path_factory, records, chunk: int, indent, ascii_only: bool, dos: bool
) -> None:
    """In pieces of any size, with characters of any number of bytes; an image may have several elements."""
    records = [{**record, "id": i % 3} for i, record in enumerate(records)]
    path = tmp_path_factory.mktemp("json") / "records.json"
    text = json.dumps(records, indent=indent, ensure_ascii=ascii_only) + "\n"
    path.write_bytes((text.replace("\n", "\r\n") if dos else text).encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_records, "_CHUNK", chunk)
        read = pickle.loads(pickle.dumps(JsonRecords(path, ["id"])))  # as a DataLoader hands it to its workers
    assert list(read) == list(dict.fromkeys(record["id"] for record in records))
    for image_id in range(3):
        expected = [(i, record) for i, record in enumerate(records) if record["id"] == image_id]
        assert read.of_image(image_id) == [(f"{path}, element {i}", record) for i, record in expected]
        assert (image_id in read) == bool(expected)
