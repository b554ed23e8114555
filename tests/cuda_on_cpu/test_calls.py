"""What the grid of arguments leaves open: splits of the keys, folded heads, head dimensions, the tiles that are
shipped, and what the kernels do not read.
"""

from __future__ import annotations

import ctypes
import itertools
import re

import pytest
import torch

pytest.importorskip("hypothesis", reason="hypothesis draws some of these cases")
import simulator
from cpu_launcher import CpuLauncher
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import oracle
from attention_cases import ALL_CASES, CASES, Case, check_forward, check_gradients
from finegrain_ops import UnsupportedInputError, reweighted_attention
from finegrain_ops.backends.cuda import launches
from finegrain_ops.backends.cuda.arguments import CROP_RECORD_BYTES, AttentionArguments, CropArguments, MergeArguments
from map_cases import MapCase, check_map, check_map_gradients
from test_operator import operator_arguments
from tolerances import assert_close

ARCHITECTURES = [70, 75, 80]


@pytest.fixture(params=ARCHITECTURES, ids=lambda a: f"sm_{a}")
def launcher(request: pytest.FixtureRequest, use_launcher) -> CpuLauncher:
    return use_launcher(CpuLauncher(request.param))


@pytest.fixture
def volta(use_launcher) -> CpuLauncher:
    return use_launcher(CpuLauncher(70))


@pytest.fixture
def split_into(monkeypatch: pytest.MonkeyPatch):
    def split(count: int) -> None:
        monkeypatch.setattr(launches, "num_splits", lambda *_: count)

    return split


# ------------------------------------------------------------------------------------------------- splits and folding


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("case", ALL_CASES)
def test_split_keys(case: Case, split_into, volta: CpuLauncher) -> None:
    split_into(3)
    check_forward(case, torch.float16, "cuda")
    assert "merge_splits" in {variant.kernel for variant in volta.launched}


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("splits", [1, 2, 5, 64])
@pytest.mark.parametrize("num_keys", [1, 15, 16, 17, 70, 331])
def test_lengths(num_keys: int, splits: int, split_into, launcher: CpuLauncher) -> None:
    """Also more splits than tiles: the rest of them have nothing to do, and weigh nothing in the merge."""
    split_into(splits)
    case = Case(2, 6, 2, 1, num_keys, 32, 32, region="bn", weight=2.0, padding="left", is_causal=True)
    check_forward(case, torch.float16, "cuda")


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("num_queries", [1, 2, 5])
@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize("bias", ["bn", "bhn"])
def test_heads_of_a_group_share_a_tile(bias: str, group: int, num_queries: int, volta: CpuLauncher) -> None:
    """Unless each has a bias of its own."""
    case = Case(2, 2 * group, 2, num_queries, 50, 16, 24, bias=bias, gate="bn", padding="random", is_causal=True)
    check_forward(case, torch.float32, "cuda")


def test_a_decode_step_folds_the_heads_that_share_keys(volta: CpuLauncher, monkeypatch: pytest.MonkeyPatch) -> None:
    grids = []
    monkeypatch.setattr(volta, "launch", lambda variant, grid, arguments: grids.append((variant.kernel, *grid)))
    query, key = torch.randn(2, 8, 1, 64, dtype=torch.float16), torch.randn(2, 2, 640, 64, dtype=torch.float16)
    reweighted_attention(query, key, key, backend="cuda")
    # 2 batch entries, 2 heads of keys, 4 splits for 8 processors with two blocks each; 16 rows, 4 a block
    assert grids == [("attention_forward", 16, 1, 1), ("merge_splits", 4, 1, 1)]


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("filled", [0, 1, 16, 40, 100])
@pytest.mark.parametrize("by", ["padding", "bias"])
def test_an_unfilled_cache_is_neither_seen_nor_read(
    by: str, filled: int, splits: int, split_into, volta: CpuLauncher
) -> None:
    """Its tail holds NaN: a key that was loaded into a product would show."""
    split_into(splits)
    torch.manual_seed(filled)
    query = torch.randn(2, 4, 1, 16)
    key, value = torch.randn(2, 2, 2, 100, 16).unbind(0)
    if filled:
        expected = reweighted_attention(query, key[:, :, :filled], value[:, :, :filled], backend="reference")
    else:
        expected = torch.zeros_like(query)
    whole_tiles = -(-filled // 16) * 16
    key[:, :, whole_tiles:], value[:, :, whole_tiles:] = float("nan"), float("nan")
    keys = torch.arange(100)
    mask = {"key_padding_mask": (keys < filled).expand(2, 100)}
    if by == "bias":
        mask = {"key_bias": torch.where(keys < filled, 0.0, float("-inf"))}
    actual = reweighted_attention(query, key, value, **mask, is_causal=True, backend="cuda")
    torch.testing.assert_close(actual, expected, atol=5e-6, rtol=0)


def test_how_many_splits() -> None:
    class H200:
        num_processors = 132

    assert launches.num_splits(8, 4096, H200(), 64) == 32
    assert launches.num_splits(512, 4096, H200(), 64) == 1
    assert launches.num_splits(1, 100, H200(), 64) == 1
    assert launches.num_splits(1, 10**6, H200(), 64) == 64


# -------------------------------------------------------------------------------------------------- sizes and layouts


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("head_dim", [8, 32, 40, 64, 72, 80, 88, 96, 104, 112, 128])
def test_head_dimensions(head_dim: int, launcher: CpuLauncher) -> None:
    case = Case(1, 1, 1, 19, 35, head_dim, head_dim, region="bn", weight=2.0, is_causal=True, layout="sliced")
    check_forward(case, torch.float16, "cuda")


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("head_dim", [80, 88, 104, 128])
def test_gradients_of_head_dimensions(head_dim: int, launcher: CpuLauncher) -> None:
    case = Case(1, 1, 1, 19, 21, head_dim, head_dim, region="bn", soft=True, weight="b", is_causal=True)
    check_gradients(case, torch.float16, "cuda")


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("head_dim", "value_dim"), [(80, 24), (16, 104), (13, 31)])
def test_value_dimensions(head_dim: int, value_dim: int, volta: CpuLauncher) -> None:
    case = Case(1, 2, 1, 19, 21, head_dim, value_dim, bias="bn", gate="n", is_causal=True)
    check_gradients(case, torch.float32, "cuda")


# Large tiles take seconds to compile and to run: of each architecture those that differ most.
_ALWAYS = [(70, 64, torch.float16), (70, 128, torch.float16), (70, 64, torch.float32), (75, 128, torch.float16)]
_SHIPPED = [
    pytest.param(*key, marks=[] if key in _ALWAYS else pytest.mark.slow)
    for key in itertools.product(ARCHITECTURES, [64, 80, 128], [torch.float16, torch.float32])
]


@pytest.mark.parametrize(("architecture", "head_dim", "dtype"), _SHIPPED)
def test_shipped_tiles(architecture: int, head_dim: int, dtype: torch.dtype, use_launcher) -> None:
    """The tiles of the table, on a length that is no multiple of them."""
    launcher = use_launcher(CpuLauncher(architecture))
    case = Case(1, 1, 1, 150, 150, head_dim, head_dim, bias="bn", removed="some", padding="random", is_causal=True)
    check_forward(case, dtype, "cuda")
    check_gradients(case, dtype, "cuda")
    map_case = MapCase(1, 1, 1, 150, 150, head_dim, head_dim, bias="bn", gate="bn", rows="bn", is_causal=True)
    check_map(map_case, dtype, "cuda")
    check_map_gradients(map_case, dtype, "cuda")
    used = {(variant.kernel, variant.of_map) for variant in launcher.launched}
    assert len(used - {("merge_splits", False)}) == 8


@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_long_variant(head_dim: int, launcher: CpuLauncher) -> None:
    """Taken where there are more rows than one thread block of the other has, and blocks for every processor."""
    case = Case(2, 4, 4, 150, 90, head_dim, head_dim, bias="bn", gate="bn", padding="left", is_causal=True)
    check_forward(case, torch.float16, "cuda")
    assert any(variant.long for variant in launcher.launched)


@pytest.mark.usefixtures("small_tiles")
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
def test_any_combination(case: Case, launcher: CpuLauncher) -> None:
    check_forward(case, torch.float16, "cuda")
    check_gradients(case, torch.float16, "cuda")


def check_strided_masks(dtype: torch.dtype) -> None:
    """Every other entry of bias, padding and gate, which are then no contiguous rows."""
    generator = torch.Generator().manual_seed(5)
    query, key = (torch.randn(2, 2, n, 16, generator=generator).to(dtype) for n in (21, 37))
    bias = torch.randn(2, 2, 74, generator=generator)[..., ::2]
    attend, gate = torch.rand(2, 74, generator=generator)[:, ::2] > 0.3, torch.rand(2, 42, generator=generator) > 0.5
    wide = torch.zeros(2, 74, dtype=torch.bool)
    wide[:, ::2] = attend
    masks = {"key_bias": bias, "key_padding_mask": wide[:, ::2], "row_gate": gate[:, ::2]}
    expected, _ = oracle.reweighted_attention(query, key, key, **masks)
    low, _ = oracle.reweighted_attention(query, key, key, **masks, compute_dtype=dtype)
    actual = reweighted_attention(query, key, key, **masks, backend="cuda")
    assert_close(actual, expected, dtype, "output", low)


@pytest.mark.usefixtures("small_tiles")
def test_strided_masks(launcher: CpuLauncher) -> None:
    check_strided_masks(torch.float16)


@pytest.mark.usefixtures("small_tiles")
def test_inputs_are_not_copied(monkeypatch: pytest.MonkeyPatch, volta: CpuLauncher) -> None:
    """Strided views go to the kernel as they are."""
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda self: pytest.fail("a copy was made"))
    case = Case(2, 4, 2, 21, 37, layout="sliced", is_causal=True)
    reweighted_attention(**case.tensors(torch.float16), backend="cuda")


def test_rows_far_apart_in_memory(volta: CpuLauncher) -> None:
    """Offsets beyond 2^31 elements: 300 keys, 2^23 - 8 elements apart. Pages that are not touched cost no memory."""
    stride, num_keys = 2**23 - 8, 300
    rows = torch.randn(num_keys, 16, dtype=torch.float16)
    memory = torch.empty((num_keys - 1) * stride + 16, dtype=torch.float16)
    key = memory.as_strided((1, 1, num_keys, 16), (0, 0, stride, 1))
    key.copy_(rows)
    query = torch.randn(1, 1, 3, 16, dtype=torch.float16)
    expected = reweighted_attention(query, rows[None, None], rows[None, None], backend="cuda")
    assert torch.equal(reweighted_attention(query, key, key, backend="cuda"), expected)


# ------------------------------------------------------------------------------------------------------------- values


@pytest.mark.usefixtures("small_tiles")
def test_two_runs_are_equal_to_the_bit(launcher: CpuLauncher) -> None:
    """Also with the warps in another order, as every launch here has them."""
    arguments = CASES["grouped heads"].tensors(torch.float16)
    leaves = {name: arguments[name].detach().requires_grad_() for name in ("query", "key", "value")}
    runs = []
    for _ in range(2):
        output = reweighted_attention(**{**arguments, **leaves}, backend="cuda")
        runs.append([output, *torch.autograd.grad(output.float().square().sum(), list(leaves.values()))])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@pytest.mark.parametrize("fill", [torch.finfo(torch.float32).min, -1e30, -1e9])
def test_a_huge_finite_bias_is_no_removal(fill: float, volta: CpuLauncher) -> None:
    """Where nothing better is there, a row sees its keys all the same, as a softmax would."""
    query, key = torch.zeros(1, 1, 3, 16), torch.zeros(1, 1, 5, 16)
    value = torch.randn(1, 1, 5, 16)
    output = reweighted_attention(query, key, value, key_bias=torch.full((5,), fill), backend="cuda")
    torch.testing.assert_close(output, value.mean(2, keepdim=True).expand_as(output))


def test_a_large_bias_does_not_reach_rows_that_do_not_exist(volta: CpuLauncher) -> None:
    """The last tile of rows is filled up with zeros, whose exponentials under such a bias would be infinite."""
    query, key, value = (torch.randn(1, 1, 19, 16, requires_grad=True) for _ in range(3))
    bias = torch.tensor([0.0] * 7 + [300.0] * 12, requires_grad=True)
    leaves = (query, key, value, bias)
    results = []
    for backend in ("reference", "cuda"):
        output = reweighted_attention(query, key, value, key_bias=bias, backend=backend)
        results.append(torch.autograd.grad(output.square().sum(), leaves))
    for expected, actual in zip(*results):
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_unchecked_negative_weights_give_nan(monkeypatch: pytest.MonkeyPatch, volta: CpuLauncher) -> None:
    """On a device nobody has looked at the values: NaN must come out, not a number that looks right."""
    from finegrain_ops import validation

    monkeypatch.setattr(validation, "values_are_checked", lambda tensor: False)
    query, key, value = torch.randn(3, 1, 1, 20, 16).unbind(0)
    weight, mask = torch.tensor(-1.0), torch.ones(20)
    assert reweighted_attention(query, key, value, mask, weight, backend="cuda").isnan().all()


# ------------------------------------------------------------------------------------------------- operators and errors


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_compiled(volta: CpuLauncher) -> None:
    """One graph, forward and backward: the operator's fakes agree with what the kernels return."""
    torch._dynamo.reset()
    query, key, value = (torch.randn(1, 2, 20, 16, requires_grad=True) for _ in range(3))
    bias = torch.randn(20, requires_grad=True)

    def loss(query, key, value, bias):
        return reweighted_attention(query, key, value, key_bias=bias, is_causal=True, backend="cuda").square().sum()

    expected = torch.autograd.grad(loss(query, key, value, bias), (query, key, value, bias))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    actual = torch.autograd.grad(compiled(query, key, value, bias), (query, key, value, bias))
    for a, b in zip(expected, actual):
        torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("requires_grad", [False, True], ids=["no_grad", "grad"])
def test_opcheck(requires_grad: bool, volta: CpuLauncher) -> None:
    """Schema, fakes and autograd are those of every backend, and they fit this one."""
    torch.library.opcheck(
        torch.ops.finegrain_ops.reweighted_attention.default,
        operator_arguments(requires_grad, "cuda", "cpu", gate=True),
    )
    query, key = (torch.randn(2, heads, 5, 8, requires_grad=requires_grad) for heads in (4, 2))
    rows = torch.rand(2, 5) > 0.5
    torch.library.opcheck(
        torch.ops.finegrain_ops.attention_map.default,
        (query, key, None, None, None, rows, None, None, True, 0.3, requires_grad, "cuda"),
    )
    packed_query, packed_key = (torch.randn(9, heads, 8, requires_grad=requires_grad) for heads in (4, 2))
    cu_seqlens = torch.tensor([0, 4, 9], dtype=torch.int32)
    packed = (packed_query, packed_key, packed_key, cu_seqlens, cu_seqlens, 5, 5, None, None)
    torch.library.opcheck(
        torch.ops.finegrain_ops.reweighted_attention_varlen.default, (*packed, True, 0.3, True, requires_grad, "cuda")
    )


def test_what_is_not_supported(volta: CpuLauncher) -> None:
    """The reasons name what came and what to do."""

    def refusal(dtype: torch.dtype, head_dim: int) -> str:
        query = torch.randn(1, 1, 4, head_dim, dtype=dtype)
        with pytest.raises(UnsupportedInputError) as error:
            reweighted_attention(query, query, query, backend="cuda")
        return str(error.value)

    assert "compute capability is 7.0, and bfloat16 needs 8.0" in refusal(torch.bfloat16, 16)
    assert "torch.float64 is not supported" in refusal(torch.float64, 16)
    assert "query's head dimension is 136; at most 128 is supported" in refusal(torch.float16, 136)


def declared_fields(structure: str) -> list[tuple[str, int]]:
    """Names and bytes of the fields in csrc/arguments.cuh, without padding."""
    text = (simulator.CSRC / "arguments.cuh").read_text()
    body = re.search(rf"struct {structure} \{{(.*?)\n\}};", text, re.DOTALL)
    assert body is not None
    code = re.sub(r"//.*", "", body.group(1))
    kinds = {"Rows": 32, "int": 4, "float": 4, "long long": 8}
    fields = []
    for kind, pointer, name, count in re.findall(r"([\w ]+?)\s*(\*?)\s+(\w+)(?:\[(\d+)\])?;", code):
        fields.append((name, 8 if pointer else kinds[kind.strip()] * int(count or 1)))
    assert len(fields) == code.count(";")
    return fields


@pytest.mark.parametrize("structure", [AttentionArguments, MergeArguments, CropArguments], ids=lambda s: s.__name__)
def test_arguments_are_laid_out_as_the_kernels_expect(structure: type[ctypes.Structure]) -> None:
    """csrc/arguments.cuh names the same fields in the same order; fields of 8 bytes first, so there is no padding."""
    expected = declared_fields(structure.__name__)
    assert [(name, ctypes.sizeof(kind)) for name, kind in structure._fields_] == expected
    assert ctypes.sizeof(structure) == sum(size for _, size in expected)


def test_the_size_of_a_crop_record() -> None:
    assert sum(size for _, size in declared_fields("CropRecord")) == CROP_RECORD_BYTES
