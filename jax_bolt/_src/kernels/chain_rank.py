# SPDX-License-Identifier: Apache-2.0
"""How long a chain's kernel would take: what orders its candidates."""

from __future__ import annotations

import dataclasses

from .. import ir
from ..arch import GpuArch
from . import hoist
from .chain_tiles import UNIT, Shape, Tile, grid, steps_of, turns_of
from .cycles import CLOCK, micros, us

# Cycles of an SM, fitted to 41 kernels of ResNet-50's chains at batch 32 on an H200,
# 30 to 277 µs: 7 % off, in the mean square.
_START = 6000  # from launch to the first product, and the last store
_FINISH = 1.0  # of an epilogue: a pixel of a block, for every instruction
_HAND_OVER = 130  # from a block's products to its epilogue, and on to the second ones
_LATENCY = 200  # from a wgmma to the next one on its accumulators, with its unit's wait
# The same where nothing is waited for between them; of three kernels, 6% off. Epilogues
# hide none of it, though nothing waits there: a warp's own instructions take the time.
_AHEAD_LATENCY = 160
_SIDE_WAIT = 2450  # from asking for a side input to it
_LOAD_RATE = 24.0  # bytes a cycle between L2 and shared memory
_OVERLAP = 0.2  # of SMs' and device memory's times, what the longer does not hide


@dataclasses.dataclass(frozen=True, slots=True)
class Estimate:
    """What a launch takes, in an SM's cycles.

    ``turns`` are the busiest warpgroup's tiles. Of a turn of the SM's warpgroups
    count their ``products``, what they move (``moves``), or what one of them does
    alone (``alone``), whichever takes longest. ``memory`` is device memory's time, of
    which the SMs hide a part.
    """

    turns: int
    products: float
    moves: float
    alone: float
    memory: float
    total: float

    @property
    def micros(self) -> float:
        return micros(self.total)

    @property
    def text(self) -> str:
        tiles = "1 tile" if self.turns == 1 else f"{self.turns} tiles"
        return (
            f"{us(self.total)} µs: {tiles} a warpgroup, each {us(self.products)} of "
            f"products, {us(self.moves)} of loads and stores, {us(self.alone)} for "
            f"itself; device memory {us(self.memory)}"
        )


def estimate(tile: Tile, chain: ir.Chain, shape: Shape, arch: GpuArch) -> Estimate:
    layout = tile.layout(shape.image)
    boxes, units = steps_of(tile, shape)
    rings = tile.rings
    turns = turns_of(tile, shape, arch)
    busy_sms = min(arch.sm_count, grid(tile, shape, arch))
    # Warpgroups that an SM runs side by side.
    beside = tile.warpgroups * min(tile.ctas, -(-grid(tile, shape, arch) // busy_sms))
    # A wgmma of N pixels takes N / 2 cycles, or what reading its operands takes; and on
    # the same accumulators one waits for the one before.
    one = max(tile.pixels / 2, 16 + tile.pixels / 4)
    firsts = shape.steps * (units - shape.blocks * shape.outputs)
    seconds = shape.second_steps * shape.blocks * shape.outputs
    products = (firsts + seconds) * one
    latency = _AHEAD_LATENCY if tile.ahead else _LATENCY
    firsts_in_turn = firsts * max(one, latency / tile.group)
    seconds_in_turn = seconds * max(one, latency / shape.outputs)
    regions = (chain.made, shape.blocks), (chain.second, shape.outputs)
    finished = regions
    if shape.shortcut is not None:
        finished = ((chain.regions[0], shape.blocks), *regions)
    finish = sum(
        blocks * (_FINISH * tile.pixels * (1 + hoist.work(region.epilogue)))
        for region, blocks in finished
    )
    finish += _HAND_OVER * (shape.blocks + shape.outputs)
    moved = boxes * layout.load_bytes
    for region, blocks in regions:
        tensors = int(region is chain.second or chain.stored)
        if shape.shortcut is None:
            tensors += len(region.epilogue.sides)
        moved += blocks * layout.slot_bytes * tensors
    moves = beside * moved / _LOAD_RATE
    if not rings.resident:
        # Warpgroups of a CTA share filters, and so do a cluster's CTAs.
        read = units * UNIT / tile.cluster
        moves += read * (beside / tile.warpgroups) / _LOAD_RATE
    alone = firsts_in_turn + seconds_in_turn + finish
    if shape.shortcut is None and chain.made.epilogue.sides:
        alone = max(alone, shape.blocks * _SIDE_WAIT / (rings.stores - 1))
    per_turn = max(beside * products, moves, alone)
    first = boxes * layout.load_bytes + min(rings.filters, units) * UNIT
    memory = chain.bytes_moved / arch.bandwidth * CLOCK
    memory *= arch.sm_count / busy_sms if busy_sms < arch.sm_count / 2 else 1.0
    own = turns * per_turn
    total = _START + first / _LOAD_RATE + max(own, memory) + _OVERLAP * min(own, memory)
    return Estimate(turns, products, moves, alone, memory, total)
