# SPDX-License-Identifier: Apache-2.0
"""Two regions back to back on Hopper, in one kernel (``jax_bolt/chain/sm90.hpp``), of
which the first may be merged with a shortcut's.

To the launcher a chain is a call like any other. Its operands are the first region's A
and B, then as side inputs the second one's B and what side inputs there are, then the
vectors of both. With a shortcut, that region's A and B come first, and the others'
operands are side inputs. Its result is the first region's where that is stored, and the
second one's is then the auxiliary output.
"""

from __future__ import annotations

import dataclasses
import functools

from .. import ir
from ..arch import GpuArch
from . import chain_rank as rank
from . import recipe as recipes
from .chain_support import refusal
from .chain_tiles import (
    NAME,
    Tile,
    grid,
    lines_of,
    shape_of,
    shared_bytes,
    tiles_of,
)
from .config import CPP_TYPES, Config
from .maps import filters_map
from .recipe import Recipe, TensorMap
from .template import Artifact, Elsewhere

name = NAME
header = "jax_bolt/chain/sm90.hpp"
artifact: Artifact = "cubin"

_CANDIDATES = 12
_NEAR = 32  # pixels


def supports(chain: ir.Chain, arch: GpuArch) -> str | None:
    """Why no config can run ``chain`` on ``arch``, or None."""
    if chain.side is not None:
        return Elsewhere("the second region adds the first one's result")
    if reason := refusal(chain, arch):
        return reason
    if isinstance(chain.first, ir.Chain):
        reason = _unmerged(chain.first, chain.second)
    else:
        sides = sum(len(region.epilogue.sides) for region in chain.regions)
        reason = f"{sides} side inputs, more than 1" if sides > 1 else None
    if reason:
        return reason
    if next(tiles_of(chain, arch), None) is None:
        return "no tile of all channels fits registers and shared memory"
    return None


def _unmerged(merged: ir.Chain, second: ir.Region) -> str | None:
    """Why the kernel does not take that pair ahead of ``second``, or None."""
    shortcut, first = merged.regions
    sides = (len(region.epilogue.sides) for region in (shortcut, first, second))
    if tuple(sides) != (0, 1, 0):
        return "side inputs besides the shortcut"
    lines = lines_of(merged)
    if lines is None:
        return "a product that is not one over a line of pixels"
    if lines[0].k_outer != lines[1].k_outer:
        return "filters of two layouts"
    return None


@functools.lru_cache(maxsize=256)
def configs(chain: ir.Chain, arch: GpuArch) -> tuple[Config, ...]:
    """The tiles with the least estimated time, best first; after the best of all come
    those of two warpgroups or one, of three, in clusters, ahead, and of both these."""
    # Neighbours in size are near-ties: one of a kind.
    kinds: dict[tuple[object, ...], Tile] = {}
    for tile in _ranked(chain, arch):
        sizes = tile.pixels // _NEAR, tile.group, tile.warpgroups
        flags = tile.rings.resident, tile.im2col, tile.cluster, tile.ahead
        kinds.setdefault((*sizes, *flags), tile)
    found = [*kinds.values()]
    # It was fitted to kernels of the first kind.
    heads: dict[tuple[bool, bool, bool], Tile] = {}
    for tile in found:
        shares, ahead = tile.cluster > 1, bool(tile.ahead)
        many = tile.warpgroups > 2 and not (shares or ahead)
        heads.setdefault((many, shares, ahead), tile)
    ordered = dict.fromkeys((*found[:1], *heads.values(), *found))
    return tuple(tile.config() for tile in [*ordered][:_CANDIDATES])


@functools.lru_cache(maxsize=256)
def space(chain: ir.Chain, arch: GpuArch) -> tuple[Config, ...]:
    """All tiles, best first."""
    return tuple(tile.config() for tile in _ranked(chain, arch))


def _ranked(chain: ir.Chain, arch: GpuArch) -> list[Tile]:
    shape = shape_of(chain)
    return sorted(
        tiles_of(chain, arch),
        key=lambda tile: rank.estimate(tile, chain, shape, arch).total,
    )


def instantiate(chain: ir.Chain, config: Config, arch: GpuArch) -> str:
    """The C++ type that ``JAX_BOLT_DEVICE_KERNEL`` takes."""
    del arch  # only sm_90a is supported
    tile, shape = Tile.of(config), shape_of(chain)

    def filters(k_outer: bool) -> str:
        return f"jax_bolt::implicit_gemm::Filters::{'kKrsc' if k_outer else 'kHwio'}"

    arguments = (
        *("First", "Second", CPP_TYPES[shape.image.dtype]),
        *(filters(shape.image.k_outer), filters(shape.k_outer)),
        "true" if chain.stored else "false",
        *(tile.pixels, tile.group, shape.outputs, tile.warpgroups),
        *(shape.steps, shape.second_steps, tile.cluster),
        *("true" if flag else "false" for flag in (tile.ahead, tile.rings.resident)),
        *(() if shape.shortcut is None else ("Shortcut",)),
    )
    return f"jax_bolt::chain::Sm90<{', '.join(map(str, arguments))}>"


def reasoning(chain: ir.Chain, config: Config, arch: GpuArch) -> str:
    """What the rank model expects of it."""
    return rank.estimate(Tile.of(config), chain, shape_of(chain), arch).text


def micros(chain: ir.Chain, config: Config, arch: GpuArch) -> float:
    """What the rank model expects of it, in µs, and what its prologue moves."""
    shape = shape_of(chain)
    packing = shape.image.packing
    packed = packing.workspace_bytes if packing else 0
    own = rank.estimate(Tile.of(config), chain, shape, arch).micros
    return own + 2 * packed / arch.bandwidth * 1e6  # written, and read again


def prologue(chain: ir.Chain) -> str | None:
    """The C++ type that ``JAX_BOLT_PROLOGUE`` takes, for images of few channels."""
    packing = shape_of(chain).image.packing
    return None if packing is None else packing.instance


def recipe(
    chain: ir.Chain, config: Config, arch: GpuArch, *, held: bool = False
) -> Recipe:
    """How to launch it: grid, shared memory, tensor maps, the kernel's Geometry."""
    tile, shape = Tile.of(config), shape_of(chain)
    layout, packing = tile.layout(shape.image), shape.image.packing
    counts = [len(region.epilogue.vectors) for region in chain.regions]
    numbers = iter(range(sum(counts)))
    vectors = [[recipes.vector(next(numbers)) for _ in range(n)] for n in counts]
    *shortcuts, first, second = (group or [recipes.NULL] for group in vectors)
    ints = layout.integers(shape.blocks, tile.rings, held=held)
    others: tuple[int, ...] = ()
    if shape.shortcut is not None:
        seen = tile.layout(shape.shortcut)
        others = seen.integers(shape.blocks, tile.rings, held=held)
    return Recipe(
        threads=128 * (tile.warpgroups + 1),
        grid=grid(tile, shape, arch),
        cluster=tile.cluster,
        smem_bytes=shared_bytes(tile, layout, chain),
        programmatic=True,
        maps=_maps(chain, tile),
        pointers=(*first, *second, *(v for group in shortcuts for v in group)),
        ints=(*ints, shape.blocks, shape.channels, *others),
        workspace_bytes=packing.workspace_bytes if packing else 0,
        prologue=packing.recipe() if packing else None,
    )


def _maps(chain: ir.Chain, tile: Tile) -> tuple[TensorMap, ...]:
    """In the order of the kernel's Params; what is not there is some other map."""
    shape, merged = shape_of(chain), chain.first
    layout = tile.layout(shape.image)
    first, second = chain.made.epilogue, chain.second.epilogue
    pixels, filters, *_ = layout.maps(1, first)
    behind = 0  # operands of the first product that are side inputs
    if isinstance(merged, ir.Chain):
        behind = 2
        pixels = dataclasses.replace(pixels, operand=recipes.side(0))
        filters = dataclasses.replace(filters, operand=recipes.side(1))
    second_filters = filters_map(
        recipes.side(behind),
        recipes.DTYPES.index(shape.image.dtype),
        taps=1,
        inputs=shape.image.k,
        outputs=shape.channels,
        k_outer=shape.k_outer,
    )
    filters = _part(filters, shape.image.k_outer, tile)
    second_filters = _part(second_filters, shape.k_outer, tile)
    last = recipes.output(int(chain.stored))
    output = layout.tensor(last, second.out_dtype, shape.channels)
    between = output
    if chain.stored:
        between = layout.tensor(recipes.output(0), first.out_dtype)
    if isinstance(merged, ir.Chain):
        assert shape.shortcut is not None
        seen = tile.layout(shape.shortcut)
        shortcut, *_ = merged.regions
        read, weights, *_ = seen.maps(1, shortcut.epilogue)
        own = read, _part(weights, shape.shortcut.k_outer, tile)
        return (pixels, filters, second_filters, between, output, *own)
    # The second one's side inputs follow the first one's; here there is one at most.
    sides = [output, output]
    channels = shape.image.k, shape.channels
    for i, epilogue in enumerate((first, second)):
        for dtype in epilogue.sides:
            sides[i] = layout.tensor(recipes.side(1), dtype, channels[i])
    return (pixels, filters, second_filters, between, output, *sides)


def _part(filters: TensorMap, k_outer: bool, tile: Tile) -> TensorMap:
    """A map of what one CTA of a cluster loads of a unit: some of its rows."""
    box = list(filters.box)
    box[2 if k_outer else 1] //= tile.cluster
    return dataclasses.replace(filters, box=tuple(box))
