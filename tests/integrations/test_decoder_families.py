"""LLaVA-NeXT and the Qwens, beside LLaVA-1.5: patched, biased and steered as tiny random models, by image regions.

The bias against transformers' eager attention with it in the 4-D mask; regions against the geometry of families.py,
which test_painted_boxes.py holds against the families' own image processors.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import finegrain_ops
from finegrain_ops import UnsupportedInputError, UnsupportedModelError, families
from finegrain_ops.geometry import PixelMap
from tiny_models import IMAGE_TOKEN, PATCH, PINPOINTS, SIDE, TINY, EagerOracle

STOP = 2  # never generated, like the tokens of images
GREEDY = {"max_new_tokens": 5, "do_sample": False, "suppress_tokens": [STOP, 96, 97, 98, 99], "eos_token_id": STOP}

# The first prompt has two images. LLaVA-NeXT: three tiles in a row that lose the image's left and right edge; one tile;
# four tiles with padding above and below, of which some stays.
IMAGE_SIZES = [(30, 67), (22, 24), (41, 60)]
BOXES = [[(3, 2, 30, 17)], [], [(5, 20, 44, 39), (50, 0, 60, 9)]]


@pytest.fixture(scope="module", params=TINY)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(name):
    return TINY[name].make_model()


@pytest.fixture(scope="module")
def processor(name):
    return TINY[name].make_processor()


@pytest.fixture
def inputs(name):
    return TINY[name].inputs(IMAGE_SIZES)


@pytest.fixture
def bias(inputs) -> Tensor:
    """(B, P): another region and another sign in each prompt."""
    bias = torch.zeros(inputs["input_ids"].shape)
    for i, row in enumerate(inputs["input_ids"]):
        image = (row == IMAGE_TOKEN).nonzero()[:, 0]
        bias[i, image[2 + 3 * i : 10 + 3 * i]] = 2.1 * (-1) ** i
    return bias


def of_qwens(test):
    return pytest.mark.parametrize("name", [n for n in TINY if n.startswith("Qwen")], scope="module")(test)


def of_llava_next(test):
    return pytest.mark.parametrize("name", ["LLaVA-NeXT"], scope="module")(test)


# --- the bias ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_without_bias_nothing_changes_to_the_bit(name: str, inputs, implementation: str) -> None:
    model = TINY[name].make_model(implementation)
    with torch.no_grad():
        before, tokens = model(**inputs).logits, model.generate(**inputs, **GREEDY)
        with finegrain_ops.patch(model):
            assert torch.equal(model(**inputs).logits, before)
            assert torch.equal(model.generate(**inputs, **GREEDY), tokens)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_with_bias_equals_eager_attention_with_the_bias_in_its_mask(name, inputs, bias, implementation: str) -> None:
    model = TINY[name].make_model(implementation)
    real = inputs["attention_mask"].bool()
    labels = inputs["input_ids"].masked_fill((inputs["input_ids"] >= IMAGE_TOKEN - 3) | (inputs["input_ids"] < 4), -100)
    with torch.no_grad():
        with EagerOracle(model, bias):
            expected = model(**inputs, labels=labels)
        with finegrain_ops.patch(model):
            actual, plain = model(**inputs, labels=labels, key_bias=bias), model(**inputs).logits
    assert (actual.logits - expected.logits)[real].abs().max() < 5e-5
    assert (actual.logits - plain)[real].abs().max() > 1.0  # the bias matters here
    torch.testing.assert_close(actual.loss, expected.loss)


GENERATION: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beam": {"num_beams": 3},
    "several sequences": {"do_sample": True, "num_return_sequences": 2},
    "static cache": {"cache_implementation": "static"},
}


@pytest.mark.parametrize("options", GENERATION.values(), ids=GENERATION)
def test_generate_equals_the_oracle(model, inputs, bias, options: dict) -> None:
    """Token for token, in a left-padded batch of different images, questions and biases."""
    arguments = {**inputs, **GREEDY, **options}
    torch.manual_seed(3)
    with EagerOracle(model, bias):
        expected = model.generate(**arguments)
    torch.manual_seed(3)
    with finegrain_ops.patch(model):
        actual = model.generate(**arguments, key_bias=bias)
    assert torch.equal(actual, expected)
    torch.manual_seed(3)
    assert not torch.equal(model.generate(**arguments), expected)  # without the bias it says something else


def weights(kind: str, model: Any) -> float | Tensor:
    config = model.config.text_config
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    of_all = torch.linspace(0.1, 8.0, layers * heads).reshape(layers, heads)
    return {"none": 0.0, "heads": of_all[:1], "layers": of_all[:, 1:2], "layers and heads": of_all}[kind]


def after_last_image(inputs) -> Tensor:
    """(B, P) bool. The newline behind the last token of an image of LLaVA-NeXT is still the image's."""
    return (inputs["input_ids"] == IMAGE_TOKEN).flip(1).cumsum(1).flip(1) == 0


@pytest.mark.parametrize("gated", [False, True], ids=["all rows", "rows after the image"])
@pytest.mark.parametrize("kind", ["none", "heads", "layers", "layers and heads"])
def test_biases_per_head_and_layer_and_row_gates(model, processor, inputs, kind: str, gated: bool) -> None:
    """key_bias and row_gate as the handle makes them; weight 0 is a bias of -inf."""
    with torch.no_grad(), finegrain_ops.patch(model, processor) as handle:
        bias = handle.key_bias(inputs, BOXES, IMAGE_SIZES, weight=weights(kind, model))
        gate = handle.row_gate(inputs) if gated else None
        actual = model(**inputs, key_bias=bias, row_gate=gate).logits
        plain = model(**inputs).logits
        tokens = model.generate(**inputs, **GREEDY, key_bias=bias, row_gate=gate)
    if bias.dim() == 4 and bias.shape[1] == 1:
        bias = bias[:, 0]  # (B, H, P) means the same
        with torch.no_grad(), finegrain_ops.patch(model):
            assert torch.equal(model(**inputs, key_bias=bias, row_gate=gate).logits, actual)
    with torch.no_grad(), EagerOracle(model, bias, gate):
        expected = model(**inputs).logits
        expected_tokens = model.generate(**inputs, **GREEDY)
    after_image = after_last_image(inputs)
    real = inputs["attention_mask"].bool() & (after_image if kind == "none" else True)
    assert (actual - expected)[real].abs().max() < 5e-5
    assert (actual - plain)[after_image].abs().max() > 0.5
    assert torch.equal(tokens, expected_tokens)
    if gated:
        assert (actual - plain)[~after_image & inputs["attention_mask"].bool()].abs().max() < 5e-5


def state(model: Any) -> list[Any]:
    """Every attribute of every module, by identity; but for what Qwen's models keep of their last forward pass."""
    modules = [(n, {k: id(v) for k, v in m.__dict__.items() if k != "rope_deltas"}) for n, m in model.named_modules()]
    return [*modules, model.config.to_dict()]


def test_remove_restores_exactly(name: str, inputs, bias) -> None:
    model = TINY[name].make_model()
    with torch.no_grad():
        model(**inputs)  # transformers itself puts hooks on a model in its first forward
        before = state(model)
        with finegrain_ops.patch(model):
            assert state(model) != before
            model(**inputs, key_bias=bias)
        assert state(model) == before
        with pytest.raises(ValueError, match="key_bias: expected one row per sequence"), finegrain_ops.patch(model):
            model(**inputs, key_bias=bias[:1])
    assert state(model) == before


def test_typing_errors_are_still_refused(model, inputs, bias) -> None:
    with finegrain_ops.patch(model), pytest.raises(ValueError, match="key_bais"):
        model.generate(**inputs, key_bais=bias, max_new_tokens=1)
    with pytest.raises(ValueError, match="key_bias"):  # and key_bias itself, when not patched
        model.generate(**inputs, key_bias=bias, max_new_tokens=1)


@of_qwens
def test_the_vision_encoder_gets_none_of_our_keywords(model, inputs, bias) -> None:
    """In transformers 5 these models hand all their keywords on to it."""
    vision = finegrain_ops.patch(model).family.vision_encoder(model)
    seen = []
    hooks = [
        module.register_forward_pre_hook(lambda _, args, kwargs: seen.append(set(kwargs)), with_kwargs=True)
        for module in vision.modules()
        if module is not vision
    ]
    try:
        with torch.no_grad():
            model(**inputs, key_bias=bias, row_gate=bias == 0, attention_reader=lambda call: None)
    finally:
        for hook in hooks:
            hook.remove()
        model._finegrain_handle.remove()
    assert len(seen) > 10
    assert not {"key_bias", "row_gate", "attention_reader"} & set().union(*seen)


@of_qwens
def test_sliding_windows_are_refused(name: str, inputs, bias) -> None:
    if name == "Qwen3-VL":
        assert not hasattr(TINY[name].make_model().model.language_model.layers[0].self_attn, "sliding_window")
        return
    model = TINY[name].make_model(use_sliding_window=True, sliding_window=8, max_window_layers=2)
    with torch.no_grad(), finegrain_ops.patch(model):
        model(**inputs)
        with pytest.raises(UnsupportedInputError, match="sliding_window"):
            model(**inputs, key_bias=bias)


# --- regions -----------------------------------------------------------------------------------------------------


def expected_grids(name: str, size: tuple[int, int]) -> tuple[families.ImageGrid, ...]:
    if name == "LLaVA-1.5":
        return (families.llava(size, side=SIDE, patch_size=PATCH),)
    if name == "LLaVA-NeXT":
        return families.llava_next(size, side=SIDE, patch_size=PATCH, grid_pinpoints=PINPOINTS)
    return (families.ImageGrid(PixelMap.of_image(size).smart_resize(8, 64 * 4, 64 * 36), (8, 8)),)


def expected_of_image(name: str, boxes: list, size: tuple[int, int]) -> Tensor:
    """(number of its tokens,) int: 1 in the region, 0 beside it, -1 where a token shows no place."""
    grids = expected_grids(name, size)
    masks = [grid.masks(boxes).any(0).int() for grid in grids]
    masks[1:] = [torch.nn.functional.pad(mask, (0, 1), value=-1) for mask in masks[1:]]  # newlines
    return torch.cat([mask.flatten() for mask in masks])


def test_regions_of_different_images_in_one_batch(name: str, model, processor, inputs) -> None:
    with finegrain_ops.patch(model, processor) as handle:
        mask = handle.region_mask(inputs, BOXES, IMAGE_SIZES)
        soft = handle.region_mask(inputs, BOXES, IMAGE_SIZES, soft=True)
        image_keys = handle.family.image_keys(model, inputs)
        bias = handle.key_bias(inputs, BOXES, IMAGE_SIZES, weight=0.5, complement="image")
    is_image = inputs["input_ids"] == IMAGE_TOKEN
    expected = torch.cat([expected_of_image(name, *image) for image in zip(BOXES, IMAGE_SIZES)])
    assert torch.equal(mask[is_image], expected == 1)
    assert torch.equal(image_keys[is_image], expected >= 0)
    assert not (mask | image_keys)[~is_image].any()
    assert torch.equal(soft > 0, mask)
    assert torch.equal(bias != 0, image_keys & ~mask)
    assert (mask.sum(1) > 3).all()  # of both prompts
    if name == "LLaVA-NeXT":
        assert (is_image & ~image_keys).sum() > 10  # newlines


def test_no_boxes_and_row_gates(model, processor, inputs) -> None:
    with finegrain_ops.patch(model, processor) as handle:
        assert not handle.region_mask(inputs, [[], [], []], IMAGE_SIZES).any()
        assert torch.equal(handle.row_gate(inputs), after_last_image(inputs))


def test_a_prompt_without_images(model, processor) -> None:
    inputs = {"input_ids": torch.tensor([[1, 5, 6]]), "attention_mask": torch.ones(1, 3, dtype=torch.int64)}
    with torch.no_grad(), finegrain_ops.patch(model, processor) as handle:
        assert handle.region_mask(inputs, [], []).tolist() == [[False] * 3]
        assert handle.attention_map(inputs).tolist() == [[0.0] * 3]


BAD_SIZES = {
    "too few": (IMAGE_SIZES[:2], r"image_sizes: expected one for each of the 3 images"),
    "in another order": ([IMAGE_SIZES[1], IMAGE_SIZES[0], IMAGE_SIZES[2]], r"image_sizes\[0\]: "),
    "one that is another": ([*IMAGE_SIZES[:2], (200, 60)], r"image_sizes\[2\]: "),
}


@pytest.mark.parametrize(("sizes", "message"), BAD_SIZES.values(), ids=BAD_SIZES)
@pytest.mark.parametrize("name", [n for n in TINY if n != "LLaVA-1.5"], scope="module")
def test_image_sizes_that_are_not_those_of_inputs(model, processor, inputs, sizes, message: str) -> None:
    with finegrain_ops.patch(model, processor) as handle, pytest.raises(ValueError, match=message):
        handle.region_mask(inputs, [[] for _ in sizes], sizes)


@pytest.mark.parametrize("name", [n for n in TINY if n != "LLaVA-1.5"], scope="module")
def test_a_processor_of_another_family(name: str, model, inputs) -> None:
    other = "Qwen2-VL" if name == "LLaVA-NeXT" else "LLaVA-NeXT"
    message = "processor: expected an image processor with the model's (image_grid_pinpoints|patch_size)"
    with (
        finegrain_ops.patch(model, TINY[other].make_processor()) as handle,
        pytest.raises(ValueError, match=message),
    ):
        handle.region_mask(inputs, BOXES, IMAGE_SIZES)


@of_llava_next
@pytest.mark.parametrize("attribute", ["size", "crop_size"])
def test_tiles_of_another_size(name: str, model, inputs, attribute: str) -> None:
    processor = TINY[name].make_processor()
    setattr(processor.image_processor, attribute, {"height": 30, "width": 30})
    message = f"processor: expected {attribute} of 24, the side of the model's tiles"
    with finegrain_ops.patch(model, processor) as handle, pytest.raises(ValueError, match=message):
        handle.region_mask(inputs, BOXES, IMAGE_SIZES)


@pytest.mark.parametrize("name", [n for n in TINY if n != "LLaVA-1.5"], scope="module")
def test_inputs_without_what_tells_the_grids(name: str, model, processor, inputs) -> None:
    missing = "image_sizes" if name == "LLaVA-NeXT" else "image_grid_thw"
    without = {k: v for k, v in inputs.items() if k != missing}
    with finegrain_ops.patch(model, processor) as handle, pytest.raises(ValueError, match="image_sizes"):
        handle.region_mask(without, BOXES, IMAGE_SIZES)


@pytest.mark.parametrize("name", [n for n in TINY if n != "LLaVA-1.5"], scope="module")
def test_inputs_that_lost_image_tokens(name: str, model, processor, inputs) -> None:
    cut = {**inputs, "input_ids": inputs["input_ids"].masked_fill(torch.arange(inputs["input_ids"].shape[1]) == 20, 5)}
    with finegrain_ops.patch(model, processor) as handle:
        with pytest.raises(ValueError, match=r"inputs: expected \d+ image tokens for the 3 images"):
            handle.region_mask(cut, BOXES, IMAGE_SIZES)
        if name == "LLaVA-NeXT":
            with pytest.raises(ValueError, match=r"inputs: expected \d+ image tokens for the 3 images"):
                handle.row_gate(cut)


@of_llava_next
def test_every_token_of_a_tile_is_where_the_model_puts_it(name: str, model) -> None:
    """`_packed` compares families.llava_next with pack_image_features, token by token: here for many sizes."""
    from finegrain_ops.integrations import llava_next

    sizes = [(h, w) for h in range(7, 150, 9) for w in range(5, 160, 13)] + [(1, 90), (90, 1), (24, 24), (4000, 3001)]
    for size in sizes:
        base, tiles = llava_next._grids(model, size)
        packed = llava_next._packed(model, size, (base, tiles))
        assert len(packed) == base.num_keys + tiles.num_keys + tiles.shape[0]
    assert len({tuple(llava_next._grids(model, size)[1].shape) for size in sizes}) > 20


@of_llava_next
def test_another_way_to_put_tiles_together_is_refused(model, processor, inputs, monkeypatch) -> None:
    monkeypatch.setattr(sys.modules[type(model).__module__], "unpad_image", lambda features, size: features)
    with (
        finegrain_ops.patch(model, processor) as handle,
        pytest.raises(UnsupportedModelError, match="this version of transformers puts the tiles of an image"),
    ):
        handle.region_mask(inputs, BOXES, IMAGE_SIZES)


def test_box_conventions(name: str, model, processor) -> None:
    with finegrain_ops.patch(model, processor) as handle:
        assert handle.family.box_convention(processor) == TINY[name].box_convention


# --- reading attention -------------------------------------------------------------------------------------------


def eager_attention(name: str, inputs) -> Tensor:
    """(B, layers, H, P, P) of the unpatched model."""
    model = TINY[name].make_model("eager")
    seen = []
    hooks = [
        layer.self_attn.register_forward_hook(lambda module, args, output: seen.append(output[1]))
        for layer in model.model.language_model.layers
    ]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    return torch.stack(seen, 1)


def test_attention_map_is_that_of_eager_attention(name: str, model, processor, inputs) -> None:
    attention = eager_attention(name, inputs)
    real = inputs["attention_mask"].bool()
    with torch.no_grad(), finegrain_ops.patch(model, processor) as handle:
        keys = handle.family.image_keys(model, inputs)
        every = handle.attention_map(inputs)
        last = handle.attention_map(inputs, rows=-1, layers=-1, reduction="none")
    expected = (attention * real[:, None, None, :, None]).sum((1, 2, 3)) * keys
    torch.testing.assert_close(every, expected, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(last, attention[:, -1:, :, -1] * keys[:, None, None], atol=1e-5, rtol=1e-5)
    assert expected.sum() > 10


def test_image_maps_lose_nothing(name: str, model, processor, inputs) -> None:
    """Not even in LLaVA-NeXT, where the grid of the whole image reaches beyond that of the tiles."""
    with torch.no_grad(), finegrain_ops.patch(model, processor) as handle:
        attention = handle.attention_map(inputs)
        maps = handle.image_maps(inputs, attention, IMAGE_SIZES)
    is_image = inputs["input_ids"] == IMAGE_TOKEN
    counts = [len(expected_of_image(name, [], size)) for size in IMAGE_SIZES]
    sums = torch.stack([of_image.sum() for of_image in attention[is_image].split(counts)])
    torch.testing.assert_close(torch.stack([m.values.sum() for m in maps]), sums, rtol=1e-5, atol=0)
    assert [tuple(m.values.shape) for m in maps] == [expected_grids(name, size)[-1].shape for size in IMAGE_SIZES]
