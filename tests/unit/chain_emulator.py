# SPDX-License-Identifier: Apache-2.0
"""The Hopper chain in NumPy: what ``chain/sm90.hpp`` does with a recipe.

Every role of a CTA is a coroutine: the threads that load, and the warpgroups that
multiply. They meet at barriers as in the kernel, in a random order of turns. What the
hardware does on its own (loads, stores, products) happens at any time that the program
allows. A ring that is reused too early gives wrong numbers here, and roles that wait
for each other are seen. Shared memory is NaN where nothing was written.
"""

from __future__ import annotations

import copy
import dataclasses
import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import implicit_gemm_emulator as single
import numpy as np
from implicit_gemm_emulator import BLOCK, ROW, Apply, Tensor

from jax_bolt._src.kernels import recipe as recipes
from jax_bolt._src.kernels.recipe import Recipe

UNIT = BLOCK * ROW
_HEADER = Path(__file__).parents[2] / "cc/include/jax_bolt/chain/sm90.hpp"
Role = Iterator[None]


class Deadlock(AssertionError):
    """All roles wait."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Sm90's template arguments, but for the epilogues and the element."""

    k_outer: bool
    second_k_outer: bool
    stored: bool
    pixels: int
    group: int
    outputs: int
    warpgroups: int
    steps: int
    second_steps: int
    cluster: int
    ahead: bool
    resident: bool
    merges: bool

    @staticmethod
    def of(instance: str) -> Arguments:
        """From the C++ type that ``instantiate`` names."""
        found = re.fullmatch(r"jax_bolt::chain::Sm90<(.*)>", instance)
        assert found is not None, instance
        text = _HEADER.read_text()
        names = re.search(r"template <([^<>]*)>\s*struct Sm90 \{", text)
        assert names is not None
        parts = [part.split("=")[0].split() for part in names[1].split(",")]
        values = [value.strip() for value in found[1].split(",")]
        given = dict(zip((p[-1] for p in parts), [*values, ""], strict=False))
        assert (given["First_"], given["Second_"]) == ("First", "Second")
        assert given["Shortcut_"] in ("", "Shortcut")
        outer = {
            f"jax_bolt::implicit_gemm::Filters::{name}": name == "kKrsc"
            for name in ("kKrsc", "kHwio")
        }
        return Arguments(
            k_outer=outer[given["kFilters"]],
            second_k_outer=outer[given["kSecondFilters"]],
            stored={"true": True, "false": False}[given["kStored"]],
            pixels=int(given["kPixels"]),
            group=int(given["kGroup"]),
            outputs=int(given["kOutputs"]),
            warpgroups=int(given["kWarpgroups"]),
            steps=int(given["kSteps"]),
            second_steps=int(given["kSecondSteps"]),
            cluster=int(given["kCluster"]),
            ahead={"true": True, "false": False}[given["kAhead"]],
            resident={"true": True, "false": False}[given["kResident"]],
            merges=bool(given["Shortcut_"]),
        )


def limit(name: str) -> int:
    """A constant of the kernel's."""
    found = re.search(rf"constexpr int {name} = (\d+);", _HEADER.read_text())
    assert found is not None, name
    return int(found[1])


def taps_of(g: Any) -> int:
    return sum(g.phase_taps[: g.phases])


class Barrier:
    """An mbarrier."""

    def __init__(self, arrivals: int):
        self._arrivals = self._left = arrivals
        self._bytes = self._phase = 0

    def arrive(self, bytes_: int = 0) -> None:
        assert self._left > 0, "arrived at once too often"
        self._left -= 1
        self.complete(-bytes_)

    def complete(self, bytes_: int) -> None:
        self._bytes -= bytes_
        if self._left == 0 and self._bytes == 0:
            self._left, self._phase = self._arrivals, self._phase + 1

    def wait(self, parity: int) -> Role:
        yield
        while self._phase & 1 == parity:
            yield


class Ring:
    def __init__(self) -> None:
        self.stage = self.parity = 0

    def advance(self, stages: int) -> None:
        self.stage += 1
        if self.stage == stages:
            self.stage, self.parity = 0, self.parity ^ 1


class Launch:
    """One launch; ``outputs`` and ``writes`` are what it leaves."""

    def __init__(
        self,
        recipe: Recipe,
        instance: str,
        operands: dict[int, np.ndarray],
        vectors: Sequence[Sequence[np.ndarray]],
        elements: Sequence[int],
        applies: Sequence[Apply],
        seed: int,
        prologue: str | None = None,
    ):
        """``operands`` are A, B and sides by their numbers, ``vectors`` and ``applies``
        the regions', the shortcut's last, ``elements`` of the outputs."""
        self.t, self.recipe, self.applies = Arguments.of(instance), recipe, applies
        size = sum(length or 1 for _, length in single.geometry_fields())
        self.g = single.geometry(recipe.ints[:size])
        self.blocks, self.channels, *others = recipe.ints[size:]
        self.shortcut = single.geometry(others) if self.t.merges else None
        assert self.t.merges or not others
        self.random = random.Random(seed)
        self.outputs = [np.full(size, np.nan, np.float32) for size in elements]
        self._written = [np.zeros(size, np.int64) for size in elements]
        numbers = [recipes.output(i) for i in range(len(elements))]
        operands = operands | dict(zip(numbers, self.outputs, strict=True))
        if recipe.prologue is not None:
            assert prologue is not None
            packed = single.pack(recipe.prologue, prologue, operands[0], operands[1])
            operands[3] = packed
        maps = [Tensor(tensor, operands[tensor.operand]) for tensor in recipe.maps]
        assert len(maps) == 7
        self.pixels, self.filters, self.second_filters, *stored = maps[:5]
        self.between, self.output = stored
        self.sides = [] if self.t.merges else maps[5:]
        # What the loaders and the warpgroups read for each product ahead of a block.
        self.products: list[tuple[Any, Tensor, Tensor]] = []
        if self.t.merges:
            self.products.append((self.shortcut, maps[5], maps[6]))
        self.products.append((self.g, self.pixels, self.filters))
        self.vectors = vectors
        # By the call: the shortcut's come first there.
        order = [*vectors[2:], *vectors[:2]]
        numbers = iter(range(sum(map(len, order))))
        pointers = [[recipes.vector(next(numbers)) for _ in v] or [-1] for v in order]
        pointers = [*pointers[-2:], *pointers[:-2]]
        assert [*recipe.pointers] == [n for group in pointers for n in group]
        self._check()

    @property
    def writes(self) -> np.ndarray:
        return np.concatenate(self._written)

    def _check(self) -> None:
        """What the kernel, its launch and the hardware take for granted."""
        g, t, recipe = self.g, self.t, self.recipe
        assert t.pixels % 8 == 0 and 8 <= t.pixels <= 256
        assert t.warpgroups in (1, 2, 3) and self.blocks % t.group == 0
        assert recipe.threads == 128 * (t.warpgroups + 1)
        assert recipe.cluster == t.cluster and recipe.programmatic
        assert recipe.grid % t.cluster == 0 and g.channel_tiles == 1
        assert 1 <= recipe.grid < g.tiles + t.cluster
        assert self.blocks == -(-g.channels // BLOCK)
        assert t.outputs == -(-self.channels // BLOCK)
        assert (t.steps == 4 or g.chunks == 1) and g.loads == 1
        assert t.second_steps == min(4, -(-g.channels // 16))
        assert g.pixel_stages <= limit("kMaxPixelStages")
        assert g.filter_stages <= limit("kMaxFilterStages")
        assert 2 <= g.store_stages <= limit("kMaxSlots")
        assert t.resident == bool(g.resident)
        assert not g.resident or g.filter_stages == self.units
        assert not t.ahead or t.group == 1
        if t.merges:
            shortcut = self.shortcut
            for name in ("tiles", "tile_cols", "load_bytes", "stage_bytes", "resident"):
                assert getattr(g, name) == getattr(shortcut, name)
            for name in ("pixel_stages", "filter_stages", "store_stages", "loads"):
                assert getattr(g, name) == getattr(shortcut, name)
        assert g.stage_bytes % 1024 == g.slot_bytes % 1024 == 0
        assert g.slot_bytes >= t.pixels * ROW
        for _, pixels, filters in self.products:
            assert pixels.bytes == g.load_bytes
            assert filters.bytes * t.cluster == UNIT
        assert self.second_filters.bytes * t.cluster == UNIT
        assert self.output.bytes == self.between.bytes == g.side_bytes
        assert all(side.bytes == g.side_bytes for side in self.sides)
        barriers = limit("kMaxPixelStages") + limit("kMaxSlots")
        barriers = 2 * (limit("kMaxFilterStages") + limit("kMaxWarpgroups") * barriers)
        used = g.pixel_stages * g.stage_bytes + g.store_stages * g.slot_bytes
        used = t.warpgroups * used + g.filter_stages * UNIT + 8 * barriers
        shared = single.SHARED_BYTES[2 if t.warpgroups == 1 else 1]
        assert used <= recipe.smem_bytes <= shared

    @property
    def units(self) -> int:
        """Of a tile."""
        steps = sum(g.chunks * taps_of(g) for g, _, _ in self.products)
        return self.blocks * (steps + self.t.outputs)

    def run(self) -> Launch:
        size = self.t.cluster
        for first in range(0, self.recipe.grid, size):
            ctas = [Cta(self, first + rank) for rank in range(size)]
            for cta in ctas:
                cta.cluster = ctas
            run(ctas, self.random)
        return self

    def store(self, which: int, box: np.ndarray, *coordinates: int) -> None:
        to = self.between if self.t.stored and which == 0 else self.output
        written = to.store(box, *coordinates)
        self._written[which if self.t.stored else 0][written] += 1


def run(ctas: Sequence[Runs], chance: random.Random) -> None:
    """All roles of a cluster, in a random order of turns."""
    roles = [role for cta in ctas for role in cta.roles()]
    under_way = ctas[0].under_way
    idle = 0
    while roles:
        if under_way and chance.random() < 0.4:
            under_way.pop(chance.randrange(len(under_way)))()
            idle = 0
        role = chance.choice(roles)
        try:
            next(role)
            idle += 1
        except StopIteration:
            roles.remove(role)
            idle = 0
        if idle > 4000 * len(ctas) and not under_way:
            raise Deadlock(f"{len(roles)} roles wait for each other")
    for load in under_way:
        load()


class Runs(Protocol):
    """A CTA, and the loads of its cluster that have not arrived."""

    def roles(self) -> list[Role]: ...
    @property
    def under_way(self) -> list[Callable[[], None]]: ...


class Cta:
    """One CTA: its shared memory, its barriers and its roles."""

    cluster: Sequence[Cta]

    def __init__(self, launch: Launch, index: int):
        self.launch, self.index = launch, index
        self.g, self.t = launch.g, launch.t
        g, wgs = self.g, range(self.t.warpgroups)

        def memory(stages: int, size: int) -> list[np.ndarray]:
            shape = size // ROW, 64
            return [np.full(shape, np.nan, np.float32) for _ in range(stages)]

        def barriers(stages: int, readers: int) -> tuple[list[Barrier], list[Barrier]]:
            return (
                [Barrier(1) for _ in range(stages)],
                [Barrier(readers) for _ in range(stages)],
            )

        self.units = memory(g.filter_stages, UNIT)
        self.unit_barriers = barriers(g.filter_stages, len(wgs) * self.t.cluster)
        self.pixels = [memory(g.pixel_stages, g.stage_bytes) for _ in wgs]
        self.pixel_barriers = [barriers(g.pixel_stages, 1) for _ in wgs]
        self.slots = [memory(g.store_stages, g.slot_bytes) for _ in wgs]
        self.slot_barriers = [barriers(g.store_stages, 1) for _ in wgs]
        for stages in self.pixels:
            for stage in stages:
                stage[g.load_bytes // ROW :] = 0  # clear_tails
        self._under_way: list[Callable[[], None]] = []

    @property
    def rank(self) -> int:
        return self.index % self.t.cluster

    @property
    def under_way(self) -> list[Callable[[], None]]:
        """Loads of the cluster."""
        return self.cluster[0]._under_way

    def roles(self) -> list[Role]:
        roles = [self.load_pixels(), self.load_filters()]
        ends = {0: 1, 1: self.t.warpgroups}  # of warps 2 and 3
        roles += [self.load_sides(*each) for each in ends.items() if each[0] < each[1]]
        roles += [Warpgroup(self, wg).run() for wg in range(self.t.warpgroups)]
        return roles

    def tile_index(self, turn: int, warpgroup: int) -> int:
        at = turn * self.t.warpgroups + warpgroup
        return at * self.launch.recipe.grid + self.index

    def turns(self, warpgroup: int = 0) -> Iterator[int]:
        turn = 0
        while self.tile_index(turn, warpgroup) < self.g.tiles:
            yield turn
            turn += 1

    def cluster_turns(self) -> Iterator[int]:
        """Those in which any of its CTAs has a tile."""
        turn = 0
        while self.tile_index(turn, 0) - self.rank < self.g.tiles:
            yield turn
            turn += 1

    def tile(self, index: int) -> tuple[int, int, int]:
        """Image, row and column of its first output."""
        g = self.g
        strip, col = divmod(index, g.col_tiles)
        group, row = divmod(strip, g.row_tiles)
        return group * g.tile_images, row * g.tile_rows, col * g.tile_cols

    def load(self, tensor: Tensor, full: Barrier, to: np.ndarray, at: int, *c: int):
        box = tensor.load(*c)

        def arrives() -> None:
            to[at // ROW : at // ROW + len(box)] = box
            full.complete(tensor.bytes)

        self.under_way.append(arrives)

    def load_pixels(self) -> Role:
        ring = Ring()
        for turn in self.turns():
            for g, pixels, _ in self.launch.products:
                for chunk, phase in np.ndindex(g.chunks, g.phases):
                    for wg in range(self.t.warpgroups):
                        index = self.tile_index(turn, wg)
                        if index >= g.tiles:
                            continue
                        full, empty = (b[ring.stage] for b in self.pixel_barriers[wg])
                        yield from empty.wait(ring.parity ^ 1)
                        full.arrive(g.load_bytes)
                        where = self._box(g, self.tile(index), chunk, phase)
                        to = self.pixels[wg][ring.stage]
                        self.load(pixels, full, to, 0, *where)
                    ring.advance(g.pixel_stages)
        yield

    @staticmethod
    def _box(g: Any, tile: tuple[int, int, int], chunk: int, phase: int) -> tuple:
        image, row, col = tile
        if g.image_cols > 0:
            line, col = divmod(col, g.image_cols)
            image, row = divmod(line, g.image_rows)
            return (
                *(chunk * 64, col * g.step_cols + g.first_col),
                *(row * g.step_rows + g.first_row, image),
                *(g.phase_col[phase], g.phase_row[phase]),
            )
        return (
            chunk * 64 + g.phase_channel[phase],
            col * g.step_cols + g.phase_col[phase],
            g.phase_parity[phase],
            row * g.step_rows + g.phase_row[phase],
            image,
        )

    def load_filters(self) -> Role:
        t, ring, second = self.t, Ring(), self.launch.second_filters
        for _ in self.cluster_turns():
            if t.ahead:
                yield from self.load_firsts(ring, 0)
            for first in range(0, self.launch.blocks, t.group):
                if first + t.ahead < self.launch.blocks:
                    yield from self.load_firsts(ring, first + t.ahead)
                for i, output in np.ndindex(t.group, t.outputs):
                    at = (output, first + i, 0)
                    yield from self._unit(ring, second, t.second_k_outer, *at)
            if self.g.resident:
                break
        yield

    def load_firsts(self, ring: Ring, first: int) -> Role:
        for g, _, filters in self.launch.products:
            for chunk, tap, i in np.ndindex(g.chunks, taps_of(g), self.t.group):
                at = (first + i, chunk, g.tap_filter[tap])
                yield from self._unit(ring, filters, self.t.k_outer, *at)

    def _unit(
        self,
        ring: Ring,
        tensor: Tensor,
        k_outer: bool,
        block: int,
        chunk: int,
        tap: int,
    ) -> Role:
        full, empty = (b[ring.stage] for b in self.unit_barriers)
        yield from empty.wait(ring.parity ^ 1)
        full.arrive(UNIT)
        row = self.rank * (BLOCK // self.t.cluster)
        if k_outer:
            where = (chunk * 64, tap, block * BLOCK + row, 0)
        else:
            where = (block * BLOCK, chunk * 64 + row, tap, 0)
        for cta in self.cluster:
            to, own = cta.units[ring.stage], cta.unit_barriers[0][ring.stage]
            self.load(tensor, own, to, row * ROW, *where)
        ring.advance(self.g.filter_stages)

    @property
    def any_sides(self) -> bool:
        return any(self.has_side(which) for which in (0, 1))

    def has_side(self, which: int) -> bool:
        operand = self.launch.recipe.maps[5 + which].operand
        return not self.t.merges and operand == recipes.side(1)

    def load_sides(self, first: int, end: int) -> Role:
        g, ring = self.g, Ring()
        for turn in self.turns(first) if self.any_sides else ():
            for block in range(self.launch.blocks + self.t.outputs):
                for wg in range(first, end):
                    if self.tile_index(turn, wg) < g.tiles:
                        yield from self.load_side(turn, wg, ring, block)
                ring.advance(g.store_stages)
        yield

    def load_side(self, turn: int, wg: int, ring: Ring, block: int) -> Role:
        g = self.g
        image, row, col = self.tile(self.tile_index(turn, wg))
        second = int(block >= self.launch.blocks)
        channel = (block - second * self.launch.blocks) * BLOCK
        full, empty = (b[ring.stage] for b in self.slot_barriers[wg])
        yield from empty.wait(ring.parity ^ 1)
        if self.has_side(second):
            full.arrive(g.stores * g.side_bytes)
            side, slot = self.launch.sides[second], self.slots[wg][ring.stage]
            for i in range(g.stores):
                where = (channel, col, row + i, image)
                self.load(side, full, slot, i * g.store_bytes, *where)
        else:
            full.arrive()


class Warpgroup:
    """``Consumer``: four warps that go as one."""

    def __init__(self, cta: Cta, index: int):
        self.cta, self.index = cta, index
        self.g, self.t, self.launch = cta.g, cta.t, cta.launch
        self.pixels, self.filters, self.slots = Ring(), Ring(), Ring()
        self.held = self.oldest = 0
        self.leaving = -1
        self.open: list[Callable[[], None]] = []  # products not committed
        self.products: list[list[Callable[[], None]]] = []  # committed, not done
        self.stores: list[list[Callable[[], None]]] = []

    # What runs on its own.

    def wait_products(self, most: int) -> None:
        while len(self.products) > most:
            for product in self.products.pop(0):
                product()

    def wait_stores(self, most: int) -> None:
        while len(self.stores) > most:
            for store in self.stores.pop(0):
                store()

    def commit(self) -> None:
        self.products.append(self.open)
        self.open = []

    # The program.

    def next_unit(self) -> Iterator[None]:
        parity = 0 if self.g.resident else self.filters.parity
        yield from self.cta.unit_barriers[0][self.filters.stage].wait(parity)
        self.held += 1
        self.unit = self.cta.units[self.filters.stage]
        self.filters.advance(self.g.filter_stages)

    def release_units(self, kept: int) -> None:
        if self.g.resident:
            return
        while self.held > kept:
            for cta in self.cta.cluster:
                cta.unit_barriers[1][self.oldest].arrive()
            self.oldest = (self.oldest + 1) % self.g.filter_stages
            self.held -= 1

    def drain(self) -> Role:
        if self.g.resident:
            return
        for _ in range(self.launch.units):
            yield from self.next_unit()
            self.release_units(0)

    def product(
        self, unit: np.ndarray, k_outer: bool, pixels: np.ndarray, steps: int, acc
    ) -> None:
        def runs() -> None:
            weights = unit if k_outer else unit.T
            depth = steps * 16
            acc[:] += pixels[:, :depth] @ weights[:, :depth].T

        self.open.append(runs)

    def multiply_first(
        self, g: Any, is_first: bool, is_last: bool, ring: Ring, acc: np.ndarray
    ) -> Role:
        t, barriers = self.t, self.cta.pixel_barriers[self.index]
        read = -1
        for _ in range(g.chunks):
            tap = 0
            for phase in range(g.phases):
                if is_first:
                    yield from barriers[0][ring.stage].wait(ring.parity)
                stage = self.cta.pixels[self.index][ring.stage]
                for _ in range(g.phase_taps[phase]):
                    start = g.tap_offset[tap] // ROW
                    seen = stage[start : start + t.pixels]
                    assert len(seen) == t.pixels, "read beyond the stage"
                    for i in range(t.group):
                        yield from self.next_unit()
                        self.product(self.unit, t.k_outer, seen, t.steps, acc[i])
                    self.commit()
                    tap += 1
                    if t.ahead:
                        continue
                    self.wait_products(1)
                    self.release_units(t.group)
                    if read >= 0:
                        barriers[1][read].arrive()
                    read = -1
                if is_last:
                    read = ring.stage
                ring.advance(g.pixel_stages)
        if t.ahead:
            return
        self.wait_products(0)
        self.release_units(0)
        if is_last:
            barriers[1][read].arrive()

    def give_out(self, is_first: bool) -> Role:
        """A block's first products, under way: ``self.given``, shortcut's first."""
        ring, self.given = copy.copy(self.pixels), []
        for g, _, _ in self.launch.products:
            acc = np.zeros((1, self.t.pixels, BLOCK), np.float32)
            self.given.append(acc[0])
            yield from self.multiply_first(g, is_first, False, ring, acc)

    def free_pixels(self) -> None:
        for g, _, _ in self.launch.products:
            for _ in range(g.chunks * g.phases):
                self.cta.pixel_barriers[self.index][1][self.pixels.stage].arrive()
                self.pixels.advance(g.pixel_stages)

    def run_ahead(self, index: int, block: int, outputs: np.ndarray) -> Role:
        t, firsts = self.t, self.given
        self.wait_products(0)
        self.release_units(0)
        if block + 1 == self.launch.blocks:
            self.free_pixels()
        else:
            yield from self.give_out(False)
        channel = block * BLOCK
        parked = self.park(firsts[0], channel) if t.merges else None
        yield from self.next_slot()
        slot = self.finish(0, firsts[-1], channel, parked)
        self.leave_between(channel, slot, index)
        yield from self.multiply_second(slot, outputs)
        self.advance()

    def leave_between(self, channel: int, slot: np.ndarray, index: int) -> None:
        if self.t.stored:
            self.store(0, channel, slot, index)
        else:
            self.stores.append([])

    def multiply_second(self, slot: np.ndarray, acc: np.ndarray) -> Role:
        t = self.t
        for i in range(t.outputs):
            yield from self.next_unit()
            seen = slot[: t.pixels]
            self.product(self.unit, t.second_k_outer, seen, t.second_steps, acc[i])
        self.commit()

    def next_slot(self) -> Role:
        full, empty = self.cta.slot_barriers[self.index]
        if self.cta.any_sides:
            yield from full[self.slots.stage].wait(self.slots.parity)
        else:
            yield from empty[self.slots.stage].wait(self.slots.parity ^ 1)

    def epilogue(self, which: int, acc: np.ndarray, channel: int, sides: list) -> Any:
        channels = self.launch.channels if which == 1 else self.g.channels
        at = np.minimum(channel + np.arange(BLOCK), channels - 1)
        vectors = [v[at] for v in self.launch.vectors[which]]
        (made,) = self.launch.applies[which](acc, vectors, sides)
        return np.where(channel + np.arange(BLOCK) < channels, made, 0)

    def park(self, acc: np.ndarray, channel: int) -> np.ndarray:
        return self.epilogue(2, acc, channel, [])

    def finish(
        self, which: int, acc: np.ndarray, channel: int, parked: np.ndarray | None
    ) -> np.ndarray:
        slot = self.cta.slots[self.index][self.slots.stage]
        rows = slot[: self.t.pixels]
        sides = [rows.copy()] if self.cta.has_side(which) else []
        sides += [] if parked is None else [parked]
        rows[:] = self.epilogue(which, acc, channel, sides)
        return slot

    def store(self, which: int, channel: int, slot: np.ndarray, index: int) -> None:
        g, (image, row, col) = self.g, self.cta.tile(index)
        boxes = g.side_bytes // ROW

        def leave(i: int) -> Callable[[], None]:
            at = i * g.store_bytes // ROW
            where = (channel, col, row + i, image)
            return lambda: self.launch.store(which, slot[at : at + boxes], *where)

        self.stores.append([leave(i) for i in range(g.stores)])

    def hand_over(self) -> None:
        self.wait_products(0)
        self.release_units(0)

    def advance(self) -> None:
        self.wait_stores(1)
        if self.leaving >= 0:
            self.cta.slot_barriers[self.index][1][self.leaving].arrive()
        self.leaving = self.slots.stage
        self.slots.advance(self.g.store_stages)

    def run_tile(self, index: int) -> Role:
        t, blocks = self.t, self.launch.blocks
        outputs = np.zeros((t.outputs, t.pixels, BLOCK), np.float32)
        if self.g.resident:
            self.filters = Ring()
        if t.ahead:
            yield from self.give_out(True)
            for block in range(blocks):
                yield from self.run_ahead(index, block, outputs)
        for first in () if t.ahead else range(0, blocks, t.group):
            ends, ring = (first == 0, first + t.group == blocks), copy.copy(self.pixels)
            acc = np.zeros((t.group, t.pixels, BLOCK), np.float32)
            parked: list[Any] = [None] * t.group
            for g, _, _ in self.launch.products:
                yield from self.multiply_first(g, *ends, ring, acc)
                if g is not self.g:
                    for i in range(t.group):
                        parked[i] = self.park(acc[i], (first + i) * BLOCK)
                    acc = np.zeros_like(acc)
            if ends[1]:
                self.pixels = ring
            for i in range(t.group):
                channel = (first + i) * BLOCK
                yield from self.next_slot()
                slot = self.finish(0, acc[i], channel, parked[i])
                self.hand_over()
                self.leave_between(channel, slot, index)
                yield from self.multiply_second(slot, outputs)
                self.advance()
        self.wait_products(0)
        self.release_units(0)
        for i in range(t.outputs):
            yield from self.next_slot()
            slot = self.finish(1, outputs[i], i * BLOCK, None)
            self.hand_over()
            self.store(1, i * BLOCK, slot, index)
            self.advance()

    def run(self) -> Role:
        for turn in self.cta.cluster_turns():
            index = self.cta.tile_index(turn, self.index)
            if index < self.g.tiles:
                yield from self.run_tile(index)
            else:
                yield from self.drain()
        self.wait_stores(0)
        yield
