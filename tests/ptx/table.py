"""What the compiled kernels do to memory, and how much of their code the sample executes: `make ptx` writes
docs/compiled_kernels.md and bench/results/compiled-kernels.json.

Counts are the same on every machine, for one version of Triton and of nvcc.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import triton

import finegrain_ops
from ptx import cuda_kernels, sample
from ptx.counts import Traffic
from ptx.launches import Launch, merged_coverage
from ptx.project import on_ptx

ROOT = Path(__file__).resolve().parents[2]
JSON, MARKDOWN = ROOT / "bench/results/compiled-kernels.json", ROOT / "docs/compiled_kernels.md"
_BEGIN, _END = "<!-- begin: written by make ptx -->", "<!-- end: written by make ptx -->"


@dataclass(frozen=True)
class Case:
    """A call whose traffic is counted."""

    name: str
    capability: int
    run: Callable[[], object]


def cases() -> Iterator[Case]:
    for capability, dtype, dims in (
        (80, torch.bfloat16, (64, 72, 128)),
        (90, torch.bfloat16, (64, 128)),
        (80, torch.float32, (64, 128)),
    ):
        kind = {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
        for dim in dims:
            yield Case(f"attention {kind} d{dim}", capability, partial(_attention, dtype, dim))
        yield Case(f"decode {kind} d128", capability, partial(_decode, dtype, 128))
        yield Case(f"map {kind} d64", capability, partial(_map, dtype, 64))
    yield Case("crops uint8", 80, _crops)


def _normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def _attention(dtype: torch.dtype, dim: int) -> None:
    """Forward and backward, causal, 512 rows and keys of which 128 carry a bias."""
    query, key, value = (_normal(1, 1, 512, dim, dtype=dtype).requires_grad_() for _ in range(3))
    bias = torch.zeros(1, 512)
    bias[:, 128:256] = 0.7
    bias.requires_grad_()
    output = finegrain_ops.reweighted_attention(query, key, value, key_bias=bias, is_causal=True, backend="triton")
    output.sum().backward()


def _decode(dtype: torch.dtype, dim: int) -> None:
    query, key = _normal(1, 8, 1, dim, dtype=dtype), _normal(1, 1, 1024, dim, dtype=dtype)
    finegrain_ops.reweighted_attention(query, key, key, key_bias=_normal(1, 1024), backend="triton")


def _map(dtype: torch.dtype, dim: int) -> None:
    query, key = _normal(1, 1, 512, dim, dtype=dtype), _normal(1, 1, 512, dim, dtype=dtype)
    finegrain_ops.attention_map(query, key, is_causal=True, backend="triton")


def _crops() -> None:
    image = torch.randint(0, 256, (1, 3, 120, 160), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    finegrain_ops.crop_resize(image, torch.tensor([[3.0, 4.0, 131.0, 110.0]]), size=(56, 56), backend="triton")


def row_of(run: Launch) -> dict[str, object]:
    """Counts of one launch, and the source line that loses most to bank conflicts."""
    total, lines = Traffic(), run.by_source_line()
    for traffic in lines.values():
        total += traffic
    line, worst = max(lines.items(), key=lambda item: item[1].wavefronts - item[1].least_wavefronts)
    lost = worst.wavefronts - worst.least_wavefronts
    global_bytes = sum(t.bytes for _, t in run.traffic if t.sectors)
    return {
        "warp instructions": sum(run.instructions.values()),
        "bytes per byte of sectors": round(global_bytes / max(1, 32 * total.sectors), 3),
        "shared wavefronts": total.wavefronts,
        "without bank conflicts": total.least_wavefronts,
        "most conflicts": line if lost else "",
    }


def traffic(case: Case) -> dict[str, dict[str, object]]:
    """Rows by kernel."""
    with on_ptx(case.capability) as runner:
        case.run()
    return {f"{case.name} sm_{case.capability}: {run.kernel}": row_of(run) for run in runner.runs}


def coverage() -> dict[str, dict[str, float]]:
    """By kernel and GPU: the share of its instructions that the sample executes, in the variant of which that is most,
    and of all variants together.
    """
    runs: dict[str, list[Launch]] = {}
    for call in sample.calls():
        for capability in call.capabilities:
            if call.backend == "cuda" and cuda_kernels.missing(capability):
                continue
            with sample.EXECUTE[call.backend](capability) as runner:
                call.run(call.backend, "cpu")
            for run in runner.runs:
                name = run.kernel if call.backend == "triton" else f"csrc {run.kernel.split('-')[0]}"
                runs.setdefault(f"{name} sm_{capability}", []).append(run)
    result = {}
    for name, launches in sorted(runs.items()):
        merged = merged_coverage(launches).values()
        executed, total = sum(len(c.executed) for c in merged), sum(c.total for c in merged)
        result[name] = {"variants": len(merged), "best": max(c.share for c in merged), "all": executed / total}
    return {name: {k: round(v, 3) for k, v in row.items()} for name, row in result.items()}


def _markdown(stored: dict) -> str:
    text = [_BEGIN, f"By Triton {stored['triton']}. What the sample executes:", ""]
    text += ["| kernel | compiled variants | of the best covered | of all |", "|---|---:|---:|---:|"]
    text += [f"| {n} | {r['variants']} | {r['best']:.1%} | {r['all']:.1%} |" for n, r in stored["coverage"].items()]
    text += ["", "Traffic:", ""]
    text += ["| call and kernel | warp instructions | of sectors | shared wavefronts | without conflicts | where |"]
    text += ["|---|---:|---:|---:|---:|---|"]
    for name, row in stored["traffic"].items():
        instructions, used, wavefronts, least, line = row.values()
        text.append(f"| {name} | {instructions:,} | {used:.2f} | {wavefronts:,} | {least:,} | {line} |")
    return "\n".join([*text, _END])


def main() -> None:
    torch.set_num_threads(1)
    stored = {"triton": triton.__version__, "coverage": coverage(), "traffic": {}}
    for case in cases():
        stored["traffic"] |= traffic(case)
    JSON.write_text(json.dumps(stored, indent=1) + "\n")
    page = MARKDOWN.read_text()
    before, after = page.split(_BEGIN)[0], page.split(_END)[1]
    MARKDOWN.write_text(before + _markdown(stored) + after)
    print(f"Wrote {JSON.relative_to(ROOT)} and {MARKDOWN.relative_to(ROOT)}.")


if __name__ == "__main__":
    main()
