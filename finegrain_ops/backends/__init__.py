"""Which backend runs a call, and why not the others: the only place that decides.

A backend is a module of this folder that follows `interface.Backend`. It is imported when it is first considered, so
that importing finegrain_ops imports neither triton nor a compiler.
"""

from __future__ import annotations

import functools
import importlib
from typing import cast

from ..errors import UnsupportedInputError
from .interface import AttentionFeatures, Backend

BACKENDS = ("triton", "cuda", "sdpa", "reference")

# The fastest first. On a CPU, "triton" is the interpreter and "cuda" does not exist: only a caller who names them gets
# them.
_PREFERENCE = {"cuda": BACKENDS}
_PREFERENCE_ELSEWHERE = ("sdpa", "reference")


@functools.cache
def load(name: str) -> Backend:
    return cast(Backend, importlib.import_module(f"{__name__}.{name}"))


def not_supported_reasons(name: str, features: AttentionFeatures) -> list[str]:
    """Why `name` cannot run a call with these features, beginning with what is missing on this machine."""
    backend = load(name)
    return backend.unavailable_reasons() or backend.not_supported_reasons(features)


def preference(device_type: str) -> tuple[str, ...]:
    """The backends that backend="auto" considers on this kind of device, the fastest first."""
    return _PREFERENCE.get(device_type, _PREFERENCE_ELSEWHERE)


@functools.lru_cache(maxsize=1024)
def select(name: str, features: AttentionFeatures) -> str:
    """The name of the backend that runs a call; an explicit name never falls back.

    Raises:
        UnsupportedInputError: `name` (or, for "auto", every backend) has a reason not to run it; all are listed.
    """
    candidates = preference(features.device_type) if name == "auto" else (name,)
    refusals = []
    for candidate in candidates:
        reasons = not_supported_reasons(candidate, features)
        if not reasons:
            return candidate
        refusals.append(f"backend {candidate!r} cannot run this call: " + "; ".join(reasons))
    hint = "" if name == "auto" else '; pass backend="auto" to take the fastest backend that can'
    raise UnsupportedInputError("\n".join(refusals) + hint)
