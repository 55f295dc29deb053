# SPDX-License-Identifier: Apache-2.0
"""The tiles of the depthwise kernel.

Every number here that the kernel needs as well (``jax_bolt/depthwise/depthwise.hpp``)
is a template argument or an int of its recipe.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator

from .. import ir
from ..arch import GpuArch
from . import hoist
from .config import Config, alignment

NAME = "depthwise"

_WIDTHS = (1, 2, 4, 8)  # channels of a thread
_OUTPUTS = (2, 4, 5, 7, 8, 14)
_MOST_OF_FEW_SLOTS = 8  # outputs, where device memory is the limit
_LANES = (8, 16, 32)
_THREADS = (32, 64, 128, 256)
_STAGES = (4, 3, 2)  # the first that fits
_ALL_STAGES, _FEW_ROWS = 8, 8  # for images whose rows may then all be asked for at once
_CHUNKS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)

SCHEDULERS = 4  # of an SM
_REGISTERS = 65536  # of an SM
_MOST_REGISTERS = 208  # of a thread, by the count below; it has 255
_RESIDENT_TAPS = 128  # filter values of a thread in registers, at most
_OTHER_REGISTERS = 24
_MOST_PRODUCTS = 1600  # unrolled: two seconds of nvcc
_MOST_COPIES = 32  # of a thread and row: bits of a register
_ACCESS = 16  # bytes
_SECTOR = 32  # bytes that L2 moves at least
_BANKS = 128  # bytes that shared memory moves at once
_OWN_SHARED, _SHARED_UNIT = 1024, 128  # bytes: the system's own; allocated at once


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """What a block does: ``lanes`` threads of ``width`` channels side by side,
    ``strips`` times ``outputs`` columns, ``rows`` output rows one after the other, a
    ring of ``stages`` steps.

    ``whole``: strips of a row, one or two, of which products with the padding beside it
    are left out; 0 for any number and all products. ``spread``: no SM holds more blocks
    than one has to.
    """

    width: int
    outputs: int
    lanes: int
    strips: int
    stages: int
    rows: int
    whole: int = 0
    spread: int = 0

    @staticmethod
    def of(config: Config) -> Tile:
        """The tile that a config of this template describes."""
        return Tile(**{name: int(value) for name, value in config.params})

    def config(self) -> Config:
        """Names ``whole`` and ``spread`` where they are set."""
        named = dataclasses.asdict(self).items()
        given = {k: v for k, v in named if v or k not in ("whole", "spread")}
        return Config.of(NAME, **given)

    @property
    def threads(self) -> int:
        return self.lanes * self.strips

    @property
    def channels(self) -> int:
        return self.lanes * self.width

    @property
    def cols(self) -> int:
        return self.strips * self.outputs


@dataclasses.dataclass(frozen=True)
class Shape:
    """A tile on a region: the sizes that follow. Without slots, to keep those that are
    asked for often."""

    tile: Tile
    region: ir.Region

    @functools.cached_property
    def problem(self) -> ir.ConvProblem:
        problem = self.region.problem
        assert isinstance(problem, ir.ConvProblem)
        return problem

    @property
    def item(self) -> int:
        """Bytes of an input."""
        return ir.ITEM_BYTES[self.problem.dtype]

    @functools.cached_property
    def taps(self) -> int:
        return self.problem.r * self.problem.s

    @property
    def slots(self) -> int:
        """Output rows that a step's input rows count for."""
        p = self.problem
        return (p.r - 1) * p.dilation[0] // p.stride[0] + 1

    @property
    def leaves_out(self) -> bool:
        """Whether slots that are no row of a chunk are not multiplied."""
        return self.slots >= 5

    @property
    def rows_read(self) -> int:
        """Input rows of a step that any tap reads."""
        p = self.problem
        stride = p.stride[0]
        return len({r * p.dilation[0] % stride for r in range(p.r)})

    def _columns(self, outputs: int) -> int:
        p = self.problem
        return (outputs - 1) * p.stride[1] + (p.s - 1) * p.dilation[1] + 1

    @functools.cached_property
    def inputs(self) -> int:
        """Input columns of a thread."""
        return self._columns(self.tile.outputs)

    @functools.cached_property
    def inside(self) -> tuple[int, int]:
        """The first of a thread's input columns that are read, and the end of them."""
        if not self.tile.whole:
            return 0, self.inputs
        p = self.problem
        left = right = p.padding[2]
        if (
            self.tile.whole == 2
        ):  # what is on the left of the right one, as it is mirrored
            right = self._columns(p.q) - p.w - left
        first, end = min(left, right), max(left, right) + p.w
        return max(0, min(first, self.inputs)), min(end, self.inputs)

    @property
    def columns(self) -> int:
        """Input columns of a block."""
        first, end = self.inside
        return self._columns(self.tile.cols) - (self.inputs - (end - first))

    @property
    def piece(self) -> int:
        """Bytes that are copied at once."""
        return alignment(self.problem.c, self.problem.dtype) * self.item

    @property
    def tap_piece(self) -> int:
        """Bytes of the filter that are copied at once."""
        return self.piece if self.multiplier == 1 else self.item

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
        of_value = self.item  # and as float32, where that is not in registers
        if not self.resident and self.item < 4:
            of_value += 4
        filter_bytes = self.taps * self.tile.channels * of_value
        return filter_bytes + self.tile.stages * self.step_bytes

    def launch_bytes(self, arch: GpuArch) -> int:
        """Shared memory that a block asks for.

        Blocks go to the first SM with room for one, and SMs become free of the kernel
        ahead one after the other: the first would take more than their share. They do
        not where that many leave too little shared memory for one more.
        """
        if not self.tile.spread:
            return self.shared_bytes
        one_more = self.share(arch) + 1
        least = (arch.smem_per_block + _OWN_SHARED) // one_more + 1 - _OWN_SHARED
        return max(self.shared_bytes, -(-least // _SHARED_UNIT) * _SHARED_UNIT)

    def share(self, arch: GpuArch) -> int:
        """Blocks of the launch for each SM."""
        return -(-self.grid // arch.sm_count)

    @functools.cached_property
    def resident(self) -> bool:
        """Whether the filter is in registers."""
        few = self.taps * self.tile.width <= _RESIDENT_TAPS
        return few and self._registers(self.taps) <= _MOST_REGISTERS

    @functools.cached_property
    def registers(self) -> int:
        """Of a thread, about."""
        return self._registers(self.taps if self.resident else 2)

    def _registers(self, taps: int) -> int:
        tile, epilogue = self.tile, self.region.epilogue
        sides = sum(
            tile.outputs * max(1, tile.width * ir.ITEM_BYTES[d] // 4)
            for d in epilogue.sides
        )
        first, end = self.inside
        values = self.slots * tile.outputs + taps + end - first
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

    @functools.cached_property
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
        if tile.outputs > _MOST_OF_FEW_SLOTS and not self.leaves_out:
            return False
        products = self.taps * tile.outputs * tile.width
        if products > _MOST_PRODUCTS or self.copies > _MOST_COPIES:
            return False
        if tile.whole and not self._leaves_padding:
            return False
        return self.registers <= _MOST_REGISTERS and self.grid < 2**31

    @property
    def _leaves_padding(self) -> bool:
        """Whether a row has that many strips, and some of their inputs are padding."""
        tile, (first, end) = self.tile, self.inside
        row = tile.strips == 1 and self.col_tiles == tile.whole
        taken = self.resident or tile.whole == 1
        return row and taken and 0 < end - first < self.inputs

    def spreads(self, arch: GpuArch) -> bool:
        """Whether an SM may take more blocks than its share: it has room for them, and
        kernels follow each other without a gap in which all SMs are free."""
        return arch.sm >= 90 and self.share(arch) <= self.ctas(arch)

    def ctas(self, arch: GpuArch) -> int:
        """Blocks that an SM holds at a time."""
        warps = self.tile.threads // 32
        # A warp's registers are in the scheduler's part of them that it belongs to.
        of_warp = -(-self.registers // 8) * 8 * 32
        fitting = _REGISTERS // SCHEDULERS // of_warp * SCHEDULERS
        most = 64 if arch.sm in (80, 90, 100, 103) else 48
        shared = arch.smem_per_block + _OWN_SHARED
        shared //= self.shared_bytes + _OWN_SHARED
        return max(1, min(fitting // warps, most // warps, 16, shared))


def tiles_of(region: ir.Region, arch: GpuArch) -> Iterator[Tile]:
    """Every tile that fits, with each number of chunks."""
    problem = region.problem
    assert isinstance(problem, ir.ConvProblem)
    rows = sorted({-(-problem.p // chunks) for chunks in _CHUNKS})
    sizes = itertools.product(_WIDTHS, _OUTPUTS, _LANES, _THREADS, (0, 1, 2))
    for width, outputs, lanes, threads, whole in sizes:
        if threads < lanes:
            continue
        shape = {"width": width, "outputs": outputs, "lanes": lanes, "whole": whole}
        few = problem.p <= _FEW_ROWS
        for stages in (_ALL_STAGES, *_STAGES) if few else _STAGES:
            tile = Tile(**shape, strips=threads // lanes, stages=stages, rows=1)
            found = Shape(tile, region)
            if not found.takes:
                break
            if found.shared_bytes <= arch.smem_per_block:
                for each in rows:
                    made = dataclasses.replace(tile, rows=each)
                    yield from _placed(made, region, arch)
                if stages in _STAGES:
                    break


def _placed(tile: Tile, region: ir.Region, arch: GpuArch) -> Iterator[Tile]:
    """A tile, if its launch is not too large, and also spread where that changes it."""
    shape = Shape(tile, region)
    if shape.takes:
        yield tile
        if shape.spreads(arch):
            yield dataclasses.replace(tile, spread=1)
