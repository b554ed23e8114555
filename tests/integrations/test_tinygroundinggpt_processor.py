"""The processor: pixels against Pillow, boxes as text, placeholders and what is refused; saving and loading."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor

pytest.importorskip("hypothesis", reason="hypothesis draws the boxes")
from hypothesis import given, settings
from hypothesis import strategies as st

import finegrain_ops
from finegrain_ops.integrations import tinygroundinggpt
from finegrain_ops.integrations.tinygroundinggpt import TinyGroundingGPTImageProcessor, TinyGroundingGPTProcessor
from tiny_tinygroundinggpt import (
    EOS,
    IMAGE,
    OBJECT,
    PAD,
    SIDE,
    TOKENS_PER_IMAGE,
    make_images,
    make_model,
    make_processor,
    make_tokenizer,
)

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope="module")
def processor():
    return make_processor()


def letterboxed(image: Image.Image, box: tuple[int, int, int, int], side: int = SIDE) -> np.ndarray:
    """(side, side, 3) levels: Pillow's crop, pasted on a square of CLIP's mean colour, and Pillow's resize."""
    crop = image.crop(box)
    square = Image.new("RGB", (max(crop.size),) * 2, (122, 116, 104))
    square.paste(crop, tuple((max(crop.size) - length) // 2 for length in crop.size))
    return np.asarray(square.resize((side, side), Image.Resampling.BICUBIC))


def levels(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    of_255 = (pixels.double().permute(1, 2, 0) * torch.tensor(std) + torch.tensor(mean)) * 255
    assert (of_255 - of_255.round()).abs().max() < 1e-3
    return of_255.round().numpy().astype(np.uint8)


def whole(image: Image.Image) -> tuple[int, int, int, int]:
    return (0, 0, *image.size)


# --- pixels ----------------------------------------------------------------------------------------------------------


def test_images_and_objects_are_pillows_to_the_level(processor) -> None:
    first, second = make_images(2)
    boxes = [[(1, 2, 30, 41), (20, 0, 80, 33)], [(5, 5, 12, 95)]]
    texts = ["<image> <object> <object>", "<object> of <image>"]
    inputs = processor([first, second], texts, object_boxes=boxes, padding=True, return_tensors="pt")
    expected = [
        letterboxed(first, whole(first)),
        letterboxed(first, boxes[0][0]),
        letterboxed(first, boxes[0][1]),
        letterboxed(second, boxes[1][0]),
        letterboxed(second, whole(second)),
    ]
    assert inputs["pixel_values"].shape == inputs["dino_pixel_values"].shape == (5, 3, SIDE, SIDE)
    for clip, dino, image in zip(inputs["pixel_values"], inputs["dino_pixel_values"], expected):
        assert np.array_equal(levels(clip, CLIP_MEAN, CLIP_STD), image)
        assert np.array_equal(levels(dino, IMAGENET_MEAN, IMAGENET_STD), image)


def test_one_call_crops_everything(processor, monkeypatch) -> None:
    module = tinygroundinggpt.image_processing
    calls = []
    monkeypatch.setattr(module, "crop_resize", lambda *a, **kw: calls.append(a) or finegrain_ops.crop_resize(*a, **kw))
    texts = ["<image> <object>", "nothing", "<image> <object><object>"]
    processor(make_images(2), texts, object_boxes=[[(0, 0, 9, 9)], None, [(0, 0, 9, 9), (9, 9, 20, 20)]])
    assert [(len(images), len(boxes)) for images, boxes, _ in calls] == [(2, 5)]


def test_what_an_image_may_be(processor) -> None:
    image = make_images(1)[0]
    array = np.asarray(image)
    expected = processor(image, "<image>")["pixel_values"]
    others = [array, torch.from_numpy(array.copy()).permute(2, 0, 1), [image], [[image]], image.convert("RGBA")]
    for other in others:
        assert torch.equal(processor(other, "<image>", device="cpu")["pixel_values"], expected)
    assert torch.equal(processor.image_processor(image)["pixel_values"], expected)
    assert torch.equal(processor(images=image)["pixel_values"], expected)
    grey = image.convert("L")
    assert torch.equal(
        processor(grey, "<image>")["pixel_values"], processor(grey.convert("RGB"), "<image>").pixel_values
    )


def test_boxes_of_a_text_may_be_a_tensor_and_reach_beyond_the_image(processor) -> None:
    image = make_images(1)[0]  # 80 x 60
    inside = processor(image, "<image><object>", object_boxes=[(40, 30, 80, 60)])
    for boxes in (torch.tensor([[40.0, 30, 90, 99]]), (40, 30, 80, 61), [(40.0, 30.0, 1e6, 1e6)]):
        assert torch.equal(processor(image, "<image><object>", object_boxes=boxes).pixel_values, inside.pixel_values)


# --- text ------------------------------------------------------------------------------------------------------------


def test_placeholders_become_tokens(processor) -> None:
    inputs = processor(
        make_images(2),
        ["<image>a<object>b<loc>", "x<image>"],
        object_boxes=[[(1, 2, 30, 40)], []],
        location_boxes=[[(0, 0, 80, 60)], []],
        padding=True,
        return_tensors="pt",
    )
    spelled = processor.tokenizer("[0.000, 0.125, 1.000, 0.875]")["input_ids"]
    a, b, x = (processor.tokenizer(letter)["input_ids"] for letter in "abx")
    first = [IMAGE] * TOKENS_PER_IMAGE + a + [OBJECT] * TOKENS_PER_IMAGE + b + spelled
    second = x + [IMAGE] * TOKENS_PER_IMAGE
    assert inputs["input_ids"][0].tolist() == first
    assert inputs["input_ids"][1].tolist() == [PAD] * (len(first) - len(second)) + second
    assert inputs["attention_mask"].sum(1).tolist() == [len(first), len(second)]
    assert processor.model_input_names == ["input_ids", "attention_mask", "pixel_values", "dino_pixel_values"]


def test_a_text_about_several_images(processor) -> None:
    """What is in a box belongs to the image named last before it."""
    wide, tall = make_images(2)  # 80 x 60, 50 x 101
    inputs = processor(
        [wide, tall],
        "<loc><image><object><image><object><loc>",
        object_boxes=[(10, 10, 70, 50), (10, 10, 50, 101)],
        location_boxes=[(0, 0, 80, 60), (0, 0, 50, 101)],
    )
    shown = [letterboxed(*pair) for pair in ((wide, (10, 10, 70, 50)), (tall, (10, 10, 50, 101)))]
    for k, image in zip((1, 3), shown):
        assert np.array_equal(levels(inputs["pixel_values"][k], CLIP_MEAN, CLIP_STD), image)
    text = processor.tokenizer.decode(inputs["input_ids"][0]).replace("<image>", "").replace("<object>", "")
    assert text == "[0.000, 0.125, 1.000, 0.875][0.248, 0.000, 0.743, 1.000]"


def test_a_text_without_an_image(processor) -> None:
    inputs = processor(text="abc", return_tensors="pt")
    assert inputs.keys() == {"input_ids", "attention_mask"}
    assert inputs["input_ids"].shape == (1, 3)
    assert isinstance(processor(text=["abc", "d"])["input_ids"], list)


# --- boxes -----------------------------------------------------------------------------------------------------------

sizes = st.tuples(st.integers(1, 2000), st.integers(1, 2000))
unit = st.floats(0, 1)


@given(sizes, unit, unit, unit, unit)
@settings(max_examples=200, deadline=None)
def test_a_box_comes_back_from_its_text(processor, size, x0, y0, x1, y1) -> None:
    height, width = size
    box = (min(x0, x1) * width, min(y0, y1) * height, max(x0, x1) * width, max(y0, y1) * height)
    if not (box[0] < box[2] and box[1] < box[3]):
        with pytest.raises(ValueError, match="box: expected"):
            processor.format_box(box, size)
        return
    text = processor.format_box(box, size)
    ends = [float(edge) for edge in text.strip("[]").split(", ")]
    assert all(0 <= edge <= 1 for edge in ends)
    assert len(text) == len("[0.000, 0.000, 0.000, 0.000]")
    found = processor.post_process_grounding([f"It is at {text}."], [size])[0]
    rounding = 0.5005e-3 * max(size)
    if box[2] - box[0] > 2 * rounding and box[3] - box[1] > 2 * rounding:  # or it may be rounded to nothing
        assert found == [pytest.approx(box, abs=rounding)]


def test_coordinates_are_of_the_padded_square(processor) -> None:
    """A wide image has bars above and below; an odd remainder puts the larger one after it."""
    assert processor.format_box((0, 0, 200, 100), (100, 200)) == "[0.000, 0.250, 1.000, 0.750]"
    assert processor.format_box((0, 0, 5, 10), (10, 5)) == "[0.200, 0.000, 0.700, 1.000]"
    boxes = processor.post_process_grounding(["[0.2, 0, 0.7, 1]", "no box"], [(10, 5), (10, 5)])
    assert boxes == [[(0.0, 0.0, 5.0, 10.0)], []]


# --- chat ------------------------------------------------------------------------------------------------------------


def test_a_chat_is_chatml(processor) -> None:
    image = make_images(1)[0]
    content = [
        {"type": "image", "image": image},
        {"type": "text", "text": "What is "},
        {"type": "object"},
        {"type": "text", "text": " and what is in "},
        {"type": "location"},
    ]
    chat = [{"role": "user", "content": content}, {"role": "assistant", "content": "A cat."}]
    text = processor.apply_chat_template(chat, tokenize=False)
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<image>\nWhat is <object> and what is in <loc><|im_end|>\n"
        "<|im_start|>assistant\nA cat.<|im_end|>\n"
    )
    prompt = processor.apply_chat_template(
        [{"role": "system", "content": "Be brief."}, chat[0]], tokenize=False, add_generation_prompt=True
    )
    assert prompt.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
    assert prompt.endswith("<loc><|im_end|>\n<|im_start|>assistant\n")
    boxes = {"object_boxes": [(1, 2, 30, 40)], "location_boxes": [(1, 2, 30, 40)]}
    inputs = processor(image, text, **boxes)
    assert inputs["input_ids"][0].count(IMAGE) == inputs["input_ids"][0].count(OBJECT) == TOKENS_PER_IMAGE
    assert inputs["input_ids"][0].count(EOS) == 3


def test_a_chat_is_tokenized_with_its_image(processor) -> None:
    image = make_images(1)[0]
    chat = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "?"}]}]
    inputs = processor.apply_chat_template(
        chat, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    text = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    expected = processor(image, text, return_tensors="pt")
    assert inputs.keys() == expected.keys()
    assert all(torch.equal(inputs[name], expected[name]) for name in expected)


# --- saving and loading ----------------------------------------------------------------------------------------------


def test_auto_classes_load_what_was_saved(tmp_path) -> None:
    model, processor = make_model(), make_processor(model_max_length=300)
    processor.image_processor.fill = [1, 2, 3]
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    again = transformers.AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert type(again) is TinyGroundingGPTProcessor
    assert type(again.image_processor) is TinyGroundingGPTImageProcessor
    assert type(transformers.AutoModel.from_pretrained(tmp_path)) is type(model.model)
    assert type(transformers.AutoImageProcessor.from_pretrained(tmp_path)) is TinyGroundingGPTImageProcessor
    assert again.patch_size == processor.patch_size
    assert again.chat_template == processor.chat_template
    assert again.tokenizer.model_max_length == 300
    assert vars(again.image_processor).keys() >= {"fill", "size", "dino_image_std"}
    arguments = {"object_boxes": [(1, 2, 30, 40)], "return_tensors": "pt"}
    before, after = (p(make_images(1), "<image> <object> ?", **arguments) for p in (processor, again))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    with torch.no_grad():
        assert torch.equal(loaded(**after).logits, model(**before).logits)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    generated = [m.generate(**before, max_new_tokens=5, do_sample=False) for m in (model, loaded)]
    assert torch.equal(*generated)


def test_a_chat_template_of_ones_own_is_kept(tmp_path, processor) -> None:
    own = TinyGroundingGPTProcessor(processor.image_processor, processor.tokenizer, patch_size=6, chat_template="hello")
    own.save_pretrained(tmp_path)
    assert transformers.AutoProcessor.from_pretrained(tmp_path).chat_template == "hello"


def test_importing_twice_is_fine() -> None:
    import importlib

    importlib.reload(tinygroundinggpt)


# --- bad input -------------------------------------------------------------------------------------------------------

BAD = {
    "an object without a box": (
        {"text": "<image><object>"},
        r"object_boxes: expected one box for each of the 1 <object> of text, got 0",
    ),
    "a box without an object": (
        {"text": "<image>", "object_boxes": [(0, 0, 9, 9)]},
        "object_boxes: expected one box for each of the 0 <object> of text, got 1",
    ),
    "a location without a box": (
        {"text": ["<image>", "<loc>"], "location_boxes": [[], []]},
        r"location_boxes\[1\]: expected one box for each of the 1 <loc> of text\[1\], got 0",
    ),
    "no image": ({"images": None, "text": "<image>"}, "images: expected one for each of the 1 <image> of text, got 0"),
    "no place for an image": ({"text": "hello"}, "images: expected one for each of the 0 <image> of text, got 1"),
    "an object of a text without an image": (
        {"text": ["<image>", "<object>"], "object_boxes": [[], [(0, 0, 9, 9)]]},
        r"text\[1\]: expected <image> in it",
    ),
    "a box of no area": (
        {"text": "<image><object>", "object_boxes": [(5, 5, 5, 9)]},
        r"object_boxes\[0\]: expected finite x0 < x1",
    ),
    "a location of no area": (
        {"text": ["<image><loc><loc>"], "location_boxes": [[(0, 0, 9, 9), (5, 5, 4, 9)]]},
        r"location_boxes\[0\]\[1\]: expected finite x0 < x1",
    ),
    "a box outside of the image": (
        {"text": "<image><object>", "object_boxes": [(80, 0, 90, 9)]},
        r"object_boxes\[0\]: expected a box that overlaps the image of 80 x 60 pixels",
    ),
    "boxes of another number of texts": (
        {"text": ["<image><object>"], "object_boxes": [[(0, 0, 9, 9)], []]},
        "object_boxes: expected a list of boxes for each of the 1 texts",
    ),
    "boxes that are none": (
        {"text": "<image><object>", "object_boxes": "0 0 9 9"},
        "object_boxes: expected a list of",
    ),
    "no text": ({"object_boxes": [(0, 0, 9, 9)]}, "text: expected a text or a list of texts, got None"),
    "truncation": (
        {"text": "<image> hello", "truncation": True, "max_length": 40},
        "text: expected 64 tokens for its 1 images and objects, got 40; without truncation",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_what_does_not_fit_together(processor, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        processor(**{"images": make_images(1), **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": ["cat.png"]}, r"images\[0\]: expected a PIL image"),
        ({"images": np.zeros((9, 9, 3))}, "images: expected a PIL image, a uint8 tensor"),
        ({"text": ["<image>", 3]}, "text: expected a text or a list of texts"),
        ({"videos": [1]}, "videos: TinyGroundingGPT takes none"),
    ],
)
def test_what_is_of_another_type(processor, arguments: dict, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        processor(**{"images": make_images(1), "text": "<image>", **arguments})


def test_a_context_longer_than_the_tokenizer_allows() -> None:
    processor = make_processor(model_max_length=TOKENS_PER_IMAGE + 3)
    texts = ["abcd", "<image>abc"]
    assert len(processor(make_images(1), texts, padding=True)["input_ids"][0]) == TOKENS_PER_IMAGE + 3
    message = r"text\[1\]: expected at most 67 tokens \(tokenizer.model_max_length\), got 68, of which 64 stand for"
    with pytest.raises(ValueError, match=message):
        processor(make_images(1), ["a", "<image>abcd"], padding=True)  # padding does not count


def test_processors_that_do_not_fit(processor) -> None:
    backend = make_tokenizer().backend_tokenizer
    with pytest.raises(ValueError, match="patch_size: expected a divisor of the image's 48 pixels, got 7"):
        TinyGroundingGPTProcessor(processor.image_processor, make_tokenizer(), patch_size=7)
    with pytest.raises(ValueError, match=r'size: expected {"height": S, "width": S}, a square'):
        TinyGroundingGPTImageProcessor(size={"height": 336, "width": 224})
    from tokenizers import Tokenizer, models

    bare = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(ValueError, match="tokenizer: expected one with the tokens <image> and <object>"):
        TinyGroundingGPTProcessor(processor.image_processor, bare, patch_size=6)
    assert backend.token_to_id("<image>") == IMAGE


def test_texts_and_sizes_of_different_numbers(processor) -> None:
    with pytest.raises(ValueError, match="texts: expected a list with one text for each of the 2 image_sizes"):
        processor.post_process_grounding(["[0, 0, 1, 1]"], [(4, 4), (4, 4)])
    with pytest.raises(ValueError, match="texts: expected a list"):
        processor.post_process_grounding("[0, 0, 1, 1]", [(4, 4)])
