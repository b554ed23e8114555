"""`patch` on a tiny LLaVA against eager attention with the bias in its 4-D mask; and that it leaves no trace."""

from __future__ import annotations

import copy
import gc
import inspect
import threading
import weakref

import pytest
import torch
import transformers

import finegrain_ops
from finegrain_ops import UnsupportedInputError, UnsupportedModelError
from tiny_llava import IMAGE_TOKEN, EagerOracle, make_bias, make_inputs, make_model

STOP = 2  # never generated, but prompt lookup wants an end-of-sequence token
GREEDY = {"max_new_tokens": 8, "do_sample": False, "suppress_tokens": [IMAGE_TOKEN, STOP], "eos_token_id": STOP}


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture
def inputs():
    return make_inputs()


@pytest.fixture
def bias(inputs):
    return make_bias(inputs["input_ids"])


def biased_eager_logits(model, inputs, bias) -> torch.Tensor:
    with torch.no_grad(), EagerOracle(model, bias):
        return model(**inputs).logits


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_without_bias_nothing_changes_to_the_bit(implementation: str, inputs) -> None:
    model = make_model(implementation)
    with torch.no_grad():
        before = model(**inputs).logits
        tokens = model.generate(**inputs, **GREEDY)
        with finegrain_ops.patch(model):
            assert torch.equal(model(**inputs).logits, before)
            assert torch.equal(model(**inputs, key_bias=None).logits, before)
            assert torch.equal(model.generate(**inputs, **GREEDY), tokens)
            model.set_attn_implementation("eager" if implementation == "sdpa" else "sdpa")
            switched = model(**inputs).logits  # a change made while patched takes effect
        assert torch.equal(model(**inputs).logits, switched)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_with_bias_equals_eager_attention_with_the_bias_in_its_mask(implementation: str, inputs, bias) -> None:
    model = make_model(implementation)
    expected = biased_eager_logits(model, inputs, bias)
    with torch.no_grad(), finegrain_ops.patch(model):
        actual, plain = model(**inputs, key_bias=bias).logits, model(**inputs).logits
    real = inputs["attention_mask"].bool()
    assert (actual - expected)[real].abs().max() < 5e-5
    assert (actual - plain)[real].abs().max() > 1.0  # the bias matters here


def test_weight_zero_removes_the_region(model, inputs) -> None:
    """A key bias of -inf equals masking these keys out."""
    region = make_bias(inputs["input_ids"]) != 0
    bias = torch.zeros(region.shape).masked_fill(region, float("-inf"))
    expected = biased_eager_logits(model, inputs, bias)
    with torch.no_grad(), finegrain_ops.patch(model):
        actual = model(**inputs, key_bias=bias).logits
    after_image = (inputs["input_ids"] != IMAGE_TOKEN) & inputs["attention_mask"].bool()
    assert (actual - expected)[after_image].abs().max() < 5e-5


GENERATION = {
    "greedy": {},
    "beam": {"num_beams": 3},
    "sampling": {"do_sample": True, "temperature": 0.7},
    "several sequences": {"do_sample": True, "num_return_sequences": 2},
    "beams returned": {"num_beams": 4, "num_return_sequences": 2},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
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


@pytest.mark.parametrize("mask", [{}, {"attention_mask": None}], ids=["mask of ones", "no mask"])
def test_static_cache_without_padding(model, mask: dict) -> None:
    """generate leaves a mask out that hides nothing, and makes a 4-D one of nothing."""
    inputs = {**make_inputs(text_lengths=(6, 6)), **mask}
    bias = make_bias(inputs["input_ids"])
    embeds = {
        "input_ids": inputs["input_ids"],
        "attention_mask": inputs["attention_mask"],
        "inputs_embeds": model.get_input_embeddings()(inputs["input_ids"]).detach(),
    }
    for given in (inputs, embeds):
        with EagerOracle(model, bias):
            expected = model.generate(**given, **GREEDY)
        with finegrain_ops.patch(model):
            assert torch.equal(model.generate(**given, **GREEDY, key_bias=bias), expected)
            assert torch.equal(
                model.generate(**given, **GREEDY, key_bias=bias, cache_implementation="static"), expected
            )


def test_generate_compiles_nothing_with_a_bias(model, inputs, bias) -> None:
    """For a static cache it would compile every step anew; here made to want it on a CPU too."""
    compile_config = transformers.CompileConfig()
    compile_config._compile_all_devices = True
    config = transformers.GenerationConfig(compile_config=compile_config)
    cache = transformers.StaticCache(config=model.config.text_config, max_cache_len=32)
    given = {"past_key_values": cache}
    wants_to = model._valid_auto_compile_criteria(given, config)
    with finegrain_ops.patch(model):
        assert wants_to
        assert model._valid_auto_compile_criteria({**given, "key_bias": None}, config)
        assert not model._valid_auto_compile_criteria({**given, "key_bias": bias}, config)


def test_prompt_lookup(model) -> None:
    """Several new tokens at once on top of a cache."""
    inputs = make_inputs(text_lengths=(9,))
    bias = make_bias(inputs["input_ids"])
    arguments = {**inputs, **GREEDY, "prompt_lookup_num_tokens": 3}
    with EagerOracle(model, bias):
        expected = model.generate(**arguments)
    with finegrain_ops.patch(model):
        assert torch.equal(model.generate(**arguments, key_bias=bias), expected)


@pytest.mark.parametrize("cut", [20, 22])
def test_cached_steps_equal_one_pass(model, bias, inputs, cut: int) -> None:
    """Prefill, then the rest on top of the cache. A bias may end before the keys do (0 from there on), or go beyond
    them.
    """
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    image_end = 20
    assert not bias[:, image_end:].any()
    with torch.no_grad(), finegrain_ops.patch(model):
        whole = model(**inputs, key_bias=bias).logits
        start = {"input_ids": ids[:, :cut], "attention_mask": mask[:, :cut], "pixel_values": inputs["pixel_values"]}
        cache = model(**start, key_bias=bias, use_cache=True).past_key_values
        rest = {"input_ids": ids[:, cut:], "attention_mask": mask, "past_key_values": cache}
        logits = model(**rest, key_bias=bias[:, :image_end]).logits
    torch.testing.assert_close(logits, whole[:, cut:], atol=5e-5, rtol=0)


def test_inputs_embeds_and_no_mask(model) -> None:
    inputs = make_inputs(text_lengths=(5, 5))  # no padding
    bias = make_bias(inputs["input_ids"])
    expected = biased_eager_logits(model, inputs, bias)
    with torch.no_grad(), finegrain_ops.patch(model):
        without_mask = {k: v for k, v in inputs.items() if k != "attention_mask"}
        torch.testing.assert_close(model(**without_mask, key_bias=bias).logits, expected, atol=5e-5, rtol=0)


@pytest.mark.parametrize(
    "use_reentrant", [None, False, True], ids=["plain", "checkpointing", "reentrant checkpointing"]
)
def test_gradients(inputs, bias, use_reentrant: bool | None) -> None:
    model = make_model().train()
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE_TOKEN, -100)
    labels = labels.masked_fill((inputs["attention_mask"] == 0) | (labels == 1), -100)

    def gradients(**arguments) -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(**inputs, labels=labels, use_cache=False, **arguments).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    oracle_bias = bias.clone().requires_grad_()
    with EagerOracle(model, oracle_bias):
        expected = gradients()
    if use_reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    with finegrain_ops.patch(model):
        # Reentrant checkpointing gives no gradient to what is not a positional argument of the layer, by its own
        # design.
        leaf = bias.clone().requires_grad_(use_reentrant is not True)
        actual = gradients(key_bias=leaf)
        unbiased = gradients()
    assert actual.keys() == expected.keys()
    for name, gradient in actual.items():
        # Against float64, eager attention itself is off by up to 8e-6 of a parameter's largest gradient.
        atol = 3e-5 * max(float(expected[name].abs().max()), 1e-2)
        torch.testing.assert_close(gradient, expected[name], atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
    assert any((unbiased[n] - expected[n]).abs().max() > 1e-3 for n in expected)
    if leaf.requires_grad:
        torch.testing.assert_close(leaf.grad, oracle_bias.grad, atol=2e-5, rtol=2e-4)


def test_two_threads_with_different_biases(model, inputs, bias) -> None:
    with finegrain_ops.patch(model):
        biases = [bias, -bias, None]
        expected = [model.generate(**inputs, **GREEDY, key_bias=b) for b in biases]
        results: dict[tuple[int, int], torch.Tensor] = {}

        def work(i: int) -> None:
            for repeat in range(3):
                results[i, repeat] = model.generate(**inputs, **GREEDY, key_bias=biases[i])

        threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(results) == 9
    assert all(torch.equal(tokens, expected[i]) for (i, _), tokens in results.items())
    assert not torch.equal(expected[0], expected[1])


def test_typing_errors_are_still_refused(model, inputs, bias) -> None:
    with finegrain_ops.patch(model), pytest.raises(ValueError, match="key_bais"):
        model.generate(**inputs, key_bais=bias, max_new_tokens=1)
    with pytest.raises(ValueError, match="key_bias"):  # and key_bias itself, when not patched
        model.generate(**inputs, key_bias=bias, max_new_tokens=1)


# --- no trace ----------------------------------------------------------------------------------------------------


def state(model) -> list[tuple[str, dict[str, int]]]:
    """Every attribute of every module, by identity, and the configuration."""
    modules = [(n, {k: id(v) for k, v in m.__dict__.items()}) for n, m in model.named_modules()]
    return [*modules, ("config", model.config.to_dict())]


def model_after_one_pass(inputs):
    """transformers itself puts hooks on a model in its first forward."""
    model = make_model()
    with torch.no_grad():
        model(**inputs)
    return model


def test_remove_restores_exactly(inputs, bias) -> None:
    model = model_after_one_pass(inputs)
    before = state(model)
    handle = finegrain_ops.patch(model)
    assert state(model) != before
    assert model.config.to_dict() == before[-1][1]  # the model's own configuration is never touched
    with torch.no_grad():
        model(**inputs, key_bias=bias)
    handle.remove()
    assert state(model) == before
    handle.remove()  # again: nothing
    assert state(model) == before


def test_an_exception_inside_with_restores(inputs, bias) -> None:
    model = model_after_one_pass(inputs)
    before = state(model)
    with pytest.raises(RuntimeError, match="from inside"), finegrain_ops.patch(model):
        raise RuntimeError("from inside")
    assert state(model) == before
    with pytest.raises(ValueError, match="key_bias: expected one row per sequence"), finegrain_ops.patch(model):
        model(**inputs, key_bias=bias[:1])
    assert state(model) == before


def test_a_failing_patch_changes_nothing(monkeypatch) -> None:
    from finegrain_ops.integrations import decoder

    model = make_model()
    before = state(model)

    def fail(original):
        raise RuntimeError("half way")

    monkeypatch.setattr(decoder, "forward_that_takes_key_bias", fail)
    with pytest.raises(RuntimeError, match="half way"):
        finegrain_ops.patch(model)
    assert state(model) == before


def test_an_instance_that_was_wrapped_before_keeps_its_wrapper(inputs) -> None:
    """accelerate's hooks, for one, put a forward of their own on the instance."""
    model = make_model()
    original = model.forward
    calls = []

    def wrapper(*args, **kwargs):
        calls.append(set(kwargs))
        return original(*args, **kwargs)

    wrapper.__signature__ = inspect.signature(original)
    model.forward = wrapper
    with torch.no_grad(), finegrain_ops.patch(model):
        model(**inputs, key_bias=make_bias(inputs["input_ids"]))
    assert "key_bias" in calls[0]
    assert model.forward is wrapper


def test_remove_out_of_order_is_refused(inputs) -> None:
    model = make_model()
    handle = finegrain_ops.patch(model)
    ours = model.forward
    model.forward = lambda *args, **kwargs: ours(*args, **kwargs)
    with pytest.raises(RuntimeError, match=r"LlavaForConditionalGeneration\.forward was replaced after patch"):
        handle.remove()
    assert model(**inputs, key_bias=make_bias(inputs["input_ids"])) is not None  # nothing was changed: still patched
    model.__dict__["forward"] = ours
    handle.remove()
    assert "forward" not in model.__dict__


def test_only_this_instance(inputs, bias) -> None:
    one, other = make_model(), make_model()
    with finegrain_ops.patch(one), pytest.raises(ValueError, match="key_bias"):
        other.generate(**inputs, key_bias=bias, max_new_tokens=1)


def test_patching_twice_is_refused() -> None:
    model = make_model()
    with finegrain_ops.patch(model), pytest.raises(ValueError, match="already patched"):
        finegrain_ops.patch(model)
    finegrain_ops.patch(model).remove()


def test_a_deep_copy_is_patched_on_its_own(inputs, bias) -> None:
    model = make_model()
    with torch.no_grad(), finegrain_ops.patch(model):
        expected = model(**inputs, key_bias=bias).logits
        duplicate = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # the copy must not reach back
        assert torch.equal(duplicate(**inputs, key_bias=bias).logits, expected)
        duplicate._finegrain_handle.remove()
    assert "forward" not in duplicate.__dict__


def test_a_removed_patch_keeps_nothing_alive() -> None:
    model = make_model()
    finegrain_ops.patch(model).remove()
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


# --- what is refused ---------------------------------------------------------------------------------------------


class NotAModel(torch.nn.Module):
    pass


def test_unsupported_models() -> None:
    from transformers import LlamaForCausalLM

    for unsupported in (NotAModel(), LlamaForCausalLM(make_model().config.text_config), None):
        with pytest.raises(UnsupportedModelError, match=r"patch: expected a model of one of the families \[.*'llava'"):
            finegrain_ops.patch(unsupported)


def test_a_language_model_without_the_attention_interface(monkeypatch) -> None:
    model = make_model()
    before = state(model)
    monkeypatch.setattr(type(model.model.language_model), "_supports_attention_backend", False)
    with pytest.raises(
        UnsupportedModelError, match="has no attention layers that call transformers' AttentionInterface"
    ):
        finegrain_ops.patch(model)
    assert state(model) == before


def test_setting_the_name_by_hand_is_refused(inputs) -> None:
    """Without patch nothing would make the mask; so it is an error, not a wrong answer."""
    with finegrain_ops.patch(make_model()):
        pass  # the name is registered from here on
    model = make_model()
    model.set_attn_implementation({"text_config": "finegrain_ops"})
    with torch.no_grad(), pytest.raises(UnsupportedModelError, match=r"call finegrain_ops\.patch"):
        model(**inputs)


def test_compiled_forward(inputs, bias) -> None:
    """torch.compile traces the patched model, without a graph break where transformers' own LLaVA has none."""
    model = make_model()
    arguments = {**inputs, "use_cache": False}
    with torch.no_grad(), finegrain_ops.patch(model):
        expected = [model(**arguments, key_bias=b).logits for b in (bias, None)]
        torch._dynamo.reset()
        compiled = torch.compile(model.forward, backend="aot_eager", fullgraph=transformers.__version__ >= "5")
        actual = [compiled(**arguments, key_bias=b).logits for b in (bias, None)]
    real = inputs["attention_mask"].bool()
    for a, e in zip(actual, expected):
        torch.testing.assert_close(a[real], e[real], atol=1e-5, rtol=1e-5)


def test_dropout_while_training_is_refused(inputs, bias) -> None:
    model = make_model(attention_dropout=0.1)
    with finegrain_ops.patch(model):
        model.train()
        model(**inputs)
        with pytest.raises(UnsupportedInputError, match="attention dropout"):
            model(**inputs, key_bias=bias)
        model.eval()
        model(**inputs, key_bias=bias)


def test_sliding_windows_are_refused(inputs, bias) -> None:
    from transformers import LlavaConfig, LlavaForConditionalGeneration, MistralConfig

    base = make_model().config
    text = {
        k: v for k, v in base.text_config.to_dict().items() if k not in ("model_type", "rope_scaling", "architectures")
    }
    config = LlavaConfig(
        vision_config=base.vision_config,
        text_config=MistralConfig(**{**text, "sliding_window": 8}),
        image_token_index=IMAGE_TOKEN,
        image_seq_length=16,
    )
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad(), finegrain_ops.patch(model):
        model(**inputs)
        with pytest.raises(UnsupportedInputError, match="sliding_window"):
            model(**inputs, key_bias=bias)


def test_generate_batch_is_refused(model, inputs, bias) -> None:
    if not hasattr(model, "generate_batch"):
        assert "generate_batch" not in dir(model)
        return
    with finegrain_ops.patch(model), pytest.raises(UnsupportedInputError, match="generate_batch"):
        model.generate_batch([[1, 5, 6]], key_bias=bias)


def test_attention_outputs_are_refused(inputs, bias) -> None:
    model = make_model("eager")
    with torch.no_grad(), finegrain_ops.patch(model):
        assert model(**inputs, output_attentions=True).attentions is not None
        with pytest.raises(UnsupportedInputError, match="output_attentions"):
            model(**inputs, key_bias=bias, output_attentions=True)


def test_packed_sequences_are_refused(model, inputs) -> None:
    ids = inputs["input_ids"][:1, -4:]
    packed = torch.tensor([[0, 1, 0, 1]])
    with finegrain_ops.patch(model), pytest.raises(UnsupportedInputError, match="packed sequences"):
        model(input_ids=ids, position_ids=packed, key_bias=torch.zeros(1, 4), use_cache=False)


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ([0.0], TypeError, r"key_bias: expected a float tensor \(B, P\), got list"),
        (torch.zeros(2, 23).int(), TypeError, "key_bias: expected a float tensor"),
        (torch.zeros(23), ValueError, r"key_bias: expected shape \(B, P\), .* got \(23,\)"),
        (torch.zeros(3, 23), ValueError, "key_bias: expected one row per sequence, here 2"),
        (torch.full((2, 23), float("nan")), ValueError, "key_bias: expected values below"),
    ],
)
def test_bad_biases(model, inputs, bad, error, message) -> None:
    with finegrain_ops.patch(model), pytest.raises(error, match=message):
        model(**inputs, key_bias=bad)


def test_a_mask_per_row_is_refused(model, inputs, bias) -> None:
    mask = torch.ones(2, 1, 23, 23, dtype=torch.bool).tril()
    with finegrain_ops.patch(model), pytest.raises(UnsupportedInputError, match="2-D attention_mask"):
        model(**{**inputs, "attention_mask": mask}, key_bias=bias)
