"""Peak memory of one call, beyond its inputs.

What counts is all that a prompt needs and that was not there before: the output, and for SDPA with a mask and for eager
the mask itself, which test_attention.py leaves out of the time. Peers and inputs are those of test_attention.py.

CPU     a process per measurement. Linux keeps the peak of the resident memory (VmHWM) and resets it on demand; that is
        done when torch is warm and the inputs are in memory. malloc is told to map every large block anew and to give
        it back at once: otherwise it would reuse memory that is already resident, and the call would look too cheap.
CUDA    torch's own count of allocated bytes.

Of whole answers on a CPU, whose model is too large for a process per measurement, torch's count too: of the tensors
that its profiler sees allocated and freed, not of what libraries hold beside them.

`python -m bench.memory PEER NUM_KEYS` is the process of one CPU measurement; it prints a JSON object.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import torch

from .cases import AttentionCase
from .inputs import CaseInputs, make_inputs
from .operations import FORWARD
from .peers import NEEDS_CUDA, Peer, PeerUnavailable, peers_for

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_ROOT = Path(__file__).resolve().parent.parent
_MAP_LARGE_BLOCKS = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def memory_case(num_keys: int, dtype: torch.dtype) -> AttentionCase:
    return AttentionCase(f"memory-n{num_keys}", 8, num_keys, num_keys, 64, dtype)


def unavailable_reason(device_type: str) -> str | None:
    if device_type == "cpu" and not _CLEAR_REFS.exists():
        return f"peak memory on a CPU is read from Linux's /proc, and {_CLEAR_REFS} is not here"
    return None


def peak_bytes(peer: Peer, num_keys: int, dtype: torch.dtype, device: torch.device) -> int:
    """Raises PeerUnavailable as the peer does."""
    if peer.needs_cuda and device.type == "cpu":
        raise PeerUnavailable(NEEDS_CUDA)  # and no process has to find it out
    if device.type == "cuda":
        return _peak_on_cuda(peer, make_inputs(memory_case(num_keys, dtype), device))
    return _peak_in_new_process(peer, num_keys, dtype)


def growth_exponent(smaller: int, larger: int, factor: int = 2) -> float:
    """The e of bytes ~ N**e, from two values of N that differ by `factor`: 1 is linear, 2 quadratic."""
    return math.log(larger / smaller, factor)


def peak_of_call_on_cuda(call: Callable[[], object], device: torch.device) -> int:
    """Bytes that a call holds at its peak beyond what is allocated before it."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def peak_of_call_on_cpu(call: Callable[[], object]) -> int:
    """The same on a CPU: most bytes of tensors that were allocated in the call and not freed yet."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = call()  # not freed while it counts
    del kept
    events = profiler.profiler.kineto_results.events()
    allocated = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(accumulate(num_bytes for _, num_bytes in allocated), default=0)


def _peak_on_cuda(peer: Peer, inputs: CaseInputs) -> int:
    peer.start(inputs)  # compiles, and lets cuBLAS take its workspace
    return peak_of_call_on_cuda(lambda: peer.start(inputs), inputs.query.device)


def _peak_in_new_process(peer: Peer, num_keys: int, dtype: torch.dtype) -> int:
    command = [sys.executable, "-m", "bench.memory", peer.name, str(num_keys)]
    command += [str(dtype).removeprefix("torch."), str(torch.get_num_threads())]
    done = subprocess.run(
        command, cwd=_ROOT, env={**os.environ, **_MAP_LARGE_BLOCKS}, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    result = json.loads(done.stdout)
    if result["reason"] is not None:
        raise PeerUnavailable(result["reason"])
    return result["peak_bytes"]


@torch.no_grad()
def _peak_of_this_process(peer: Peer, case: AttentionCase) -> int:
    device = torch.device("cpu")
    few = replace(case, num_queries=1024, num_keys=1024)
    peer.start(make_inputs(few, device))  # threads, libraries, code that is imported late
    inputs = make_inputs(case, device)  # random numbers: every page is touched
    _CLEAR_REFS.write_text("5")
    before = _status_bytes("VmRSS")
    peer.start(inputs)
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return 1024 * int(line.split()[1])


def _main(peer_name: str, num_keys: str, dtype: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    peer = next(peer for peer in peers_for(FORWARD, "cpu") if peer.name == peer_name)
    result: dict = {"peak_bytes": None, "reason": None}
    try:
        result["peak_bytes"] = _peak_of_this_process(peer, memory_case(int(num_keys), getattr(torch, dtype)))
    except PeerUnavailable as unavailable:
        result["reason"] = str(unavailable)
    print(json.dumps(result))


if __name__ == "__main__":
    _main(*sys.argv[1:])
