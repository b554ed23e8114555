"""TinyGroundingGPT's batches: tokens, labels and pixels of every kind of sample."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from finegrain_ops.training.alignment import Filters, alignment_samples
from finegrain_ops.training.annotations import AnnotatedImage, BoxedCaption, BoxedPhrase
from finegrain_ops.training.grounding_samples import GroundingSample, conversation, description, highlighted
from finegrain_ops.training.tinygroundinggpt import GroundingCollator, GroundingDataset, GroundingItem, turn_labels
from tiny_tinygroundinggpt import EOS, OBJECT, PAD, TOKENS_PER_IMAGE, make_images, make_model, make_processor

SIZE = (60, 80)  # of the first tiny image; padded to 80 x 80 with 10 above
IMAGE = AnnotatedImage(1, "1.png", SIZE)
CUP, HAT = (0.0, 0.0, 40.0, 40.0), (50.0, 10.0, 80.0, 60.0)
cup, hat = BoxedPhrase(IMAGE, "a cup", (CUP,)), BoxedPhrase(IMAGE, "ein Hütchen 🎩", (HAT,))


def every_kind() -> list[GroundingSample]:
    samples = alignment_samples([cup, hat], filters=Filters(largest=1.0))
    samples.append(highlighted(IMAGE, "Is <a cup> or <hat> blue?", "<hat>", {"cup": CUP, "hat": HAT}))
    rounds = [
        ("What is <the cup> [0.0, 0.0, 0.5, 0.5] on?", "On <a hat> [0.5, 0.5, 1.0, 1.0]."),
        ("And <cup>?", "It is."),
    ]
    samples.append(conversation(IMAGE, rounds, image_share=1.0))
    samples.append(conversation(IMAGE, rounds, image_share=0.0))
    samples.append(description(BoxedCaption(IMAGE, "I see a cup .", (cup,), ((6, 11),))))
    return samples


def items(samples) -> list[GroundingItem]:
    image = make_images(1)[0]
    return [GroundingItem(image, sample) for sample in samples]


@pytest.fixture(scope="module")
def processor():
    return make_processor()


@pytest.fixture(scope="module")
def batch(processor):
    return GroundingCollator(processor)(items(every_kind()))


def written(text: str, places: list[str]) -> str:
    """Text with its boxes; of the square of 80, after padding."""
    for place in places:
        text = text.replace("<loc>", place, 1)
    return text


def places_of(sample: GroundingSample) -> list[str]:
    edges = [(x0 / 80, (y0 + 10) / 80, x1 / 80, (y1 + 10) / 80) for x0, y0, x1, y1 in sample.location_boxes]
    return ["[" + ", ".join(f"{edge:.3f}" for edge in box) + "]" for box in edges]


def test_there_is_every_kind() -> None:
    assert sorted({sample.kind for sample in every_kind()}) == [
        "conversation",
        "coordinate_to_image",
        "coordinate_to_text",
        "description",
        "highlighted",
        "image_to_coordinate",
        "image_to_text",
        "text_to_coordinate",
        "text_to_image",
    ]


def test_rows_are_the_dialogue_and_labels_the_assistants_turns(processor, batch) -> None:
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    for i, sample in enumerate(every_kind()):
        places, text, answers = places_of(sample), system, ""
        for k, (question, answer) in enumerate(sample.turns):
            asked = question if k else f"<image>\n{question}"
            count = question.count("<loc>")
            asked, places = written(asked, places[:count]), places[count:]
            count = answer.count("<loc>")
            answer, places = written(answer, places[:count]), places[count:]
            text += f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
            answers += f"{answer}<|im_end|>"
        assert places == []
        ids = batch["input_ids"][i][batch["attention_mask"][i].bool()]
        shown = text.replace("<image>", "<image>" * TOKENS_PER_IMAGE).replace("<object>", "<object>" * TOKENS_PER_IMAGE)
        assert processor.tokenizer.decode(ids.tolist()) == shown
        labels = batch["labels"][i]
        assert processor.tokenizer.decode(labels[labels != -100].tolist()) == answers
        assert torch.equal(labels[labels != -100], batch["input_ids"][i][labels != -100])


def test_prompts_are_those_of_inference(processor, batch) -> None:
    """Up to the first answer, the tokens that `generate` would be given."""
    for i, sample in enumerate(every_kind()):
        prompt = processor.apply_chat_template(sample.messages[:1], add_generation_prompt=True, tokenize=False)
        objects, locations = prompt.count("<object>"), prompt.count("<loc>")
        inputs = processor(
            images=make_images(1),
            text=prompt,
            object_boxes=sample.object_boxes[:objects],
            location_boxes=sample.location_boxes[:locations],
            return_tensors="pt",
        )
        first = int((batch["labels"][i] != -100).nonzero()[0])
        assert torch.equal(batch["input_ids"][i, :first], inputs["input_ids"][0])


def test_no_placeholder_is_left(processor, batch) -> None:
    """Each row has the tokens of its image and object images, and boxes where "<loc>" was."""
    for i, sample in enumerate(every_kind()):
        assert (batch["input_ids"][i] == OBJECT).sum() == TOKENS_PER_IMAGE * len(sample.object_boxes)
        assert "<loc>" not in processor.tokenizer.decode(batch["input_ids"][i].tolist())
        assert not torch.isin(batch["labels"][i], torch.tensor([OBJECT, processor.image_token_id])).any()


def test_object_images_are_crops_of_the_image(processor, batch) -> None:
    """As Pillow cuts them, row by row after the image itself."""
    image, crops = make_images(1)[0], []
    for sample in every_kind():
        crops += [image, *(image.crop(tuple(map(int, box))) for box in sample.object_boxes)]
    expected = processor.image_processor(crops)
    for name in ("pixel_values", "dino_pixel_values"):
        assert len(batch[name]) == len(crops)
        torch.testing.assert_close(batch[name], expected[name], rtol=0, atol=1e-5)


def test_all_images_of_a_batch_are_cropped_in_one_call(processor, monkeypatch) -> None:
    from finegrain_ops.integrations.tinygroundinggpt import image_processing

    calls = []
    original = image_processing.crop_resize
    monkeypatch.setattr(image_processing, "crop_resize", lambda *a, **kw: calls.append(len(a[1])) or original(*a, **kw))
    samples = every_kind()
    GroundingCollator(processor)(items(samples))
    assert calls == [sum(1 + len(sample.object_boxes) for sample in samples)]


def test_the_loss_is_the_mean_over_the_answers_tokens(processor) -> None:
    model, collate = make_model(), GroundingCollator(processor)
    batch = collate(items(every_kind()[-3:]))
    with torch.no_grad():
        output = model(**batch)
    log_p = output.logits.double().log_softmax(-1)
    rows, places = (batch["labels"] != -100).nonzero(as_tuple=True)
    total = sum(log_p[row, place - 1, batch["labels"][row, place]].item() for row, place in zip(rows, places))
    assert output.loss.item() == pytest.approx(-total / len(rows), rel=1e-5)


def test_padding_is_on_the_right(batch) -> None:
    mask = batch["attention_mask"]
    assert torch.equal(mask, mask.sort(dim=1, descending=True).values)
    assert (batch["input_ids"][mask == 0] == PAD).all()
    assert (batch["labels"][mask == 0] == -100).all()
    assert (mask == 0).any()


def test_an_empty_answer_is_its_end(processor) -> None:
    batch = GroundingCollator(processor)(items([GroundingSample("x", IMAGE, (("a", ""), ("b", "c")))]))
    labels = batch["labels"][0]
    assert processor.tokenizer.decode(labels[labels != -100].tolist()) == "<|im_end|>c<|im_end|>"


def test_labels_of_turns() -> None:
    header = torch.tensor([1, 2])
    ids = torch.tensor([[9, 1, 2, 5, 9, 1, 2, 9, 5], [5, 1, 5, 2, 9, 5, 5, 5, 5], [5, 5, 5, 5, 5, 5, 5, 1, 2]])
    labels, counts = turn_labels(ids, header, 9)
    x = -100
    assert labels.tolist() == [[x, x, x, 5, 9, x, x, 9, x], [x] * 9, [x] * 9]
    assert counts.tolist() == [2, 0, 1]
    labels, counts = turn_labels(ids[:, :1], header, 9)
    assert labels.tolist() == [[x], [x], [x]]
    assert counts.tolist() == [0, 0, 0]


def test_what_cannot_be_trained_on(processor) -> None:
    collate = GroundingCollator(processor)
    with pytest.raises(ValueError, match="items: expected at least one, got none"):
        collate([])
    with pytest.raises(ValueError, match=r"items\[1\]: expected text without the special token '<\|im_end\|>'"):
        collate(items([every_kind()[0], GroundingSample("x", IMAGE, (("a", "b<|im_end|>"),))]))
    other = make_processor()
    other.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match=r"processor: expected a chat_template that writes '<\|im_start\|>assistant"):
        GroundingCollator(other)(items(every_kind()[:1]))


def test_a_data_set_opens_its_images(tmp_path) -> None:
    image = make_images(1)[0]
    image.save(tmp_path / "1.png")
    samples = every_kind()
    data = GroundingDataset(samples, tmp_path)
    assert len(data) == len(samples)
    assert data[3].sample is samples[3]
    assert data[3].image.tobytes() == image.tobytes()
    Image.new("RGB", (9, 9)).save(tmp_path / "1.png")
    with pytest.raises(ValueError, match=r"1.png: expected 80 x 60 pixels .*, got 9 x 9"):
        data[0]


def test_ends_are_the_tokenizers(batch) -> None:
    assert (batch["labels"] == EOS).sum() == sum(len(sample.turns) for sample in every_kind())
