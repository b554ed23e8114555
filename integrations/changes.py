"""Attributes set on a model's modules, and taken back exactly; and how a bound method is replaced."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

from torch import nn


class Changes:
    """What was set on which module, and what was there before."""

    def __init__(self) -> None:
        self._made: list[tuple[nn.Module, str, Any, Any]] = []

    def set(self, owner: nn.Module, name: str, value: Any) -> None:
        self._made.append((owner, name, value, owner.__dict__.get(name, _ABSENT)))
        object.__setattr__(owner, name, value)

    def replace_method(self, owner: nn.Module, name: str, replacement: Callable[..., Any]) -> None:
        """`replacement(original)` gives a function of (self, ...); it is bound with types.MethodType, so that
        copy.deepcopy of a changed model gives a changed copy of its own.
        """
        self.set(owner, name, types.MethodType(replacement(getattr(owner, name)), owner))

    def undo(self) -> None:
        """Takes everything back. Again: nothing.

        Raises:
            RuntimeError: something else replaced what was set; undo that first. Nothing was changed.
        """
        for owner, name, ours, _ in self._made:
            if owner.__dict__.get(name) is not ours:
                raise RuntimeError(
                    f"remove: {type(owner).__name__}.{name} was replaced after patch; undo that first, then call remove"
                )
        while self._made:
            owner, name, _, before = self._made.pop()
            if before is _ABSENT:
                delattr(owner, name)
            else:
                object.__setattr__(owner, name, before)


class _ABSENT:
    """Stands for "the instance had no such attribute"; a class, since copy.deepcopy keeps its identity."""


def bound_to(self: nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
    """`original`, a method that was replaced, rebound when the changed model was copied."""
    function = getattr(original, "__func__", None)
    return original if function is None or original.__self__ is self else types.MethodType(function, self)
