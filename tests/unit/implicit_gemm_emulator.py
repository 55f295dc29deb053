# SPDX-License-Identifier: Apache-2.0
"""The Hopper implicit GEMM in NumPy: what ``sm90.hpp`` does with a recipe.

Every TMA box is moved, every address checked; what the kernel leaves undefined is NaN
here. Swizzles, barriers and the order in which rings are filled are not emulated. The
kernel's struct and template parameters are read from its headers, so that Python's
side of either cannot go out of step unseen.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from jax_bolt._src.kernels import recipe as recipes
from jax_bolt._src.kernels.recipe import ITEM_BYTES, Recipe, TensorMap

BLOCK, ROW, ITEM = 64, 128, 2
FILTER_BLOCK = BLOCK * ROW
# Bytes of shared memory that a CTA may have, by how many share an SM of 228 KiB, of
# which each takes 1 KiB more.
SHARED_BYTES = {1: 232448, 2: 115712}

_HEADERS = Path(__file__).parents[2] / "cc/include/jax_bolt/implicit_gemm"

# Accumulators [pixels, 64], vectors of [64] and sides [pixels, 64] -> outputs of
# [pixels, 64], the result first.
Apply = Callable[[np.ndarray, list[np.ndarray], list[np.ndarray]], Sequence[np.ndarray]]


@functools.cache
def limit(name: str) -> int:
    """A constant of the kernel's Geometry."""
    text = (_HEADERS / "geometry.hpp").read_text()
    found = re.search(rf"constexpr int {name} = (\d+);", text)
    assert found is not None, name
    return int(found[1])


@functools.cache
def geometry_fields(pools: bool = False) -> tuple[tuple[str, int], ...]:
    """The ints of the kernel's Geometry in order: name, and length (0: no array)."""
    text = re.sub(r"//.*", "", (_HEADERS / "geometry.hpp").read_text())
    name = "PooledGeometry : Geometry" if pools else "Geometry"
    body = re.search(rf"struct {name} \{{(.*?)\}};", text, re.DOTALL)
    assert body is not None
    fields = []
    for statement in filter(None, map(str.strip, body[1].split(";"))):
        kind, names = statement.split(None, 1)
        assert kind == "std::int32_t", statement
        for declared in names.split(","):
            parts = re.fullmatch(r"(\w+)(?:\[(\w+)\])?", declared.strip())
            assert parts is not None, declared
            fields.append((parts[1], limit(parts[2]) if parts[2] else 0))
    return (*geometry_fields(), *fields) if pools else tuple(fields)


def geometry(ints: Sequence[int], pools: bool = False) -> SimpleNamespace:
    """A recipe's ints as the kernel's Geometry."""
    fields = geometry_fields(pools)
    assert len(ints) == sum(length or 1 for _, length in fields)
    left = iter(ints)
    return SimpleNamespace(
        **{
            name: [next(left) for _ in range(length)] if length else next(left)
            for name, length in fields
        }
    )


@functools.cache
def template_parameters(
    header: str = "sm90.hpp", name: str = "Sm90"
) -> tuple[str, ...]:
    """The names of a struct's template parameters, in order."""
    text = (_HEADERS / header).read_text()
    found = re.search(rf"template <([^<>]*)>\s*struct {name} \{{", text)
    assert found is not None
    return tuple(part.split("=")[0].split()[-1] for part in found[1].split(","))


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Sm90's template arguments, but for the epilogue and the element."""

    krsc: bool
    pixels: int
    blocks: int
    channel_blocks: int
    warps_m: int
    warps_n: int
    ping_pong: bool
    splits: int
    parts: int
    steps: int
    last_steps: int
    pool: SimpleNamespace | None

    @staticmethod
    def of(instance: str) -> Arguments:
        """From the C++ type that ``instantiate`` names."""
        scope = "jax_bolt::implicit_gemm"
        found = re.fullmatch(
            rf"{scope}::Sm90<(.*?)(?:, {scope}::(?:MaxPool<(.*)>|(MeanPool)))?>",
            instance,
        )
        assert found is not None, instance
        values = [value.strip() for value in found[1].split(",")]
        *names, last = template_parameters()
        assert last == "Pool"
        given = dict(zip(names, values, strict=True))
        pool = None
        if found[2]:
            sizes = map(int, found[2].split(","))
            names = template_parameters("pool.hpp", "MaxPool")
            given_pool = dict(zip(names, sizes, strict=True))
            pool = SimpleNamespace(in_place=False, **given_pool)
        elif found[3]:
            pool = SimpleNamespace(in_place=True)
        assert given["Epilogue_"] == "Epilogue"

        def one_of(name: str, enum: str, *names: str) -> str:
            value = given[name].removeprefix(f"jax_bolt::implicit_gemm::{enum}::")
            assert value in names, given[name]
            return value

        return Arguments(
            krsc=one_of("kFilters", "Filters", "kKrsc", "kHwio") == "kKrsc",
            pixels=int(given["kPixels"]),
            blocks=int(given["kPixelBlocks"]),
            channel_blocks=int(given["kChannelBlocks"]),
            warps_m=int(given["kWarpgroupsM"]),
            warps_n=int(given["kWarpgroupsN"]),
            ping_pong=one_of("kSchedule", "Schedule", "kPingPong", "kCooperative")
            == "kPingPong",
            splits=int(given["kSplits"]),
            parts=int(given["kParts"]),
            steps=int(given["kSteps"]),
            last_steps=int(given["kLastSteps"]),
            pool=pool,
        )

    @property
    def warpgroups(self) -> int:
        return 2 if self.ping_pong else self.warps_m * self.warps_n

    @property
    def ctas(self) -> int:
        return 2 if self.warpgroups == 1 else 1

    @property
    def filter_blocks(self) -> int:
        return self.channel_blocks * self.warps_m

    @property
    def filter_stage(self) -> int:
        return self.filter_blocks * FILTER_BLOCK


class Tensor:
    """An operand behind a tensor map."""

    def __init__(self, tensor: TensorMap, data: np.ndarray):
        assert tensor.offset % 16 == 0
        self.map, self.data = tensor, data.reshape(-1)[tensor.offset // ITEM :]
        assert all(1 <= extent <= 256 for extent in tensor.box)
        assert all(1 <= step <= 8 for step in tensor.steps) and tensor.steps[0] == 1
        assert all(s % 16 == 0 and 0 <= s < 2**40 for s in tensor.strides)
        # A box's rows are as long as the swizzle.
        self.item = ITEM_BYTES[tensor.dtype]
        assert tensor.box[0] * self.item == tensor.swizzle == ROW
        self._strides = (1, *(stride // self.item for stride in tensor.strides))
        # The map's last element is the operand's last or one before it.
        ends = zip(tensor.dims, self._strides, strict=True)
        assert sum((size - 1) * stride for size, stride in ends) < self.data.size
        counts = zip(tensor.box, tensor.steps, strict=True)
        self._shape = tuple(-(-extent // step) for extent, step in counts)
        if tensor.corners is not None:
            self._shape = tensor.box
        self._loaded: dict[tuple[int, ...], np.ndarray] = {}

    @property
    def bytes(self) -> int:
        """Bytes of a box in shared memory."""
        return int(np.prod(self._shape)) * self.item

    def _box(self, coordinates: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """The box's elements, [rows, 128 bytes]: positions, and which are in bounds."""
        assert len(coordinates) == len(self.map.dims)
        rank = len(coordinates)
        position = np.zeros((1,) * rank, np.int64)
        inside = np.ones((1,) * rank, bool)
        for d, start in enumerate(coordinates):
            at = start + np.arange(self._shape[d]) * self.map.steps[d]
            at = at.reshape((-1,) + (1,) * d)  # innermost dimension last
            position = position + at * self._strides[d]
            inside = inside & (at >= 0) & (at < self.map.dims[d])
        shape = self._shape[::-1]
        position, inside = (np.broadcast_to(x, shape) for x in (position, inside))
        width = self._shape[0]
        return position.reshape(-1, width), inside.reshape(-1, width)

    def _column(self, coordinates: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """As ``_box``, in im2col mode: a run of the pixels between the corners."""
        assert self.map.corners is not None
        channel, col, row, image, offset_right, offset_down = coordinates
        assert 0 <= offset_right <= 255 and 0 <= offset_down <= 255
        left, top, right, bottom = self.map.corners
        _, w, h, n = self.map.dims
        _, right_step, down_step, _ = self.map.steps
        # The first pixel is one of those between the corners.
        assert (col - left) % right_step == (row - top) % down_step == 0
        assert left <= col <= w - 1 + right and top <= row <= h - 1 + bottom
        channels = channel + np.arange(self.map.box[0])
        positions, found = [], []
        for _ in range(self.map.box[1]):
            x, y = col + offset_right, row + offset_down
            positions.append(channels + np.dot((x, y, image), self._strides[1:]))
            real = 0 <= x < w and 0 <= y < h and 0 <= image < n
            found.append((channels < self.map.dims[0]) & real)
            col += right_step
            if col > w - 1 + right:
                col, row = left, row + down_step
            if row > h - 1 + bottom:
                row, image = top, image + 1
        return np.stack(positions), np.stack(found)

    def load(self, *coordinates: int) -> np.ndarray:
        """The box as it lies in shared memory, [rows, 64]."""
        if coordinates not in self._loaded:
            find = self._box if self.map.corners is None else self._column
            position, inside = find(coordinates)
            found = self.data[np.where(inside, position, 0)]
            self._loaded[coordinates] = np.where(inside, found, np.float32(0))
        return self._loaded[coordinates]

    def store(self, box: np.ndarray, *coordinates: int) -> np.ndarray:
        """Writes a box, and returns the positions written."""
        position, inside = self._box(coordinates)
        assert box.shape == position.shape
        written = position[inside]
        self.data[written] = box[inside]
        return written


def _put(memory: np.ndarray, at: int, box: np.ndarray) -> None:
    """``box`` into a piece of shared memory, ``at`` bytes from its start."""
    assert at % ROW == 0 and 0 <= at
    assert at // ROW + len(box) <= len(memory), "written beyond the end"
    memory[at // ROW : at // ROW + len(box)] = box


def _take(memory: np.ndarray, at: int, rows: int) -> np.ndarray:
    assert at % ROW == 0 and 0 <= at
    assert at // ROW + rows <= len(memory), "read beyond the end"
    return memory[at // ROW : at // ROW + rows]


def _nothing(size: int, width: int) -> np.ndarray:
    """Undefined shared memory: lines of the swizzle, of ``width`` elements."""
    assert size > 0 and size % 1024 == 0
    return np.full((size // ROW, width), np.nan, np.float32)


def pack(recipe: Recipe, instance: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """What the prologue (``pack.hpp``) makes of the operands: the workspace."""
    found = re.fullmatch(
        r"jax_bolt::implicit_gemm::Pack<(\d+), (\d+), (\w+)>", instance
    )
    assert found is not None, instance
    channels, fold = int(found[1]), int(found[2])
    packed = -(-fold * fold * channels // 8) * 8
    text = (_HEADERS / "pack.hpp").read_text()
    body = re.search(r"struct PackParams \{(.*?)\};", text, re.DOTALL)
    assert body is not None
    names = [
        name.strip()
        for names in re.findall(r"std::int32_t ([\w, ]+);", body[1])
        for name in names.split(",")
    ]
    p = SimpleNamespace(**dict(zip(names, recipe.ints, strict=True)))
    assert recipe.pointers == (0, 1, 3) and recipe.programmatic and not recipe.maps
    a = a.reshape(p.images, p.height, p.width, channels)
    b = b.reshape(p.filter_rows, p.filter_cols, channels, p.channels)
    if found[3] == "true":
        assert p.width % fold == 0 and fold * channels % 2 == 0
        assert p.width * channels % 2 == 0

    image = np.zeros((p.images, p.rows, p.cols, packed), np.float32)
    filters = np.zeros((p.taps_down, p.taps_right, packed, p.channels), np.float32)
    for down in range(fold):
        for right in range(fold):
            at = (down * fold + right) * channels
            to = slice(at, at + channels)
            for row in range(p.rows):
                for col in range(p.cols):
                    y, x = row * fold + down, (col - p.lead_cols) * fold + right
                    if y < p.height and 0 <= x < p.width:
                        image[:, row, col, to] = a[:, y, x]
            for i in range(p.taps_down):
                for j in range(p.taps_right):
                    y = i * fold + down - p.shift_down
                    x = j * fold + right - p.shift_right
                    if 0 <= y < p.filter_rows and 0 <= x < p.filter_cols:
                        filters[i, j, to] = b[y, x]
    # A thread for every pixel, and for every eight elements of the filter.
    assert p.channels % 8 == 0
    pixels, eighths = image.size // packed, filters.size // 8
    blocks = -(-pixels // recipe.threads)
    assert p.image_blocks == blocks
    assert recipe.grid == blocks + -(-eighths // recipe.threads)
    offset = p.filter_offset * 8
    workspace = np.full(offset + filters.size, np.nan, np.float32)
    workspace[: image.size] = image.reshape(-1)
    workspace[offset:] = filters.reshape(-1)
    return workspace


class Launch:
    """One launch of the kernel; ``outputs`` and ``writes`` are what it leaves."""

    def __init__(
        self,
        recipe: Recipe,
        instance: str,
        a: np.ndarray,
        b: np.ndarray,
        elements: int,
        apply: Apply,
        vectors: Sequence[np.ndarray] = (),
        sides: Sequence[np.ndarray] = (),
        prologue: str | None = None,
        auxiliary: int = 0,
    ):
        self.t = Arguments.of(instance)
        self.g = geometry(recipe.ints, pools=self.t.pool is not None)
        self.grid, self.apply = recipe.grid, apply
        self.outputs = [
            np.full(elements, np.nan, np.float32) for _ in range(1 + auxiliary)
        ]
        self._positions: list[list[np.ndarray]] = [[] for _ in self.outputs]

        # An operand's number says which array a map or a pointer is of.
        numbers = [recipes.output(i) for i in range(1 + auxiliary)]
        operands = {0: a, 1: b, **dict(zip(numbers, self.outputs, strict=True))}
        assert (prologue is None) == (recipe.prologue is None)
        if recipe.prologue is not None and prologue is not None:
            operands[3] = pack(recipe.prologue, prologue, a, b)
            assert operands[3].size * ITEM == recipe.workspace_bytes
        operands |= {recipes.side(i): side for i, side in enumerate(sides)}
        operands |= {recipes.vector(i): vector for i, vector in enumerate(vectors)}
        assert len(recipe.maps) == 3 + auxiliary + max(1, len(sides))
        read = [0, 1] if recipe.prologue is None else [3, 3]
        leading = [m.operand for m in recipe.maps[: 3 + auxiliary]]
        assert leading == [*read, *numbers]
        self.pixels, self.filters, *rest = (
            Tensor(tensor, operands[tensor.operand]) for tensor in recipe.maps
        )
        self.to = rest[: 1 + auxiliary]
        self.sides = rest[1 + auxiliary :] if sides else []
        assert len(recipe.pointers) == max(1, len(vectors))
        self.vectors = [operands[i] for i in recipe.pointers if i >= 0]
        assert len(self.vectors) == len(vectors)
        self.taps = sum(self.g.phase_taps[: self.g.phases])
        self.chunk = ROW // self.pixels.item  # input channels
        self._check(recipe)

    def _check(self, recipe: Recipe) -> None:
        """What the kernel, its launch and the hardware take for granted."""
        g, t = self.g, self.t
        assert t.pixels % 8 == 0 and 8 <= t.pixels <= 256
        assert t.warpgroups in (1, 2)
        if t.parts > 1:
            # A part is finished 16 pixels at a time, and lies in one line.
            assert t.splits == 1 and t.pixels % (16 * t.parts) == 0
            assert g.tile_rows == g.stores == 1
        assert not t.ping_pong or t.warps_m * t.warps_n == 1
        assert recipe.threads == 128 * (t.warpgroups + 1)
        assert recipe.cluster == t.splits and recipe.programmatic
        if t.splits == 1:
            assert 1 <= recipe.grid <= g.tiles
        else:
            # A cluster has one tile, a warpgroup one block, and every CTA some chunks.
            assert recipe.grid == g.tiles * t.splits and t.splits <= g.chunks
            assert not t.ping_pong and not g.resident
            assert t.blocks * t.channel_blocks == 1
        # What is beyond the products' depth is zeros.
        assert t.steps == 4 or g.chunks == 1
        assert 1 <= t.last_steps <= t.steps
        # A stage is free only after the next one's first product was issued.
        assert 2 <= g.pixel_stages <= limit("kMaxPixelStages")
        if g.resident:
            assert g.filter_stages == g.chunks * self.taps and not g.filter_batch
        else:
            assert g.filter_stages >= 2
        assert g.filter_stages <= limit("kMaxFilterStages")
        # A side's slot is free again once the next block's store was issued.
        least, most = (2, limit("kMaxStoreStages")) if self.sides else (1, 2)
        assert least <= g.store_stages <= most
        assert g.stage_bytes % 1024 == g.slot_bytes % 1024 == 0
        assert g.block_bytes % ROW == g.store_bytes % ROW == 0
        # A barrier waits for as many bytes as its boxes have.
        assert self.pixels.bytes == g.load_bytes
        whole = t.filter_stage if t.krsc else FILTER_BLOCK
        assert self.filters.bytes == whole
        assert all(side.bytes == g.side_bytes for side in self.sides)
        assert all(to.bytes == self.to[0].bytes for to in self.to)
        stored, sides = ([x.item // 2 for x in kind] for kind in (self.to, self.sides))
        in_place = stored[0] if sides and sides[0] == stored[0] else 0
        tiles = sum(stored) + sum(sides) - in_place
        slots = t.warpgroups * g.store_stages * tiles
        barriers = 2 * limit("kMaxPixelStages") + 2 * limit("kMaxFilterStages")
        barriers += 4 * limit("kMaxStoreStages") + 4
        used = g.pixel_stages * g.stage_bytes + g.filter_stages * t.filter_stage
        groups = -(-(t.pixels // 8) // t.splits)
        used += t.warpgroups * (t.splits - 1) * groups * 8 * BLOCK * 4
        used += slots * g.slot_bytes + 8 * barriers
        if t.pool is not None:
            assert len(self.to) == t.splits == t.parts == g.stores == 1
            assert self.to[0].bytes == g.block_outputs * ROW <= g.slot_bytes
            assert t.pool.in_place or (not self.sides and self.to[0].item == 2)
            # In place there is a slot for all of a block's results.
            held = g.slot_bytes if t.pool.in_place else g.results_bytes
            assert t.pixels * ROW <= held
            used += t.warpgroups * g.results_bytes
        assert used <= recipe.smem_bytes <= SHARED_BYTES[t.ctas]

    @property
    def writes(self) -> np.ndarray:
        """How often every element of every output was written."""
        counts = [
            np.bincount(np.concatenate(positions), minlength=output.size)
            for positions, output in zip(self._positions, self.outputs, strict=True)
        ]
        return np.concatenate(counts)

    def run(self) -> Launch:
        with np.errstate(invalid="ignore"):
            clusters = self.grid // self.t.splits
            for cluster in range(clusters):
                self._run(range(cluster, self.g.tiles, clusters))
        return self

    def _run(self, indices: range) -> None:
        """The tiles of one CTA, or of a cluster that shares them; a resident filter
        serves them all."""
        g, resident = self.g, None
        for index in indices:
            channel, image, row, col = self._origin(index)
            if not g.resident:
                found = self._filters(channel, g.filter_batch * image)
            else:
                if resident is None:
                    resident = self._filters(channel, g.filter_batch * image)
                found = resident
            accumulators = self._multiply(channel, image, row, col, found)
            for nb in range(self.t.warps_n * self.t.blocks):
                for mb in range(self.t.filter_blocks):
                    block = accumulators[nb][:, mb * BLOCK : (mb + 1) * BLOCK]
                    for i, part in enumerate(np.split(block, self.t.parts)):
                        self._finish(
                            part,
                            channel + mb * BLOCK,
                            col + nb * g.block_cols + i * len(part),
                            row + nb * g.block_rows,
                            image + nb * g.block_images,
                        )

    def _origin(self, index: int) -> tuple[int, int, int, int]:
        """Sm90::Tile."""
        g = self.g
        pixels, channel = divmod(index, g.channel_tiles)
        strip, col = divmod(pixels, g.col_tiles)
        group, row = divmod(strip, g.row_tiles)
        return (
            channel * BLOCK * self.t.filter_blocks,
            group * g.tile_images,
            row * g.tile_rows,
            col * g.tile_cols,
        )

    def _filters(self, channel: int, batch: int) -> list[list[np.ndarray]]:
        """By chunk and tap: a stage as [input, all output channels]."""
        g, t = self.g, self.t
        steps = []
        for chunk in range(g.chunks):
            steps.append([])
            for tap in range(self.taps):
                at = g.tap_filter[tap]
                first = chunk * self.chunk
                if t.krsc:
                    box = self.filters.load(first, at, channel, batch).T
                else:
                    boxes = [
                        self.filters.load(channel + i * BLOCK, first, at, batch)
                        for i in range(t.filter_blocks)
                    ]
                    box = np.concatenate(boxes, axis=1)
                assert box.shape == (self.chunk, BLOCK * t.filter_blocks)
                steps[-1].append(box)
        return steps

    def _multiply(
        self,
        channel: int,
        image: int,
        row: int,
        col: int,
        filters: list[list[np.ndarray]],
    ) -> list[np.ndarray]:
        """By pixel block: accumulators [pixels, all output channels]."""
        g, t = self.g, self.t
        width = BLOCK * t.filter_blocks
        accumulators = [
            np.zeros((t.pixels, width), np.float32) for _ in range(t.warps_n * t.blocks)
        ]
        group = channel // g.group_outputs * g.group_inputs
        assert (channel + width - 1) // g.group_outputs * g.group_inputs == group or (
            g.group_outputs == g.channels
        )
        for chunk in range(g.chunks):
            steps = t.steps if chunk + 1 < g.chunks else t.last_steps
            depth = steps * 32 // self.pixels.item
            tap = 0
            for phase in range(g.phases):
                first = group + chunk * self.chunk
                stage = self._stage(first, phase, image, row, col)
                for _ in range(g.phase_taps[phase]):
                    for nb, accumulator in enumerate(accumulators):
                        at = g.tap_offset[tap] + nb * g.block_bytes
                        found = _take(stage, at, t.pixels)
                        accumulator += found[:, :depth] @ filters[chunk][tap][:depth]
                    tap += 1
        return accumulators

    def _stage(
        self, channel: int, phase: int, image: int, row: int, col: int
    ) -> np.ndarray:
        g = self.g
        stage = _nothing(g.stage_bytes, self.chunk)
        stage[g.loads * g.load_bytes // ROW :] = 0  # clear_tails
        for i in range(g.loads):
            if g.image_cols > 0:
                line, c = divmod(col + i * g.load_cols, g.image_cols)
                n, r = divmod(line, g.image_rows)
                box = self.pixels.load(
                    channel,
                    c * g.step_cols + g.first_col,
                    r * g.step_rows + g.first_row,
                    n,
                    g.phase_col[phase],
                    g.phase_row[phase],
                )
                _put(stage, i * g.load_bytes, box)
                continue
            box = self.pixels.load(
                channel + g.phase_channel[phase],
                col * g.step_cols + g.phase_col[phase] + i * g.load_cols,
                g.phase_parity[phase],
                row * g.step_rows + g.phase_row[phase],
                image,
            )
            _put(stage, i * g.load_bytes, box)
        return stage

    def _finish(
        self, accumulators: np.ndarray, channel: int, col: int, row: int, image: int
    ) -> None:
        """The epilogue of a part of a block and its stores."""
        g = self.g
        sides = []
        for side in self.sides:
            width = ROW // side.item  # channels in a tile
            tiles = []
            for first in range(0, BLOCK, width):
                slot = _nothing(g.slot_bytes, width)
                for i in range(g.stores):
                    box = side.load(channel + first, col, row + i, image)
                    _put(slot, i * g.store_bytes, box)
                tiles.append(_take(slot, 0, len(accumulators)))
            sides.append(np.concatenate(tiles, axis=1))
        channels = np.minimum(channel + np.arange(BLOCK), g.channels - 1)
        vectors = [vector[channels] for vector in self.vectors]
        results = self.apply(accumulators, vectors, sides)
        if self.t.pool is not None:
            pooled = self._means if self.t.pool.in_place else self._maxima
            results = [pooled(result, col, row) for result in results]
        for to, result, positions in zip(
            self.to, results, self._positions, strict=True
        ):
            width = ROW // to.item  # channels in a tile
            for first in range(0, BLOCK, width):
                slot = _nothing(g.slot_bytes, width)
                _put(slot, 0, result[:, first : first + width])
                for i in range(g.stores):
                    box = _take(slot, i * g.store_bytes, to.bytes // ROW)
                    at = (channel + first, col, row + i, image)
                    positions.append(to.store(box, *at))

    def _means(self, results: np.ndarray, block_col: int, block_row: int):
        """MeanPool::reduce: a block's outputs, one after the other."""
        g = self.g
        assert block_col == block_row == 0
        memory = _nothing(g.slot_bytes, BLOCK)
        _put(memory, 0, results)
        # As many results as 32 lanes read at once, 16 bytes of 16 channels each.
        step = 32 // self.to[0].item
        down, right = divmod(step, g.result_cols)
        for image in range(g.block_outputs):
            total = np.zeros(BLOCK, np.float32)
            for lane in range(step):
                row, col = divmod(lane, g.result_cols)
                while row < g.result_rows:
                    at = (image * g.pitch_rows + row) * g.pitch + col
                    assert at < len(results), "outside of the results"
                    total += memory[at]
                    row, col = row + down, col + right
                    if col >= g.result_cols:
                        row, col = row + 1, col - g.result_cols
            memory[image] = total / np.float32(g.result_rows * g.result_cols)
        return memory[: g.block_outputs]

    def _maxima(self, results: np.ndarray, block_col: int, block_row: int):
        """MaxPool::reduce: a block's outputs, one after the other."""
        g, pool = self.g, self.t.pool
        assert pool is not None
        memory = _nothing(g.results_bytes, BLOCK)
        _put(memory, 0, results)
        row = block_row * pool.kDown + g.origin_row
        col = block_col * pool.kRight + g.origin_col
        top, bottom = max(-row, 0), max(g.result_rows - 1 - row, 0)
        left, right = max(-col, 0), max(g.result_cols - 1 - col, 0)
        outputs = []
        for output in range(g.block_outputs):
            line, x = divmod(output, g.output_cols)
            image, y = divmod(line, g.output_rows)
            window = []
            for i in range(pool.kRows):
                down = y * pool.kDown + g.window_row + i
                down = image * g.pitch_rows + min(max(down, top), bottom)
                for j in range(pool.kCols):
                    across = x * pool.kRight + g.window_col + j
                    at = down * g.pitch + min(max(across, left), right)
                    assert 0 <= at < len(memory), "outside of the results"
                    window.append(memory[at])
            outputs.append(np.maximum.reduce(window))
        return np.stack(outputs)
