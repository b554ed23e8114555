"""The operators as torch.library knows them: schema, shapes for tracing, and autograd, each declared once.

One module per operator: attention on batched tensors (batched.py) and on packed sequences (packed.py), maps of it
(maps.py), crops of images (crops.py). Nothing here validates (the public functions did) or imports a backend;
`backends.select` says which module runs. What a call without rows, keys or boxes gives is answered here, so that no
backend meets an empty tensor.
"""

from __future__ import annotations

from .batched import reweighted_attention, reweighted_attention_backward
from .crops import crop_resize
from .maps import attention_map, attention_map_backward
from .packed import reweighted_attention_varlen, reweighted_attention_varlen_backward

__all__ = [
    "attention_map",
    "attention_map_backward",
    "crop_resize",
    "reweighted_attention",
    "reweighted_attention_backward",
    "reweighted_attention_varlen",
    "reweighted_attention_varlen_backward",
]
