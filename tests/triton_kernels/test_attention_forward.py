"""The Triton forward kernel against the float64 oracle: in the interpreter on a CPU, on the device itself on a GPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import finegrain_ops
from attention_cases import ALL_CASES, Case, check_forward
from finegrain_ops import UnsupportedInputError
from finegrain_ops.kernels import attention_forward as forward_module
from finegrain_ops.kernels.tuning import Tile

pytestmark = pytest.mark.triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter computes wrong bfloat16 products.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch) -> None:
    """16 x 16 tiles: every case has several blocks of rows and of keys, and so every loop of the kernel runs."""
    monkeypatch.setattr(forward_module, "forward_tile", lambda *_: Tile(16, 16, num_warps=1, num_stages=1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ALL_CASES)
def test_arguments(case: Case, dtype: torch.dtype) -> None:
    check_forward(case, dtype, "triton", DEVICE)


@pytest.mark.parametrize("head_dim", [16, 32, 48, 64, 72, 80, 88, 96, 104, 128, 160, 192, 256])
def test_head_dimensions(head_dim: int) -> None:
    case = Case(1, 1, 1, 19, 35, head_dim, head_dim, region="bn", weight=2.0, is_causal=True, layout="sliced")
    check_forward(case, torch.float16, "triton", DEVICE)


@pytest.mark.parametrize("element_size", [2, 4])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_shipped_tiles(head_dim: int, element_size: int, monkeypatch) -> None:
    """The tiles of the table, on a length that is no multiple of them."""
    monkeypatch.undo()
    dtype = {2: torch.float16, 4: torch.float32}[element_size]
    case = Case(1, 1, 1, 150, 150, head_dim, head_dim, bias="bn", removed="some", padding="random", is_causal=True)
    check_forward(case, dtype, "triton", DEVICE)


@pytest.mark.parametrize("start", [0, 15, 16, 17, 40, 63])
@pytest.mark.parametrize("length", [0, 1, 16, 24])
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_the_biased_range_begins_and_ends_anywhere(start: int, length: int, is_causal: bool) -> None:
    """Keys outside the range run a loop that never reads the bias; inside it, every key must get its own."""
    torch.manual_seed(start)
    query, key, value = torch.randn(3, 1, 2, 64, 16, device=DEVICE).unbind(0)
    bias = torch.zeros(1, 64, device=DEVICE)
    bias[0, start : start + length] = torch.linspace(1.0, 3.0, min(length, 64 - start), device=DEVICE)
    arguments = {"key_bias": bias, "is_causal": is_causal}
    expected = finegrain_ops.reweighted_attention(query, key, value, **arguments, backend="reference")
    actual = finegrain_ops.reweighted_attention(query, key, value, **arguments, backend="triton")
    torch.testing.assert_close(actual, expected, atol=5e-6, rtol=0)


def test_unbiased_blocks_do_not_read_the_bias(monkeypatch) -> None:
    """The stated range is believed: with it cut short, the bias beyond it is not seen. So blocks outside it do no bias
    work.
    """
    prepare = forward_module.prepare_key_bias

    def shortened(*arguments):
        prepared, key_range = prepare(*arguments)
        key_range[..., 1] = 16
        return prepared, key_range

    query, key, value = torch.randn(3, 1, 1, 64, 16, device=DEVICE).unbind(0)
    bias = torch.randn(64, device=DEVICE)
    only_first = torch.where(torch.arange(64, device=DEVICE) < 16, bias, 0.0)
    expected = finegrain_ops.reweighted_attention(query, key, value, key_bias=only_first, backend="reference")
    monkeypatch.setattr(forward_module, "prepare_key_bias", shortened)
    actual = finegrain_ops.reweighted_attention(query, key, value, key_bias=bias, backend="triton")
    torch.testing.assert_close(actual, expected, atol=5e-6, rtol=0)


def test_rows_far_apart_in_memory() -> None:
    """Offsets beyond 2^31 elements: 20 keys, 2^27 elements apart. Pages that are never touched cost a CPU no memory."""
    stride = 2**27
    rows = torch.randn(20, 16, dtype=torch.float16, device=DEVICE)
    key = torch.empty(19 * stride + 16, dtype=torch.float16, device=DEVICE).as_strided(
        (1, 1, 20, 16), (0, 0, stride, 1)
    )
    key.copy_(rows)
    query = torch.randn(1, 1, 3, 16, dtype=torch.float16, device=DEVICE)
    expected = finegrain_ops.reweighted_attention(query, rows[None, None], rows[None, None], backend="triton")
    assert torch.equal(finegrain_ops.reweighted_attention(query, key, key, backend="triton"), expected)


def test_inputs_are_not_copied(monkeypatch) -> None:
    """Strided views go to the kernel as they are."""
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda self: pytest.fail("a copy was made"))
    case = Case(2, 4, 2, 21, 37, layout="sliced", is_causal=True)
    arguments = case.tensors(torch.float16, DEVICE)
    finegrain_ops.reweighted_attention(**arguments, backend="triton")


@given(
    case=st.builds(
        Case,
        batch=st.just(2),
        heads=st.just(2),
        kv_heads=st.sampled_from([1, 2]),
        num_queries=st.integers(1, 40),
        num_keys=st.integers(1, 50),
        head_dim=st.integers(1, 40),
        value_dim=st.integers(1, 40),
        region=st.sampled_from([None, "n", "bn", "bhn"]),
        soft=st.booleans(),
        weight=st.sampled_from([2.0, "b", "bh"]),
        knocked_out=st.booleans(),
        bias=st.sampled_from([None, "n", "bhn"]),
        removed=st.sampled_from(["none", "some"]),
        padding=st.sampled_from([None, "random", "left", "row"]),
        gate=st.sampled_from([None, "n", "bn"]),
        is_causal=st.booleans(),
        scale=st.sampled_from([None, 0.7, -0.2, 0.0]),
        layout=st.sampled_from(["bnhd", "sliced", "expanded", "transposed"]),
    )
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_combination(case: Case) -> None:
    check_forward(case, torch.float32, "triton", DEVICE)


def test_a_gradient_is_refused_for_now() -> None:
    query = torch.randn(1, 1, 3, 16, device=DEVICE, requires_grad=True)
    with pytest.raises(UnsupportedInputError, match="no backward pass yet"):
        finegrain_ops.reweighted_attention(query, query, query, backend="triton")
    with torch.no_grad():
        finegrain_ops.reweighted_attention(query, query, query, backend="triton")


def test_auto_never_takes_the_interpreter() -> None:
    if DEVICE == "cpu":
        features = finegrain_ops.backends.interface.AttentionFeatures("cpu", None, torch.float32, 64, 64, False)
        assert finegrain_ops.backends.select("auto", features) == "sdpa"
    else:
        features = finegrain_ops.backends.interface.AttentionFeatures("cuda", 0, torch.float16, 64, 64, False)
        assert finegrain_ops.backends.select("auto", features) == "triton"
