"""Peak memory of a biased causal call, as the number of keys doubles. Ours must grow linearly."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .inputs import make_inputs
from .memory import growth_exponent, memory_case, peak_bytes, unavailable_reason
from .operations import FORWARD
from .peers import FLEX_ATTENTION, Peer, PeerUnavailable, peers_for
from .results import RowStore, memory_row, not_run_row

NUM_KEYS = (1024, 2048, 4096)
LARGEST_GROWTH_EXPONENT = 1.3  # 1 is linear, 2 quadratic


@torch.no_grad()
def test_peak_memory(benchmark: Any, device: torch.device, machine: dict, store: RowStore) -> None:
    if (reason := unavailable_reason(device.type)) is not None:
        pytest.skip(reason)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    # A compiler's own memory would be counted as FlexAttention's.
    peers = [peer for peer in peers_for(FORWARD, device.type) if peer.name != FLEX_ATTENTION]
    exponents = {peer.name: _measure(peer, dtype, device, machine, store) for peer in peers}

    ours = next(peer for peer in peers if exponents[peer.name] is not None)
    call = ours.start(make_inputs(memory_case(NUM_KEYS[-1], dtype), device))
    benchmark.extra_info["growth_exponents"] = exponents
    benchmark.pedantic(call, rounds=3, warmup_rounds=1)  # a time to go with it, at the largest size
    exponent = exponents[ours.name]
    assert exponent is not None
    assert exponent < LARGEST_GROWTH_EXPONENT, "peak memory does not grow linearly with the number of keys"


def _measure(peer: Peer, dtype: torch.dtype, device: torch.device, machine: dict, store: RowStore) -> float | None:
    """Adds one row per number of keys; returns the exponent between the last two, None if the peer cannot run."""
    before, exponent = None, None
    for num_keys in NUM_KEYS:
        case = memory_case(num_keys, dtype)
        try:
            peak = peak_bytes(peer, num_keys, dtype, device)
        except PeerUnavailable as unavailable:
            store.add([not_run_row("memory", case, peer.name, machine, str(unavailable))])
            return None
        exponent = None if before is None else growth_exponent(before, peak)
        store.add([memory_row(case, peer.name, machine, peak, exponent)])
        before = peak
    return exponent
