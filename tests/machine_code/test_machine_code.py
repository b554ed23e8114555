"""Machine code: loops found in a listing, and the kernels compiled for GPUs that are not here."""

from __future__ import annotations

import os
import re

import pytest

pytest.importorskip("triton", reason="triton exists for Linux only")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter's process compiles nothing", allow_module_level=True)

from bench.aot_configurations import Configuration, configurations
from bench.aot_crops import CropConfiguration, crop_configurations
from bench.aot_launches import Call, record, run_forward
from bench.aot_table import Entry, broken_limit, broken_rules, limited_configurations
from bench.machine_code import Loop, compiled_kernel, read_sass
from finegrain_ops.kernels.tuning import Tile


def listing(*lines: str) -> str:
    """As nvdisasm prints it: labels as they are, instructions with an address."""
    printed = [
        x if x.startswith(".L") else f"        /*{16 * i:04x}*/                   {x} ;" for i, x in enumerate(lines)
    ]
    return "\n".join(printed)


def jump(label: str) -> str:
    return f"@P0 BRA `({label})"


def test_loops_and_spills() -> None:
    """Forward jumps are no loops, nor are loops without products; a loop around a loop is not counted."""
    sass = listing(
        ".L_x_0:",
        "LDL.LU R2, [R1+0x4]",
        ".L_x_1:",
        "LDG.E R4, [R2.64]",
        jump(".L_x_2"),
        "@!PT LDS.128 R8, [R3]",
        ".L_x_2:",
        "HMMA.16816.F32.BF16 R4, R8, R12, R4",
        "STL [R1], R4",
        jump(".L_x_1"),
        ".L_x_3:",
        "IADD3 R0, R0, 0x1, RZ",
        jump(".L_x_3"),
        jump(".L_x_0"),
    )
    spills, shared, loops, serialized = read_sass(sass, 1024)
    assert (spills, shared, serialized) == (2, 1024, False)
    assert loops == (Loop(instructions=6, mma=1, spills=1, opcode="HMMA"),)


@pytest.mark.parametrize(("head_dim", "products"), [(64, 64), (80, 80), (88, 96), (96, 96), (104, 112), (128, 128)])
def test_head_dimensions_do_not_pay_for_the_next_power_of_two(head_dim: int, products: int) -> None:
    """At 128 x 64 and 8 warps, a warp has as many 16 x 8 x 16 products per block as the parts are wide."""
    tile = Tile(128, 64, num_warps=8, num_stages=2)
    _, code = Configuration("forward", 80, "bf16", head_dim, "bias", tile).compile()
    assert [loop.mma for loop in code.loops] == [products] * 4


def test_products_without_tensor_cores() -> None:
    products = ["FFMA R1, R2, R3, R1"] * 65
    loops = read_sass(listing(".L_x_0:", *products, jump(".L_x_0")), 0)[2]
    assert loops == (Loop(instructions=66, mma=0, spills=0, opcode="FFMA"),)
    assert read_sass(listing(".L_x_0:", *products[:64], jump(".L_x_0")), 0)[2] == ()


def test_serialized_products() -> None:
    """Each has its own arrive and wait, where in a pipeline a few of these do for all."""
    arrive, product, wait = (
        "WARPGROUP.ARRIVE",
        "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4]",
        "WARPGROUP.DEPBAR.LE gsb0, 0x0",
    )
    one_by_one = [arrive, product, wait] * 4
    pipelined = [arrive, *[product] * 4, wait]
    for body, expected in ((one_by_one, True), (pipelined, False)):
        _, _, loops, serialized = read_sass(listing(".L_x_0:", *body, jump(".L_x_0")), 0)
        assert serialized is expected
        assert loops == (Loop(len(body) + 1, 4, 0, "HGMMA"),)


@pytest.mark.parametrize("configuration", [c for c in limited_configurations() if c.dtype == "fp16"], ids=str)
def test_limits_of_the_forward_kernel(configuration: Configuration) -> None:
    entry = Entry.of(*configuration.compile())
    assert broken_rules(configuration, entry) == []
    assert broken_limit(configuration, entry) == []
    if configuration.features == "bias":
        before, biased, after, masked = entry.lengths
        assert max(before, after) < biased < masked  # keys outside the biased range do no bias work


def test_a_forced_tile_is_the_one_compiled() -> None:
    launch = record(run_forward, Call(90, "bf16", 64, tile=Tile(16, 32, 4, 1)))["attention_forward_kernel"]
    assert launch.tile == Tile(16, 32, 4, 1)


def test_every_configuration_is_launched_as_it_says() -> None:
    """Nothing is compiled here."""
    chosen = configurations()
    assert len({str(c) for c in chosen}) == len(chosen)
    for configuration in chosen:
        launch = configuration.launch()
        constants = launch.arguments
        assert all(p.name in constants for p in launch.kernel.params), configuration
        assert constants["HEAD_DIM"] == configuration.head_dim
        assert constants["HAS_BIAS"] == (configuration.features != "no bias")
        assert constants["HAS_GATE"] == ("gate" in configuration.features)
        assert constants["FOLDED"] == ("scale" not in configuration.features)
        assert constants.get("PACKED", False) == ("packed" in configuration.features)
        assert constants["STRIDE_UNIT"] == 8


def test_every_crop_configuration_is_launched_as_it_says() -> None:
    """Nothing is compiled here."""
    chosen = crop_configurations()
    assert len({str(c) for c in chosen}) == len(chosen)
    for configuration in chosen:
        constants = configuration.launch().arguments
        assert constants["HAS_TABLE"] == ("list" in configuration.features)
        assert constants.get("CHANNELS", 3) == (1 if "grey" in configuration.features else 3)
        assert constants["IS_ROUNDED"] == (configuration.dtype == "u8")


def test_weights_of_crops_round_each_operation() -> None:
    """A fused multiply-add would round once where a CPU, and so Pillow, rounds twice."""
    launch = CropConfiguration("crop_weights", 80, "u8", "list").launch()
    ptx = compiled_kernel(**launch.how_to_compile(80)).asm["ptx"]
    in_float64 = re.findall(r"\b(?:fma|mul|add|sub|div)\.[a-z0-9.]*f64", ptx)
    assert {instruction.split(".")[0] for instruction in in_float64} == {"mul", "add", "sub", "div"}
    assert all(".rn." in instruction for instruction in in_float64)


@pytest.mark.parametrize("compute_capability", [80, 90])
def test_products_of_crops_are_exact(compute_capability: int) -> None:
    """Levels go through float16 as integers; floating images must not go through tf32, which keeps 11 bits."""
    for dtype, instruction in (("u8", "HMMA"), ("fp32", "FFMA")):
        _, code = CropConfiguration("crop_resize", compute_capability, dtype, "batch").compile()
        assert [loop.opcode for loop in code.loops] == [instruction] * 2
