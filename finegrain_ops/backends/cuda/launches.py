"""Which kernels a call needs, with which arguments and on which grid. Nothing here knows how they are compiled."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from ..interface import AttentionCall, AttentionGradients, MapCall, MapGradients, PackedCall
from .arguments import AttentionArguments, MergeArguments, as_bytes, is_aligned, with_unit_stride
from .machine import Launcher
from .variants import Variant, has_long, width_for

ELEMENT_OF = {torch.float16: "half_t", torch.bfloat16: "bfloat16_t", torch.float32: "float"}

# With at most so many rows the heads of a KV group share a tile: a decode step.
MOST_FOLDED_ROWS = 64
MOST_SPLITS = 64

_Call = AttentionCall | PackedCall | MapCall


# A call would spend a third of its time on the host on making these anew.
_variant = functools.lru_cache(maxsize=1024)(Variant)


class Launch:
    """One call on its way to the kernels: its shapes, and arguments that all of them share."""

    def __init__(self, launcher: Launcher, call: _Call) -> None:
        self.launcher, self.call = launcher, call
        self.packed = call if isinstance(call, PackedCall) else None
        self.query, self.key = with_unit_stride(call.query), with_unit_stride(call.key)
        value = None if isinstance(call, MapCall) else with_unit_stride(call.value)
        self.value_dim = self.query.shape[-1] if value is None else value.shape[-1]
        self.heads, self.kv_heads = self.query.shape[1], self.key.shape[1]
        self.rows_in_memory = self.query.shape[-2] if self.packed is None else self.query.shape[0]
        self.keys_in_memory = self.key.shape[-2] if self.packed is None else self.key.shape[0]
        self.batch = self.query.shape[0] if self.packed is None else self.packed.cu_seqlens_q.numel() - 1
        self.longest_query = self.rows_in_memory if self.packed is None else self.packed.max_seqlen_q
        self.longest_key = self.keys_in_memory if self.packed is None else self.packed.max_seqlen_k

        self.arguments = AttentionArguments(
            batch=self.batch,
            heads=self.heads,
            kv_heads=self.kv_heads,
            num_queries=self.rows_in_memory,
            num_keys=self.keys_in_memory,
            head_dim=self.query.shape[-1],
            value_dim=self.value_dim,
            is_causal=call.is_causal,
            num_splits=1,
            scale=call.scale,
        )
        self.in_memory: list[Tensor] = []  # what is read or written 16 bytes at a time
        for name, tensor in (("query", self.query), ("key", self.key), ("value", value)):
            self.view(name, tensor)
        bias, gate = call.key_bias, as_bytes(call.row_gate)
        if self.packed is None:
            assert not isinstance(call, PackedCall)
            self.arguments.view("bias", bias, 0, 1, 2)
            self.arguments.view("padding", as_bytes(call.key_padding_mask), 0, None, 1)
            self.arguments.view("gate", gate, 0, None, 1)
        else:
            self.arguments.view("bias", bias, None, 0, 1)
            self.arguments.view("gate", gate, None, None, 0)
            self.arguments.point("cu_seqlens_q", self.packed.cu_seqlens_q)
            self.arguments.point("cu_seqlens_k", self.packed.cu_seqlens_k)

    def view(self, name: str, tensor: Tensor | None) -> None:
        """A tensor (B, H, N, D), or packed (T, H, D), in the element type of the call."""
        if tensor is not None:
            self.in_memory.append(tensor)
            if self.packed is None:
                self.arguments.view(name, tensor, 0, 1, 2)
            else:
                self.arguments.view(name, tensor, None, 1, 0)

    def view_scores(self, name: str, tensor: Tensor | None) -> None:
        """A tensor (B, H, N), or packed (H, T)."""
        if self.packed is None:
            self.arguments.view(name, tensor, 0, 1, 2)
        else:
            self.arguments.view(name, tensor, None, 0, 1)

    def variant(self, kernel: str, *, long: bool = False, of_map: bool = False) -> Variant:
        width = width_for(max(self.query.shape[-1], self.value_dim))
        assert width is not None, "not_supported_reasons has let a wider head through"
        element = ELEMENT_OF[self.query.dtype]
        return _variant(kernel, element, width, self.launcher.architecture, long, of_map)

    def run(self, variant: Variant, rows: int, heads: int) -> None:
        """One thread block per variant.rows of `rows`, split, head and batch entry."""
        arguments = self.arguments
        arguments.blocks = math.ceil(rows / variant.rows)
        columns = [self.query.shape[-1], self.value_dim]
        arguments.aligned = is_aligned(self.in_memory, columns)
        grid = arguments.blocks * arguments.num_splits * heads * self.batch
        if grid > 0:  # packed sequences may all be empty
            self.launcher.launch(variant, (grid, 1, 1), arguments)

    def view_gradients(self, gradients: AttentionGradients | MapGradients) -> None:
        self.view("grad_query", gradients.query)
        self.view("grad_key", gradients.key)
        self.view_scores("grad_bias", gradients.key_bias)

    def select(self) -> None:
        """Which rows and heads of an attention map count."""
        assert isinstance(self.call, MapCall)
        self.arguments.view("row_mask", as_bytes(self.call.rows), 0, None, 1)
        heads = as_bytes(self.call.heads)
        self.arguments.point("head_mask", None if heads is None else heads.contiguous())


def forward(launcher: Launcher, call: AttentionCall | PackedCall, output: Tensor, lse: Tensor | None) -> None:
    """Writes output, and lse if given."""
    launch = Launch(launcher, call)
    group = launch.heads // launch.kv_heads
    bias_is_shared = call.key_bias is None or call.key_bias.shape[-2] == 1
    fold = launch.packed is None and group > 1 and bias_is_shared and launch.longest_query * group <= MOST_FOLDED_ROWS
    rows, heads = launch.longest_query, launch.heads
    if fold:
        rows, heads = rows * group, launch.kv_heads
        launch.arguments.fold_heads = 1
    tiles = heads * launch.batch
    variant = launch.variant("attention_forward")
    if has_long(variant.kernel, variant.element):
        long = launch.variant("attention_forward", long=True)
        # Fewer, larger thread blocks only where there are enough of them.
        if rows > variant.rows and tiles * math.ceil(rows / long.rows) >= launcher.num_processors:
            variant = long
    blocks = tiles * math.ceil(rows / variant.rows)
    splits = 1 if launch.packed else num_splits(blocks, launch.keys_in_memory, launcher, variant.tile.step)
    if splits == 1:
        launch.view("output", output)
        launch.view_scores("lse", lse)
        launch.run(variant, rows, heads)
        return

    arguments = launch.arguments
    partial_output = output.new_empty((splits, *output.shape), dtype=torch.float32)
    partial_lse = output.new_empty((splits, *output.shape[:-1]), dtype=torch.float32)
    arguments.view("output", partial_output, 1, 2, 3)
    arguments.view("lse", partial_lse, 1, 2, 3)
    arguments.output_split_stride, arguments.lse_split_stride = partial_output.stride(0), partial_lse.stride(0)
    arguments.num_splits = splits
    launch.run(variant, rows, heads)
    merge(launcher, partial_output, partial_lse, output, lse)


def num_splits(blocks: int, num_keys: int, launcher: Launcher, step: int) -> int:
    """Into how many parts the keys of each head are dealt, so that every processor has two thread blocks at least; a
    part has two tiles of keys at least.
    """
    wanted = math.ceil(2 * launcher.num_processors / blocks) if blocks < launcher.num_processors else 1
    return max(1, min(wanted, num_keys // (2 * step), MOST_SPLITS))


def merge(launcher: Launcher, partial_output: Tensor, partial_lse: Tensor, output: Tensor, lse: Tensor | None) -> None:
    splits, batch, heads, num_queries, value_dim = partial_output.shape
    arguments = MergeArguments(
        batch=batch, heads=heads, num_queries=num_queries, value_dim=value_dim, num_splits=splits
    )
    arguments.point("partial_output", partial_output)
    arguments.point("partial_lse", partial_lse)
    arguments.view("output", output, 0, 1, 2)
    arguments.point("lse", lse)
    variant = _variant("merge_splits", ELEMENT_OF[output.dtype], 128, launcher.architecture)
    rows = batch * heads * num_queries
    launcher.launch(variant, (math.ceil(rows / variant.tile.warps), 1, 1), arguments)


def backward(
    launcher: Launcher,
    call: AttentionCall | PackedCall,
    lse: Tensor,
    delta: Tensor,
    grad_output: Tensor,
    grad_lse: Tensor | None,
    gradients: AttentionGradients,
) -> None:
    """Writes the gradients; that of the bias for every head, (B, H, Nk) or packed (H, Tk). delta is overwritten."""
    launch = Launch(launcher, call)
    launch.view("grad_output", with_unit_stride(grad_output))
    launch.view_scores("lse", lse)
    launch.view_scores("delta", delta)
    launch.view("grad_value", gradients.value)
    launch.view_gradients(gradients)
    launch.run(launch.variant("attention_backward_query"), launch.longest_query, launch.heads)
    if gradients.key_bias is not None and grad_lse is not None:  # see attention_backward_query.cuh
        delta -= grad_lse
    launch.run(launch.variant("attention_backward_keys"), launch.longest_key, launch.kv_heads)


def attention_map(launcher: Launcher, call: MapCall, lse: Tensor, lse_is_known: bool, result: Tensor) -> None:
    """Writes result (B, H, Nk), and lse (B, H, Nq) unless it is known."""
    launch = Launch(launcher, call)
    launch.select()
    launch.view_scores("lse", lse)
    if not lse_is_known:
        launch.run(launch.variant("attention_rows"), launch.longest_query, launch.heads)
    launch.view_scores("map", result)
    launch.run(launch.variant("attention_map"), launch.longest_key, launch.heads)


def attention_map_backward(
    launcher: Launcher,
    call: MapCall,
    lse: Tensor,
    grad_map: Tensor,
    gradients: MapGradients,
) -> None:
    """Writes the gradients; that of the bias for every head, (B, H, Nk)."""
    launch = Launch(launcher, call)
    launch.select()
    launch.view_scores("lse", lse)
    launch.view_scores("map", grad_map)
    launch.view_scores("delta", torch.empty_like(lse))
    launch.run(launch.variant("attention_rows", of_map=True), launch.longest_query, launch.heads)
    launch.view_gradients(gradients)
    launch.run(launch.variant("attention_backward_query", of_map=True), launch.longest_query, launch.heads)
    launch.run(launch.variant("attention_backward_keys", of_map=True), launch.longest_key, launch.kv_heads)
