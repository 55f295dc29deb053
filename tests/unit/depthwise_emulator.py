# SPDX-License-Identifier: Apache-2.0
"""The depthwise kernel in NumPy: its threads' indices, from template arguments and a
recipe alone.

Follows cc/include/jax_bolt/depthwise/depthwise.hpp step by step, in elements where that
counts bytes. Shared memory begins as NaN, and reads and writes out of bounds fail.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

import numpy as np

from jax_bolt._src.kernels.recipe import Recipe

Apply = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""(sums, output elements, output channels) -> results, all of one shape."""

SIZES = (
    *("height", "width", "channels", "multiplier", "rows", "cols", "pad_top"),
    *("pad_left", "chunk_rows", "chunks", "col_tiles", "channel_tiles"),
    *("per_multiplier", "per_chunks", "per_col_tiles", "per_channel_tiles"),
)


@dataclasses.dataclass
class Kernel:
    """One instantiation: its template arguments in order, and an input's bytes."""

    r: int
    s: int
    stride_h: int
    stride_w: int
    dilation_h: int
    dilation_w: int
    width: int
    outputs: int
    lanes: int
    strips: int
    first: int
    end: int
    stages: int
    pitch: int
    piece: int
    tap_piece: int
    mirrors: bool
    resident: bool
    item: int

    @staticmethod
    def of(text: str, item: int) -> Kernel:
        """From its C++ type."""
        found = re.fullmatch(
            r"\S+<Epilogue, \S+, (.*), (true|false), (true|false), \d+>", text
        )
        assert found is not None, text
        names = [field.name for field in dataclasses.fields(Kernel)]
        numbers = map(int, found[1].split(", "))
        given: dict = dict(zip(names[:-3], numbers, strict=True))
        given |= {"mirrors": found[2] == "true", "resident": found[3] == "true"}
        return Kernel(**given, item=item)

    def __post_init__(self) -> None:
        self.threads = self.lanes * self.strips
        self.slots = (self.r - 1) * self.dilation_h // self.stride_h + 1
        reach = (self.s - 1) * self.dilation_w
        self.inputs = (self.outputs - 1) * self.stride_w + reach + 1
        self.columns = (self.strips - 1) * self.outputs * self.stride_w
        self.columns += self.end - self.first
        assert 0 <= self.first < self.end <= self.inputs
        assert self.strips == 1 or self.end - self.first == self.inputs
        assert self.strips == 1 or not self.mirrors
        self.leaves_out = self.slots >= 5
        self.tile = self.lanes * self.width
        self.pieces = self.tile * self.item // self.piece
        self.across = self.threads // self.pieces
        self.row = self.columns * self.pitch // self.item
        self.step = self.stride_h * self.row
        assert self.piece % self.item == 0 and self.pitch % self.piece == 0
        assert self.pitch >= self.tile * self.item
        assert self.threads % self.pieces == 0
        tap_pieces = self.tile * self.item // self.tap_piece
        assert self.threads % tap_pieces == 0 and self.tap_piece % self.item == 0

    @property
    def shared_bytes(self) -> int:
        of_value = self.item if self.resident or self.item == 4 else self.item + 4
        filter_bytes = self.r * self.s * self.tile * of_value
        return filter_bytes + self.stages * self.step * self.item

    def line(self, slot: int, row: int) -> int:
        down, rest = divmod(row + slot * self.stride_h, self.dilation_h)
        return down if rest == 0 and down < self.r else -1

    def is_read(self, row: int) -> bool:
        return any(self.line(slot, row) >= 0 for slot in range(self.slots))


@dataclasses.dataclass
class Block:
    """One block of a launch, its threads side by side in arrays."""

    kernel: Kernel
    sizes: dict[str, int]
    x: np.ndarray
    filter: np.ndarray
    apply: Apply
    out: np.ndarray
    index: int

    def __post_init__(self) -> None:
        k, z = self.kernel, self.sizes
        rest, tile = self.digit(self.index, "channel_tiles")
        self.channel = tile * k.tile
        rest, self.which = self.digit(rest, "multiplier")
        rest, tile = self.digit(rest, "col_tiles")
        self.mirrored = k.mirrors and tile == 1
        self.col = 0 if k.mirrors else tile * k.strips * k.outputs
        self.image, chunk = self.digit(rest, "chunks")
        self.top = chunk * z["chunk_rows"]
        self.rows = min(z["chunk_rows"], z["rows"] - self.top)
        self.input_row = self.top * k.stride_h - z["pad_top"]
        reach = (k.s - 1) * k.dilation_w
        pad = z["pad_left"]
        if self.mirrored:
            pad = (z["cols"] - 1) * k.stride_w + reach - (z["width"] - 1) - pad
            self.x, self.filter = self.x[:, :, ::-1], self.filter[:, ::-1]
        self.input_col = self.col * k.stride_w - pad + k.first
        self.ids = np.arange(k.threads)
        self.ring = np.full(k.stages * k.step, np.nan)
        self.loaded = 0

    def digit(self, number: int, name: str) -> tuple[int, int]:
        """What is left of ``number`` without its last digit, and that."""
        base, inverse = self.sizes[name], self.sizes[f"per_{name}"] % 2**32
        if base == 1:
            return number, 0
        rest = number * inverse >> 32 if inverse else number // base
        return rest, number - rest * base

    def run(self) -> None:
        k, z = self.kernel, self.sizes
        lane, strip = self.ids % k.lanes, self.ids // k.lanes
        wanted = self.channel + lane * k.width
        first = np.minimum(wanted, z["channels"] - k.width)
        self.outputs = first * z["multiplier"] + self.which
        left = z["cols"] - self.col - strip * k.outputs
        if self.mirrored:
            left = z["cols"] - k.outputs
        self.left = np.where(wanted < z["channels"], left, 0)
        steps = self.rows + k.slots - 1
        begin = min(max(-self.input_row, 0) // k.stride_h, k.slots - 1)
        below = -(-(z["height"] - self.input_row) // k.stride_h)
        end = min(max(below, begin + 1), steps)
        self.row = self.input_row + begin * k.stride_h
        for ahead in range(k.stages - 1):
            if begin + ahead < end:
                self.load()
        sums = np.zeros((k.slots + 1, k.threads, k.outputs, k.width))
        base = strip * k.outputs * k.stride_w * (k.pitch // k.item) + lane * k.width
        for step in range(begin, end):
            if step + k.stages - 1 < end:
                self.load()
            at = base + (step - begin) % k.stages * k.step
            sums = self.multiply(at, sums, step)
            self.finish(step, sums)
        for step in range(end, steps):
            sums = np.concatenate([sums[:1], sums[:-1]])
            self.finish(step, sums)

    def load(self) -> None:
        """Copies the next step's rows."""
        k, z = self.kernel, self.sizes
        elements = k.piece // k.item
        piece, first = self.ids % k.pieces, self.ids // k.pieces
        channel = self.channel + piece * elements
        for row in filter(k.is_read, range(k.stride_h)):
            for col in range(0, k.columns, k.across):
                at = first + col
                mine = at < k.columns
                x, y = self.input_col + at, self.row + row
                inside = (channel < z["channels"]) & (x >= 0) & (x < z["width"])
                inside &= 0 <= y < z["height"]
                to = self.loaded % k.stages * k.step + row * k.row
                for i in range(elements):
                    source = [np.where(inside, v, 0) for v in (y, x, channel + i)]
                    value = np.where(inside, self.x[self.image][tuple(source)], 0.0)
                    places = to + at * (k.pitch // k.item) + piece * elements + i
                    self.ring[places[mine]] = value[mine]
        self.row += k.stride_h
        self.loaded += 1

    def multiply(self, at: np.ndarray, sums: np.ndarray, step: int) -> np.ndarray:
        k = self.kernel
        moved = np.concatenate([sums[:1], sums[:-1]])
        counts = [0 <= step - slot < self.rows for slot in range(k.slots)]
        if k.leaves_out and not all(counts):
            # What is none of the block's rows must not be used.
            moved[1:][np.logical_not(counts)] = np.nan
        channels = self.outputs[:, None] + np.arange(k.width)
        for row in filter(k.is_read, range(k.stride_h)):
            for slot in range(k.slots):
                line = k.line(slot, row)
                if line < 0:
                    continue
                for s in range(k.s):
                    weights = self.filter[line, s][channels]
                    for t in range(k.outputs):
                        col = t * k.stride_w + s * k.dilation_w
                        assert col < k.inputs
                        if not k.first <= col < k.end:
                            continue
                        start = at + row * k.row
                        start = start + (col - k.first) * (k.pitch // k.item)
                        x = self.ring[start[:, None] + np.arange(k.width)]
                        moved[slot + 1, :, t] += x * weights
        return moved

    def finish(self, step: int, sums: np.ndarray) -> None:
        k, z = self.kernel, self.sizes
        if step < k.slots - 1:
            return
        total = z["channels"] * z["multiplier"]
        row = self.top + step - (k.slots - 1)
        col = self.col + self.ids // k.lanes * k.outputs
        line = (self.image * z["rows"] + row) * z["cols"]
        for t in range(k.outputs):
            stores = t < self.left
            channels = (self.outputs[:, None] + np.arange(k.width))[stores]
            at = z["cols"] - 1 - (col + t) if self.mirrored else col + t
            places = (line + at[stores, None]) * total + channels
            assert np.isnan(self.out[places]).all(), "written twice"
            sums_t = sums[k.slots, stores, t]
            self.out[places] = self.apply(sums_t, places, channels)


def run(
    text: str,
    item: int,
    recipe: Recipe,
    x: np.ndarray,
    filter_: np.ndarray,
    apply: Apply,
) -> np.ndarray:
    """The result, flat, NaN where nothing was written.

    ``x`` is N H W C, ``filter_`` R S K.
    """
    kernel = Kernel.of(text, item)
    sizes: dict[str, int] = dict(zip(SIZES, recipe.ints, strict=True))
    assert recipe.threads == kernel.threads and recipe.smem_bytes >= kernel.shared_bytes
    out = np.full(x.shape[0] * sizes["rows"] * sizes["cols"] * filter_.shape[2], np.nan)
    for index in range(recipe.grid):
        Block(kernel, sizes, x, filter_, apply, out, index).run()
    return out
