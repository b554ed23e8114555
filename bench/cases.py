"""The attention calls that are measured: shapes of real models and a grid of sizes, as dataclasses.

quick  what tells most, for a GPU that is there for minutes; full  the quick ones first, then the rest. Either takes
turns through the operations, so that a run that ends early has some of each.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from itertools import chain, zip_longest

import torch

from .named_case import NamedCase
from .operations import BACKWARD, DECODE, FORWARD, MASKED, OPERATIONS, PACKED, READ_OUT

SIZES = (256, 512, 1024, 2048, 4096, 8192, 16384)
HEAD_DIMS = (64, 80, 96, 128)
MASKED_SIZES, MASKED_HEAD_DIMS = (4096, 512, 2048, 1024), (128, 64)  # what tells most comes first
SETS = ("quick", "full")


@dataclass(frozen=True)
class AttentionCase(NamedCase):
    """One call: query (B, H, Nq, D), key and value (B, Hkv, Nk, D), and a box of image tokens that is reweighted.

    Packed, query is (T, H, D) and key and value (T, Hkv, D), and num_queries = num_keys = T.
    """

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
    operation: str = FORWARD
    lengths: tuple[int, ...] | None = None  # of the sequences, when packed
    read_rows: int | None = None  # read out so many rows, the last ones; None: all

    def __post_init__(self) -> None:
        if self.operation not in OPERATIONS:
            raise ValueError(f"{self.name}: operation {self.operation!r} is none of {OPERATIONS}")
        if self.is_causal and self.num_queries != self.num_keys:
            raise ValueError(f"{self.name}: a causal case must be square, since SDPA aligns its causal mask top-left")
        if (self.operation == PACKED) != (self.lengths is not None):
            raise ValueError(f"{self.name}: packed cases, and only they, have lengths")
        if self.lengths is not None and sum(self.lengths) != self.num_keys:
            raise ValueError(f"{self.name}: lengths add up to {sum(self.lengths)}, and there are {self.num_keys} keys")
        if self.lengths is None and self.image_start + math.prod(self.image_grid) > self.num_keys:
            raise ValueError(f"{self.name}: the image does not fit into {self.num_keys} keys")

    @property
    def num_kv_heads(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def has_groups(self) -> bool:
        return self.num_kv_heads != self.heads

    @property
    def longest(self) -> int:
        """Keys of the longest sequence."""
        return max(self.lengths or (self.num_keys,))

    def parameters(self) -> dict:
        """What a stored row says about the case; plain JSON values."""
        parameters = {**asdict(self), "id": self.id, "kv_heads": self.num_kv_heads, "dtype": self.dtype_name}
        del parameters["operation"]  # a field of the row itself
        return parameters


def causal(
    num_keys: int, head_dim: int, dtype: torch.dtype, operation: str = FORWARD, kv_heads: int | None = None
) -> AttentionCase:
    """16 heads and nothing else that could hide the cost of the bias: the cases whose ratios are promised."""
    name = f"causal{'-gqa' if kv_heads else ''}-n{num_keys}-d{head_dim}"
    return AttentionCase(
        name,
        16,
        num_keys,
        num_keys,
        head_dim,
        dtype,
        kv_heads=kv_heads,
        image_grid=_tiles(num_keys),
        operation=operation,
    )


def masked(num_keys: int, head_dim: int, is_causal: bool) -> AttentionCase:
    """What a V100 computes today with a mask tensor, which holds the bias and, when causal, the hidden keys."""
    case = causal(num_keys, head_dim, torch.float16, MASKED)
    return case if is_causal else replace(case, name=f"full-n{num_keys}-d{head_dim}", is_causal=False)


def cache(
    num_keys: int, head_dim: int, dtype: torch.dtype, kv_heads: int | None = None, batch: int = 1
) -> AttentionCase:
    """Decode: one new token for each of `batch` prompts against 16 heads; no causal mask is needed."""
    name = f"cache{'-gqa' if kv_heads else ''}{f'-b{batch}' if batch > 1 else ''}-n{num_keys}-d{head_dim}"
    return AttentionCase(
        name,
        16,
        1,
        num_keys,
        head_dim,
        dtype,
        kv_heads=kv_heads,
        is_causal=False,
        batch=batch,
        image_grid=_tiles(num_keys),
        operation=DECODE,
    )


def packed(num_tokens: int, head_dim: int, dtype: torch.dtype, kv_heads: int | None = None) -> AttentionCase:
    """Five causal prompts, the longest eight times the shortest, none a multiple of a kernel's tile."""
    shares, offsets = (1, 3, 2, 6, 4), (5, -9, 3, -6, 7)
    lengths = tuple(share * num_tokens // 16 + offset for share, offset in zip(shares, offsets))
    name = f"prompts{'-gqa' if kv_heads else ''}-n{num_tokens}-d{head_dim}"
    return AttentionCase(
        name,
        16,
        num_tokens,
        num_tokens,
        head_dim,
        dtype,
        kv_heads=kv_heads,
        operation=PACKED,
        lengths=lengths,
    )


def llava_prefill(num_keys: int, dtype: torch.dtype) -> AttentionCase:
    """LLaVA-1.5-7B: 576 image tokens of 24 x 24 and text. Longer ones stand for LLaVA-NeXT's several tiles."""
    name = f"llava-prefill-n{num_keys}"
    return AttentionCase(name, 32, num_keys, num_keys, 128, dtype, image_grid=_tiles(num_keys))


def llava_decode(num_keys: int, dtype: torch.dtype) -> AttentionCase:
    name = f"llava-decode-n{num_keys}"
    return AttentionCase(
        name, 32, 1, num_keys, 128, dtype, is_causal=False, image_grid=_tiles(num_keys), operation=DECODE
    )


def llava_read_out(num_keys: int, dtype: torch.dtype) -> AttentionCase:
    """Where the last 24 tokens of the question look."""
    name = f"llava-read-out-n{num_keys}"
    return AttentionCase(
        name, 32, num_keys, num_keys, 128, dtype, image_grid=_tiles(num_keys), operation=READ_OUT, read_rows=24
    )


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


def qwen2_vl_decode(num_keys: int, dtype: torch.dtype) -> AttentionCase:
    columns = 32
    rows = (num_keys - 128) // columns
    return AttentionCase(
        f"qwen2-vl-decode-n{num_keys}",
        28,
        1,
        num_keys,
        128,
        dtype,
        kv_heads=4,
        is_causal=False,
        image_grid=(rows, columns),
        operation=DECODE,
    )


def _tiles(num_keys: int) -> tuple[int, int]:
    """The grid of as many tiles of 24 x 24 tokens, one below the other, as leave room for 64 tokens of text.

    Where there is not even room for one, 16 columns.
    """
    tiles = (num_keys - 64) // 576
    return (24 * tiles, 24) if tiles else ((num_keys - 64) // 16, 16)


def _quick_cpu_cases() -> list[AttentionCase]:
    float32 = torch.float32
    return [
        causal(640, 64, float32),
        causal(640, 64, float32, BACKWARD),
        llava_decode(640, float32),
        packed(1024, 64, float32),
        causal(640, 64, float32, READ_OUT),
    ]


def _full_cpu_cases() -> list[AttentionCase]:
    float32 = torch.float32
    return [
        *(causal(num_keys, head_dim, float32) for num_keys in (640, 1024) for head_dim in (64, 128)),
        llava_prefill(640, float32),
        llava_prefill(2048, float32),
        llava_prefill(640, torch.bfloat16),
        qformer(float32),
        qwen2_vl_prefill(1024, float32),
        *(causal(640, head_dim, float32, BACKWARD) for head_dim in (64, 128)),
        llava_decode(640, float32),
        llava_decode(1024, float32),
        qwen2_vl_decode(1024, float32),
        packed(1024, 64, float32),
        packed(1024, 128, float32, kv_heads=4),
        causal(640, 64, float32, READ_OUT),
        llava_read_out(640, float32),
    ]


def _quick_cuda_cases() -> list[AttentionCase]:
    half, other_half = torch.bfloat16, torch.float16
    forward = [
        *(causal(num_keys, 128, half) for num_keys in (4096, 16384, 1024)),
        *(causal(4096, head_dim, half) for head_dim in (64, 80, 96)),
        causal(4096, 128, half, kv_heads=4),
        causal(4096, 128, other_half),
        llava_prefill(2944, half),
        causal(256, 128, half),
    ]
    backward = [
        *(causal(num_keys, 128, half, BACKWARD) for num_keys in (4096, 16384, 1024)),
        *(causal(4096, head_dim, half, BACKWARD) for head_dim in (64, 80)),
        causal(4096, 128, half, BACKWARD, kv_heads=4),
    ]
    decode = [
        *(cache(num_keys, 128, half) for num_keys in (16384, 1024)),
        *(cache(16384, head_dim, half, kv_heads=4) for head_dim in (128, 80)),
        llava_decode(2944, half),
    ]
    sequences = [packed(4096, 128, half), packed(16384, 128, half), packed(4096, 80, half, kv_heads=4)]
    read_out = [
        *(causal(num_keys, 128, half, READ_OUT) for num_keys in (4096, 16384)),
        llava_read_out(2944, half),
    ]
    against_mask = (
        [masked(num_keys, head_dim, is_causal) for num_keys in MASKED_SIZES for head_dim in MASKED_HEAD_DIMS]
        for is_causal in (True, False)
    )
    return _in_turns(forward, backward, decode, sequences, read_out, *against_mask)


def _full_cuda_cases() -> list[AttentionCase]:
    """bfloat16 over all sizes and head dimensions; grouped queries and float16 over every second size. The sweep of
    FORWARD has all that MASKED compares.
    """
    half, other_half = torch.bfloat16, torch.float16

    def grid(operation: str) -> list[AttentionCase]:
        def case(num_keys: int, head_dim: int, dtype: torch.dtype, kv_heads: int | None = None) -> AttentionCase:
            if operation == DECODE:
                return cache(num_keys, head_dim, dtype, kv_heads)
            if operation == PACKED:
                return packed(num_keys, head_dim, dtype, kv_heads)
            return causal(num_keys, head_dim, dtype, operation, kv_heads)

        every_second = SIZES[::2]
        return [
            *(case(num_keys, head_dim, half) for num_keys in SIZES for head_dim in HEAD_DIMS),
            *(case(num_keys, head_dim, half, 4) for num_keys in every_second for head_dim in HEAD_DIMS),
            *(case(num_keys, head_dim, other_half) for num_keys in every_second for head_dim in HEAD_DIMS),
        ]

    models = [
        *(llava_prefill(num_keys, dtype) for num_keys in (640, 2944) for dtype in (half, other_half)),
        *(llava_decode(num_keys, dtype) for num_keys in (1024, 2944) for dtype in (half, other_half)),
        *(qformer(dtype, batch) for batch in (1, 16) for dtype in (half, other_half)),
        *(qwen2_vl_prefill(num_keys, half) for num_keys in (1024, 4096, 16384)),
        *(qwen2_vl_decode(num_keys, half) for num_keys in (1024, 16384)),
        cache(4096, 128, half, kv_heads=4, batch=16),
        llava_read_out(2944, half),
        causal(1024, 128, torch.float32),
    ]
    return _in_turns(models, *(grid(operation) for operation in OPERATIONS if operation != MASKED))


def _in_turns(*lists: list[AttentionCase]) -> list[AttentionCase]:
    return [case for case in chain.from_iterable(zip_longest(*lists)) if case is not None]


def cases_for(device_type: str, case_set: str = "full") -> list[AttentionCase]:
    quick, full = (
        (_quick_cuda_cases, _full_cuda_cases) if device_type == "cuda" else (_quick_cpu_cases, _full_cpu_cases)
    )
    return _without_repetition(quick() if case_set == "quick" else [*quick(), *full()])


def _without_repetition(cases: Iterable[AttentionCase]) -> list[AttentionCase]:
    return list({case.id: case for case in cases}.values())
