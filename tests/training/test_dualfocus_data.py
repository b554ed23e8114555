"""DualFocus's two rounds in one sample: tokens, labels, pixels and losses, in every family that takes two images."""

from __future__ import annotations

import types

import pytest
import torch
from PIL import Image

import finegrain_ops
import talking_llava
from finegrain_ops.methods.dualfocus import BOX_PROMPT, COMBINE_PROMPT
from finegrain_ops.methods.prompting import Prompter
from finegrain_ops.training.annotations import AnnotatedImage, BoxedQuestion
from finegrain_ops.training.conversations import answer_rounds, round_losses
from finegrain_ops.training.dualfocus import DualFocusCollator, DualFocusDataset, DualFocusSample, dualfocus_rounds
from talking_models import CHATS, EOS, OTHER_END, make, make_images

Q1, Q2 = "Box? ", "Both: "  # short, since every letter is a token here
LLAVA, VISION = "<image>", "<|vision_start|><|image_pad|><|vision_end|>"
PROMPTS = {  # of a question, and what comes after an answer
    "LLaVA-1.5": (f"USER: {LLAVA}\n%s ASSISTANT:", f"</s>USER: {LLAVA}\n%s ASSISTANT:", "</s>"),
    "LLaVA-NeXT": (f"{LLAVA}%s!", f"</s>{LLAVA}%s!", "</s>"),
    "Qwen2-VL": (
        f"<|im_start|>user\n{VISION}%s<|im_end|>\n<|im_start|>assistant\n",
        f"<|im_end|>\n<|im_start|>user\n{VISION}%s<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>",
    ),
    "Qwen2.5-VL": ("<s><|image_pad|> %s >", "</s><|image_pad|> %s >", "</s>"),
    "Qwen3-VL": (f"[user\n{VISION}%s [assistant\n", f" [user\n{VISION}%s [assistant\n", "</s>"),
}
SIZES = ((60, 80), (100, 50), (48, 48))
# Boxes and the text of them: two decimals of the image's width and height.
BOXES = ((10, 20, 30, 40), None, (0, 0, 48, 48))
TEXTS = ("[0.12, 0.33, 0.38, 0.67]", "", "[0.00, 0.00, 1.00, 1.00]")
CROPS = ((0, 0, 55, 60), None, (0, 0, 48, 48))  # squared, 25 pixels more, inside
QUESTIONS = ("What is {it}?", "Why?", "Où est-ce ?")
ANSWERS = ("A Überdog 🐕.", "Because.", "")


def samples() -> list[DualFocusSample]:
    images = make_images(*SIZES)
    return [DualFocusSample(*row) for row in zip(images, QUESTIONS, ANSWERS, BOXES)]


def expected_texts(name: str) -> list[str]:
    """All that a sample's row shows, and the model's part of it."""
    prompt, after, end = PROMPTS[name]
    rows = []
    for question, answer, box, text in zip(QUESTIONS, ANSWERS, BOXES, TEXTS):
        if box is None:
            rows.append(prompt % question + answer + end)
        else:
            rows.append(prompt % (Q1 + question) + text + after % (Q2 + question) + answer + end)
    return rows


@pytest.fixture(scope="module", params=CHATS)
def made(request):
    model, processor, _, template = make(request.param)
    prompts = {"box_prompt": Q1 + "{question}", "combine_prompt": Q2 + "{question}"}
    collate = DualFocusCollator(model, processor, template=template, box_convention="unit", **prompts)
    batch = collate(samples())
    with torch.no_grad():
        output = model(**batch)
    return types.SimpleNamespace(
        name=request.param, model=model, processor=processor, collate=collate, batch=batch, output=output
    )


def tokens_of(batch, i: int) -> torch.Tensor:
    length = int(batch["attention_mask"][i].sum())
    assert batch["attention_mask"][i, :length].all()  # padding on the right
    assert (batch["labels"][i, length:] == -100).all()
    return batch["input_ids"][i, :length]


def test_tokens_and_pixels_are_the_processors_own_on_pillow_crops(made) -> None:
    """Of the whole conversation at once: this tokenizer gives the same for pieces."""
    name, processor, batch = made.name, made.processor, made.batch
    shown = []
    for sample, crop in zip(samples(), CROPS):
        shown.append([sample.image] if crop is None else [sample.image, sample.image.crop(crop)])
    for i, (text, images) in enumerate(zip(expected_texts(name), shown)):
        alone = processor(images=images, text=text, add_special_tokens=False, return_tensors="pt")
        assert torch.equal(tokens_of(batch, i), alone["input_ids"][0]), (name, i)
    every = [image for images in shown for image in images]
    pixels = processor.image_processor(images=every, return_tensors="pt")
    assert batch.keys() - {"mm_token_type_ids"} == {"input_ids", "attention_mask", "labels", *pixels.keys()}
    for key, value in pixels.items():
        torch.testing.assert_close(batch[key], value, rtol=0, atol=1e-5)  # a level is 0.014


def test_token_types_are_the_processors(made) -> None:
    name, processor, batch, sample = made.name, made.processor, made.batch, samples()[0]
    images = [sample.image, sample.image.crop(CROPS[0])]
    alone = processor(images=images, text=expected_texts(name)[0], add_special_tokens=False, return_tensors="pt")
    assert ("mm_token_type_ids" in batch) == ("mm_token_type_ids" in alone)
    if "mm_token_type_ids" in alone:
        types_of_row = batch["mm_token_type_ids"][0]
        length = alone["input_ids"].shape[1]
        assert torch.equal(types_of_row[:length], alone["mm_token_type_ids"][0])
        assert not types_of_row[length:].any()


def test_labels_are_the_box_and_the_answer_and_their_ends(made) -> None:
    name, processor, batch = made.name, made.processor, made.batch
    end = PROMPTS[name][2]
    end_id = processor.tokenizer.convert_tokens_to_ids(end)
    assert end_id == (OTHER_END if name == "Qwen2-VL" else EOS)
    rounds = dualfocus_rounds(batch["labels"])
    for i in range(3):
        labels, ids = batch["labels"][i], batch["input_ids"][i]
        said = [processor.tokenizer.decode(labels[rounds[i] == k].tolist()) for k in (1, 2)]
        assert said == [TEXTS[i] + end if BOXES[i] else "", ANSWERS[i] + end]
        # The same tokens stand in the input, but where the chat writes something else than the model's end.
        differ = (labels != -100) & (labels != ids)
        assert differ.sum() == (1 if name == "Qwen3-VL" and BOXES[i] else 0)
        assert (labels[differ] == end_id).all()


def test_the_loss_is_the_mean_over_the_tokens_of_both_rounds(made) -> None:
    """Eq. 4 as next-token training has it, written out one token at a time."""
    output, labels = made.output, made.batch["labels"]
    log_p = output.logits.double().log_softmax(-1)
    rounds = dualfocus_rounds(labels)
    terms: dict[int, list[float]] = {1: [], 2: []}
    for i in range(3):
        for t in range(1, labels.shape[1]):
            if labels[i, t] != -100:
                terms[int(rounds[i, t])].append(-log_p[i, t - 1, labels[i, t]].item())
    total = sum(terms[1]) + sum(terms[2])
    assert output.loss.item() == pytest.approx(total / (len(terms[1]) + len(terms[2])), rel=1e-5)
    means = [sum(terms[k]) / len(terms[k]) for k in (1, 2)]
    assert round_losses(output.logits, labels, rounds).tolist() == pytest.approx(means, rel=1e-5)


def test_the_box_is_predicted_as_in_the_first_round_alone(made) -> None:
    """Nothing of the second round reaches it; and neither does padding or another row."""
    model, processor, sample = made.model, made.processor, samples()[0]
    text = PROMPTS[made.name][0] % (Q1 + QUESTIONS[0]) + TEXTS[0]
    alone = processor(images=[sample.image], text=text, add_special_tokens=False, return_tensors="pt")
    length = alone["input_ids"].shape[1]
    with torch.no_grad():
        first = model(**alone).logits[0]
    torch.testing.assert_close(made.output.logits[0, :length], first, rtol=1e-4, atol=1e-5)
    changed = [DualFocusSample(sample.image, sample.question, "Something else, and longer.", sample.box)]
    with torch.no_grad():
        other = model(**made.collate(changed)).logits[0, :length]
    torch.testing.assert_close(other, first, rtol=1e-4, atol=1e-5)


def test_the_prompts_are_the_papers() -> None:
    model, processor, _, _ = make("LLaVA-1.5")
    ids = DualFocusCollator(model, processor)(samples())["input_ids"][0].tolist()
    text = processor.tokenizer.decode(ids).replace("<image>", "").replace("<pad>", "")
    first = "Please provide the bounding box coordinate of the region this question asks: What is {it}?"
    second = "Please combine the information from these two images and answer this question: What is {it}?"
    assert text == f"USER: \n{first} ASSISTANT:{TEXTS[0]}</s>USER: \n{second} ASSISTANT:{ANSWERS[0]}</s>"


# --- what does not depend on the family ---


@pytest.fixture(scope="module")
def llava():
    return make("LLaVA-1.5")


@pytest.fixture(scope="module")
def qwen():
    return make("Qwen2.5-VL")


def decoded_labels(collate, processor, sample) -> str:
    labels = collate([sample])["labels"][0]
    return processor.tokenizer.decode(labels[labels != -100].tolist())


@pytest.mark.parametrize(
    ("convention", "expected"),
    [
        ("unit", "[0.12, 0.33, 0.38, 0.67]"),
        ("auto", "[0.12, 0.33, 0.38, 0.67]"),
        ("unit_padded", "[0.12, 0.38, 0.38, 0.62]"),
        ("unit_view", "[0.00, 0.33, 0.33, 0.67]"),  # the square in the middle begins at 10
        ("permille", '{"bbox_2d": [125, 333, 375, 667]}'),
    ],
)
def test_conventions_of_boxes(llava, convention: str, expected: str) -> None:
    model, processor, _, _ = llava
    collate = DualFocusCollator(model, processor, box_convention=convention)
    assert decoded_labels(collate, processor, samples()[0]).startswith(f"{expected}</s>")


def test_pixels_of_the_image_that_the_model_sees(qwen) -> None:
    model, processor, _, template = qwen
    collate = DualFocusCollator(model, processor, template=template, box_convention="pixel")
    sample = samples()[0]
    _, rows, columns = collate([sample])["image_grid_thw"][0].tolist()
    x0, y0, x1, y1 = (round(v * n * 4 / side) for v, n, side in zip(BOXES[0], (columns, rows) * 2, (80, 60) * 2))
    assert (rows, columns) != (60 / 4, 80 / 4)
    assert decoded_labels(collate, processor, sample).startswith(f'{{"bbox_2d": [{x0}, {y0}, {x1}, {y1}]}}</s>')


def test_prompts_and_margin_are_the_callers(llava) -> None:
    model, processor, _, _ = llava
    collate = DualFocusCollator(
        model,
        processor,
        template="{image}{question}:",
        box_prompt="Box? {question}",
        combine_prompt=str.upper,
        margin=1,
    )
    sample = samples()[0]
    batch = collate([sample])
    text = processor.tokenizer.decode(tokens_of(batch, 0).tolist()).replace("<image>", "")
    assert text == f"Box? What is {{it}}?:{TEXTS[0]}</s>WHAT IS {{IT}}?:{ANSWERS[0]}</s>"
    crop = sample.image.crop((9, 19, 31, 41))
    expected = processor.image_processor(images=[crop], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(batch["pixel_values"][1:], expected, rtol=0, atol=1e-5)


def test_only_questions_about_the_whole_image(llava) -> None:
    model, processor, _, _ = llava
    batch = DualFocusCollator(model, processor)([samples()[1]])
    assert batch["pixel_values"].shape[0] == 1
    assert dualfocus_rounds(batch["labels"]).unique().tolist() == [0, 2]


BAD = {
    "no area": (lambda s: DualFocusSample(s.image, "a", "b", (5, 5, 5, 9)), r"expected .*\(5.*, 5.*, 5.*, 9"),
    "outside": (lambda s: DualFocusSample(s.image, "a", "b", (80, 0, 90, 9)), r"overlap"),
    "image token": (lambda s: DualFocusSample(s.image, "a <image>", "b"), r"questions\[0\]: expected text without the"),
    "end token": (
        lambda s: DualFocusSample(s.image, "a", "b</s>", (0, 0, 9, 9)),
        r"answers\[0\]: expected text without",
    ),
    "no text": (lambda s: DualFocusSample(s.image, "a", None), r"answers\[0\]: expected a str, got NoneType"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_samples_that_cannot_be_trained_on(llava, change, message: str) -> None:
    collate = DualFocusCollator(llava[0], llava[1])
    with pytest.raises((ValueError, TypeError), match=message):
        collate([change(samples()[0])])


def test_arguments(llava) -> None:
    model, processor, _, _ = llava
    with pytest.raises(ValueError, match="samples: expected at least one"):
        DualFocusCollator(model, processor)([])
    with pytest.raises(ValueError, match="box_convention: expected one of 'auto'"):
        DualFocusCollator(model, processor, box_convention="inches")
    with pytest.raises(ValueError, match="box_prompt: expected"):
        DualFocusCollator(model, processor, box_prompt="Where?")
    blip = types.SimpleNamespace(model_type="blip-2")
    with pytest.raises(finegrain_ops.UnsupportedModelError, match="takes a second image"):
        DualFocusCollator(types.SimpleNamespace(config=blip, generation_config=None), processor)


def test_rounds_are_numbered_in_each_row() -> None:
    labels = torch.tensor([[-100, 5, 5, -100, 5], [-100, -100, 7, 7, -100], [5, -100, 5, -100, 5], [-100] * 5])
    expected = [[0, 1, 1, 0, 2], [0, 0, 1, 1, 0], [1, 0, 2, 0, 3], [0] * 5]
    assert answer_rounds(labels).tolist() == expected
    assert dualfocus_rounds(labels[:2]).tolist() == [[0, 1, 1, 0, 2], [0, 0, 2, 2, 0]]


def test_a_round_without_tokens_has_no_loss() -> None:
    logits = torch.randn(1, 4, 6)
    labels = torch.tensor([[-100, 3, -100, -100]])
    losses = round_losses(logits, labels, torch.tensor([[0, 2, 0, 0]]))
    assert losses[0].isnan()
    assert losses[1].item() == pytest.approx(-logits.log_softmax(-1)[0, 0, 3].item())


# --- the data set ---


def question(size: tuple[int, int], path: str = "VG_100K/1.png") -> BoxedQuestion:
    return BoxedQuestion(
        AnnotatedImage(1, path, size), 7, "What?", "This.", ((1.0, 2.0, 3.0, 4.0), (0.0, 3.0, 9.0, 5.0))
    )


def test_a_sample_has_its_image_and_the_box_around_its_boxes(tmp_path) -> None:
    (tmp_path / "VG_100K").mkdir()
    (image,) = make_images((6, 10))
    image.convert("P").save(tmp_path / "VG_100K" / "1.png")
    data = DualFocusDataset([question((6, 10)), question((6, 11))], tmp_path)
    assert len(data) == 2
    sample = data[0]
    assert sample.image.mode == "RGB"
    assert (sample.image.size, sample.question, sample.answer) == ((10, 6), "What?", "This.")
    assert sample.box == (0.0, 2.0, 9.0, 5.0)
    with pytest.raises(ValueError, match=r"VG_100K/1.png: expected 11 x 6 pixels .*, got 10 x 6"):
        data[1]
    assert DualFocusDataset([question((6, 10))], lambda of: image if of.image_id == 1 else None)[0].image.size == (
        10,
        6,
    )


@pytest.mark.parametrize("size", [(6, 10), (10, 6)])
def test_boxes_say_whether_an_image_was_annotated_before_it_was_turned(tmp_path, size) -> None:
    (image,) = make_images((6, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    image.save(tmp_path / "1.png", exif=exif)
    sample = DualFocusDataset([question(size, "1.png")], tmp_path)[0]
    expected = image if size == (6, 10) else image.transpose(Image.Transpose.ROTATE_270)
    assert sample.image.tobytes() == expected.tobytes()


def test_the_beginning_token_is_fed_once_as_at_inference() -> None:
    """By a tokenizer that puts it before every text."""
    model, processor = talking_llava.make_model(), talking_llava.make_processor()
    sample = samples()[0]
    ids = DualFocusCollator(model, processor)([sample])["input_ids"][0]
    prompter = Prompter(model, processor)
    (first,) = prompter.encode(
        [sample.image], prompter.texts([sample.image], [BOX_PROMPT.format(question="What is {it}?")])
    )
    made = finegrain_ops.preprocess(sample.image, [CROPS[0]], processor)
    tail = prompter.follow_up(COMBINE_PROMPT.format(question="What is {it}?"))
    second = prompter.encode_follow_ups([tail], [sample.image], made)
    answers = [processor.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (TEXTS[0], ANSWERS[0])]
    expected = [*first["input_ids"][0].tolist(), *answers[0], *second["input_ids"][0].tolist(), *answers[1], EOS]
    assert ids.tolist() == expected
    assert (ids == talking_llava.BOS).sum() == 1


def test_inference_feeds_what_training_fed(made, monkeypatch) -> None:
    """DualFocus with the true box: the conversation up to the second answer, token by token, and its pixels."""
    from finegrain_ops.methods import dualfocus_passes

    fed = {}
    whole = dualfocus_passes.positions_in_prompts
    monkeypatch.setattr(
        dualfocus_passes,
        "positions_in_prompts",
        lambda model, rows, images: fed.update(rows=rows) or whole(model, rows, images),
    )
    _, _, _, template = make(made.name)
    options = {"prompt": Q1 + "{question}", "combine_prompt": Q2 + "{question}", "box_convention": "unit"}
    method = finegrain_ops.DualFocus(made.model, made.processor, template=template, **options)
    sample = samples()[0]
    result = method.answer(sample.image, sample.question, box=sample.box, max_new_tokens=1)
    assert result.crop == CROPS[0]
    trained = tokens_of(made.batch, 0).tolist()
    (row,) = fed["rows"]
    text, of_training = (made.processor.tokenizer.decode(ids) for ids in (row, trained))
    # A prompt that ends in a word is gone on with a space, which SentencePiece's first token of a text has in it.
    assert of_training.startswith(text.replace(f" {TEXTS[0]}", TEXTS[0]))
    assert len(text) > len(TEXTS[0]) + len(Q2)
