"""What the operators share: the library that they are defined in, and how their results lie in memory."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..backends.interface import new_output

LIBRARY = torch.library.Library("finegrain_ops", "DEF")

# Results lie in memory as the inputs do, so a compiler must hand the inputs over with the strides that it traced.
TAGS = (
    torch.Tag.pt2_compliant_tag,
    getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order),  # exact: torch 2.8 and later
)


def outside_autocast(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The public functions have cast what autocast casts; the rest of a kernel keeps the precision it chose."""

    @functools.wraps(kernel)
    def run(tensor: Tensor, *arguments: Any) -> Any:
        if not torch.is_autocast_enabled(tensor.device.type):
            return kernel(tensor, *arguments)
        with torch.autocast(tensor.device.type, enabled=False):
            return kernel(tensor, *arguments)

    return run


def nothing_intercepts(*tensors: Tensor) -> bool:
    """Whether a call that records no gradient may run its kernel without the dispatcher: nobody compiles, traces,
    counts or transforms it. The way through the dispatcher to a kernel written in Python takes longer than a decode
    step's arithmetic.
    """
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and all(type(tensor) is Tensor for tensor in tensors)
    )


def _dtype_of_scores(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def new_scores(query: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An uninitialised tensor for lse, maps and gradients of the bias, in the precision of the scores."""
    return query.new_empty(shape, dtype=_dtype_of_scores(query))


def new_bias_gradient(query: Tensor, key_bias: Tensor | None, wanted: bool) -> Tensor:
    """An uninitialised gradient of key_bias; (0,) where nobody wants it, since an operator returns all or nothing."""
    return new_scores(query, key_bias.shape if wanted and key_bias is not None else (0,))


def returned_bias_gradient(query: Tensor, gradient: Tensor | None) -> Tensor:
    """What a backend computed, as the operator returns it."""
    if gradient is None:
        return new_bias_gradient(query, None, False)
    return gradient.to(_dtype_of_scores(query)).contiguous()


def laid_out_as(result: Tensor, like: Tensor) -> Tensor:
    """`result` itself if it lies in memory as `new_output(like, ...)` does, otherwise a copy that does."""
    rows_outer = result if like.is_contiguous() else result.transpose(1, 2)
    if rows_outer.is_contiguous() and result.dtype == like.dtype:
        return result
    return new_output(like, result.shape[2], result.shape[3]).copy_(result)
