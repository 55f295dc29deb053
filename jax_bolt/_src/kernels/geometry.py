# SPDX-License-Identifier: Apache-2.0
"""How the Hopper implicit GEMM lies over a problem: boxes, tiles, taps. Pure integers.

The input pixels of a tile come as one box per phase of a 64-channel chunk: a tap is
another start in its phase's box. A box's rows are ``pitch`` pixels long, which is
shorter than an output row plus the filter's reach where what lies right of the image
and left of its next row are both zeros, and may then be the same pixels. The same holds
for whole images, downwards.

With a pool an output is the maximum of a window of results, or an image's mean. A block
is then one of outputs, and its accumulator has the results that these need: those of
windows that overlap are computed by both of two blocks. A mean is taken in the slot
where the results would have been left, and side inputs arrive.
``jax_bolt/implicit_gemm/geometry.hpp`` says what every number is to the kernel.
"""

from __future__ import annotations

import dataclasses
import functools
import math

from .. import ir
from . import recipe
from .image import ROW, Axis, Image, Windows, cols_of, corners, rows_of
from .maps import contiguous, filters_map
from .recipe import TensorMap

MAX_BOX = 256  # TMA's limit on a box's extents
MAX_PHASES = 16
MAX_TAPS = 64
MAX_RINGS = (8, 64, 8)  # stages of pixels, filters and stores


@dataclasses.dataclass(frozen=True, slots=True)
class Block:
    """What leaves one accumulator: ``images`` whole ones, or ``rows`` by ``cols``."""

    images: int
    rows: int
    cols: int


@dataclasses.dataclass(frozen=True, slots=True)
class Rings:
    """Stages in shared memory; with ``resident`` (1 or 0) the filters' hold a whole
    filter, loaded once. ``pixels`` and ``filters`` are one step of the main loop each,
    ``stores`` a block's results and side inputs."""

    pixels: int = 0
    filters: int = 0
    stores: int = 0
    resident: int = 0


NO_RINGS = Rings()


@dataclasses.dataclass(frozen=True)  # no slots: the properties are kept
class Layout:
    """A block's pixels in shared memory and a tile of ``count`` blocks, each of which
    leaves in ``parts``."""

    image: Image
    block: Block
    count: int
    pixels: int  # N of the wgmma
    parts: int = 1

    @functools.cached_property
    def windows(self) -> tuple[Windows, Windows]:
        return self.image.windows

    @functools.cached_property
    def whole_images(self) -> bool:
        down, _ = self.windows
        return self.block.rows >= down.outputs and not self.image.is_line

    @functools.cached_property
    def whole_rows(self) -> bool:
        _, right = self.windows
        return self.block.cols >= right.outputs and not self.image.is_line

    @functools.cached_property
    def results(self) -> tuple[int, int]:
        """Rows and columns of one image's results in a block."""
        down, right = self.windows
        return (
            down.read if self.whole_images else down.span(self.block.rows),
            right.read if self.whole_rows else right.span(self.block.cols),
        )

    @functools.cached_property
    def origin(self) -> tuple[int, int]:
        """Row and column of the first result of a tile at the first output. What is
        whole begins with the image, all else with a window."""
        down, right = self.windows
        return (
            0 if self.whole_images else -down.padding,
            0 if self.whole_rows else -right.padding,
        )

    @functools.cached_property
    def pitch(self) -> int:
        found = cols_of(self.image)
        if self.image.is_line:
            return self.pixels
        _, cols = self.results
        if self.whole_rows:
            return max(axis.pitch(cols) for axis in found)
        return cols + max(axis.reach for axis in found)

    @functools.cached_property
    def image_rows(self) -> int:
        """Rows of one image in a box."""
        found = rows_of(self.image)
        if self.whole_images:
            # The box may end before the last line's taps do: what follows is zeros.
            return max(axis.pitch(self.results[0]) for axis in found)
        down, _ = self.windows
        return down.span(self.tile_rows) + max(axis.reach for axis in found)

    @functools.cached_property
    def tile_images(self) -> int:
        return self.block.images * self.count if self.whole_images else 1

    @functools.cached_property
    def tile_rows(self) -> int:
        down, _ = self.windows
        if self.whole_images:
            return down.outputs
        return 1 if self.image.is_line else self.block.rows * self.count

    @functools.cached_property
    def tile_cols(self) -> int:
        if self.image.is_line:
            return self.pixels * self.count
        _, right = self.windows
        return min(self.block.cols, right.outputs)

    @functools.cached_property
    def used(self) -> int:
        """Pixels from a block's first result to its last."""
        if self.image.is_line:
            return self.pixels
        rows, cols = self.results
        if self.whole_images:
            rows += (self.block.images - 1) * self.image_rows
        return (rows - 1) * self.pitch + cols

    @functools.cached_property
    def block_pixels(self) -> int:
        """Pixels from one block to the next in a stage."""
        if self.image.is_line:
            return self.pixels
        down, _ = self.windows
        rows = self.block.rows * down.stride
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
            return 1, 1, self.pixels // self.parts
        if self.image.pool is not None:
            rows = min(self.block.rows, self.tile_rows)
            return self.block.images, rows, self.tile_cols
        if not self.whole_rows:
            # Pixels between the rows would be stored over other tiles' outputs.
            rows = self.block.rows if self.pitch == self.tile_cols else 1
            return 1, rows, self.tile_cols
        if self.whole_images:
            return self.block.images, self.image_rows, self.pitch
        return 1, self.block.rows, self.pitch

    @functools.cached_property
    def side_box(self) -> tuple[int, int, int]:
        """Of a side input, which has as many pixels as the results."""
        if self.pools_in_place:
            return self.block.images, self.image_rows, self.pitch
        return self.store_box

    @functools.cached_property
    def pools_in_place(self) -> bool:
        return self.image.pool is not None and self.image.pool.is_mean

    @functools.cached_property
    def stores(self) -> int:
        gaps = self.pitch != self.tile_cols and self.image.pool is None
        if self.whole_rows or self.image.is_line or not gaps:
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
        images, rows, cols = self.side_box
        stored = (self.stores - 1) * self.pitch + images * rows * cols
        if self.image.pool is None or self.pools_in_place:
            stored = max(self.pixels // self.parts, stored)
        return round_up(stored * ROW, 1024)

    @functools.cached_property
    def results_bytes(self) -> int:
        """A warpgroup's results on their way to the pool, besides its slots."""
        if self.image.pool is None or self.pools_in_place:
            return 0
        return round_up(self.pixels * ROW, 1024)

    @functools.cached_property
    def tiles(self) -> tuple[int, int, int]:
        """Image groups, row tiles and column tiles."""
        down, right = self.windows
        return (
            -(-self.image.n // self.tile_images),
            -(-down.outputs // self.tile_rows),
            -(-right.outputs // self.tile_cols),
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

    def problem(self) -> str | None:
        """Why the block does not fit TMA or the wgmma, or None."""
        if max(*self.source_box, *self.store_box, *self.side_box) > MAX_BOX:
            return "a box above 256 pixels"
        if self.used > self.pixels:
            return "more pixels than the accumulator has"
        return None

    def tile_count(self, filter_blocks: int) -> int:
        return math.prod(self.tiles) * self.image.channel_tiles(filter_blocks)

    def integers(
        self, filter_blocks: int, rings: Rings, *, held: bool = False
    ) -> tuple[int, ...]:
        """The kernel's Geometry; ``filter_blocks`` of 64 channels make a tile.

        ``held`` as ``CubinTemplate.recipe`` has it; what a prologue packs is not.
        """
        i, phases, taps = self.image, self.phases, self.taps
        _, row_tiles, col_tiles = self.tiles
        channel_tiles = i.channel_tiles(filter_blocks)
        down, right = i.steps if i.source is None else i.source.stride
        top, left = self.origin
        strides = [axis.stride for axis in self.windows]
        whole, line = self.whole_images, i.is_line
        numbers = [
            *(i.k, i.k // i.groups, i.c),
            *(self.tile_count(filter_blocks), channel_tiles),
            *(col_tiles, row_tiles),
            *(self.tile_images, self.tile_rows, self.tile_cols),
            *(i.chunks, len(phases), down * strides[0], right * strides[1]),
            *dataclasses.astuple(rings),
            *(self.loads, self.box[2], self.load_bytes, self.stage_bytes),
            *(
                self.block_pixels * ROW,
                self.block.images if whole else 0,
                0 if whole or line else self.block.rows,
                self.pixels if line else 0,
            ),
            *(self.stores, self.pitch * ROW, self.slot_bytes),
            math.prod(self.side_box) * ROW,
            int(i.filters > 1),
            int(held and i.packing is None),
            *self._images,
        ]
        numbers += _filled(
            [c.remainder * i.channels if i.folds else 0 for _, c in phases], MAX_PHASES
        )

        def start(axis: Axis, origin: int, step: int) -> int:
            # In pixels of the map, of which a fold's remainder is another dimension.
            return (axis.base + origin) * step + (0 if i.folds else axis.remainder)

        numbers += _filled([start(c, left, right) for _, c in phases], MAX_PHASES)
        numbers += _filled(
            [r.remainder if i.folds else 0 for r, _ in phases], MAX_PHASES
        )
        numbers += _filled([start(r, top, down) for r, _ in phases], MAX_PHASES)
        numbers += _filled([len(r.taps) * len(c.taps) for r, c in phases], MAX_PHASES)
        numbers += _filled([offset * ROW for _, offset, _ in taps], MAX_TAPS)
        numbers += _filled([at for _, _, at in taps], MAX_TAPS)
        return (*numbers, *self._pooled)

    @property
    def _pooled(self) -> tuple[int, ...]:
        """What PooledGeometry has besides."""
        if self.image.pool is None:
            return ()
        images, rows, cols = self.store_box
        down, right = self.windows
        top, left = self.origin
        return (
            *(images * rows * cols, rows, cols),
            *(self.image_rows, self.pitch, self.results_bytes),
            *(self.image.p, self.image.q, top, left),
            *(-down.padding - top, -right.padding - left),
        )

    @property
    def _images(self) -> tuple[int, int, int, int]:
        """Of the images that a line is gathered from: an output's rows and columns, and
        where its first tap reads."""
        source = self.image.source
        if source is None:
            return 0, 0, 0, 0
        left, top, *_ = corners(source)
        return source.p, source.q, top, left

    def maps(self, filter_blocks: int, epilogue: ir.Epilogue) -> tuple[TensorMap, ...]:
        """Pixels, filters, outputs and (at least one) side input."""
        i = self.image
        dtype = recipe.DTYPES.index("tf32" if i.dtype == "f32" else i.dtype)
        a, b, filter_offset = recipe.A, recipe.B, 0
        if i.packing is not None:
            a = b = recipe.WORKSPACE
            filter_offset = i.packing.filter_offset
        pixels = self._boxes(a, dtype) if i.source is None else self._columns(a, dtype)
        filters = filters_map(
            *(b, dtype, i.r * i.s, i.c, i.k, i.k_outer),
            blocks=filter_blocks,
            count=i.filters,
            offset=filter_offset,
        )
        outputs = [
            self.tensor(recipe.output(n), output.dtype)
            for n, output in enumerate(epilogue.outputs)
        ]
        sides = [self.side(n, dtype) for n, dtype in enumerate(epilogue.sides)]
        return (pixels, filters, *outputs, *(sides or outputs[:1]))

    def tensor(
        self, operand: int, dtype: ir.DType, channels: int | None = None
    ) -> TensorMap:
        """A map of an output, of as many channels as there are."""
        down, right = self.windows
        sizes = (channels or self.image.k, right.outputs, down.outputs)
        return self._stored(operand, dtype, sizes, self.store_box)

    def side(self, number: int, dtype: ir.DType) -> TensorMap:
        """A map of a side input."""
        if not self.pools_in_place:
            return self.tensor(recipe.side(number), dtype)
        i = self.image
        return self._stored(recipe.side(number), dtype, (i.k, i.q, i.p), self.side_box)

    def _stored(
        self,
        operand: int,
        dtype: ir.DType,
        sizes: tuple[int, int, int],
        box: tuple[int, int, int],
    ) -> TensorMap:
        """A map of ``sizes``, channels first, of each image."""
        images, rows, cols = box
        channels = ROW // ir.ITEM_BYTES[dtype]
        return contiguous(
            operand,
            recipe.DTYPES.index(dtype),
            (*sizes, self.image.n),
            (channels, cols, rows, images),
        )

    def _boxes(self, operand: int, dtype: int) -> TensorMap:
        """Input pixels as boxes of rows and columns."""
        i = self.image
        sh, sw = i.stride if i.folds else (1, 1)
        row = i.row * i.item
        images, rows, cols = self.source_box
        down, right = i.steps
        return TensorMap(
            operand=operand,
            dtype=dtype,
            dims=(sw * i.channels, i.w // sw, sh, i.h // sh, i.n),
            strides=(sw * i.pixel * i.item, row, sh * row, i.h * row),
            box=(i.chunk, cols, 1, rows, images),
            steps=(1, right, 1, down, 1),
            swizzle=128,
        )

    def _columns(self, operand: int, dtype: int) -> TensorMap:
        """Input pixels as columns of the im2col matrix."""
        i = self.image.source
        assert i is not None
        row = i.row * i.item
        return TensorMap(
            operand=operand,
            dtype=dtype,
            dims=(i.channels, i.w, i.h, i.n),
            strides=(i.pixel * i.item, row, i.h * row),
            box=(i.chunk, self.box[2], 1, 1),
            steps=(1, i.stride[1], i.stride[0], 1),
            swizzle=128,
            corners=corners(i),
        )


def _filled(values: list[int], size: int) -> list[int]:
    return values + [0] * (size - len(values))


def round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
