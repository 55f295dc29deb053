# SPDX-License-Identifier: Apache-2.0
"""How long a launch of the depthwise kernel would take, by its instructions."""

from __future__ import annotations

import dataclasses
import functools

from .. import ir
from ..arch import GpuArch
from . import hoist
from .cycles import CLOCK, micros, us
from .depthwise_tiles import SCHEDULERS, Shape, Tile

# Cycles of an SM. Counted in the machine code, and not fitted to measurements.
_START = 4000  # from launch to the first product, and the last store
_NEXT = 300  # from a block's end to the first copy of the one in its place
_STALL = 160  # of a warp in each step: the barrier, loads from shared memory
_STEP, _COPY = 30, 5  # instructions of a step, and of a piece that is copied
_BEFORE = 250  # instructions before the first step, without the filter's
_LATENCY = 1400  # from asking device memory to having it in shared memory
_BURST = 64  # bytes that device memory reads at once
_HALF_BURST = 1.25  # of its time, where another block has the other half, a bit later
_OVERLAP = 0.4  # of SMs' and device memory's times, what the longer does not hide


@dataclasses.dataclass(frozen=True, slots=True)
class Estimate:
    """What a launch takes, in an SM's cycles.

    The busiest SM has ``blocks`` of ``steps`` steps; a warp's step is
    ``instructions`` on average, of which ``products`` multiply where all slots count.
    ``memory`` is device memory's time, or that of waiting for it.
    """

    blocks: int
    steps: float
    instructions: float
    products: int
    memory: float
    total: float

    @property
    def micros(self) -> float:
        """The whole launch, in µs."""
        return micros(self.total)

    @property
    def text(self) -> str:
        blocks = "1 block" if self.blocks == 1 else f"{self.blocks} blocks"
        return (
            f"{us(self.total)} µs: {blocks} on the busiest SM, each {self.steps:.0f} "
            f"steps of {self.instructions:.0f} instructions, up to {self.products} of "
            f"them products; device memory {us(self.memory)}"
        )


def estimate(tile: Tile, region: ir.Region, arch: GpuArch) -> Estimate:
    """The busiest SM's instructions, or device memory's time, whichever is longer, and
    a part of the other."""
    shape = Shape(tile, region)
    p = shape.problem
    warps = tile.threads // 32
    held, share = shape.ctas(arch), shape.share(arch)
    uneven = not tile.spread and shape.spreads(arch)
    blocks = min(held, shape.grid) if uneven else share
    resident = min(blocks, held)
    steps, lines = steps_and_lines(p, tile.rows, shape.leaves_out)
    products = _line_products(shape)
    instructions = _step_instructions(shape) + products * lines / steps

    def together(blocks: int) -> float:
        # Of an SM's schedulers the one with the most warps.
        turns = -(-blocks * warps // SCHEDULERS)
        # A block's warps stall at its barrier together; others hide that.
        alone = turns if blocks == 1 else 1
        turn = max(turns * instructions, alone * instructions + _STALL)
        return steps * turn + turns * _first_instructions(shape)

    waves, rest = divmod(blocks, resident)
    own = waves * together(resident) + (together(rest) if rest else 0.0)
    moved = region.bytes_moved / arch.bandwidth * CLOCK
    if tile.channels < min(p.c, _BURST // shape.item):
        moved *= _HALF_BURST
    # As many steps of a block as are on their way come in one latency.
    waits = max(1.0, steps / (tile.stages - 1)) * blocks / resident
    memory = max(moved, waits * _LATENCY)
    total = _START + _NEXT * (waves + (rest > 0) - 1)
    total += max(own, memory) + _OVERLAP * min(own, memory)
    return Estimate(blocks, steps, instructions, p.r * products, memory, total)


@functools.lru_cache(maxsize=4096)  # every tile asks
def steps_and_lines(
    p: ir.ConvProblem, rows: int, leaves_out: bool
) -> tuple[float, float]:
    """Steps of a chunk, and lines of the filter that are multiplied in them; both on
    average."""
    stride, dilation = p.stride[0], p.dilation[0]
    reach = (p.r - 1) * dilation // stride
    chunks = -(-p.p // rows)
    steps = lines = 0
    for chunk in range(chunks):
        first = chunk * rows
        count = min(rows, p.p - first)
        top = first * stride - p.padding[0]
        begin = min(max(-top, 0) // stride, reach)
        end = min(max(-(-(p.h - top) // stride), begin + 1), count + reach)
        steps += end - begin
        if leaves_out:
            # A row's line is in the step of its row, and so many further down.
            downs = [line * dilation // stride for line in range(p.r)]
            reads = (i + down for i in range(count) for down in downs)
            lines += sum(begin <= step < end for step in reads)
        else:
            lines += (end - begin) * p.r
    return steps / chunks, lines / chunks


def _line_products(shape: Shape) -> int:
    """Multiplications of a thread's outputs with a line of the filter."""
    p, (first, end) = shape.problem, shape.inside
    places = (
        t * p.stride[1] + s * p.dilation[1]
        for t in range(shape.tile.outputs)
        for s in range(p.s)
    )
    return shape.tile.width * sum(first <= u < end for u in places)


def _first_instructions(shape: Shape) -> int:
    """Of a warp, before its first step."""
    taps = shape.taps if shape.resident else -(-shape.taps // shape.tile.strips)
    return _BEFORE + taps * (2 + 2 * shape.tile.width)


def _step_instructions(shape: Shape) -> float:
    """Of a warp, beside the products."""
    tile, epilogue = shape.tile, shape.region.epilogue
    first, end = shape.inside
    loads = shape.rows_read * shape.copies * _COPY
    # An access, and for 16-bit inputs a conversion of each value.
    converted = tile.width if shape.item == 2 else 0
    inputs = shape.rows_read * (end - first) * (1 + converted)
    filters = 0 if shape.resident else shape.taps
    outputs = tile.width * (1.5 + hoist.work(epilogue)) + 3
    outputs += len(epilogue.sides) * (3 + tile.width)
    return loads + inputs + filters + tile.outputs * outputs + _STEP
