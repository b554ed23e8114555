"""The kernels of crop_resize among the compiled configurations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from finegrain_ops.backends.crops.interface import CropCall, PassOrder
from finegrain_ops.kernels.crop_resize import crop_resize
from finegrain_ops.kernels.tuning import Tile

from .aot_configurations import COMPUTE_CAPABILITIES
from .aot_launches import Launch, recorded
from .machine_code import MachineCode

_DTYPES = {"u8": torch.uint8, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_TILE_OF_WEIGHTS = ("BLOCK", "num_warps", "num_stages")


@dataclass(frozen=True)
class CropConfiguration:
    kernel: str
    compute_capability: int
    dtype: str  # of the images
    features: str  # "batch", or "list", which has a table of addresses, or "grey list"

    def __str__(self) -> str:
        return f"{self.kernel} sm_{self.compute_capability} {self.dtype} {self.features}"

    @property
    def is_half_precision(self) -> bool:
        """Levels go through the tensor cores as float16; floating images are resampled in float32."""
        return self.has_products and self.dtype == "u8"

    @property
    def has_products(self) -> bool:
        return self.kernel == "crop_resize"

    def launch(self) -> Launch:
        return recorded(lambda: crop_resize(self._call()))[f"{self.kernel}_kernel"]

    def compile(self) -> tuple[Tile, MachineCode]:
        launch = self.launch()
        tile = launch.tile if self.has_products else Tile(1, *map(launch.arguments.get, _TILE_OF_WEIGHTS))
        return tile, launch.compile(self.compute_capability)

    def _call(self) -> CropCall:
        """On tensors without memory."""
        channels = 1 if "grey" in self.features else 3
        images: Tensor | list[Tensor] = self._empty(2, channels, 480, 640)
        if "list" in self.features:
            images = [self._empty(channels, 480, 640), self._empty(channels, 333, 500)]
        return CropCall(
            images,
            torch.empty(5, 4, dtype=torch.float64, device="meta"),
            torch.empty(5, dtype=torch.int64, device="meta"),
            (336, 336),
            "bicubic",
            antialias=True,
            is_padded=True,
            shortest_edge=None,
            fill=(0.0,) * channels,
            multiplier=(1.0,) * channels,
            offset=(0.0,) * channels,
            dtype=torch.bfloat16,
            pass_order=PassOrder.VERTICAL_FIRST_IF_SHRUNK,
        )

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=_DTYPES[self.dtype], device="meta")


def crop_configurations(every: bool = False) -> list[CropConfiguration]:
    """Those of the committed table; with `every`, the other dtypes too."""
    chosen = [("crop_weights", "u8", "list")]
    chosen += [("crop_resize", "u8", features) for features in ("batch", "list", "grey list")]
    chosen += [("crop_resize", dtype, "batch") for dtype in (("fp32", "fp16", "bf16") if every else ("fp32",))]
    return [
        CropConfiguration(kernel, capability, dtype, features)
        for kernel, dtype, features in chosen
        for capability in COMPUTE_CAPABILITIES
    ]
