"""The image's work done once: what comes out is what a run from scratch says, and what was not run is counted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor
from torch.utils import _pytree as pytree

import finegrain_ops
import qwen_vl_stand_in
import tiny_models
import tiny_qformer
from finegrain_ops import UnsupportedInputError, UnsupportedModelError
from finegrain_ops.methods.reuse import ImagePrefix, align_after_images, vision_once

FAMILIES = list(tiny_models.TINY)
SIZES = [(20, 40), (60, 24), (20, 30)]  # of the images: two in the first prompt, one in the second
GENERATION = {
    "max_new_tokens": 4,
    "suppress_tokens": [*range(tiny_models.IMAGE_TOKEN - 3, tiny_models.IMAGE_TOKEN + 1)],
    "return_dict_in_generate": True,
    "output_logits": True,
}
MODES = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "several beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "samples": {"do_sample": True, "num_return_sequences": 3},
}
QUESTIONS = (["w20 w21 w22 w23 w24", "w30"], ["w40", "w50 w51 w52"], ["w60 w61", "w70 w71"])


@pytest.fixture(scope="module")
def models() -> dict:
    return {}


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture
def model(family: str, models: dict):
    if family not in models:
        models[family] = tiny_models.TINY[family].make_model()
    return models[family]


def prompts(family: str, questions: list[str], seed: int = 0, sizes: list[tuple[int, int]] = SIZES) -> dict:
    """What the processor returns for two prompts, of which the first has two images (of two sizes: one) and less text
    before them.
    """
    tiny = tiny_models.TINY[family]
    generator = np.random.default_rng(seed)
    images = [Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]
    image = tiny.prompt_of_image
    first = f" w9 w10 {image}" * (len(sizes) - 2)
    texts = [f"<s> {image}{first} {questions[0]}", f"<s> w11 w12 w13 {image} {questions[1]}"]
    return dict(tiny.make_processor()(images=images, text=texts, padding=True, return_tensors="pt"))


def sizes_of(family: str, mode: str) -> list[tuple[int, int]]:
    """transformers 4.57 copies images one by one for beams, so a LLaVA's prompt with two sees them in the wrong order:
    no run from scratch to compare with.
    """
    scrambled = transformers.__version__ < "5" and family.startswith("LLaVA") and mode != "greedy"
    return SIZES[1:] if scrambled else SIZES


def generate(run, inputs: dict, mode: str = "greedy", **arguments):
    torch.manual_seed(3)
    return run(**inputs, **GENERATION, **MODES[mode], **arguments)


def from_prefix(prefix: ImagePrefix, inputs: dict, mode: str = "greedy", **arguments):
    torch.manual_seed(3)
    return prefix.generate(inputs, **GENERATION, **MODES[mode], **arguments)


def assert_same_output(output, expected) -> None:
    new = len(expected.logits)
    assert len(output.logits) == new == GENERATION["max_new_tokens"]
    assert torch.equal(output.sequences[:, -new:], expected.sequences[:, -new:])
    for logits, of_expected in zip(output.logits, expected.logits):
        torch.testing.assert_close(logits, of_expected, rtol=0, atol=1e-4)


class RowsThrough:
    """How many rows, over the batch, went through a module: (batch, positions) of every call."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.hook = module.register_forward_hook(lambda _, __, output: self.shapes.append(tuple(output.shape[:-1])))

    def __enter__(self) -> list[tuple[int, ...]]:
        return self.shapes

    def __exit__(self, *_: object) -> None:
        self.hook.remove()


def decoder_rows(model) -> RowsThrough:
    return RowsThrough(model.model.language_model.norm)


def encoder_rows(model) -> RowsThrough:
    """Inside of the vision encoder, where vision_once replaces nothing."""
    vision = finegrain_ops.integrations.family.family_of(model.config.model_type).vision_encoder(model)
    layer = next(m for m in vision.modules() if isinstance(m, torch.nn.LayerNorm) or "Norm" in type(m).__name__)
    return RowsThrough(layer)


def region(model, inputs: dict) -> Tensor:
    """A bias on some of the image tokens of each row, of different signs."""
    bias = torch.zeros(inputs["input_ids"].shape)
    for i, row in enumerate(inputs["input_ids"] == model.config.image_token_id):
        bias[i, row.nonzero()[1:5, 0]] = 2.5 * (-1) ** i
    return bias


def rows_after(prefix: ImagePrefix, inputs: dict) -> Tensor:
    return (torch.arange(inputs["input_ids"].shape[1]) >= prefix.length).expand(inputs["input_ids"].shape)


# --- align_after_images -----------------------------------------------------------------------------------------------


def test_aligned_prompts_say_the_same(family: str, model) -> None:
    inputs = prompts(family, QUESTIONS[0])
    aligned = align_after_images(inputs, model)
    is_image = aligned["input_ids"] == model.config.image_token_id
    assert len({int(row.nonzero()[-1, 0]) for row in is_image}) == 1
    before = inputs["input_ids"] == model.config.image_token_id
    assert len({int(row.nonzero()[-1, 0]) for row in before}) == 2, "the case is too easy"
    assert set(aligned) == set(inputs)
    for name, value in inputs.items():
        if value.shape == inputs["input_ids"].shape:
            for row in range(2):
                tokens, as_aligned = (inputs["attention_mask"][row] == 1), (aligned["attention_mask"][row] == 1)
                assert torch.equal(aligned[name][row, as_aligned], value[row, tokens]), name
        else:
            assert aligned[name] is value
    assert_same_output(generate(model.generate, aligned), generate(model.generate, inputs))
    again = align_after_images(aligned, model)
    assert all(torch.equal(again[name], aligned[name]) for name in aligned)


def test_padding_is_no_image_even_where_no_row_was_padded() -> None:
    """Rows of one length: the padding that aligning adds has to come from somewhere."""
    model = tiny_models.TINY["LLaVA-1.5"].make_model()
    image = [tiny_models.IMAGE_TOKEN] * 16
    ids = torch.tensor([[*image, 11, 12, 13], [21, 22, *image, 23]])
    aligned = align_after_images({"input_ids": ids}, model)
    assert aligned["input_ids"].tolist() == [[11, 11, *image, 11, 12, 13], [21, 22, *image, 21, 21, 23]]
    assert aligned["attention_mask"].tolist() == [[0, 0, *[1] * 19], [*[1] * 18, 0, 0, 1]]


def test_rows_without_image_or_text_after_it_are_refused(models: dict) -> None:
    model = tiny_models.TINY["LLaVA-1.5"].make_model()
    image = [tiny_models.IMAGE_TOKEN] * 16
    with pytest.raises(ValueError, match=r"no image token in rows \[1\]"):
        align_after_images({"input_ids": torch.tensor([[1, *image, 5], [1] * 18])}, model)
    with pytest.raises(ValueError, match=r"no text after its last image in rows \[0\]"):
        align_after_images({"input_ids": torch.tensor([[1, 5, *image], [1, *image, 5]])}, model)
    with pytest.raises(UnsupportedInputError, match="got videos among"):
        align_after_images({"input_ids": torch.tensor([[1, *image, 5]]), "pixel_values_videos": None}, model)


# --- ImagePrefix ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_branches_say_what_runs_from_scratch_say(family: str, model, mode: str) -> None:
    """Two questions from one prefix, with another batch's runs between: M-RoPE keeps state on the model."""
    sizes = sizes_of(family, mode)
    batches = [[prompts(family, q, *of) for q in QUESTIONS] for of in ((0, sizes), (1, sizes[::-1]))]
    aligned = [[align_after_images(inputs, model) for inputs in batch] for batch in batches]
    prefixes = [ImagePrefix.prefill(model, batch[0]) for batch in aligned]
    caches = [[(layer.keys.clone(), layer.values.clone()) for layer in prefix._cache.layers] for prefix in prefixes]
    for question in (0, 1):
        for i, j in ((0, 1), (1, 0)):
            expected = generate(model.generate, batches[i][question], mode)
            generate(model.generate, batches[j][2])
            assert_same_output(from_prefix(prefixes[i], aligned[i][question], mode), expected)
    for prefix, cache in zip(prefixes, caches):
        for layer, (keys, values) in zip(prefix._cache.layers, cache):
            assert torch.equal(layer.keys, keys)
            assert torch.equal(layer.values, values)


def test_only_the_columns_after_the_prefix_are_run(family: str, model) -> None:
    inputs = align_after_images(prompts(family, QUESTIONS[0]), model)
    others = align_after_images(prompts(family, QUESTIONS[1]), model)
    with encoder_rows(model) as in_encoder, decoder_rows(model) as in_decoder:
        prefix = ImagePrefix.prefill(model, inputs)
        assert in_decoder == [(2, prefix.length)]
        assert len(in_encoder) == 1
        for branch in (inputs, others):
            in_decoder.clear()
            from_prefix(prefix, branch)
            length = branch["input_ids"].shape[1]
            assert in_decoder == [(2, length - prefix.length), (2, 1), (2, 1), (2, 1)]
        in_decoder.clear()
        from_prefix(prefix, inputs, "beams")
        assert in_decoder[0] == (6, inputs["input_ids"].shape[1] - prefix.length)
        assert len(in_encoder) == 1


@pytest.mark.parametrize("mode", ["greedy", "beams"])
def test_branches_with_a_bias_after_the_image(family: str, model, mode: str) -> None:
    aligned = align_after_images(prompts(family, QUESTIONS[0], sizes=sizes_of(family, mode)), model)
    prefix = ImagePrefix.prefill(model, aligned)
    bias = region(model, aligned)
    plain = from_prefix(prefix, aligned, mode)
    with finegrain_ops.patch(model):
        gate = rows_after(prefix, aligned)
        expected = generate(model.generate, aligned, mode, key_bias=bias, row_gate=gate)
        for by_head in (bias, bias[:, None].expand(-1, 4, -1), bias[:, None, None].expand(-1, 3, 4, -1)):
            assert_same_output(from_prefix(prefix, aligned, mode, key_bias=by_head, row_gate=gate), expected)
        of_one_head = torch.zeros(2, 3, 4, gate.shape[1])
        of_one_head[:, 2, 3] = bias
        for open_row in (None, gate | (torch.arange(gate.shape[1]) == prefix.length - 1)):
            for some_bias in (bias, of_one_head[:, 2], of_one_head):
                with pytest.raises(ValueError, match="row_gate: expected a gate that closes every row of the prefix"):
                    from_prefix(prefix, aligned, key_bias=some_bias, row_gate=open_row)
        text_only = bias * gate  # keys that no row of the prefix sees: no gate is needed
        from_prefix(prefix, aligned, key_bias=text_only + gate)
    assert not torch.allclose(plain.logits[0], expected.logits[0], atol=1e-2), "the bias does nothing"
    assert_same_output(from_prefix(prefix, aligned, mode), plain)


def test_the_oracle_of_the_bias_agrees(family: str, model) -> None:
    """Against eager attention with the gated bias in its mask, without the patch."""
    aligned = align_after_images(prompts(family, QUESTIONS[1]), model)
    prefix = ImagePrefix.prefill(model, aligned)
    bias, gate = region(model, aligned), rows_after(prefix, aligned)
    with tiny_models.EagerOracle(model, bias, gate):
        expected = generate(model.generate, aligned)
    with finegrain_ops.patch(model):
        assert_same_output(from_prefix(prefix, aligned, key_bias=bias, row_gate=gate), expected)


def test_other_prompts_than_the_prefixs_are_refused() -> None:
    family = "Qwen2-VL"
    model = tiny_models.TINY[family].make_model()
    unaligned = prompts(family, QUESTIONS[0])
    with pytest.raises(ValueError, match="call align_after_images first"):
        ImagePrefix.prefill(model, unaligned)
    aligned = align_after_images(unaligned, model)
    prefix = ImagePrefix.prefill(model, aligned)
    text = {name: aligned[name] for name in ("input_ids", "attention_mask")}
    assert torch.equal(from_prefix(prefix, text).sequences, from_prefix(prefix, aligned).sequences)
    as_object = transformers.GenerationConfig(**{**GENERATION, **MODES["several beams"], "pad_token_id": 0})
    assert_same_output(
        prefix.generate(aligned, generation_config=as_object), from_prefix(prefix, aligned, "several beams")
    )

    def refused(kind: type[Exception], match: str, **changes) -> None:
        with pytest.raises(kind, match=match):
            from_prefix(prefix, {**aligned, **changes})

    other_text = aligned["input_ids"].clone()
    other_text[1, prefix.length - int((other_text == tiny_models.IMAGE_TOKEN)[1].sum()) - 2] = 5
    refused(ValueError, r"expected the prefix's .* got others in rows \[1\]", input_ids=other_text)
    other_mask = aligned["attention_mask"].clone()
    other_mask[0, prefix.length - 1] = 0
    refused(ValueError, r"got others in rows \[0\]", attention_mask=other_mask)
    late_image = aligned["input_ids"].clone()
    late_image[0, -1] = tiny_models.IMAGE_TOKEN
    refused(UnsupportedInputError, "image tokens after the prefix", input_ids=late_image)
    refused(ValueError, "pixel_values: expected that of the prefix", pixel_values=aligned["pixel_values"] + 1)
    refused(ValueError, "image_grid_thw: expected that of", image_grid_thw=aligned["image_grid_thw"] + 2)
    ended = {name: text[name][:, : prefix.length] for name in text}
    refused(ValueError, "rows of more than the prefix's", **ended)
    refused(ValueError, "expected 2 rows", **{name: text[name][:1] for name in text})
    bias = torch.zeros(aligned["input_ids"].shape)
    refused(ValueError, r"inputs: .* got \['key_bias'\] too", key_bias=bias)
    for arguments in ({"key_bias": bias[:, 1:]}, {"key_bias": bias, "row_gate": bias[:, 1:] == 0}):
        with pytest.raises(ValueError, match=r": expected \(B, P\) = .* as inputs are laid out"):
            from_prefix(prefix, aligned, **arguments)
    with pytest.raises(ValueError, match="use_cache: expected to be left"):
        from_prefix(prefix, aligned, use_cache=False)


def test_models_without_image_tokens_or_with_sliding_windows_are_refused() -> None:
    inputs = {"input_ids": torch.tensor([[1, 99, 99, 5]])}
    for name in ("instructblip", "blip-2"):
        with pytest.raises(UnsupportedModelError, match=rf"model_type '{name}'; use vision_once"):
            align_after_images(inputs, tiny_qformer.make_model(name))
    sliding = tiny_models.TINY["Qwen2-VL"].make_model(use_sliding_window=True, sliding_window=64, max_window_layers=1)
    aligned = align_after_images(prompts("Qwen2-VL", QUESTIONS[0]), sliding)
    with pytest.raises(UnsupportedModelError, match="DynamicSlidingWindowLayer"):
        ImagePrefix.prefill(sliding, aligned)


# --- vision_once ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["greedy", "beams"])
def test_two_prompts_encode_their_images_once(family: str, model, mode: str) -> None:
    first, second = (prompts(family, question) for question in QUESTIONS[:2])
    expected = [generate(model.generate, inputs, mode) for inputs in (first, second)]
    with encoder_rows(model) as alone:
        generate(model.generate, first)
    assert len(alone) == 1
    with vision_once(model) as memo, encoder_rows(model) as rows:
        assert_same_output(generate(model.generate, first, mode), expected[0])
        assert rows == alone, "beams are copies of the same images"
        assert_same_output(generate(model.generate, second, mode), expected[1])
        first["pixel_values"].view(-1)[1] += 5.0  # the same object, another image
        dotted = generate(model.generate, first)
        assert (memo.runs, len(rows)) == (2, 2)
    assert memo.reused > 0
    assert_same_output(dotted, generate(model.generate, first))
    with encoder_rows(model) as rows:
        generate(model.generate, first)
        generate(model.generate, first)
    assert len(rows) == 2, "outside of the context everything is computed"


@pytest.mark.parametrize("patched_first", [True, False])
def test_a_bias_does_not_touch_what_is_reused(family: str, model, patched_first: bool) -> None:
    inputs = prompts(family, QUESTIONS[0])
    bias = region(model, inputs)
    contexts = [finegrain_ops.patch, vision_once]
    with finegrain_ops.patch(model):
        expected = generate(model.generate, inputs), generate(model.generate, inputs, key_bias=bias)
    assert not torch.allclose(expected[0].logits[0], expected[1].logits[0], atol=1e-2), "the bias does nothing"
    with contexts[not patched_first](model), contexts[patched_first](model), encoder_rows(model) as rows:
        assert_same_output(generate(model.generate, inputs), expected[0])
        assert_same_output(generate(model.generate, inputs, key_bias=bias), expected[1])
        with torch.no_grad():
            model(**inputs, key_bias=bias)
        assert len(rows) == 1


def test_a_batch_of_old_and_new_images_encodes_the_new(family: str, model) -> None:
    tiny = tiny_models.TINY[family]
    processor = tiny.make_processor()
    generator = np.random.default_rng(0)
    images = [Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in SIZES]
    texts = [f"<s> {tiny.prompt_of_image} w{5 + i}" for i in range(3)]

    def logits(chosen: list[int]) -> Tensor:
        inputs = processor(
            images=[images[i] for i in chosen], text=[texts[i] for i in chosen], padding=True, return_tensors="pt"
        )
        with torch.no_grad():
            return model(**inputs).logits[:, -1]

    expected = logits([0, 1, 2, 1])
    with encoder_rows(model) as alone:
        logits([1])
    with vision_once(model, keep=0) as memo, encoder_rows(model) as rows:
        torch.testing.assert_close(logits([1, 1]), expected[[1, 1]], rtol=0, atol=1e-4)
        assert rows == alone
        for chosen, runs in (([0, 1], 2), ([0, 1, 2, 1], 3), ([1], 3), ([0], 4), ([2, 0], 5), ([0, 2], 5)):
            torch.testing.assert_close(logits(chosen), expected[chosen], rtol=0, atol=1e-4)
            assert memo.runs == len(rows) == runs, chosen
    with vision_once(model) as memo:
        for chosen, runs in (([0], 1), ([1], 2), ([0], 2), ([2], 3), ([1], 3), ([2, 0], 3)):
            torch.testing.assert_close(logits(chosen), expected[chosen], rtol=0, atol=1e-4)
            assert memo.runs == runs, chosen


def test_training_computes_every_call() -> None:
    model = tiny_models.TINY["LLaVA-1.5"].make_model()
    inputs = prompts("LLaVA-1.5", QUESTIONS[0])
    weight = next(p for name, p in model.named_parameters() if "vision" in name and "layers.0" in name)
    with vision_once(model) as memo:
        with torch.no_grad():
            model(**inputs)
        for runs in (2, 3):
            model.zero_grad()
            model(**inputs).logits.sum().backward()
            assert memo.runs == runs
            assert weight.grad.abs().max() > 0
        model.train()
        with torch.no_grad():
            model(**inputs)
        assert (memo.runs, memo.reused) == (4, 0)


def test_other_arguments_are_other_results() -> None:
    """Layers other than those asked for before."""
    model = tiny_models.TINY["LLaVA-1.5"].make_model()
    pixels = prompts("LLaVA-1.5", QUESTIONS[0])["pixel_values"]
    encoder = model.model.vision_tower
    with torch.no_grad(), vision_once(model) as memo:
        first = encoder(pixels, output_hidden_states=True)
        assert encoder(pixels).hidden_states is None
        again = encoder(pixel_values=pixels, output_hidden_states=True)
        assert (memo.runs, memo.reused) == (2, 3)
        assert again is not first
        again.pooler_output = None  # as transformers sets attributes on what it got
        last = encoder(pixels, output_hidden_states=True)
        assert torch.equal(last.pooler_output, first.pooler_output)
        assert all(torch.equal(a, b) for a, b in zip(last.hidden_states, first.hidden_states))
        half = encoder(pixels.double().float(), output_hidden_states=True)  # equal, in other memory
        assert memo.runs == 2
        assert torch.equal(half.last_hidden_state, first.last_hidden_state)


def test_the_same_patches_in_another_grid_are_another_image() -> None:
    model = tiny_models.TINY["Qwen2-VL"].make_model()
    patches = torch.randn(24, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(0))
    grids = [torch.tensor([[1, 4, 6]]), torch.tensor([[1, 6, 4]])]

    def encoded() -> list[Tensor]:
        return [pytree.tree_leaves(model.model.visual(patches, grid_thw=grid))[-1] for grid in grids]

    with torch.no_grad(), vision_once(model) as memo:
        once, again = encoded(), encoded()
    with torch.no_grad():
        expected = encoded()
    assert (memo.runs, memo.reused) == (2, 2)
    assert not torch.equal(*expected)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(expected, once, again))


def test_the_model_is_as_before_after_an_exception(family: str, model) -> None:
    vision = finegrain_ops.integrations.family.family_of(model.config.model_type).vision_encoder(model)
    before = dict(vars(vision))

    def fail() -> None:
        with vision_once(model):
            assert vars(vision) != before
            raise KeyError("within")

    with pytest.raises(KeyError, match="within"):
        fail()
    assert vars(vision) == before


@pytest.mark.parametrize("name", ["instructblip", "blip-2"])
def test_q_formers_reuse_what_their_vision_model_saw(name: str) -> None:
    model = tiny_qformer.make_model(name)
    inputs = tiny_qformer.make_inputs(model)
    keys = finegrain_ops.integrations.family.family_of(name).key_shape(model, inputs)
    bias = torch.zeros(keys)
    bias[:, 3:8] = 2.0
    run = {"max_new_tokens": 4, "do_sample": False}
    with finegrain_ops.patch(model):
        expected = model.generate(**inputs, **run), model.generate(**inputs, key_bias=bias, **run)
        with vision_once(model) as memo, encoder_rows(model) as rows:
            for i, bias_of_run in enumerate((None, bias)):
                steered = {} if bias_of_run is None else {"key_bias": bias_of_run}
                assert torch.equal(model.generate(**inputs, **steered, **run), expected[i])
            assert memo.runs == len(rows) == 1


def test_qwen_vl_encodes_the_pictures_of_its_paths_once() -> None:
    model = qwen_vl_stand_in.make_model()
    inputs = qwen_vl_stand_in.make_inputs([3, "cat.png", 4], ["cup.png", 6])
    others = qwen_vl_stand_in.make_inputs(["cup.png", 5], [2, "cat.png", 1])
    encoded: list[int] = []
    model.transformer.visual.conv1.register_forward_hook(lambda _, __, output: encoded.append(len(output)))
    with torch.no_grad():
        expected = [model(**prompt).logits for prompt in (inputs, others)]
        encoded.clear()
        with vision_once(model) as memo:
            for prompt, logits in zip((inputs, others), expected):
                torch.testing.assert_close(model(**prompt).logits, logits, rtol=0, atol=1e-4)
    assert encoded == [2]
    assert (memo.runs, memo.reused) == (1, 2)
    with pytest.raises(UnsupportedModelError, match="model_type 'qwen'; use vision_once"):
        align_after_images(inputs, model)


def test_unknown_families_are_refused() -> None:
    context = vision_once(torch.nn.Linear(2, 2))
    with pytest.raises(UnsupportedModelError, match="vision_once: expected a model of one of the families"):
        context.__enter__()
