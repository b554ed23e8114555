"""The model: which features go where, generation, gradients, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from torch import Tensor

from finegrain_ops.integrations.tinygroundinggpt import TinyGroundingGPTConfig, add_placeholder_tokens
from tiny_tinygroundinggpt import (
    GRID,
    IMAGE,
    OBJECT,
    PATCH,
    SIDE,
    TOKENS_PER_IMAGE,
    make_config,
    make_images,
    make_model,
    make_processor,
    make_tokenizer,
)

TEXTS = ["<image> Is <object> left of <object>?", "Here <image> and <object> at <loc>!", "no picture"]
OBJECTS = [[(1, 2, 30, 40), (20, 0, 80, 33)], [(5, 5, 45, 95)], []]
LOCATIONS = [[], [(5, 50, 45, 95)], []]


@pytest.fixture(scope="module")
def model():
    return make_model(initializer_range=0.2)  # so large that every token tells


@pytest.fixture(scope="module")
def processor():
    return make_processor()


@pytest.fixture(scope="module")
def inputs(processor):
    return processor(
        make_images(2), TEXTS, object_boxes=OBJECTS, location_boxes=LOCATIONS, padding=True, return_tensors="pt"
    )


def one_by_one(processor) -> list:
    images = [make_images(2)[:1], make_images(2)[1:], None]
    return [
        processor(image, text, object_boxes=boxes or None, location_boxes=places or None, return_tensors="pt")
        for image, text, boxes, places in zip(images, TEXTS, OBJECTS, LOCATIONS)
    ]


# --- features --------------------------------------------------------------------------------------------------------


def features_by_hand(model, pixels: Tensor, dino_pixels: Tensor) -> Tensor:
    """Encoders of their own with the same weights, patch by patch."""
    clip = transformers.CLIPVisionModel(model.config.clip_config).eval()
    clip.load_state_dict(model.model.vision_tower.clip_tower.state_dict())
    dino = transformers.Dinov2Model(model.config.dino_config).eval()
    dino.load_state_dict(model.model.vision_tower.dino_tower.state_dict())
    of_clip = clip(pixels, output_hidden_states=True).hidden_states[1]  # of embeddings and two layers, the last but one
    of_dino = dino(dino_pixels, output_hidden_states=True).hidden_states[2]
    of_dino = F.layer_norm(of_dino, (48,), dino.layernorm.weight, dino.layernorm.bias, 1e-6)
    mlp = model.model.multi_modal_projector
    tokens = []
    for row in range(GRID):
        for column in range(GRID):
            place = 1 + row * GRID + column  # CLS comes first
            joined = torch.cat([of_clip[:, place], of_dino[:, place]], dim=-1)
            hidden = F.gelu(joined @ mlp.linear_1.weight.T + mlp.linear_1.bias)
            tokens.append(hidden @ mlp.linear_2.weight.T + mlp.linear_2.bias)
    return torch.stack(tokens, dim=1)


@torch.no_grad()
def test_features_are_those_of_both_encoders_joined_per_patch(model, inputs) -> None:
    features = model.get_image_features(inputs["pixel_values"], inputs["dino_pixel_values"])
    assert features.shape == (5, TOKENS_PER_IMAGE, 64)
    torch.testing.assert_close(features, features_by_hand(model, inputs["pixel_values"], inputs["dino_pixel_values"]))


@torch.no_grad()
def test_features_take_the_places_of_their_tokens_in_order(model, inputs, monkeypatch) -> None:
    seen = {}
    monkeypatch.setattr(model.model.language_model, "forward", _recording(model.model.language_model.forward, seen))
    output = model(**inputs)
    features = features_by_hand(model, inputs["pixel_values"], inputs["dino_pixel_values"])
    expected = model.get_input_embeddings()(inputs["input_ids"]).clone()
    shown = iter(features.flatten(0, 1))
    for row, ids in enumerate(inputs["input_ids"].tolist()):
        for place, token in enumerate(ids):
            if token in (IMAGE, OBJECT):
                expected[row, place] = next(shown)
    assert next(shown, None) is None
    torch.testing.assert_close(seen["inputs_embeds"], expected)
    torch.testing.assert_close(output.image_hidden_states, features)


def _recording(original, seen: dict):
    def forward(*args, **kwargs):
        seen.update(kwargs)
        return original(*args, **kwargs)

    return forward


@pytest.mark.parametrize("size", [(SIDE, SIDE), (SIDE, 2 * SIDE), (2 * SIDE, SIDE)])  # height, width
@torch.no_grad()
def test_a_patch_lights_the_same_cell_of_both_halves(model, processor, size: tuple[int, int]) -> None:
    scale = max(size) // SIDE
    grey = np.full((*size, 3), 120, dtype=np.uint8)
    before = _halves(model, processor, grey)
    top, left = ((max(size) - side) // 2 // scale // PATCH for side in size)  # the padding, in cells
    for row, column in ((top, left), (top + 1, left + 2), (GRID - 1 - top, GRID - 1 - left), (3, 4)):
        y, x = (row - top) * PATCH * scale, (column - left) * PATCH * scale
        image = grey.copy()
        image[y : y + PATCH * scale, x : x + PATCH * scale] = (255, 0, 0)
        for half, half_before in zip(_halves(model, processor, image), before):
            change = (half - half_before).norm(dim=-1).reshape(GRID, GRID)
            assert divmod(int(change.argmax()), GRID) == (row, column)


def _halves(model, processor, image: np.ndarray) -> list[Tensor]:
    pixels = processor.image_processor(Image.fromarray(image))
    both = torch.cat([pixels["pixel_values"], pixels["dino_pixel_values"]], dim=1)
    return list(model.model.vision_tower(both)[0].split([32, 48], dim=-1))


# --- generation ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_left_padding_changes_nothing(model, processor, inputs) -> None:
    logits = model(**inputs).logits
    for row, alone in enumerate(one_by_one(processor)):
        length = alone["input_ids"].shape[1]
        assert (row == 0) == (length == logits.shape[1])  # the others are padded
        torch.testing.assert_close(logits[row, -length:], model(**alone).logits[0], rtol=1e-4, atol=1e-4)


def test_generation_with_and_without_cache(model, inputs) -> None:
    cached, uncached = (
        model.generate(**inputs, max_new_tokens=12, do_sample=False, use_cache=use_cache) for use_cache in (True, False)
    )
    assert cached.shape[1] == inputs["input_ids"].shape[1] + 12
    assert torch.equal(cached, uncached)


@torch.no_grad()
def test_generation_is_the_argmax_of_whole_passes(model, inputs) -> None:
    generated = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for _ in range(6):
        logits = model(**{**inputs, "input_ids": ids, "attention_mask": mask}, logits_to_keep=1).logits
        assert logits.shape[1] == 1
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    assert torch.equal(generated, ids)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}])
def test_beams_of_texts_with_several_images(model, processor, inputs, options: dict) -> None:
    """transformers repeats each image by itself, which would mix up those of one text."""
    together = model.generate(**inputs, max_new_tokens=6, do_sample=False, **options)
    several = options.get("num_return_sequences", 1)
    for row, alone in enumerate(one_by_one(processor)):
        generated = model.generate(**alone, max_new_tokens=6, do_sample=False, **options)
        assert torch.equal(together[row * several : (row + 1) * several, -6:], generated[:, -6:])


def test_images_are_repeated_text_by_text(model, processor, inputs) -> None:
    first, second = make_images(2)
    expected = processor(
        [first] * 3 + [second] * 3,
        [text for text in TEXTS for _ in range(3)],
        object_boxes=[boxes for boxes in OBJECTS for _ in range(3)],
        location_boxes=[boxes for boxes in LOCATIONS for _ in range(3)],
        padding=True,
        return_tensors="pt",
    )
    ids, others = model._expand_inputs_for_generation(expand_size=3, **inputs)
    assert torch.equal(ids, expected.pop("input_ids"))
    assert others.keys() == expected.keys()
    assert all(torch.equal(others[name], expected[name]) for name in expected)


def test_pixels_are_encoded_in_the_first_step_only(model, inputs, monkeypatch) -> None:
    calls = []
    tower = model.model.vision_tower
    monkeypatch.setattr(tower, "forward", lambda pixels, forward=tower.forward: calls.append(1) or forward(pixels))
    model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert len(calls) == 1


class WriteObject(transformers.LogitsProcessor):
    """Makes the model write <object>."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return torch.full_like(scores, float("-inf")).index_fill(1, torch.tensor([OBJECT]), 0.0)


@pytest.mark.parametrize("use_cache", [True, False])
def test_an_object_token_that_the_model_writes_is_a_token_like_any_other(model, inputs, use_cache: bool) -> None:
    generated = model.generate(
        **inputs,
        max_new_tokens=3,
        use_cache=use_cache,
        logits_processor=transformers.LogitsProcessorList([WriteObject()]),
        do_sample=False,
    )
    assert (generated[:, -3:] == OBJECT).all()
    added = {**inputs, "input_ids": generated, "attention_mask": F.pad(inputs["attention_mask"], (0, 3), value=1)}
    with torch.no_grad():
        states = model(**added, output_hidden_states=True).hidden_states[0]
    own = model.get_input_embeddings().weight[OBJECT]
    assert torch.equal(states[:, -3:], own.expand(3, 3, -1))
    assert not (states[0] == own).all(-1)[:-3].any()  # in the places of objects are features


# --- training --------------------------------------------------------------------------------------------------------


def gradients(model, inputs) -> dict[str, Tensor]:
    model.zero_grad()
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] < 5, -100)
    model(**inputs, labels=labels).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(inputs, reentrant: bool) -> None:
    model = make_model().train()
    expected = gradients(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    layers = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    assert len(layers) >= 2 * 3  # of both encoders and the language model
    got = gradients(model, inputs)
    assert got.keys() == expected.keys()
    assert any(name.startswith("model.vision_tower.dino_tower") and grad.any() for name, grad in got.items())
    assert any(name.startswith("model.vision_tower.clip_tower") and grad.any() for name, grad in got.items())
    for name, grad in expected.items():
        torch.testing.assert_close(got[name], grad, msg=name)


def test_the_loss_is_the_mean_cross_entropy_of_the_next_token(model, inputs) -> None:
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] < 5, -100)
    with torch.no_grad():
        output = model(**inputs, labels=labels)
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(output.loss, expected)


# --- embeddings, attention -------------------------------------------------------------------------------------------


def test_the_head_is_the_embedding() -> None:
    model = make_model()
    assert model.lm_head.weight is model.get_input_embeddings().weight
    untied = make_model(tie_word_embeddings=False)
    assert untied.lm_head.weight is not untied.get_input_embeddings().weight


def test_placeholders_are_added_to_a_tokenizer_and_its_model() -> None:
    model = make_model(vocab_size=40)
    backend = make_tokenizer().backend_tokenizer
    plain = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<|endoftext|>")
    assert add_placeholder_tokens(plain) == (IMAGE, OBJECT)  # these are there
    words = transformers.PreTrainedTokenizerFast(
        tokenizer_object=_word_level(39), pad_token="w0", additional_special_tokens=["w1"]
    )
    assert add_placeholder_tokens(words, model) == (39, 40)
    assert add_placeholder_tokens(words, model) == (39, 40)
    assert (model.config.image_token_id, model.config.object_token_id) == (39, 40)
    assert model.get_input_embeddings().weight.shape[0] == 41
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert words.encode("w3<image>", add_special_tokens=False) == [3, 39]
    assert words.decode([1, 3, 39, 40], skip_special_tokens=True).strip() == "w3"
    with pytest.raises(TypeError, match="model: expected a TinyGroundingGPT"):
        add_placeholder_tokens(words, transformers.Qwen2Model(model.config.text_config))


def _word_level(count: int):
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(count)}, unk_token="w2"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return backend


@torch.no_grad()
def test_attention_is_chosen_for_each_part(inputs) -> None:
    model = make_model()
    expected = model(**inputs).logits
    model.set_attn_implementation({"text_config": "eager", "clip_config": "eager"})
    parts = (model.model.language_model, model.model.vision_tower.clip_tower, model.model.vision_tower.dino_tower)
    assert [part.config._attn_implementation for part in parts] == ["eager", "eager", "sdpa"]
    real = inputs["attention_mask"].bool()  # rows of padding are anything
    torch.testing.assert_close(model(**inputs).logits[real], expected[real])
    assert model(**inputs, output_attentions=True).attentions[0].shape[-1] == inputs["input_ids"].shape[1]


@torch.no_grad()
def test_the_whole_pass_is_one_graph(model, inputs) -> None:
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**inputs, use_cache=False).logits, model(**inputs, use_cache=False).logits)


# --- bad input -------------------------------------------------------------------------------------------------------


def without(inputs, name: str) -> dict:
    return {key: value for key, value in inputs.items() if key != name}


BAD = {
    "an image too few": (
        lambda i: {**i, "pixel_values": i["pixel_values"][1:], "dino_pixel_values": i["dino_pixel_values"][1:]},
        "input_ids: expected 64 image or object tokens for each of the 4 images of pixel_values, got 320",
    ),
    "no pixels for one encoder": (lambda i: without(i, "dino_pixel_values"), "dino_pixel_values: expected what"),
    "no pixels for the other": (lambda i: without(i, "pixel_values"), "^pixel_values: expected what"),
    "another size": (
        lambda i: {**i, "pixel_values": i["pixel_values"][..., :-1, :]},
        r"expected \(N, 3, 48, 48\) both, got \(5, 3, 47, 48\) and \(5, 3, 48, 48\)",
    ),
    "different numbers": (
        lambda i: {**i, "dino_pixel_values": i["dino_pixel_values"][1:]},
        r"both, got \(5, 3, 48, 48\) and \(4, 3, 48, 48\)",
    ),
    "embeddings beside pixels": (
        lambda i: {**without(i, "input_ids"), "inputs_embeds": torch.zeros(3, i["input_ids"].shape[1], 64)},
        "pixel_values: expected input_ids beside them",
    ),
    "neither ids nor embeddings": (lambda i: without(i, "input_ids"), "input_ids, inputs_embeds: expected exactly one"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_inputs_that_do_not_fit(model, inputs, change, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(**change(inputs))


def test_a_context_longer_than_the_models(inputs) -> None:
    length = inputs["input_ids"].shape[1]
    model = make_model(max_position_embeddings=length + 2)
    assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1] == length + 3  # the last is not read
    message = f"expected at most {length + 2} tokens .* got {length + 3}; an image or object takes 64"
    with pytest.raises(ValueError, match=message):
        model.generate(**inputs, max_new_tokens=4, do_sample=False)
    with pytest.raises(ValueError, match=f"at most {length - 1} tokens"):
        make_model(max_position_embeddings=length - 1)(**inputs)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"clip_config": {"image_size": 50, "patch_size": 6}}, ValueError, "multiple of both patch sizes, 6 and 14"),
        ({"clip_config": {"image_size": 336, "patch_size": 28}}, ValueError, "expected clip_config's 28"),
        ({"text_config": "qwen"}, TypeError, "text_config: expected a Qwen2Config, a dict or None, got str 'qwen'"),
        ({"dino_config": transformers.CLIPVisionConfig()}, TypeError, "dino_config: expected a Dinov2Config"),
    ],
)
def test_configurations_that_do_not_fit(options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        TinyGroundingGPTConfig(**options)


def test_a_configuration_comes_back_from_its_dict() -> None:
    config = make_config()
    again = TinyGroundingGPTConfig.from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict()
    assert again.grid_size == GRID
    assert again.tie_word_embeddings
    assert again.text_config.max_position_embeddings == 1024
