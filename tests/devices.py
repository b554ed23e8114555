"""Where the operator tests run: on a CPU, or on the device that FINEGRAIN_DEVICE names, as `make gpu` does."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from finegrain_ops import backends
from finegrain_ops.backends import unpacking
from finegrain_ops.backends.interface import AttentionFeatures
from finegrain_ops.backends.sdpa import engines

DEVICE = os.environ.get("FINEGRAIN_DEVICE", "cpu")


def ways(*on_a_cpu: str) -> list[Any]:
    """Backends to parametrise a test with. A CPU can also go another device's way ("sdpa on any device"); on a device
    each backend has its own, and triton and cuda join them. (On a CPU these have processes and tests of their own.)
    """
    if DEVICE == "cpu":
        return list(on_a_cpu)
    reasons = backends.load("cuda").unavailable_reasons()
    needs_cuda = pytest.mark.skipif(bool(reasons), reason="; ".join(reasons))
    return [*dict.fromkeys(way.split()[0] for way in on_a_cpu), "triton", pytest.param("cuda", marks=needs_cuda)]


def crop_ways() -> list[Any]:
    """The exact backends of `crop_resize`."""
    if DEVICE == "cpu":
        return ["reference", "pillow"]
    reasons = backends.load_crop("cuda").unavailable_reasons()
    needs_cuda = pytest.mark.skipif(bool(reasons), reason="; ".join(reasons))
    return ["reference", "triton", pytest.param("cuda", marks=needs_cuda)]


def require_support(backend: str, dtype: torch.dtype, operator: str = "reweighted_attention") -> None:
    """Skips the test where the backend says why it cannot run it."""
    features = AttentionFeatures(DEVICE, None if DEVICE == "cpu" else 0, dtype, 16, 16, True, operator)
    if reasons := backends.not_supported_reasons(backend, features):
        pytest.skip("; ".join(reasons))


def pad_packed_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of a device, whose lengths cannot be read: everything padded into one call."""
    monkeypatch.setattr(unpacking, "forward", unpacking.forward_padded)
    monkeypatch.setattr(unpacking, "backward", unpacking.backward_padded)
    monkeypatch.setattr(engines, "choose", lambda device: engines.ANY_DEVICE)
