"""Several continuations of one prompt in one KV cache: what they share is computed and stored once.

DualFocus (arXiv 2402.14767, App. A) asks two questions about one image, and goes on from one of them. In each row of a
batch all tokens stand in one sequence of columns; every column belongs to a branch. A token sees the columns before it
of its own branch and of those that this one grew from, which the attention mask says, and counts its position along
them:

    column    0  1  2  3  4  5  6  7  8
    branch    a  a  a  b  b  c  c  b  c         b and c grew from a; 7 and 8 were run together
    position  0  1  2  3  4  3  4  5  5

So the image's keys and values are neither copied nor read once for each branch. Padding, and guesses that turned out
wrong, are columns that no token sees.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from ..errors import UnsupportedModelError
from .reuse import ImagePrefix, positions_of, require_images_in_prompt

_NOBODY = -1  # the branch of a column that no token sees
_BLOCK = 64  # columns by which a cache grows


@dataclass(frozen=True)
class Segment:
    """Tokens of one branch that are run together, right-aligned in each row; all on the CPU.

    tokens: (B, n) int64. is_real: (B, n) bool, False for padding. positions: (B, n) int64, or (3, B, n) with M-RoPE.
    """

    branch: int
    tokens: Tensor
    is_real: Tensor
    positions: Tensor


class PromptTree:
    """A batch of prompts with branches, and their KV cache.

    forwards: how often the decoder ran. tokens: how many tokens went through it, padding not counted.

    Args:
        model: of a family that puts image tokens in the prompt, with sdpa or eager attention.

    Raises:
        UnsupportedModelError: another model, or one whose cache or attention takes no mask of its own for each row.
    """

    def __init__(self, model: Any, batch_size: int) -> None:
        require_tree_model(model)
        self.forwards = 0
        self.tokens = 0
        self._model = model
        self._layers = _growing_layers(model)
        self._cache = DynamicCache()
        self._cache.layers = list(self._layers)
        self._branch = torch.empty(batch_size, 0, dtype=torch.long)  # of every column
        self._sees = torch.zeros(0, 0, dtype=torch.bool)  # (branch, branch): whether the first grew from the second
        self._next: list[list[int]] = []  # per branch and row: the position of the next token
        self._last: list[tuple[int, int]] = []  # per branch: the columns of its last segment
        self._has_sections = hasattr(model.model, "get_rope_index")
        self._longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf

    @classmethod
    def of_prefix(cls, prefix: ImagePrefix) -> PromptTree:
        """With one branch, 0, that is the prefix. Its tensors are shared until something is added."""
        tree = cls(prefix.model, len(prefix.mask))
        trunk = tree.grow()
        tree._branch = torch.where(prefix.mask.cpu(), trunk, _NOBODY)
        tree._next[trunk] = prefix.next_positions.tolist()
        for layer, (keys, values) in zip(tree._layers, prefix.states):
            layer.adopt(keys, values)
        return tree

    @property
    def batch_size(self) -> int:
        return len(self._branch)

    def grow(self, parent: int | None = None) -> int:
        """A new branch, of everything that there is of `parent` so far and later."""
        branch = len(self._next)
        sees = torch.zeros(branch + 1, branch + 1, dtype=torch.bool)
        sees[:branch, :branch] = self._sees
        if parent is not None:
            sees[branch] = sees[parent]
        sees[branch, branch] = True
        self._sees = sees
        self._next.append([0] * self.batch_size if parent is None else list(self._next[parent]))
        self._last.append((0, 0))
        return branch

    def text(self, branch: int, rows: Sequence[Sequence[int]]) -> Segment:
        """A segment of text: for each row its tokens, of any number."""
        first = self._next[branch]
        positions = [torch.arange(start, start + len(tokens)) for start, tokens in zip(first, rows)]
        return self.prompt(branch, rows, positions)

    def prompt(self, branch: int, rows: Sequence[Sequence[int]], positions: Sequence[Tensor]) -> Segment:
        """The same with positions of its own, (n,) or with M-RoPE (3, n) for each row, such as those of images.

        Raises:
            ValueError: there are more positions than the model has.
        """
        for row, of_row in enumerate(positions):
            if of_row.numel():
                self._next[branch][row] = int(of_row.max()) + 1
        longest = max(self._next[branch])
        if longest > self._longest:
            raise ValueError(
                f"context: expected at most {self._longest} positions (the model's max_position_embeddings), got "
                f"{longest} in row {self._next[branch].index(longest)}; use smaller images or a shorter question"
            )
        width = max(map(len, rows))
        counts = torch.tensor([[len(tokens)] for tokens in rows])
        aligned = [F.pad(of_row, (width - of_row.shape[-1], 0)) for of_row in positions]
        return Segment(
            branch,
            tokens=torch.tensor([[0] * (width - len(tokens)) + list(tokens) for tokens in rows], dtype=torch.long),
            is_real=torch.arange(width) >= width - counts,
            positions=torch.stack(aligned, dim=-2),
        )

    @torch.no_grad()
    def run(self, segments: Sequence[Segment], images: Mapping[str, Any] | None = None) -> list[Tensor]:
        """Runs the decoder once over segments of different branches.

        Args:
            images: the model's arguments of the images that the segments show, row by row.

        Returns:
            The last hidden states of each, (B, n, hidden).
        """
        start = self._branch.shape[1]
        for segment in segments:
            end = self._branch.shape[1] + segment.tokens.shape[1]
            self._last[segment.branch] = (self._branch.shape[1], end)
            of_columns = torch.where(segment.is_real, segment.branch, _NOBODY)
            self._branch = torch.cat([self._branch, of_columns], 1)
        device = self._model.device
        hidden = self._model.model(
            input_ids=torch.cat([segment.tokens for segment in segments], 1).to(device),
            attention_mask=self._mask(self._branch.shape[1] - start),
            position_ids=self._positions(segments).to(device),
            past_key_values=self._cache,
            use_cache=True,
            **(images or {}),
        ).last_hidden_state
        self.forwards += 1
        self.tokens += sum(int(segment.is_real.sum()) for segment in segments)
        return list(hidden.split([segment.tokens.shape[1] for segment in segments], 1))

    @torch.no_grad()
    def logits(self, hidden: Tensor, tokens: Tensor | None = None) -> Tensor:
        """(..., vocabulary) of hidden states (..., hidden); of `tokens` alone, (n,) int64, (..., n)."""
        head = self._model.lm_head
        if tokens is not None and _is_plain(head):  # a few rows of a large matrix
            return F.linear(hidden, head.weight[tokens], None if head.bias is None else head.bias[tokens])
        logits: Tensor = head(hidden)
        return logits if tokens is None else logits[..., tokens]

    def take_back(self, branch: int, counts: Sequence[int]) -> None:
        """Forgets the last counts[row] tokens of the branch's last segment."""
        start, end = self._last[branch]
        for row, count in enumerate(counts):
            assert 0 <= count <= end - start
            self._branch[row, end - count : end] = _NOBODY
            self._next[branch][row] -= count

    def select(self, rows: Sequence[int]) -> None:
        """Keeps these rows."""
        if list(rows) == list(range(self.batch_size)):
            return
        self._branch = self._branch[list(rows)]
        self._next = [[of_branch[row] for row in rows] for of_branch in self._next]
        index = torch.tensor(list(rows), dtype=torch.long, device=self._model.device)
        for layer in self._layers:
            layer.batch_select_indices(index)

    def _mask(self, num_rows: int) -> Tensor:
        """(B, 1, rows, columns): 0 where a token sees a column, and as low as the dtype goes elsewhere.

        A token of padding sees itself alone: rows that see nothing would be NaN in some kernels.
        """
        device, dtype = self._model.device, self._model.dtype
        branch = self._branch.to(device)
        of_rows = branch[:, -num_rows:]
        sees = torch.zeros(len(self._sees) + 1, len(self._sees) + 1, dtype=torch.bool)
        sees[:-1, :-1] = self._sees  # the last one is nobody's: index -1
        column = torch.arange(branch.shape[1], device=device)
        row_column = column[-num_rows:, None]
        visible = sees.to(device)[of_rows[:, :, None], branch[:, None, :]] & (column <= row_column)
        visible |= column == row_column
        mask = torch.zeros(visible.shape, dtype=dtype, device=device)
        return mask.masked_fill_(~visible, torch.finfo(dtype).min)[:, None]

    def _positions(self, segments: Sequence[Segment]) -> Tensor:
        positions = [segment.positions for segment in segments]
        if self._has_sections:
            positions = [p if p.dim() == 3 else p.expand(3, *p.shape) for p in positions]
        return torch.cat(positions, -1)


def require_tree_model(model: Any) -> None:
    """Raises UnsupportedModelError where a `PromptTree` of the model could not be right."""
    require_images_in_prompt(model)
    implementation = model.config.get_text_config()._attn_implementation
    if implementation not in ("sdpa", "eager"):
        raise UnsupportedModelError(
            f"expected attention that takes a mask for each row, got attn_implementation={implementation!r}; call "
            'model.set_attn_implementation({"text_config": "sdpa"})'
        )
    _growing_layers(model)


def _is_plain(head: Any) -> bool:
    """Whether its weight and bias say all that it does: it is not quantized, adapted, offloaded or hooked."""
    is_hooked = head._forward_hooks or head._forward_pre_hooks or "forward" in vars(head)
    return type(head) is torch.nn.Linear and not is_hooked


def token_rows(inputs: Mapping[str, Any], start: int = 0) -> list[list[int]]:
    """The tokens of each row of a processor's batch from column `start` on, without padding."""
    rows = zip(inputs["input_ids"][:, start:].tolist(), inputs["attention_mask"][:, start:].tolist())
    return [[token for token, is_real in zip(ids, mask) if is_real] for ids, mask in rows]


def left_padded(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask, (B, P) int64."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(tokens)) + list(tokens) for tokens in rows], device=device)
    mask = torch.tensor([[0] * (width - len(tokens)) + [1] * len(tokens) for tokens in rows], device=device)
    return ids, mask


def positions_in_prompts(model: Any, rows: Sequence[Sequence[int]], images: Mapping[str, Any]) -> list[Tensor]:
    """Of the tokens of whole prompts, as `reuse.positions_of`: (n,) for each row, or (3, n) with M-RoPE; on the CPU.

    Args:
        images: of all rows, in order; only their grids are looked at.
    """
    ids, mask = left_padded(rows, 0, model.device)
    positions = positions_of(model, ids, mask, dict(images))[0].cpu()
    return [positions[..., row, ids.shape[1] - len(tokens) :] for row, tokens in enumerate(rows)]


class _GrowingLayer(DynamicLayer):
    """A layer that writes new tokens into room that it has, instead of copying all that it holds for every one."""

    keys: Tensor
    values: Tensor

    def adopt(self, keys: Tensor, values: Tensor) -> None:
        """Begins with these, (B, H, n, D), which stay as they are."""
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self._key_room = self.keys = keys
        self._value_room = self.values = values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.adopt(key_states[:, :, :0], value_states[:, :, :0])
        start = self.keys.shape[2]
        end = start + key_states.shape[2]
        if end > self._key_room.shape[2]:
            capacity = math.ceil((end + _BLOCK / 2) / _BLOCK) * _BLOCK
            self._key_room = _with_room(self.keys, capacity)
            self._value_room = _with_room(self.values, capacity)
        self._key_room[:, :, start:end] = key_states
        self._value_room[:, :, start:end] = value_states
        self.keys, self.values = self._key_room[:, :, :end], self._value_room[:, :, :end]
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.is_initialized:
            self.adopt(self.keys[indices], self.values[indices])


def _with_room(states: Tensor, capacity: int) -> Tensor:
    """(B, H, n, D) at the start of (B, H, capacity, D)."""
    room = states.new_empty(*states.shape[:2], capacity, states.shape[3])
    room[:, :, : states.shape[2]] = states
    return room


def _growing_layers(model: Any) -> list[_GrowingLayer]:
    layers = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
    kinds = {type(layer) for layer in layers}
    if kinds != {DynamicLayer}:
        raise UnsupportedModelError(
            f"expected a decoder whose KV cache grows, got one of {sorted(kind.__name__ for kind in kinds)}, as "
            "sliding windows have"
        )
    return [_GrowingLayer() for _ in layers]
