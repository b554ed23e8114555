"""What a peer is: a name, and how to turn the inputs of a case into a call without arguments."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

import finegrain_ops

from ..crop_inputs import CropInputs
from ..dualfocus_inputs import DualFocusInputs
from ..generate_inputs import CoFInputs, GenerateInputs
from ..inputs import CaseInputs, PackedInputs
from ..operations import BACKWARD

Call = Callable[[], Any]
Inputs = CaseInputs | PackedInputs | CropInputs | GenerateInputs | CoFInputs | DualFocusInputs  # by the operation
Prepare = Callable[[Any], Call]  # from Inputs

NEEDS_CUDA = "it runs on CUDA devices only"


class PeerUnavailable(Exception):
    """The peer cannot run a case on this machine; the message says why."""


class Gradients(NamedTuple):
    """In the shapes of query, key, value and key_bias; the last is None where the peer does not compute it."""

    query: Tensor
    key: Tensor
    value: Tensor
    key_bias: Tensor | None


@dataclass(frozen=True)
class Peer:
    """`prepare` returns a call that does one forward pass, or one read-out; or it raises, and that is why it cannot.

    The call gives (B, H, Nq, D), packed (T, H, D), or key sums (B, Nk) of a read-out.
    """

    name: str
    prepare: Prepare
    is_biased: bool = True
    is_ours: bool = False
    needs_cuda: bool = False
    gives_key_sums: bool = False

    def start(self, inputs: Inputs) -> Call:
        """The call that is timed, having run once; for BACKWARD forward and backward, and it gives Gradients.

        Raises:
            PeerUnavailable: it cannot run. An unexpected error of another project's code is a reason like any other,
                one of ours is raised as it is.
        """
        if self.needs_cuda and inputs.device.type != "cuda":
            raise PeerUnavailable(NEEDS_CUDA)
        try:
            call = self.prepare(inputs)
            if inputs.case.operation == BACKWARD:
                call = _with_gradients(call, inputs)
            call()
        except torch.OutOfMemoryError as error:
            raise PeerUnavailable("out of memory") from error
        except (PeerUnavailable, finegrain_ops.UnsupportedInputError) as error:
            raise PeerUnavailable(str(error)) from error
        except Exception as error:
            if self.is_ours:
                raise
            raise PeerUnavailable(_first_words(error)) from error
        return call


@dataclass(frozen=True)
class CropPeer(Peer):
    """Its call gives (K, 3, size, size), normalised, in the case's dtype on the case's device.

    levels: of 0..255, how many its pixels may be off Pillow's.
    """

    levels: float = 0.0


def installed(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise PeerUnavailable(f"{module} cannot be imported: {error}") from error


def _first_words(error: Exception) -> str:
    """Of a long message; Dynamo puts its own advice before what happened."""
    message = str(error).partition("Developer debug context: ")[2].partition("\n")[0] or str(error)
    return f"{type(error).__name__}: {' '.join(message.split())[:300]}"


def _with_gradients(forward: Call, inputs: CaseInputs | PackedInputs) -> Call:
    assert isinstance(inputs, CaseInputs)
    leaves, grad_output = (inputs.query, inputs.key, inputs.value, inputs.key_bias), inputs.grad_output

    def call() -> Gradients:
        return Gradients(*torch.autograd.grad(forward(), leaves, grad_output, allow_unused=True))

    return call


def per_sequence(prepare: Prepare) -> Prepare:
    """From one of dense inputs to one of packed inputs: a call for every sequence, the results put together."""

    def prepare_packed(inputs: PackedInputs) -> Call:
        calls = [prepare(sequence) for sequence in inputs.sequences()]
        return lambda: torch.cat([call()[0].transpose(0, 1) for call in calls])

    return prepare_packed
