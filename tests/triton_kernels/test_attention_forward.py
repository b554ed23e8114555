"""The Triton forward kernel against the float64 oracle: on a CPU in the interpreter or as PTX, on a GPU on that."""

from __future__ import annotations

import pytest
import torch

import finegrain_ops
from attention_cases import ALL_CASES, Case, check_forward
from finegrain_ops import reweighted_attention
from finegrain_ops.backends.interface import AttentionFeatures
from finegrain_ops.kernels import arguments, attention_decode

pytestmark = pytest.mark.triton


@pytest.fixture(autouse=True)
def no_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cases are small enough for the kernel that is for few rows; here the other one is tested."""
    monkeypatch.setattr(attention_decode, "MOST_ROWS", 0)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("case", ALL_CASES)
def test_arguments(case: Case, dtype: torch.dtype, device: str) -> None:
    check_forward(case, dtype, "triton", device)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("head_dim", [16, 32, 48, 64, 72, 80, 88, 96, 104, 112, 128, 160, 192, 224, 256])
def test_head_dimensions(head_dim: int, device: str) -> None:
    """In one, two and three parts, filled and not."""
    case = Case(1, 1, 1, 19, 35, head_dim, head_dim, region="bn", weight=2.0, is_causal=True, layout="sliced")
    check_forward(case, torch.float16, "triton", device)


@pytest.mark.parametrize("element_size", [2, 4])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_shipped_tiles(head_dim: int, element_size: int, device: str) -> None:
    """The tiles of the table, on a length that is no multiple of them."""
    dtype = {2: torch.float16, 4: torch.float32}[element_size]
    case = Case(1, 1, 1, 150, 150, head_dim, head_dim, bias="bn", removed="some", padding="random", is_causal=True)
    check_forward(case, dtype, "triton", device)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("start", [0, 15, 16, 17, 40, 63])
@pytest.mark.parametrize("length", [0, 1, 16, 24])
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_the_biased_range_begins_and_ends_anywhere(start: int, length: int, is_causal: bool, device: str) -> None:
    """Keys outside the range run a loop that never reads the bias; inside it, every key must get its own."""
    torch.manual_seed(start)
    query, key, value = torch.randn(3, 1, 2, 64, 16, device=device).unbind(0)
    bias = torch.zeros(1, 64, device=device)
    bias[0, start : start + length] = torch.linspace(1.0, 3.0, min(length, 64 - start), device=device)
    expected = reweighted_attention(query, key, value, key_bias=bias, is_causal=is_causal, backend="reference")
    actual = reweighted_attention(query, key, value, key_bias=bias, is_causal=is_causal, backend="triton")
    torch.testing.assert_close(actual, expected, atol=5e-6, rtol=0)


def _with_range(monkeypatch: pytest.MonkeyPatch, index: int, value: int) -> None:
    """Overwrites one of the four numbers of the prepared range (key_bias.py)."""
    prepare = arguments.prepare_key_bias

    def changed(*args, **kwargs):
        prepared = prepare(*args, **kwargs)
        prepared.key_range[..., index] = value
        return prepared

    monkeypatch.setattr(arguments, "prepare_key_bias", changed)


@pytest.mark.usefixtures("small_tiles")
def test_unbiased_blocks_do_not_read_the_bias(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """The stated range is believed: with it cut short, the bias beyond it is not seen. So blocks outside it do no bias
    work.
    """
    query, key, value = torch.randn(3, 1, 1, 64, 16, device=device).unbind(0)
    bias = torch.randn(64, device=device)
    only_first = torch.where(torch.arange(64, device=device) < 16, bias, 0.0)
    expected = reweighted_attention(query, key, value, key_bias=only_first, backend="reference")
    _with_range(monkeypatch, 1, 16)
    actual = reweighted_attention(query, key, value, key_bias=bias, backend="triton")
    torch.testing.assert_close(actual, expected, atol=5e-6, rtol=0)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("index", "value"), [(2, 16), (3, 48)], ids=["before", "after"])
def test_keys_that_no_row_sees_are_not_visited(
    index: int, value: int, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """An unfilled cache or padding costs nothing: the range of visible keys is believed too."""
    query, key, value_tensor = torch.randn(3, 1, 1, 64, 16, device=device).unbind(0)
    keys = torch.arange(64, device=device)
    attend = (keys >= value) if index == 2 else (keys < value)
    everything = torch.ones(1, 64, dtype=torch.bool, device=device)
    expected = reweighted_attention(query, key, value_tensor, key_padding_mask=attend[None], backend="reference")
    _with_range(monkeypatch, index, value)
    actual = reweighted_attention(query, key, value_tensor, key_padding_mask=everything, backend="triton")
    torch.testing.assert_close(actual, expected, atol=5e-6, rtol=0)


@pytest.mark.parametrize("fill", [torch.finfo(torch.float32).min, -1e30, -1e9])
def test_a_huge_finite_bias_is_no_removal(fill: float, device: str) -> None:
    """Where nothing better is there, a row sees its keys all the same, as a softmax would."""
    query, key = torch.zeros(1, 1, 3, 16, device=device), torch.zeros(1, 1, 5, 16, device=device)
    value = torch.randn(1, 1, 5, 16, device=device)
    output = reweighted_attention(query, key, value, key_bias=torch.full((5,), fill, device=device), backend="triton")
    torch.testing.assert_close(output, value.mean(2, keepdim=True).expand_as(output))


def test_rows_far_apart_in_memory(device: str) -> None:
    """Offsets beyond 2^31 elements: 300 keys, 2^23 - 8 elements apart. Pages that are not touched cost a CPU no memory.

    Only compiled code can overflow here: the interpreter counts with Python's integers.
    """
    stride, num_keys = 2**23 - 8, 300
    rows = torch.randn(num_keys, 16, dtype=torch.float16, device=device)
    memory = torch.empty((num_keys - 1) * stride + 16, dtype=torch.float16, device=device)
    key = memory.as_strided((1, 1, num_keys, 16), (0, 0, stride, 1))
    key.copy_(rows)
    assert arguments.addressable(key) is key
    query = torch.randn(1, 1, 3, 16, dtype=torch.float16, device=device)
    expected = reweighted_attention(query, rows[None, None], rows[None, None], backend="triton")
    assert torch.equal(reweighted_attention(query, key, key, backend="triton"), expected)


def test_inputs_are_not_copied(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """Strided views go to the kernel as they are."""
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda self: pytest.fail("a copy was made"))
    case = Case(2, 4, 2, 21, 37, layout="sliced", is_causal=True)
    reweighted_attention(**case.tensors(torch.float16, device), backend="triton")


def test_unchecked_negative_weights_give_nan(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """On a device nobody has looked at the values: NaN must come out, not a number that looks right."""
    from finegrain_ops import validation

    monkeypatch.setattr(validation, "values_are_checked", lambda tensor: False)
    query, key, value = torch.randn(3, 1, 1, 20, 16, device=device).unbind(0)
    weight, mask = torch.tensor(-1.0, device=device), torch.ones(20, device=device)
    assert reweighted_attention(query, key, value, mask, weight, backend="triton").isnan().all()


def test_auto_never_takes_the_interpreter(device: str) -> None:
    if device == "cpu":
        features = AttentionFeatures("cpu", None, torch.float32, 64, 64, False)
        assert finegrain_ops.backends.select("auto", features) == "sdpa"
    else:
        features = AttentionFeatures("cuda", 0, torch.float16, 64, 64, False)
        assert finegrain_ops.backends.select("auto", features) == "triton"
