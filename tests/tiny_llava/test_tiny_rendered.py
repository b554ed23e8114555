"""The rendered training scenes: what the model will be shown, and when a folder's rendering serves again."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import finegrain_ops
from finegrain_ops.regions import dualfocus_crops
from finegrain_ops.tiny_llava.scenes import CROWDED, PLAIN, Scene, draw_scene, intersection_over_union, seed_of
from finegrain_ops.tiny_llava.training import rendered
from finegrain_ops.tiny_llava.training.packing import pixel_values
from finegrain_ops.tiny_llava.training.rendered import (
    CROPS,
    ELSEWHERE,
    NUM_IMAGES,
    WHOLE,
    RenderedScenes,
    Sample,
    about,
    render_sample,
)


def scene_of(seed: int, sample: Sample) -> tuple[Scene, bool]:
    """Drawn again, and whether it is a crowded one."""
    scene = draw_scene(seed, PLAIN)
    if scene.cards == sample.cards:
        return scene, False
    crowded = draw_scene(seed, CROWDED)
    assert crowded.cards == sample.cards
    return crowded, True


# --- one scene ---


@pytest.mark.parametrize("seed", [seed_of("train", 0), seed_of("train", 1), seed_of("train", 2), seed_of("test", 3)])
def test_images_are_what_inference_makes_of_the_scene(seed: int, processor) -> None:
    """The whole as the processor makes it, and the crops as DualFocus does, with `preprocess`."""
    images, sample = render_sample(seed)
    scene, _ = scene_of(seed, sample)
    assert (images.shape, images.dtype) == ((NUM_IMAGES, 112, 112, 3), np.uint8)
    assert sample.side == scene.image.width
    made = processor.image_processor(images=[scene.image], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixel_values(images[[WHOLE]]), made, atol=1e-5, rtol=0)
    crops = dualfocus_crops(list(sample.crop_boxes), scene.size)
    assert crops.tolist() == [list(crop) for crop in sample.crops]
    made = finegrain_ops.preprocess(scene.image, crops, processor)["pixel_values"]
    torch.testing.assert_close(pixel_values(images[[*CROPS, ELSEWHERE]]), made, atol=1e-5, rtol=0)


def test_crops_show_their_cards(data) -> None:
    """Around a box that is a little off, as a model's is; and what is somewhere else is about as large."""
    overlaps, num_off, num_elsewhere = [], 0, 0
    for sample in data.samples:
        assert len(set(sample.shown)) == 2
        for which, box, crop in zip(sample.shown, sample.crop_boxes, sample.crops):
            card = sample.cards[which].box
            overlaps.append(intersection_over_union(box, card))
            num_off += box != card
            seen = [min(card[k + 2], crop[k + 2]) - max(card[k], crop[k]) for k in (0, 1)]
            assert min(seen) > 0.95 * (card[2] - card[0])
        elsewhere = sample.crop_boxes[-1]
        assert min(elsewhere) >= 0
        assert max(elsewhere) <= sample.side
        assert 0.12 <= (elsewhere[2] - elsewhere[0]) / sample.side <= 0.25
        num_elsewhere += all(intersection_over_union(elsewhere, sample.cards[i].box) < 0.3 for i in sample.shown)
    assert 0.4 < min(overlaps) < 0.75 < max(overlaps)
    assert num_off == 2 * len(data)
    assert num_elsewhere > 0.7 * len(data)


def test_some_scenes_are_crowded(data) -> None:
    """About a fifth, and the others are plain."""
    is_crowded = [scene_of(seed_of("train", i), sample)[1] for i, sample in enumerate(data.samples[:30])]
    assert 0 < sum(is_crowded) < 0.5 * len(is_crowded)


PLACES = st.sampled_from([0.0, 0.03, 0.5, 0.97, 1.0])


@given(st.integers(0, 1000), PLACES, PLACES, st.floats(0.05, 0.4))
@settings(max_examples=60, deadline=None)
def test_boxes_that_are_a_little_off(seed: int, x: float, y: float, size: float) -> None:
    side, size = 500.0, 500 * size
    x0, y0 = x * (side - size), y * (side - size)
    box = about((x0, y0, x0 + size, y0 + size), side, np.random.default_rng(seed))
    assert 0 <= box[0] < box[2] <= side
    assert 0 <= box[1] < box[3] <= side
    edges = (x0, y0, x0 + size, y0 + size)
    for k, (edge, true) in enumerate(zip(box, edges)):
        low, high = (-0.125 - 0.15, 0.125 + 0.05) if k < 2 else (-0.125 - 0.05, 0.125 + 0.15)
        assert true + low * size - 1e-6 <= edge <= true + high * size + 1e-6 or edge in (0.0, side)
    if min(box) > 0 and max(box) < side:
        assert 0.9 * size - 1e-6 <= box[2] - box[0] <= 1.3 * size + 1e-6
        assert box[2] - box[0] == pytest.approx(box[3] - box[1])


# --- in a folder ---


def test_a_fresh_process_renders_the_same_pixels(tmp_path) -> None:
    made = RenderedScenes(tmp_path, "validation", 3, workers=1)
    assert (len(made), made.images.shape, made.images.dtype) == (3, (3, NUM_IMAGES, 112, 112, 3), np.uint8)
    for i in range(3):
        images, sample = render_sample(seed_of("validation", i))
        assert (made.images[i] == images).all()
        assert made.samples[i] == sample
    assert sorted(path.name for path in tmp_path.iterdir()) == ["validation.jsonl", "validation.npy"]


@pytest.fixture
def calls(monkeypatch, rendering_here) -> list[int]:
    """The seeds that are rendered, in this process."""
    seeds: list[int] = []
    monkeypatch.setattr(rendered, "multiprocessing", rendering_here)
    monkeypatch.setattr(rendered, "render_sample", lambda seed: seeds.append(seed) or render_sample(seed))
    return seeds


def test_what_is_there_is_taken(calls, data, scenes_folder) -> None:
    again = RenderedScenes(scenes_folder, "train", len(data), workers=1)
    assert calls == []
    assert again.samples == data.samples
    assert again.samples[5] == render_sample(seed_of("train", 5))[1]
    assert (again.images[5] == render_sample(seed_of("train", 5))[0]).all()


def test_each_split_has_files_of_its_own(calls, tmp_path) -> None:
    for split in ("train", "validation", "train"):
        made, (images, sample) = RenderedScenes(tmp_path, split, 2, workers=1), render_sample(seed_of(split, 1))
        assert made.samples[1] == sample
        assert (made.images[1] == images).all()
    assert calls == [seed_of(split, i) for split in ("train", "validation") for i in range(2)]


@pytest.mark.parametrize("changed", ["count", "source", "no images", "no samples"])
def test_what_does_not_fit_is_rendered_anew(changed: str, calls, tmp_path, monkeypatch) -> None:
    RenderedScenes(tmp_path, "train", 2, workers=1)
    calls.clear()
    count = 3 if changed == "count" else 2
    if changed == "source":
        monkeypatch.setattr(rendered, "_fingerprint", lambda: "of other code")
    elif changed == "no images":
        (tmp_path / "train.npy").unlink()
    elif changed == "no samples":
        (tmp_path / "train.jsonl").unlink()
    made = RenderedScenes(tmp_path, "train", count, workers=1)
    assert calls == [seed_of("train", i) for i in range(count)]
    assert (len(made), len(made.images)) == (count, count)
    assert (made.images[-1] == render_sample(seed_of("train", count - 1))[0]).all()


@pytest.mark.parametrize("name", ["scenes", "drawing", "rendered"])
def test_other_code_has_another_fingerprint(name: str, tmp_path, monkeypatch) -> None:
    before = rendered._fingerprint()
    assert rendered._fingerprint() == before
    module = {"scenes": rendered.scenes, "drawing": rendered.drawing, "rendered": rendered}[name]
    copy = tmp_path / f"{name}.py"
    shutil.copy(module.__file__, copy)
    monkeypatch.setattr(module, "__file__", str(copy))
    assert rendered._fingerprint() == before
    copy.write_text(copy.read_text() + "# changed\n")
    assert rendered._fingerprint() != before


def test_an_unfinished_rendering_is_not_taken(calls, tmp_path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(rendered, "tqdm", lambda results, *_, **__: _stops_after(results, 2))
        with pytest.raises(KeyboardInterrupt):
            RenderedScenes(tmp_path, "train", 4, workers=1)
    calls.clear()
    made = RenderedScenes(tmp_path, "train", 4, workers=1)
    assert calls == [seed_of("train", i) for i in range(4)]
    assert made.images.reshape(4, -1).any(1).all()


def test_an_older_rendering_that_was_half_overwritten_is_not_taken(calls, tmp_path, monkeypatch) -> None:
    """Its samples are of three scenes, as is asked for in the end; its images are not these any more."""
    RenderedScenes(tmp_path, "train", 3, workers=1)
    with monkeypatch.context() as patch:
        patch.setattr(rendered, "tqdm", lambda results, *_, **__: _stops_after(results, 1))
        with pytest.raises(KeyboardInterrupt):
            RenderedScenes(tmp_path, "train", 4, workers=1)
    made = RenderedScenes(tmp_path, "train", 3, workers=1)
    assert len(made.images) == 3
    for i in range(3):
        assert (made.images[i] == render_sample(seed_of("train", i))[0]).all()


def _stops_after(results, count: int):
    for i, result in enumerate(results):
        if i == count:
            raise KeyboardInterrupt
        yield result


def test_the_first_line_says_what_was_rendered(data, scenes_folder) -> None:
    with (scenes_folder / "train.jsonl").open() as lines:
        facts = json.loads(next(lines))
        assert len(list(lines)) == len(data)
    assert facts == {"split": "train", "count": len(data), "source": rendered._fingerprint()}
