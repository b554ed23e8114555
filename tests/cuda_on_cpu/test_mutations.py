"""Kernels broken on purpose: each change must make the simulator report an error, or the numbers wrong. A change that
nothing notices is a gap in the tests, or a line that is not needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import simulator
import torch
from cpu_launcher import CpuLauncher
from test_calls import check_strided_masks

from attention_cases import CASES, check_forward, check_gradients
from finegrain_ops import reweighted_attention_varlen, validation
from finegrain_ops.backends.cuda import launches
from map_cases import MAP_CASES, check_map, check_map_gradients
from packed_cases import check_rows_in_no_sequence

Check = Callable[[torch.dtype], None]


def _forward(*names: str) -> list[Check]:
    return [lambda dtype, name=name: check_forward(CASES[name], dtype, "cuda") for name in names]


def _gradients(*names: str) -> list[Check]:
    return [lambda dtype, name=name: check_gradients(CASES[name], dtype, "cuda") for name in names]


def _map(*names: str) -> list[Check]:
    return [lambda dtype, name=name: check_map(MAP_CASES[name], dtype, "cuda") for name in names]


def _map_gradients(*names: str) -> list[Check]:
    return [lambda dtype, name=name: check_map_gradients(MAP_CASES[name], dtype, "cuda") for name in names]


def _wild_lengths(dtype: torch.dtype) -> None:
    """cu_seqlens that nobody has checked, as on a device."""
    check_rows_in_no_sequence("cuda", torch.float16)

    query = torch.randn(20, 2, 16, dtype=dtype)
    wild = torch.tensor([-5, 7, 90], dtype=torch.int32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validation, "values_are_checked", lambda tensor: False)
        reweighted_attention_varlen(query, query, query, wild, wild, 20, 20, backend="cuda")


@dataclass(frozen=True)
class Mutation:
    file: str
    old: str
    new: str
    checks: list[Check]
    architecture: int = 80
    dtype: torch.dtype = torch.float16
    splits: int = 1
    occurrence: int = 0

    @property
    def name(self) -> str:
        return f"{self.file}: {self.old.strip()[:60]!r} -> {self.new.strip()[:40]!r} #{self.occurrence}"

    def overrides(self) -> dict[str, str]:
        """The file's text with one occurrence replaced."""
        text = (simulator.CSRC / self.file).read_text()
        parts = text.split(self.old)
        assert len(parts) > self.occurrence + 1, f"{self.file} has no occurrence {self.occurrence} of {self.old!r}"
        head = self.old.join(parts[: self.occurrence + 1])
        return {self.file: head + self.new + self.old.join(parts[self.occurrence + 1 :])}


_SYNC, _WAIT = "__syncthreads();", "wait_for_copies<0>();"
_EVERYTHING = _forward("row gate and padding", "bias per head with -inf", "decode", "grouped heads")

MUTATIONS = [
    # barriers and waits
    Mutation("attention_forward.cuh", _SYNC, "", _EVERYTHING, occurrence=0),
    Mutation("attention_forward.cuh", _SYNC, "", _EVERYTHING, occurrence=1),
    Mutation("attention_forward.cuh", _SYNC, "", _EVERYTHING, occurrence=0, architecture=70),
    Mutation("attention_forward.cuh", _SYNC, "", _EVERYTHING, occurrence=1, architecture=70),
    Mutation("attention_forward.cuh", _SYNC, "__syncwarp();", _EVERYTHING, occurrence=0),
    Mutation("attention_forward.cuh", _WAIT, "", _EVERYTHING, occurrence=0),
    Mutation("attention_forward.cuh", _WAIT, "", _EVERYTHING, occurrence=1),
    Mutation("attention_forward.cuh", "commit_copies();", "", _EVERYTHING, occurrence=0),
    Mutation("attention_forward.cuh", "bias_tiles.put(turn ^ 1", "bias_tiles.put(turn", _EVERYTHING),
    Mutation("scores.cuh", _SYNC, "", _forward("left padding")),
    Mutation("attention_rows.cuh", _SYNC, "", _map("bias"), occurrence=0),
    Mutation("attention_rows.cuh", _SYNC, "", _map("bias"), occurrence=1),
    Mutation("attention_rows.cuh", _WAIT, "", _map("bias")),
    Mutation("attention_map.cuh", _SYNC, "", _map("bias"), occurrence=0),
    Mutation("attention_map.cuh", _SYNC, "", _map("bias"), occurrence=1),
    Mutation("attention_backward_query.cuh", _SYNC, "", _gradients("bias"), occurrence=0),
    Mutation("attention_backward_query.cuh", _SYNC, "", _gradients("bias"), occurrence=1),
    Mutation("attention_backward_query.cuh", _WAIT, "", _gradients("bias")),
    Mutation("attention_backward_keys.cuh", _SYNC, "", _gradients("bias"), occurrence=0),
    Mutation("attention_backward_keys.cuh", _SYNC, "", _gradients("bias"), occurrence=1),
    Mutation("attention_backward_keys.cuh", _WAIT, "", _gradients("bias"), occurrence=0),
    # bounds
    Mutation("tiles.cuh", "< count;\n#if", "< count || true;\n#if", _forward("plain")),
    Mutation("tiles.cuh", "if (plan.column >= dim) count = 0;", "", _forward("sliced memory")),
    Mutation("tiles.cuh", "row < count && plan.column < dim;", "true;", _forward("plain")),
    Mutation("tiles.cuh", "row < count && column < dim ?", "row < count ?", _forward("odd head dimension")),
    Mutation("tiles.cuh", "row < count && column < dim ?", "column < dim ?", _forward("odd head dimension")),
    Mutation("tiles.cuh", "if (column < dim) store_vector(", "store_vector(", _forward("plain")),
    Mutation("tiles.cuh", "if (column + 1 < dim)", "", _forward("odd head dimension")),
    Mutation("tiles.cuh", "min(max(cu_seqlens[batch], 0), total)", "cu_seqlens[batch]", [_wild_lengths]),
    Mutation("attention_forward.cuh", "if (lane_rows.exists(r, s))\n", "", _forward("plain")),
    Mutation("attention_forward.cuh", "lse.data && lane_rows.exists(r, s) &&", "lse.data &&", _forward("plain")),
    Mutation("scores.cuh", "key < num_keys && (!has_padding", "(!has_padding", _forward("plain")),
    Mutation("scores.cuh", "has_bias && key < num_keys ?", "has_bias ?", _forward("bias")),
    Mutation("attention_backward_query.cuh", "if (lane_rows.exists(0, s))\n", "", _gradients("plain")),
    Mutation("attention_backward_keys.cuh", "if (!keys.exists(s)) continue;", "", _gradients("plain")),
    Mutation("attention_backward_keys.cuh", "keys.exists(s) && Matrix", "Matrix", _gradients("bias")),
    Mutation("attention_map.cuh", "keys.exists(s) && WarpMatrix", "WarpMatrix", _map("plain")),
    Mutation("scores_transposed.cuh", "query < sequence.num_queries;", "true;", _gradients("plain")),
    Mutation("merge_splits.cuh", "if (row >= num_rows) return;", "", _forward("one kv head"), splits=3),
    # bias, gate, masks
    Mutation("scores.cuh", "fetched_hidden + bias.added(first_key + threadIdx.x)", "fetched_hidden",
             _forward("bias")),
    Mutation("scores.cuh", "bias_in_base_2(bias[key])", "bias[key]", _forward("bias")),
    Mutation("scores.cuh", "is_gated ? added.y : hidden.y", "added.y", _forward("row gate")),
    Mutation("scores.cuh", "is_gated ? added.x : hidden.x", "hidden.x", _forward("row gate")),
    Mutation("scores.cuh", "8 * c + e > last_column", "8 * c + e > last_column + 1", _forward("plain causal")),
    Mutation("scores.cuh", "8 * c + e > last_column", "8 * c + e >= last_column", _forward("plain causal")),
    Mutation("scores.cuh", "if (is_masked) hide_later_keys", "if (false) hide_later_keys", _forward("plain causal")),
    Mutation("tiles.cuh", "return data[index * stride];", "return data[index];", [check_strided_masks]),
    Mutation("scores.cuh", "last_query + sequence.shift + 1", "last_query + 1", _forward("more keys than queries")),
    Mutation("scores.cuh", "highest = max(highest, key + 1)", "highest = max(highest, key)", _forward("left padding")),
    Mutation("scores.cuh", "!arguments.gate.data;", "true;", _forward("bias removes every key of gated rows")),
    Mutation("scores.cuh", "(split + own * num_splits) * S::STEP;", "own * S::STEP;", _forward("bias"), splits=3),
    Mutation("scores_transposed.cuh", "keys.added[s] : keys.hidden[s]) - lse.x",
             "keys.hidden[s] : keys.hidden[s]) - lse.x", _gradients("bias")),
    Mutation("scores_transposed.cuh", "gate.y != 0.0f ?", "true ?", _gradients("row gate")),
    Mutation("scores_transposed.cuh", "if (visible < 0) first", "if (visible < -1) first", _gradients("plain causal")),
    Mutation("scores_transposed.cuh", "if (visible < -1) second", "if (visible < -2) second",
             _gradients("plain causal")),
    Mutation("scores_transposed.cuh", "first_key - sequence.shift, 0", "first_key + S::STEP - sequence.shift, 0",
             _gradients("plain causal")),
    Mutation("scores_transposed.cuh", "arguments.row_mask.data)", "false)", _map("rows")),
    Mutation("attention_map.cuh", "!arguments.head_mask || arguments.head_mask[head]", "true", _map("heads")),
    Mutation("attention_forward.cuh", "arguments.is_causal && first_key", "first_key < 0 && first_key",
             _forward("plain causal")),
    # softmax, gradients, splits
    Mutation("attention_forward.cuh", "total[r][s] * correction;", "total[r][s];", _forward("plain")),
    Mutation("attention_forward.cuh", "output[d][r][4 * c + 2 * s + 1] *= correction;", "", _forward("plain")),
    Mutation("attention_forward.cuh", "maximum_of_row<WarpMatrix<typename S::Element>>(highest)", "highest",
             _forward("plain")),
    Mutation("attention_forward.cuh", "total == 0.0f ? 0.0f : 1.0f / total", "1.0f / total",
             _forward("a padded row")),
    Mutation("scores.cuh", "lse == -infinity() ? infinity() :", "", _gradients("a padded row")),
    Mutation("scores_transposed.cuh", ": infinity();", ": 0.0f;", _map("rows")),
    Mutation("attention_backward_query.cuh", "(grad - delta[s])", "grad", _gradients("plain")),
    Mutation("attention_backward_query.cuh", "0, s, arguments.scale,", "0, s, 1.0f,", _gradients("plain")),
    Mutation("attention_backward_keys.cuh", " - delta.y)", ")", _gradients("plain")),
    Mutation("attention_backward_keys.cuh", "gate.x * first + gate.y * second", "first + second",
             _gradients("row gate")),
    Mutation("attention_backward_keys.cuh", "kv_head * group_size + member", "kv_head * group_size",
             _gradients("grouped heads")),
    Mutation("attention_rows.cuh", "total[s] *= exp2_fast(maximum[s] - highest);", "", _map("plain")),
    Mutation("attention_rows.cuh", "expectation / sum", "sum", _map_gradients("plain")),
    Mutation("merge_splits.cuh", "exp2_fast((arguments.partial_lse[partial_row] - maximum) * LOG2_E) *", "1.0f *",
             _forward("bias"), splits=3),
    Mutation("merge_splits.cuh", "maximum = 0.0f;", ";", _forward("a padded row"), splits=3),
    # where lanes hold what
    Mutation("warp_matrix.cuh", "const bool is_second_row = lane & 2", "const bool is_second_row = lane & 1",
             _forward("plain"), architecture=70),
    Mutation("warp_matrix.cuh", "is_right_half ? other : own[pair];", "own[pair];", _forward("plain"), architecture=70),
    Mutation("warp_matrix.cuh", "(lane & 15) * stride + (lane >> 4) * 8);", "(lane & 15) * stride);",
             _forward("plain"), occurrence=1),
    Mutation("warp_matrix.cuh", "first | ((k & 7) >> 1)", "first", _forward("plain"), dtype=torch.float32),
]  # fmt: skip


def _run(checks: list[Check], dtype: torch.dtype) -> None:
    for check in checks:
        check(dtype)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_a_broken_kernel_is_noticed(mutation: Mutation, use_launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    if mutation.splits > 1:
        monkeypatch.setattr(launches, "num_splits", lambda *_: mutation.splits)
    use_launcher(CpuLauncher(mutation.architecture, mutation.overrides()))
    with pytest.raises((AssertionError, simulator.SimulatorError)) as noticed:
        _run(mutation.checks, mutation.dtype)
    assert not str(noticed.value).startswith("g++"), "the mutation does not compile"


@pytest.mark.usefixtures("small_tiles")
def test_the_checks_pass_without_a_mutation(use_launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    """So what fails above fails for the mutation."""
    for key in {(m.architecture, m.splits) for m in MUTATIONS}:
        with monkeypatch.context() as patch:
            if key[1] > 1:
                patch.setattr(launches, "num_splits", lambda *_, splits=key[1]: splits)
            use_launcher(CpuLauncher(key[0]))
            for mutation in MUTATIONS:
                if (mutation.architecture, mutation.splits) == key:
                    _run(mutation.checks, mutation.dtype)
