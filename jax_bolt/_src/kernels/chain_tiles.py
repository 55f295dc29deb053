# SPDX-License-Identifier: Apache-2.0
"""The tiles of the Hopper chain: two products back to back in one kernel.

A tile is a block of the first product's pixels with all channels, a warpgroup's alone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

from .. import ir
from ..arch import GpuArch
from . import hoist
from .config import Config
from .geometry import MAX_PHASES, NO_RINGS, Block, Layout, Rings
from .image import BLOCK, ROW, STEP, Image, line_of
from .implicit_gemm_tiles import blocks_of, layout_of, smem_per_cta

NAME = "chain_sm90"

UNIT = BLOCK * ROW  # bytes of 64 output channels' filter for 64 input channels
# Stages that jax_bolt/chain/sm90.hpp has barriers for: pixels, filters, slots.
MAX_RINGS = (16, 32, 8)
WARPGROUPS = 3  # that multiply, at most
_BARRIERS = 2 * (MAX_RINGS[1] + WARPGROUPS * (MAX_RINGS[0] + MAX_RINGS[2])) * 8
_CLUSTER = 2  # CTAs that load filters for each other
_ENOUGH = 4  # slots of a warpgroup
_IM2COL = "im2col-"  # in a config's text


@dataclasses.dataclass(frozen=True)  # no slots: the properties are kept
class Shape:
    """What a chain is to the kernel.

    ``image`` is the first product's, ``blocks`` and ``outputs`` are 64 channels each
    of its result and of the second one's, ``channels``. ``k_outer``: the second filter
    has its output channels outermost. With a ``shortcut``, a product that is merged
    into the first one, both are ones over the same line of pixels.
    """

    image: Image
    blocks: int
    outputs: int
    channels: int
    k_outer: bool
    shortcut: Image | None = None

    @staticmethod
    def of(chain: ir.Chain) -> Shape:
        made, read = flat(chain.made.problem), flat(chain.second.problem)
        assert isinstance(read, ir.GemmProblem)
        image, shortcut = Image.of(made), None
        if isinstance(chain.first, ir.Chain):
            lines = lines_of(chain.first)
            assert lines is not None
            shortcut, image = lines
        return Shape(
            image=image,
            blocks=-(-made.channels // BLOCK),
            outputs=-(-read.n // BLOCK),
            channels=read.n,
            k_outer=read.b_layout == "col",
            shortcut=shortcut,
        )

    @property
    def products(self) -> tuple[Image, ...]:
        """Those that make what is between: the shortcut's, where there is one, and the
        first one's."""
        return (self.image,) if self.shortcut is None else (self.shortcut, self.image)

    @property
    def steps(self) -> int:
        """Products in a chunk of the first one's channels, and of the shortcut's."""
        return self.image.k_steps if self.shortcut is None else ROW // STEP

    @functools.cached_property
    def second_steps(self) -> int:
        """Products in a chunk of the channels between, but for those of zeros alone."""
        return -(-min(ROW, self.image.k * self.image.item) // STEP)


def flat(problem: ir.Problem) -> ir.Problem:
    """A conv that is a product over its pixels, as that."""
    if isinstance(problem, ir.GemmProblem) or not problem.is_gemm:
        return problem
    return ir.GemmProblem(
        m=problem.rows,
        n=problem.k,
        k=problem.c,
        dtype=problem.dtype,
        b_layout="row" if problem.filter_layout == "hwio" else "col",
    )


def lines_of(merged: ir.Chain) -> tuple[Image, Image] | None:
    """A shortcut's product and the one it is added to as ones over the same line of
    pixels, or None."""
    found: list[Image] = []
    for region in merged.regions:
        image = Image.of(flat(region.problem))
        line = image if image.is_line else line_of(image)
        if line is None or line.r * line.s != 1 or line.packing is not None:
            return None
        found.append(line)
    shortcut, first = found
    return (shortcut, first) if shortcut.q == first.q else None


shape_of = functools.lru_cache(maxsize=256)(Shape.of)


@dataclasses.dataclass(frozen=True, slots=True)
class Tile:
    """One candidate: the kernel's template arguments, block of outputs and rings.

    ``group`` blocks of the first result are accumulated side by side. The rings'
    ``filters`` are units, the others a warpgroup's. With ``im2col`` the block is one of
    ``line_of`` the image. ``cluster`` CTAs load filters for each other. With ``ahead``
    (1 or 0) a block's first products go on during the epilogue of the one before.
    """

    pixels: int
    group: int
    warpgroups: int
    block: Block
    rings: Rings = NO_RINGS
    im2col: bool = False
    cluster: int = 1
    ahead: int = 0

    @property
    def ctas(self) -> int:
        """CTAs that share an SM."""
        return 2 if self.warpgroups == 1 else 1

    def layout(self, image: Image) -> Layout:
        seen = line_of(image) if self.im2col else image
        assert seen is not None
        return layout_of(seen, self.block, 1, self.pixels)

    def config(self) -> Config:
        b, rings = self.block, self.rings
        return Config.of(
            NAME,
            pixels=self.pixels,
            group=self.group,
            warpgroups=self.warpgroups,
            resident=rings.resident,
            block=f"{_IM2COL * self.im2col}{b.images}x{b.rows}x{b.cols}",
            stages=f"{rings.pixels}x{rings.filters}x{rings.stores}",
            **({"cluster": self.cluster} if self.cluster > 1 else {}),
            **({"ahead": self.ahead} if self.ahead else {}),
        )

    @staticmethod
    def of(config: Config) -> Tile:
        block = str(config["block"])
        images, rows, cols = map(int, block.removeprefix(_IM2COL).split("x"))
        stages = map(int, str(config["stages"]).split("x"))
        return Tile(
            pixels=int(config["pixels"]),
            group=int(config["group"]),
            warpgroups=int(config["warpgroups"]),
            block=Block(images, rows, cols),
            rings=Rings(*stages, resident=int(config["resident"])),
            im2col=block.startswith(_IM2COL),
            cluster=int(dict(config.params).get("cluster", 1)),
            ahead=int(dict(config.params).get("ahead", 0)),
        )


# Candidates -------------------------------------------------------------------------


def tiles_of(chain: ir.Chain, arch: GpuArch) -> Iterator[Tile]:
    shape = shape_of(chain)
    image = shape.image
    found = [(False, *block) for block in blocks_of(image)]
    line = line_of(image)
    if line is not None and image.r * image.s <= MAX_PHASES:
        found += [(True, *block) for block in blocks_of(line)]
    for im2col, block, pixels in found:
        for warpgroups in range(WARPGROUPS, 0, -1):
            for group, ahead in _groups(shape):
                firsts = 2 * len(shape.products) if ahead else group
                accumulators = (firsts + shape.outputs) * pixels // 2
                results = 0 if shape.shortcut is None else group * pixels // 4
                if not _fit(chain, warpgroups, accumulators, results):
                    continue
                base = Tile(pixels, group, warpgroups, block, im2col=im2col)
                base = dataclasses.replace(base, ahead=ahead)
                if base.layout(image).problem() is not None:
                    continue
                yield from _rings(base, chain, arch)


def _groups(shape: Shape) -> Iterator[tuple[int, int]]:
    """Sizes of groups, and whether the next one's products are given out ahead."""
    for group in range(1, min(4, shape.blocks) + 1):
        if shape.blocks % group == 0:
            yield group, 0
    if shape.blocks > 1:
        yield 1, 1


def _rings(base: Tile, chain: ir.Chain, arch: GpuArch) -> Iterator[Tile]:
    """``base`` with all filters resident, and with a ring of them where that leaves
    more room for the rest: every CTA's own, and two CTAs' together."""
    resident, streamed = (_staged(base, chain, arch, n) for n in (1, 0))
    if resident is not None:
        yield resident
        pixels, stores = resident.rings.pixels, resident.rings.stores
        boxes, _ = steps_of(base, shape_of(chain))
        if stores >= _ENOUGH and pixels >= 2 * boxes:
            return
    if streamed is not None:
        yield streamed
        yield dataclasses.replace(streamed, cluster=_CLUSTER)


def _fit(chain: ir.Chain, warpgroups: int, accumulators: int, results: int) -> bool:
    """Whether a thread has registers for its accumulators, and for results of the
    shortcut beside them: of 232, of 160 with three warpgroups, or of 128 where two CTAs
    share an SM, what addresses and one epilogue's columns and matrices leave."""
    columns = max(len(hoist.columns(r.epilogue)) for r in chain.regions)
    room = {1: 72, 2: 180, 3: 108}[warpgroups] - 2 * columns
    beside = {1: 8, 2: 24, 3: 26}[warpgroups]
    return accumulators <= room and accumulators + results <= room + beside


def _staged(tile: Tile, chain: ir.Chain, arch: GpuArch, resident: int) -> Tile | None:
    """``tile`` with as many stages as shared memory holds, or None."""
    shape = shape_of(chain)
    layout = tile.layout(shape.image)
    boxes, units = steps_of(tile, shape)
    turns = turns_of(tile, shape, arch)
    several = tile.group < shape.blocks  # groups read a tile's pixels
    least = {
        "pixels": boxes if several else min(2, boxes),
        "filters": max(tile.group, shape.outputs) + tile.group,
        "stores": 2,
    }
    if tile.ahead:
        # Units of a block, its first products' and its second ones'.
        least["filters"] = units // shape.blocks
    most = {
        "pixels": min(MAX_RINGS[0], boxes * turns),
        "filters": min(MAX_RINGS[1], units * turns),
        "stores": min(MAX_RINGS[2], (shape.blocks + shape.outputs) * turns),
    }
    if resident:
        least["filters"] = most["filters"] = units
    if units > MAX_RINGS[1] if resident else units <= least["filters"]:
        return None
    if any(least[name] > n for name, n in zip(least, MAX_RINGS, strict=True)):
        return None
    # What grows first where there is room: no ring should be short before all others
    # are long.
    wishes = (
        *(("stores", 3), ("pixels", 2 * boxes), ("filters", 3 * least["filters"])),
        *(("stores", 5), ("pixels", 3 * boxes), ("filters", 5 * least["filters"])),
        *(("stores", 8), ("filters", MAX_RINGS[1])),
    )
    rings = Rings(**least, resident=resident)
    room = smem_per_cta(tile.ctas, arch)
    if shared_bytes(dataclasses.replace(tile, rings=rings), layout, chain) > room:
        return None
    for name, wanted in wishes:
        for stages in range(getattr(rings, name) + 1, min(wanted, most[name]) + 1):
            deeper = dataclasses.replace(rings, **{name: stages})
            used = dataclasses.replace(tile, rings=deeper)
            if shared_bytes(used, layout, chain) > room:
                break
            rings = deeper
    return dataclasses.replace(tile, rings=rings)


def shared_bytes(tile: Tile, layout: Layout, chain: ir.Chain) -> int:
    rings, shape = tile.rings, shape_of(chain)
    own = rings.pixels * layout.stage_bytes + rings.stores * layout.slot_bytes
    *firsts, second = (len(hoist.columns(r.epilogue)) for r in chain.regions)
    columns = 4 * BLOCK * (shape.blocks * sum(firsts) + shape.outputs * second)
    return rings.filters * UNIT + tile.warpgroups * own + columns + _BARRIERS


def steps_of(tile: Tile, shape: Shape) -> tuple[int, int]:
    """Boxes of pixels and units of filters that a tile reads."""
    layouts = [tile.layout(image) for image in shape.products]
    boxes = sum(each.image.chunks * len(each.phases) for each in layouts)
    taps = sum(each.image.chunks * len(each.taps) for each in layouts)
    return boxes, shape.blocks * (taps + shape.outputs)


def grid(tile: Tile, shape: Shape, arch: GpuArch) -> int:
    """CTAs: whole clusters, of which one may have fewer tiles than CTAs."""
    tiles = tile.layout(shape.image).tile_count(shape.blocks)
    clusters = -(-tiles // tile.cluster)
    return tile.cluster * min(clusters, arch.sm_count * tile.ctas // tile.cluster)


def turns_of(tile: Tile, shape: Shape, arch: GpuArch) -> int:
    """Tiles of the busiest warpgroup."""
    tiles = tile.layout(shape.image).tile_count(shape.blocks)
    return -(-tiles // (grid(tile, shape, arch) * tile.warpgroups))
