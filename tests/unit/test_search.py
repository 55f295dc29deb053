# SPDX-License-Identifier: Apache-2.0
"""Tuning in two stages, with a worker, a compiler and a clock that only pretend."""

from __future__ import annotations

import dataclasses
import hashlib
import random
import threading
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import pytest
import region_cases as cases
from fakes import Build

from jax_bolt._src import arch as arch_
from jax_bolt._src import base, plan
from jax_bolt._src.errors import CacheError, CompileError
from jax_bolt._src.jit import store
from jax_bolt._src.plan import Candidate
from jax_bolt._src.primitive import SiteInfo
from jax_bolt._src.tune import db, isolate, measure, search, stages, verdict
from jax_bolt._src.tune.isolate import Failed, NoMemory, Timing, Unavailable
from jax_bolt._src.tune.target import Target

HOPPER = arch_.from_name("sm_90a")
XLA_US = 100.0


def site_of(images: int = 32) -> SiteInfo:
    """ResNet's 3x3 conv at 14x14, with an epilogue of its own."""

    def fun(x: Any, w: Any) -> Any:
        return jax.nn.silu(cases.conv(x, w))

    shapes = cases.shape(images, 14, 14, 256), cases.shape(3, 3, 256, 256)
    return cases.Case("conv", fun, shapes).site()


class World:
    """Kernels by (digest, recipe): how long each takes, or what it does instead.

    ``now`` passes by what things cost: seconds of a launch in the worker, of a compiled
    kernel, and of each of what is done in this process.
    """

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch):
        self.now = 0.0
        self.launch_s, self.compile_s, self.finish_s = 0.0, 0.0, 0.0
        self.micros: Callable[[Candidate, bool], Any] = lambda c, is_base: 50.0
        self.spread = 0.0
        self.sets = 8
        self.accurate: Callable[[str], bool] = lambda digest: True
        self.in_program: Callable[[Any], float] | None = None
        self.xla_us = XLA_US
        self.base_is_built = True
        self.unavailable = ""
        self.compiled: list[str] = []
        self.timed: list[tuple[Candidate, bool]] = []
        self.ran: set[str] = set()  # digests that ended in the worker
        self.events: list[str] = []
        self._candidates: dict[tuple[str, tuple], tuple[Candidate, bool]] = {}
        self.results = db.Database(root / "tuned")
        monkeypatch.setattr(isolate, "worker", lambda ordinal: self)
        clock = types.SimpleNamespace(monotonic=lambda: self.now)
        monkeypatch.setattr(search, "time", clock)
        made = types.SimpleNamespace
        for module, name, fake in (
            (verdict, "executable", self.executable),
            (measure, "make_operands", lambda site, l2_bytes: made(site=site)),
            (measure, "Yardstick", lambda operands: self),
            (measure, "time_region", self.time_region),
            (measure, "kernel_function", lambda site, kernel: kernel),
            (measure, "time_in_sequence", self.time_in_sequence),
        ):
            monkeypatch.setattr(module, name, fake)

    def tune(
        self, *sites: SiteInfo, budget_s: float | None = None, arch: Any = HOPPER
    ) -> dict[str, str]:
        for site in sites:
            self.know(site, arch)
        return search.tune(sites, self.target(arch), budget_s, show_progress=False)

    def know(self, site: SiteInfo, arch: Any = HOPPER) -> None:
        for candidate in plan.candidates(site.region, arch)[0]:
            self._know(candidate, False)
            stand = base.stand_in(candidate)
            if stand is not None:
                self._know(stand, True)

    def target(self, arch: Any = HOPPER) -> Target:
        return Target(
            device=jax.devices("cpu")[0],
            ordinal=0,
            arch=arch,
            kernels=self,  # type: ignore[arg-type]
            results=self.results,
            tools=object(),  # type: ignore[arg-type]
            origin=plan.Origin("sources", "nvcc 1", "sources"),
            jobs=None,
            disable=(),
        )

    def _know(self, candidate: Candidate, is_base: bool) -> None:
        key = self.digest(None, candidate.source, None), candidate.recipe
        self._candidates[key] = candidate, is_base

    def entry(self, site: SiteInfo) -> db.Entry:
        found = self.results.get(HOPPER, site.region)
        assert found is not None
        return found

    # As store.Store

    def digest(self, tools: Any, source: str, arch: Any) -> str:
        return hashlib.sha256(source.encode()).hexdigest()

    def find(self, digest: str) -> Path | None:
        known = {self.digest(None, s, None) for s in base.sources(HOPPER)}
        return Path(digest) if self.base_is_built and digest in known else None

    def build(
        self,
        tools: Any,
        sources: Sequence[str],
        arch: Any,
        jobs: Any,
        on_done: Callable[[str, Any], None],
    ) -> None:
        self.events.append(f"build {len(sources)}")
        for source in sources:
            self.compiled.append(source)
            self.now += self.compile_s
            digest = self.digest(None, source, None)
            on_done(digest, Path(digest))

    # As isolate.Worker

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        self.events.append("stop")

    def start(self) -> None:
        pass

    def time(
        self, request: dict[str, Any], limit_s: float, poll: Callable[[], None]
    ) -> Timing:
        poll()
        if self.unavailable:
            raise Unavailable(self.unavailable)
        if request["operands"]["sets"] > self.sets:
            raise NoMemory
        key = request["digest"], tuple(request["recipe"])
        candidate, is_base = self._candidates[key]
        assert request["verify"] == (not is_base)
        self.now += self.launch_s
        self.timed.append((candidate, is_base))
        micros = self.micros(candidate, is_base)
        if isinstance(micros, Exception):
            raise micros
        self.ran.add(request["digest"])
        return Timing(micros, self.spread)

    # What runs in this process

    def executable(
        self, region: Any, candidate: Candidate, digest: str, path: Any, target: Any
    ) -> Any:
        assert digest in self.ran, "never launched here before it ran in the worker"
        micros = self.micros(candidate, False)
        return types.SimpleNamespace(
            digest=digest, micros=micros, candidate=candidate, form=candidate.form
        )

    def errors(self, result: Any) -> list[float]:
        good = result == "xla" or self.accurate(result)
        return [1e-3 if good else 1e-2]

    def time_region(self, fun: Any, operands: Any, ordinal: int) -> measure.Run:
        if hasattr(fun, "candidate"):  # a kernel by itself
            return self.time_in_sequence(fun, operands, ordinal)
        return measure.Run(self.xla_us, "xla")  # type: ignore[arg-type]

    def time_in_sequence(self, kernel: Any, operands: Any, ordinal: int) -> measure.Run:
        self.now += self.finish_s
        micros = (self.in_program or (lambda k: k.micros))(kernel)
        return measure.Run(micros, kernel.candidate.config.text)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path, monkeypatch)


def names(found: Sequence[Candidate]) -> list[str]:
    return [c.config.text for c in found]


def candidates(site: SiteInfo) -> list[Candidate]:
    return plan.candidates(site.region, HOPPER)[0]


def with_programs(site: SiteInfo) -> list[Candidate]:
    return [c for c in candidates(site) if base.stand_in(c) is not None]


def by_name(times: dict[str, Any], others: Any = 50.0) -> Callable:
    return lambda c, is_base: times.get(c.config.text, others)


def test_base_programs_choose_what_is_compiled(world: World) -> None:
    site = site_of()
    fast = with_programs(site)[-1].config.text
    assert fast not in names(plan.likeliest(candidates(site)))
    world.micros = by_name({fast: 20.0})
    before = store.stats()
    assert world.tune(site) == {}
    entry = world.entry(site)
    assert (entry.choice, entry.config, entry.time_us) == ("kernel", fast, 20.0)
    assert (entry.kernel_time_us, entry.spread, entry.notes) == (20.0, 0.0, "")
    after = store.stats()
    assert after["stage1"] - before["stage1"] == len(with_programs(site))
    assert after["stage2"] - before["stage2"] == entry.candidates <= 7
    assert after["tuned"] - before["tuned"] == 1
    assert len(world.compiled) <= 7
    assert not set(world.compiled) & set(base.sources(HOPPER))


def test_without_a_library_rank_decides(world: World) -> None:
    site = site_of()
    world.base_is_built = False
    world.tune(site)
    assert not any(is_base for _, is_base in world.timed)
    assert [c for c, _ in world.timed] == plan.likeliest(candidates(site))


def test_a_few_missing_programs_are_built_where_that_saves_more(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = site_of()
    stands = {base.stand_in(c).source for c in with_programs(site)}  # type: ignore[union-attr]
    missing = sorted(stands)[:2]
    digests = {world.digest(None, source, None) for source in missing}
    find = world.find
    monkeypatch.setattr(
        world, "find", lambda digest: None if digest in digests else find(digest)
    )
    world.tune(site)
    assert world.compiled[:2] == [s for s in world.compiled if s in missing]
    assert len(world.compiled) > 2


def test_a_library_that_is_built_meanwhile(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the background, say: the regions that come later profit."""
    world.base_is_built = False
    first_stage = search._Run._first_stage

    def slow(run: Any, job: Any) -> None:
        first_stage(run, job)
        world.base_is_built = True

    monkeypatch.setattr(search._Run, "_first_stage", slow)
    world.tune(site_of(32), site_of(16))
    sizes = {
        c.form.region.problem.n  # type: ignore[union-attr]
        for c, is_base in world.timed
        if is_base
    }
    assert sizes == {16}


@pytest.mark.parametrize("stage", [1, 2])
def test_a_candidate_that_crashes_is_noted_and_not_tried_again(
    world: World, stage: int
) -> None:
    site = site_of()
    good, fatal, *_ = with_programs(site)
    times = {good.config.text: 30.0, fatal.config.text: 20.0}

    def micros(candidate: Candidate, is_base: bool) -> Any:
        bad = candidate.config == fatal.config and is_base == (stage == 1)
        if bad:
            return Failed("crashed the worker (signal 11)", fatal=True)
        return times.get(candidate.config.text, 50.0)

    world.micros = micros
    assert world.tune(site) == {}
    entry = world.entry(site)
    assert (entry.choice, entry.config) == ("kernel", good.config.text)
    assert entry.notes.endswith("crashed the worker (signal 11)")
    assert fatal.config.text in entry.notes

    def tries() -> int:
        return sum(
            c.config == fatal.config and is_base == (stage == 1)
            for c, is_base in world.timed
        )

    assert tries() == 1
    if stage == 1:  # nor is the region's own kernel
        assert not any(c.config == fatal.config for c, b in world.timed if not b)
    world.results = db.Database(world.results.root)  # another process
    world.tune(site)
    assert tries() == 1
    assert "before" in world.entry(site).notes


def test_an_error_is_no_crash(world: World) -> None:
    site = site_of()
    bad = with_programs(site)[0].config.text
    world.micros = by_name({bad: Failed("refuses the problem")})
    world.tune(site)
    assert world.entry(site).notes == ""
    assert not (world.results.root / "failed.txt").exists()


def test_all_candidates_crash(world: World) -> None:
    site = site_of()
    world.micros = lambda c, is_base: Failed("did not end within 20 s", fatal=True)
    (reason,) = world.tune(site).values()
    assert "did not end" in reason
    assert world.results.get(HOPPER, site.region) is None


def test_what_is_wrong_does_not_win(world: World) -> None:
    site = site_of()
    wrong, right, *_ = names(with_programs(site))
    world.micros = by_name({wrong: 20.0, right: 30.0})
    world.accurate = lambda text: text != wrong
    world.tune(site)
    assert world.entry(site).config == right
    world.accurate = lambda text: False
    other = site_of(8)
    (reason,) = world.tune(other).values()
    assert "error 1.00e-02" in reason


def site_of_two() -> SiteInfo:
    """As ``site_of``, with the sum that a residual is added to as a second output."""

    def fun(x: Any, w: Any, r: Any) -> Any:
        total = cases.conv(x, w) + r
        return jax.nn.relu(total), total

    image, filters = cases.shape(32, 14, 14, 256), cases.shape(3, 3, 256, 256)
    return cases.Case("conv", fun, (image, filters, image)).site()


@pytest.mark.parametrize(
    ("whole", "part", "choice", "form"),
    [
        (50.0, 20.0, "kernel", "hwio"),  # a part is not tried
        (120.0, 80.0, "kernel", "hwio+xla"),
        (120.0, 110.0, "xla", "hwio"),
        (120.0, Failed("it crashed"), "xla", "hwio"),
    ],
)
def test_a_part_is_tried_where_the_whole_loses(
    world: World, whole: float, part: Any, choice: str, form: str
) -> None:
    site = site_of_two()

    def micros(candidate: Candidate, is_base: bool) -> Any:
        return whole if is_base or candidate.form.part is None else part

    world.micros = micros
    assert world.tune(site) == {}
    entry = world.entry(site)
    assert (entry.choice, entry.form) == (choice, form)
    assert entry.time_us == (80.0 if form == "hwio+xla" else whole)
    compiled = {c.source: c.form.part is not None for c in candidates(site)}
    assert any(compiled[source] for source in world.compiled) == (whole > XLA_US)
    assert not all(compiled[source] for source in world.compiled)
    made = plan.tuned(site.region, HOPPER, entry, plan.Origin("sources", "nvcc 1"))
    assert isinstance(made, plan.Plan if choice == "kernel" else plan.Rejection)
    if form == "hwio+xla":
        assert isinstance(made, plan.Plan) and made.candidate.form.part is not None
        # What was chosen stays: it is among the candidates when all is timed again.
        world.tune(site)
        assert world.entry(site).form == form


def test_a_part_that_there_is_no_time_for(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = site_of_two()
    world.tune(site)
    kernels = len(world.compiled)
    other = World(tmp_path / "other", monkeypatch)
    other.micros = lambda candidate, is_base: 120.0
    other.compile_s = 1.0
    assert other.tune(site, budget_s=kernels + 0.5) == {}
    entry = other.entry(site)
    assert (entry.choice, entry.form, entry.time_us) == ("xla", "hwio", 120.0)
    assert other.now > kernels


def test_no_worker(world: World) -> None:
    sites = [site_of(32), site_of(16)]
    world.unavailable = "not tuned: no GPU"
    world.base_is_built = False
    assert world.tune(*sites) == {s.region.text: "not tuned: no GPU" for s in sites}
    assert world.events[-1] == "stop"


def test_smaller_rotations_where_memory_is_short(world: World) -> None:
    site = site_of()
    world.sets = 2
    assert world.tune(site) == {}
    world.sets = 0
    assert world.tune(site_of(8)) == {
        site_of(8).region.text: "not tuned: too little free device memory"
    }


def test_memory_of_this_process_is_short(world: World, monkeypatch: Any) -> None:
    def full(*_: Any) -> Any:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no")

    monkeypatch.setattr(measure, "Yardstick", full)
    (reason,) = world.tune(site_of()).values()
    assert reason == "not tuned: too little free device memory"


def test_a_store_that_others_write_is_an_error(world: World, monkeypatch: Any) -> None:
    def build(*_: Any) -> Any:
        raise CacheError("chmod")

    monkeypatch.setattr(world, "build", build)
    with pytest.raises(CacheError, match="chmod"):
        world.tune(site_of())


def test_a_region_that_cannot_be_listed_costs_only_itself(
    world: World, monkeypatch: Any
) -> None:
    good, bad = site_of(32), site_of(16)
    listed = plan.candidates

    def candidates(region: Any, *args: Any) -> Any:
        if region == bad.region:
            raise ZeroDivisionError("of ours")
        return listed(region, *args)

    world.know(good)
    monkeypatch.setattr(plan, "candidates", candidates)
    assert search.tune([good, bad], world.target(), None, False) == {
        bad.region.text: "no kernel takes it: of ours"
    }
    assert world.entry(good).choice == "kernel"


def test_kernels_that_do_not_compile(world: World, monkeypatch: Any) -> None:
    def build(tools: Any, sources: Any, arch: Any, jobs: Any, on_done: Any) -> None:
        for source in sources:
            on_done(world.digest(None, source, None), CompileError("no", "log"))

    monkeypatch.setattr(world, "build", build)
    (reason,) = world.tune(site_of()).values()
    assert reason.startswith("no candidate ran: ")


# --- The same every time


def test_near_ties_are_decided_by_rank(world: World, tmp_path: Path) -> None:
    """Whatever the noise of 15 runs, below the margin."""
    site = site_of()
    known = names(with_programs(site))[:3]
    chosen = set()
    for seed in range(15):
        draw = random.Random(seed)
        world.results = db.Database(tmp_path / str(seed))
        noise = {text: 30 * draw.uniform(0.991, 1.009) for text in known}
        world.micros = by_name(noise)
        world.tune(site)
        chosen.add(world.entry(site).config)
    assert chosen == {known[0]}


def timed(site: SiteInfo, times: Sequence[float], spread: float = 0.0) -> list:
    found = candidates(site)
    return [
        stages.Timed(c, "digest", Timing(t, spread))
        for c, t in zip(found, times, strict=False)
    ]


@pytest.mark.parametrize(
    ("times", "spread", "order"),
    [
        ((10.0, 9.9), 0.0, (0, 1)),
        ((10.0, 9.5), 0.0, (1, 0)),
        ((10.0, 9.6), 0.045, (0, 1)),  # a tie, within what one measurement varies by
        ((10.0, 9.0), 0.5, (1, 0)),  # on a GPU that others use, not everything ties
        ((12.0, 10.1, 10.0), 0.0, (1, 2, 0)),
    ],
)
def test_order(times: Any, spread: float, order: Any) -> None:
    given = timed(site_of(), times, spread)
    assert stages.in_order(given, None) == [given[i] for i in order]


def entry_of(candidate: Candidate, choice: str = "kernel") -> db.Entry:
    return db.Entry(
        choice=choice,
        form=candidate.form.name,
        template=candidate.template.name,
        config=candidate.config.text,
    )


def test_what_was_chosen_stays_unless_clearly_beaten() -> None:
    given = timed(site_of(), (10.0, 10.15))
    before = entry_of(given[1].candidate)
    assert stages.in_order(given, before)[0] == given[1]
    given = timed(site_of(), (10.0, 10.5))
    assert stages.in_order(given, before)[0] == given[0]
    assert stages.choice(101.0, 100.0, before) == "kernel"
    assert stages.choice(103.0, 100.0, before) == "xla"
    xla = dataclasses.replace(before, choice="xla")
    for known in (xla, None):
        assert stages.choice(99.0, 100.0, known) == "xla"
        assert stages.choice(97.0, 100.0, known) == "kernel"


def test_what_was_chosen_before_is_among_the_finalists(world: World) -> None:
    site = site_of()
    last = with_programs(site)[-1]
    slow = {c: 50.0 for c in with_programs(site)} | {last: 80.0}
    assert last not in stages.finalists(candidates(site), slow, None)
    assert last in stages.finalists(candidates(site), slow, entry_of(last))
    world.results.put(HOPPER, {site.region: entry_of(last)})
    world.micros = by_name({last.config.text: 50.5})
    world.tune(site)
    assert world.entry(site).config == last.config.text


def test_finalists() -> None:
    site = site_of()
    found, known = candidates(site), with_programs(site)
    times = {c: 50.0 + i for i, c in enumerate(reversed(known))}
    chosen = stages.finalists(found, times, None)
    assert chosen == [c for c in found if c in chosen]  # in order of rank
    assert found[0] in chosen
    best = min(times, key=times.__getitem__)
    assert best in chosen
    assert len({c.kind for c in chosen if c in times}) >= 2
    untimed = [c for c in chosen if c not in times]
    assert untimed == [c for c in plan.likeliest(found) if c not in times][:3]
    assert len(chosen) <= 7
    few = dict(list(times.items())[:3])
    assert stages.finalists(found, few, None) == plan.likeliest(found)


# --- The budget


@pytest.mark.parametrize("finish_s", [3.0, 4.0, 5.0, 7.0, 9.0, 12.0])
def test_the_budget_is_kept_and_what_was_found_too(
    world: World, finish_s: float
) -> None:
    """However long verifying takes: time for it is kept."""
    sites = [site_of(n) for n in range(8, 40, 2)]
    world.launch_s, world.finish_s = 0.05, finish_s
    budget_s = 60.0
    failed = world.tune(*sites, budget_s=budget_s)
    done = [s for s in sites if world.results.get(HOPPER, s.region) is not None]
    assert 60 / finish_s / 2 <= len(done) < len(sites)
    assert {s.region.text for s in sites} == {s.region.text for s in done} | set(failed)
    assert set(failed.values()) == {"the tuning budget of 60.0 s is spent"}
    assert world.now <= 1.1 * budget_s


@pytest.mark.parametrize("budget_s", [0.0, 1.0])
def test_a_budget_that_is_too_short(world: World, budget_s: float) -> None:
    world.launch_s = 0.1
    site = site_of()
    assert set(world.tune(site, budget_s=budget_s)) == {site.region.text}
    assert world.now <= budget_s + 0.11
    assert world.compiled == []


def test_a_stage_that_is_cut_short_keeps_its_best(world: World) -> None:
    site = site_of()
    world.base_is_built = False
    world.launch_s = 1.0
    assert world.tune(site, budget_s=2.5) == {}
    assert len(world.timed) == 3
    assert world.entry(site).candidates == 3
    assert world.entry(site).choice == "kernel"


def test_an_interrupt_ends_it(world: World, monkeypatch: Any) -> None:
    """Of what follows nothing is timed."""
    runs: list[Any] = []
    init = search._Run.__init__

    def spy(self: Any, *args: Any) -> None:
        init(self, *args)
        runs.append(self)

    monkeypatch.setattr(search._Run, "__init__", spy)

    def micros(candidate: Candidate, is_base: bool) -> float:
        runs[0].stop.set()
        return 50.0

    world.micros = micros
    sites = [site_of(32), site_of(16)]
    failed = world.tune(*sites)
    assert failed == {s.region.text: "tuning was interrupted" for s in sites}
    assert len(world.timed) == 1


def test_an_interrupted_caller_leaves_nothing_running(
    world: World, monkeypatch: Any
) -> None:
    """Neither a worker nor a terminal without its cursor."""
    begun = threading.Event()

    class Thread(threading.Thread):
        def join(self, timeout: float | None = None) -> None:
            if self.name == "jax_bolt-tune" and timeout is None:
                assert begun.wait(30)
                raise KeyboardInterrupt
            super().join(timeout)

    def micros(candidate: Candidate, is_base: bool) -> float:
        begun.set()
        time.sleep(0.5)  # of a poll
        return 50.0

    monkeypatch.setattr(threading, "Thread", Thread)
    world.micros = micros
    with pytest.raises(KeyboardInterrupt):
        world.tune(site_of())
    assert world.events == ["stop"]


# --- Compilers work ahead


def test_stages_overlap(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a region's kernels are compiled, the next one's base programs are timed."""
    sites = [site_of(32), site_of(16)]
    second_seen = threading.Event()
    build = world.build

    def slow(*args: Any) -> None:
        assert second_seen.wait(30)
        build(*args)

    monkeypatch.setattr(world, "build", slow)

    def micros(candidate: Candidate, is_base: bool) -> float:
        if is_base and candidate.form.region.problem.n == 16:  # type: ignore[union-attr]
            second_seen.set()
        return 50.0

    world.micros = micros
    assert world.tune(*sites) == {}
    assert all(world.entry(site).choice == "kernel" for site in sites)


# --- The real worker, on a driver that only counts


@pytest.mark.parametrize("bad", ["", "std::abort()"])
def test_the_real_worker(
    world: World, build: Build, monkeypatch: pytest.MonkeyPatch, bad: str
) -> None:
    """Every request of a tuning for Ampere is one that it and the modules take."""
    driver = build("cuda.cc", "libcuda.so.1")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(driver.parent))
    uuid = "".join(f"{16 * i + 1:02x}" for i in range(16))
    monkeypatch.setattr(isolate, "worker", lambda o: isolate.Worker(uuid, o))
    good = build("kernel.cc", "good.so", "-DFAKE_RESULT_BYTES=2")
    fatal = build(
        "kernel.cc", f"bad{len(bad)}.so", f"-DFAKE_LAUNCH={bad or 'return 1'}"
    )
    shapes = cases.shape(96, 64), cases.shape(64, 32)
    site = cases.Case("dense", lambda x, w: jax.nn.silu(x @ w), shapes).site()
    ampere = arch_.from_name("sm_80")
    found, _ = plan.candidates(site.region, ampere)
    first = found[0].source

    def compile_all(
        tools: Any, sources: Any, arch: Any, jobs: Any, on_done: Any
    ) -> None:
        for source in sources:
            path = fatal if source == first else good
            on_done(world.digest(None, source, None), path)

    def executable(
        region: Any, candidate: Candidate, digest: str, path: Path, target: Any
    ) -> Any:
        assert path == good
        return types.SimpleNamespace(
            digest=digest, micros=96.0, candidate=candidate, form=candidate.form
        )

    monkeypatch.setattr(world, "build", compile_all)
    monkeypatch.setattr(verdict, "executable", executable)
    assert world.tune(site, arch=ampere) == {}
    entry = world.results.get(ampere, site.region)
    assert entry is not None
    assert entry.kernel_time_us == pytest.approx(96.0)
    assert entry.config == found[1].config.text
    assert entry.notes.endswith("crashed the worker (signal 6)") == bool(bad)
