"""Reading attention out of a patched model, a row at a time: pass a reader as `attention_reader=` to its forward."""

from __future__ import annotations

from torch import Tensor, nn

from ..readout import attention_map


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
        received = attention_map(query[:, :, -1:], key, key_bias=key_bias, scale=scaling, reduction="mean")
        self._sum = received if self._sum is None else self._sum + received.to(self._sum.device)
        self._layers += 1

    @property
    def attention(self) -> Tensor:
        if self._sum is None:
            raise RuntimeError("attention_reader was not called: give it to the forward of a patched model")
        return self._sum / self._layers
