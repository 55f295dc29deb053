# SPDX-License-Identifier: Apache-2.0
"""Chains with the real nvcc: the largest tiles keep registers, and full speed."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from jax_bolt._src import arch, ir, options
from jax_bolt._src.jit import codegen, compiler, toolchain
from jax_bolt._src.kernels import chain_sm90, chain_tiles
from jax_bolt._src.kernels.chain_tiles import Tile

HOPPER = arch.from_name("sm_90a")


def norm_silu(sides: int, dtype: ir.DType) -> ir.Epilogue:
    """silu(acc * scale + shift) plus side inputs."""
    ops = [ir.Op("acc"), ir.Op("vector", (), 0), ir.Op("mul", (0, 1))]
    ops += [ir.Op("vector", (), 1), ir.Op("add", (2, 3))]
    ops += [ir.Op("logistic", (4,)), ir.Op("mul", (4, 5))]
    for side in range(sides):
        ops += [ir.Op("side", (), side), ir.Op("add", (len(ops) - 1, len(ops)))]
    return ir.Epilogue(
        ops=tuple(ops),
        result=len(ops) - 1,
        out_dtype=dtype,
        vectors=(ir.Vector("f32"),) * 2,
        sides=(dtype,) * sides,
    )


def chain_of(
    problem: ir.Problem, channels: int, sides: tuple[int, int], stored: bool
) -> ir.Chain:
    dtype = problem.dtype
    read = ir.GemmProblem(m=problem.rows, n=channels, k=problem.channels, dtype=dtype)
    first, second = (norm_silu(count, dtype) for count in sides)
    return ir.Chain(
        first=ir.Region(problem=problem, epilogue=first),
        second=ir.Region(problem=read, epilogue=second),
        stored=stored,
    )


def largest(chain: ir.Chain, **wanted: object) -> Tile:
    """Of the tiles with these traits, the one with the most accumulators."""
    shape = chain_tiles.shape_of(chain)
    found = [
        tile
        for tile in chain_tiles.tiles_of(chain, HOPPER)
        if all(getattr(tile, name) == value for name, value in wanted.items())
    ]
    return max(found, key=lambda t: (t.group + shape.outputs) * t.pixels)


EXPAND = ir.GemmProblem(m=6272, n=1024, k=256, dtype="bf16", b_layout="col")
CONV = ir.ConvProblem(
    n=32, h=56, w=56, c=64, k=64, r=3, s=3, padding=(1, 1, 1, 1), dtype="f16"
)


@pytest.mark.parametrize(
    ("problem", "channels", "sides", "stored", "traits"),
    [
        (EXPAND, 256, (1, 0), True, {"warpgroups": 2, "group": 1}),
        (EXPAND, 128, (0, 1), False, {"warpgroups": 2, "group": 2}),
        (CONV, 64, (0, 0), False, {"warpgroups": 1}),
        (EXPAND, 128, (1, 0), True, {"warpgroups": 3, "ahead": 1}),
    ],
)
def test_the_largest_tiles(
    tmp_path: Path, problem, channels, sides, stored, traits
) -> None:
    if isinstance(problem, ir.ConvProblem):
        problem = dataclasses.replace(problem, filter_layout="hwio")
    check(tmp_path, chain_of(problem, channels, sides, stored), traits)


@pytest.mark.parametrize("traits", [{"warpgroups": 3, "cluster": 2}, {"ahead": 1}])
def test_the_largest_tile_with_a_shortcut(
    tmp_path: Path, traits: dict[str, object]
) -> None:
    chain = chain_of(EXPAND, 128, (1, 0), stored=True)
    shortcut = ir.Region(problem=EXPAND, epilogue=norm_silu(0, "bf16"))
    merged = ir.Chain(first=shortcut, second=chain.made, stored=False, side=0)
    chain = dataclasses.replace(chain, first=merged)
    check(tmp_path, chain, traits)


def check(tmp_path: Path, chain: ir.Chain, traits: dict[str, object]) -> None:
    assert chain_sm90.supports(chain, HOPPER) is None
    config = largest(chain, **traits).config()
    source = codegen.chain_source(chain, chain_sm90, config, HOPPER)
    found = toolchain.find(options.current())
    compiler.compile(found, source, HOPPER, tmp_path)
    log = (tmp_path / compiler.LOG).read_text()
    # ptxas keeps a few words of some kernels on the stack, and no accumulator.
    (stored,) = re.findall(r"(\d+) bytes spill stores", log)
    assert int(stored) <= 12, log
    assert "C75" not in log, log
