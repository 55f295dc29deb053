# SPDX-License-Identifier: Apache-2.0
"""The tiles of the Hopper implicit GEMM.

Tiles are cut to the problem: any multiple of 8 pixels, whole rows or whole images
where they fit, so that the grid fills the SMs in as few waves as it can.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

from .. import ir
from ..arch import GpuArch
from . import hoist
from .config import Config
from .geometry import MAX_PHASES, MAX_RINGS, NO_RINGS, Block, Layout, Rings, round_up
from .image import BLOCK, ROW, Image, line_of

NAME = "implicit_gemm_sm90"

FILTER_BLOCK = BLOCK * ROW  # bytes
# Full and empty barriers of every stage there can be, slots' for two warpgroups, and
# two more of each of these.
_IM2COL = "im2col-"  # in a config's text
_BARRIERS = (2 * (MAX_RINGS[0] + MAX_RINGS[1] + 2 * MAX_RINGS[2]) + 4) * 8


@dataclasses.dataclass(frozen=True, slots=True)
class Tile:
    """One candidate: the kernel's template arguments, block of outputs and rings.

    ``blocks`` and ``channel_blocks`` are wgmmas of one warpgroup, of ``pixels`` pixels
    and 64 channels; ``warps_m`` and ``warps_n`` are warpgroups along channels and
    pixels; ``splits`` are the CTAs of a cluster that share a tile's input channels. A
    block leaves in ``parts``. With ``im2col`` it is one of ``line_of`` the image. With
    ``zeros`` products of nothing but these are not left out of the last chunk: such a
    program serves any number of input channels.
    """

    pixels: int
    blocks: int
    channel_blocks: int
    warps_m: int
    warps_n: int
    schedule: str
    block: Block
    rings: Rings = NO_RINGS
    splits: int = 1
    parts: int = 1
    im2col: bool = False
    zeros: bool = False

    @property
    def filter_blocks(self) -> int:
        return self.channel_blocks * self.warps_m

    @property
    def warpgroups(self) -> int:
        return 2 if self.schedule == "pingpong" else self.warps_m * self.warps_n

    @property
    def ctas(self) -> int:
        """CTAs that share an SM."""
        return 2 if self.warpgroups == 1 else 1

    def layout(self, image: Image) -> Layout:
        count = self.blocks * self.warps_n
        seen = line_of(image) if self.im2col else image
        assert seen is not None
        return layout_of(seen, self.block, count, self.pixels, self.parts)

    def config(self) -> Config:
        b, rings = self.block, self.rings
        return Config.of(
            NAME,
            pixels=self.pixels,
            blocks=f"{self.blocks}x{self.channel_blocks}",
            warpgroups=f"{self.warps_m}x{self.warps_n}",
            schedule=self.schedule,
            resident=rings.resident,
            block=f"{_IM2COL * self.im2col}{b.images}x{b.rows}x{b.cols}",
            stages=f"{rings.pixels}x{rings.filters}x{rings.stores}",
            splits=self.splits,
            parts=self.parts,
            **({"zeros": 1} if self.zeros else {}),
        )

    @staticmethod
    def of(config: Config) -> Tile:
        def split(key: str) -> list[int]:
            return [int(n) for n in str(config[key]).split("x")]

        blocks, channel_blocks = split("blocks")
        warps_m, warps_n = split("warpgroups")
        block = str(config["block"])
        images, rows, cols = map(int, block.removeprefix(_IM2COL).split("x"))
        pixel_stages, filter_stages, store_stages = split("stages")
        return Tile(
            pixels=int(config["pixels"]),
            blocks=blocks,
            channel_blocks=channel_blocks,
            warps_m=warps_m,
            warps_n=warps_n,
            schedule=str(config["schedule"]),
            block=Block(images, rows, cols),
            rings=Rings(
                pixel_stages, filter_stages, store_stages, int(config["resident"])
            ),
            splits=int(config["splits"]),
            parts=int(config["parts"]),
            im2col=block.startswith(_IM2COL),
            zeros="zeros" in dict(config.params),
        )


# What a layout has worked out serves all tiles that have it.
layout_of = functools.lru_cache(maxsize=1024)(Layout)


# Candidates -------------------------------------------------------------------------


def tiles_of(image: Image, epilogue: ir.Epilogue, arch: GpuArch) -> Iterator[Tile]:
    columns = len(hoist.columns(epilogue))
    line, group = line_of(image), image.k // image.groups
    found = [(False, *block) for block in blocks_of(image)]
    if line is not None and image.r * image.s <= MAX_PHASES:
        found += [(True, *block) for block in blocks_of(line)]
    for im2col, block, pixels in found:
        for shape in _SHAPES:
            blocks, channel_blocks, warps_m, warps_n, _ = shape
            if blocks * channel_blocks * pixels // 2 > accumulators(shape, columns):
                continue
            if (channel_blocks * warps_m - 1) * BLOCK >= image.k:
                continue  # blocks of channels that do not exist
            if image.groups > 1 and group % (channel_blocks * warps_m * BLOCK):
                continue  # of two groups
            base = Tile(*(pixels, *shape, block), im2col=im2col)
            layout = base.layout(image)
            if layout.problem() is not None:
                continue
            if blocks * warps_n > 1 and _idle_blocks(layout):
                continue
            variants = [base, dataclasses.replace(base, rings=Rings(resident=1))]
            variants += [
                dataclasses.replace(base, splits=splits)
                for splits in _splits(base, image, arch)
            ]
            if layout.image.is_line and (parts := _parts(pixels)) > 1:
                variants += [
                    dataclasses.replace(variant, parts=parts)
                    for variant in variants
                    if variant.splits == 1
                ]
            for variant in variants:
                tile = _staged(variant, image, epilogue, arch)
                if tile is not None:
                    yield tile


# blocks, channel blocks, warpgroups along channels and pixels, schedule
_SHAPES = (
    (1, 1, 2, 1, "cooperative"),
    (1, 1, 1, 2, "cooperative"),
    (2, 1, 2, 1, "cooperative"),
    (2, 1, 1, 2, "cooperative"),
    (1, 2, 1, 2, "cooperative"),
    (1, 2, 2, 1, "cooperative"),
    (1, 1, 1, 1, "pingpong"),
    (1, 2, 1, 1, "pingpong"),
    (1, 1, 1, 1, "cooperative"),
    (1, 2, 1, 1, "cooperative"),
)


def _parts(pixels: int) -> int:
    """In how many a large block may leave: slots are smaller then, and rings deeper."""
    fitting = [n for n in (2, 3, 4) if pixels % (16 * n) == 0 and pixels // n >= 48]
    return max(fitting, default=1)


def _splits(tile: Tile, image: Image, arch: GpuArch) -> list[int]:
    """CTAs that may share a tile: where all of them fit on the GPU at once."""
    if tile.schedule == "pingpong" or tile.blocks * tile.channel_blocks > 1:
        return []
    if image.pool is not None:
        return []  # of a split block every CTA finishes some pixels
    count, room = tile_count(tile, image), arch.sm_count * tile.ctas
    # A cluster lies in one part of the GPU, with 16 or 18 SMs on Hopper: large ones
    # leave some idle.
    return [
        n
        for n in (2, 3, 4, 6, 8)
        if n <= image.chunks and count * n <= room * (1 - (n - 1) / 34)
    ]


def accumulators(shape: tuple[int, int, int, int, str], columns: int) -> int:
    """Registers of a thread that accumulators may take beside ``columns`` per channel.

    Of 240, or 128 where two CTAs share an SM; addresses, the hoisted columns of two
    channels and what one step of the epilogue holds need the others.
    """
    _, channel_blocks, warps_m, warps_n, schedule = shape
    alone = schedule == "pingpong" or warps_m * warps_n > 1
    return (204 if alone else 80) - 2 * channel_blocks * columns


@functools.lru_cache(maxsize=512)
def blocks_of(image: Image) -> tuple[tuple[Block, int], ...]:
    """Blocks of outputs worth an accumulator, each with its pixels."""
    found: list[tuple[Block, int]] = []
    if image.is_line:
        most = min(256, round_up(image.q, 8))
        return tuple((Block(1, 1, n), n) for n in range(8, most + 1, 8))

    def add(block: Block) -> None:
        used = Layout(image, block, 1, 256).used
        if 0 < used <= 256:
            found.append((block, round_up(used, 8)))

    down, right = image.windows
    p, q = down.outputs, right.outputs
    for images in (1, 2, 4):
        if images <= image.n:
            add(Block(images, p, q))
    for rows in range(1, min(p - 1, 32) + 1):
        add(Block(1, rows, q))
    # Of what a pool leaves, few make a block.
    least = 7 if image.pool is None else 3
    for parts in range(2, 1 + -(-q // least)):
        cols = -(-q // parts)
        if cols < least or q - cols * (parts - 1) <= 0:
            continue
        for rows in (1, 2, 3, 4, 5, 6, 7, 8, 12, 14, 16):
            # A row alone reads its halo for itself: only where there is no other.
            if rows <= p and (rows > 1 or p == 1):
                add(Block(1, rows, cols))
    # A block of the same pixels counts once.
    return tuple(dict.fromkeys(found))


def _idle_blocks(layout: Layout) -> bool:
    """Whether a tile's last block never has an output."""
    image, count = layout.image, layout.count
    if image.is_line:
        return (count - 1) * layout.pixels >= image.q
    if layout.whole_images:
        return (count - 1) * layout.block.images >= image.n
    down, _ = layout.windows
    return (count - 1) * layout.block.rows >= down.outputs


def slot_tiles_of(epilogue: ir.Epilogue) -> int:
    """Tiles of 128 bytes a pixel in a slot: the first side input lies in the result's
    place where it is as wide."""
    tiles = [ir.ITEM_BYTES[dtype] // 2 for dtype in epilogue.tensors]
    result, sides = tiles[0], tiles[len(epilogue.outputs) :]
    in_place = bool(sides) and sides[0] == result
    return sum(tiles) - (result if in_place else 0)


def _staged(
    tile: Tile, image: Image, epilogue: ir.Epilogue, arch: GpuArch
) -> Tile | None:
    """``tile`` with as many stages as shared memory holds, or None."""
    sides, slot_tiles = len(epilogue.sides), slot_tiles_of(epilogue)
    layout = tile.layout(image)
    steps, boxes = steps_of(tile, layout)
    if tile.rings.resident:
        if steps > MAX_RINGS[1] or image.filters > 1:
            return None
        if grid(tile, image, arch) % image.channel_tiles(tile.filter_blocks):
            return None

    pixel_bytes, filter_bytes, store_bytes = _stage_bytes(tile, layout, slot_tiles)
    room = smem_per_cta(tile.ctas, arch) - _BARRIERS - partial_bytes(tile)
    room -= tile.warpgroups * layout.results_bytes

    def left(pixels: int, filters: int, stores: int) -> int:
        used = pixels * pixel_bytes + filters * filter_bytes + stores * store_bytes
        return room - used

    units = tile.blocks * tile.channel_blocks * tile.parts  # of a warpgroup, to leave
    # Steps of the main loop that one box of pixels serves.
    reach = len(layout.taps) / len(layout.phases)
    most_pixels = min(MAX_RINGS[0], max(2, 3 * boxes))
    most_filters = steps if tile.rings.resident else min(12, max(4, 2 * steps))
    pixels, filters = 2, steps if tile.rings.resident else 2
    slots, most_slots = (2, MAX_RINGS[2]) if sides else (1, 2)
    if left(pixels, filters, slots) < 0:
        return None
    more = True
    while more:
        more = False
        # Deeper rings where there is room, first the one that runs dry first.
        deeper = [(pixels + 1, filters), (pixels, filters + 1)]
        if (pixels - 1) * reach > filters - 1:
            deeper.reverse()
        for wanted in deeper:
            fits = wanted[0] <= most_pixels and wanted[1] <= most_filters
            if fits and left(*wanted, slots) >= 0:
                (pixels, filters), more = wanted, True
                break
        # Slots are a ring of side inputs, too. What leaves is not waited for as what
        # comes is.
        ahead = min((pixels - 1) * reach, filters - 1) >= 3
        if sides:
            turns = 2 if tile.schedule == "pingpong" else 1
            ahead = ahead and slots * turns / units <= pixels / boxes
        if (ahead or not more) and slots < most_slots:
            if left(pixels, filters, slots + 1) >= 0:
                slots, more = slots + 1, True
    rings = Rings(pixels, filters, slots, tile.rings.resident)
    return dataclasses.replace(tile, rings=rings)


def _stage_bytes(tile: Tile, layout: Layout, slot_tiles: int) -> tuple[int, int, int]:
    """Of a stage of pixels, of filters, and of stores: a slot for every warpgroup."""
    return (
        layout.stage_bytes,
        FILTER_BLOCK * tile.filter_blocks,
        tile.warpgroups * slot_tiles * layout.slot_bytes,
    )


def smem_per_cta(ctas: int, arch: GpuArch) -> int:
    """Shared memory of each where so many share an SM."""
    if ctas == 1:
        return arch.smem_per_block
    return (arch.smem_per_block - 1024) // 2


def partial_bytes(tile: Tile) -> int:
    """Sums that a CTA of a split tile gets from the others."""
    groups = -(-(tile.pixels // 8) // tile.splits)
    return tile.warpgroups * (tile.splits - 1) * groups * 8 * BLOCK * 4


def shared_bytes(tile: Tile, layout: Layout, slot_tiles: int) -> int:
    rings = (tile.rings.pixels, tile.rings.filters, tile.rings.stores)
    stages = zip(rings, _stage_bytes(tile, layout, slot_tiles), strict=True)
    rest = partial_bytes(tile) + tile.warpgroups * layout.results_bytes + _BARRIERS
    return sum(n * size for n, size in stages) + rest


def tile_count(tile: Tile, image: Image) -> int:
    return tile.layout(image).tile_count(tile.filter_blocks)


def steps_of(tile: Tile, layout: Layout) -> tuple[int, int]:
    """Filter and pixel stages that a CTA reads for a tile."""
    chunks = -(-layout.image.chunks // tile.splits)
    return chunks * len(layout.taps), chunks * len(layout.phases)


def grid(tile: Tile, image: Image, arch: GpuArch) -> int:
    if tile.splits > 1:
        return tile_count(tile, image) * tile.splits  # a cluster has one tile
    most = min(tile_count(tile, image), arch.sm_count * tile.ctas)
    channel_tiles = image.channel_tiles(tile.filter_blocks)
    if tile.rings.resident and most >= channel_tiles:
        # A CTA keeps its channels: tiles go around in steps of the grid.
        return most // channel_tiles * channel_tiles
    return most
