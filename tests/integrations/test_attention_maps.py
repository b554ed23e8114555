"""`handle.attention_map` against attention matrices in float64, `handle.image_maps` against where the image
processor takes its pixels from, and the way from a prompt to a picture.
"""

from __future__ import annotations

import functools
import math
import re
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import skimage.data
import torch
import transformers
from PIL import Image
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import finegrain_ops
from finegrain_ops.demo import random_llava
from finegrain_ops.families import ImageGrid
from finegrain_ops.geometry import AxisMap, PixelMap
from finegrain_ops.integrations.image_maps import image_map
from finegrain_ops.plot import attention_overlay
from finegrain_ops.tiny_llava.tokenizer import clip_image_processor_class
from tiny_llava import IMAGE_TOKEN, make_bias, make_inputs, make_model

LAYERS, HEADS, LENGTH = 3, 4, 23
DTYPES = [torch.float64, torch.float32]


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture
def inputs():
    return make_inputs()  # left-padded: the second sequence begins with three padding tokens


@pytest.fixture
def handle(model):
    with finegrain_ops.patch(model) as handle:
        yield handle


@pytest.fixture(scope="module")
def matrices() -> list[torch.Tensor]:
    """(B, L, H, Q, K) of the model that was never patched, of each of DTYPES."""
    none = torch.zeros(2, LAYERS, HEADS, LENGTH)
    return [EagerMatrices(dtype, none, EVERY)(make_inputs()) for dtype in DTYPES]


class EagerMatrices:
    """Attention matrices of a dtype throughout, with a bias (B, L, H, P) in the rows of a gate. transformers' own eager
    attention and Llama's norms compute in float32 whatever the dtype, so both are written out here.
    """

    def __init__(self, dtype: torch.dtype, bias: torch.Tensor, gate: torch.Tensor) -> None:
        self.dtype, self.bias, self.gate = dtype, bias, gate
        self.model = make_model().to(dtype)
        for module in self.model.modules():
            if isinstance(module, LlamaRMSNorm):
                module.forward = functools.partial(
                    torch.nn.functional.rms_norm,
                    normalized_shape=module.weight.shape,
                    weight=module.weight,
                    eps=module.variance_epsilon,
                )
        self.seen: list[torch.Tensor] = []

    def _attention(self, module, query, key, value, attention_mask, scaling, **_):
        key, value = (of.repeat_interleave(module.num_key_value_groups, dim=1) for of in (key, value))
        term = self.bias[:, module.layer_idx, :, None] * self.gate[:, None, :, None].to(self.dtype)
        weights = (query @ key.mT * scaling + attention_mask + term).softmax(-1)
        assert weights.dtype == self.dtype
        self.seen.append(weights)
        return (weights @ value).transpose(1, 2), weights

    def __call__(self, inputs) -> torch.Tensor:
        AttentionInterface.register("eager_matrices", self._attention)
        AttentionMaskInterface.register(
            "eager_matrices", lambda **kwargs: eager_mask(**{**kwargs, "allow_is_causal_skip": False})
        )
        self.model.set_attn_implementation({"text_config": "eager_matrices"})
        with torch.no_grad():
            self.model(**{**inputs, "pixel_values": inputs["pixel_values"].to(self.dtype)})
        return torch.stack(self.seen, dim=1)


def assert_close(actual: torch.Tensor, expected: list[torch.Tensor]) -> None:
    """As close to float64 as the same written out in float32 comes, within a factor: both round, each in an order of
    its own, and the model's logits are large. How much that is differs from processor to processor.
    """
    exact, rounded = expected
    atol = 4 * float((rounded - exact).abs().max()) + 1e-6
    assert atol < 1e-3 * exact.abs().max()
    torch.testing.assert_close(actual.double(), exact, atol=atol, rtol=0)


def expected_map(matrices: torch.Tensor, inputs, rows: torch.Tensor, layers: list[int], reduction: str) -> torch.Tensor:
    """By the definition; rows (B, Q) bool."""
    rows = rows & inputs["attention_mask"].bool()
    is_image = inputs["input_ids"] == IMAGE_TOKEN
    per_head = (matrices[:, layers] * rows[:, None, None, :, None]).sum(3) * is_image[:, None, None]
    if reduction == "none":
        return per_head
    total = per_head.sum((1, 2))
    return total if reduction == "sum" else total / (len(layers) * HEADS * rows.sum(1, keepdim=True))


def only(*positions: int) -> torch.Tensor:
    rows = torch.zeros(2, LENGTH, dtype=torch.bool)
    rows[:, list(positions)] = True
    return rows


EVERY = torch.ones(2, LENGTH, dtype=torch.bool)
PER_SEQUENCE = torch.rand(2, LENGTH, generator=torch.Generator().manual_seed(5)) > 0.6
ROWS = {
    "all": (None, EVERY),  # which must leave padding out
    "last": (-1, only(22)),
    "numpy integer": (np.int64(20), only(20)),
    "list": ([21, 5, -1], only(5, 21, 22)),
    "tensor of positions": (torch.tensor([19, 20]), only(19, 20)),
    "mixed with padding": ([0, 22], only(0, 22)),
    "bool": (only(4, 21)[0], only(4, 21)),
    "bool per sequence": (PER_SEQUENCE, PER_SEQUENCE),
}


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize(("rows", "chosen"), ROWS.values(), ids=ROWS)
def test_rows(handle, inputs, matrices, rows, chosen: torch.Tensor, reduction: str) -> None:
    with torch.no_grad():
        actual = handle.attention_map(inputs, rows=rows, reduction=reduction)
    expected = [expected_map(of_dtype, inputs, chosen, list(range(LAYERS)), reduction) for of_dtype in matrices]
    assert actual.shape == expected[0].shape == ((2, LAYERS, HEADS, LENGTH) if reduction == "none" else (2, LENGTH))
    assert actual.dtype == torch.float32
    assert expected[0].sum() > 0.05
    assert_close(actual, expected)


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize(
    ("layers", "chosen"),
    [(None, [0, 1, 2]), (1, [1]), (-1, [2]), ([2, 0], [2, 0]), ([-2, 1], [1]), (torch.tensor([0, 2]), [0, 2])],
    ids=["all", "one", "last", "two in another order", "one twice", "tensor"],
)
def test_layers(handle, inputs, matrices, layers, chosen: list[int], reduction: str) -> None:
    with torch.no_grad():
        actual = handle.attention_map(inputs, rows=-1, layers=layers, reduction=reduction)
    assert_close(actual, [expected_map(of_dtype, inputs, only(22), chosen, reduction) for of_dtype in matrices])


def test_without_a_mask_every_row_counts(handle) -> None:
    inputs = make_inputs(text_lengths=(4, 4))
    without = {name: value for name, value in inputs.items() if name != "attention_mask"}
    with torch.no_grad():
        assert torch.equal(handle.attention_map(without), handle.attention_map(inputs))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shape", ["B P", "B H P", "B L 1 P", "B L H P"])
def test_read_while_steered(model, inputs, matrices, shape: str, gated: bool) -> None:
    strength = torch.rand(LAYERS, HEADS, generator=torch.Generator().manual_seed(2)) * 2
    strength = {"B P": strength[:1, :1], "B H P": strength[:1], "B L 1 P": strength[:, :1], "B L H P": strength}[shape]
    bias = make_bias(inputs["input_ids"])[:, None, None] * strength[None, :, :, None]
    gate = torch.ones(2, LENGTH, dtype=torch.bool)
    if gated:
        gate[0, :21], gate[1, :12] = False, False
    every = bias.expand(2, LAYERS, HEADS, LENGTH)
    expected, plain = (
        [expected_map(of_dtype, inputs, only(18, 22), [0, 2], "none") for of_dtype in of_dtypes]
        for of_dtypes in ([EagerMatrices(dtype, every, gate)(inputs) for dtype in DTYPES], matrices)
    )
    given = {"B P": bias[:, 0, 0], "B H P": bias[:, 0], "B L 1 P": bias, "B L H P": bias}[shape]
    with torch.no_grad(), finegrain_ops.patch(model) as handle:
        actual = handle.attention_map(
            inputs,
            rows=[18, 22],
            layers=[0, 2],
            key_bias=given,
            row_gate=gate if gated else None,
            reduction="none",
        )
    assert_close(actual, expected)
    assert (expected[0] - plain[0]).abs().max() > 1e-2


def test_reading_changes_nothing(model, handle, inputs) -> None:
    with torch.no_grad():
        before = model(**inputs).logits
        handle.attention_map(inputs)
        assert torch.equal(model(**inputs).logits, before)


# --- gradients ---------------------------------------------------------------------------------------------------


def test_gradients_reach_a_shift_of_the_visual_tokens(model, handle, inputs) -> None:
    """ControlMLLM: through a hook on the projector, against differences."""
    region = make_bias(inputs["input_ids"]) != 0
    direction = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(0))
    shift = torch.zeros(2, 16, 64, requires_grad=True)
    hook = model.model.multi_modal_projector.register_forward_hook(lambda module, args, output: output + shift)

    def mass() -> torch.Tensor:
        return handle.attention_map(inputs, rows=-1, reduction="mean")[region].sum()

    (gradient,) = torch.autograd.grad(mass(), shift)
    step, values = 2e-2, []
    with torch.no_grad():
        for sign in (1, -1):
            shift = sign * step * direction
            values.append(float(mass()))
    hook.remove()
    slope = float((gradient * direction).sum())
    assert slope == pytest.approx((values[0] - values[1]) / (2 * step), rel=2e-2)
    assert abs(slope) > 1e-3


def test_inputs_embeds_beside_input_ids(model, handle, inputs) -> None:
    """The model is given the embeddings. A few steps down ControlMLLM's energy draw attention to the region."""
    ids = inputs["input_ids"]
    region = make_bias(ids) != 0
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(ids)
        features = model.model.multi_modal_projector(
            model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
        )
        embeddings = embeddings.masked_scatter((ids == IMAGE_TOKEN)[..., None], features)
        expected = handle.attention_map(inputs, rows=-1)
    embedded = {"input_ids": ids, "attention_mask": inputs["attention_mask"], "inputs_embeds": embeddings}
    with torch.no_grad():
        torch.testing.assert_close(handle.attention_map(embedded, rows=-1), expected, atol=1e-5, rtol=0)
    energies = []
    for _ in range(4):
        embedded["inputs_embeds"].requires_grad_()
        attention = handle.attention_map(embedded, rows=-1)
        energy = ((1 - (attention * region).sum(1) / attention.sum(1)) ** 2).sum()
        (gradient,) = torch.autograd.grad(energy, embedded["inputs_embeds"])
        assert gradient[region].abs().sum() > 0
        assert not gradient[inputs["attention_mask"] == 0].any()
        energies.append(float(energy.detach()))
        embedded["inputs_embeds"] = (embedded["inputs_embeds"] - 0.5 * gradient / gradient.norm()).detach()
    assert energies == sorted(energies, reverse=True)
    assert energies[-1] < 0.9 * energies[0]


def test_under_no_grad_nothing_is_kept(handle, inputs) -> None:
    assert handle.attention_map(inputs).requires_grad
    with torch.no_grad():
        assert not handle.attention_map(inputs).requires_grad


# --- what is refused ---------------------------------------------------------------------------------------------

BAD = {
    "row beyond the end": ({"rows": 23}, ValueError, "rows: expected -23 to 22, got 23"),
    "row before the start": ({"rows": [-24]}, ValueError, "rows: expected -23 to 22, got -24"),
    "no rows": ({"rows": []}, ValueError, "rows: expected at least one position, got none"),
    "rows of text": ({"rows": "last"}, TypeError, "rows: expected a bool tensor, a position or a list of positions"),
    "rows of floats": ({"rows": torch.tensor([1.0])}, TypeError, "rows: expected integers, got float 1.0"),
    "a list of bools": ({"rows": [True] * 23}, TypeError, "rows: expected integers, got bool True"),
    "rows of another length": (
        {"rows": torch.ones(22).bool()},
        ValueError,
        "rows: expected (23,) or (2, 23) bool, got shape (22,)",
    ),
    "rows of another batch": (
        {"rows": torch.ones(3, 23).bool()},
        ValueError,
        "rows: expected (23,) or (2, 23) bool, got shape (3, 23)",
    ),
    "only padding": (
        {"rows": [1, 2]},
        ValueError,
        "rows: expected positions that are not padding, got list [1, 2], which is nothing but padding in sequence 1",
    ),
    "layer beyond the end": ({"layers": 3}, ValueError, "layers: expected -3 to 2, got 3"),
    "no layers": ({"layers": []}, ValueError, "layers: expected at least one, got an empty list"),
    "layers of text": ({"layers": "last"}, TypeError, "layers: expected an index or a list of them, got str 'last'"),
    "a bool layer": ({"layers": True}, TypeError, "layers: expected an index or a list of them, got bool True"),
    "reduction": ({"reduction": "max"}, ValueError, "reduction: expected one of 'sum', 'mean', 'none', got str 'max'"),
    "key_bias": ({"key_bias": torch.zeros(3, 23)}, ValueError, "key_bias: expected one row per sequence, here 2"),
    "row_gate": ({"row_gate": torch.ones(2, 23)}, TypeError, "row_gate: expected a bool tensor (B, P)"),
}


@pytest.mark.parametrize(("arguments", "error", "message"), BAD.values(), ids=BAD)
def test_bad_arguments(handle, inputs, arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        handle.attention_map(inputs, **arguments)


def test_the_last_row_of_a_batch_padded_on_the_right_is_refused(handle, inputs) -> None:
    """It would be a map of zeros for the shorter sequences."""
    right = {
        "input_ids": torch.stack([inputs["input_ids"][0], inputs["input_ids"][1].roll(-3)]),
        "attention_mask": torch.stack([inputs["attention_mask"][0], inputs["attention_mask"][1].roll(-3)]),
        "pixel_values": inputs["pixel_values"],
    }
    with pytest.raises(ValueError, match="nothing but padding in sequence 1; pad on the left, or give"):
        handle.attention_map(right, rows=-1)
    last = torch.zeros(2, LENGTH, dtype=torch.bool)
    last[0, 22], last[1, 19] = True, True
    with torch.no_grad():
        assert (handle.attention_map(right, rows=last).sum(1) > 0.1).all()


def test_a_reader_of_a_model_that_is_not_patched(inputs) -> None:
    from finegrain_ops.integrations.attention_reading import AttentionReader

    reader = AttentionReader([0, 1], lambda num_rows: torch.ones(2, num_rows, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="attention_reader was not called in every layer"):
        reader.attention  # noqa: B018


# --- maps in the image's pixels ----------------------------------------------------------------------------------


def small_processor(do_pad: bool):
    """24 x 24 pixels, 4 x 4 tokens: a centre crop, or a square around the image."""
    side = {"height": 24, "width": 24}
    if not do_pad:
        image_processor = clip_image_processor_class()(size={"shortest_edge": 24}, crop_size=side)
    else:
        try:
            from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil as OnPillow
        except ModuleNotFoundError:
            OnPillow = transformers.LlavaImageProcessor
        image_processor = OnPillow(size={"shortest_edge": 24}, crop_size=side, do_pad=True)
    return SimpleNamespace(image_processor=image_processor)


@pytest.mark.parametrize(
    ("do_pad", "image_size", "extent"),
    [
        (False, (48, 96), (24, 0, 72, 48)),
        (False, (96, 48), (0, 24, 48, 72)),
        (False, (48, 48), (0, 0, 48, 48)),
        (True, (48, 96), (0, -24, 96, 72)),
        (True, (96, 48), (-24, 0, 72, 96)),
        (True, (37, 60), (0, -11, 60, 49)),  # the odd pixel comes after the image
    ],
)
def test_extent_and_sum(model, inputs, do_pad: bool, image_size, extent) -> None:
    attention = torch.rand(2, LENGTH)
    with finegrain_ops.patch(model, small_processor(do_pad)) as handle:
        maps = handle.image_maps(inputs, attention, [image_size, image_size])
    assert len(maps) == 2
    for i, of_image in enumerate(maps):
        on_image = attention[i, inputs["input_ids"][i] == IMAGE_TOKEN]
        assert torch.equal(of_image.values, on_image.reshape(4, 4))
        assert of_image.extent == extent


@pytest.mark.parametrize("do_pad", [False, True])
@pytest.mark.parametrize("image_size", [(48, 96), (96, 48), (37, 61)])
def test_the_hottest_token_lies_over_the_pixels_that_it_was_made_of(model, inputs, do_pad: bool, image_size) -> None:
    """A spot that is white or black: the token whose pixels change the most must cover it."""
    height, width = image_size
    processor = small_processor(do_pad)
    for y, x in ((height // 2, width // 2), (height // 2 + 8, width // 2 - 9), (height // 2 - 12, width // 2 + 7)):
        processed = []
        for colour in (0, 255):
            picture = np.full((height, width, 3), 128, dtype=np.uint8)
            picture[y - 1 : y + 2, x - 1 : x + 2] = colour
            processed.append(processor.image_processor(Image.fromarray(picture), return_tensors="pt")["pixel_values"])
        change = (processed[1] - processed[0])[0, 0].abs().reshape(4, 6, 4, 6).sum((1, 3))
        attention = torch.zeros(2, LENGTH)
        attention[0, inputs["input_ids"][0] == IMAGE_TOKEN] = change.flatten()
        with finegrain_ops.patch(model, processor) as handle:
            of_image, _ = handle.image_maps(inputs, attention, [image_size, image_size])
        row, column = divmod(int(of_image.values.argmax()), 4)
        x0, y0, x1, y1 = of_image.extent
        token_y, token_x = (y1 - y0) / 4, (x1 - x0) / 4
        # The spot is 3 pixels wide: its middle is at most 1.5 beyond the token that holds the most of it.
        assert y0 + row * token_y - 1.5 <= y + 0.5 <= y0 + (row + 1) * token_y + 1.5
        assert x0 + column * token_x - 1.5 <= x + 0.5 <= x0 + (column + 1) * token_x + 1.5


def test_the_values_of_several_grids_are_added_on_the_finest() -> None:
    """A coarse grid of the whole image and a fine one of it: each coarse token is spread over its place."""
    axis = AxisMap(12, Fraction(12, 48))
    coarse = ImageGrid(PixelMap(axis, axis), (6, 6))  # 2 x 2
    fine = ImageGrid(PixelMap.of_image((48, 48)).resize(24, 18), (6, 6))  # 4 x 3
    coarse_values, fine_values = torch.tensor([4.0, 8.0, 0.0, 12.0]), torch.arange(12.0)
    of_image = image_map([(coarse, coarse_values), (fine, fine_values)])
    assert of_image.extent == (0, 0, 48, 48)
    assert of_image.values.sum() == pytest.approx(float(coarse_values.sum() + fine_values.sum()))
    spread = of_image.values - fine_values.reshape(4, 3)
    # Columns of thirds: the left coarse token gives 2/3 of itself to the first, 1/3 to the middle; over two rows each.
    upper = [4 / 2 * 2 / 3, (4 + 8) / 2 / 3, 8 / 2 * 2 / 3]
    lower = [0.0, 12 / 2 / 3, 12 / 2 * 2 / 3]
    torch.testing.assert_close(spread, torch.tensor([upper, upper, lower, lower]))


def test_what_a_fine_grid_leaves_out_goes_to_its_border() -> None:
    """LLaVA-NeXT's tiles may lack the edge of the image; the sum is that of all tokens all the same."""
    whole = ImageGrid(PixelMap.of_image((48, 48)).resize(12, 12), (6, 6))  # 2 x 2
    middle = ImageGrid(PixelMap.of_image((48, 48)).center_crop(24, 24), (6, 6))  # 4 x 4 on 12 .. 36
    values = torch.tensor([16.0, 0.0, 0.0, 0.0])  # over 0 .. 24
    of_image = image_map([(whole, values), (middle, torch.zeros(16))])
    assert of_image.extent == (12, 12, 36, 36)
    expected = torch.zeros(4, 4)
    expected[:2, :2] = torch.tensor([[9.0, 3.0], [3.0, 1.0]])  # 18 and 6 of 24 pixels, along each axis
    torch.testing.assert_close(of_image.values, expected)


def test_bad_maps(model, inputs) -> None:
    with finegrain_ops.patch(model, small_processor(False)) as handle:
        for bad in (torch.zeros(2, 3, 4, LENGTH), torch.zeros(2, LENGTH - 1), [[0.0] * LENGTH] * 2):
            with pytest.raises(ValueError, match=r"attention: expected \(B, P\) = \(2, 23\) as attention_map gives it"):
                handle.image_maps(inputs, bad, [(48, 48)] * 2)
        with pytest.raises(ValueError, match=r"image_sizes\[1\]: expected \(height, width\)"):
            handle.image_maps(inputs, torch.zeros(2, LENGTH), [(48, 48), (0, 48)])
        with pytest.raises(ValueError, match="inputs: expected 16 image tokens for the 1 images"):
            handle.image_maps(inputs, torch.zeros(2, LENGTH), [(48, 48)])
    with finegrain_ops.patch(model) as handle, pytest.raises(ValueError, match="processor: expected the model's"):
        handle.image_maps(inputs, torch.zeros(2, LENGTH), [(48, 48)] * 2)


# --- from a prompt to a picture ----------------------------------------------------------------------------------


def test_a_finished_picture() -> None:
    """TinyGroundingGPT's (Sec. A.8): the last layer, from an object's tokens, before and after steering."""
    model, processor = random_llava.make()
    photograph = Image.fromarray(skimage.data.coffee())
    sizes, box = [(400, 600)], (322, 212, 412, 330)
    inputs = processor(images=photograph, text="USER: <image> where is the spoon ? ASSISTANT:", return_tensors="pt")
    spoon = inputs["input_ids"] == processor.tokenizer.convert_tokens_to_ids("spoon")
    assert spoon.sum() == 1
    maps = {}
    with torch.no_grad(), finegrain_ops.patch(model, processor) as handle:
        for weight in (1.0, 20.0):
            bias = handle.key_bias(inputs, [[box]], sizes, weight=weight)
            attention = handle.attention_map(inputs, rows=spoon, layers=-1, key_bias=bias)
            (maps[f"weight {weight:g}"],) = handle.image_maps(inputs, attention, sizes)
        region = handle.region_mask(inputs, [[box]], sizes)
        (touched,) = handle.image_maps(inputs, region.float(), sizes)
    before, after = (of_image.values / of_image.values.sum() for of_image in maps.values())
    inside = touched.values.bool()
    assert after[inside].sum() > 2 * before[inside].sum()
    figure = attention_overlay(photograph, {"photograph": None, **maps}, [box])
    figure.canvas.draw()
    assert [axes.get_title() for axes in figure.axes[:3]] == ["photograph", "weight 1", "weight 20"]
    assert all(len(axes.patches) == 1 for axes in figure.axes[:3])
    overlay = figure.axes[2].images[1]
    assert overlay.get_extent() == [100.0, 500.0, 400.0, 0.0]  # the centre crop
    drawn = overlay.get_array()
    assert drawn.shape == (24, 24)
    assert math.isclose(float(drawn.sum()), 1.0, rel_tol=1e-6)
    row, column = np.unravel_index(int(drawn.argmax()), drawn.shape)
    assert box[1] - 17 < (row + 0.5) * 400 / 24 < box[3] + 17
    assert box[0] - 17 < 100 + (column + 0.5) * 400 / 24 < box[2] + 17
