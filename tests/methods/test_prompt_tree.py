"""Branches in one KV cache: every hidden state is that of a forward from scratch over its branch's tokens alone."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import tiny_llava
import tiny_models
import tiny_qformer
from finegrain_ops import UnsupportedModelError
from finegrain_ops.methods.prompt_tree import PromptTree, positions_in_prompts, token_rows
from finegrain_ops.methods.reuse import ImagePrefix, align_after_images, images_of

SIZES = [(30, 67), (24, 24), (41, 60)]  # height, width
TEXTS = ["w5 w6 w7 w8", "w9", "w10 w11 w12 w13 w14 w15 w16"]
FAMILIES = ["LLaVA-1.5", "Qwen2.5-VL"]
CLOSE = {"rtol": 0, "atol": 5e-5}


class Walk:
    """A tree and, for every branch and row, all tokens from the beginning; each run is compared with one from scratch.

    Rows are known by their numbers in the whole batch, which are kept in `rows`.
    """

    def __init__(self, family: str, attention: str = "sdpa", device: str = "cpu", dtype: Any = torch.float32) -> None:
        tiny = tiny_models.TINY[family]
        self.model = tiny.make_model(attention).to(device, dtype)
        generator = np.random.default_rng(0)
        images = [Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in SIZES]
        texts = [f"<s> w{4 + i} {tiny.prompt_of_image} {text}" for i, text in enumerate(TEXTS)]
        processor = tiny.make_processor()
        self.inputs = self.on_device(processor(images=images, text=texts, padding=True, return_tensors="pt"))
        self.alone = [
            self.on_device(processor(images=[image], text=[text], return_tensors="pt"))
            for image, text in zip(images, texts)
        ]
        self.rows = [0, 1, 2]
        self.tokens: list[list[list[int]]] = []
        self.tree = PromptTree(self.model, 3)
        self.columns = 0

    def on_device(self, inputs: Any) -> dict[str, torch.Tensor]:
        dtype = self.model.dtype
        device = self.model.device
        return {k: v.to(device, dtype) if v.is_floating_point() else v.to(device) for k, v in inputs.items()}

    def start(self) -> int:
        """The trunk: the whole prompts, of different lengths, with their images."""
        rows, images = token_rows(self.inputs), images_of(self.inputs)
        trunk = self.tree.grow()
        self.tokens.append(rows)
        segment = self.tree.prompt(trunk, rows, positions_in_prompts(self.model, rows, images))
        self.compare(trunk, self.tree.run([segment], images)[0], [len(row) for row in rows])
        self.columns = max(map(len, rows))
        return trunk

    def grow(self, parent: int) -> int:
        self.tokens.append([list(row) for row in self.tokens[parent]])
        return self.tree.grow(parent)

    def say(self, *said: tuple[int, Sequence[Sequence[int]]]) -> None:
        """Branches and what each row says there, in one run."""
        segments = [self.tree.text(branch, rows) for branch, rows in said]
        hidden = self.tree.run(segments)
        for (branch, rows), of_branch in zip(said, hidden):
            self.columns += max(map(len, rows))
            for row, tokens in zip(self.tokens[branch], rows):
                row += tokens
            self.compare(branch, of_branch, [len(tokens) for tokens in rows])

    def compare(self, branch: int, hidden: torch.Tensor, counts: Sequence[int]) -> None:
        assert bool(hidden.isfinite().all())
        assert hidden.shape[1] == max(counts)
        for k, count in enumerate(counts):
            if count:
                expected = self.from_scratch(branch, k)[-count:]
                torch.testing.assert_close(hidden[k, -count:], expected, **CLOSE)

    @torch.no_grad()
    def from_scratch(self, branch: int, k: int) -> torch.Tensor:
        """(N, hidden) of row k's tokens, as a prompt of its own."""
        ids = torch.tensor([self.tokens[branch][k]], device=self.model.device)
        inputs = {**images_of(self.alone[self.rows[k]]), "attention_mask": torch.ones_like(ids)}
        if "mm_token_type_ids" in inspect.signature(type(self.model.model).forward).parameters:
            inputs["mm_token_type_ids"] = (ids == tiny_models.IMAGE_TOKEN).int()
        return self.model.model(input_ids=ids, **inputs, use_cache=False).last_hidden_state[0]

    def take_back(self, branch: int, counts: Sequence[int]) -> None:
        self.tree.take_back(branch, counts)
        for row, count in zip(self.tokens[branch], counts):
            del row[len(row) - count :]

    def select(self, rows: Sequence[int]) -> None:
        self.tree.select(rows)
        self.rows = [self.rows[row] for row in rows]
        self.tokens = [[of_branch[row] for row in rows] for of_branch in self.tokens]


def text(*counts: int, first: int = 20) -> list[list[int]]:
    """Rows of so many tokens, all different."""
    starts = np.cumsum([first, *counts])
    return [[4 + (7 * int(start) + 3 * k) % 80 for k in range(count)] for start, count in zip(starts, counts)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_branches_are_prompts_of_their_own(family: str, attention: str, device: str) -> None:
    walk = Walk(family, attention, device)
    trunk = walk.start()
    a, b, c = (walk.grow(trunk) for _ in range(3))
    walk.say((a, text(3, 1, 2)), (b, text(1, 4, 2, first=30)))
    d = walk.grow(b)
    walk.say((d, text(2, 1, 5, first=40)))
    walk.say((c, text(1, 1, 1, first=50)), (a, text(0, 3, 1, first=60)), (d, text(2, 0, 0, first=70)))
    walk.say((a, text(1, 1, 1, first=15)))
    walk.say((d, text(1, 2, 1, first=25)), (a, text(2, 2, 0, first=35)))
    assert walk.tree.forwards == 6
    of_trunk = [len(row) for row in walk.tokens[trunk]]
    own = [sum(map(len, walk.tokens[branch])) - sum(of_trunk) for branch in (a, c, d)]
    assert walk.tree.tokens == sum(of_trunk) + sum(own)


@pytest.mark.parametrize("family", FAMILIES)
def test_there_is_one_copy_of_the_columns(family: str) -> None:
    """And it grows over many blocks."""
    walk = Walk(family)
    trunk = walk.start()
    leaves = [walk.grow(trunk) for _ in range(3)]
    for turn in range(11):
        said = [(leaf, text(3, 7, 5, first=turn + leaf)) for leaf in leaves]
        walk.say(*said)
        assert walk.tree._branch.shape[1] == walk.columns
        for layer in walk.tree._layers:
            assert layer.keys.shape[0] == layer.values.shape[0] == 3
            assert layer.keys.shape[2] == layer.values.shape[2] == walk.columns
            assert layer._key_room.shape[2] < walk.columns + 100
    assert walk.columns > 3 * 64 + 3


def test_a_cache_is_not_copied_for_every_token() -> None:
    tree = PromptTree(tiny_llava.make_model(), 2)
    branch = tree.grow()
    rooms = []
    for _ in range(200):
        tree.run([tree.text(branch, [[5], [6]])])
        rooms.append(tree._layers[0]._key_room)
    assert len({room.data_ptr() for room in rooms}) <= 4
    assert all(layer.keys.data_ptr() == layer._key_room.data_ptr() for layer in tree._layers)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_taken_back_was_never_there(family: str) -> None:
    walk = Walk(family)
    trunk = walk.start()
    a, b = walk.grow(trunk), walk.grow(trunk)
    walk.say((a, text(3, 1, 4)), (b, text(2, 2, 2, first=40)))
    walk.take_back(a, [2, 0, 4])
    walk.say((a, text(1, 1, 1, first=50)))
    with pytest.raises(AssertionError):
        walk.tree.take_back(b, [0, 0, 3])
    walk.take_back(b, [0, 1, 2])  # of its own last segment, which is not the last one
    walk.say((b, text(2, 0, 3, first=60)), (a, text(2, 2, 2, first=70)))
    walk.take_back(a, [0, 0, 0])
    walk.say((a, text(1, 1, 1, first=10)))
    with pytest.raises(AssertionError):
        walk.tree.take_back(a, [2, 0, 0])


@pytest.mark.parametrize("rows", [[0, 2], [1], [2, 0], [2, 0, 1], [0, 1, 2]])
@pytest.mark.parametrize("family", FAMILIES)
def test_selected_rows_go_on_as_they_were(family: str, rows: list[int]) -> None:
    walk = Walk(family)
    trunk = walk.start()
    a = walk.grow(trunk)
    walk.say((a, text(3, 1, 4)))
    walk.select(rows)
    assert walk.tree.batch_size == len(rows)
    b = walk.grow(trunk)
    walk.say((a, text(2, 1, 3, first=30)[: len(rows)]), (b, text(1, 2, 2, first=40)[: len(rows)]))
    walk.take_back(b, [1] * len(rows))
    walk.say((b, text(1, 1, 1, first=60)[: len(rows)]))
    walk.select([0])
    walk.say((b, text(2, first=70)), (a, text(1, first=75)))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("family", FAMILIES)
def test_any_walk(family: str, seed: int) -> None:
    draw = np.random.default_rng(seed)
    walk = Walk(family)
    leaves = [walk.start()]
    for _ in range(12):
        size = walk.tree.batch_size
        if len(leaves) < 5 and draw.random() < 0.5:  # a branch that others grew from says no more
            parent = leaves.pop(draw.integers(len(leaves)))
            leaves += [walk.grow(parent) for _ in range(draw.integers(2, 4))]
        speaking = [leaf for leaf in leaves if draw.random() < 0.6] or leaves[-1:]
        said = [(leaf, text(*draw.integers(0, 5, size - 1), 1, first=int(draw.integers(80)))) for leaf in speaking]
        walk.say(*said)
        for leaf, rows in said:
            walk.take_back(leaf, [int(draw.integers(0, len(row) + 1)) for row in rows])
        if size > 1 and draw.random() < 0.15:
            walk.select(draw.permutation(size)[: draw.integers(size - 1, size + 1)].tolist())


def test_the_mask_is_that_of_the_picture() -> None:
    """The module's example, with padding beside it and a token taken back: these see themselves alone."""
    tree = PromptTree(tiny_llava.make_model(), 1)
    a = tree.grow()
    tree.run([tree.text(a, [[5, 6, 7]])])
    b, c = tree.grow(a), tree.grow(a)
    tree.run([tree.text(b, [[8, 9]]), tree.text(c, [[10, 11, 12]])])
    tree.take_back(c, [2])
    segments = [tree.text(b, [[13]]), tree.text(c, [[14]])]
    assert [segment.positions.tolist() for segment in segments] == [[[5]], [[4]]]
    tree.run(segments)
    sees = tree._mask(10) == 0
    assert ["".join(".x"[bool(seen)] for seen in row) for row in sees[0, 0]] == [
        "x.........",
        "xx........",
        "xxx.......",
        "xxxx......",
        "xxxxx.....",
        "xxx..x....",
        "......x...",
        ".......x..",
        "xxxxx...x.",
        "xxx..x...x",
    ]
    assert torch.equal(tree._mask(2), tree._mask(10)[:, :, -2:])
    assert float(tree._mask(2).min()) == torch.finfo(torch.float32).min


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_rows_of_padding_in_half_precision(attention: str, dtype: torch.dtype, monkeypatch, device: str) -> None:
    """Finite where nothing is said, and no further from float32 than twice a forward of the same dtype."""
    outputs: dict[Any, list[tuple[torch.Tensor, torch.Tensor]]] = {torch.float32: [], dtype: []}

    def keep(walk: Walk, branch: int, hidden: torch.Tensor, counts: Sequence[int]) -> None:
        assert bool(hidden.isfinite().all())
        for k, count in enumerate(counts):
            if count:
                scratch = walk.from_scratch(branch, k)[-count:]
                outputs[walk.model.dtype].append((hidden[k, -count:].float(), scratch.float()))

    monkeypatch.setattr(Walk, "compare", keep)
    for of_walk in outputs:
        walk = Walk("LLaVA-1.5", attention, device, of_walk)
        trunk = walk.start()
        a, b = walk.grow(trunk), walk.grow(trunk)
        walk.say((a, text(3, 0, 1)), (b, text(0, 2, 0)))
        walk.say((a, text(0, 0, 1, first=40)))
    exact = torch.cat([scratch for _, scratch in outputs[torch.float32]])
    actual, scratch = (torch.cat([pair[k] for pair in outputs[dtype]]) for k in range(2))
    error, budget = ((x - exact).square().mean().sqrt() for x in (actual, scratch))
    assert error <= 2 * budget


@pytest.mark.parametrize("family", FAMILIES)
def test_from_an_image_prefix(family: str) -> None:
    walk = Walk(family)
    aligned = align_after_images(walk.inputs, walk.model)
    prefix = ImagePrefix.prefill(walk.model, aligned)
    before = [(keys.clone(), values.clone()) for keys, values in prefix.states]
    for first in (20, 50):  # two trees of one prefix
        walk.tree = PromptTree.of_prefix(prefix)
        assert walk.tree._layers[0].keys.data_ptr() == prefix.states[0][0].data_ptr()
        ids, mask = (aligned[name][:, : prefix.length] for name in ("input_ids", "attention_mask"))
        walk.tokens = [token_rows({"input_ids": ids, "attention_mask": mask})]
        a, b = walk.grow(0), walk.grow(0)
        walk.say((a, text(3, 1, 2, first=first)), (b, text(1, 2, 4, first=first + 9)))
        walk.say((b, text(1, 1, 0, first=first + 5)), (a, text(1, 0, 1, first=first + 20)))
    for (keys, values), (old_keys, old_values) in zip(prefix.states, before):
        assert torch.equal(keys, old_keys)
        assert torch.equal(values, old_values)


def test_hidden_states_and_logits_need_no_gradient() -> None:
    walk = Walk("LLaVA-1.5")
    walk.start()
    hidden = walk.tree.run([walk.tree.text(0, text(1, 1, 1))])[0]
    logits = walk.tree.logits(hidden)
    assert not hidden.requires_grad
    assert not logits.requires_grad
    torch.testing.assert_close(logits, hidden @ walk.model.lm_head.weight.detach().T, rtol=0, atol=1e-4)


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_more_positions_than_the_model_has() -> None:
    model = tiny_llava.make_model(max_position_embeddings=40)
    tree = PromptTree(model, 2)
    trunk = tree.grow()
    tree.run([tree.text(trunk, [[5] * 38, [6] * 20])])
    leaf = tree.grow(trunk)
    tree.run([tree.text(leaf, [[5] * 2, [6] * 20])])
    with pytest.raises(ValueError, match=r"context: expected at most 40 positions .* got 41 in row 1; use smaller"):
        tree.text(leaf, [[], [6]])
    tree.text(trunk, [[5], [6]])  # 39 and 21
    with pytest.raises(ValueError, match=r"context: .* got 41 in row 0"):
        tree.text(trunk, [[5, 5], []])


def test_models_whose_attention_takes_no_mask_of_its_own(monkeypatch) -> None:
    model = tiny_llava.make_model()
    monkeypatch.setattr(model.config.get_text_config(), "_attn_implementation", "flash_attention_2")
    with pytest.raises(UnsupportedModelError, match="attn_implementation='flash_attention_2'; call"):
        PromptTree(model, 1)


def test_models_with_sliding_windows() -> None:
    sliding = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}
    with pytest.raises(UnsupportedModelError, match="DynamicSlidingWindowLayer"):
        PromptTree(tiny_models.TINY["Qwen2-VL"].make_model(**sliding), 1)
    config = tiny_llava.make_model().config
    options = {k: v for k, v in tiny_models.TEXT.items() if k != "initializer_range"}
    config.text_config = transformers.MistralConfig(**options, sliding_window=32)
    with pytest.raises(UnsupportedModelError, match="expected a decoder whose KV cache grows"):
        PromptTree(transformers.LlavaForConditionalGeneration(config), 1)
    config.text_config = transformers.MistralConfig(**options, sliding_window=None)
    PromptTree(transformers.LlavaForConditionalGeneration(config), 1)


@pytest.mark.parametrize("name", ["instructblip", "blip-2"])
def test_models_without_image_tokens(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"model_type '{name}'"):
        PromptTree(tiny_qformer.make_model(name), 1)
    with pytest.raises(UnsupportedModelError, match="model_type None"):
        PromptTree(torch.nn.Linear(2, 2), 1)
