"""Steering beyond one region, against eager attention to which a dense term (B, L, H, Q, K) is added."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
)
from transformers.masking_utils import eager_mask
from transformers.models.llama.modeling_llama import eager_attention_forward

import finegrain_ops
from finegrain_ops.tiny_llava.tokenizer import clip_image_processor_class
from tiny_llava import IMAGE_TOKEN, make_inputs, make_model

LAYERS, HEADS, LENGTH = 3, 4, 23
SIZES = [(48, 48), (48, 48)]  # 4 x 4 tokens of 12 pixels


def dense_term(bias: torch.Tensor, gate: torch.Tensor | None, new_tokens: int = 12) -> torch.Tensor:
    """(B, L, H, T, T) of a bias (B, L or 1, H or 1, P): 0 for later keys and in gated rows; later rows are open."""
    batch, prompt = bias.shape[0], bias.shape[-1]
    length = prompt + new_tokens
    term = torch.zeros(batch, LAYERS, HEADS, length, length)
    term[..., :prompt] = bias[:, :, :, None, :]
    if gate is not None:
        for sequence, row in (~gate).nonzero().tolist():
            term[sequence, :, :, row] = 0.0
    return term


class DenseOracle:
    """transformers' eager attention with a dense term added to its mask, independent of finegrain_ops."""

    def __init__(self, model, term: torch.Tensor) -> None:
        self.model, self.term = model, term
        self.attentions: dict[int, torch.Tensor] = {}

    def _attention(self, module, query, key, value, attention_mask, **kwargs):
        rows, keys = query.shape[2], key.shape[2]
        visible = (attention_mask[0, 0, -1] == 0).nonzero()[-1, 0]  # the last row's own position
        term = self.term[:, module.layer_idx, :, visible + 1 - rows : visible + 1, :keys]
        term = torch.nn.functional.pad(term, (0, keys - term.shape[-1]))  # a static cache's unfilled slots
        term = term.repeat_interleave(len(query) // len(term), 0)
        output, weights = eager_attention_forward(module, query, key, value, attention_mask + term, **kwargs)
        self.attentions[module.layer_idx] = weights
        return output, weights

    def __enter__(self) -> DenseOracle:
        self.before = self.model.config.text_config._attn_implementation
        AttentionInterface.register("dense_oracle", self._attention)
        AttentionMaskInterface.register(
            "dense_oracle", lambda **kwargs: eager_mask(**{**kwargs, "allow_is_causal_skip": False})
        )
        self.model.set_attn_implementation({"text_config": "dense_oracle"})
        return self

    def __exit__(self, *_: object) -> None:
        self.model.set_attn_implementation({"text_config": self.before})


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def processor():
    """What tells the geometry: resized to 24 pixels, which are 4 x 4 tokens."""
    side = {"height": 24, "width": 24}
    return SimpleNamespace(image_processor=clip_image_processor_class()(size={"shortest_edge": 24}, crop_size=side))


@pytest.fixture
def inputs():
    return make_inputs()  # left-padded, two images


@pytest.fixture
def handle(model, processor):
    with finegrain_ops.patch(model, processor) as handle:
        yield handle


def box(row0: int, column0: int, row1: int, column1: int) -> tuple[int, int, int, int]:
    """The box of tokens (row0, column0) up to (row1, column1), ends not included."""
    return 12 * column0, 12 * row0, 12 * column1, 12 * row1


def on_image(inputs, values: list[torch.Tensor]) -> torch.Tensor:
    """(B, P) with (4, 4) values at each sequence's image tokens."""
    placed = torch.zeros(inputs["input_ids"].shape)
    for i, of_image in enumerate(values):
        placed[i, inputs["input_ids"][i] == IMAGE_TOKEN] = of_image.flatten().float()
    return placed


REGIONS = [[box(0, 1, 2, 3)], [box(1, 1, 4, 2)]]
WEIGHTS = {
    "layers and heads": torch.rand(LAYERS, HEADS, generator=torch.Generator().manual_seed(1)) * 6,
    "layers": torch.tensor([[9.0], [1.0], [0.1]]),
    "heads": torch.tensor([[0.2, 8.0, 1.0, 3.0]]),
    "one layer knocked out": torch.tensor([[1.0], [0.0], [1.0]]),
}


# --- the model against the oracle --------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", ["all", "after_image"])
@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
def test_weights_per_layer_and_head(model, handle, inputs, weight: torch.Tensor, rows: str) -> None:
    bias = handle.key_bias(inputs, REGIONS, SIZES, weight=weight)
    assert bias.shape == (2, *weight.shape, 23)
    gate = handle.row_gate(inputs, rows)
    with torch.no_grad():
        actual = model(**inputs, key_bias=bias, row_gate=gate).logits
        plain = model(**inputs).logits
        other_rows = model(**inputs, key_bias=bias, row_gate=None if rows != "all" else handle.row_gate(inputs)).logits
        other_layers = model(**inputs, key_bias=bias.flip(1, 2), row_gate=gate).logits
    handle.remove()
    with torch.no_grad(), DenseOracle(model, dense_term(bias, gate)) as oracle:
        expected = oracle.model(**inputs).logits
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(actual[real], expected[real], atol=1e-4, rtol=0)
    for other in (plain, other_rows, other_layers):
        if other is not other_layers or not torch.equal(weight, weight.flip(0, 1)):
            assert (actual - other)[real].abs().max() > 0.05


def test_gated_rows_before_the_bias_stay_what_they_are(model, handle, inputs) -> None:
    bias = handle.key_bias(inputs, REGIONS, SIZES, weight=8.0)
    gate = handle.row_gate(inputs)
    is_image = inputs["input_ids"] == IMAGE_TOKEN
    expected = is_image.flip(1).cumsum(1).flip(1) == 0
    assert torch.equal(gate, expected)
    assert gate.sum(1).tolist() == [6, 3]  # the questions
    with torch.no_grad():
        gated, plain = model(**inputs, key_bias=bias, row_gate=gate).logits, model(**inputs).logits
    before = ~gate & inputs["attention_mask"].bool()
    torch.testing.assert_close(gated[before], plain[before], atol=2e-5, rtol=0)
    assert (gated - plain)[gate].abs().max() > 0.5
    assert handle.row_gate(inputs, rows="all") is None


def test_padding_stays_hidden_in_every_row(model, handle, inputs) -> None:
    """The shorter sequence alone, and in a left-padded batch whose padding holds other tokens and a bias."""
    alone = {
        "input_ids": inputs["input_ids"][1:, 3:],
        "attention_mask": inputs["attention_mask"][1:, 3:],
        "pixel_values": inputs["pixel_values"][1:],
    }
    assert bool(alone["attention_mask"].all())
    region = (alone, REGIONS[1:], SIZES[1:])
    inputs["input_ids"][1, :3] = 7
    bias = handle.key_bias(inputs, REGIONS, SIZES, weight=5.0)
    bias[1, :3] = 4.0
    with torch.no_grad():
        expected = model(**alone, key_bias=handle.key_bias(*region, weight=5.0), row_gate=handle.row_gate(alone)).logits
        actual = model(**inputs, key_bias=bias, row_gate=handle.row_gate(inputs)).logits
    torch.testing.assert_close(actual[1:, 3:], expected, atol=5e-5, rtol=0)


STOP = 2  # never generated
GENERATION = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "several sequences": {"do_sample": True, "num_return_sequences": 2},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
}


@pytest.mark.parametrize("options", GENERATION.values(), ids=GENERATION)
def test_generation_with_a_gate_and_a_bias_per_layer(model, handle, inputs, options: dict) -> None:
    arguments = {**inputs, "max_new_tokens": 8, "do_sample": False, "suppress_tokens": [IMAGE_TOKEN, STOP], **options}
    bias = handle.key_bias(inputs, REGIONS, SIZES, weight=torch.tensor([[6.0], [0.3], [12.0]]))
    gate = handle.row_gate(inputs)
    torch.manual_seed(3)
    actual = model.generate(**arguments, key_bias=bias, row_gate=gate)
    others = []
    for other in ({}, {"key_bias": bias}, {"key_bias": bias.flip(1), "row_gate": gate}):
        torch.manual_seed(3)
        others.append(model.generate(**arguments, **other))
    handle.remove()
    torch.manual_seed(3)
    with DenseOracle(model, dense_term(bias, gate)):
        expected = model.generate(**arguments)
    assert torch.equal(actual, expected)
    assert not any(torch.equal(other, expected) for other in others)  # without each of them it says something else


def test_a_knocked_out_region_says_nothing_to_the_rows_that_cannot_see_it(model, handle, inputs) -> None:
    """Its tokens' embeddings do not matter any more; they do where the image's other tokens may still see them."""
    region = handle.region_mask(inputs, REGIONS, SIZES)
    bias = handle.key_bias(inputs, REGIONS, SIZES, weight=0.0)
    embeddings = model.get_input_embeddings()(inputs["input_ids"]).detach()
    changed = torch.where(region[..., None], torch.randn(64, generator=torch.Generator().manual_seed(0)), embeddings)
    logits = {}
    with torch.no_grad():
        for gate_name, gate in (("all", None), ("after_image", handle.row_gate(inputs))):
            logits[gate_name] = [
                model(inputs_embeds=e, attention_mask=inputs["attention_mask"], key_bias=bias, row_gate=gate).logits
                for e in (embeddings, changed)
            ]
    outside = ~region & inputs["attention_mask"].bool()
    intact, other = logits["all"]
    assert torch.equal(intact[outside], other[outside])
    intact, other = logits["after_image"]
    assert (intact - other)[:, -1].abs().max() > 1e-2


# --- what key_bias makes -----------------------------------------------------------------------------------------


def test_several_boxes_of_different_weights(handle, inputs) -> None:
    first, second = torch.ones(4, 4), torch.ones(4, 4)
    first[0:2, 0:2], first[1:3, 1:3], first[3, 3] = 3.0, 0.5, 0.0
    first[1, 1] = 3.0  # |log 3| > |log 0.5|
    first[0, 3] = 0.0  # 0 before all
    second[2, :] = 7.0
    bias = handle.key_bias(
        inputs,
        [[box(0, 0, 2, 2), box(1, 1, 3, 3), box(3, 3, 4, 4), box(0, 3, 1, 4), box(0, 3, 1, 4)], [box(2, 0, 3, 4)]],
        SIZES,
        weight=[[3.0, 0.5, 0.0, 9.0, 0.0], 7.0],
    )
    torch.testing.assert_close(bias, on_image(inputs, [first.log(), second.log()]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("weights", [[2.0, 0.5], [0.5, 2.0]])
def test_of_a_weight_and_its_inverse_the_smaller_holds(handle, inputs, weights: list[float]) -> None:
    bias = handle.key_bias(inputs, [[box(0, 0, 1, 2), box(0, 0, 1, 2)], []], SIZES, weight=[weights, []])
    expected = torch.zeros(4, 4)
    expected[0, :2] = math.log(0.5)
    torch.testing.assert_close(bias, on_image(inputs, [expected, torch.zeros(4, 4)]), atol=1e-6, rtol=0)


def test_a_weight_of_one_protects_nothing_and_equal_weights_are_one_region(handle, inputs) -> None:
    overlapping = [[box(0, 0, 2, 2), box(1, 1, 3, 3)], [box(0, 0, 4, 4), box(1, 1, 2, 2)]]
    bias = handle.key_bias(inputs, overlapping, SIZES, weight=[[2.5, 2.5], [1.0, 4.0]])
    united = handle.key_bias(inputs, [overlapping[0], []], SIZES, weight=2.5)
    assert torch.equal(bias[0], united[0])
    alone = handle.key_bias(inputs, [[], [box(1, 1, 2, 2)]], SIZES, weight=4.0)
    assert torch.equal(bias[1], alone[1])


def test_soft_weighted_boxes_compare_share_times_log(handle, inputs) -> None:
    quarter, half = (0, 0, 6, 6), (0, 0, 6, 12)  # of the first token
    bias = handle.key_bias(inputs, [[quarter, half], [quarter]], SIZES, weight=[[8.0, 2.0], [0.0]], soft=True)
    first, second = torch.zeros(4, 4), torch.zeros(4, 4)
    first[0, 0] = max(0.25 * math.log(8.0), 0.5 * math.log(2.0))
    second[0, 0] = -math.inf
    torch.testing.assert_close(bias, on_image(inputs, [first, second]), atol=1e-6, rtol=0)
    assert first[0, 0] == pytest.approx(0.25 * math.log(8.0))  # not simply the one that covers the most


@pytest.mark.parametrize("soft", [False, True])
def test_complements(handle, inputs, soft: bool) -> None:
    boxes = [[(0, 0, 30, 12)], []]
    inside = torch.zeros(4, 4)
    inside[0, :3] = torch.tensor([1.0, 1.0, 0.5 if soft else 1.0])
    expected = on_image(inputs, [1 - inside, torch.ones(4, 4)]) * math.log(0.1)
    arguments = {"weight": 0.1, "soft": soft}
    image = handle.key_bias(inputs, boxes, SIZES, complement="image", **arguments)
    torch.testing.assert_close(image, expected, atol=1e-6, rtol=0)
    prompt = handle.key_bias(inputs, boxes, SIZES, complement="prompt", **arguments)
    text = inputs["input_ids"] != IMAGE_TOKEN
    torch.testing.assert_close(prompt, expected + text * math.log(0.1), atol=1e-6, rtol=0)
    removed = handle.key_bias(inputs, boxes, SIZES, weight=0.0, soft=soft, complement="image")
    assert torch.equal(removed == -math.inf, expected != 0)


def test_pasta_scales_attention_outside_and_normalises(model, handle, inputs) -> None:
    """alpha A_ij / C_i outside of the region, A_ij / C_i in it (PASTA, Eq. 2), in the chosen heads of a layer."""
    alpha, layer = 0.1, 2
    weights = torch.ones(LAYERS, HEADS)
    weights[layer, [1, 3]] = alpha
    bias = handle.key_bias(inputs, REGIONS, SIZES, weight=weights, complement="prompt")
    region = handle.region_mask(inputs, REGIONS, SIZES)
    handle.remove()
    attentions = []
    for term in (dense_term(torch.zeros_like(bias), None), dense_term(bias, None)):
        with torch.no_grad(), DenseOracle(model, term) as oracle:
            model(**inputs)
        attentions.append(oracle.attentions[layer][:, :, -1])
    plain, steered = attentions
    scaled = torch.where(region[:, None], plain, alpha * plain)
    scaled = scaled / scaled.sum(-1, keepdim=True)
    torch.testing.assert_close(steered[:, [1, 3]], scaled[:, [1, 3]])
    torch.testing.assert_close(steered[:, [0, 2]], plain[:, [0, 2]])


def test_with_weight_0_for_all_the_rest_rows_see_the_region_or_nothing(model, handle, inputs) -> None:
    region = handle.region_mask(inputs, REGIONS, SIZES)
    bias = handle.key_bias(inputs, REGIONS, SIZES, weight=0.0, complement="prompt")
    assert torch.equal(bias == -math.inf, ~region)
    assert int(region[0].nonzero()[0, 0]) == 2
    with torch.no_grad():
        assert model(**inputs, key_bias=bias).logits.isfinite().all()
        last, before = (
            handle.attention_map(inputs, rows=rows, key_bias=bias, reduction="none")[0]
            for rows in (-1, torch.arange(LENGTH) < 2)
        )
    torch.testing.assert_close(last[..., region[0]].sum(-1), torch.ones(LAYERS, HEADS))
    assert not last[..., ~region[0]].any()
    assert not before.any()


def test_the_weight_may_be_learnt(model, handle, inputs) -> None:
    """d loss / d lambda, against differences."""
    weight = torch.full((LAYERS, 1), 2.0, requires_grad=True)

    def score(weight: torch.Tensor) -> torch.Tensor:
        bias = handle.key_bias(inputs, REGIONS, SIZES, weight=weight)
        return model(**inputs, key_bias=bias).logits[:, -1, 5].sum()

    (gradient,) = torch.autograd.grad(score(weight), weight)
    step = 1e-2
    with torch.no_grad():
        for layer in range(LAYERS):
            up, down = weight.clone(), weight.clone()
            up[layer] += step
            down[layer] -= step
            difference = float(score(up) - score(down)) / (2 * step)
            assert float(gradient[layer]) == pytest.approx(difference, abs=2e-3)
    assert gradient.abs().min() > 1e-3
    scalar = torch.tensor(2.0, requires_grad=True)
    bias = handle.key_bias(inputs, REGIONS, SIZES, weight=scalar)
    torch.testing.assert_close(bias[:, 0, 0], handle.key_bias(inputs, REGIONS, SIZES, weight=2.0))
    assert bias.requires_grad


def test_a_warning_where_all_boxes_of_an_image_are_cropped_away(handle, inputs) -> None:
    """Once per image, whatever their weights, and naming the caller's line."""
    wide, gone, seen = (48, 96), (0, 0, 10, 48), (40, 0, 60, 48)
    with pytest.warns(UserWarning, match=r"boxes\[1\] lie wholly in what") as caught:
        handle.key_bias(inputs, [[gone, seen], [gone, gone]], [wide, wide], weight=[[2.0, 3.0], [2.0, 3.0]])
    assert [warning.filename for warning in caught] == [__file__]


# --- what is refused ---------------------------------------------------------------------------------------------

BAD_KEY_BIAS = {
    "too many layers": ({"weight": torch.ones(2, 4)}, r"weight: expected a number, or .* with L = 3 and H = 4, got"),
    "too many heads": ({"weight": torch.ones(3, 2)}, r"weight: expected a number, or .* with L = 3 and H = 4, got"),
    "no heads": ({"weight": torch.ones(3, 0)}, "weight: expected a number, or"),
    "one dimension": ({"weight": torch.ones(3)}, "weight: expected a number, or"),
    "integers": ({"weight": torch.ones(3, 4).int()}, "weight: expected a number, or"),
    "negative in a tensor": ({"weight": torch.tensor([[-1.0]])}, "weight: expected finite numbers >= 0"),
    "NaN in a tensor": ({"weight": torch.tensor([[math.nan]])}, "weight: expected finite numbers >= 0"),
    "infinity in a tensor": ({"weight": torch.tensor([[math.inf]])}, "weight: expected finite numbers >= 0"),
    "negative in a list": ({"weight": [[2.0], [-1.0]]}, r"weight\[1\]\[0\]: expected a finite number >= 0, got -1.0"),
    "NaN in a list": ({"weight": [[math.nan], 1.0]}, r"weight\[0\]\[0\]: expected a finite number >= 0, got nan"),
    "a list per image": ({"weight": [[2.0]]}, "weight: expected a list for each of the 2 images, got 1"),
    "a number per box": ({"weight": [[2.0, 3.0], 1.0]}, r"weight\[0\]: expected one number for each of its 1 boxes"),
    "a list with a complement": (
        {"weight": [[2.0], [2.0]], "complement": "image"},
        "weight: expected a number or a tensor with complement",
    ),
    "complement": ({"complement": "text"}, 'complement: expected None, "image" or "prompt", got \'text\''),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_KEY_BIAS.values(), ids=BAD_KEY_BIAS)
def test_bad_weights_and_complements(handle, inputs, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        handle.key_bias(inputs, REGIONS, SIZES, **arguments)


@pytest.mark.parametrize("weight", ["2", None, True, [["2"], [1.0]]])
def test_weights_that_are_no_numbers(handle, inputs, weight) -> None:
    with pytest.raises(TypeError, match=r"weight.*: expected a finite number >= 0, got"):
        handle.key_bias(inputs, REGIONS, SIZES, weight=weight)


def test_unknown_rows(handle, inputs) -> None:
    with pytest.raises(ValueError, match='rows: expected "all" or "after_image", got \'text\''):
        handle.row_gate(inputs, rows="text")


BAD_FORWARD = {
    "layers of a bias": ({"key_bias": torch.zeros(2, 2, 4, 23)}, ValueError, r"with L = 3 and H = 4, got shape"),
    "heads of a bias": ({"key_bias": torch.zeros(2, 3, 3, 23)}, ValueError, r"with L = 3 and H = 4, got shape"),
    "heads of a bias per head": ({"key_bias": torch.zeros(2, 3, 23)}, ValueError, r"with L = 3 and H = 4, got shape"),
    "five dimensions": ({"key_bias": torch.zeros(2, 3, 4, 1, 23)}, ValueError, r"key_bias: expected shape \(B, P\), "),
    "gate of floats": (
        {"key_bias": torch.zeros(2, 23), "row_gate": torch.ones(2, 23)},
        TypeError,
        r"row_gate: expected a bool tensor \(B, P\), got a tensor of shape \(2, 23\) and dtype torch.float32",
    ),
    "gate of one dimension": (
        {"key_bias": torch.zeros(2, 23), "row_gate": torch.ones(23).bool()},
        ValueError,
        r"row_gate: expected shape \(B, P\), got \(23,\)",
    ),
    "gate of another batch": (
        {"key_bias": torch.zeros(2, 23), "row_gate": torch.ones(3, 23).bool()},
        ValueError,
        "row_gate: expected one row per sequence, here 2, got shape",
    ),
}


@pytest.mark.parametrize(("arguments", "error", "message"), BAD_FORWARD.values(), ids=BAD_FORWARD)
def test_bad_biases_and_gates(model, handle, inputs, arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        model(**inputs, **arguments)
