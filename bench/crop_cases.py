"""The calls of `crop_resize` that are measured: how many boxes, of which sizes, in which images, as dataclasses.

quick  what tells most; full  the quick ones first, then the rest, as in cases.py.
"""

from __future__ import annotations

import math
import random
from dataclasses import asdict, dataclass

import torch

from .named_case import NamedCase
from .operations import CROP_RESIZE

HD = (1080, 1920)  # (height, width)
# The shorter and the longer bound of a box's sides in pixels; None: all of the image but a few at its edges.
MIXES = {"small": (30, 150), "objects": (40, 400), "mixed": (64, 1200), "frame": None}
SEVERAL = ((480, 640), (1080, 1920), (600, 400), (1536, 2048), (333, 500), (768, 1024), (1920, 1080), (224, 224))
LAYOUTS = ("channels last", "planes")

Box = tuple[int, int, int, int]  # x0, y0, x1, y1


@dataclass(frozen=True)
class CropCase(NamedCase):
    """Boxes with integer edges, resized to a square of `size` pixels and normalised as CLIP's are; image by image in
    turn. channels last: pixels lie next to each other, as decoders leave them; planes: contiguous (3, H, W).
    """

    name: str
    num_boxes: int
    mix: str
    size: int
    dtype: torch.dtype = torch.float32  # of the result
    image_sizes: tuple[tuple[int, int], ...] = (HD,)
    layout: str = "channels last"

    def __post_init__(self) -> None:
        if self.mix not in MIXES:
            raise ValueError(f"{self.name}: mix {self.mix!r} is none of {tuple(MIXES)}")
        if self.layout not in LAYOUTS:
            raise ValueError(f"{self.name}: layout {self.layout!r} is none of {LAYOUTS}")

    @property
    def operation(self) -> str:
        return CROP_RESIZE

    def parameters(self) -> dict:
        """What a stored row says about the case; plain JSON values."""
        return {**asdict(self), "id": self.id, "dtype": self.dtype_name, "sides": MIXES[self.mix]}

    def image_index(self) -> list[int]:
        return [box % len(self.image_sizes) for box in range(self.num_boxes)]

    def boxes(self) -> list[Box]:
        """The same on every machine."""
        numbers = random.Random(0)
        return [_draw_box(MIXES[self.mix], self.image_sizes[image], numbers) for image in self.image_index()]

    def num_bytes(self) -> int:
        """The fewest that a call moves: every pixel within any box read once, the result written once."""
        covered = [torch.zeros(size, dtype=torch.bool) for size in self.image_sizes]
        for (x0, y0, x1, y1), image in zip(self.boxes(), self.image_index()):
            covered[image][y0:y1, x0:x1] = True
        read = sum(int(mask.sum()) for mask in covered)
        return 3 * (read + self.num_boxes * self.size**2 * self.dtype.itemsize)


def _draw_box(sides: tuple[int, int] | None, image_size: tuple[int, int], numbers: random.Random) -> Box:
    """Sides spread evenly over the logarithm, none more than twice the other, as far as the image goes."""
    height, width = image_size
    if sides is None:
        left, top, right, bottom = (int(length * numbers.uniform(0, 0.05)) for length in (width, height) * 2)
        return left, top, width - right, height - bottom
    low, high = sides
    middle, aspect = math.exp(numbers.uniform(math.log(low), math.log(high))), 2 ** numbers.uniform(-0.5, 0.5)
    box_width, box_height = (
        min(round(min(max(side, low), high)), length)
        for side, length in ((middle * aspect, width), (middle / aspect, height))
    )
    x0, y0 = numbers.randint(0, width - box_width), numbers.randint(0, height - box_height)
    return x0, y0, x0 + box_width, y0 + box_height


def mixed(num_boxes: int, dtype: torch.dtype = torch.float32) -> CropCase:
    """Regions of any size of one photograph, for CLIP ViT-L/14 at 336 pixels, LLaVA-1.5's eye."""
    return CropCase(f"mixed-k{num_boxes}", num_boxes, "mixed", 336, dtype)


def small(num_boxes: int) -> CropCase:
    """Regions that are enlarged."""
    return CropCase(f"small-k{num_boxes}", num_boxes, "small", 336)


def frame(num_boxes: int) -> CropCase:
    """Nearly the whole image, again and again: regions that are shrunk."""
    return CropCase(f"frame-k{num_boxes}", num_boxes, "frame", 336)


def objects(num_boxes: int = 64, dtype: torch.dtype = torch.float32) -> CropCase:
    """A detector's objects for CLIP at 224 pixels."""
    return CropCase(f"objects-k{num_boxes}", num_boxes, "objects", 224, dtype)


def several(num_boxes: int = 32, dtype: torch.dtype = torch.float32) -> CropCase:
    """Regions of eight images, no two of one size."""
    return CropCase(f"images8-k{num_boxes}", num_boxes, "mixed", 336, dtype, image_sizes=SEVERAL)


def planes(num_boxes: int) -> CropCase:
    """The same as `mixed`, of an image that lies as tensors do."""
    return CropCase(f"planes-k{num_boxes}", num_boxes, "mixed", 336, layout="planes")


def _quick_cpu_cases() -> list[CropCase]:
    return [mixed(16)]


def _full_cpu_cases() -> list[CropCase]:
    return [
        objects(),
        small(16),
        several(),
        mixed(1),
        frame(16),
        mixed(64),
        planes(16),
        small(64),
        frame(1),
        mixed(256),
    ]


def _quick_cuda_cases() -> list[CropCase]:
    half = torch.bfloat16
    return [mixed(64), mixed(64, half), mixed(1), objects(64, half), several(32, half), frame(16)]


def _full_cuda_cases() -> list[CropCase]:
    counts, half = (1, 16, 64, 256), torch.float16
    return [
        *(case(count) for case in (mixed, small, frame) for count in counts),
        *(mixed(count, half) for count in counts),
        objects(),
        several(),
        planes(64),
    ]


def crop_cases_for(device_type: str, case_set: str = "full") -> list[CropCase]:
    quick, full = (
        (_quick_cuda_cases, _full_cuda_cases) if device_type == "cuda" else (_quick_cpu_cases, _full_cpu_cases)
    )
    cases = quick() if case_set == "quick" else [*quick(), *full()]
    return list({case.id: case for case in cases}.values())
