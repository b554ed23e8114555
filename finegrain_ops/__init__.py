"""Low-level attention kernels that let multimodal models look closely.

The operators: `reweighted_attention`, `reweighted_attention_varlen`, `attention_map`, `crop_resize`. Boxes in text:
`finegrain_ops.boxes`; the regions around them: `finegrain_ops.regions`, and the tokens that they
touch: `finegrain_ops.families`. Hugging Face models: `patch`, `preprocess`. Methods that answer questions with them:
`CoF`, `DualFocus`. Pictures of attention: `import finegrain_ops.plot`.
Importing this package imports torch, but neither triton nor transformers.
"""

from __future__ import annotations

from pathlib import Path as _Path
from typing import TYPE_CHECKING, Any

# In a source checkout that is not installed, kernels/ and integrations/ lie beside this folder, in the repository's
# root.
_ROOT = _Path(__file__).resolve().parent.parent
if (_ROOT / "kernels" / "attention_forward.py").is_file():
    __path__.append(str(_ROOT))

from . import boxes, families, regions  # noqa: E402
from ._version import __version__  # noqa: E402
from .attention import reweighted_attention, reweighted_attention_varlen  # noqa: E402
from .crop_resize import crop_resize  # noqa: E402
from .errors import UnsupportedInputError, UnsupportedModelError  # noqa: E402
from .readout import attention_map  # noqa: E402

if TYPE_CHECKING:
    from .integrations.image_processors import preprocess
    from .integrations.patching import patch
    from .methods.cof import CoF, CoFResult
    from .methods.dualfocus import DualFocus, DualFocusResult

__all__ = [
    "CoF",
    "CoFResult",
    "DualFocus",
    "DualFocusResult",
    "UnsupportedInputError",
    "UnsupportedModelError",
    "__version__",
    "attention_map",
    "boxes",
    "crop_resize",
    "families",
    "patch",
    "preprocess",
    "regions",
    "reweighted_attention",
    "reweighted_attention_varlen",
]


def __getattr__(name: str) -> Any:
    # transformers is imported only by those who use its models.
    if name == "patch":
        from .integrations.patching import patch

        return patch
    if name == "preprocess":
        from .integrations.image_processors import preprocess

        return preprocess
    if name in ("CoF", "CoFResult"):
        from .methods import cof

        return getattr(cof, name)
    if name in ("DualFocus", "DualFocusResult"):
        from .methods import dualfocus

        return getattr(dualfocus, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
