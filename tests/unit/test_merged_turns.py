# SPDX-License-Identifier: Apache-2.0
"""The order of products in merged_sm90.hpp: who waits for whom, and finds what.

Roles as in ``chain_emulator``; a stage holds the product that it was loaded for.
Products are done, and free their stages, when their warpgroup waits for them.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
from chain_emulator import Barrier, Ring, Role, run

PAIRS, ALONE = "pingpong", "cooperative"
STEP = 3  # CTAs


class NamedBarrier:
    """Of two parties: one arrives, the other one waits."""

    def __init__(self) -> None:
        self.arrived = False

    def arrive(self) -> None:
        assert not self.arrived, "arrived twice"
        self.arrived = True

    def sync(self) -> Role:
        while not self.arrived:
            yield
        self.arrived = False


class Kernel:
    """One CTA of a launch; ``steps`` are of the first and of the second product."""

    def __init__(self, schedule: str, tiles: int, steps: tuple[int, int], stages: int):
        self.pairs, self.tiles, self.steps = schedule == PAIRS, tiles, steps
        readers = 1 if self.pairs else 2
        self.stages = [
            SimpleNamespace(full=Barrier(1), empty=Barrier(readers), holds=None)
            for _ in range(stages)
        ]
        self.turn = NamedBarrier(), NamedBarrier()
        self.under_way: list[Callable[[], None]] = []  # stages fill at once
        self.done: list[tuple[int, int, int]] = []  # warpgroup, tile, product

    def is_paired(self, warpgroup: int, index: int) -> bool:
        return self.pairs and (warpgroup == 1 or index + STEP < self.tiles)

    def load(self) -> Role:
        ring, index = Ring(), 0
        while index < self.tiles:
            tiles = 2 if self.is_paired(0, index) else 1
            for product, i in itertools.product((0, 1), range(tiles)):
                for step in range(self.steps[product]):
                    stage = self.stages[ring.stage]
                    yield from stage.empty.wait(ring.parity ^ 1)
                    stage.full.arrive(1)
                    stage.holds = index + i * STEP, product, step
                    stage.full.complete(1)
                    ring.advance(len(self.stages))
            index += tiles * STEP
        yield

    def skip(self, ring: Ring, product: int) -> None:
        for _ in range(self.steps[product]):
            ring.advance(len(self.stages))

    def multiply(self, wg: int, ring: Ring, index: int, product: int) -> Iterator:
        """Ends with the last step under way; gives its stage."""
        before = None
        for step in range(self.steps[product]):
            stage = self.stages[ring.stage]
            yield from stage.full.wait(ring.parity)
            assert stage.holds == (index, product, step)
            yield
            assert stage.holds == (index, product, step), "loaded over"
            if before is not None:
                before.empty.arrive()
            before = stage
            ring.advance(len(self.stages))
        self.done.append((wg, index, product))
        return before

    def consume(self, wg: int) -> Role:
        ring = Ring()
        if self.pairs and wg == 1:
            self.turn[0].arrive()
        for turn, index in enumerate(range(0, self.tiles, STEP)):
            if self.pairs and turn % 2 != wg:
                continue
            paired = self.is_paired(wg, index)
            for product in (0, 1):
                if paired and wg == 1:
                    self.skip(ring, product)
                if self.pairs if product == 0 else paired:
                    yield from self.turn[wg].sync()
                last = yield from self.multiply(wg, ring, index, product)
                other_is_next = paired
                if product == 1 and wg == 1:
                    other_is_next = self.pairs and index + STEP < self.tiles
                if other_is_next:
                    self.turn[wg ^ 1].arrive()
                if paired and wg == 0:
                    self.skip(ring, product)
                yield  # settles
                last.empty.arrive()
                yield  # the epilogue
        yield

    def roles(self) -> list[Role]:
        return [self.load(), self.consume(0), self.consume(1)]


@pytest.mark.parametrize("schedule", [PAIRS, ALONE])
@pytest.mark.parametrize("steps", [(1, 1), (4, 2), (2, 5)])
@pytest.mark.parametrize("stages", [3, 4, 7])
@pytest.mark.parametrize("count", range(1, 8))
def test_every_product_finds_its_stages(schedule, steps, stages, count):
    chance = random.Random(count)
    for _ in range(5):
        kernel = Kernel(schedule, (count - 1) * STEP + 1, steps, stages)
        run([kernel], chance)
        tiles = range(0, kernel.tiles, STEP)
        if schedule == ALONE:
            assert sorted(kernel.done) == [*itertools.product((0, 1), tiles, (0, 1))]
            continue
        # In turns: a tile's first product, the next one's, and then their second ones.
        wanted = []
        for first in tiles[::2]:
            pair = [(wg, t) for wg, t in enumerate((first, first + STEP)) if t in tiles]
            wanted += [(wg, t, product) for product in (0, 1) for wg, t in pair]
        assert kernel.done == wanted
