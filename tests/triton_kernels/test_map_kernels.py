"""The Triton kernels of attention_map, forward and backward."""

from __future__ import annotations

import pytest
import torch

from finegrain_ops import attention_map, reweighted_attention
from finegrain_ops.kernels import attention_map as kernels
from map_cases import ALL_MAP_CASES, MAP_CASES, MapCase, check_map, check_map_gradients

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("small_tiles")]


@pytest.mark.parametrize("case", ALL_MAP_CASES)
def test_arguments(case: MapCase, dtype: torch.dtype, device: str) -> None:
    check_map(case, dtype, "triton", device)


@pytest.mark.parametrize("case", ALL_MAP_CASES)
def test_gradients(case: MapCase, dtype: torch.dtype, device: str) -> None:
    check_map_gradients(case, dtype, "triton", device)


@pytest.mark.parametrize("first", [0, 15, 16, 40])
@pytest.mark.parametrize("length", [1, 16, 23])
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_rows_begin_and_end_anywhere(first: int, length: int, is_causal: bool, device: str) -> None:
    """Tiles of rows outside the chosen range are skipped; none within it may be, or counted twice."""
    query, key = torch.randn(1, 2, 61, 16, device=device), torch.randn(1, 2, 50, 16, device=device)
    rows = torch.zeros(61, dtype=torch.bool, device=device)
    rows[first : first + length] = True
    bias = torch.randn(50, device=device)
    call = {"key_bias": bias, "is_causal": is_causal, "backend": "reference"}
    _, known_lse = reweighted_attention(query, key, key, **call, return_lse=True)
    for lse in (None, known_lse):
        arguments = {"rows": rows, "key_bias": bias, "is_causal": is_causal, "lse": lse, "reduction": "none"}
        expected = attention_map(query, key, **arguments, backend="reference")
        actual = attention_map(query, key, **arguments, backend="triton")
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_a_known_lse_saves_a_walk_over_the_keys(device: str) -> None:
    """It is believed: with another lse the map is scaled, where computing it anew would not be."""
    query, key = torch.randn(2, 1, 2, 30, 16, device=device).unbind(0)
    expected = attention_map(query, key, backend="reference")
    _, lse = reweighted_attention(query, key, key, return_lse=True, backend="reference")
    actual = attention_map(query, key, lse=lse - torch.log(torch.tensor(2.0)), backend="triton")
    torch.testing.assert_close(actual, 2.0 * expected, atol=1e-5, rtol=1e-5)


def test_rows_that_are_not_chosen_are_not_computed(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """With the stated range of rows cut short, the chosen rows beyond it are missing."""
    range_kernel = kernels.row_range_kernel

    class Shortened:
        def __getitem__(self, grid):
            def launch(rows, row_range, *args, **kwargs):
                range_kernel[grid](rows, row_range, *args, **kwargs)
                row_range[:, 1] = 16

            return launch

    monkeypatch.setattr(kernels, "row_range_kernel", Shortened())
    query, key = torch.randn(2, 1, 2, 48, 16, device=device).unbind(0)
    rows = torch.ones(48, dtype=torch.bool, device=device)
    actual = attention_map(query, key, rows=rows, backend="triton")
    expected = attention_map(query, key, rows=torch.arange(48, device=device) < 16, backend="reference")
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["grouped heads", "everything"])
def test_two_runs_are_equal_to_the_bit(name: str, device: str) -> None:
    arguments = MAP_CASES[name].tensors(torch.float32, device)
    leaves = [arguments[n].requires_grad_() for n in ("query", "key", "key_bias") if n in arguments]
    runs = []
    for _ in range(2):
        result = attention_map(**arguments, backend="triton")
        runs.append([result.detach(), *torch.autograd.grad(result.square().sum(), leaves)])
    assert all(torch.equal(first, second) for first, second in zip(*runs))
