"""The attention calls that are measured: shapes of real models, as dataclasses, and the tensors that go with them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionCase:
    """One call: query (B, H, Nq, D), key and value (B, Hkv, Nk, D), and a box of image tokens that is reweighted."""

    name: str
    heads: int
    num_queries: int
    num_keys: int
    head_dim: int
    dtype: torch.dtype
    kv_heads: int | None = None  # None: as many as heads
    is_causal: bool = True
    batch: int = 1
    image_grid: tuple[int, int] = (24, 24)  # rows, columns of image tokens
    image_start: int = 35  # keys before the image: system prompt, or CLS
    region_share: float = 0.15  # of all keys
    weight: float = 2.0  # lambda; CoF takes 2.0 with LLaVA-1.5-7B

    def __post_init__(self) -> None:
        if self.is_causal and self.num_queries != self.num_keys:
            raise ValueError(f"{self.name}: a causal case must be square, since SDPA aligns its causal mask top-left")
        if self.image_start + math.prod(self.image_grid) > self.num_keys:
            raise ValueError(f"{self.name}: the image does not fit into {self.num_keys} keys")

    @property
    def num_kv_heads(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def id(self) -> str:
        return f"{self.name}-{self.dtype_name}"

    def parameters(self) -> dict:
        """What a stored row says about the case; plain JSON values."""
        return {**asdict(self), "id": self.id, "kv_heads": self.num_kv_heads, "dtype": self.dtype_name}


@dataclass(frozen=True)
class CaseInputs:
    """The tensors of a case, contiguous: no peer has to copy them.

    On a CPU this layout is not the best for finegrain_ops, whose output lies (B, N, H, D) in memory: SDPA's follows the
    query, so here it is copied once, which it is not with a query as attention layers have it.
    """

    case: AttentionCase
    query: Tensor
    key: Tensor
    value: Tensor
    region_mask: Tensor  # (Nk,) bool

    @property
    def key_bias(self) -> Tensor:
        """log(lambda) * M, (Nk,) float32: what the peers are given."""
        return math.log(self.case.weight) * self.region_mask.float()


def make_inputs(case: AttentionCase, device: torch.device) -> CaseInputs:
    generator = torch.Generator(device=device).manual_seed(0)

    def normal(heads: int, length: int) -> Tensor:
        shape = (case.batch, heads, length, case.head_dim)
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(case.dtype)

    return CaseInputs(
        case,
        query=normal(case.heads, case.num_queries),
        key=normal(case.num_kv_heads, case.num_keys),
        value=normal(case.num_kv_heads, case.num_keys),
        region_mask=region_mask(case).to(device),
    )


def region_mask(case: AttentionCase) -> Tensor:
    """(Nk,) bool, True for the tokens of a box in the middle of the image, about region_share of all keys.

    As a box in an image is: row by row of the grid a run of neighbouring keys, with gaps between the runs.
    """
    rows, columns = case.image_grid
    area = case.region_share * case.num_keys
    box_rows = min(rows, round(rows * math.sqrt(area / (rows * columns))))
    box_columns = min(columns, round(area / box_rows))
    top, left = (rows - box_rows) // 2, (columns - box_columns) // 2
    image = torch.zeros(rows, columns, dtype=torch.bool)
    image[top : top + box_rows, left : left + box_columns] = True
    mask = torch.zeros(case.num_keys, dtype=torch.bool)
    mask[case.image_start : case.image_start + rows * columns] = image.flatten()
    return mask


def causal(num_keys: int, head_dim: int, dtype: torch.dtype) -> AttentionCase:
    """16 heads and nothing else that could hide the cost of the bias: the cases whose ratios are promised."""
    name = f"causal-n{num_keys}-d{head_dim}"
    return AttentionCase(name, 16, num_keys, num_keys, head_dim, dtype, image_grid=_tiles(num_keys))


def llava_prefill(num_keys: int, dtype: torch.dtype) -> AttentionCase:
    """LLaVA-1.5-7B: 576 image tokens of 24 x 24 and text. Longer ones stand for LLaVA-NeXT's several tiles."""
    name = f"llava-prefill-n{num_keys}"
    return AttentionCase(name, 32, num_keys, num_keys, 128, dtype, image_grid=_tiles(num_keys))


def _tiles(num_keys: int) -> tuple[int, int]:
    """The grid of as many tiles of 24 x 24 tokens, one below the other, as leave room for 64 tokens of text."""
    return 24 * ((num_keys - 64) // 576), 24


def llava_decode(num_keys: int, dtype: torch.dtype) -> AttentionCase:
    """One new token against the cache: no causal mask is needed."""
    name = f"llava-decode-n{num_keys}"
    return AttentionCase(name, 32, 1, num_keys, 128, dtype, is_causal=False, image_grid=_tiles(num_keys))


def qformer(dtype: torch.dtype, batch: int = 1) -> AttentionCase:
    """InstructBLIP's Q-Former cross attention: 32 query tokens over CLS and 16 x 16 patches."""
    name = f"qformer-b{batch}"
    return AttentionCase(
        name, 12, 32, 257, 64, dtype, is_causal=False, batch=batch, image_grid=(16, 16), image_start=1, weight=22.0
    )


def qwen2_vl_prefill(num_keys: int, dtype: torch.dtype) -> AttentionCase:
    """Qwen2-VL-7B: grouped queries, and an image that fills most of the context."""
    columns = 32
    rows = (num_keys - 128) // columns
    return AttentionCase(
        f"qwen2-vl-prefill-n{num_keys}", 28, num_keys, num_keys, 128, dtype, kv_heads=4, image_grid=(rows, columns)
    )


def cpu_cases() -> list[AttentionCase]:
    return [
        *(causal(num_keys, head_dim, torch.float32) for num_keys in (640, 1024) for head_dim in (64, 128)),
        llava_prefill(640, torch.float32),
        llava_prefill(640, torch.bfloat16),
        llava_decode(640, torch.float32),
        llava_decode(1024, torch.float32),
        qformer(torch.float32),
        qwen2_vl_prefill(1024, torch.float32),
    ]


def cuda_cases() -> list[AttentionCase]:
    half = (torch.float16, torch.bfloat16)
    return [
        *(causal(n, d, dtype) for n in (1024, 4096, 16384) for d in (64, 128) for dtype in half),
        *(llava_prefill(num_keys, dtype) for num_keys in (640, 2944) for dtype in half),
        *(llava_decode(num_keys, dtype) for num_keys in (1024, 2944) for dtype in half),
        *(qformer(dtype, batch) for batch in (1, 16) for dtype in half),
        *(qwen2_vl_prefill(num_keys, torch.bfloat16) for num_keys in (1024, 4096, 16384)),
        causal(1024, 128, torch.float32),
    ]


def cases_for(device_type: str) -> list[AttentionCase]:
    return cuda_cases() if device_type == "cuda" else cpu_cases()
