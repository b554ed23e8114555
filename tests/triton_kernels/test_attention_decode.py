"""The Triton decode kernels: few rows, keys dealt out to several programs, and a merge."""

from __future__ import annotations

import pytest
import torch

from attention_cases import ALL_CASES, Case, check_forward
from finegrain_ops import reweighted_attention
from finegrain_ops.kernels import attention_decode, attention_forward
from finegrain_ops.kernels.tuning import decode_splits

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("small_tiles")]


@pytest.fixture
def splits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(attention_decode, "decode_splits", lambda *_: request.param)
    return request.param


@pytest.mark.parametrize("splits", [1, 3], indirect=True, ids=["whole", "split"])
@pytest.mark.parametrize("case", ALL_CASES)
def test_arguments(case: Case, splits: int, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """Every argument, also with more rows than this kernel is chosen for."""
    monkeypatch.setattr(attention_decode, "MOST_ROWS", 1000)
    check_forward(case, torch.float32, "triton", device)


@pytest.mark.parametrize("splits", [1, 2, 5, 64], indirect=True)
@pytest.mark.parametrize("num_keys", [1, 15, 16, 17, 70, 331])
def test_lengths(num_keys: int, splits: int, dtype: torch.dtype, device: str) -> None:
    """Also more splits than blocks: the rest of them have nothing to do, and weigh nothing in the merge."""
    case = Case(2, 6, 2, 1, num_keys, 32, 32, region="bn", weight=2.0, padding="left", is_causal=True)
    check_forward(case, dtype, "triton", device)


@pytest.mark.parametrize("num_queries", [1, 2, 5])
@pytest.mark.parametrize("group", [1, 3, 8])
def test_heads_of_a_group_share_a_tile(group: int, num_queries: int, device: str) -> None:
    case = Case(2, 2 * group, 2, num_queries, 50, 16, 24, bias="bhn", gate="bn", padding="random", is_causal=True)
    check_forward(case, torch.float32, "triton", device)


@pytest.mark.parametrize("filled", [0, 1, 16, 40, 100])
@pytest.mark.parametrize("by", ["padding", "bias"])
def test_an_unfilled_cache_is_neither_seen_nor_read(filled: int, by: str, device: str) -> None:
    """Its tail holds NaN: a key that was loaded into a product would show."""
    torch.manual_seed(filled)
    query = torch.randn(2, 4, 1, 16, device=device)
    key, value = torch.randn(2, 2, 2, 100, 16, device=device).unbind(0)
    if filled:
        expected = reweighted_attention(query, key[:, :, :filled], value[:, :, :filled], backend="reference")
    else:
        expected = torch.zeros_like(query)
    whole_blocks = -(-filled // 16) * 16
    key[:, :, whole_blocks:], value[:, :, whole_blocks:] = float("nan"), float("nan")
    keys = torch.arange(100, device=device)
    mask = {"key_padding_mask": (keys < filled).expand(2, 100)}
    if by == "bias":
        mask = {"key_bias": torch.where(keys < filled, 0.0, float("-inf"))}
    actual = reweighted_attention(query, key, value, **mask, is_causal=True, backend="triton")
    torch.testing.assert_close(actual, expected, atol=5e-6, rtol=0)


def test_the_filled_part_is_shared_evenly(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """Blocks are dealt out in turn, so that every split has some of a cache that is filled to a quarter."""
    lse_of_splits = []
    merge = attention_decode.merge_splits_kernel

    class Spy:
        def __getitem__(self, grid):
            def launch(partial_output, partial_lse, *args, **kwargs):
                lse_of_splits.append(partial_lse.clone())
                return merge[grid](partial_output, partial_lse, *args, **kwargs)

            return launch

    monkeypatch.setattr(attention_decode, "merge_splits_kernel", Spy())
    monkeypatch.setattr(attention_decode, "decode_splits", lambda *_: 4)
    query, key = torch.randn(1, 1, 1, 16, device=device), torch.randn(1, 1, 256, 16, device=device)
    attend = (torch.arange(256, device=device) < 64)[None]
    reweighted_attention(query, key, key, key_padding_mask=attend, backend="triton")
    assert lse_of_splits[0].isfinite().all()


def test_the_grid_depends_on_shapes_alone() -> None:
    assert decode_splits(programs=8, num_keys=4096, num_processors=132, block_n=64) == 32
    assert decode_splits(programs=512, num_keys=4096, num_processors=132, block_n=64) == 1
    assert decode_splits(programs=1, num_keys=100, num_processors=132, block_n=64) == 1
    assert decode_splits(programs=1, num_keys=10**6, num_processors=132, block_n=64) == 64


@pytest.mark.parametrize(
    ("num_queries", "group", "is_decode"), [(1, 1, True), (8, 8, True), (9, 8, False), (65, 1, False)]
)
def test_which_calls_are_for_this_kernel(
    num_queries: int, group: int, is_decode: bool, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    called = []
    for module in (attention_decode, attention_forward):
        name = module.__name__.rpartition(".")[2]
        launch = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, launch=launch, name=name: (called.append(name), launch(*a)))
    query, key = torch.randn(1, group, num_queries, 16, device=device), torch.randn(1, 1, 40, 16, device=device)
    reweighted_attention(query, key, key, backend="triton")
    assert called == ["attention_decode" if is_decode else "attention_forward"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
def test_captured_in_a_cuda_graph() -> None:
    """Captured once while the cache is nearly empty, replayed while it fills."""
    query = torch.randn(2, 8, 1, 64, dtype=torch.float16, device="cuda")
    key, value = torch.randn(2, 2, 2, 512, 64, dtype=torch.float16, device="cuda").unbind(0)
    bias, attend = torch.zeros(2, 512, device="cuda"), torch.zeros(2, 512, dtype=torch.bool, device="cuda")

    def step() -> torch.Tensor:
        return reweighted_attention(
            query, key, value, key_bias=bias, key_padding_mask=attend, is_causal=True, backend="triton"
        )

    attend[:, :3] = True
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step()
    for filled in (3, 200, 512):
        attend[:, :filled] = True
        bias[:, : filled // 2] = 0.7
        graph.replay()
        assert torch.equal(output, step())
