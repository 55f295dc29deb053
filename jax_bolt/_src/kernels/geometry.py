# SPDX-License-Identifier: Apache-2.0
"""How the Hopper implicit GEMM lies over a problem: boxes, tiles, taps. Pure integers.

The input pixels of a tile come as one box per *phase* of a 64-channel chunk: all taps
whose offset has the same remainder by the stride read the same box, each at another
start. A box's rows are ``pitch`` pixels long, which is shorter than an output row plus
the filter's reach where what lies right of the image and left of its next row are both
zeros, and may then be the same pixels. The same holds for whole images, downwards.
``jax_bolt/implicit_gemm/geometry.hpp`` says what every number is to the kernel.
"""

from __future__ import annotations

import dataclasses
import functools
import math

from .. import ir
from . import recipe
from .packing import Packing
from .recipe import TensorMap

BLOCK = 64  # output channels of a wgmma
ROW = 128  # bytes of a pixel's input channels in shared memory: the widest swizzle
STEP = 32  # bytes of them that one wgmma takes
MAX_BOX = 256  # TMA's limit on a box's extents
MAX_PHASES = 16
MAX_TAPS = 64


@dataclasses.dataclass(frozen=True, slots=True)
class Image:
    """A problem as a conv: a product is a 1x1 conv over one row of M pixels.

    ``pixel`` and ``row`` are elements from one input pixel or row to the next.
    ``k_outer``: the filter has its output channels outermost (KRSC), not innermost.
    With ``packing`` it is the conv that a prologue leaves, its operands a workspace.
    """

    n: int
    h: int
    w: int
    c: int
    k: int
    r: int
    s: int
    p: int
    q: int
    pixel: int
    row: int
    stride: tuple[int, int]
    padding: tuple[int, int]  # top, left
    dilation: tuple[int, int]
    k_outer: bool
    filters: int  # 1, or one for every image
    dtype: ir.DType
    packing: Packing | None = None

    @staticmethod
    def of(problem: ir.Problem) -> Image:
        if isinstance(problem, ir.GemmProblem):
            g = problem
            return Image(
                *(g.batch, 1, g.m, g.k, g.n, 1, 1, 1, g.m, g.k, g.m * g.k),
                stride=(1, 1),
                padding=(0, 0),
                dilation=(1, 1),
                k_outer=g.b_layout == "col",
                filters=g.batch,
                dtype=g.dtype,
            )
        packing = Packing.of(problem)
        p = problem if packing is None else packing.packed
        image = Image(
            *(p.n, p.h, p.w, p.c, p.k, p.r, p.s, p.p, p.q, p.c, p.w * p.c),
            stride=p.stride,
            padding=(p.padding[0], p.padding[2]),
            dilation=p.dilation,
            k_outer=p.filter_layout == "krsc",
            filters=1,
            dtype=p.dtype,
            packing=packing,
        )
        return image.with_wide_pixels if p.padding[2:] == (0, 0) else image

    @property
    def with_wide_pixels(self) -> Image:
        """A filter's row as channels of one wide pixel, where that saves chunks.

        Neighbours overlap in memory, which a tensor map's strides can say. So a stem in
        its space-to-depth form has a full chunk in each of 4 taps instead of one, three
        quarters of it zeros, in each of 16. For images that are not padded in width: a
        box's zeros are whole pixels.
        """
        c = self.s * self.c
        narrow = self.s * self.chunks
        if self.stride[1] != 1 or self.dilation[1] != 1:
            return self
        if -(-c // self.chunk) >= narrow:
            return self
        return dataclasses.replace(self, w=self.q, c=c, s=1)

    @property
    def item(self) -> int:
        """Bytes of an element."""
        return ir.ITEM_BYTES[self.dtype]

    @property
    def chunk(self) -> int:
        """Input channels of a pixel in shared memory."""
        return ROW // self.item

    @property
    def chunks(self) -> int:
        return -(-self.c // self.chunk)

    @property
    def k_steps(self) -> int:
        """Products in a chunk, those of zeros alone left out."""
        return -(-min(ROW, self.c * self.item) // STEP)

    @property
    def is_line(self) -> bool:
        """One tap, one row: any run of pixels is a tile, and no image is in sight."""
        return (self.r, self.s, self.h, self.p) == (1, 1, 1, 1) and self.stride[1] == 1

    @property
    def folds(self) -> bool:
        """Whether strides become a view's dimensions, so that a box is contiguous.

        Else TMA's element steps skip what lies between.
        """
        return (
            self.stride != (1, 1)
            and self.c % self.chunk == 0
            and self.h % self.stride[0] == 0
            and self.w % self.stride[1] == 0
        )

    @property
    def steps(self) -> tuple[int, int]:
        """Pixels of the map between two that a box takes, down and right."""
        return (1, 1) if self.folds else self.stride

    def channel_tiles(self, filter_blocks: int) -> int:
        """Tiles of ``filter_blocks`` times 64 output channels."""
        return -(-self.k // (BLOCK * filter_blocks))


@dataclasses.dataclass(frozen=True, slots=True)
class Axis:
    """One spatial axis of the taps that a phase has: its remainder and its offsets.

    Output ``o`` reads the phase's pixel ``o + base + offset``; ``size`` pixels exist.
    """

    remainder: int
    size: int
    base: int
    taps: tuple[tuple[int, int], ...]  # (filter position, offset)

    @property
    def reach(self) -> int:
        return max(offset for _, offset in self.taps)

    def pitch(self, outputs: int) -> int:
        """Pixels from one line to the next: enough that a tap beyond the end of a line
        finds zeros, where it should and nowhere else."""
        apart = outputs + self.reach
        shared = max(self.size - self.base, apart + self.base, outputs)
        return min(apart, shared)


@functools.lru_cache(maxsize=1024)
def axes(
    size: int, taps: int, stride: int, dilation: int, padding: int
) -> tuple[Axis, ...]:
    """The phases of one axis."""
    found: dict[int, list[tuple[int, int]]] = {}
    for tap in range(taps):
        whole, remainder = divmod(tap * dilation - padding, stride)
        found.setdefault(remainder, []).append((tap, whole))
    result = []
    for remainder, group in sorted(found.items()):
        base = min(whole for _, whole in group)
        result.append(
            Axis(
                remainder,
                -(-(size - remainder) // stride),
                base,
                tuple((tap, whole - base) for tap, whole in group),
            )
        )
    return tuple(result)


def rows_of(image: Image) -> tuple[Axis, ...]:
    return axes(image.h, image.r, image.stride[0], image.dilation[0], image.padding[0])


def cols_of(image: Image) -> tuple[Axis, ...]:
    return axes(image.w, image.s, image.stride[1], image.dilation[1], image.padding[1])


@dataclasses.dataclass(frozen=True, slots=True)
class Block:
    """One accumulator's outputs: ``images`` whole ones, or ``rows`` by ``cols``."""

    images: int
    rows: int
    cols: int


@dataclasses.dataclass(frozen=True)  # no slots: the properties are kept
class Layout:
    """A block's pixels in shared memory and a tile of ``count`` blocks."""

    image: Image
    block: Block
    count: int
    pixels: int  # N of the wgmma

    @functools.cached_property
    def whole_images(self) -> bool:
        return self.block.rows >= self.image.p and not self.image.is_line

    @functools.cached_property
    def whole_rows(self) -> bool:
        return self.block.cols >= self.image.q and not self.image.is_line

    @functools.cached_property
    def pitch(self) -> int:
        found = cols_of(self.image)
        if self.image.is_line:
            return self.pixels
        if self.whole_rows:
            return max(axis.pitch(self.image.q) for axis in found)
        return self.block.cols + max(axis.reach for axis in found)

    @functools.cached_property
    def image_rows(self) -> int:
        """Rows of one image in a box."""
        found = rows_of(self.image)
        if self.whole_images:
            # The box may end before the last line's taps do: what follows is zeros.
            return max(axis.pitch(self.image.p) for axis in found)
        return self.tile_rows + max(axis.reach for axis in found)

    @functools.cached_property
    def tile_images(self) -> int:
        return self.block.images * self.count if self.whole_images else 1

    @functools.cached_property
    def tile_rows(self) -> int:
        if self.whole_images:
            return self.image.p
        return 1 if self.image.is_line else self.block.rows * self.count

    @functools.cached_property
    def tile_cols(self) -> int:
        if self.image.is_line:
            return self.pixels * self.count
        return min(self.block.cols, self.image.q)

    @functools.cached_property
    def used(self) -> int:
        """Pixels from a block's first output to its last."""
        if self.image.is_line:
            return self.pixels
        last = (self.block.rows - 1) * self.pitch + self.tile_cols
        if self.whole_images:
            images = (self.block.images - 1) * self.image_rows
            last = (images + self.image.p - 1) * self.pitch + self.tile_cols
        return last

    @functools.cached_property
    def block_pixels(self) -> int:
        """Pixels from one block to the next in a stage."""
        if self.image.is_line:
            return self.pixels
        rows = self.block.rows
        if self.whole_images:
            rows = self.block.images * self.image_rows
        return rows * self.pitch

    @functools.cached_property
    def loads(self) -> int:
        if not self.image.is_line or self.tile_cols <= MAX_BOX:
            return 1
        return self.count

    @functools.cached_property
    def box(self) -> tuple[int, int, int]:
        """Images, rows and columns of one load."""
        if self.image.is_line:
            return 1, 1, self.tile_cols // self.loads
        return self.tile_images, self.image_rows, self.pitch

    @functools.cached_property
    def source_box(self) -> tuple[int, int, int]:
        """The same, with the pixels that the box steps over."""
        images, rows, cols = self.box
        down, right = self.image.steps
        return images, (rows - 1) * down + 1, (cols - 1) * right + 1

    @functools.cached_property
    def store_box(self) -> tuple[int, int, int]:
        if self.image.is_line:
            return 1, 1, self.pixels
        if not self.whole_rows:
            # Pixels between the rows would be stored over other tiles' outputs.
            rows = self.block.rows if self.pitch == self.tile_cols else 1
            return 1, rows, self.tile_cols
        if self.whole_images:
            return self.block.images, self.image_rows, self.pitch
        return 1, self.block.rows, self.pitch

    @functools.cached_property
    def stores(self) -> int:
        if self.whole_rows or self.image.is_line or self.pitch == self.tile_cols:
            return 1
        return self.block.rows

    @functools.cached_property
    def load_bytes(self) -> int:
        images, rows, cols = self.box
        return images * rows * cols * ROW

    @functools.cached_property
    def stage_bytes(self) -> int:
        reach = max(offset for _, offset, _ in self.taps)
        read = (self.count - 1) * self.block_pixels + self.pixels + reach
        return round_up(max(self.loads * self.load_bytes, read * ROW), 1024)

    @functools.cached_property
    def slot_bytes(self) -> int:
        images, rows, cols = self.store_box
        stored = (self.stores - 1) * self.pitch + images * rows * cols
        return round_up(max(self.pixels, stored) * ROW, 1024)

    @functools.cached_property
    def tiles(self) -> tuple[int, int, int]:
        """Image groups, row tiles and column tiles."""
        i = self.image
        return (
            -(-i.n // self.tile_images),
            -(-i.p // self.tile_rows),
            -(-i.q // self.tile_cols),
        )

    @functools.cached_property
    def phases(self) -> list[tuple[Axis, Axis]]:
        return [(r, c) for r in rows_of(self.image) for c in cols_of(self.image)]

    @functools.cached_property
    def taps(self) -> list[tuple[int, int, int]]:
        """(phase, offset in pixels, position in the filter) in the order of reading."""
        pitch = self.pitch
        return [
            (phase, down * pitch + right, r * self.image.s + s)
            for phase, (rows, cols) in enumerate(self.phases)
            for r, down in rows.taps
            for s, right in cols.taps
        ]

    @property
    def filter_steps(self) -> int:
        """Filter stages that a tile reads: one for every tap of every chunk."""
        return self.image.chunks * len(self.taps)

    @property
    def pixel_steps(self) -> int:
        """Pixel stages that a tile reads: one for every phase of every chunk."""
        return self.image.chunks * len(self.phases)

    def problem(self) -> str | None:
        """Why the block does not fit TMA or the wgmma, or None."""
        if max(*self.source_box, *self.store_box) > MAX_BOX:
            return "a box above 256 pixels"
        if self.used > self.pixels:
            return "more pixels than the accumulator has"
        return None

    def integers(self, filter_blocks: int) -> tuple[int, ...]:
        """The kernel's Geometry; ``filter_blocks`` of 64 channels make a tile."""
        i, phases, taps = self.image, self.phases, self.taps
        _, row_tiles, col_tiles = self.tiles
        channel_tiles = i.channel_tiles(filter_blocks)
        down, right = i.steps
        images, rows, cols = self.store_box
        whole, line = self.whole_images, i.is_line
        numbers = [
            i.k,
            *(math.prod(self.tiles) * channel_tiles, channel_tiles),
            *(col_tiles, row_tiles),
            *(self.tile_images, self.tile_rows, self.tile_cols),
            *(i.chunks, len(phases), down, right),
            *(self.loads, self.box[2], self.load_bytes, self.stage_bytes),
            *(
                self.block_pixels * ROW,
                self.block.images if whole else 0,
                0 if whole or line else self.block.rows,
                self.pixels if line else 0,
            ),
            *(self.stores, self.pitch * ROW, self.slot_bytes),
            images * rows * cols * ROW,
            int(i.filters > 1),
        ]
        numbers += _filled(
            [c.remainder * i.c if i.folds else 0 for _, c in phases], MAX_PHASES
        )
        numbers += _filled(
            [c.base if i.folds else c.base * right + c.remainder for _, c in phases],
            MAX_PHASES,
        )
        numbers += _filled(
            [r.remainder if i.folds else 0 for r, _ in phases], MAX_PHASES
        )
        numbers += _filled(
            [r.base if i.folds else r.base * down + r.remainder for r, _ in phases],
            MAX_PHASES,
        )
        numbers += _filled([len(r.taps) * len(c.taps) for r, c in phases], MAX_PHASES)
        numbers += _filled([offset * ROW for _, offset, _ in taps], MAX_TAPS)
        numbers += _filled([at for _, _, at in taps], MAX_TAPS)
        return tuple(numbers)

    def maps(self, filter_blocks: int, epilogue: ir.Epilogue) -> tuple[TensorMap, ...]:
        """Pixels, filters, output and (at least one) side input."""
        i = self.image
        dtype = recipe.DTYPES.index(i.dtype)
        item = i.item
        a, b, filter_offset = recipe.A, recipe.B, 0
        if i.packing is not None:
            a = b = recipe.WORKSPACE
            filter_offset = i.packing.filter_offset
        sh, sw = i.stride if i.folds else (1, 1)
        row = i.row * item
        images, rows, cols = self.source_box
        down, right = i.steps
        pixels = TensorMap(
            operand=a,
            dtype=dtype,
            dims=(sw * i.c, i.w // sw, sh, i.h // sh, i.n),
            strides=(sw * i.pixel * item, row, sh * row, i.h * row),
            box=(i.chunk, cols, 1, rows, images),
            steps=(1, right, 1, down, 1),
            swizzle=128,
        )
        taps = i.r * i.s
        if i.k_outer:
            sizes = (i.c, taps, i.k, i.filters)
            box = (i.chunk, 1, BLOCK * filter_blocks, 1)
        else:
            sizes = (i.k, i.c, taps, i.filters)
            box = (BLOCK, i.chunk, 1, 1)
        filters = _contiguous(b, dtype, sizes, box, filter_offset)
        images, rows, cols = self.store_box
        out = (i.k, i.q, i.p, i.n)

        def full(operand: int, dtype: ir.DType) -> TensorMap:
            tile = (ROW // ir.ITEM_BYTES[dtype], cols, rows, images)
            return _contiguous(operand, recipe.DTYPES.index(dtype), out, tile)

        result = full(recipe.D, epilogue.out_dtype)
        sides = [full(recipe.side(n), dtype) for n, dtype in enumerate(epilogue.sides)]
        return (pixels, filters, result, *(sides or [result]))


def _contiguous(
    operand: int,
    dtype: int,
    dims: tuple[int, ...],
    box: tuple[int, ...],
    offset: int = 0,
) -> TensorMap:
    """A map of a contiguous array, innermost dimension first."""
    strides, stride = [], ir.ITEM_BYTES[recipe.DTYPES[dtype]]
    for size in dims[:-1]:
        stride *= size
        strides.append(stride)
    return TensorMap(
        operand=operand,
        dtype=dtype,
        dims=dims,
        strides=tuple(strides),
        box=box,
        steps=(1,) * len(dims),
        swizzle=128,
        offset=offset,
    )


def _filled(values: list[int], size: int) -> list[int]:
    return values + [0] * (size - len(values))


def round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
