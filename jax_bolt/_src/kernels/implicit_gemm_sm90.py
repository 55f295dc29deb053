# SPDX-License-Identifier: Apache-2.0
"""Convs and products on Hopper by one lean kernel: TMA boxes that all taps share,
wgmma with the operands swapped (``jax_bolt/implicit_gemm/sm90.hpp``).
"""

from __future__ import annotations

import collections
import functools

from .. import ir
from ..arch import GpuArch
from . import implicit_gemm_rank as rank
from . import recipe as recipes
from .config import CPP_TYPES, Config, epilogue_limit
from .geometry import MAX_PHASES, MAX_TAPS
from .image import BLOCK, STEP, Image, cols_of, rows_of
from .implicit_gemm_tiles import (
    NAME,
    Tile,
    blocks_of,
    grid,
    shared_bytes,
    slot_tiles_of,
    tiles_of,
)
from .recipe import Recipe
from .template import Artifact, Elsewhere

name = NAME
header = "jax_bolt/implicit_gemm/sm90.hpp"
artifact: Artifact = "cubin"

_CANDIDATES = 24
# Neighbours in size are near-ties: few of a kind, fewer yet among the first.
_FIRST, _OF_A_KIND_FIRST, _OF_A_KIND = 8, 3, 8
_MAX_EXTENT = 2**31 - 1 - 65536  # the kernel counts pixels and tiles in 32 bits


def supports(region: ir.Region, arch: GpuArch) -> str | None:
    """Why no config can run ``region`` on ``arch``, or None."""
    problem, epilogue = region.problem, region.epilogue
    if arch.sm != 90:
        return Elsewhere(f"needs sm_90a, not {arch.name}")
    if problem.dtype not in ("bf16", "f16", "f32"):
        return f"no tensor-core path for {problem.dtype} operands"
    for dtype in epilogue.tensors:
        if dtype not in ("bf16", "f16", "f32"):
            return f"takes no tensors of {dtype}"
    if too_many := epilogue_limit(epilogue):
        return too_many
    if isinstance(problem, ir.ConvProblem) and problem.groups > 1:
        outputs = problem.k // problem.groups
        if outputs % BLOCK:
            return f"groups of {outputs} output channels, not of a multiple of {BLOCK}"
        if problem.group_channels * ir.ITEM_BYTES[problem.dtype] % STEP:
            # What a product has beyond a group is the next one's, times zero.
            return f"groups of {problem.group_channels} input channels"
    if isinstance(problem, ir.GemmProblem) and problem.a_layout == "col":
        return "A is stored with M innermost"
    image = Image.of_region(region)
    if problem.dtype == "f32" and not image.k_outer:
        return "TF32 tensor cores take filters with their input channels innermost only"
    sizes = (image.n, image.h, image.w, image.c, image.k, image.p, image.q)
    if min(*sizes, region.stored_rows) < 1:
        return "an empty dimension"
    if min(image.r, image.s) < 1 or min(image.padding) < 0:
        return "an empty filter or negative padding"
    if region.pool is not None and (refused := _pool_limit(region, region.pool, image)):
        return refused
    narrowest = min(ir.ITEM_BYTES[dtype] for dtype in epilogue.tensors)
    if not image.k_outer:
        narrowest = min(narrowest, image.item)
    if image.pixel * image.item % 16 or image.k * narrowest % 16:
        return (
            f"{image.pixel} input or {image.k} output channels: TMA needs rows of a "
            "multiple of 16 bytes"
        )
    if image.r * image.s > MAX_TAPS:
        return f"a filter of {image.r}x{image.s}, more than {MAX_TAPS} taps"
    if len(rows_of(image)) * len(cols_of(image)) > MAX_PHASES or max(image.stride) > 8:
        return f"strides {image.stride}"
    if max(image.n, image.h * image.w, image.k, problem.rows) > _MAX_EXTENT:
        return f"an extent above {_MAX_EXTENT}"
    if next(tiles_of(image, region.epilogue, arch), None) is None:
        return "no tile fits shared memory"
    return None


def _pool_limit(region: ir.Region, pool: ir.Pool, image: Image) -> str | None:
    """Why the kernel cannot pool the region's result, or None."""
    r, s = pool.window
    if pool.is_mean:
        if blocks_of(image):
            return None
        return f"a mean of {r}x{s} results, more than one accumulator has"
    if r * s > ir.MAX_WINDOW:
        return f"a pool of {r}x{s}, more than {ir.MAX_WINDOW} results"
    if region.epilogue.sides:
        return "a pool after side inputs"
    if region.epilogue.out_dtype not in ("bf16", "f16"):
        return f"a pool of {region.epilogue.out_dtype}"
    return None


@functools.lru_cache(maxsize=1024)  # every site of every trace asks
def configs(region: ir.Region, arch: GpuArch) -> tuple[Config, ...]:
    """The tiles with the least estimated time, best first."""
    found = _ranked(region, arch)
    first = varied(found, _FIRST, _OF_A_KIND_FIRST)
    rest = [tile for tile in found if tile not in first]
    more = varied(rest, _CANDIDATES - len(first), _OF_A_KIND)
    return tuple(tile.config() for tile in (*first, *more))


@functools.lru_cache(maxsize=256)
def space(region: ir.Region, arch: GpuArch) -> tuple[Config, ...]:
    """All tiles, best first."""
    return tuple(tile.config() for tile in _ranked(region, arch))


def _ranked(region: ir.Region, arch: GpuArch) -> list[Tile]:
    image = Image.of_region(region)
    return sorted(
        tiles_of(image, region.epilogue, arch),
        key=lambda tile: rank.cycles(tile, image, region, arch),
    )


def varied(tiles: list[Tile], count: int, of_a_kind: int) -> list[Tile]:
    """The first ``count`` of which at most ``of_a_kind`` differ in size alone."""
    kinds: collections.Counter[tuple[object, ...]] = collections.Counter()
    chosen: list[Tile] = []
    for tile in tiles:
        kind = (
            *(tile.blocks, tile.channel_blocks, tile.warps_m, tile.warps_n),
            *(tile.schedule, tile.rings.resident, tile.im2col, tile.parts > 1),
        )
        kinds[kind] += 1
        if kinds[kind] <= of_a_kind and len(chosen) < count:
            chosen.append(tile)
    return chosen


def instantiate(region: ir.Region, config: Config, arch: GpuArch) -> str:
    """The C++ type that ``JAX_BOLT_DEVICE_KERNEL`` takes."""
    del arch  # only sm_90a is supported
    tile = Tile.of(config)
    scope = "jax_bolt::implicit_gemm"
    image = Image.of_region(region)
    schedule = {"cooperative": "kCooperative", "pingpong": "kPingPong"}[tile.schedule]
    arguments = (
        "Epilogue",
        CPP_TYPES[region.problem.dtype],
        f"{scope}::Filters::{'kKrsc' if image.k_outer else 'kHwio'}",
        *(tile.pixels, tile.blocks, tile.channel_blocks, tile.warps_m, tile.warps_n),
        f"{scope}::Schedule::{schedule}",
        *(tile.splits, tile.parts),
        *(image.k_steps, image.k_steps if tile.zeros else image.last_steps),
    )
    if region.pool is not None:
        sizes = ", ".join(map(str, (*region.pool.window, *region.pool.stride)))
        # A mean's are those of the image, which the kernel is told.
        pool = "MeanPool" if region.pool.is_mean else f"MaxPool<{sizes}>"
        arguments += (f"{scope}::{pool}",)
    return f"{scope}::Sm90<{', '.join(map(str, arguments))}>"


def reasoning(region: ir.Region, config: Config, arch: GpuArch) -> str:
    """What the rank model expects of it."""
    image = Image.of_region(region)
    return rank.estimate(Tile.of(config), image, region, arch).text


def micros(region: ir.Region, config: Config, arch: GpuArch) -> float:
    """What the rank model expects of it, in µs, and what its prologue moves."""
    image = Image.of_region(region)
    packed = image.packing.workspace_bytes if image.packing else 0
    own = rank.estimate(Tile.of(config), image, region, arch).micros
    return own + 2 * packed / arch.bandwidth * 1e6  # written, and read again


def prologue(region: ir.Region) -> str | None:
    """The C++ type that ``JAX_BOLT_PROLOGUE`` takes, for images of few channels."""
    packing = Image.of_region(region).packing
    return None if packing is None else packing.instance


def recipe(
    region: ir.Region, config: Config, arch: GpuArch, *, held: bool = False
) -> Recipe:
    """How to launch it: grid, shared memory, tensor maps, the kernel's Geometry."""
    tile, image = Tile.of(config), Image.of_region(region)
    layout = tile.layout(image)
    epilogue = region.epilogue
    vectors = tuple(map(recipes.vector, range(len(epilogue.vectors))))
    return Recipe(
        threads=128 * (tile.warpgroups + 1),
        grid=grid(tile, image, arch),
        cluster=tile.splits,
        smem_bytes=shared_bytes(tile, layout, slot_tiles_of(epilogue)),
        programmatic=True,
        maps=layout.maps(tile.filter_blocks, epilogue),
        pointers=vectors or (recipes.NULL,),
        ints=layout.integers(tile.filter_blocks, tile.rings, held=held),
        workspace_bytes=image.packing.workspace_bytes if image.packing else 0,
        prologue=image.packing.recipe() if image.packing else None,
    )
