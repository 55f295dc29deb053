# SPDX-License-Identifier: Apache-2.0
"""How long the Hopper implicit GEMM would take: what orders its candidates."""

from __future__ import annotations

import dataclasses
import itertools
import math

from .. import ir
from ..arch import GpuArch
from . import hoist
from .cycles import CLOCK, micros, us
from .geometry import Layout, Rings
from .image import ROW, Image
from .implicit_gemm_tiles import (
    FILTER_BLOCK,
    Tile,
    grid,
    partial_bytes,
    steps_of,
    tile_count,
)

# Cycles of an SM, fitted to 20,000 kernels of 46 problems on an H200 (those that
# benchmarks/bench_tuning.py draws: convs at batch 32, products of BERT and of dense
# layers), the tiles that are fast, or estimated so, weighted most.
_START = 3080  # from launch to the first product, and the last store
_FINISH = 1.0  # of an epilogue: a pixel of a block, for every instruction
_POOL = 1.5  # of a result in an output's window; counted in instructions, not fitted
_MEAN = 140  # of a mean besides, to add up the lanes' sums and divide; counted, too
_HAND_OVER = 1415  # from a tile's products to its epilogue, and on to the next ones
_STORE_WAIT = 780  # from a slot's store to its next results
_SIDE_WAIT = 2200  # from asking for a side input to it
_EXCHANGE = 2000  # of sums and results between the CTAs of a split tile
_PIXEL_WAIT = 1945  # from asking for a box of pixels, mostly in device memory, to it
_FILTER_WAIT = 1785
_STEP = 220  # of a step's products at least: a wgmma's latency, and barriers
_BOX = 118  # of a load of pixels, beside its bytes
_GATHERED = 1.7  # of a pixel that im2col mode gathers, beside its bytes
_SKIPPED = 0.95  # of a pixel that a box steps over
_LOAD_RATE = 89.5  # bytes a cycle from L2 into shared memory
_MEMORY_RATE = 0.9  # of device memory's published bandwidth, what kernels get of it
# Of SMs' and device memory's times, what the longer does not hide; and of a single
# tile, which is first read, then computed, then stored, what it does not besides.
_OVERLAP, _ALONE = 0.37, 0.14
_WAIT_OVERLAP = 0.17  # the same of a tile's work and its waiting


@dataclasses.dataclass(frozen=True, slots=True)
class Estimate:
    """What a launch takes, in an SM's cycles.

    ``turns`` are the busiest SM's tiles. Of a tile count its ``products`` and, in turn
    or beside those of another, its ``finish``: the epilogue's arithmetic, or waiting
    for slots and side inputs; what it ``moves`` through shared memory; and ``waiting``
    for loads that its rings are too short to have under way. ``memory`` is device
    memory's time, of which the SMs hide a part.
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
    count = tile_count(tile, image) * tile.splits
    turns = -(-count // ctas)  # of a CTA
    # A wgmma of N pixels takes N / 2 cycles, or what reading its operands takes.
    one = max(tile.pixels / 2, 16 + tile.pixels / 4)
    pingpong = tile.schedule == "pingpong"
    sharing = 1 if pingpong else tile.warpgroups
    blocks = tile.blocks * tile.channel_blocks
    taps, per_step = len(layout.taps), blocks * sharing * one
    whole, last = _busiest_chunks(tile, image)
    depth = whole * image.k_steps + last * image.last_steps
    products = taps * depth * per_step
    moved = _slots(layout, epilogue) * blocks * sharing * tile.parts
    moves = boxes * _box(layout) + moved / _LOAD_RATE
    waiting = boxes * _PIXEL_WAIT / (rings.pixels - 1)
    if not rings.resident:
        moves += steps * FILTER_BLOCK * tile.filter_blocks / _LOAD_RATE
        waiting = max(waiting, steps * _FILTER_WAIT / (rings.filters - 1))
    work = _FINISH * blocks * tile.pixels * (1 + hoist.work(epilogue))
    if image.pool is not None:
        each = _POOL * math.prod(image.pool.window)
        each += _MEAN if image.pool.is_mean else 0
        work += each * blocks * math.prod(layout.store_box)
    slots = blocks * tile.parts * _slot_wait(rings, epilogue)
    finish = max(work, slots)
    in_turn = whole * max(image.k_steps * per_step, _STEP)
    in_turn = taps * (in_turn + last * max(image.last_steps * per_step, _STEP))
    if pingpong:
        # One warpgroup multiplies while the other finishes.
        both = (in_turn + finish + _HAND_OVER) / 2
        own = turns * _with(waiting, max(in_turn, moves, both)) + work
    elif tile.ctas > 1 and ctas > arch.sm_count:
        # So do two CTAs, each with loads of its own.
        alone = _with(waiting, max(in_turn + work + _HAND_OVER, slots))
        both = -(-count // arch.sm_count) * max(products, moves)
        own = max(both, turns * alone)
    else:
        # All warpgroups finish at once, while the next tile is being loaded.
        alone = in_turn + work + _HAND_OVER / 2
        own = turns * _with(waiting, max(alone, moves, slots))
    if tile.splits > 1:
        own += _EXCHANGE + partial_bytes(tile) / _LOAD_RATE
    first = (layout.loads * layout.load_bytes + 16384) / _LOAD_RATE
    memory = region.bytes_moved / (_MEMORY_RATE * arch.bandwidth) * CLOCK
    beside = (_OVERLAP + _ALONE / turns) * min(own, memory)
    total = _START + first + max(own, memory) + beside
    busiest = -(-count // min(ctas, arch.sm_count))
    return Estimate(busiest, in_turn, moves, waiting, finish, memory, total)


def _busiest_chunks(tile: Tile, image: Image) -> tuple[int, int]:
    """Of the CTA of a tile that multiplies most: its whole chunks, and 1 where it has
    the last one besides.

    No other CTA has more chunks than the last one, which may save products.
    """
    ends = [image.chunks * rank // tile.splits for rank in range(tile.splits + 1)]
    *others, own = (end - first for first, end in itertools.pairwise(ends))
    return (own, 0) if own in others else (own - 1, 1)


def _box(layout: Layout) -> float:
    """Cycles of one load of pixels."""
    image, read = layout.image, layout.loads * layout.load_bytes
    pixels = read // ROW
    down, right = image.steps
    found = _BOX + read / _LOAD_RATE + _SKIPPED * pixels * (down * right - 1)
    return found + (_GATHERED * pixels if image.source is not None else 0.0)


def _slots(layout: Layout, epilogue: ir.Epilogue) -> float:
    """Bytes that come and leave in the slot of a part of a block."""
    leave = sum(ir.ITEM_BYTES[output.dtype] // 2 for output in epilogue.outputs)
    come = sum(ir.ITEM_BYTES[dtype] // 2 for dtype in epilogue.sides)
    # A mean leaves from where the results were.
    stored = math.prod(layout.store_box) * ROW
    left = stored if layout.pools_in_place else layout.slot_bytes
    return leave * left + come * layout.slot_bytes


def _slot_wait(rings: Rings, epilogue: ir.Epilogue) -> float:
    """Cycles from one slot to the next, for what leaves or comes in it."""
    if epilogue.sides:
        return _SIDE_WAIT / (rings.stores - 1)
    return _STORE_WAIT / rings.stores


def _with(waiting: float, work: float) -> float:
    return max(waiting, work) + _WAIT_OVERLAP * min(waiting, work)
