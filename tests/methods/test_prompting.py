"""Questions as prompts, and prompts and images as batches."""

from __future__ import annotations

import types

import pytest
import torch
import transformers
from PIL import Image

from finegrain_ops.methods.prompting import Prompter, _ComputedOnce, open_images
from image_processor_cases import blip
from talking_llava import BOS, PAD, SIDE, make_images, make_model, make_processor, make_tokenizer

CHAT = (
    "{% for message in messages %}[{{ message['role'] }}]{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


TEMPLATES = {
    "the family's own": (None, None, "USER: <image>\n{x} is? ASSISTANT:"),
    "chat template": (CHAT, None, "[user]<image>{x} is?[assistant]"),
    "text": (CHAT, "{image} Q: {question} A:", "<image> Q: {x} is? A:"),
    "function": (None, lambda question: f"<image>{question.upper()}", "<image>{X} IS?"),
}


@pytest.mark.parametrize(("chat", "template", "expected"), TEMPLATES.values(), ids=TEMPLATES)
def test_how_a_question_becomes_a_prompt(model, chat, template, expected: str) -> None:
    """Braces in a question are only braces."""
    assert Prompter(model, make_processor(chat), template).texts([None], ["{x} is?"]) == [expected]


FOLLOW_UPS = {
    "the family's own": (None, None, "</s>USER: <image>\n{x} is? ASSISTANT:"),
    "chat template": (CHAT, None, "[user]<image>{x} is?[assistant]"),
    "text": (CHAT, "<s>{image} Q: {question} A:", "</s><image> Q: {x} is? A:"),
    "function": (None, lambda question: f"<image>{question.upper()}", "</s><image>{X} IS?"),
}


@pytest.mark.parametrize(("chat", "template", "expected"), FOLLOW_UPS.values(), ids=FOLLOW_UPS)
def test_what_the_chat_writes_between_two_answers(model, chat, template, expected: str) -> None:
    assert Prompter(model, make_processor(chat), template).follow_up("{x} is?") == expected


def test_a_chat_template_that_changes_answers_has_no_follow_up(model) -> None:
    silent = CHAT.replace("{{ part['text'] }}", "{% if message['role'] == 'user' %}{{ part['text'] }}{% endif %}")
    with pytest.raises(ValueError, match="processor: expected a chat_template that writes the assistant's turns"):
        Prompter(model, make_processor(silent)).follow_up("?")


def test_a_follow_up_is_encoded_with_pixels_made_elsewhere(model, processor) -> None:
    """Alone it begins where the answer before it ended: no beginning-of-sequence token."""
    prompter, images = Prompter(model, processor), make_images(2)
    texts = [prompter.follow_up(question) for question in ("Which?", "And why not?")]
    pixels = torch.randn(2, 3, SIDE, SIDE)
    inputs = prompter.encode_follow_ups(texts, images, transformers.BatchFeature({"pixel_values": pixels}))
    assert torch.equal(inputs["pixel_values"], pixels)
    rows = [row[mask.bool()] for row, mask in zip(inputs["input_ids"], inputs["attention_mask"])]
    expected = [text.replace("<image>", "<image>" * 64) for text in texts]
    assert [processor.tokenizer.decode(row) for row in rows] == expected
    assert all(row[0] == 2 for row in rows)  # </s>, and no <s> before it


def test_a_batch_is_padded_on_the_left_and_each_row_is_as_alone(model, processor) -> None:
    prompter, images = Prompter(model, processor), make_images(3)
    texts = prompter.texts(images, ["What?", "And what is this?", "Where is it?"])
    (batch,) = prompter.encode(images, texts)
    assert processor.tokenizer.padding_side == "right"  # the caller's tokenizer is as it was
    for i in range(3):
        (alone,) = prompter.encode(images[i : i + 1], texts[i : i + 1])
        width = alone["input_ids"].shape[1]
        assert torch.equal(batch["input_ids"][i, -width:], alone["input_ids"][0])
        assert (batch["input_ids"][i, :-width] == PAD).all()
        assert batch["attention_mask"][i].tolist() == [0] * (batch["input_ids"].shape[1] - width) + [1] * width
        assert torch.equal(batch["pixel_values"][i], alone["pixel_values"][0])


def test_all_passes_share_the_pixels(model, monkeypatch) -> None:
    processor = make_processor()
    image_processor, calls = processor.image_processor, []
    original = type(image_processor).__call__
    monkeypatch.setattr(
        type(image_processor),
        "__call__",
        lambda self, *args, **kwargs: calls.append(1) or original(self, *args, **kwargs),
    )
    prompter, images = Prompter(model, processor), make_images(2)
    first, second = prompter.encode(images, ["<image> one", "<image> two"], ["<image> three", "<image> four five"])
    assert len(calls) == 1
    assert first["pixel_values"] is second["pixel_values"]
    assert processor.image_processor is image_processor
    expected = processor(
        images=images,
        text=["<image> three", "<image> four five"],
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    assert second.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(second[name], value), name


def test_floats_take_the_models_dtype(processor) -> None:
    model = make_model().to(torch.bfloat16)
    inputs, again = Prompter(model, processor).encode(make_images(1), ["<image> what"], ["<image> why"])
    assert inputs["pixel_values"].dtype == torch.bfloat16
    assert inputs["input_ids"].dtype == torch.int64
    assert again["pixel_values"] is inputs["pixel_values"]  # moved and converted once


def test_a_processor_may_take_from_what_its_image_processor_made() -> None:
    once = _ComputedOnce(lambda images: {"pixel_values": images, "num_patches": 4})
    assert once([1]).pop("num_patches") == 4
    assert once([1]) == {"pixel_values": [1], "num_patches": 4}


@pytest.mark.parametrize("template", ["{image}{question}", "<s>{image}{question}"])
def test_one_beginning_token(model, processor, template: str) -> None:
    prompter = Prompter(model, processor, template)
    (inputs,) = prompter.encode(make_images(1), prompter.texts([None], ["what"]))
    assert (inputs["input_ids"] == BOS).sum() == 1


def test_the_text_of_a_q_former_is_padded_on_the_right() -> None:
    """It reads by absolute positions, whichever side the language model's text is padded on."""
    processor = transformers.InstructBlipProcessor(
        blip(SIDE), make_tokenizer(), make_tokenizer(padding_side="left"), num_query_tokens=4
    )
    config = types.SimpleNamespace(model_type="instructblip")
    model = types.SimpleNamespace(config=config, device=torch.device("cpu"), dtype=torch.float32)
    prompter, images = Prompter(model, processor), make_images(2)
    texts = prompter.texts(images, ["What is it ?", "Why?"])
    assert texts == ["What is it ?", "Why?"]
    (inputs,) = prompter.encode(images, texts)
    assert inputs["qformer_attention_mask"][1].tolist() == [1] * 5 + [0] * 8
    expected = processor.tokenizer("Why?")["input_ids"]
    assert inputs["qformer_input_ids"][1].tolist() == expected + [PAD] * 8
    assert inputs["input_ids"][1, -5:].tolist() == expected


def test_an_encoder_reads_its_prompt_padded_on_the_right() -> None:
    """T5 counts how far words are from the image's tokens, which the processor puts before the padding."""
    processor = transformers.InstructBlipProcessor(blip(SIDE), make_tokenizer(), make_tokenizer(), num_query_tokens=4)
    config = types.SimpleNamespace(
        model_type="instructblip", text_config=types.SimpleNamespace(is_encoder_decoder=True)
    )
    model = types.SimpleNamespace(config=config, device=torch.device("cpu"), dtype=torch.float32)
    (inputs,) = Prompter(model, processor).encode(make_images(2), ["What is it ?", "Why?"])
    assert inputs["attention_mask"][1].tolist() == [1] * (4 + 5) + [0] * 8


def test_decoding(model, processor) -> None:
    prompter = Prompter(model, processor)
    tokens = torch.tensor([BOS, *processor.tokenizer(" a <image>b", add_special_tokens=False)["input_ids"], 2, PAD])
    assert prompter.decode(tokens) == "a b"
    assert prompter.decode_markup(tokens) == "a <image>b"


# --- the original Qwen-VL -------------------------------------------------------------------------------------------


class QwenTokenizer:
    """As much of it as a prompt needs."""

    bos_token = None

    def from_list_format(self, parts: list[dict]) -> str:
        return "".join(f"Picture 1: <img>{p['image']}</img>\n" if "image" in p else p["text"] for p in parts)

    def __call__(self, text: str) -> dict:
        return {"input_ids": list(text.encode())}


def qwen(chat_format: str = "raw", pad_token_id: int | None = 9):
    settings = types.SimpleNamespace(chat_format=chat_format, pad_token_id=pad_token_id)
    config = types.SimpleNamespace(model_type="qwen")
    return types.SimpleNamespace(
        config=config, generation_config=settings, device=torch.device("cpu"), dtype=torch.float32
    )


def test_qwen_vl_writes_the_paths_of_images() -> None:
    question = "What is it?"
    expected = "Picture 1: <img>/a/cat.png</img>\nWhat is it?"
    assert Prompter(qwen(), QwenTokenizer()).texts(["/a/cat.png"], [question]) == [expected]
    (chat,) = Prompter(qwen("chatml"), QwenTokenizer()).texts(["/a/cat.png"], [question])
    assert chat == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n{expected}<|im_end|>\n<|im_start|>assistant\n"
    )


def test_qwen_vl_batches_are_padded_on_the_left() -> None:
    (inputs,) = Prompter(qwen(), QwenTokenizer()).encode(["a", "b"], ["ab", "a"])
    assert inputs["input_ids"].tolist() == [[97, 98], [9, 97]]
    assert inputs["attention_mask"].tolist() == [[1, 1], [0, 1]]
    alone = Prompter(qwen(pad_token_id=None), QwenTokenizer())
    assert alone.encode(["a"], ["ab"])[0]["input_ids"].tolist() == [[97, 98]]
    with pytest.raises(ValueError, match=r"generation_config\.pad_token_id"):
        alone.encode(["a", "b"], ["ab", "a"])


# --- images ---------------------------------------------------------------------------------------------------------


def test_images_and_files(tmp_path) -> None:
    grey = Image.new("L", (30, 20), 7)
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    path = tmp_path / "turned.png"
    Image.new("RGB", (30, 20)).save(path, exif=exif)
    opened, sizes = open_images([grey, path, str(path)], as_paths=False)
    assert sizes == [(20, 30), (30, 20), (30, 20)]
    assert [image.mode for image in opened] == ["RGB"] * 3
    assert opened[0].getpixel((0, 0)) == (7, 7, 7)
    assert open_images([path], as_paths=True) == ([str(path)], [(20, 30)])


@pytest.mark.parametrize("image", [None, torch.zeros(3, SIDE, SIDE), 3], ids=["None", "tensor", "number"])
def test_what_is_no_image(image) -> None:
    with pytest.raises(TypeError, match=r"images\[0\]: expected a Pillow image or a path, got"):
        open_images([image], as_paths=False)
    with pytest.raises(TypeError, match=r"images\[0\]: expected a path, since this model opens images itself"):
        open_images([make_images(1)[0]], as_paths=True)


# --- what does not fit ------------------------------------------------------------------------------------------------


def test_a_processor_that_does_not_fit(model, processor) -> None:
    for no_processor in (None, processor.tokenizer, processor.image_processor):
        with pytest.raises(TypeError, match="processor: expected the model's processor"):
            Prompter(model, no_processor)
    other = make_model()
    other.config.image_token_id = 17
    with pytest.raises(
        ValueError, match="processor: expected the one that belongs to the model, whose image token is 17"
    ):
        Prompter(other, processor)


def test_templates_that_are_none(model, processor) -> None:
    with pytest.raises(TypeError, match="template: expected text"):
        Prompter(model, processor, 3)
    with pytest.raises(ValueError, match=r'template: expected "\{question\}" in it'):
        Prompter(model, processor, "USER: {image} ASSISTANT:")
    unknown = types.SimpleNamespace(config=types.SimpleNamespace(model_type="llava_next", image_token_id=3))
    with pytest.raises(ValueError, match=r"template: expected one, since the processor of this model \(llava_next\)"):
        Prompter(unknown, processor)
