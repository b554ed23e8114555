"""Everything that can compute a case, each as a function from its inputs to a call without arguments.

Preparing a peer is not timed. For others that includes masks, layouts and compilation, and finegrain_ops prepares
nothing. A peer that cannot run says why, and the reason is stored.
"""

from __future__ import annotations

from collections.abc import Container, Sequence

from ..operations import (
    BACKWARD,
    COF,
    CROP_RESIZE,
    DECODE,
    DUALFOCUS,
    DUALFOCUS_ADAPTIVE,
    DUALFOCUS_OPERATIONS,
    FORWARD,
    GENERATE_OPERATIONS,
    MASKED,
    PACKED,
    READ_OUT,
)
from . import (
    cof,
    crop_finegrain,
    crop_interpolate,
    crop_pillow,
    dualfocus,
    eager,
    finegrain,
    flex,
    generate,
    sdpa,
    third_party,
)
from .eager import EAGER
from .finegrain import ours, ours_unbiased
from .flex import FLEX_ATTENTION
from .interface import NEEDS_CUDA, Call, CropPeer, Gradients, Inputs, Peer, PeerUnavailable
from .sdpa import SDPA_EFFICIENT_MASK, SDPA_UNBIASED
from .third_party import FLASH_ATTN

__all__ = [
    "EAGER",
    "FLEX_ATTENTION",
    "NEEDS_CUDA",
    "SDPA_EFFICIENT_MASK",
    "SDPA_UNBIASED",
    "Call",
    "CropPeer",
    "Gradients",
    "Peer",
    "PeerUnavailable",
    "base_peer",
    "crop_peers_for",
    "ours",
    "ours_unbiased",
    "peers_for",
    "start_all",
]

_UNBIASED = (sdpa.SDPA_FLASH, SDPA_UNBIASED)
_BASES = {
    FORWARD: _UNBIASED,
    BACKWARD: _UNBIASED,
    DECODE: _UNBIASED,
    PACKED: (ours_unbiased("triton"), FLASH_ATTN, sdpa.SDPA_PER_SEQUENCE),
    READ_OUT: tuple(
        finegrain.one_forward(backend, device) for backend in ("triton", "cuda", "sdpa") for device in ("cuda", "cpu")
    ),
    MASKED: (SDPA_EFFICIENT_MASK,),
    CROP_RESIZE: (crop_pillow.pillow(crop_pillow.TWO_THREADS), crop_interpolate.FLOAT),
    **dict.fromkeys(GENERATE_OPERATIONS, (generate.UNPATCHED, cof.ONE_ANSWER)),
    **dict.fromkeys(DUALFOCUS_OPERATIONS, (dualfocus.ONE_PLAIN_ANSWER,)),
}


def peers_for(operation: str, device_type: str) -> list[Peer]:
    """All peers; those of finegrain_ops come first, in the order in which backend="auto" prefers them."""
    if operation == CROP_RESIZE:
        return [*crop_peers_for(device_type)]
    if operation == COF:
        return cof.cof_peers()
    if operation == DUALFOCUS:
        return dualfocus.dualfocus_peers()
    if operation == DUALFOCUS_ADAPTIVE:
        return dualfocus.adaptive_peers()
    if operation in GENERATE_OPERATIONS:
        return generate.generate_peers()
    if operation == PACKED:
        return [
            *finegrain.packed_peers(device_type),
            *sdpa.packed_peers(),
            *eager.packed_peers(),
            *flex.packed_peers(),
            *third_party.packed_peers(),
        ]
    if operation == READ_OUT:
        return [*finegrain.read_out_peers(device_type), *eager.read_out_peers()]
    if operation == MASKED:
        theirs = (SDPA_EFFICIENT_MASK, SDPA_UNBIASED)
        return [*finegrain.cuda_peers(), *(peer for peer in sdpa.dense_peers(device_type) if peer.name in theirs)]
    return [
        *finegrain.dense_peers(device_type),
        *sdpa.dense_peers(device_type),
        *eager.dense_peers(),
        *flex.dense_peers(),
        *third_party.dense_peers(operation),
    ]


def crop_peers_for(device_type: str) -> list[CropPeer]:
    """The same for `crop_resize`."""
    return [
        *crop_finegrain.crop_peers(device_type),
        *crop_pillow.crop_peers(device_type),
        *crop_interpolate.crop_peers(device_type),
    ]


def start_all(peers: Sequence[Peer], inputs: Inputs) -> tuple[dict[str, Call], dict[str, str]]:
    """The calls that can run, ours first, and for the others the reason why not."""
    calls, reasons = {}, {}
    for peer in peers:
        try:
            calls[peer.name] = peer.start(inputs)
        except PeerUnavailable as unavailable:
            reasons[peer.name] = str(unavailable)
    return calls, reasons


def base_peer(operation: str, ran: Container[str]) -> str | None:
    """The peer that ratios of an operation are taken to: the first of its candidates that ran."""
    return next((name for name in _BASES[operation] if name in ran), None)
