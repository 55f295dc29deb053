# SPDX-License-Identifier: Apache-2.0
"""2-D conv fprop as an implicit GEMM on mma.sync: every architecture from sm_80 on."""

from __future__ import annotations

from typing import Final

from .. import ir
from ..arch import GpuArch
from . import tiles
from .config import CPP_TYPES, Config, alignment, epilogue_limit
from .gemm_sm80 import store_alignment
from .template import Elsewhere
from .tiles import Tile

name = "conv_sm80"
header = "jax_bolt/conv/sm80.hpp"
artifact: Final = "module"

_CANDIDATES = 4
_TILES = (
    Tile(256, 128, 64, 64, 64, 3, 1.0),
    Tile(128, 256, 64, 64, 64, 3, 1.0),
    Tile(128, 128, 64, 64, 64, 3, 0.95),
    Tile(128, 128, 32, 64, 64, 4, 0.93),
    Tile(256, 64, 64, 64, 32, 3, 0.88),
    Tile(256, 64, 32, 64, 64, 4, 0.85),
    Tile(128, 64, 64, 64, 32, 4, 0.8),
    Tile(128, 64, 32, 64, 32, 5, 0.77),
    Tile(64, 128, 64, 32, 64, 4, 0.78),
    Tile(64, 64, 64, 32, 32, 5, 0.62),
)
_MAX_ELEMENTS = 2**31 - 1 - 1024  # as conv/sm80.hpp


def supports(region: ir.Region, arch: GpuArch) -> str | None:
    p = region.problem
    if not isinstance(p, ir.ConvProblem):
        return Elsewhere("not a conv")
    if region.pool is not None:
        return Elsewhere("it does not pool")
    if p.groups > 1:
        return f"a conv of {p.groups} groups"
    if p.filter_layout != "krsc":
        return Elsewhere("the filter is not packed as K R S C")
    if arch.sm < 80:
        return f"{arch.name} has no cp.async; sm_80 or later is needed"
    if p.dtype not in ("bf16", "f16", "f32"):
        return f"no tensor-core path for {p.dtype} operands"
    if min(p.n, p.h, p.w, p.c, p.k, p.r, p.s, p.p, p.q) < 1:
        return "an empty dimension"
    if too_many := epilogue_limit(region.epilogue):
        return too_many
    if p.padding[0] < 0 or p.padding[2] < 0:
        return f"negative padding {p.padding}"
    if alignment(p.c, p.dtype) * ir.ITEM_BYTES[p.dtype] < 4:
        return (
            f"{p.c} input channels of {p.dtype} are not a multiple of 4 bytes, the "
            "least cp.async copies"
        )
    if max(p.r, p.s) > 32 and not _depths(p):
        return f"a {p.r}x{p.s} filter is above 32 taps wide"
    if max(p.h * p.w * p.c, p.p * p.q, p.k * p.r * p.s * p.c) > _MAX_ELEMENTS:
        return "one image or the filter has 2^31 elements or more"
    return None


def configs(region: ir.Region, arch: GpuArch) -> tuple[Config, ...]:
    return space(region, arch)[:_CANDIDATES]


def space(region: ir.Region, arch: GpuArch) -> tuple[Config, ...]:
    p = region.problem
    assert isinstance(p, ir.ConvProblem)
    found: list[tuple[float, Config]] = []
    for tile in tiles.of_item(_TILES, ir.ITEM_BYTES[p.dtype]):
        if not tiles.fits(tile, p.dtype, region.epilogue, arch):
            continue
        few = p.c if tile.k in _depths(p) else 0
        if few == 0 and max(p.r, p.s) > 32:
            continue
        config = Config.of(
            name, tile=tile.shape, warp=tile.warp, stages=tile.stages, few_channels=few
        )
        depth = _depth(p, tile.k, few)
        time = tiles.cost(tile, p.rows, p.k, depth, 1, arch.sm_count)
        found.append((time, config))
    found.sort(key=lambda pair: pair[0])
    return tuple(config for _, config in found)


def instantiate(region: ir.Region, config: Config, arch: GpuArch) -> str:
    del arch  # the same code for all
    p = region.problem
    assert isinstance(p, ir.ConvProblem)
    arguments = (
        "Epilogue",
        CPP_TYPES[p.dtype],
        alignment(p.c, p.dtype),
        store_alignment(region),
        config["few_channels"],
        *str(config["tile"]).split("x"),
        *str(config["warp"]).split("x"),
        config["stages"],
    )
    return f"jax_bolt::conv::Fprop80<{', '.join(map(str, arguments))}>"


def reasoning(region: ir.Region, config: Config, arch: GpuArch) -> str:
    """How its tiles fill the GPU."""
    p = region.problem
    return tiles.reasoning(str(config["tile"]), p.rows, p.channels, 1, arch)


def micros(region: ir.Region, config: Config, arch: GpuArch) -> float:
    """What its tiles' products or device memory take, in µs."""
    p = region.problem
    assert isinstance(p, ir.ConvProblem)
    tile = tiles.named(_TILES, str(config["tile"]), ir.ITEM_BYTES[p.dtype])
    depth = _depth(p, tile.k, int(config["few_channels"]))
    work = tiles.cost(tile, p.rows, p.k, depth, 1, arch.sm_count)
    return tiles.micros(work, region, arch)


def _depths(p: ir.ConvProblem) -> tuple[int, ...]:
    """Tile depths at which K should run densely over taps and channels: those that
    hold several whole taps."""
    item = ir.ITEM_BYTES[p.dtype]
    return tuple(k for k in (64 // item, 128 // item) if k > p.c and k % p.c == 0)


def _depth(p: ir.ConvProblem, tile_k: int, few: int) -> int:
    """The K a kernel runs, zeros included."""
    if few:
        return -(-p.r * p.s * p.c // tile_k) * tile_k
    return p.r * p.s * -(-p.c // tile_k) * tile_k
