"""The table of tiles answers every call and fits every GPU; variants say what they are."""

from __future__ import annotations

import pytest

from finegrain_ops.backends.cuda import tiles
from finegrain_ops.backends.cuda.variants import (
    CROP_ELEMENTS,
    CROP_KERNELS,
    ELEMENTS,
    KERNELS,
    WIDTHS,
    Variant,
    all_variants,
    width_for,
)

ARCHITECTURES = sorted(tiles.SHARED_KIB)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_tile_fits_the_shared_memory_of_its_architecture(architecture: int) -> None:
    for variant in all_variants([architecture]):
        assert variant.shared_bytes <= 1024 * tiles.SHARED_KIB[architecture], variant.name


@pytest.mark.parametrize("architecture", tiles.CLASSES)
def test_as_many_blocks_as_are_promised_fit_a_multiprocessor(architecture: int) -> None:
    """Their shared memory and threads; whether their registers do is for the machine code to show (bench.cuda_aot)."""
    for variant in all_variants([architecture]):
        blocks = variant.tile.blocks
        assert blocks * variant.shared_bytes <= 1024 * tiles.SHARED_KIB[architecture], variant.name
        assert blocks * variant.threads <= 1024


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_tile_is_one_that_the_kernels_can_be_compiled_for(architecture: int) -> None:
    for variant in all_variants([architecture]):
        if variant.kernel in ("merge_splits", "crop_weights"):
            assert variant.shared_bytes == 0
            continue
        if variant.kernel == "crop_resize":
            assert variant.tile.step % variant.tile.warps == tiles.CROP_PLACES % variant.tile.warps == 0
            continue
        assert variant.tile.step % 16 == 0
        assert variant.tile.step > 0
        assert 1 <= variant.tile.warps <= 16, "scratch in shared memory has two ints for each of 16 warps"
        assert variant.rows == 16 * variant.tile.warps * variant.tile.row_blocks
        assert variant.tile.row_blocks == 1 or variant.long


def test_every_row_of_the_table_is_used() -> None:
    used = {
        (v.kernel + v.options, tiles.class_of(v.architecture), v.element_size, v.tile)
        for v in all_variants(ARCHITECTURES)
    }
    for row in tiles.TABLE:
        assert (row.kernel, row.architecture, row.element_size, row.tile) in used, row


def test_later_architectures_share_the_tiles_of_sm_80() -> None:
    """Or machine code that was built for sm_80 would be launched on sm_86 with a tile that is not its own."""
    of_80 = {v.name.replace("sm_80", ""): v.defines() for v in all_variants([80])}
    for architecture in ARCHITECTURES:
        if architecture > 80:
            those = {v.name.replace(f"sm_{architecture}", ""): v.defines() for v in all_variants([architecture])}
            assert those == of_80


def test_all_variants() -> None:
    variants = all_variants([70, 80])
    assert len({variant.name for variant in variants}) == len(set(variants)) == len(variants)
    assert {v.kernel for v in variants} == {*KERNELS, *CROP_KERNELS}
    of_attention = [v for v in variants if not v.is_of_crops]
    assert {v.element for v in of_attention if v.architecture == 70} == {"half_t", "float"}
    assert {v.element for v in of_attention if v.architecture == 80} == set(ELEMENTS)
    assert sum(v.kernel == "merge_splits" for v in variants) == 2 + 3
    for architecture in (70, 80):
        of_crops = [v for v in variants if v.is_of_crops and v.architecture == architecture]
        assert {v.element for v in of_crops if v.kernel == "crop_resize"} == set(CROP_ELEMENTS)
        assert len(of_crops) == len(CROP_ELEMENTS) + 1


def test_names() -> None:
    variant = Variant("attention_forward", "half_t", 128, 70, long=True)
    assert (variant.name, variant.entry) == ("attention_forward-half_t-128-sm_70-long", "attention_forward")
    assert Variant("attention_rows", "float", 32, 75, of_map=True).name == "attention_rows-float-32-sm_75-of_map"
    assert Variant("crop_resize", "byte_t", 0, 70).name == "crop_resize-byte_t-sm_70"


def test_defines_are_what_the_kernels_read() -> None:
    variant = Variant("attention_backward_query", "half_t", 80, 75, of_map=True)
    defines = variant.defines()
    assert defines["FINEGRAIN_ELEMENT"] == "half_t"
    assert defines["FINEGRAIN_OF_MAP"] == 1
    assert 32 * int(defines["FINEGRAIN_WARPS"]) == variant.threads
    assert defines["FINEGRAIN_SHARED_BYTES"] == variant.shared_bytes > 0


def test_width_for() -> None:
    for head_dim in range(1, 129):
        width = width_for(head_dim)
        assert width is not None
        assert width >= head_dim
        assert not any(head_dim <= narrower < width for narrower in WIDTHS)
    assert width_for(129) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("attention_forward", "bfloat16_t", 64, 75), "bfloat16_t needs sm_80"),
        (("attention_forward", "half_t", 72, 75), "no such kernel"),
        (("attention_decode", "half_t", 64, 75), "no such kernel"),
        (("attention_forward", "half_t", 64, 61), "half_t needs sm_70"),
        (("merge_splits", "half_t", 64, 75), "only the width 128"),
        (("attention_forward", "float", 64, 75, True), "no long variant"),
        (("attention_map", "float", 64, 75, False, True), "no variant of_map"),
        (("attention_map", "byte_t", 64, 75), "no such kernel"),
        (("crop_resize", "byte_t", 64, 75), "no such kernel"),
        (("crop_resize", "byte_t", 0, 61), "no such kernel"),
        (("crop_weights", "byte_t", 0, 75), "no such kernel"),
    ],
)
def test_there_is_no_such_variant(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Variant(*arguments)
