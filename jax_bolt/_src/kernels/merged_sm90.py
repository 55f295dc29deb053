# SPDX-License-Identifier: Apache-2.0
"""A shortcut's product and the one it is added to on Hopper, in one kernel
(``jax_bolt/chain/merged_sm90.hpp``).

To the launcher it is a call like any other: its operands are the first region's A and
B, then as side inputs the second one's, then the vectors of both.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

from .. import ir
from ..arch import GpuArch
from . import hoist
from . import implicit_gemm_rank as rank
from . import recipe as recipes
from .chain_support import refusal
from .chain_tiles import flat, lines_of
from .config import CPP_TYPES, Config
from .geometry import MAX_RINGS, Rings
from .image import Image
from .implicit_gemm_sm90 import varied
from .implicit_gemm_tiles import (
    FILTER_BLOCK,
    Tile,
    accumulators,
    grid,
    shared_bytes,
    smem_per_cta,
    tiles_of,
)
from .recipe import Recipe
from .template import Artifact, Elsewhere

name = "merged_sm90"
header = "jax_bolt/chain/merged_sm90.hpp"
artifact: Artifact = "cubin"

_CANDIDATES = 12
_LEAST = 3  # stages of pixels and of filters


def supports(chain: ir.Chain, arch: GpuArch) -> str | None:
    """Why no config can run ``chain`` on ``arch``, or None."""
    if chain.side is None:
        return Elsewhere("the second region multiplies the first one's result")
    first, second = chain.made.epilogue, chain.second.epilogue
    if chain.stored:
        return "the result between is needed elsewhere"
    if first.sides or len(second.sides) != 1:
        return "side inputs besides the result between"
    if reason := refusal(chain, arch):
        return reason
    lines = lines_of(chain)
    if lines is None:
        return "a product that is not one over a line of pixels"
    if lines[0].k_outer != lines[1].k_outer:
        return "filters of two layouts"
    if next(_tiles(chain, arch), None) is None:
        return "no tile fits shared memory"
    return None


@functools.lru_cache(maxsize=256)
def configs(chain: ir.Chain, arch: GpuArch) -> tuple[Config, ...]:
    """The tiles with the least estimated time, best first."""
    return _named(varied(_ranked(chain, arch), _CANDIDATES, 3))


@functools.lru_cache(maxsize=256)
def space(chain: ir.Chain, arch: GpuArch) -> tuple[Config, ...]:
    """All tiles, best first."""
    return _named(_ranked(chain, arch))


def _ranked(chain: ir.Chain, arch: GpuArch) -> list[Tile]:
    image, region = _as_one(chain)
    return sorted(
        _tiles(chain, arch), key=lambda tile: rank.cycles(tile, image, region, arch)
    )


def _named(tiles: list[Tile]) -> tuple[Config, ...]:
    return tuple(Config(name, tile.config().params) for tile in tiles)


def instantiate(chain: ir.Chain, config: Config, arch: GpuArch) -> str:
    """The C++ type that ``JAX_BOLT_DEVICE_KERNEL`` takes."""
    del arch  # only sm_90a is supported
    tile, scope = Tile.of(config), "jax_bolt::implicit_gemm"
    first, image = (Image.of(flat(r.problem)) for r in chain.regions)
    schedule = {"cooperative": "kCooperative", "pingpong": "kPingPong"}[tile.schedule]
    arguments = (
        *("First", "Second", CPP_TYPES[image.dtype]),
        f"{scope}::Filters::{'kKrsc' if image.k_outer else 'kHwio'}",
        *(tile.pixels, tile.blocks, tile.channel_blocks, tile.warps_m, tile.warps_n),
        f"{scope}::Schedule::{schedule}",
        max(first.last_steps, image.last_steps),
    )
    return f"jax_bolt::chain::MergedSm90<{', '.join(map(str, arguments))}>"


def reasoning(chain: ir.Chain, config: Config, arch: GpuArch) -> str:
    """What the rank model expects of it."""
    image, region = _as_one(chain)
    return rank.estimate(Tile.of(config), image, region, arch).text


def micros(chain: ir.Chain, config: Config, arch: GpuArch) -> float:
    """What the rank model expects of it, in µs."""
    image, region = _as_one(chain)
    return rank.estimate(Tile.of(config), image, region, arch).micros


def prologue(chain: ir.Chain) -> str | None:
    """None: no operand is packed first."""
    del chain
    return None


def recipe(
    chain: ir.Chain, config: Config, arch: GpuArch, *, held: bool = False
) -> Recipe:
    """How to launch it: grid, shared memory, tensor maps, the kernel's Geometries."""
    tile, lines = Tile.of(config), lines_of(chain)
    assert lines is not None
    layouts = [tile.layout(line) for line in lines]
    counts = [len(r.epilogue.vectors) for r in chain.regions]
    vectors = [recipes.vector(i) for i in range(sum(counts))]
    first, second = (
        layout.maps(tile.filter_blocks, region.epilogue)
        for layout, region in zip(layouts, chain.regions, strict=True)
    )
    moved = (dataclasses.replace(second[i], operand=recipes.side(i)) for i in (0, 1))
    return Recipe(
        threads=128 * (tile.warpgroups + 1),
        grid=grid(tile, lines[1], arch),
        smem_bytes=shared_bytes(tile, layouts[1], 1),
        programmatic=True,
        maps=(*first[:2], *moved, second[2]),
        pointers=(
            *(vectors[: counts[0]] or (recipes.NULL,)),
            *(vectors[counts[0] :] or (recipes.NULL,)),
        ),
        ints=tuple(
            n
            for layout in layouts
            for n in layout.integers(tile.filter_blocks, tile.rings, held=held)
        ),
    )


def _as_one(chain: ir.Chain) -> tuple[Image, ir.Region]:
    """One product that does about the work of both."""
    lines = lines_of(chain)
    assert lines is not None
    k = sum(line.chunks * line.chunk for line in lines)
    problem = ir.GemmProblem(m=lines[1].q, n=lines[1].k, k=k, dtype=lines[1].dtype)
    # The shortcut is never loaded: it lies beside the accumulators.
    epilogue = chain.second.epilogue
    ops = tuple(ir.Op("acc") if op.name == "side" else op for op in epilogue.ops)
    epilogue = dataclasses.replace(epilogue, ops=ops, sides=())
    return Image.of(problem), ir.Region(problem=problem, epilogue=epilogue)


def _tiles(chain: ir.Chain, arch: GpuArch) -> Iterator[Tile]:
    lines = lines_of(chain)
    assert lines is not None
    epilogues = chain.made.epilogue, chain.second.epilogue
    columns = sum(len(hoist.columns(epilogue)) for epilogue in epilogues)
    for tile in tiles_of(lines[1], chain.second.epilogue, arch):
        if tile.splits > 1 or tile.parts > 1 or tile.rings.resident:
            continue
        shape = tile.blocks, tile.channel_blocks, tile.warps_m, tile.warps_n
        used = tile.blocks * tile.channel_blocks * tile.pixels // 2
        if used > accumulators((*shape, tile.schedule), columns):
            continue
        staged = _staged(tile, lines[1], arch)
        if staged is not None:
            yield staged


def _staged(tile: Tile, line: Image, arch: GpuArch) -> Tile | None:
    """``tile`` with a slot for every block of a warpgroup, better two, or None."""
    layout = tile.layout(line)
    units = tile.blocks * tile.channel_blocks
    room = smem_per_cta(tile.ctas, arch)
    for stores in (2 * units, units):
        if stores > MAX_RINGS[2]:
            continue
        fixed = dataclasses.replace(tile, rings=Rings(0, 0, stores))
        left = room - shared_bytes(fixed, layout, 1)
        step = layout.stage_bytes + FILTER_BLOCK * tile.filter_blocks
        stages = min(left // step, MAX_RINGS[0])
        if stages >= _LEAST:
            return dataclasses.replace(tile, rings=Rings(stages, stages, stores))
    return None
