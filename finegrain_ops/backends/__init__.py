"""Which backend runs a call, and why not the others: the only place that decides.

A backend of the attention operators is a module of this folder that follows `interface.Backend`, one of `crop_resize` a
module of crops/ that follows `crops.interface.CropBackend`. It is imported when it is first considered, so that
importing finegrain_ops imports neither triton nor a compiler.
"""

from __future__ import annotations

import functools
import importlib
from typing import cast

from ..errors import UnsupportedInputError
from .crops.interface import CropBackend, CropFeatures
from .interface import AttentionFeatures, Backend

BACKENDS = ("triton", "cuda", "sdpa", "reference")
CROP_BACKENDS = ("triton", "cuda", "interpolate", "pillow", "reference")

# The fastest first. On a CPU, "triton" is the interpreter and "cuda" does not exist: only a caller who names them gets
# them.
_PREFERENCE = {"cuda": BACKENDS}
_PREFERENCE_ELSEWHERE = ("sdpa", "reference")
_CROP_PREFERENCE = {"cuda": ("triton", "cuda", "reference")}
_CROP_PREFERENCE_ELSEWHERE = ("interpolate", "pillow", "reference")


@functools.cache
def load(name: str) -> Backend:
    return cast(Backend, importlib.import_module(f"{__name__}.{name}"))


@functools.cache
def load_crop(name: str) -> CropBackend:
    return cast(CropBackend, importlib.import_module(f"{__name__}.crops.{name}"))


def not_supported_reasons(name: str, features: AttentionFeatures | CropFeatures) -> list[str]:
    """Why `name` cannot run a call with these features, beginning with what is missing on this machine."""
    if isinstance(features, CropFeatures):
        return load_crop(name).unavailable_reasons() or load_crop(name).not_supported_reasons(features)
    return load(name).unavailable_reasons() or load(name).not_supported_reasons(features)


def preference(device_type: str) -> tuple[str, ...]:
    """The backends that backend="auto" considers for attention on this kind of device, the fastest first."""
    return _PREFERENCE.get(device_type, _PREFERENCE_ELSEWHERE)


def crop_preference(device_type: str) -> tuple[str, ...]:
    """The same for `crop_resize`."""
    return _CROP_PREFERENCE.get(device_type, _CROP_PREFERENCE_ELSEWHERE)


@functools.lru_cache(maxsize=1024)
def select(name: str, features: AttentionFeatures | CropFeatures) -> str:
    """The name of the backend that runs a call; an explicit name never falls back.

    Raises:
        UnsupportedInputError: `name` (or, for "auto", every backend) has a reason not to run it; all are listed.
    """
    candidates: tuple[str, ...] = (name,)
    if name == "auto":
        automatic = crop_preference if isinstance(features, CropFeatures) else preference
        candidates = automatic(features.device_type)
    refusals = []
    for candidate in candidates:
        reasons = not_supported_reasons(candidate, features)
        if not reasons:
            return candidate
        refusals.append(f"backend {candidate!r} cannot run this call: " + "; ".join(reasons))
    hint = "" if name == "auto" else '; pass backend="auto" to take the fastest backend that can'
    raise UnsupportedInputError("\n".join(refusals) + hint)
