"""Reading attention out of a patched model, a row at a time: pass a reader as `attention_reader=` to its forward."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LastRowAttention:
    """The attention that every key receives from the last position, averaged over heads and layers: (B, K) float32.

    That position is the one that predicts the next token. Memory is B x H x K, never Q x K. Rows must be unpadded or
    padded left with a key_bias given, since only the bias knows of padding.
    """

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._layers = 0

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, key_bias: Tensor | None, scaling: float | None
    ) -> None:
        group = query.shape[1] // key.shape[1]
        row = query[:, :, -1:].float()  # (B, H, 1, D)
        scores = (row @ key.repeat_interleave(group, dim=1).float().mT) * (scaling or query.shape[-1] ** -0.5)
        if key_bias is not None:
            scores = scores + key_bias[:, None, None, :]
        received = torch.softmax(scores, dim=-1)[:, :, 0].mean(dim=1)
        self._sum = received if self._sum is None else self._sum + received.to(self._sum.device)
        self._layers += 1

    @property
    def attention(self) -> Tensor:
        if self._sum is None:
            raise RuntimeError("attention_reader was not called: give it to the forward of a patched model")
        return self._sum / self._layers
