# SPDX-License-Identifier: Apache-2.0
"""The rings of ``implicit_gemm/sm90.hpp``: who waits for whom, at any speed of each.

Its roles as coroutines that meet at barriers, without the numbers they work on. A role
may be a hundred times slower than the others: on a GPU that happens once in thousands
of launches.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator

import pytest
from chain_emulator import Barrier, Deadlock, Ring

Role = Iterator[None]


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A CTA's tiles, the main loop's steps of one, and the stages of its rings."""

    pingpong: bool
    resident: bool
    tiles: int
    steps: int
    pixels: int
    filters: int
    slots: int
    # Resident filters are freed, and their loader waits for that without loading.
    waits_for_residents: bool = False


class Cta:
    def __init__(self, kernel: Kernel, seed: int):
        self.k, self.random = kernel, random.Random(seed)
        readers = 1 if kernel.pingpong else 2
        self.full, self.empty, self.content = {}, {}, {}
        rings = {
            "pixels": (kernel.pixels, readers),
            "filters": (kernel.filters, readers),
        }
        rings |= {f"slots{i}": (kernel.slots, 1) for i in (0, 1)}
        for ring, (stages, count) in rings.items():
            self.full[ring] = [Barrier(1) for _ in range(stages)]
            self.empty[ring] = [Barrier(count) for _ in range(stages)]
            self.content[ring] = [None] * stages
        self.turn = [Barrier(2), Barrier(2)]
        self.loads: list[tuple[str, int, object]] = []
        self.events = 0

    def run(self) -> None:
        roles = [self.load("pixels"), self.load("filters")]
        roles += [self.load_sides(0), self.load_sides(1)]
        roles += [self.multiply(0), self.multiply(1)]
        speeds = [self.random.choice((1.0, 0.3, 0.01)) for _ in roles]
        # Of each role, its turns since anything happened that another could wait for.
        turns, seen = [0] * len(roles), self.events
        while roles:
            if self.loads and self.random.random() < 0.3:
                self.land()
            at = self.random.choices(range(len(roles)), speeds)[0]
            try:
                next(roles[at])
                turns[at] += 1
            except StopIteration:
                del roles[at], speeds[at], turns[at]
            if self.events != seen or self.loads:
                turns, seen = [0] * len(roles), self.events
            if roles and min(turns) > 12:
                raise Deadlock

    def land(self) -> None:
        """A load arrives, in any order."""
        ring, stage, what = self.loads.pop(self.random.randrange(len(self.loads)))
        self.content[ring][stage] = what
        self.full[ring][stage].complete(1)
        self.events += 1

    def arrive(self, barrier: Barrier, bytes_: int = 0) -> None:
        self.events += 1
        barrier.arrive(bytes_)

    def issue(self, ring: str, stage: int, what: object) -> None:
        self.content[ring][stage] = None  # whoever still reads it sees that
        self.arrive(self.full[ring][stage], 1)
        self.loads.append((ring, stage, what))

    def takes(self, warpgroup: int, tile: int) -> bool:
        return not self.k.pingpong or tile % 2 == warpgroup

    def load(self, name: str) -> Role:
        ring, stages = Ring(), getattr(self.k, name)
        resident = name == "filters" and self.k.resident
        for tile in range(self.k.tiles):
            if resident and tile > 0 and not self.k.waits_for_residents:
                return
            for step in range(self.k.steps):
                yield from self.empty[name][ring.stage].wait(ring.parity ^ 1)
                if not resident or tile == 0:
                    what = step if resident else (tile, step)
                    self.issue(name, ring.stage, what)
                ring.advance(stages)

    def load_sides(self, warpgroup: int) -> Role:
        ring, name = Ring(), f"slots{warpgroup}"
        for tile in range(self.k.tiles):
            if self.takes(warpgroup, tile):
                yield from self.empty[name][ring.stage].wait(ring.parity ^ 1)
                self.issue(name, ring.stage, tile)
                ring.advance(self.k.slots)

    def release(self, name: str, stage: int) -> None:
        resident = name == "filters" and self.k.resident
        if not resident or self.k.waits_for_residents:
            self.arrive(self.empty[name][stage])

    def multiply(self, warpgroup: int) -> Role:
        k, rings = self.k, {"pixels": Ring(), "filters": Ring()}
        slots, unreleased = Ring(), None
        name = f"slots{warpgroup}"
        turns = [0, 0]
        if k.pingpong and warpgroup == 1:
            self.arrive(self.turn[0])
        for tile in range(k.tiles):
            if not self.takes(warpgroup, tile):
                for ring in rings:
                    for _ in range(k.steps):
                        rings[ring].advance(getattr(k, ring))
                continue
            if k.resident:
                rings["filters"] = Ring()
            if k.pingpong:
                self.arrive(self.turn[warpgroup])
                yield from self.turn[warpgroup].wait(turns[warpgroup] & 1)
                turns[warpgroup] += 1
            reading: list[tuple[str, int, object]] = []
            for step in range(k.steps):
                before, reading = reading, []
                for ring, at in rings.items():
                    parity = 0 if ring == "filters" and k.resident else at.parity
                    yield from self.full[ring][at.stage].wait(parity)
                    one = ring == "filters" and k.resident
                    reading.append((ring, at.stage, step if one else (tile, step)))
                    at.advance(getattr(k, ring))
                yield
                self.free(before)
            if k.pingpong and tile + 1 < k.tiles:
                self.arrive(self.turn[warpgroup ^ 1])
            yield
            self.free(reading)
            yield from self.full[name][slots.stage].wait(slots.parity)
            assert self.content[name][slots.stage] == tile
            yield
            if unreleased is not None:
                self.release(name, unreleased)
            unreleased = slots.stage
            slots.advance(k.slots)

    def free(self, reading: list[tuple[str, int, object]]) -> None:
        """The products that read these stages are done."""
        for ring, stage, what in reading:
            assert self.content[ring][stage] == what, "overwritten, or not there yet"
            self.release(ring, stage)


KERNELS = [
    Kernel(
        pingpong=pingpong,
        resident=resident,
        tiles=tiles,
        steps=steps,
        pixels=pixels,
        filters=steps if resident else filters,
        slots=slots,
    )
    for pingpong in (True, False)
    for resident in (True, False)
    for tiles, steps, pixels, filters, slots in (
        (1, 3, 2, 2, 2),
        (7, 1, 2, 2, 2),
        (8, 1, 3, 3, 4),
        (6, 4, 3, 2, 3),
        (5, 5, 2, 4, 2),
    )
]


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_no_role_waits_for_ever_or_reads_what_is_not_there(kernel):
    for seed in range(40):
        Cta(kernel, seed).run()


@pytest.mark.parametrize("pingpong", [True, False])
def test_a_loader_that_nobody_waits_for_is_found_out(pingpong):
    """Two rounds behind, it waits for a third, which never comes."""
    few = KERNELS[1] if pingpong else KERNELS[11]
    kernel = dataclasses.replace(few, pingpong=pingpong, waits_for_residents=True)
    assert kernel.resident
    with pytest.raises(Deadlock):
        for seed in range(200):
            Cta(kernel, seed).run()
