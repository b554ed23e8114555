"""Qwen-VL: `patch` on a small stand-in for the checkpoints' own code, against attention with the bias in its scores."""

from __future__ import annotations

import copy
import inspect
import threading

import pytest
import torch
import torch.nn.functional as F
import transformers

import finegrain_ops
from finegrain_ops import UnsupportedInputError, UnsupportedModelError
from finegrain_ops.families import qwen_vl
from finegrain_ops.integrations.family import family_of
from qwen_vl_stand_in import IMAGE_START, Oracle, make_inputs, make_model

TOKENIZER = "any object: the geometry needs nothing of it"
STEPS = 6


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture
def inputs():
    """Left-padded; the first image starts behind the padding, the second behind text."""
    return make_inputs(["cat.png", 5], [4, "a/d\u00f6g.png", 7])


@pytest.fixture
def bias(inputs):
    return make_bias(inputs)


def make_bias(inputs, strength: float = 3.0) -> torch.Tensor:
    """(B, P): in every row another region of the image, and another sign."""
    ids = inputs["input_ids"]
    bias = torch.zeros(ids.shape)
    for i, start in (ids == IMAGE_START).nonzero().tolist():
        bias[i, start + 41 : start + 101 + 30 * i] = strength * (-1) ** i
    return bias


def oracle_logits(model, inputs, bias, gate=None) -> torch.Tensor:
    with torch.no_grad(), Oracle(model, bias, inputs["attention_mask"], gate):
        return model(**inputs).logits


def assert_same(actual, expected, inputs, rows=slice(None)) -> None:
    real = inputs["attention_mask"].bool()[:, rows]
    torch.testing.assert_close(actual[real], expected[real], atol=5e-5, rtol=0)


# --- one pass ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seq_length", [2048, 100], ids=["within seq_length", "queries scaled by log n"])
def test_one_pass(inputs, bias, seq_length: int) -> None:
    model = make_model(seq_length=seq_length)
    expected = oracle_logits(model, inputs, bias)
    with torch.no_grad():
        plain = model(**inputs).logits
        with finegrain_ops.patch(model):
            assert torch.equal(model(**inputs).logits, plain)
            assert torch.equal(model(**inputs, key_bias=None).logits, plain)
            assert_same(model(**inputs, key_bias=bias).logits, expected, inputs)
            assert_same(
                model(inputs["input_ids"], None, inputs["attention_mask"], key_bias=bias).logits, expected, inputs
            )
        assert (plain - expected)[:, -3:].abs().max() > 0.5  # the bias matters here
        model.transformer.h[0].attn.use_logn_attn = False
        assert torch.equal(model(**inputs).logits, plain) == (seq_length == 2048)


BIASES = {
    "per head": lambda bias: bias[:, None] * torch.tensor([1.0, -1.0, 0.0, 0.5])[:, None],
    "per layer": lambda bias: bias[:, None, None] * torch.tensor([0.0, 1.0, -0.5])[:, None, None],
    "per layer and head": lambda bias: bias[:, None, None] * torch.linspace(-1, 1, 12).view(3, 4, 1),
    "one layer for all": lambda bias: bias[:, None, None] * torch.tensor([1.0, -1.0, 0.0, 0.5])[None, :, None],
    "-inf": lambda bias: bias.masked_fill(bias != 0, float("-inf")),
}


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("of_bias", BIASES.values(), ids=BIASES)
def test_biases_of_all_shapes(model, inputs, bias, of_bias, gated: bool) -> None:
    bias = of_bias(bias)
    with torch.no_grad(), finegrain_ops.patch(model) as handle:
        gate = handle.row_gate(inputs) if gated else None
        actual = model(**inputs, key_bias=bias, row_gate=gate).logits
        other = model(**inputs, key_bias=bias if gated else torch.zeros_like(bias)).logits
    if gated:
        assert gate.sum(1).tolist() == [6, 8]  # the image's end, and the text after it
    assert_same(actual, oracle_logits(model, inputs, bias, gate), inputs)
    assert (actual - other)[:, -1].abs().max() > 0.01


def test_without_a_mask(model) -> None:
    inputs = make_inputs(["cat.png", 4])
    bias = make_bias(inputs)
    expected = oracle_logits(model, inputs, bias)
    with torch.no_grad(), finegrain_ops.patch(model):
        assert_same(model(inputs["input_ids"], key_bias=bias).logits, expected, inputs)


def test_the_scale_of_a_model_without_one(inputs, bias) -> None:
    """scale_attn_weights=False means softmax(Q K^T)."""
    model = make_model()
    expected = oracle_logits(model, inputs, bias)
    for block in model.transformer.h:
        block.attn.scale_attn_weights = False
        block.attn.c_attn.weight.data[:32] /= 8**0.5  # the queries
        block.attn.c_attn.bias.data[:32] /= 8**0.5
    with torch.no_grad(), finegrain_ops.patch(model):
        assert_same(model(**inputs, key_bias=bias).logits, expected, inputs)


# --- caches and generation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_new", [1, 4])
def test_steps_on_a_cache_equal_one_pass(model, inputs, bias, num_new: int) -> None:
    """Several new tokens at once too, for which the model itself makes a mask that does not fit."""
    cut = inputs["input_ids"].shape[1] - 4
    start = {name: tensor[:, :cut] for name, tensor in inputs.items()}
    gate = torch.rand(inputs["input_ids"].shape, generator=torch.Generator().manual_seed(2)) < 0.5
    expected = oracle_logits(model, inputs, bias, gate)
    with torch.no_grad(), finegrain_ops.patch(model):
        cache = model(**start, key_bias=bias, row_gate=gate).past_key_values
        assert cache[0][0].shape == (2, cut, 4, 8)
        logits = []
        for at in range(cut, cut + 4, num_new):
            step = {"input_ids": inputs["input_ids"][:, at : at + num_new], "past_key_values": cache}
            step["attention_mask"] = inputs["attention_mask"][:, : at + num_new]
            if num_new > 1:
                with pytest.raises(RuntimeError, match="The size of tensor"):
                    model(**step)
            output = model(**step, key_bias=bias[:, :cut], row_gate=gate)  # 0 beyond its end
            cache = output.past_key_values
            logits.append(output.logits)
    assert not bias[:, cut:].any()
    assert_same(torch.cat(logits, 1), expected[:, cut:], inputs, slice(cut, None))


def greedy(model, inputs, **patched) -> torch.Tensor:
    """(B, STEPS) new tokens, as generate goes through prepare_inputs_for_generation and forward."""
    ids, mask, cache = inputs["input_ids"], inputs["attention_mask"], None
    for _ in range(STEPS):
        arguments = model.prepare_inputs_for_generation(
            ids, past_key_values=cache, attention_mask=mask, use_cache=True, **patched
        )
        output = model(**arguments)
        cache = output.past_key_values
        ids = torch.cat([ids, output.logits[:, -1, :256].argmax(-1, keepdim=True)], 1)  # no new images
        mask = F.pad(mask, (0, 1), value=1)
    return ids[:, -STEPS:]


def beam_search(model, inputs, beams: int = 3, **patched) -> torch.Tensor:
    """(B, STEPS) new tokens of the best beam; all inputs are repeated as generate does."""
    ids, mask = (inputs[name].repeat_interleave(beams, 0) for name in ("input_ids", "attention_mask"))
    patched = {name: tensor.repeat_interleave(beams, 0) for name, tensor in patched.items()}
    batch, cache = len(ids) // beams, None
    scores = torch.full((batch, beams), -1e9)
    scores[:, 0] = 0.0
    for _ in range(STEPS):
        arguments = model.prepare_inputs_for_generation(
            ids, past_key_values=cache, attention_mask=mask, use_cache=True, **patched
        )
        output = model(**arguments)
        total = scores[..., None] + output.logits[:, -1, :256].log_softmax(-1).view(batch, beams, 256)
        scores, best = total.flatten(1).topk(beams)
        order = (best // 256 + torch.arange(batch)[:, None] * beams).flatten()
        cache = model._reorder_cache(output.past_key_values, order)
        ids, mask = torch.cat([ids[order], best.view(-1, 1) % 256], 1), F.pad(mask, (0, 1), value=1)
    return ids.view(batch, beams, -1)[:, 0, -STEPS:]


@pytest.mark.parametrize("generate", [greedy, beam_search])
@pytest.mark.parametrize("gated", [False, True])
def test_generation_equals_the_oracle(model, inputs, bias, generate, gated: bool) -> None:
    with torch.no_grad(), finegrain_ops.patch(model) as handle:
        patched = {"key_bias": bias, "row_gate": handle.row_gate(inputs)} if gated else {"key_bias": bias}
        actual, plain = generate(model, inputs, **patched), generate(model, inputs)
    with torch.no_grad(), Oracle(model, bias, inputs["attention_mask"], patched.get("row_gate")):
        assert torch.equal(actual, generate(model, inputs))
    with torch.no_grad():
        assert torch.equal(plain, generate(model, inputs))
    assert not torch.equal(actual, plain)


def test_prepared_inputs_stay_what_they_were_without_a_bias(model, inputs) -> None:
    arguments = {"attention_mask": inputs["attention_mask"], "use_cache": True}
    before = model.prepare_inputs_for_generation(inputs["input_ids"], **arguments)
    with finegrain_ops.patch(model):
        after = model.prepare_inputs_for_generation(inputs["input_ids"], **arguments)
    assert after == before


def test_signatures(model) -> None:
    """generate reads them: which keywords it takes, and which of them it hands on."""
    methods = (model.forward, model.prepare_inputs_for_generation)
    forward, prepare = (list(inspect.signature(method).parameters) for method in methods)
    with finegrain_ops.patch(model):
        assert list(inspect.signature(model.forward).parameters) == [*forward, "key_bias", "row_gate"]
        assert list(inspect.signature(model.prepare_inputs_for_generation).parameters) == prepare


def test_the_empty_cache_of_generate_becomes_none(model, inputs) -> None:
    """The model knows caches as tuples only; what it returned itself is handed back to it as it is."""
    ids, cache = inputs["input_ids"], ((torch.zeros(2, 1, 4, 8),) * 2,) * 3
    with finegrain_ops.patch(model):
        first = model.prepare_inputs_for_generation(ids, past_key_values=transformers.DynamicCache())
        second = model.prepare_inputs_for_generation(ids, past_key_values=cache)
    assert first["past_key_values"] is None
    assert second["past_key_values"] is cache


# --- gradients, threads, copies ----------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients(inputs, bias, checkpointing: bool) -> None:
    """Recomputing a layer for its gradients happens after the forward pass has returned."""
    model = make_model().train()
    labels = inputs["input_ids"].masked_fill((inputs["attention_mask"] == 0) | (inputs["input_ids"] > 255), -100)

    def gradients(leaf, **patched) -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(**inputs, labels=labels, use_cache=False, **patched).loss.backward()
        parameters = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return {**parameters, "key_bias": leaf.grad}

    leaf = bias.clone().requires_grad_()
    with Oracle(model, leaf, inputs["attention_mask"]):
        expected = gradients(leaf)
    model.transformer.gradient_checkpointing = checkpointing
    leaf = bias.clone().requires_grad_()
    with finegrain_ops.patch(model):
        actual = gradients(leaf, key_bias=leaf)
    assert actual.keys() == expected.keys()
    for name, gradient in actual.items():
        atol = 1e-4 * float(expected[name].abs().max())
        torch.testing.assert_close(gradient, expected[name], atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_two_threads_with_different_biases(model, inputs, bias) -> None:
    biases = [bias, -bias, None]
    results: dict[tuple[int, int], torch.Tensor] = {}
    with torch.no_grad(), finegrain_ops.patch(model):
        expected = [model(**inputs, key_bias=b).logits for b in biases]

        def work(i: int) -> None:
            with torch.no_grad():
                for repeat in range(5):
                    results[i, repeat] = model(**inputs, key_bias=biases[i]).logits

        threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(results) == 15
    assert all(torch.equal(logits, expected[i]) for (i, _), logits in results.items())
    assert not torch.equal(expected[0], expected[1])


def test_a_pass_that_fails_leaves_no_bias_behind(model, inputs, bias) -> None:
    with torch.no_grad(), finegrain_ops.patch(model):
        plain = model(**inputs).logits

        def fail(call) -> None:
            raise RuntimeError("from inside a layer")

        with pytest.raises(RuntimeError, match="from inside a layer"):
            model(**inputs, key_bias=bias, attention_reader=fail)
        assert torch.equal(model(**inputs).logits, plain)


def test_a_deep_copy_is_patched_on_its_own(inputs, bias) -> None:
    model = make_model()
    with torch.no_grad(), finegrain_ops.patch(model):
        expected = [model(**inputs, key_bias=b).logits for b in (bias, None)]
        duplicate = copy.deepcopy(model)
    for module in list(model.modules()):
        module.__dict__.clear()  # the copy must not reach back
    with torch.no_grad():
        for b, logits in zip((bias, None), expected):
            assert torch.equal(duplicate(**inputs, key_bias=b).logits, logits)
        duplicate._finegrain_handle.remove()
    assert "forward" not in duplicate.__dict__


def state(model) -> list[tuple[str, dict[str, int]]]:
    """Every attribute of every module, by identity, and the configuration."""
    modules = [(n, {k: id(v) for k, v in m.__dict__.items()}) for n, m in model.named_modules()]
    return [*modules, ("config", model.config.to_dict())]


def test_remove_restores_exactly(model, inputs, bias) -> None:
    before = state(model)
    with torch.no_grad(), finegrain_ops.patch(model):
        patched = state(model)
        model(**inputs, key_bias=bias)
    assert state(model) == before
    changed = {name for (name, was), (_, now) in zip(before, patched) if was != now}
    assert changed == {"", "transformer", *(f"transformer.h.{i}.attn" for i in range(3))}
    with pytest.raises(ValueError, match="key_bias: expected one row per sequence"), finegrain_ops.patch(model):
        model(**inputs, key_bias=bias[:1])
    assert state(model) == before


# --- the handle --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steered", [False, True])
def test_attention_map_equals_the_oracle(model, inputs, bias, steered: bool) -> None:
    bias = bias if steered else torch.zeros_like(bias)
    mask = inputs["attention_mask"].bool()
    oracle = Oracle(model, bias, mask)
    with torch.no_grad(), oracle:
        model(**inputs)
    per_layer = torch.stack([oracle.probabilities[i] for i in range(3)], 1)  # (B, L, H, Q, K)
    image = torch.zeros_like(mask)
    for i, start in (inputs["input_ids"] == IMAGE_START).nonzero().tolist():
        image[i, start + 1 : start + 257] = True
    caches = []
    hook = model.transformer.register_forward_hook(lambda module, arguments, outputs: caches.append(outputs[1]))
    with torch.no_grad(), finegrain_ops.patch(model) as handle:
        key_bias = bias if steered else None
        everywhere = handle.attention_map(inputs, key_bias=key_bias)
        last = handle.attention_map(inputs, rows=-1, layers=[2, 0], key_bias=key_bias, reduction="none")
    hook.remove()
    assert caches == [None, None]  # reading keeps none
    expected = (per_layer * mask[:, None, None, :, None]).sum((1, 2, 3)) * image
    torch.testing.assert_close(everywhere, expected, atol=2e-4, rtol=0)  # sums of 12 x 268 probabilities
    torch.testing.assert_close(last, per_layer[:, [2, 0], :, -1] * image[:, None, None], atol=5e-6, rtol=0)
    assert everywhere.sum() > 100


def test_image_keys_and_boxes_of_two_images_in_one_prompt(model) -> None:
    inputs = make_inputs([3, "cat.png", 2, "cup.png", 4], ["a/d\u00f6g.png"])
    sizes, boxes = [(100, 160), (90, 90), (30, 70)], [[(0, 0, 40, 30)], [], [(35, 0, 70, 30), (0, 28, 1, 30)]]
    keys = family_of("qwen").image_keys(model, inputs)
    padding = 3 + 258 + 2 + 4
    expected = torch.zeros(inputs["input_ids"].shape, dtype=torch.bool)
    for row, start in ((0, 3), (0, 3 + 258 + 2), (1, padding)):
        expected[row, start + 1 : start + 257] = True
    assert torch.equal(keys, expected)
    with torch.no_grad(), finegrain_ops.patch(model, TOKENIZER) as handle:
        mask = handle.region_mask(inputs, boxes, sizes)
        assert torch.equal(mask[0, 4:260], qwen_vl(sizes[0]).masks(boxes[0])[0].flatten())
        assert mask[0, 4:260].view(16, 16)[:5, :4].all()  # 30 of 100 rows and 40 of 160 columns
        assert int(mask[0].sum()) == 20
        right, corner = qwen_vl(sizes[2]).masks(boxes[2])
        assert torch.equal(mask[1, padding + 1 : padding + 257], (right | corner).flatten())
        bias = handle.key_bias(inputs, boxes, sizes, weight=5.0)
        actual = model(**inputs, key_bias=bias).logits
        maps = handle.image_maps(inputs, handle.attention_map(inputs), sizes)
    assert len(maps) == 3
    assert_same(actual, oracle_logits(model, inputs, mask * torch.tensor(5.0).log(), None), inputs)


def test_pixels_behind_the_region(model) -> None:
    """The vision encoder takes pixels first, and the model reaches it through encode(paths)."""
    encoder = family_of("qwen").vision_encoder(model)
    seen = []
    hook = encoder.register_forward_hook(lambda module, arguments, output: seen.append((arguments[0], output)))
    with torch.no_grad():
        model(**make_inputs(["cup.png", 1]))
    hook.remove()
    ((pixels, embeddings),) = seen
    assert torch.equal(pixels[0], encoder.pictures["cup.png"])
    assert embeddings.shape == (1, 256, 32)


def test_box_convention() -> None:
    assert family_of("qwen").box_convention(TOKENIZER) == "permille"


# --- what is refused ---------------------------------------------------------------------------------------------


def test_inputs_that_do_not_fit_the_images(model) -> None:
    inputs = make_inputs([3, "cat.png", 2])
    box, size = [(0, 0, 9, 9)], (50, 50)
    with finegrain_ops.patch(model, TOKENIZER) as handle:
        with pytest.raises(ValueError, match="inputs: expected 2 images as in image_sizes, got 1 image_start_id"):
            handle.region_mask(inputs, [box, box], [size, size])
        shorter = {"input_ids": torch.cat([inputs["input_ids"][:, :100], inputs["input_ids"][:, 101:]], 1)}
        with pytest.raises(ValueError, match="inputs: expected 256 tokens between the start and the end of each image"):
            handle.region_mask(shorter, [box], [size])
        with pytest.raises(ValueError, match=r"the starts \[\[0, 3\]\] and the ends \[\]"):
            handle.region_mask({"input_ids": inputs["input_ids"][:, :-3]}, [box], [size])
    with finegrain_ops.patch(model) as handle, pytest.raises(ValueError, match=r"call patch\(model, processor\)"):
        handle.region_mask(inputs, [box], [size])


NO_IMAGES = {
    "no vision encoder": lambda model: delattr(model.transformer, "visual"),
    "no layers": lambda model: setattr(model.transformer, "h", torch.nn.ModuleList()),
    "other attention": lambda model: setattr(model.transformer.h[1], "attn", torch.nn.Identity()),
    "no transformer": lambda model: delattr(model, "transformer"),
}


@pytest.mark.parametrize("change", NO_IMAGES.values(), ids=NO_IMAGES)
def test_other_models_of_this_type_are_refused(change) -> None:
    model = make_model()
    change(model)
    before = state(model)
    with pytest.raises(UnsupportedModelError, match='has the model_type "qwen", but is not Qwen-VL'):
        finegrain_ops.patch(model)
    assert state(model) == before


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"head_mask": torch.ones(4, 1, 1)}, UnsupportedInputError, "head_mask; leave it out"),
        ({"output_attentions": True}, UnsupportedInputError, "output_attentions=True"),
        ({"attention_mask": torch.ones(2, 1, 269, 269)}, UnsupportedInputError, "needs a 2-D attention_mask"),
        ({"attention_mask": torch.ones(2, 9)}, ValueError, r"attention_mask: expected \(B, K\) over all 269 keys"),
        ({"key_bias": torch.zeros(2, 269).int()}, TypeError, "key_bias: expected a float tensor"),
        ({"key_bias": torch.zeros(3, 269)}, ValueError, "key_bias: expected one row per sequence, here 2"),
        ({"key_bias": torch.zeros(2, 3, 269)}, ValueError, "with L = 3 and H = 4, got shape"),
        ({"key_bias": torch.zeros(2, 2, 4, 269)}, ValueError, "with L = 3 and H = 4, got shape"),
        ({"row_gate": torch.ones(2, 269)}, TypeError, "row_gate: expected a bool tensor"),
        ({"key_bias": None, "attention_reader": print}, UnsupportedInputError, "attention_reader needs a key_bias"),
    ],
)
def test_wrong_arguments(model, inputs, bias, arguments: dict, error, message: str) -> None:
    with torch.no_grad(), finegrain_ops.patch(model), pytest.raises(error, match=message):
        model(**{**inputs, "key_bias": bias, **arguments})


def test_attention_dropout_while_training_is_refused(inputs, bias) -> None:
    model = make_model(attn_dropout_prob=0.1)
    with torch.no_grad(), finegrain_ops.patch(model):
        model(**inputs, key_bias=bias)
        model.train()
        model(**inputs)
        with pytest.raises(UnsupportedInputError, match="attn_dropout_prob=0, or call"):
            model(**inputs, key_bias=bias)


def test_a_layer_that_does_not_call_attn_is_refused(inputs, bias) -> None:
    """As flash attention does; the bias must not be lost there."""
    model = make_model()
    attention = model.transformer.h[1].attn
    attention.forward = lambda hidden_states, *masks: (hidden_states, None)
    with torch.no_grad(), finegrain_ops.patch(model):
        model(**inputs)
        with pytest.raises(UnsupportedInputError, match="1 of 3 layers attended without calling"):
            model(**inputs, key_bias=bias)


def test_a_quantized_cache_is_refused(inputs, bias) -> None:
    model = make_model(use_cache_quantization=True)
    with finegrain_ops.patch(model), pytest.raises(UnsupportedInputError, match="use_cache_quantization=False"):
        model(**inputs, key_bias=bias)
