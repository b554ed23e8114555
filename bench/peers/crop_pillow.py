"""Pillow and the processors of transformers on the host, as papers crop; the copy to another device is timed too.

The images as Pillow's are prepared. The processors' own step of cutting the centre out is off: crops are resized to the
square as they are, by every peer.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from ..crop_inputs import MEAN, RESCALE, STD, CropInputs
from .interface import Call, CropPeer, PeerUnavailable, Prepare, installed

ONE_THREAD, TWO_THREADS = 1, 2
_NEAR_LEVELS = 16.0  # torchvision resizes with F.interpolate, on CUDA in float32


def pillow(num_threads: int) -> str:
    return f"Pillow + numpy, {'one thread' if num_threads == ONE_THREAD else 'two threads'}"


def pillow_and_copy(num_threads: int) -> str:
    return f"Pillow, {'one thread' if num_threads == ONE_THREAD else 'two threads'}, and copy"


def crop_peers(device_type: str) -> list[CropPeer]:
    on_host = device_type == "cpu"
    name, prepare = (pillow, _pillow_and_numpy) if on_host else (pillow_and_copy, _pillow_and_copy)
    copy = "" if on_host else " and copy"
    return [
        *(CropPeer(name(num_threads), prepare(num_threads)) for num_threads in (TWO_THREADS, ONE_THREAD)),
        CropPeer(f"transformers CLIPImageProcessorPil{copy}", _pil_processor),
        CropPeer("transformers CLIPImageProcessor (torchvision)", _torchvision_processor, levels=_NEAR_LEVELS),
    ]


def _pillow_and_numpy(num_threads: int) -> Prepare:
    def prepare(inputs: CropInputs) -> Call:
        import numpy as np

        resized, size = _resized_crop(inputs), inputs.case.size
        multiplier, offset = inputs.multiplier.numpy(), inputs.offset.numpy()

        def call() -> Tensor:
            result = np.empty((len(inputs.boxes), 3, size, size), np.float32)

            def run(box: int) -> None:
                np.multiply(resized(box).transpose(2, 0, 1), multiplier, out=result[box])
                result[box] += offset

            _for_each(run, len(result), num_threads)
            return torch.from_numpy(result).to(inputs.case.dtype)

        return call

    return prepare


def _pillow_and_copy(num_threads: int) -> Prepare:
    """Levels are copied, a quarter of the bytes of normalised values, and normalised there."""

    def prepare(inputs: CropInputs) -> Call:
        import numpy as np

        resized, size, device = _resized_crop(inputs), inputs.case.size, inputs.device

        def call() -> Tensor:
            levels = np.empty((len(inputs.boxes), size, size, 3), np.uint8)

            def run(box: int) -> None:
                levels[box] = resized(box)

            _for_each(run, len(levels), num_threads)
            planes = torch.from_numpy(levels).to(device).permute(0, 3, 1, 2).contiguous()
            return (planes * inputs.multiplier).add_(inputs.offset).to(inputs.case.dtype)

        return call

    return prepare


def _resized_crop(inputs: CropInputs) -> Callable:
    """From the number of a box to (size, size, 3), a numpy array of levels."""
    image_module = installed("PIL.Image")
    import numpy as np

    images, size, bicubic = inputs.pil_images(), inputs.case.size, image_module.Resampling.BICUBIC

    def resized(box: int) -> np.ndarray:
        return np.asarray(images[inputs.image_index[box]].crop(inputs.boxes[box]).resize((size, size), bicubic))

    return resized


def _for_each(run: Callable[[int], None], count: int, num_threads: int) -> None:
    if num_threads == ONE_THREAD:
        for box in range(count):
            run(box)
        return
    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(run, range(count)))


def _pil_processor(inputs: CropInputs) -> Call:
    """transformers 5 has it beside the one of torchvision, before it was the only one."""
    transformers = installed("transformers")
    processor_class = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    installed("PIL.Image")
    processor = _configured(processor_class, inputs)
    images, case = inputs.pil_images(), inputs.case

    def call() -> Tensor:
        crops = [images[index].crop(box) for box, index in zip(inputs.boxes, inputs.image_index)]
        return processor(images=crops, return_tensors="pt")["pixel_values"].to(inputs.device, case.dtype)

    return call


def _torchvision_processor(inputs: CropInputs) -> Call:
    """It takes tensors, here views, and works where they are."""
    installed("torchvision")
    transformers = installed("transformers")
    is_default = hasattr(transformers, "CLIPImageProcessorPil")
    processor_class = transformers.CLIPImageProcessor if is_default else transformers.CLIPImageProcessorFast
    processor, crops, case = _configured(processor_class, inputs), inputs.crops(), inputs.case

    def call() -> Tensor:
        return processor(images=crops, return_tensors="pt")["pixel_values"].to(case.dtype)

    return call


def _configured(processor_class: type, inputs: CropInputs) -> Callable:
    size = {"height": inputs.case.size, "width": inputs.case.size}
    try:
        return processor_class(
            size=size, do_center_crop=False, rescale_factor=RESCALE, image_mean=list(MEAN), image_std=list(STD)
        )
    except ImportError as error:
        raise PeerUnavailable(f"{processor_class.__name__}: {error}") from error
