"""Where the language model looks, as a label: a card's name, and what is said about the card, should attend to the
card's patches. Which word fits which patch is hard to find out from answers alone, since as long as a look goes astray
it does not matter what is read there, and the other way round; told where to look, it is learnt several times sooner.

Some heads of two layers are told, and of their attention only how it is shared among the image's tokens. At
inference there is nothing of this.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from ..model import HEADS
from ..tokenizer import IMAGE_TOKENS
from .dense import patches_on
from .packing import Look

NAME_LAYER, SAID_LAYER = 1, 2  # the name is looked up first; what is said has to know the name
TOLD_HEADS = HEADS // 2


class Watched:
    """Queries, keys and rotations of a forward pass, while `watch` lasts."""

    def __init__(self) -> None:
        self.query: dict[int, Tensor] = {}
        self.key: dict[int, Tensor] = {}
        self.rotation: tuple[Tensor, Tensor] | None = None

    def attention(self, layer: int, rows: Tensor, places: Tensor, images: Tensor) -> Tensor:
        """(N, told heads, image tokens): how N tokens share their attention among those of an image.

        Args:
            rows, places: (N,) of the tokens.
            images: (N,) the place of each image's first token.
        """
        assert self.rotation is not None
        cos, sin = (part.float().expand(len(self.query[layer]), -1, -1) for part in self.rotation)
        query, key = (
            of[layer].float().unflatten(-1, (HEADS, -1))[:, :, :TOLD_HEADS].transpose(1, 2)
            for of in (self.query, self.key)
        )  # (B, heads, L, head_dim)
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
        of_image = key[rows[:, None], :, images[:, None] + torch.arange(IMAGE_TOKENS)]
        scores = torch.einsum("nhd,nkhd->nhk", query[rows, :, places], of_image)
        return (scores / query.shape[-1] ** 0.5).softmax(-1)


@contextmanager
def watch(model: Any) -> Iterator[Watched]:
    """Of a small LLaVA: what its next forward pass does."""
    watched = Watched()
    text = model.model.language_model

    def keep(of: dict[int, Tensor], layer: int) -> Any:
        return lambda module, inputs, output: of.__setitem__(layer, output)

    handles = [text.rotary_emb.register_forward_hook(lambda *call: setattr(watched, "rotation", call[-1]))]
    for layer in (NAME_LAYER, SAID_LAYER):
        attention = text.layers[layer].self_attn
        handles.append(attention.q_proj.register_forward_hook(keep(watched.query, layer)))
        handles.append(attention.k_proj.register_forward_hook(keep(watched.key, layer)))
    try:
        yield watched
    finally:
        for handle in handles:
            handle.remove()


def looking_loss(watched: Watched, looks: Sequence[Look]) -> tuple[Tensor, float]:
    """-log of the share of attention that is on the right patches, and that share. Names and what is said count alike,
    and so do a row's first image and its second, which fewer tokens look at.
    """
    first = min(look.image for look in looks)
    groups: dict[tuple[bool, bool], list[Look]] = {}
    for look in looks:
        groups.setdefault((look.is_name, look.image == first), []).append(look)
    losses, shares = [], []
    for (is_name, _), told in groups.items():
        rows, places, images = (
            torch.tensor([getattr(look, name) for look in told]) for name in ("row", "place", "image")
        )
        right = torch.from_numpy(np.stack([np.any([patches_on(box) for box in look.boxes], 0) for look in told]))
        attention = watched.attention(NAME_LAYER if is_name else SAID_LAYER, rows, places, images)
        share = (attention * right[:, None]).sum(-1)
        losses.append(-(share + 1e-6).log().mean())
        shares.append(float(share.detach().mean()))
    return torch.stack(losses).mean(), sum(shares) / len(shares)
