# SPDX-License-Identifier: Apache-2.0
"""The tiles of the depthwise kernel, and how long a launch of each would take.

Every number here that the kernel needs as well (``jax_bolt/depthwise/depthwise.hpp``)
is a template argument or an int of its recipe.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

from .. import ir
from ..arch import GpuArch
from . import hoist
from .config import Config, alignment
from .cycles import CLOCK, micros, us

NAME = "depthwise"

_WIDTHS = (1, 2, 4, 8)  # channels of a thread
_OUTPUTS = (2, 4, 5, 7, 8)
_LANES = (8, 16, 32)
_THREADS = (32, 64, 128, 256)
_STAGES = (4, 3, 2)  # the first that fits
_CHUNKS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)

_REGISTERS = 65536  # of an SM
_MOST_REGISTERS = 216  # of a thread, by the count below; it has 255
_RESIDENT_TAPS = 128  # filter values of a thread in registers, at most
_OTHER_REGISTERS = 32
_MOST_PRODUCTS = 1600  # unrolled: two seconds of nvcc
_MOST_COPIES = 32  # of a thread and row: bits of a register
_ACCESS = 16  # bytes
_SECTOR = 32  # bytes that L2 moves at least
_BANKS = 128  # bytes that shared memory moves at once

# Cycles of an SM. Counted in the machine code, and not fitted to measurements.
_START = 4000  # from launch to the first product, and the last store
_STALL = 160  # of a warp in each step: the barrier, loads from shared memory
_STEP, _COPY = 30, 5  # instructions of a step, and of a piece that is copied
_LATENCY = 1400  # from asking device memory to having it in shared memory
_BURST = 64  # bytes that device memory reads at once
_HALF_BURST = 1.25  # of its time, where another block has the other half, a bit later
_OVERLAP = 0.4  # of SMs' and device memory's times, what the longer does not hide


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """What a block does: ``lanes`` threads of ``width`` channels side by side,
    ``strips`` times ``outputs`` columns, ``rows`` output rows one after the other, a
    ring of ``stages`` steps."""

    width: int
    outputs: int
    lanes: int
    strips: int
    stages: int
    rows: int

    @staticmethod
    def of(config: Config) -> Tile:
        """The tile that a config of this template describes."""
        return Tile(**{name: int(value) for name, value in config.params})

    def config(self) -> Config:
        return Config.of(NAME, **dataclasses.asdict(self))

    @property
    def threads(self) -> int:
        return self.lanes * self.strips

    @property
    def channels(self) -> int:
        return self.lanes * self.width

    @property
    def cols(self) -> int:
        return self.strips * self.outputs


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """A tile on a region: the sizes that follow."""

    tile: Tile
    region: ir.Region

    @property
    def problem(self) -> ir.ConvProblem:
        problem = self.region.problem
        assert isinstance(problem, ir.ConvProblem)
        return problem

    @property
    def item(self) -> int:
        """Bytes of an input."""
        return ir.ITEM_BYTES[self.problem.dtype]

    @property
    def taps(self) -> int:
        return self.problem.r * self.problem.s

    @property
    def slots(self) -> int:
        """Output rows that a step's input rows count for."""
        p = self.problem
        return (p.r - 1) * p.dilation[0] // p.stride[0] + 1

    @property
    def edge(self) -> int:
        """Steps at either end of a chunk in which only as many slots count."""
        return self.slots // 2 if self.slots >= 5 else 0

    @property
    def rows_read(self) -> int:
        """Input rows of a step that any tap reads."""
        p = self.problem
        stride = p.stride[0]
        return len({r * p.dilation[0] % stride for r in range(p.r)})

    def _columns(self, outputs: int) -> int:
        p = self.problem
        return (outputs - 1) * p.stride[1] + (p.s - 1) * p.dilation[1] + 1

    @property
    def inputs(self) -> int:
        """Input columns of a thread."""
        return self._columns(self.tile.outputs)

    @property
    def columns(self) -> int:
        """Input columns of a block."""
        return self._columns(self.tile.cols)

    @property
    def piece(self) -> int:
        """Bytes that are copied at once."""
        return alignment(self.problem.c, self.problem.dtype) * self.item

    @property
    def pieces(self) -> int:
        """Of a column."""
        return self.tile.channels * self.item // self.piece

    @property
    def copies(self) -> int:
        """Pieces of a thread in a row."""
        return -(-self.columns // (self.tile.threads // self.pieces))

    @property
    def pitch(self) -> int:
        """Bytes from column to column, such that a warp's strips read other banks."""
        dense = self.tile.channels * self.item
        for padding in (0, 16, 32, 48):
            if self._apart(dense + padding):
                return dense + padding
        return dense

    def _apart(self, pitch: int) -> bool:
        tile = self.tile
        bytes_ = tile.channels * self.item  # of a strip's lanes, in one access
        strips = max(1, min(32 // tile.lanes, _BANKS // bytes_))
        step = tile.outputs * self.problem.stride[1] * pitch
        return all(
            bytes_ <= i * step % _BANKS <= _BANKS - bytes_ for i in range(1, strips)
        )

    @property
    def step_bytes(self) -> int:
        return self.problem.stride[0] * self.columns * self.pitch

    @property
    def shared_bytes(self) -> int:
        filter_bytes = 0 if self.resident else self.taps * self.tile.channels * 4
        return filter_bytes + self.tile.stages * self.step_bytes

    @property
    def resident(self) -> bool:
        """Whether the filter is in registers."""
        few = self.taps * self.tile.width <= _RESIDENT_TAPS
        return few and self._registers(self.taps) <= _MOST_REGISTERS

    @property
    def registers(self) -> int:
        """Of a thread, about."""
        return self._registers(self.taps if self.resident else 2)

    def _registers(self, taps: int) -> int:
        tile, epilogue = self.tile, self.region.epilogue
        sides = sum(
            tile.outputs * max(1, tile.width * ir.ITEM_BYTES[d] // 4)
            for d in epilogue.sides
        )
        values = self.slots * tile.outputs + taps + self.inputs
        values += len(hoist.columns(epilogue))
        return values * tile.width + sides + _OTHER_REGISTERS

    @property
    def chunks(self) -> int:
        """Blocks down an image."""
        return -(-self.problem.p // self.tile.rows)

    @property
    def col_tiles(self) -> int:
        return -(-self.problem.q // self.tile.cols)

    @property
    def channel_tiles(self) -> int:
        """Of the input channels."""
        return -(-self.problem.c // self.tile.channels)

    @property
    def multiplier(self) -> int:
        """Output channels of an input channel."""
        return self.problem.k // self.problem.c

    @property
    def grid(self) -> int:
        blocks = self.chunks * self.col_tiles * self.channel_tiles * self.multiplier
        return self.problem.n * blocks

    @property
    def takes(self) -> bool:
        """Whether the kernel can be built and launched like this."""
        tile = self.tile
        if self.problem.c % tile.width or (self.multiplier > 1 and tile.width > 1):
            return False
        if tile.width * self.item > _ACCESS or tile.threads % self.pieces:
            return False
        if tile.channels < min(self.problem.c, _SECTOR // self.item):
            return False
        products = self.taps * tile.outputs * tile.width
        if products > _MOST_PRODUCTS or self.copies > _MOST_COPIES:
            return False
        return self.registers <= _MOST_REGISTERS and self.grid < 2**31

    def ctas(self, arch: GpuArch) -> int:
        """Blocks that an SM holds at a time."""
        tile = self.tile
        registers = -(-self.registers // 8) * 8 * tile.threads
        threads = 2048 if arch.sm in (80, 90, 100, 103) else 1536
        shared = self.shared_bytes + 1024  # the system's own
        blocks = (_REGISTERS // registers, threads // tile.threads, 16)
        return max(1, min(*blocks, arch.smem_per_block // shared))


def tiles_of(region: ir.Region, arch: GpuArch) -> Iterator[Tile]:
    """Every tile that fits, with each number of chunks."""
    problem = region.problem
    assert isinstance(problem, ir.ConvProblem)
    rows = {-(-problem.p // chunks) for chunks in _CHUNKS}
    sizes = itertools.product(_WIDTHS, _OUTPUTS, _LANES, _THREADS)
    for width, outputs, lanes, threads in sizes:
        if threads < lanes:
            continue
        shape = {"width": width, "outputs": outputs, "lanes": lanes}
        for stages in _STAGES:
            tile = Tile(**shape, strips=threads // lanes, stages=stages, rows=1)
            found = Shape(tile, region)
            if not found.takes:
                break
            if found.shared_bytes <= arch.smem_per_block:
                made = (dataclasses.replace(tile, rows=each) for each in sorted(rows))
                yield from (t for t in made if Shape(t, region).takes)
                break


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
    blocks = -(-shape.grid // arch.sm_count)
    resident = min(blocks, shape.ctas(arch))
    # What the image's edges save are rows of zeros.
    beyond = (max(0, p.padding[0]) + max(0, p.padding[1])) // p.stride[0]
    steps = (p.p - beyond) / shape.chunks + shape.slots - 1
    products = shape.taps * tile.outputs * tile.width
    saved = products * (1 - shape.edge / shape.slots)
    saved *= 2 * shape.edge * (1 - 1 / shape.chunks) / steps
    instructions = _step_instructions(shape) - saved
    # Of an SM's four schedulers the one with the most warps.
    turns = -(-resident * warps // 4)
    turn = max(turns * instructions, instructions + _STALL)
    own = steps * turn * blocks / resident
    moved = region.bytes_moved / arch.bandwidth * CLOCK
    if tile.channels < min(p.c, _BURST // shape.item):
        moved *= _HALF_BURST
    flying = resident * (tile.stages - 1) * shape.rows_read * shape.columns
    flying *= tile.channels * shape.item
    read = p.n * p.h * p.w * p.c * shape.item / arch.sm_count
    memory = max(moved, read / flying * _LATENCY)
    total = _START + max(own, memory) + _OVERLAP * min(own, memory)
    return Estimate(blocks, steps, instructions, products, memory, total)


def _step_instructions(shape: Shape) -> float:
    """Of a warp."""
    tile, epilogue = shape.tile, shape.region.epilogue
    products = shape.taps * tile.outputs * tile.width
    loads = shape.rows_read * shape.copies * _COPY
    # An access, and for 16-bit inputs a conversion of each value.
    converted = tile.width if shape.item == 2 else 0
    inputs = shape.rows_read * shape.inputs * (1 + converted)
    filters = 0 if shape.resident else shape.taps
    outputs = tile.width * (1.5 + hoist.work(epilogue)) + 3
    outputs += len(epilogue.sides) * (3 + tile.width)
    return products + loads + inputs + filters + tile.outputs * outputs + _STEP
