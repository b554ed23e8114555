"""`patch` on tiny InstructBLIPs and BLIP-2 against cross-attention written out; and that it leaves no trace."""

from __future__ import annotations

import copy
import inspect
import threading
from typing import Any

import pytest
import torch
import transformers

import finegrain_ops
from finegrain_ops import UnsupportedInputError, UnsupportedModelError
from finegrain_ops.integrations import qformer
from tiny_qformer import (
    GREEDY,
    MODELS,
    NUM_HEADS,
    NUM_KEYS,
    NUM_LAYERS,
    NUM_QUERIES,
    EagerOracle,
    logits,
    made,
    make_bias,
    make_inputs,
    make_model,
    per_head,
)


@pytest.fixture(params=MODELS)
def model(request: Any) -> Any:
    return made(request.param)


@pytest.fixture
def instructblip() -> Any:
    return made("InstructBLIP, Llama")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_without_bias_nothing_changes_to_the_bit(name: str, implementation: str) -> None:
    model = make_model(*MODELS[name], implementation)
    inputs = make_inputs(model)
    before, tokens = logits(model, inputs), model.generate(**inputs, **GREEDY)
    with finegrain_ops.patch(model):
        assert torch.equal(logits(model, inputs), before)
        assert torch.equal(logits(model, inputs, key_bias=None), before)
        assert torch.equal(model.generate(**inputs, **GREEDY), tokens)
        biased = logits(model, inputs, key_bias=make_bias())
        assert torch.equal(logits(model, inputs), before)  # nothing is left of the bias
    assert not torch.equal(biased, before)
    assert torch.equal(logits(model, inputs), before)


def per_layer(heads: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return 3 * torch.randn(2, NUM_LAYERS, heads, NUM_KEYS, generator=generator)


BIASES = {
    "(N, K)": make_bias,
    "(N, H, K)": per_head,
    "(N, L, 1, K)": lambda: per_layer(1),
    "(N, L, H, K)": lambda: per_layer(NUM_HEADS),
    "(N, 1, H, K)": lambda: per_layer(NUM_HEADS)[:, :1],
    "knock-out": lambda: torch.zeros(2, NUM_KEYS).masked_fill(make_bias() != 0, float("-inf")),
    "first layer only": lambda: torch.stack([make_bias(), torch.zeros(2, NUM_KEYS)], 1)[:, :, None],
}


@pytest.mark.parametrize("bias", BIASES.values(), ids=BIASES)
def test_forward_equals_cross_attention_with_the_bias_in_its_scores(model: Any, bias: Any) -> None:
    inputs, bias = make_inputs(model), bias()
    with EagerOracle(model, bias):
        expected = logits(model, inputs)
    with finegrain_ops.patch(model):
        actual, plain = logits(model, inputs, key_bias=bias), logits(model, inputs)
    torch.testing.assert_close(actual, expected, atol=5e-5, rtol=0)
    assert (actual - plain).abs().max() > 0.05  # the bias matters here, a thousand times the tolerance


GENERATION = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sampling": {"do_sample": True, "temperature": 1.5},
    "beams returned": {"num_beams": 4, "num_return_sequences": 2},
    "static cache": {"cache_implementation": "static"},
}


@pytest.mark.parametrize("options", GENERATION.values(), ids=GENERATION)
def test_generate_equals_the_oracle(model: Any, options: dict) -> None:
    """Token for token, in a batch of different images, questions and biases."""
    arguments, bias = {**make_inputs(model), **GREEDY, **options}, make_bias()

    def generate(**more: Any) -> torch.Tensor:
        torch.manual_seed(3)
        return model.generate(**arguments, **more)

    with EagerOracle(model, bias):
        expected = generate()
    with finegrain_ops.patch(model):
        actual = generate(key_bias=bias)
    assert torch.equal(actual, expected)
    assert not torch.equal(generate(), expected)  # without the bias it says something else


def test_only_cross_attention_sees_the_bias(model: Any) -> None:
    """No module's forward but the Q-Former's and its encoder's takes it; nor does self-attention, packed or not."""
    seen: dict[str, set[str]] = {"key_bias": set(), "_BiasedKeys": set()}

    def look(name: str) -> Any:
        def hook(module: Any, args: Any, kwargs: dict) -> None:
            for what in {*kwargs, *(type(value).__name__ for value in (*args, *kwargs.values()))} & seen.keys():
                seen[what].add(name)

        return hook

    with finegrain_ops.patch(model):
        hooks = [m.register_forward_pre_hook(look(n), with_kwargs=True) for n, m in model.named_modules() if n]
        try:
            logits(model, make_inputs(model), key_bias=make_bias())
        finally:
            for hook in hooks:
                hook.remove()
    # The Q-Former itself takes it out of the air.
    assert seen["key_bias"] == {"qformer.encoder"}
    layers = {f"qformer.encoder.layer.{i}" for i in range(4)}
    cross = {f"qformer.encoder.layer.{i}.crossattention" for i in (0, 2)}
    assert seen["_BiasedKeys"] == layers | cross


def test_a_bias_given_to_the_qformer_itself(model: Any) -> None:
    """With an encoder_attention_mask: where it is 0, the key is out."""
    generator = torch.Generator().manual_seed(2)
    arguments = {
        # One set of queries may serve all images, where no text goes with them.
        "query_embeds": torch.randn(
            1 if model.config.model_type == "blip-2" else 2, NUM_QUERIES, 32, generator=generator
        ),
        "encoder_hidden_states": torch.randn(2, NUM_KEYS, 32, generator=generator),
    }
    if model.config.model_type == "instructblip":
        arguments["input_ids"] = torch.tensor([[5, 6, 7], [8, 9, 5]])
    mask = torch.ones(2, NUM_KEYS, dtype=torch.long)
    mask[0, 5:9] = 0
    with torch.no_grad():
        with EagerOracle(model, make_bias().masked_fill(mask == 0, float("-inf"))):
            expected = model.qformer(**arguments).last_hidden_state
        with finegrain_ops.patch(model):
            actual = model.qformer(**arguments, encoder_attention_mask=mask, key_bias=make_bias()).last_hidden_state
            unmasked = model.qformer(**arguments, key_bias=make_bias()).last_hidden_state
            with pytest.raises(UnsupportedInputError, match="key_bias needs a 2-D encoder_attention_mask"):
                model.qformer(**arguments, encoder_attention_mask=mask[:, None], key_bias=make_bias())
            arguments.pop("encoder_hidden_states")
            with pytest.raises(ValueError, match="key_bias: expected encoder_hidden_states beside it"):
                model.qformer(**arguments, key_bias=make_bias())
    torch.testing.assert_close(actual, expected, atol=5e-5, rtol=0)
    assert (unmasked - expected).abs().max() > 0.05


@pytest.mark.parametrize("use_reentrant", [None, False, True], ids=["plain", "checkpoints", "reentrant checkpoints"])
def test_gradients(use_reentrant: bool | None) -> None:
    model = make_model().train()
    inputs = make_inputs(model)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)

    def gradients(**options: Any) -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(**inputs, labels=labels, use_cache=False, **options).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    oracle_bias = make_bias().requires_grad_()
    with EagerOracle(model, oracle_bias):
        expected = gradients()
    if use_reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    with finegrain_ops.patch(model):
        # Reentrant checkpointing gives no gradient to what is not a positional argument of the layer, by its own
        # design.
        leaf = make_bias().requires_grad_(use_reentrant is not True)
        actual, unbiased = gradients(key_bias=leaf), gradients()
    assert actual.keys() == expected.keys()
    of_qformer = [name for name in expected if name.startswith("qformer.encoder")]
    assert any("crossattention" in name for name in of_qformer)
    for name, gradient in actual.items():
        atol = 3e-5 * max(float(expected[name].abs().max()), 1e-2)
        torch.testing.assert_close(gradient, expected[name], atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
    assert any((unbiased[name] - expected[name]).abs().max() > 1e-3 for name in of_qformer)
    if leaf.requires_grad:
        assert leaf.grad.abs().max() > 1e-4
        torch.testing.assert_close(leaf.grad, oracle_bias.grad, atol=2e-6, rtol=2e-4)


# --- no mixing of calls ------------------------------------------------------------------------------------------


def test_threads_with_different_biases(instructblip: Any) -> None:
    model, inputs = instructblip, make_inputs(instructblip)
    biases = [make_bias(), -make_bias(), None]
    with finegrain_ops.patch(model):
        expected = [model.generate(**inputs, **GREEDY, key_bias=bias) for bias in biases]
        results: dict[tuple[int, int], torch.Tensor] = {}
        together = threading.Barrier(3)  # all three are in the middle of a call when the Q-Former of one runs

        def wait(*_: Any) -> None:
            together.wait(timeout=60)

        hook = model.vision_model.register_forward_hook(wait)

        def work(i: int) -> None:
            for repeat in range(3):
                results[i, repeat] = model.generate(**inputs, **GREEDY, key_bias=biases[i])

        threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        hook.remove()
    assert len(results) == 9
    assert all(torch.equal(tokens, expected[i]) for (i, _), tokens in results.items())
    assert not torch.equal(expected[0], expected[1])
    assert not torch.equal(expected[0], expected[2])


def test_calls_of_the_model_inside_a_call_have_their_own_bias(instructblip: Any) -> None:
    """A logits processor that contrasts with the model without a bias, while generate has one."""
    model, inputs, inside = instructblip, make_inputs(instructblip), []

    def contrast(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        inside.append([logits(model, inputs), logits(model, inputs, key_bias=-make_bias())])
        return scores

    with finegrain_ops.patch(model):
        expected = [logits(model, inputs), logits(model, inputs, key_bias=-make_bias())]
        tokens = model.generate(**inputs, **GREEDY, key_bias=make_bias())
        processors = transformers.LogitsProcessorList([contrast])
        assert torch.equal(
            model.generate(**inputs, **GREEDY, key_bias=make_bias(), logits_processor=processors), tokens
        )
    assert len(inside) == 8
    assert all(torch.equal(a, e) for pair in inside for a, e in zip(pair, expected))


def test_an_exception_leaves_nothing_behind(model: Any) -> None:
    inputs = make_inputs(model)

    def fail(*_: Any) -> None:
        raise RuntimeError("from inside")

    plain = logits(model, inputs)
    with finegrain_ops.patch(model):
        for part in (model.vision_model, model.qformer.encoder.layer[1], model.language_model):
            hook = part.register_forward_pre_hook(fail)
            with pytest.raises(RuntimeError, match="from inside"):
                logits(model, inputs, key_bias=make_bias())
            hook.remove()
            assert qformer._HANDED_OVER.get() is None
            assert torch.equal(logits(model, inputs), plain)


def test_two_patched_models_do_not_share_a_bias(instructblip: Any) -> None:
    """Here one model's vision encoder calls the other model."""
    inner, outer = instructblip, make_model()
    inputs, inside = make_inputs(inner), []
    plain = logits(inner, inputs)
    with finegrain_ops.patch(inner), finegrain_ops.patch(outer):
        expected = logits(outer, inputs, key_bias=make_bias())
        outer.vision_model.register_forward_hook(lambda *_: inside.append(logits(inner, inputs)))
        assert torch.equal(logits(outer, inputs, key_bias=make_bias()), expected)
    assert torch.equal(inside[0], plain)


def test_compiled_forward() -> None:
    """Without a bias there is no graph break that transformers has not; with one it runs uncompiled, and right."""
    model = make_model()
    arguments = {**make_inputs(model), "use_cache": False}
    with torch.no_grad(), finegrain_ops.patch(model):
        for bias, fullgraph in ((None, True), (make_bias(), False)):
            expected = model(**arguments, key_bias=bias).logits
            torch._dynamo.reset()
            compiled = torch.compile(model.forward, backend="eager", fullgraph=fullgraph)
            torch.testing.assert_close(compiled(**arguments, key_bias=bias).logits, expected, atol=1e-5, rtol=1e-5)


def test_a_compiled_qformer_refuses_rather_than_ignores() -> None:
    model = make_model()
    inputs = make_inputs(model)
    with finegrain_ops.patch(model):
        torch._dynamo.reset()
        model.qformer.compile(backend="eager")
        with pytest.raises(UnsupportedInputError, match="key_bias was not used"):
            logits(model, inputs, key_bias=make_bias())


# --- no trace ----------------------------------------------------------------------------------------------------


def state(model: Any) -> list[Any]:
    """Every attribute of every module, by identity, and the configuration."""
    modules = [(n, {k: id(v) for k, v in m.__dict__.items()}) for n, m in model.named_modules()]
    return [*modules, ("config", model.config.to_dict())]


@pytest.mark.parametrize("name", MODELS)
def test_remove_restores_exactly(name: str) -> None:
    model = make_model(*MODELS[name])
    inputs = make_inputs(model)
    logits(model, inputs)  # transformers itself puts hooks on a model in its first forward
    before = state(model)
    handle = finegrain_ops.patch(model)
    assert state(model) != before
    assert model.config.to_dict() == before[-1][1]
    with pytest.raises(ValueError, match="already patched"):
        finegrain_ops.patch(model)
    logits(model, inputs, key_bias=make_bias())
    model.generate(**inputs, **GREEDY, key_bias=make_bias())
    handle.remove()
    assert state(model) == before
    handle.remove()  # again: nothing
    assert state(model) == before
    with pytest.raises(RuntimeError, match="from inside"), finegrain_ops.patch(model):
        raise RuntimeError("from inside")
    assert state(model) == before


def test_a_deep_copy_is_patched_on_its_own() -> None:
    model = make_model()
    inputs = make_inputs(model)
    with torch.no_grad(), finegrain_ops.patch(model):
        expected = logits(model, inputs, key_bias=make_bias())
        duplicate = copy.deepcopy(model)
        for parameter in model.parameters():
            parameter.zero_()  # the copy must not reach back
        assert torch.equal(logits(duplicate, inputs, key_bias=make_bias()), expected)
        duplicate._finegrain_handle.remove()
    assert "forward" not in duplicate.__dict__


def test_signatures(model: Any) -> None:
    names = ("forward", "generate", "get_image_features")
    before = [inspect.signature(getattr(model, name)) for name in names]
    with finegrain_ops.patch(model):
        for name, signature in zip(names, before):
            patched = inspect.signature(getattr(model, name))
            assert [n for n in patched.parameters if n != "key_bias"] == list(signature.parameters)
            assert "key_bias" in patched.parameters


def test_typing_errors_are_still_refused(instructblip: Any) -> None:
    inputs = make_inputs(instructblip)
    with finegrain_ops.patch(instructblip), pytest.raises(ValueError, match="key_bais"):
        instructblip.generate(**inputs, key_bais=make_bias(), max_new_tokens=1)
    with pytest.raises(ValueError, match="key_bias"):  # and key_bias itself, when not patched
        instructblip.generate(**inputs, key_bias=make_bias(), max_new_tokens=1)


# --- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ([0.0], TypeError, r"key_bias: expected a float tensor \(B, P\), got list"),
        (torch.zeros(NUM_KEYS), ValueError, r"key_bias: expected shape \(B, P\), .* got \(17,\)"),
        (torch.zeros(3, NUM_KEYS), ValueError, r"key_bias: expected \(images, keys .*\) = \(2, 17\), .* got shape \(3"),
        (torch.zeros(2, 16), ValueError, r"key_bias: expected \(images, keys .*\) = \(2, 17\), .* got shape \(2, 16\)"),
        (torch.zeros(2, 3, NUM_KEYS), ValueError, r"with L = 2 and H = 4, got shape \(2, 3, 17\)"),
        (torch.zeros(2, 4, 1, NUM_KEYS), ValueError, r"with L = 2 and H = 4, got shape \(2, 4, 1, 17\)"),
        (torch.full((2, NUM_KEYS), float("nan")), ValueError, "key_bias: expected values below"),
    ],
)
def test_bad_biases(instructblip: Any, bad: Any, error: Any, message: str) -> None:
    inputs = make_inputs(instructblip)
    with finegrain_ops.patch(instructblip):
        with pytest.raises(error, match=message):
            logits(instructblip, inputs, key_bias=bad)
        with pytest.raises(error, match=message):
            instructblip.generate(**inputs, **GREEDY, key_bias=bad)


def test_a_reader_without_a_bias_is_refused(instructblip: Any) -> None:
    with finegrain_ops.patch(instructblip), pytest.raises(UnsupportedInputError, match="attention_reader needs"):
        logits(instructblip, make_inputs(instructblip), attention_reader=print)


def test_attentions_of_the_qformer_are_refused() -> None:
    model = make_model(implementation="eager")
    inputs = make_inputs(model)
    with finegrain_ops.patch(model):
        # These are the language model's, which is not biased.
        assert model(**inputs, key_bias=make_bias(), output_attentions=True).language_model_outputs.attentions
        model.qformer.config.output_attentions = True
        assert logits(model, inputs) is not None
        with pytest.raises(UnsupportedInputError, match="output_attentions=True of the Q-Former"):
            logits(model, inputs, key_bias=make_bias())


def test_dropout_while_training_is_refused() -> None:
    model = make_model(attention_probs_dropout_prob=0.1)
    inputs = make_inputs(model)
    with finegrain_ops.patch(model):
        logits(model.train(), inputs)
        with pytest.raises(UnsupportedInputError, match=r"attention dropout \(here 0.1\).* or call model.qformer.eval"):
            logits(model, inputs, key_bias=make_bias())
        model.qformer.eval()
        logits(model, inputs, key_bias=make_bias())


@pytest.mark.skipif(transformers.__version__ >= "5", reason="transformers 5 removed these")
def test_what_only_the_older_cross_attention_has() -> None:
    relative = make_model(position_embedding_type="relative_key")
    model = make_model()
    with finegrain_ops.patch(model), finegrain_ops.patch(relative):
        keys = {"encoder_hidden_states": torch.zeros(2, NUM_KEYS, 32), "key_bias": make_bias()}
        arguments = {"query_embeds": torch.zeros(2, NUM_QUERIES, 32), "input_ids": None, **keys}
        with pytest.raises(UnsupportedInputError, match="position_embedding_type 'relative_key'"):
            relative.qformer(**arguments)
        with pytest.raises(UnsupportedInputError, match="head_mask"):
            model.qformer(**arguments, head_mask=torch.ones(4, NUM_HEADS))
        model.qformer.encoder.layer[0].crossattention.attention.save_attention = True
        with pytest.raises(UnsupportedInputError, match="save_attention"):
            model.qformer(**arguments)


@pytest.mark.skipif(
    "mm_encoder_outputs" not in inspect.signature(transformers.InstructBlipForConditionalGeneration.forward).parameters,
    reason="this version of transformers takes no features made before",
)
def test_features_made_before_are_refused(instructblip: Any) -> None:
    inputs = make_inputs(instructblip)
    pictures = {name: inputs.pop(name) for name in list(inputs) if name[:5] in ("pixel", "qform")}
    with torch.no_grad(), finegrain_ops.patch(instructblip):
        features = {"image": instructblip.get_image_features(**pictures, return_dict=True)}
        biased = {"image": instructblip.get_image_features(**pictures, return_dict=True, key_bias=make_bias())}
        inputs |= {"pixel_values": None, "qformer_input_ids": None}
        assert torch.equal(
            logits(instructblip, {**inputs, "mm_encoder_outputs": biased}),
            logits(instructblip, inputs | pictures, key_bias=make_bias()),
        )
        with pytest.raises(UnsupportedInputError, match="key_bias was not used"):
            logits(instructblip, {**inputs, "mm_encoder_outputs": features}, key_bias=make_bias())


def test_models_that_do_not_generate_are_refused(instructblip: Any) -> None:
    model = transformers.InstructBlipModel(instructblip.config)
    before = state(model)
    with pytest.raises(UnsupportedModelError, match="expected InstructBlipForConditionalGeneration or Blip2For"):
        finegrain_ops.patch(model)
    assert state(model) == before
