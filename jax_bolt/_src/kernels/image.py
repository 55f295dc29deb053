# SPDX-License-Identifier: Apache-2.0
"""A problem as the Hopper implicit GEMM sees it: an image, and the phases of its taps.

All taps whose offset has the same remainder by the stride are one *phase*: they read
the same pixels of a tile, each from another start.
"""

from __future__ import annotations

import dataclasses
import functools

from .. import ir
from .packing import Packing

BLOCK = 64  # output channels of a wgmma
ROW = 128  # bytes of a pixel's input channels in shared memory: the widest swizzle
STEP = 32  # bytes of them that one wgmma takes


@dataclasses.dataclass(frozen=True, slots=True)
class Image:
    """A problem as a conv: a product is a 1x1 conv over one row of M pixels.

    ``pixel`` and ``row`` are elements from one input pixel or row to the next.
    ``k_outer``: the filter has its output channels outermost (KRSC), not innermost.
    ``c`` are the input channels of one of ``groups``, ``k`` the output channels of all.
    With ``packing`` it is the conv that a prologue leaves, its operands a workspace.
    With ``source`` it is a line of all that image's output pixels (``line_of``).
    ``p`` and ``q`` are the conv's results, whether or not a ``pool`` follows.
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
    source: Image | None = None
    groups: int = 1
    pool: ir.Pool | None = None

    @staticmethod
    def of_region(region: ir.Region) -> Image:
        return dataclasses.replace(Image.of(region.problem), pool=region.pool)

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
            *(p.n, p.h, p.w, p.group_channels, p.k, p.r, p.s, p.p, p.q),
            *(p.c, p.w * p.c),
            stride=p.stride,
            padding=(p.padding[0], p.padding[2]),
            dilation=p.dilation,
            k_outer=p.filter_layout == "krsc",
            filters=1,
            dtype=p.dtype,
            packing=packing,
            groups=p.groups,
        )
        alone = p.groups == 1 and p.padding[2:] == (0, 0)
        return image.with_wide_pixels if alone else image

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
    def channels(self) -> int:
        """Input channels of all groups."""
        return self.c * self.groups

    @property
    def k_steps(self) -> int:
        """Products in a chunk, those of zeros alone left out."""
        return -(-min(ROW, self.c * self.item) // STEP)

    @property
    def last_steps(self) -> int:
        """The same of the last chunk, which may have fewer."""
        row = self.c * self.item
        return -(-(row - ROW * (self.chunks - 1)) // STEP)

    @property
    def is_line(self) -> bool:
        """Any run of pixels is a tile, and no image is in sight: one tap and one row,
        or whatever im2col mode gathers."""
        one_row = (self.r, self.s, self.h, self.p) == (1, 1, 1, 1)
        one_row = one_row and self.stride[1] == 1 and self.pool is None
        return self.source is not None or one_row

    @property
    def windows(self) -> tuple[Windows, Windows]:
        """What is stored of the results, along rows and columns."""
        if self.pool is None:
            return Windows(self.p, self.p), Windows(self.q, self.q)
        (r, s), (down, right) = self.pool.window, self.pool.stride
        rows, cols = self.pool.sizes(self.p, self.q)
        top, _, left, _ = self.pool.padding
        return (
            Windows(self.p, rows, r, down, top),
            Windows(self.q, cols, s, right, left),
        )

    @property
    def folds(self) -> bool:
        """Whether strides become a view's dimensions, so that a box is contiguous.

        Else TMA's element steps skip what lies between.
        """
        return (
            self.stride != (1, 1)
            and self.channels % self.chunk == 0
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
class Windows:
    """One spatial axis of a pool: of ``results`` of a conv, every output is made of a
    window. Without a pool that is one of them.

    The first window begins ``padding`` positions before the first result.
    """

    results: int
    outputs: int
    size: int = 1
    stride: int = 1
    padding: int = 0

    def span(self, outputs: int) -> int:
        """Positions that the windows of so many outputs side by side lie over."""
        return (outputs - 1) * self.stride + self.size

    @property
    def read(self) -> int:
        """Results that any window has, from the first on."""
        return min(self.results, self.span(self.outputs) - self.padding)


@functools.lru_cache(maxsize=1024)
def line_of(image: Image) -> Image | None:
    """All output pixels of a conv as one line, or None.

    TMA's im2col mode gathers a tap's inputs, across the ends of rows and of images. So
    a tile may have any number of pixels, as a product's has; but every tap is a load of
    its own. Without a stride that is several times what a box with its halo loads, so
    that only strided convs, and padded ones of one tap, are seen so.
    """
    one_tap, padded = (image.r, image.s) == (1, 1), image.padding != (0, 0)
    if image.is_line or image.pool is not None or image.filters > 1:
        return None
    if image.pixel != image.channels:
        return None
    if image.stride == (1, 1) and not (one_tap and padded):
        return None
    down, right = image.dilation
    reach = max((image.r - 1) * down, (image.s - 1) * right)
    if reach > 255 or not all(-128 <= n <= 127 for n in corners(image)):
        return None
    pixels = image.n * image.p * image.q
    return dataclasses.replace(
        image,
        **{"n": 1, "h": 1, "w": pixels, "p": 1, "q": pixels},
        stride=(1, 1),
        padding=(0, 0),
        source=image,
    )


def corners(image: Image) -> tuple[int, int, int, int]:
    """Where the first tap's columns and rows begin, and end as seen from the image's:
    what TMA's im2col mode calls the lower and the upper corner."""
    top, left = image.padding
    right = (image.q - 1) * image.stride[1] - left - (image.w - 1)
    bottom = (image.p - 1) * image.stride[0] - top - (image.h - 1)
    return -left, -top, right, bottom


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


def _offsets(taps: int, dilation: int) -> tuple[Axis, ...]:
    """The phases of a line that is gathered: a tap each, ``remainder`` its offset."""
    return tuple(Axis(tap * dilation, 1, 0, ((tap, 0),)) for tap in range(taps))


def rows_of(image: Image) -> tuple[Axis, ...]:
    if image.source is not None:
        return _offsets(image.r, image.dilation[0])
    return axes(image.h, image.r, image.stride[0], image.dilation[0], image.padding[0])


def cols_of(image: Image) -> tuple[Axis, ...]:
    if image.source is not None:
        return _offsets(image.s, image.dilation[1])
    return axes(image.w, image.s, image.stride[1], image.dilation[1], image.padding[1])
