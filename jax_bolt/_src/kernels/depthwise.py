# SPDX-License-Identifier: Apache-2.0
"""Depthwise convs, directly, in float32: every architecture from sm_80 on
(``jax_bolt/depthwise/depthwise.hpp``)."""

from __future__ import annotations

import dataclasses
import functools

from .. import ir
from ..arch import GpuArch
from . import recipe as recipes
from .config import CPP_TYPES, Config, epilogue_limit
from .depthwise_rank import estimate
from .depthwise_tiles import NAME, Shape, Tile, tiles_of
from .recipe import Recipe
from .template import Artifact, Elsewhere

name = NAME
header = "jax_bolt/depthwise/depthwise.hpp"
artifact: Artifact = "cubin"

_CANDIDATES = 16
_OF_A_KIND = 2  # with the same threads, in blocks of different numbers of channels
_MAX_EXTENT = 2**20  # the kernel counts bytes of a few pixels in 32 bits


def supports(region: ir.Region, arch: GpuArch) -> str | None:
    """Why no config can run ``region`` on ``arch``, or None."""
    p = region.problem
    if not isinstance(p, ir.ConvProblem) or p.groups == 1:
        return Elsewhere("not a depthwise conv")
    if region.pool is not None:
        return Elsewhere("it does not pool")
    if not p.is_depthwise:
        return f"groups of {p.group_channels} input channels, not of one"
    if p.filter_layout != "hwio":
        return Elsewhere("the filter's output channels are not innermost")
    if arch.sm < 80:
        return f"{arch.name} has no cp.async; sm_80 or later is needed"
    if p.dtype not in ("bf16", "f16", "f32"):
        return f"takes no operands of {p.dtype}"
    if too_many := epilogue_limit(region.epilogue):
        return too_many
    if min(p.n, p.h, p.w, p.c, p.k, p.r, p.s, p.p, p.q) < 1:
        return "an empty dimension"
    if min(p.padding[0], p.padding[2]) < 0:
        return f"negative padding {p.padding}"
    if max(p.h, p.w, p.k, *p.padding) > _MAX_EXTENT:
        return f"an extent above {_MAX_EXTENT}"
    if next(tiles_of(region, arch), None) is None:
        return f"no tile of a {p.r}x{p.s} filter fits registers and shared memory"
    return None


@functools.lru_cache(maxsize=1024)  # every site of every trace asks
def configs(region: ir.Region, arch: GpuArch) -> tuple[Config, ...]:
    """The tiles with the least estimated time, best first, few of a kind.

    The first that is spread is also there as it is not: what spreading gains depends on
    the kernels around, and no other kernel has to be built to time it.
    """
    kinds: dict[tuple[int, int, int], list[Tile]] = {}
    chosen: list[Tile] = []
    for tile in _ranked(region, arch):
        alike = kinds.setdefault((tile.width, tile.outputs, tile.whole), [])
        if len(alike) < _OF_A_KIND and tile.lanes not in (t.lanes for t in alike):
            alike.append(tile)
            if tile.spread and not any(t.spread for t in chosen):
                chosen += [tile, dataclasses.replace(tile, spread=0)]
            else:
                chosen.append(tile)
    return tuple(tile.config() for tile in chosen[:_CANDIDATES])


def space(region: ir.Region, arch: GpuArch) -> tuple[Config, ...]:
    """All tiles, best first."""
    return tuple(tile.config() for tile in _ranked(region, arch))


def _ranked(region: ir.Region, arch: GpuArch) -> list[Tile]:
    """Of equals those that are spread come first: registers may leave room for more
    blocks than the model counts with."""

    def key(tile: Tile) -> tuple[float, int]:
        return estimate(tile, region, arch).total, -tile.spread

    return sorted(tiles_of(region, arch), key=key)


def instantiate(region: ir.Region, config: Config, arch: GpuArch) -> str:
    """The C++ type that ``JAX_BOLT_DEVICE_KERNEL`` takes."""
    tile = Tile.of(config)
    shape = Shape(tile, region)
    p = shape.problem
    arguments = (
        "Epilogue",
        CPP_TYPES[p.dtype],
        *(p.r, p.s, *p.stride, *p.dilation),
        *(tile.width, tile.outputs, tile.lanes, tile.strips, *shape.inside),
        *(tile.stages, shape.pitch, shape.piece, shape.tap_piece),
        "true" if tile.whole == 2 else "false",
        "true" if shape.resident else "false",
        shape.ctas(arch),
    )
    return f"jax_bolt::depthwise::Depthwise<{', '.join(map(str, arguments))}>"


def reasoning(region: ir.Region, config: Config, arch: GpuArch) -> str:
    """What the rank model expects of it."""
    return estimate(Tile.of(config), region, arch).text


def micros(region: ir.Region, config: Config, arch: GpuArch) -> float:
    """What the rank model expects of it, in µs."""
    return estimate(Tile.of(config), region, arch).micros


def prologue(region: ir.Region) -> str | None:
    """None: operands are taken as they lie."""
    del region


def recipe(
    region: ir.Region, config: Config, arch: GpuArch, *, held: bool = False
) -> Recipe:
    """How to launch it: the grid, shared memory, and the kernel's Sizes."""
    del held  # it waits before it reads anything
    tile = Tile.of(config)
    shape = Shape(tile, region)
    p, epilogue = shape.problem, region.epilogue
    sides = tuple(map(recipes.side, range(len(epilogue.sides))))
    vectors = tuple(map(recipes.vector, range(len(epilogue.vectors))))
    auxiliary = tuple(recipes.output(1 + i) for i in range(len(epilogue.auxiliary)))
    bases = shape.multiplier, shape.chunks, shape.col_tiles, shape.channel_tiles
    return Recipe(
        threads=tile.threads,
        grid=shape.grid,
        smem_bytes=shape.launch_bytes(arch),
        programmatic=arch.sm >= 90,
        pointers=(
            *(recipes.A, recipes.B, recipes.D),
            *(sides or (recipes.NULL,)),
            *(vectors or (recipes.NULL,)),
            *(auxiliary or (recipes.NULL,)),
        ),
        ints=(
            *(p.h, p.w, p.c, shape.multiplier, p.p, p.q, p.padding[0], p.padding[2]),
            *(tile.rows, shape.chunks, shape.col_tiles, shape.channel_tiles),
            *(_inverse(base, shape.grid) for base in bases),
        ),
    )


def _inverse(base: int, numbers: int) -> int:
    """2**32 / base, rounded up, as a signed int: the upper 32 bits of its product with
    a number are the quotient. 0 where that is not so for all below ``numbers``, or for
    a base of 1."""
    if base == 1 or base * numbers > 2**32:
        return 0
    inverse = -(-(2**32) // base)
    return inverse - 2**32 if inverse >= 2**31 else inverse
