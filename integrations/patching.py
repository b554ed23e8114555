"""`patch`: gives one model instance the keyword `key_bias`, and takes it away again without a trace.

What is patched is the family's own matter: family.py says what a family is, decoder.py is shared by all whose decoders
attend to image tokens. changes.py undoes it, handle.py is what the caller gets.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import UnsupportedModelError
from .changes import Changes
from .family import FAMILIES, family_of
from .handle import PatchHandle


def patch(model: nn.Module, processor: Any = None) -> PatchHandle:
    """Lets `model` take `key_bias` in forward and generate, until the returned handle's `remove()`.

    ::

        with finegrain_ops.patch(model, processor) as handle:
            bias = handle.key_bias(inputs, boxes, image_sizes, weight=2.0)       # (B, P) float32
            output = model.generate(**inputs, key_bias=bias, max_new_tokens=64)

    key_bias is float, in natural-log units, over the P positions of the prompt, padding included: it is added to every
    score of those keys, in every row (CoF, arXiv 2412.16869, Eq. 3). (B, P) acts in every layer and head, (B, H, P)
    tells heads apart, (B, L, 1 or H, P) layers too. Later positions get 0. `row_gate`, (B, P) bool, says in which rows
    of the prompt it acts; None: in all. Without key_bias the model computes exactly what it did before.

    In InstructBLIP and BLIP-2 the biased keys are those of the Q-Former's cross-attention: (images, 257), CLS first.

    Args:
        model: an instance of a supported family (README, "Models"). Only this instance is touched.
        processor: the model's processor, needed by the handle's methods that take boxes, for its image geometry.

    Raises:
        UnsupportedModelError: there is nothing in `model` that can be patched; the model is left as it was.
        ValueError: `model` is already patched.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"patch: expected a model of one of the families {sorted(FAMILIES)} (config.model_type), "
            f"got {type(model).__name__} with model_type {model_type!r}"
        )
    if isinstance(model.__dict__.get("_finegrain_handle"), PatchHandle):
        raise ValueError("patch: this model is already patched; call remove() on the handle that patch returned first")
    changes = Changes()
    try:
        layers = family_of(model_type).install(changes, model)
        handle = PatchHandle(model, processor, model_type, layers, changes)
        changes.set(model, "_finegrain_handle", handle)
    except BaseException:
        changes.undo()
        raise
    return handle
