# SPDX-License-Identifier: Apache-2.0
"""Whether a chain runs: measured, remembered, agreed on, reported. Times are fakes."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chain_stub
import jax
import pytest
import test_agree
import test_search
from chain_stub import bottleneck, conv, pairs, shape
from test_agree import client, world  # noqa: F401
from test_errors import TARGET, gpu, nvcc  # noqa: F401

import jax_bolt
from benchmarks import ship_results
from jax_bolt._src import (
    arch,
    chain,
    cli,
    forms,
    ir,
    kernels,
    lower,
    options,
    paths,
    plan,
    region_text,
    report_page,
    resolve,
    results,
)
from jax_bolt._src.errors import CompileError
from jax_bolt._src.floor import floor
from jax_bolt._src.invoke import ChainExecutable, Executable
from jax_bolt._src.jit import toolchain
from jax_bolt._src.primitive import SiteInfo
from jax_bolt._src.site import Link, Site, totals
from jax_bolt._src.tune import db, job, measure, search
from jax_bolt._src.tune.rival import Rival

HOPPER = arch.from_name("sm_90a")
ARGS = (
    *(shape(8, 28, 28, 128), shape(8, 28, 28, 512)),
    *(shape(1, 1, 128, 512), shape(1, 1, 512, 128)),
)


@pytest.fixture(autouse=True)
def stub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "CHAIN_TEMPLATES", (chain_stub,))
    monkeypatch.setattr(lower, "_warned", set())
    monkeypatch.setattr(results, "failures", {})
    monkeypatch.setattr(results, "_tried", set())


def info() -> chain.ChainInfo:
    (pair,) = pairs(bottleneck, *ARGS)
    return pair.info


# --- The decision


class World(test_search.World):
    """Chains beside regions, and the time of two kernels one after the other."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch):
        super().__init__(root, monkeypatch)
        self.xla_us, self.apart_us = 120.0, 60.0
        monkeypatch.setattr(measure, "time_apart", self.time_apart)

    def time_apart(self, kernels: Any, operands: Any, ordinal: int) -> measure.Run:
        return measure.Run(self.apart_us, [])

    def tune_chain(
        self, chosen_us: float | None = None, times: tuple[float, float] = (50.0, 70.0)
    ) -> dict[str, str]:
        site = info()
        found, _ = plan.chain_candidates(site.region, HOPPER)
        for candidate in found:
            self._candidates[self.key(candidate)] = candidate, False  # type: ignore
        by_text = dict(zip([c.config.text for c in found], times, strict=True))
        self.micros = lambda c, is_base: by_text[c.config.text]
        rival = Rival((None, None), chosen_us)  # type: ignore[arg-type]
        rivals = {site.region.text: rival}
        return search.tune([site], self.target(), None, False, rivals)

    def key(self, candidate: plan.AnyCandidate) -> tuple[str, tuple[int, ...]]:
        return self.digest(None, candidate.source, None), candidate.recipe

    def found(self) -> db.Entry:
        entry = self.results.get(HOPPER, info().region)
        assert entry is not None
        return entry


@pytest.fixture
def tuner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path, monkeypatch)


def test_a_chain_that_is_faster_than_both_kernels_and_than_xla(tuner: World) -> None:
    assert tuner.tune_chain() == {}
    entry = tuner.found()
    assert (entry.choice, entry.template) == ("kernel", chain_stub.name)
    assert (entry.form, entry.config) == ("pixels+pixels", "pixels=64")
    assert (entry.time_us, entry.apart_time_us) == (50.0, 60.0)
    assert (entry.xla_time_us, entry.candidates) == (120.0, 2)
    assert len(tuner.compiled) == 2
    made = plan.tuned(
        info().region, HOPPER, entry, plan.Origin("-", "nvcc 1", "sources")
    )
    assert isinstance(made, plan.Plan)
    assert made.saved_us == 10.0 and made.candidate.config.text == "pixels=64"


@pytest.mark.parametrize(
    ("apart_us", "xla_us", "chosen_us", "choice"),
    [
        (51.5, 120.0, None, "kernel"),
        (50.5, 120.0, None, "apart"),  # not by more than noise
        (40.0, 120.0, None, "apart"),
        (60.0, 45.0, None, "apart"),  # XLA does both faster
        (60.0, 120.0, 45.0, "apart"),  # one on a kernel, one on XLA
        (60.0, 120.0, 55.0, "kernel"),
    ],
)
def test_what_it_has_to_beat(
    tuner: World, apart_us: float, xla_us: float, chosen_us: float | None, choice: str
) -> None:
    tuner.apart_us, tuner.xla_us = apart_us, xla_us
    assert tuner.tune_chain(chosen_us) == {}
    assert tuner.found().choice == choice
    assert tuner.found().apart_time_us == min(apart_us, chosen_us or apart_us)


def test_what_was_chosen_stays_unless_clearly_beaten(tuner: World) -> None:
    tuner.tune_chain()
    tuner.apart_us = 49.5
    tuner.tune_chain()
    assert tuner.found().choice == "kernel"
    made = plan.tuned(
        info().region, HOPPER, tuner.found(), plan.Origin("-", "nvcc 1", "sources")
    )
    assert isinstance(made, plan.Plan) and made.saved_us > 0  # or it would not run
    tuner.apart_us = 48.0
    tuner.tune_chain()
    assert tuner.found().choice == "apart"
    tuner.apart_us = 50.5
    tuner.tune_chain()
    assert tuner.found().choice == "apart"


def test_a_chain_that_is_wrong_does_not_run(tuner: World) -> None:
    tuner.accurate = lambda text: text != "pixels=64"
    tuner.tune_chain(times=(40.0, 45.0))
    assert (tuner.found().config, tuner.found().time_us) == ("pixels=128", 45.0)
    tuner.results = db.Database(tuner.results.root / "other")
    tuner.accurate = lambda text: False
    (reason,) = tuner.tune_chain().values()
    assert "error 1.00e-02" in reason


# --- What is stored


def entry_of(time_us: float = 5.0, **changes: Any) -> db.Entry:
    made = db.Entry(
        choice="kernel",
        form="pixels+pixels",
        template=chain_stub.name,
        config="pixels=128",
        sources=toolchain.sources(kernels.CHAIN_HEADERS),
        compiler="nvcc 13.0.88",
        time_us=time_us,
        xla_time_us=20.0,
        apart_time_us=8.0,
        error=1e-3,
        xla_error=1e-3,
        candidates=2,
    )
    return dataclasses.replace(made, **changes)


def site_entry(site: SiteInfo, **changes: Any) -> db.Entry:
    made = plan.heuristic(site.region, HOPPER)
    assert isinstance(made, plan.Plan)
    names = made.candidate.form.name, made.candidate.template.name
    found = entry_of(4.0, apart_time_us=None, xla_time_us=9.0)
    changes = {"sources": toolchain.sources(kernels.HEADERS)} | changes
    return dataclasses.replace(
        dataclasses.replace(found, **changes),
        form=names[0],
        template=names[1],
        config=made.candidate.config.text,
    )


def test_entries_of_chains_are_read_and_merged(tmp_path: Path) -> None:
    region = info().region
    apart = entry_of(9.0, choice="apart")
    key = db.device_key(HOPPER)
    (read,) = db.parse(db.text(key, {region.text: apart}).encode()).entries.values()
    assert read == apart and db.is_verified(read)
    assert region_text.parse(region.text) == region
    assert db.rival_us(apart) == 8.0

    def holds(entry: db.Entry) -> bool:
        return True

    database = db.Database(tmp_path)
    database.put(HOPPER, {region: apart})
    assert database.get(HOPPER, region) == apart
    faster = db.Results(device=key, entries={region.text: entry_of(7.0)})
    assert database.merge(faster, holds).replaced == 1
    slower = db.Results(device=key, entries={region.text: apart})
    assert database.merge(slower, holds).kept == 1
    wrong = db.Results(device=key, entries={region.text: entry_of(1.0, error=0.5)})
    assert database.merge(wrong, holds).unverified == 1
    damaged = {region.text: entry_of(1.0, apart_time_us=-1.0)}
    assert db.parse(db.text(key, damaged).encode()).entries == {}
    # A choice against a kernel outlives the compiler, and not the headers.
    assert plan.Origin("others", "nvcc 14", apart.sources).holds(apart)
    assert not plan.Origin(apart.sources, apart.compiler, "others").holds(apart)


@pytest.mark.parametrize("stored", [True, False])
def test_texts_of_chains(stored: bool) -> None:
    region = dataclasses.replace(info().region, stored=stored)
    assert region_text.parse(region.text) == region
    first, second = region.first.text, region.second.text
    for bad in (
        f"{first} -gone-> {second}",
        f"{first} -kept-> {first}",
        f"{first} -kept-> {second} -kept-> {second}",
    ):
        with pytest.raises(ValueError):
            region_text.parse(bad)


def test_chains_are_shipped() -> None:
    region, key = info().region, db.device_key(HOPPER)
    assert ship_results.problem(key, region.text, entry_of()) is None
    assert ship_results.problem(key, region.text, entry_of(choice="apart")) is None
    gone = ship_results.problem(key, region.text, entry_of(config="gone"))
    assert gone == "there is no chain_stub gone (pixels+pixels)"


# --- In a program


@pytest.fixture
def machine(gpu: Any, nvcc: Any) -> resolve.Target:  # noqa: F811
    return resolve.target_for(gpu, options.current())


def save(target: resolve.Target, *entries: db.Entry | None) -> None:
    """Tuning results for the first site, the second one and the chain."""
    site = info()
    regions: tuple[ir.Work, ...] = (
        site.sites[0].region,
        site.second.region,
        site.region,
    )
    for region, entry in zip(regions, entries, strict=True):
        if entry is not None:
            compiler = target.origin.compiler or ""
            made = dataclasses.replace(entry, compiler=compiler)
            target.results.put(target.arch, {region: made})


def known(target: resolve.Target, chain_entry: db.Entry | None = None) -> None:
    site = info()
    save(target, site_entry(site.sites[0]), site_entry(site.second), chain_entry)


def text_of(fun: Any = bottleneck) -> str:
    optimized = jax_bolt.optimize(lambda *args: fun(*args))
    lowered = jax.jit(optimized).trace(*ARGS).lower(lowering_platforms=("cuda",))
    return lowered.as_text()


def count(text: str) -> int:
    """How many kernels the one custom call launches: its program's second number."""
    (short, long) = re.findall(r'program = dense<(?:\[2, (\d+),|"0x(\w+)")', text)[0]
    return int(short or int.from_bytes(bytes.fromhex(long)[8:16], "little"))


def test_what_was_timed_faster_runs(machine: resolve.Target) -> None:
    known(machine, entry_of())
    text = text_of()
    assert TARGET in text and count(text) == 1
    assert count_with(disable=("chain",)) == 2
    known(machine, entry_of(choice="apart"))
    assert count(text_of()) == 2


def count_with(**changes: Any) -> int:
    with options.options(**changes):
        return count(text_of())


@pytest.mark.parametrize("on_miss", ["heuristic", "error"])
def test_what_was_not_timed_does_not_run(
    machine: resolve.Target, on_miss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is it an error: its sites have kernels."""
    monkeypatch.setattr(search, "tune", lambda *_: pytest.fail("nothing is tuned"))
    known(machine)
    assert count_with(on_miss=on_miss) == 2


def tuning(monkeypatch: pytest.MonkeyPatch, tuned: Callable[..., Any]) -> list[Any]:
    """Calls of ``search.tune``, which ``tuned`` answers."""
    calls: list[Any] = []

    def tune(sites: Any, target: Any, budget_s: Any, show: Any, rivals: Any = None):
        calls.append((list(sites), budget_s, rivals))
        return tuned(sites, target)

    monkeypatch.setattr(search, "tune", tune)
    return calls


def test_chains_are_tuned_after_their_sites(
    machine: resolve.Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = info()

    def tuned(sites: Any, target: Any) -> dict[str, str]:
        both = [s for s in sites if isinstance(s, SiteInfo)]
        entries = [site_entry(s) for s in site.sites] if both else []
        save(target, *(entries or (None, None)), None if both else entry_of())
        return {}

    calls = tuning(monkeypatch, tuned)
    assert count_with(on_miss="tune") == 1
    (sites, _, none), (chains, _, rivals) = calls
    assert [s.region for s in sites] == [site.sites[0].region, site.second.region]
    assert none is None and [c.region for c in chains] == [site.region]
    (rival,) = rivals.values()
    assert rival.chosen_us is None
    wanted = [site.sites[0].region.problem, site.second.region.problem]
    assert [kernel.problem for kernel in rival.kernels] == wanted
    assert all(isinstance(kernel, Executable) for kernel in rival.kernels)
    assert count_with(on_miss="tune") == 1 and len(calls) == 2
    # Without chains there is nothing more to tune.
    known(machine)
    assert count_with(on_miss="tune", disable=("chain",)) == 2 and len(calls) == 2


def test_a_site_on_xla_has_its_time_beside_the_others_kernel(
    machine: resolve.Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = info()
    slow = site_entry(site.second, choice="xla")
    save(machine, site_entry(site.sites[0]), slow, None)
    calls = tuning(monkeypatch, lambda *_: {site.region.text: "not reached"})
    with options.options(on_miss="tune"):
        text_of()
    ((_, _, rivals),) = calls
    (rival,) = rivals.values()
    assert rival.chosen_us == 4.0 + 9.0
    # What failed is not tried again by this process, and the report says why.
    with options.options(on_miss="tune"):
        text_of()
        report = jax_bolt.explain(bottleneck, *ARGS)
    assert len(calls) == 1
    assert [s.chains[0].reason for s in report.sites] == ["not reached"] * 2


def test_a_site_without_a_kernel_of_its_own(
    machine: resolve.Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = info()
    gone = dataclasses.replace(site_entry(site.second), choice="xla", config="gone")
    save(machine, site_entry(site.sites[0]), gone, None)
    calls = tuning(monkeypatch, lambda *_: {})
    results.tune_chains([site], machine, options.current())
    reason = results.failure(machine.arch, site.region)
    assert calls == [] and reason is not None
    assert reason.endswith("has no kernel of its own")


def test_what_is_far_behind_is_not_timed(
    machine: resolve.Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sites' kernels take 4 µs each."""
    site = info()
    save(machine, site_entry(site.sites[0]), site_entry(site.second), None)
    calls = tuning(monkeypatch, lambda *_: {})
    monkeypatch.setattr(chain_stub, "micros", lambda *_: 10.1)
    results.tune_chains([site], machine, options.current())
    reason = results.failure(machine.arch, site.region)
    assert calls == [] and reason is not None
    assert reason.startswith("about 10 µs in one kernel, 8 apart")
    monkeypatch.setattr(chain_stub, "micros", lambda *_: 9.9)
    results.tune_chains([site], machine, options.current(), retry=True)
    assert len(calls) == 1


FIRST_BLOCK = (
    *(shape(8, 14, 14, 64), shape(8, 14, 14, 128)),
    *(shape(1, 1, 64, 256), shape(1, 1, 128, 256), shape(1, 1, 256, 64)),
)


def first_block(a, b, wa, wb, down):
    """A projected shortcut, and the next block's reduction."""
    y = jax.nn.relu(conv(a, wa) + conv(b, wb))
    return jax.nn.relu(conv(y, down)), y


@pytest.mark.parametrize("merged", ["kernel", "apart"])
def test_three_are_compared_with_the_pair_that_they_begin_with(
    machine: resolve.Target, monkeypatch: pytest.MonkeyPatch, merged: str
) -> None:
    """Once that was tuned, and only where it is one kernel."""
    found = pairs(first_block, *FIRST_BLOCK)
    start, other, longest = (each.info for each in found)
    assert longest.first.region == start.region and other.region.side is None
    compiler = machine.origin.compiler or ""
    for each in longest.sites:
        entry = dataclasses.replace(site_entry(each), compiler=compiler)
        machine.results.put(machine.arch, {each.region: entry})

    def tuned(sites: Any, target: Any) -> dict[str, str]:
        for site in sites:
            form = forms.chain_forms(site.region)[0].name
            choice = merged if site.region == start.region else "kernel"
            entry = dataclasses.replace(entry_of(choice=choice), compiler=compiler)
            entry = dataclasses.replace(entry, form=form)
            target.results.put(target.arch, {site.region: entry})
        return {}

    calls = tuning(monkeypatch, tuned)
    infos = [each.info for each in reversed(found)]
    active = dataclasses.replace(options.current(), budget_s=60.0)
    results.tune_chains(infos, machine, active)
    assert [site.region for site in calls[0][0]] == [other.region, start.region]
    if merged == "apart":
        reason = results.failure(machine.arch, longest.region)
        assert len(calls) == 1 and reason is not None
        assert reason.endswith("is not one kernel")
        return
    (_, (sites, budget_s, rivals)) = calls
    assert [site.region for site in sites] == [longest.region] and 0 < budget_s <= 60.0
    (rival,) = rivals.values()
    first, second = rival.kernels
    assert isinstance(first, ChainExecutable) and isinstance(second, Executable)
    assert first.problems == tuple(r.problem for r in start.region.regions)
    # All three save what the pair saves, and their own.
    report = jax_bolt.explain(first_block, *FIRST_BLOCK)
    links = [[link for link in site.chains if link.chosen] for site in report.sites]
    assert [link.position for (link,) in links] == ["first", "second", "third"]
    names = [site.name for site in longest.sites]
    assert links[2][0].other == f"{names[0]} and {names[1]}"
    entry = entry_of()
    assert entry.apart_time_us and entry.time_us
    saved_us = entry.apart_time_us - entry.time_us
    assert links[0][0].apart_time_us == pytest.approx(entry.apart_time_us + saved_us)
    assert links[0][0].saved_us == pytest.approx(2 * saved_us)


def test_a_template_that_fails_costs_only_its_chain(
    machine: resolve.Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise ZeroDivisionError("of ours")

    known(machine)
    first, second = pairs(three, *ARGS)
    known_third = site_entry(second.info.second)
    machine.results.put(machine.arch, {second.info.second.region: known_third})
    rival = results._rival

    def failing(site: Any, *rest: Any) -> Any:
        return fail() if site is first.info else rival(site, *rest)

    monkeypatch.setattr(results, "_rival", failing)
    calls = tuning(monkeypatch, lambda *_: {})
    infos = [first.info, second.info]
    results.tune_chains(infos, machine, options.current())
    ((tuned, _, _),) = calls
    assert tuned == [second.info]
    assert results.failure(machine.arch, first.info.region) == "of ours"


@pytest.mark.parametrize("merged", [False, True])
def test_a_second_kernel_that_has_its_input_rearranged(
    machine: resolve.Target, merged: bool
) -> None:
    """It cannot read what another kernel just made, but have that as a side input."""

    def back_to_back(x, y, w, v):
        return conv(jax.nn.relu(conv(x, w)), v)

    def shortcut(x, y, w, v):
        made = conv(x, w)
        return jax.nn.relu(conv(y, v) + made)

    fun = shortcut if merged else back_to_back
    args = (*(shape(4, 8, 8, 20),) * 2, *(shape(1, 1, 20, 20),) * 2)
    (pair,) = pairs(fun, *args)
    site = pair.info
    assert site.region.side == (0 if merged else None)
    for each in site.sites:
        found, _ = plan.candidates(each.region, machine.arch)
        (padded, *_) = (c for c in found if c.form.name == "pixels_k_major")
        entry = dataclasses.replace(
            site_entry(each),
            form=padded.form.name,
            template=padded.template.name,
            config=padded.config.text,
            compiler=machine.origin.compiler or "",
        )
        machine.results.put(machine.arch, {each.region: entry})
    if merged:
        first, second = results._rival(site, 1.0, machine, options.current()).kernels
        assert first.form.name == second.form.name == "pixels_k_major"
        return
    with pytest.raises(job.Untunable, match="rearranges what it reads"):
        results._rival(site, 1.0, machine, options.current())


def test_without_a_compiler_nothing_is_tuned(
    machine: resolve.Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    known(machine)
    calls = tuning(monkeypatch, lambda *_: {})
    without = dataclasses.replace(machine, tools=CompileError("no nvcc"))
    results.tune_chains([info()], without, options.current())
    assert calls == []
    assert results.failure(machine.arch, info().region) is None


def test_tune_tunes_chains_within_what_is_left(
    machine: resolve.Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    known(machine)

    def tuned(sites: Any, target: Any) -> dict[str, str]:
        save(target, None, None, entry_of())
        return {}

    calls = tuning(monkeypatch, tuned)
    report = jax_bolt.tune(bottleneck, *ARGS, budget_s=100.0, progress=False)
    ((_, budget_s, _),) = calls
    assert 50.0 < budget_s <= 100.0
    assert all(site.chain is not None for site in report.sites)


def test_results_of_other_versions_are_taken_over(
    machine: resolve.Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    known(machine, entry_of(sources="others"))
    taken: list[Any] = []

    def adopt(old: Any, target: Any) -> None:
        taken.extend(old)
        save(target, None, None, entry_of())

    monkeypatch.setattr(results.adopt, "adopt", adopt)
    assert count(text_of()) == 1
    (old,) = taken
    assert old.site.region == info().region
    assert old.candidate.template.name == chain_stub.name


def three(x: Any, residual: Any, up: Any, down: Any) -> Any:
    """Two chains that share the second call."""
    y, _ = bottleneck(x, residual, up, down)
    return jax.nn.relu(chain_stub.conv(y, up))


def test_of_two_that_share_a_call_the_one_that_saves_more(
    machine: resolve.Target,
) -> None:
    first, second = pairs(three, *ARGS)
    for times in ((5.0, 7.0), (7.0, 5.0)):
        for pair, time_us in zip((first, second), times, strict=True):
            compiler = machine.origin.compiler or ""
            entry = entry_of(time_us, compiler=compiler)
            machine.results.put(machine.arch, {pair.info.region: entry})
        assert count(text_of(three)) == 2
        report = jax_bolt.explain(three, *ARGS)
        chosen = [
            [link.position for link in site.chains if link.chosen]
            for site in report.sites
        ]
        if times[0] < times[1]:
            assert chosen == [["first"], ["second"], []]
        else:
            assert chosen == [[], ["first"], ["second"]]
        (reason,) = {
            link.reason
            for site in report.sites
            for link in site.chains
            if not link.chosen
        }
        assert reason == "another chain of one of them saves more"


def test_a_full_cache_needs_no_compiler(
    machine: resolve.Target, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Neither here nor where it was exported to."""
    known(machine, entry_of())
    assert count(text_of()) == 1
    # As tuning would have left them.
    site = info()
    for region in (site.sites[0].region, site.second.region, site.region):
        entry = machine.results.get(machine.arch, region)
        candidate = plan.chosen(region, machine.arch, entry) if entry else None
        assert entry is not None and candidate is not None
        digest = machine.digest(candidate.source)
        assert machine.kernels.find(digest) is not None
        saved = dataclasses.replace(entry, digest=digest)
        machine.results.put(machine.arch, {region: saved})
    archive = str(tmp_path / "cache.zip")
    assert cli.main(["cache", "export", archive]) == 0

    def none(_: Any) -> Any:
        raise CompileError("no compiler")

    monkeypatch.setattr(toolchain, "find", none)
    assert count(text_of()) == 1
    with options.options(cache_dir=tmp_path / "other"):
        assert cli.main(["cache", "import", archive]) == 0
        assert count(text_of()) == 1


# --- Several processes


def lowered_by(world: test_agree.World, process: int, fun: Any) -> str:  # noqa: F811
    world.monkeypatch.setattr(jax, "process_index", lambda: process)
    with options.options(cache_dir=world.folder / str(process)):
        return text_of(fun)


def test_processes_agree_on_chains(world: test_agree.World, gpu: Any) -> None:  # noqa: F811
    """The second has no results, or others: what the first one measured counts."""
    first, second = pairs(three, *ARGS)
    for process, times in enumerate(((7.0, 5.0), (5.0, 7.0))):
        with options.options(cache_dir=world.folder / str(process)):
            target = resolve.target_for(gpu, options.current())
            for pair, time_us in zip((first, second), times, strict=True):
                entry = entry_of(time_us, compiler=target.origin.compiler or "")
                target.results.put(target.arch, {pair.info.region: entry})
    texts = {lowered_by(world, process, three) for process in (0, 1, 2)}
    assert len(texts) == 1 and count(texts.pop()) == 2
    # Left to itself the second process chooses the other chain.
    world.monkeypatch.setattr(test_agree.compat, "distributed_client", lambda: None)
    alone = [lowered_by(world, process, three) for process in (0, 1)]
    assert alone[0] != alone[1]


# --- The report


@pytest.fixture
def report(machine: resolve.Target) -> jax_bolt.Report:
    known(machine, entry_of(kernel_time_us=4.5, notes="one did not end"))
    return jax_bolt.explain(bottleneck, *ARGS)


def test_a_chain_is_shown_at_both_sites(report: jax_bolt.Report) -> None:
    first, second = report.sites
    for site, other, position in ((first, second, "first"), (second, first, "second")):
        (link,) = site.chains
        assert site.chain is link and link.chosen and link.stored
        assert (link.other, link.position, link.reason) == (other.name, position, "")
        assert (link.time_us, link.apart_time_us, link.xla_time_us) == (5.0, 8.0, 20.0)
        assert (link.kernel_time_us, link.provenance) == (4.5, "user")
        assert link.estimate.startswith("saves ") and link.saved_us == 3.0
        assert link.kernel == "chain_stub pixels=128 (pixels+pixels)"
        assert (
            site.what_runs == f"{link.kernel} [user], in one kernel with {other.name}"
        )
        assert site.what_runs_in_short == f"chain_stub, with {other.name}"
        # What is said of the site is of the site alone.
        assert (site.time_us, site.xla_time_us) == (4.0, 9.0)
    assert report.totals.chosen_us == 4.0 + 4.0 - 3.0
    assert report.totals.xla_us == 18.0
    column = [
        line.split("│")[3].strip() for line in str(report).splitlines() if "│" in line
    ]
    assert " ".join(column).count("in one kernel with") == 2


def test_chains_as_json(report: jax_bolt.Report) -> None:
    document = json.loads(report.to_json())
    (link,) = document["sites"][0]["chains"]
    assert link["chosen"] is True and link["apart_time_us"] == 8.0
    assert document["totals"]["chosen_us"] == 5.0


def test_chains_on_the_page(report: jax_bolt.Report, tmp_path: Path) -> None:
    report.to_html(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    for text in (
        "in one kernel with ",
        "one kernel 5.0 µs; each in its own 8.0 µs; XLA 20.0 µs",
        "the kernel alone 4.5 µs",
        "one did not end",
    ):
        assert page.count(text) >= 2, text
    hostile = dataclasses.replace(
        report.sites[0],
        chains=(Link(other="<script>", position="first", stored=False, chosen=True),),
    )
    page = report_page.page("title", "", (hostile,))
    assert "<script>" not in page and "&lt;script&gt;" in page


def test_why_there_is_no_chain(machine: resolve.Target) -> None:
    def reasons() -> list[str]:
        sites = jax_bolt.explain(bottleneck, *ARGS).sites
        return [link.reason for site in sites for link in site.chains]

    known(machine)
    assert reasons() == ["it was not timed"] * 2
    known(machine, entry_of(9.0, choice="apart"))
    assert reasons() == ["it was not timed faster: 9.0 µs to 8.0 µs"] * 2
    with options.options(disable=("chain",)):
        assert reasons() == []
    site = jax_bolt.explain(bottleneck, *ARGS).sites[0]
    (link,) = site.chains
    assert not link.chosen and site.chain is None and link.saved_us == 0.0
    assert (link.time_us, link.apart_time_us) == (9.0, 8.0)


def test_why_no_kernel_takes_it(
    machine: resolve.Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "CHAIN_TEMPLATES", ())
    (link,) = jax_bolt.explain(bottleneck, *ARGS).sites[0].chains
    assert link.reason == "no kernel takes it"


def test_without_an_architecture_chains_are_named_alone() -> None:
    report = jax_bolt.explain(bottleneck, *ARGS)
    assert report.arch == ""
    for site in report.sites:
        (link,) = site.chains
        assert not link.chosen and link.stored and link.kernel == ""


def test_totals_count_a_chain_once() -> None:
    link = Link(
        other="b",
        position="first",
        stored=True,
        chosen=True,
        time_us=5.0,
        apart_time_us=8.0,
    )
    region = info().sites[0].region
    site = Site(
        name="a",
        line="",
        root="",
        kernel="k",
        time_us=4.0,
        xla_time_us=9.0,
        floor=floor(region, HOPPER),
        chains=(link,),
    )
    other = dataclasses.replace(
        site, chains=(dataclasses.replace(link, position="second"),)
    )
    assert totals([site, other]).chosen_us == 5.0
    assert totals(iter([site, other])).timed == 2


def test_frozen_functions_have_chains(machine: resolve.Target) -> None:
    """The filters of both sites are prepared once."""
    known(machine, entry_of())

    def params_first(params: Any, x: Any, residual: Any) -> Any:
        return bottleneck(x, residual, *params)

    frozen = jax_bolt.freeze(params_first, list(ARGS[2:]))
    sites = frozen.explain(*ARGS[:2]).sites
    assert all(site.chain is not None for site in sites)


def test_the_shipped_ones_count_where_the_user_has_none(
    machine: resolve.Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = db.device_key(machine.arch)
    path = tmp_path / "shipped" / db.file_name(key)
    path.parent.mkdir()
    compiler = machine.origin.compiler or ""
    entry = entry_of(compiler=compiler)
    path.write_text(db.text(key, {info().region.text: entry}))
    monkeypatch.setattr(paths, "shipped_tuning", lambda: path.parent)
    site = jax_bolt.explain(bottleneck, *ARGS).sites[0]
    assert site.chain is not None and site.chain.provenance == "shipped"
    assert count(text_of()) == 1


def test_a_form_of_both() -> None:
    names = [form.name for form in forms.chain_forms(info().region)]
    assert names == ["pixels+pixels"]
