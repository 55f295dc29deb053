# SPDX-License-Identifier: Apache-2.0
"""GEMM on mma.sync and cp.async: every architecture from sm_80 on, any alignment
of 4 bytes or more."""

from __future__ import annotations

from typing import Final

from .. import ir
from ..arch import GpuArch
from . import tiles
from .config import CPP_TYPES, Config, alignment, epilogue_limit
from .template import Elsewhere
from .tiles import Tile

name = "gemm_sm80"
header = "jax_bolt/gemm/sm80.hpp"
artifact: Final = "module"

_CANDIDATES = 3
_TILES = (
    Tile(256, 128, 32, 64, 64, 3, 1.0),
    Tile(128, 256, 32, 64, 64, 3, 1.0),
    Tile(128, 128, 64, 64, 64, 3, 0.97),
    Tile(128, 128, 32, 64, 64, 4, 0.95),
    Tile(128, 64, 64, 64, 32, 3, 0.8),
    Tile(64, 128, 64, 32, 64, 3, 0.8),
    Tile(64, 64, 64, 32, 32, 4, 0.6),
)


def supports(region: ir.Region, arch: GpuArch) -> str | None:
    problem = region.problem
    if not isinstance(problem, ir.GemmProblem):
        return Elsewhere("not a matrix product")
    if arch.sm < 80:
        return f"{arch.name} has no cp.async; sm_80 or later is needed"
    if problem.dtype not in ("bf16", "f16", "f32"):
        return f"no tensor-core path for {problem.dtype} operands"
    if min(problem.m, problem.n, problem.k, problem.batch) < 1:
        return "an empty dimension"
    if problem.batch > 65535:
        return f"batch {problem.batch} is above 65535"
    if too_many := epilogue_limit(region.epilogue):
        return too_many
    for operand, (extent, align) in zip("AB", _operands(problem), strict=True):
        if align * ir.ITEM_BYTES[problem.dtype] < 4:
            return (
                f"{operand}'s rows of {extent} {problem.dtype} are not a multiple of "
                "4 bytes, the least cp.async copies"
            )
    return None


def configs(region: ir.Region, arch: GpuArch) -> tuple[Config, ...]:
    return space(region, arch)[:_CANDIDATES]


def space(region: ir.Region, arch: GpuArch) -> tuple[Config, ...]:
    p = region.problem
    assert isinstance(p, ir.GemmProblem)
    fitting = [
        tile
        for tile in tiles.of_item(_TILES, ir.ITEM_BYTES[p.dtype])
        if tiles.fits(tile, p.dtype, region.epilogue, arch)
    ]
    fitting.sort(key=lambda t: tiles.cost(t, p.m, p.n, p.k, p.batch, arch.sm_count))
    return tuple(
        Config.of(name, tile=t.shape, warp=t.warp, stages=t.stages) for t in fitting
    )


def instantiate(region: ir.Region, config: Config, arch: GpuArch) -> str:
    del arch  # the same code for all
    p = region.problem
    assert isinstance(p, ir.GemmProblem)
    layout = {
        "row": "cutlass::layout::RowMajor",
        "col": "cutlass::layout::ColumnMajor",
    }
    (_, align_a), (_, align_b) = _operands(p)
    arguments = (
        "Epilogue",
        CPP_TYPES[p.dtype],
        layout[p.a_layout],
        layout[p.b_layout],
        align_a,
        align_b,
        store_alignment(region),
        *str(config["tile"]).split("x"),
        *str(config["warp"]).split("x"),
        config["stages"],
    )
    return f"jax_bolt::gemm::Sm80<{', '.join(map(str, arguments))}>"


def reasoning(region: ir.Region, config: Config, arch: GpuArch) -> str:
    """How its tiles fill the GPU."""
    p = region.problem
    assert isinstance(p, ir.GemmProblem)
    return tiles.reasoning(str(config["tile"]), p.m, p.n, p.batch, arch)


def micros(region: ir.Region, config: Config, arch: GpuArch) -> float:
    """What its tiles' products or device memory take, in µs."""
    p = region.problem
    assert isinstance(p, ir.GemmProblem)
    tile = tiles.named(_TILES, str(config["tile"]), ir.ITEM_BYTES[p.dtype])
    work = tiles.cost(tile, p.m, p.n, p.k, p.batch, arch.sm_count)
    return tiles.micros(work, region, arch)


def store_alignment(region: ir.Region) -> int:
    """Elements of the result one thread writes at once; 8 at most, even of one byte."""
    return min(8, alignment(region.problem.channels, region.epilogue.out_dtype))


def _operands(p: ir.GemmProblem) -> tuple[tuple[int, int], tuple[int, int]]:
    """A's and B's contiguous extents, and the alignments they allow."""
    a = p.k if p.a_layout == "row" else p.m
    b = p.n if p.b_layout == "row" else p.k
    return (a, alignment(a, p.dtype)), (b, alignment(b, p.dtype))
