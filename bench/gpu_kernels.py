"""One small call of every kernel of a backend on the GPU, for compute-sanitizer to watch.

`python -m bench.gpu_kernels triton`, or cuda. Lengths and head dimensions fill no tile, and every operand that a kernel
can have is there.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from finegrain_ops import attention_map, backends, crop_resize, reweighted_attention, reweighted_attention_varlen

from .gpu import CANNOT_RUN


def main(device: str = "cuda", backend: str = "triton") -> None:
    torch.manual_seed(0)
    for call in (batched, packed, read_out, decode):
        call(device, backend)
    if backend == "cuda":
        many_rows(device, backend)
        unaligned(device, backend)
        for call in (batched, read_out, decode):
            call(device, backend, torch.float32)  # without tensor cores: another tile
    for dtype in (torch.uint8, torch.float16, torch.bfloat16, torch.float32):
        cropped(device, backend, dtype)
    if device == "cuda":
        torch.cuda.synchronize()
    print("every kernel ran")


def batched(device: str, backend: str, dtype: torch.dtype = torch.float16, head_dim: int = 72, keys: int = 170) -> None:
    """Padding and a row gate beside the bias, forward and backward."""
    query, key, value, bias = leaves(
        device, dtype, (1, 2, 150, head_dim), (1, 1, keys, head_dim), (1, 1, keys, head_dim), (1, keys)
    )
    attend, gate = torch.arange(keys, device=device)[None] >= 9, torch.arange(150, device=device) % 3 > 0
    output = reweighted_attention(
        query,
        key,
        value,
        key_bias=bias.float(),
        key_padding_mask=attend,
        row_gate=gate,
        is_causal=True,
        backend=backend,
    )
    output.sum().backward()


def unaligned(device: str, backend: str) -> None:
    """Rows that are no multiple of 16 bytes."""
    batched(device, backend, head_dim=37, keys=83)


def packed(device: str, backend: str) -> None:
    query, key, value, bias = leaves(device, torch.float16, (130, 2, 40), (130, 2, 40), (130, 2, 40), (130,))
    bounds = torch.tensor([0, 50, 130], dtype=torch.int32, device=device)
    output = reweighted_attention_varlen(
        query, key, value, bounds, bounds, 80, 80, key_bias=bias.float(), is_causal=True, backend=backend
    )
    output.sum().backward()


def read_out(device: str, backend: str, dtype: torch.dtype = torch.float16) -> None:
    query, key, bias = leaves(device, dtype, (1, 2, 150, 72), (1, 2, 150, 72), (1, 150))
    rows, heads = torch.arange(150, device=device) > 70, torch.tensor([True, False], device=device)
    result = attention_map(query, key, rows=rows, heads=heads, key_bias=bias.float(), is_causal=True, backend=backend)
    result.square().sum().backward()


@torch.no_grad()
def decode(device: str, backend: str, dtype: torch.dtype = torch.float16) -> None:
    """So many keys that several programs share them."""
    query, key, value, bias = leaves(device, dtype, (1, 2, 1, 72), (1, 1, 700, 72), (1, 1, 700, 72), (1, 700))
    options = {"is_causal": True, "backend": backend}
    reweighted_attention(query, key, value, key_bias=bias.float(), return_lse=True, **options)


@torch.no_grad()
def many_rows(device: str, backend: str) -> None:
    """So many heads that there are enough thread blocks of the kernel with more rows for each."""
    query, key, value, bias = leaves(device, torch.float16, (8, 16, 150, 72), *[(8, 16, 90, 72)] * 2, (8, 90))
    reweighted_attention(query, key, value, key_bias=bias.float(), is_causal=True, backend=backend)


def cropped(device: str, backend: str, dtype: torch.dtype) -> None:
    """Boxes at the edges of a list of images and beyond them; on a device, where nobody has looked at them, also one
    without area and one of an image that does not exist.
    """
    images = [torch.randint(0, 256, (3, *size), device=device).to(dtype) for size in ((37, 53), (64, 19))]
    images[1] = images[1].mT  # pixels at any stride
    boxes, index = [[0, 0, 53, 37], [40, 20, 53, 37], [2.5, 3.5, 9.75, 30], [-9, -9, 1e9, 1e9]], [0, 0, 1, 1]
    if device == "cuda":
        boxes, index = [*boxes, [5, 5, 5, 9], [0, 0, 9, 9]], [*index, 0, 7]
    arguments = torch.tensor(boxes, device=device), torch.tensor(index, device=device)
    crop_resize(images, *arguments, size=(21, 35), pad="square", fill=9, mean=0.5, std=0.5, backend=backend)
    crop_resize(torch.stack([images[0]] * 2), *arguments, size=9, shortest_edge=17, antialias=False, backend=backend)


def leaves(device: str, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype, device=device, requires_grad=True) for shape in shapes]


def _program(arguments: list[str]) -> int:
    (backend,) = arguments
    if reasons := backends.load(backend).unavailable_reasons():
        print(f"{CANNOT_RUN}: {'; '.join(reasons)}")
        return 1
    main("cuda", backend)
    return 0


if __name__ == "__main__":
    sys.exit(_program(sys.argv[1:]))
