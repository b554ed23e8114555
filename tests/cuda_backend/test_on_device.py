"""What only a GPU can show of the CUDA backend: streams, graphs and threads, the tiles that are shipped, crops, and the
code for older GPUs, whose instructions later ones have as well. `make gpu` runs these.
"""

from __future__ import annotations

import ctypes
import functools
import threading

import pytest
import torch
from torch import Tensor

import crop_cases
from attention_cases import ALL_CASES, CASES, Case, check_forward, check_gradients
from bench.cuda_variants import OLDER, image
from finegrain_ops import attention_map, backends, crop_resize, reweighted_attention, reweighted_attention_varlen
from finegrain_ops.backends.cuda import machine
from finegrain_ops.backends.cuda.driver import DriverLauncher
from finegrain_ops.backends.cuda.variants import Variant
from finegrain_ops.backends.interface import AttentionFeatures
from map_cases import ALL_MAP_CASES, MapCase, check_map, check_map_gradients
from packed_cases import ALL_PACKED_CASES, PackedCase, check_packed_forward, check_packed_gradients

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

HEAD_DIMS = (32, 40, 64, 72, 80, 88, 96, 104, 112, 128)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FIRST_WITH_ALL_INSTRUCTIONS = 80


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda"


@pytest.fixture(autouse=True)
def fresh_process() -> None:
    """In place of the fixture of conftest.py: here compiled kernels are kept from test to test, and in the cache that
    `make gpu` has filled.
    """
    if reasons := backends.load("cuda").unavailable_reasons():
        pytest.skip("; ".join(reasons))


def require(dtype: torch.dtype) -> None:
    features = AttentionFeatures("cuda", 0, dtype, 64, 64, True, "reweighted_attention")
    if reasons := backends.not_supported_reasons("cuda", features):
        pytest.skip("; ".join(reasons))


class Watched:
    """A launcher that notes what it launches."""

    def __init__(self, launcher: machine.Launcher) -> None:
        self.launcher = launcher
        self.architecture, self.num_processors = launcher.architecture, launcher.num_processors
        self.launched: list[Variant] = []

    def launch(self, variant: Variant, grid: tuple[int, int, int], arguments: ctypes.Structure) -> None:
        self.launched.append(variant)
        self.launcher.launch(variant, grid, arguments)


def use(launcher: machine.Launcher, monkeypatch: pytest.MonkeyPatch) -> Watched:
    watched = Watched(launcher)
    monkeypatch.setattr(machine, "launcher", lambda device: watched)
    return watched


def own_launcher() -> machine.Launcher:
    return machine.launcher(torch.device("cuda", 0))


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    return use(own_launcher(), monkeypatch)


# ----------------------------------------------------------------------------------------- streams, graphs and threads


class DecodeStep:
    """One token of two prompts over a cache whose filled part grows; the keys are dealt out to several blocks."""

    def __init__(self) -> None:
        self.query = torch.randn(2, 8, 1, 64, dtype=torch.float16, device="cuda")
        self.key, self.value = torch.randn(2, 2, 2, 512, 64, dtype=torch.float16, device="cuda").unbind(0)
        self.bias = torch.zeros(2, 512, device="cuda")
        self.attend = torch.zeros(2, 512, dtype=torch.bool, device="cuda")

    def fill(self, length: int) -> None:
        self.attend[:, :length] = True
        self.bias[:, : length // 2] = 0.7

    def __call__(self, backend: str = "cuda") -> Tensor:
        return reweighted_attention(
            self.query,
            self.key,
            self.value,
            key_bias=self.bias,
            key_padding_mask=self.attend,
            is_causal=True,
            backend=backend,
        )


@pytest.mark.parametrize("is_loaded", [True, False], ids=["loaded before", "loaded while captured"])
def test_captured_in_a_cuda_graph(is_loaded: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured once while the cache is nearly empty, replayed while it fills."""
    step = DecodeStep()
    step.fill(3)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    own = own_launcher()
    watched = use(own if is_loaded else DriverLauncher(torch.device("cuda", 0), machine.image), monkeypatch)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step()
    assert [variant.kernel for variant in watched.launched] == ["attention_forward", "merge_splits"]
    use(own, monkeypatch)
    for filled in (3, 200, 512):
        step.fill(filled)
        graph.replay()
        assert torch.equal(output, step())
        torch.testing.assert_close(output, step("reference"), atol=5e-3, rtol=5e-3)


def test_side_stream(device: str) -> None:
    """It sees what its own stream wrote just before, and the default stream does not wait for it."""
    step, stream = DecodeStep(), torch.cuda.Stream()
    step.fill(512)
    expected, query = step(), step.query.clone()
    step.query.zero_()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # some 30 ms, in which a launch on another stream would have run
        step.query.copy_(query)
        actual = step()
    stream.synchronize()
    assert torch.equal(actual, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device_than_the_current_one(device: str) -> None:
    arguments = CASES["row gate and padding"].tensors(torch.float16, "cuda:1")
    assert torch.cuda.current_device() == 0
    output = reweighted_attention(**arguments, backend="cuda")
    assert output.device == torch.device("cuda", 1)
    expected = reweighted_attention(**arguments, backend="reference")
    torch.testing.assert_close(output, expected, atol=5e-3, rtol=5e-3)


def test_a_thread_that_has_not_called_cuda_yet(device: str) -> None:
    step = DecodeStep()
    step.fill(100)
    torch.cuda.synchronize()
    outputs: list[Tensor] = []
    thread = threading.Thread(target=lambda: outputs.append(step()))
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert torch.equal(outputs[0], step())


def test_compiled_forward_and_backward(device: str) -> None:
    """With the default compiler, and no graph break."""

    def layer(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        output = reweighted_attention(query * 2, key, value, key_bias=bias, is_causal=True, backend="cuda")
        return (output.float() * 3).square().sum()

    torch._dynamo.reset()
    torch.manual_seed(0)
    leaves = [torch.randn(2, 4, 70, 64, dtype=torch.float16, device=device, requires_grad=True) for _ in range(3)]
    leaves.append(torch.randn(70, device=device, requires_grad=True))
    results = []
    for function in (layer, torch.compile(layer, fullgraph=True)):
        loss = function(*leaves)
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for expected, actual in zip(*results):
        torch.testing.assert_close(actual, expected, atol=2e-2, rtol=2e-2)


def test_two_runs_are_equal_to_the_bit(device: str, watched: Watched) -> None:
    """Output, lse and all gradients, and a decode step whose parts are merged."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, 700, 80, dtype=torch.float16, device=device) for heads in (6, 2, 2))
    bias, grad = torch.randn(2, 6, 700, device=device), torch.randn_like(query)
    attend = torch.rand(2, 700, device=device) > 0.2
    attend[:, 0] = True  # every row sees a key, so that no lse is infinite
    leaves = [tensor.requires_grad_() for tensor in (query, key, value, bias)]
    runs = []
    for _ in range(2):
        options = {"key_bias": bias, "key_padding_mask": attend, "backend": "cuda"}
        output, lse = reweighted_attention(query, key, value, is_causal=True, return_lse=True, **options)
        loss = (output * grad).float().sum() + lse.sum()
        results = [output, lse, *torch.autograd.grad(loss, leaves)]
        results.append(reweighted_attention(query[:, :, :1], key, value, **options))
        weights = attention_map(query, key, is_causal=True, **options)
        results += [weights, *torch.autograd.grad(weights.square().sum(), [query, key, bias])]
        runs.append(results)
        torch.cuda.synchronize()
    assert all(torch.equal(first, second) for first, second in zip(*runs))
    assert "merge_splits" in {variant.kernel for variant in watched.launched}


# -------------------------------------------------------------------------------------------------- sizes and layouts


def shipped(head_dim: int, num_keys: int) -> tuple[Case, MapCase]:
    """A length that is no multiple of a tile."""
    sizes = (1, 2, 1, num_keys, num_keys, head_dim, head_dim)
    case = Case(*sizes, region="bn", soft=True, weight=2.0, bias="bn", removed="some", padding="random", is_causal=True)
    return case, MapCase(*sizes, bias="bn", gate="bn", rows="bn", is_causal=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_shipped_tiles(head_dim: int, dtype: torch.dtype, device: str, watched: Watched) -> None:
    require(dtype)
    case, map_case = shipped(head_dim, 300)
    check_forward(case, dtype, "cuda", device)
    check_gradients(case, dtype, "cuda", device)
    check_map(map_case, dtype, "cuda", device)
    check_map_gradients(map_case, dtype, "cuda", device)
    used = {(variant.kernel, variant.of_map) for variant in watched.launched}
    assert len(used - {("merge_splits", False)}) == 8


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_the_long_variant(head_dim: int, dtype: torch.dtype, device: str, watched: Watched) -> None:
    """Taken where there are more rows than one thread block of the other has, and blocks for every processor."""
    require(dtype)
    case = Case(8, 16, 4, 300, 200, head_dim, head_dim, bias="bn", gate="bn", padding="random", is_causal=True)
    check_forward(case, dtype, "cuda", device)
    assert any(variant.long for variant in watched.launched)


def test_rows_far_apart_in_memory(device: str) -> None:
    """Offsets beyond 2^31 elements, forward and backward: 300 rows, 2^23 - 8 elements apart."""
    stride, rows = 2**23 - 8, 300
    needed = 2 * ((rows - 1) * stride + 16)
    if torch.cuda.mem_get_info()[0] < 1.2 * needed:
        pytest.skip(f"needs {needed / 1e9:.1f} GB of memory")
    near = torch.randn(1, 1, rows, 16, dtype=torch.float16, device=device)
    memory = torch.empty((rows - 1) * stride + 16, dtype=torch.float16, device=device)
    far = memory.as_strided(near.shape, (0, 0, stride, 1)).copy_(near)
    results = []
    for tensor in (near, far):
        leaves = [tensor.detach().requires_grad_() for _ in range(3)]
        output = reweighted_attention(*leaves, is_causal=True, backend="cuda")
        results.append([output, *torch.autograd.grad(output.float().square().sum(), leaves)])
    assert all(torch.equal(expected, actual) for expected, actual in zip(*results))
    del memory, far, tensor, leaves
    torch.cuda.empty_cache()


def test_sequences_of_very_different_lengths(device: str) -> None:
    """Packed, against each on its own."""
    lengths = (1, 500, 17, 0, 130)
    query, key, value = torch.randn(3, sum(lengths), 4, 64, dtype=torch.float16, device=device).unbind(0)
    starts = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    packed = reweighted_attention_varlen(query, key, value, starts, starts, 500, 500, is_causal=True, backend="cuda")
    parts = [
        reweighted_attention(*(t[None].transpose(1, 2) for t in part), is_causal=True, backend="cuda")[0]
        for part in zip(*(t.split(lengths) for t in (query, key, value)))
        if part[0].shape[0]
    ]
    expected = torch.cat([part.transpose(0, 1) for part in parts])
    torch.testing.assert_close(packed, expected, atol=2e-3, rtol=2e-3)


# --------------------------------------------------------------------------------------------------------- crop_resize


@pytest.fixture
def crops_on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crop_cases, "DEVICE", "cuda")


@pytest.mark.usefixtures("crops_on_device")
@pytest.mark.parametrize("case", crop_cases.ALL_CASES)
def test_crops(case: crop_cases.CropCase, watched: Watched) -> None:
    crop_cases.check(case, "cuda")
    assert {variant.kernel for variant in watched.launched} == {"crop_weights", "crop_resize"}


class Crops:
    """Of a list of images, the boxes in a tensor on the device that is written anew."""

    def __init__(self) -> None:
        sizes = ((300, 400), (90, 70), (1, 1))
        self.images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8, device="cuda") for size in sizes]
        self.boxes = torch.zeros(3, 4, dtype=torch.float64, device="cuda")
        self.index = torch.arange(3, device="cuda")

    def move_to(self, corner: float) -> None:
        for row, size in enumerate((200.5, 40, 1)):
            self.boxes[row] = torch.tensor([corner, corner, corner + size, corner + size])

    def __call__(self, backend: str = "cuda") -> Tensor:
        return crop_resize(self.images, self.boxes, self.index, size=(70, 50), rescale=1, backend=backend)


def test_crops_captured_in_a_cuda_graph() -> None:
    """Boxes that change between replays; before the first call with these images there is nothing to capture."""
    crops = Crops()
    with pytest.raises(RuntimeError, match="run the call once"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        crops()
    crops()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = crops()
    for corner in (0.0, 3.25, 30.0):  # where the last box lies outside its image, which nobody looks at
        crops.move_to(corner)
        graph.replay()
        assert torch.equal(result, crops("reference"))


def test_crops_on_a_side_stream() -> None:
    """It sees what its own stream wrote just before, and the table that another stream has filled."""
    crops, stream = Crops(), torch.cuda.Stream()
    crops.move_to(3.25)
    expected, contents = crops(), [pixels.clone() for pixels in crops.images]
    for pixels in crops.images:
        pixels.zero_()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for pixels, content in zip(crops.images, contents):
            pixels.copy_(content)
        actual = crops()
    stream.synchronize()
    assert torch.equal(actual, expected)


def test_crops_wait_for_nothing() -> None:
    crops = Crops()
    crops()
    more = Crops()  # images of which there is no table yet
    torch.cuda.set_sync_debug_mode("error")
    try:
        crops()
        more()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ------------------------------------------------------------------------------------------ instructions of older GPUs


@functools.cache
def _older_launcher(architecture: int) -> DriverLauncher:
    """With the tiles and the instructions of an older GPU, in machine code for this one."""
    own = own_launcher().architecture
    launcher = DriverLauncher(torch.device("cuda", 0), lambda variant: image(variant, own))
    launcher.architecture = architecture
    return launcher


@pytest.fixture(params=OLDER, ids=lambda architecture: f"sm_{architecture}")
def older(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Watched:
    """The m8n8k4 product of sm_70 is slow on later GPUs, and the same."""
    if own_launcher().architecture < FIRST_WITH_ALL_INSTRUCTIONS:
        pytest.skip("the GPU's own instructions are older ones; all other tests run with them")
    return use(_older_launcher(request.param), monkeypatch)


@pytest.mark.parametrize("case", ALL_CASES)
def test_older_instructions(case: Case, device: str, older: Watched) -> None:
    check_forward(case, torch.float16, "cuda", device)
    check_gradients(case, torch.float16, "cuda", device)
    assert {variant.architecture for variant in older.launched} == {older.architecture}


@pytest.mark.parametrize("case", ALL_MAP_CASES)
def test_maps_with_older_instructions(case: MapCase, device: str, older: Watched) -> None:
    check_map(case, torch.float16, "cuda", device)
    check_map_gradients(case, torch.float16, "cuda", device)


@pytest.mark.parametrize("case", ALL_PACKED_CASES)
def test_packed_sequences_with_older_instructions(case: PackedCase, device: str, older: Watched) -> None:
    check_packed_forward(case, torch.float16, "cuda", device)
    check_packed_gradients(case, torch.float16, "cuda", device)


@pytest.mark.parametrize(
    ("head_dim", "dtype"), [*((head_dim, torch.float16) for head_dim in HEAD_DIMS), (64, torch.float32)], ids=str
)
def test_shipped_tiles_of_older_gpus(head_dim: int, dtype: torch.dtype, device: str, older: Watched) -> None:
    case, map_case = shipped(head_dim, 150)
    check_forward(case, dtype, "cuda", device)
    check_gradients(case, dtype, "cuda", device)
    check_map(map_case, dtype, "cuda", device)
    check_map_gradients(map_case, dtype, "cuda", device)


@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_long_variants_and_splits_of_older_gpus(head_dim: int, device: str, older: Watched) -> None:
    many_rows = Case(8, 16, 4, 300, 200, head_dim, head_dim, bias="bn", gate="bn", padding="random", is_causal=True)
    decode = Case(2, 8, 2, 1, 700, head_dim, head_dim, bias="bn", removed="some", padding="left", is_causal=True)
    for case in (many_rows, decode):
        check_forward(case, torch.float16, "cuda", device)
    assert any(variant.long for variant in older.launched)
    assert "merge_splits" in {variant.kernel for variant in older.launched}
