# SPDX-License-Identifier: Apache-2.0
"""The Hopper family with the real nvcc: every kind of tile, no spills, full speed."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from jax_bolt._src import arch, ir, options
from jax_bolt._src.jit import codegen, compiler, toolchain
from jax_bolt._src.kernels import implicit_gemm_sm90 as family
from jax_bolt._src.kernels import implicit_gemm_tiles as tiles
from jax_bolt._src.kernels.image import Image

HOPPER = arch.from_name("sm_90a")


def bias_silu(sides: int, dtype: ir.DType) -> ir.Epilogue:
    """silu(acc + bias) plus the side inputs: the longest of the usual epilogues."""
    ops = [ir.Op("acc"), ir.Op("vector", (), 0), ir.Op("add", (0, 1))]
    ops += [ir.Op("logistic", (2,)), ir.Op("mul", (2, 3))]
    for side in range(sides):
        ops += [ir.Op("side", (), side), ir.Op("add", (len(ops) - 1, len(ops)))]
    return ir.Epilogue(
        ops=tuple(ops),
        result=len(ops) - 1,
        out_dtype=dtype,
        vectors=(ir.Vector("f32"),),
        sides=(dtype,) * sides,
    )


def largest(region: ir.Region, **wanted: object) -> tiles.Tile:
    """Of the tiles with these traits, the one with the most accumulators."""
    image = Image.of_region(region)
    found = [
        tile
        for tile in tiles.tiles_of(image, region.epilogue, HOPPER)
        if all(getattr(tile, name) == value for name, value in wanted.items())
    ]
    return max(found, key=lambda t: t.blocks * t.channel_blocks * t.pixels)


@pytest.mark.parametrize(
    ("traits", "sides", "dtype", "layout"),
    [
        ({"schedule": "cooperative", "warps_m": 2}, 1, "bf16", "hwio"),
        ({"schedule": "cooperative", "warps_n": 2, "blocks": 2}, 0, "bf16", "hwio"),
        ({"schedule": "cooperative", "channel_blocks": 2}, 2, "f16", "krsc"),
        ({"schedule": "pingpong", "channel_blocks": 1}, 0, "bf16", "krsc"),
        ({"schedule": "pingpong", "channel_blocks": 2}, 1, "bf16", "hwio"),
        ({"schedule": "cooperative", "warpgroups": 1}, 1, "f16", "hwio"),
    ],
    ids=lambda value: str(value).replace(" ", ""),
)
def test_the_largest_tiles_neither_spill_nor_serialise(
    tmp_path, traits, sides, dtype, layout
):
    problem = ir.ConvProblem(
        n=32, h=28, w=28, c=128, k=128, r=3, s=3, padding=(1, 1, 1, 1), dtype=dtype
    )
    problem = dataclasses.replace(problem, filter_layout=layout)
    region = ir.Region(problem=problem, epilogue=bias_silu(sides, dtype))
    log = compiled(region, largest(region, **traits), tmp_path)
    # ptxas keeps one word of some kernels on the stack, and no accumulator.
    (stored,) = re.findall(r"(\d+) bytes spill stores", log)
    assert int(stored) <= 4, log
    assert "C751" not in log, log


def compiled(region: ir.Region, tile: tiles.Tile, folder: Path, more: str = "") -> str:
    """The compiler's log; ``more`` follows the kernel."""
    source = codegen.source(region, family, tile.config(), HOPPER) + more
    found = toolchain.find(options.current())
    binary = compiler.compile(found, source, HOPPER, folder)
    assert binary.suffix == ".cubin"
    return (folder / compiler.LOG).read_text()


@pytest.mark.parametrize(
    ("traits", "channels", "layout"),
    [
        ({"schedule": "pingpong", "channel_blocks": 2}, 96, "hwio"),
        ({"schedule": "cooperative", "warps_n": 2, "blocks": 2}, 80, "krsc"),
        ({"splits": 2, "warpgroups": 2}, 176, "hwio"),
    ],
    ids=lambda value: str(value).replace(" ", ""),
)
def test_last_chunks_with_fewer_products(tmp_path, traits, channels, layout):
    """Two loops over taps share the accumulators, which stay where they are."""
    few = {"n": 1, "h": 7, "w": 7} if "splits" in traits else {}
    problem = ir.ConvProblem(
        **({"n": 32, "h": 28, "w": 28} | few),
        **{"c": channels, "k": 128, "r": 3, "s": 3, "padding": (1, 1, 1, 1)},
        **{"dtype": "bf16", "filter_layout": layout},
    )
    region = ir.Region(problem=problem, epilogue=bias_silu(0, "bf16"))
    check = "static_assert(!JaxBoltKernel::kAlike);\n"
    log = compiled(region, largest(region, **traits), tmp_path, check)
    assert "0 bytes spill stores, 0 bytes spill loads" in log, log
    assert "C75" not in log, log


FEW_TILES = ir.ConvProblem(
    n=1, h=7, w=7, c=512, k=512, r=3, s=3, padding=(1, 1, 1, 1), dtype="bf16"
)
STEM = ir.ConvProblem(
    n=32,
    h=224,
    w=224,
    c=3,
    k=64,
    r=7,
    s=7,
    stride=(2, 2),
    padding=(3, 3, 3, 3),
    dtype="bf16",
)


@pytest.mark.parametrize(
    ("problem", "traits", "out_dtype"),
    [
        (FEW_TILES, {"splits": 8, "warpgroups": 2}, "bf16"),
        (FEW_TILES, {"splits": 4, "warpgroups": 1}, "f32"),
        (STEM, {}, "bf16"),
    ],
)
def test_split_packed_and_wide(tmp_path, problem, traits, out_dtype):
    problem = dataclasses.replace(problem, filter_layout="hwio")
    sides = 0 if problem.c == 3 else 1
    epilogue = dataclasses.replace(bias_silu(sides, "bf16"), out_dtype=out_dtype)
    region = ir.Region(problem=problem, epilogue=epilogue)
    log = compiled(region, largest(region, **traits), tmp_path)
    assert log.count("0 bytes spill stores, 0 bytes spill loads") == 2 - sides, log
    assert ("jax_bolt_prologue" in log) == (problem.c == 3)
    assert "C751" not in log, log


@pytest.mark.parametrize(
    ("traits", "dtype"),
    [
        ({"schedule": "pingpong"}, "bf16"),
        ({"schedule": "cooperative", "warps_n": 2}, "f16"),
        ({"schedule": "cooperative", "warpgroups": 1}, "bf16"),
    ],
    ids=str,
)
def test_pools(tmp_path, traits, dtype):
    """Of a window that is unrolled, without spills."""
    problem = dataclasses.replace(STEM, filter_layout="hwio", dtype=dtype)
    region = ir.Region(
        problem=problem,
        epilogue=bias_silu(0, dtype),
        pool=ir.Pool(window=(3, 3), stride=(2, 2), padding=(1, 1, 1, 1)),
    )
    log = compiled(region, largest(region, **traits), tmp_path)
    assert log.count("0 bytes spill stores, 0 bytes spill loads") == 2, log
    assert "C751" not in log, log


@pytest.mark.parametrize(
    ("traits", "sides", "out_dtype"),
    [
        ({"schedule": "pingpong", "channel_blocks": 2}, 1, "bf16"),
        ({"schedule": "cooperative", "warps_n": 2, "blocks": 2}, 1, "f16"),
        ({"schedule": "cooperative", "warpgroups": 1}, 0, "f32"),
    ],
    ids=str,
)
def test_means(tmp_path, traits, sides, out_dtype):
    """Beside side inputs and of results of either width, without spills."""
    problem = ir.ConvProblem(
        n=32, h=7, w=7, c=512, k=2048, r=1, s=1, dtype="bf16", filter_layout="hwio"
    )
    region = ir.Region(
        problem=problem,
        epilogue=bias_silu(sides, out_dtype),
        pool=ir.Pool(window=(7, 7), operation="mean"),
    )
    tiles_of_slot = tiles.slot_tiles_of(region.epilogue)
    check = f"static_assert(JaxBoltKernel::kSlotTiles == {tiles_of_slot});\n"
    log = compiled(region, largest(region, **traits), tmp_path, check)
    assert "0 bytes spill stores, 0 bytes spill loads" in log, log
    assert "C751" not in log, log


def storing(epilogue: ir.Epilogue, dtype: ir.DType) -> ir.Epilogue:
    """``epilogue``, and what it begins with as an auxiliary output."""
    return dataclasses.replace(epilogue, auxiliary=(ir.Output(2, dtype),))


@pytest.mark.parametrize(
    ("problem", "traits", "epilogue"),
    [
        (
            dataclasses.replace(FEW_TILES, n=32, h=28, w=28, c=128, k=128),
            {"schedule": "cooperative", "warps_m": 2},
            storing(bias_silu(1, "bf16"), "bf16"),
        ),
        (
            ir.GemmProblem(m=4096, n=1024, k=1024, dtype="bf16"),
            {"schedule": "pingpong", "channel_blocks": 2},
            storing(bias_silu(0, "bf16"), "f32"),
        ),
        (
            FEW_TILES,
            {"splits": 8, "warpgroups": 2},
            storing(bias_silu(2, "bf16"), "bf16"),
        ),
    ],
)
def test_auxiliary_outputs(tmp_path, problem, traits, epilogue):
    """As fast as without, and where Python takes the slot's tiles to be."""
    if isinstance(problem, ir.ConvProblem):
        problem = dataclasses.replace(problem, filter_layout="hwio")
    region = ir.Region(problem=problem, epilogue=epilogue)
    tiles_of_slot = tiles.slot_tiles_of(epilogue)
    check = f"static_assert(JaxBoltKernel::kSlotTiles == {tiles_of_slot});\n"
    log = compiled(region, largest(region, **traits), tmp_path, check)
    assert "0 bytes spill stores, 0 bytes spill loads" in log, log
    assert "C751" not in log, log
