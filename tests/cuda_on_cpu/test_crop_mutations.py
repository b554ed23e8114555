"""The kernels of `crop_resize` broken on purpose, as in test_mutations.py: each change must be noticed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import simulator
import torch
from cpu_launcher import CpuLauncher

pytest.importorskip("hypothesis", reason="test_crop_calls.py needs it")
from test_crop_calls import SHRUNK, check_boxes_that_do_not_exist, check_rounding, check_scratch_memory
from test_mutations import Mutation, _run

from crop_cases import CASES, check
from finegrain_ops import validation


def _cases(*names: str) -> list[Callable]:
    return [lambda _, name=name: check({**CASES, **SHRUNK}[name], "cuda") for name in names]


def _bad_boxes(_: torch.dtype) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validation, "values_are_checked", lambda tensor: False)
        check_boxes_that_do_not_exist()


def _few_at_once(_: torch.dtype) -> None:
    check_scratch_memory(2)


def _rounding(_: torch.dtype) -> None:
    check_rounding()


def _weights(old: str, new: str, *checks: Callable | str) -> Mutation:
    return _mutation("crop_weights.cuh", old, new, *checks)


def _resize(old: str, new: str, *checks: Callable | str, occurrence: int = 0) -> Mutation:
    return _mutation("crop_resize.cuh", old, new, *checks, occurrence=occurrence)


def _mutation(file: str, old: str, new: str, *checks: Callable | str, occurrence: int = 0) -> Mutation:
    listed = [each for check in checks for each in (_cases(check) if isinstance(check, str) else [check])]
    return Mutation(file, old, new, listed, architecture=70, occurrence=occurrence)


MUTATIONS = [
    # boxes
    _weights("x0 < 0.0 ? 0.0 : x0", "x0", "boxes beyond the image"),
    _weights("y1 > image_height ? image_height : y1", "y1", "boxes beyond the image"),
    _weights("x0 < 0.0 ? 0.0 : x0", "x0 > 0.0 ? x0 : 0.0", _bad_boxes),  # NaN becomes 0
    _weights("left < right && top", "!(left >= right) && top", _bad_boxes),
    _weights("index >= 0 &&", "", _bad_boxes),
    _weights("index < arguments.num_images", "true", _bad_boxes),
    _weights("arguments.num_images > 1 ? box : 0", "0", "one box per image"),
    _weights("index * arguments.image_stride", "0", "batch"),
    _weights("floor(multiply(margin, 0.5))", "multiply(margin, 0.5)", "padded"),
    _weights("resized_height = floor(", "resized_height = (", "shortest edge"),
    _weights("shrinks > 2.0 *", "shrinks > 99.0 *", "tall, Pillow 13"),
    _weights("rows.length > 100.0", "rows.length >= 100.0", "very tall"),
    _weights("const int own = is_row ? place :", "const int own = is_row ? 0 :", "integer boxes"),
    # weights
    _weights("floor((resized - size) * 0.5)", "(resized - size) * 0.5", "shortest edge"),
    _weights("scale < 1.0 ? 1.0 : scale", "scale", "enlarged"),
    _weights("centre - support + 0.5", "centre - support + 1.5", "integer boxes"),
    _weights("min((int)(centre + support + 0.5), length)", "(int)(centre + support + 0.5)", "integer boxes"),
    _weights("+ i, 0), length - 1)", "+ i, 0), length)", "without antialiasing"),
    _weights("return antialiased(pixel) / total", "return antialiased(pixel)", "integer boxes"),
    _weights("weight < 0.0 ? -0.5 : 0.5", "0.5", "fractional boxes"),
    _weights("radius, -0.75", "radius, -0.5", "without antialiasing"),
    _weights("|| place >= num_places) return", ") return", "integer boxes"),
    _weights("arguments.first_box + index", "index", _few_at_once),
    # barriers
    _resize("if (piece > first.begin) __syncthreads();", "", "wide"),
    *(_resize("__syncthreads();", "", "wide", occurrence=occurrence) for occurrence in (1, 2, 4)),
    _resize("__syncthreads();", "", "tall", occurrence=3),
    # bounds, and what is `fill`
    _resize("min(max(i + k * stride, first_pixel), last_pixel)", "i + k * stride", "padded"),
    _resize("min(max(step + line, second.pixels_begin), second.pixels_end - 1)", "step + line", "padded"),
    _resize("line_exists && own >= first_pixel", "own >= first_pixel", "padded"),
    _resize("own >= first_pixel && own <= last_pixel", "own <= last_pixel", "padded"),
    _resize("own >= first_pixel && own <= last_pixel", "own >= first_pixel", "padded"),
    _resize("if (place >= num_places) return make_int2(0, 0);", "", "integer boxes"),
    _resize("min(first_place + PLACES, num_places) - 1", "first_place + PLACES - 1", "integer boxes"),
    _resize("if (column >= arguments.width) return;", "", "integer boxes"),
    _resize("if (row >= arguments.height) break;", "", "integer boxes"),
    _resize("const bool exists = shared.record.exists;", "const bool exists = true;", _bad_boxes),
    # passes
    _resize("1 << 21", "1 << 20", "integer boxes"),
    _resize("min(max(sum >> 22, 0), 255)", "(sum >> 22)", "integer boxes"),
    _resize("begin = max(taps.x, piece)", "begin = taps.x", "wide"),
    _resize("min(taps.x + taps.y, piece + piece_length)", "taps.x + taps.y", "wide"),
    _resize("begin = max(taps.x, step)", "begin = taps.x", "tall, horizontal first"),
    _resize("min(taps.x + taps.y, step + step_length)", "taps.x + taps.y", "tall, horizontal first"),
    _resize("along_second = record.vertical_first ? column : row", "along_second = row", "tall, Pillow 13"),
    _resize("arguments.first_box + index", "index", _few_at_once),
    _resize(" + (bits >> 16 & 1)", "", _rounding),
    _resize("if (value != value)", "if (false)", _rounding),
]  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_a_broken_kernel_is_noticed(mutation: Mutation, use_launcher) -> None:
    use_launcher(CpuLauncher(mutation.architecture, mutation.overrides()))
    with pytest.raises((AssertionError, simulator.SimulatorError)) as noticed:
        _run(mutation.checks, mutation.dtype)
    assert not str(noticed.value).startswith("g++"), "the mutation does not compile"


def test_the_checks_pass_without_a_mutation(use_launcher) -> None:
    """So what fails above fails for the mutation."""
    use_launcher(CpuLauncher(70))
    for mutation in MUTATIONS:
        _run(mutation.checks, mutation.dtype)
