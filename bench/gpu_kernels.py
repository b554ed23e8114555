"""One small call of every Triton kernel on the GPU, for compute-sanitizer to watch: `python -m bench.gpu_kernels`.

Lengths and head dimensions fill no tile, and every operand that a kernel can have is there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from finegrain_ops import attention_map, reweighted_attention, reweighted_attention_varlen

OPTIONS = {"is_causal": True, "backend": "triton"}


def main(device: str = "cuda") -> None:
    torch.manual_seed(0)
    for call in (batched, packed, read_out, decode):
        call(device)
    if device == "cuda":
        torch.cuda.synchronize()
    print("every kernel ran")


def batched(device: str) -> None:
    """Padding and a row gate beside the bias, forward and backward."""
    query, key, value, bias = leaves(device, (1, 2, 150, 72), (1, 1, 170, 72), (1, 1, 170, 72), (1, 170))
    attend, gate = torch.arange(170, device=device)[None] >= 9, torch.arange(150, device=device) % 3 > 0
    output = reweighted_attention(
        query, key, value, key_bias=bias.float(), key_padding_mask=attend, row_gate=gate, **OPTIONS
    )
    output.sum().backward()


def packed(device: str) -> None:
    query, key, value, bias = leaves(device, (130, 2, 40), (130, 2, 40), (130, 2, 40), (130,))
    bounds = torch.tensor([0, 50, 130], dtype=torch.int32, device=device)
    output = reweighted_attention_varlen(
        query, key, value, bounds, bounds, 80, 80, key_bias=bias.float(), row_gate=None, **OPTIONS
    )
    output.sum().backward()


def read_out(device: str) -> None:
    query, key, bias = leaves(device, (1, 2, 150, 72), (1, 2, 150, 72), (1, 150))
    rows, heads = torch.arange(150, device=device) > 70, torch.tensor([True, False], device=device)
    attention_map(query, key, rows=rows, heads=heads, key_bias=bias.float(), **OPTIONS).square().sum().backward()


@torch.no_grad()
def decode(device: str) -> None:
    """So many keys that several programs share them."""
    query, key, value, bias = leaves(device, (1, 2, 1, 72), (1, 1, 700, 72), (1, 1, 700, 72), (1, 700))
    reweighted_attention(query, key, value, key_bias=bias.float(), return_lse=True, **OPTIONS)


def leaves(device: str, *shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float16, device=device, requires_grad=True) for shape in shapes]


if __name__ == "__main__":
    main()
