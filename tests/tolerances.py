"""How far a result may be from the float64 oracle: derived from the dtype, never chosen to make a test pass.

The budget of a tensor is twice the error that plain eager attention makes in that dtype on the same inputs, plus a
few units in the last place of the largest magnitude, since a small case can be exact by luck. A fused kernel, which
keeps its scores in float32, should do better.
"""

from __future__ import annotations

import torch
from torch import Tensor

ULPS = {torch.float64: 64, torch.float32: 32, torch.float16: 4, torch.bfloat16: 4}


def budget(expected: Tensor, dtype: torch.dtype, low_precision: Tensor | None = None) -> float:
    """Largest absolute difference allowed from `expected` (float64)."""
    finite = expected[torch.isfinite(expected)]
    magnitude = float(finite.abs().max()) if finite.numel() else 0.0
    allowed = ULPS[dtype] * torch.finfo(dtype).eps * max(magnitude, 1.0)  # sums of terms of order 1 may cancel
    if low_precision is not None:
        error = (low_precision.double() - expected)[torch.isfinite(expected)].abs()
        allowed += 2.0 * (float(error.max()) if error.numel() else 0.0)
    return allowed


def assert_close(
    actual: Tensor, expected: Tensor, dtype: torch.dtype, name: str, low_precision: Tensor | None = None
) -> None:
    """Equal infinities, no NaN, and everything finite within the budget."""
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    actual, expected = actual.detach().double(), expected.detach().double()
    assert not actual.isnan().any(), f"{name}: NaN"
    infinite = torch.isinf(expected)
    assert torch.equal(actual[infinite], expected[infinite]), f"{name}: infinities differ"
    difference = (actual - expected)[~infinite].abs()
    worst = float(difference.max()) if difference.numel() else 0.0
    allowed = budget(expected, dtype, low_precision)
    assert worst <= allowed, f"{name}: off by {worst:.3e}, allowed {allowed:.3e} for {dtype}"
