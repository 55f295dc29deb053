# SPDX-License-Identifier: Apache-2.0
"""How long the Hopper implicit GEMM would take: what orders its candidates."""

from __future__ import annotations

import dataclasses
import math

from .. import ir
from ..arch import GpuArch
from . import hoist
from .cycles import CLOCK, micros, us
from .image import Image
from .implicit_gemm_tiles import (
    FILTER_BLOCK,
    Tile,
    grid,
    partial_bytes,
    steps_of,
    tile_count,
)

# Cycles of an SM, fitted to 2,500 kernels of 54 problems on an H200 (ResNet-50's at
# batch 32 and some at 128, BERT's, VGG's dense layers): of some 45 tiles of a problem
# the first pick took 4 % longer than the best on average, the best of the first eight,
# at most three of a kind, 0.5 %.
_START = 3400  # from launch to the first product, and the last store
_FINISH = 2.0  # of an epilogue: a pixel of a block, for every instruction
_POOL = 1.5  # of a result in an output's window; counted in instructions, not fitted
_EXCHANGE = 4500  # of sums and results between the CTAs of a split tile
_PIXEL_WAIT = 2200  # from asking for a box of pixels, mostly in device memory, to it
_FILTER_WAIT = 1800
_BOX, _STEP = 60, 8  # of each, beside what it moves and multiplies
_LOAD_RATE = 80.0  # bytes a cycle from L2 into shared memory
_OVERLAP = 0.4  # of SMs' and device memory's times, what the longer does not hide


@dataclasses.dataclass(frozen=True, slots=True)
class Estimate:
    """What a launch takes, in an SM's cycles.

    ``turns`` are the busiest SM's tiles. A tile's main loop takes the longest of its
    ``products``, of what it ``moves`` through shared memory, and of ``waiting`` for
    loads that its rings are too short to have under way; then it ``finishes``.
    ``memory`` is device memory's time, of which the SMs hide a part.
    """

    turns: int
    products: float
    moves: float
    waiting: float
    finish: float
    memory: float
    total: float

    @property
    def micros(self) -> float:
        """The whole launch, in µs."""
        return micros(self.total)

    @property
    def text(self) -> str:
        tiles = "1 tile" if self.turns == 1 else f"{self.turns} tiles"
        return (
            f"{us(self.total)} µs: {tiles} on the busiest SM, each {us(self.products)} "
            f"of products, {us(self.moves)} of loads and stores, {us(self.waiting)} of "
            f"latency, {us(self.finish)} of epilogue; device memory {us(self.memory)}"
        )


def cycles(tile: Tile, image: Image, region: ir.Region, arch: GpuArch) -> float:
    """Estimated time of a launch, in an SM's cycles."""
    return estimate(tile, image, region, arch).total


def estimate(tile: Tile, image: Image, region: ir.Region, arch: GpuArch) -> Estimate:
    """The busiest SM's tiles, one after the other, or device memory's time, whichever
    is longer, and a part of the other."""
    layout = tile.layout(image)
    steps, boxes = steps_of(tile, layout)
    rings, epilogue = tile.rings, region.epilogue
    ctas = grid(tile, image, arch)
    turns = -(-tile_count(tile, image) * tile.splits // ctas)
    # A wgmma of N pixels takes N / 2 cycles, or what reading its operands takes.
    one = max(tile.pixels / 2, 16 + tile.pixels / 4)
    sharing = 1 if tile.schedule == "pingpong" else tile.warpgroups
    blocks = tile.blocks * tile.channel_blocks
    products = image.k_steps * steps * blocks * sharing * one
    loads = boxes * layout.loads * layout.load_bytes
    waiting = boxes * _PIXEL_WAIT / (rings.pixels - 1)
    if not rings.resident:
        loads += steps * FILTER_BLOCK * tile.filter_blocks
        waiting = max(waiting, steps * _FILTER_WAIT / (rings.filters - 1))
    moved = sum(ir.ITEM_BYTES[d] // 2 for d in epilogue.tensors)
    moved *= blocks * sharing * tile.parts * layout.slot_bytes
    products += steps * _STEP
    moves = (loads + moved) / _LOAD_RATE + boxes * _BOX
    busy = max(products, moves)
    main = max(busy, waiting)
    finish = _FINISH * blocks * tile.pixels * (1 + hoist.work(epilogue))
    if image.pool is not None:
        finish += _POOL * blocks * math.prod((*layout.store_box, *image.pool.window))
    if tile.schedule == "pingpong":
        own = turns * max(main, (main + finish) / 2) + finish
    elif tile.ctas > 1 and ctas > arch.sm_count:
        own = turns * max(2 * busy, main + finish)
    else:
        own = turns * (main + finish)
    if tile.splits > 1:
        own += _EXCHANGE + partial_bytes(tile) / _LOAD_RATE
    first = (loads / max(1, boxes) + 16384) / _LOAD_RATE
    memory = region.bytes_moved / arch.bandwidth * CLOCK
    total = _START + first + max(own, memory) + _OVERLAP * min(own, memory)
    return Estimate(turns, products, moves, waiting, finish, memory, total)
