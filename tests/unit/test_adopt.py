# SPDX-License-Identifier: Apache-2.0
"""Results of other versions, shipped or the user's own: checked once, then used."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_errors import ARGS, TARGET, dense, gpu, lowered, nvcc  # noqa: F401

import jax_bolt
from jax_bolt._src import options, paths, plan, program, resolve, results
from jax_bolt._src.errors import CompileError
from jax_bolt._src.jit import store
from jax_bolt._src.jit import toolchain as toolchains
from jax_bolt._src.site import Site
from jax_bolt._src.tune import adopt, db, isolate, job, measure, search
from jax_bolt._src.tune.target import Target


@dataclasses.dataclass
class World:
    """A site, a result for it, and what the GPU says of its kernel."""

    site: Any
    target: Target
    shipped: Path
    checked: list[str] = dataclasses.field(default_factory=list)
    verdict: Callable[[], measure.Errors] = lambda: measure.Errors(1e-3, 1e-3)

    @property
    def candidate(self) -> plan.Candidate:
        made = plan.heuristic(self.site.region, self.target.arch)
        assert isinstance(made, plan.Plan)
        return made.candidate

    def entry(self, **changes: Any) -> db.Entry:
        entry = db.Entry(
            choice="kernel",
            form=self.candidate.form.name,
            template=self.candidate.template.name,
            config=self.candidate.config.text,
            sources=self.target.origin.sources,
            compiler="nvcc 1.2",
            time_us=2.0,
            xla_time_us=3.0,
            error=5e-3,
            xla_error=5e-3,
        )
        return dataclasses.replace(entry, **changes)

    def save(self, entry: db.Entry) -> None:
        self.target.results.put(self.target.arch, {self.site.region: entry})

    def ship(self, entry: db.Entry) -> None:
        key = db.device_key(self.target.arch)
        self.shipped.mkdir(exist_ok=True)
        text = db.text(key, {self.site.region.text: entry})
        (self.shipped / db.file_name(key)).write_text(text)

    @property
    def own(self) -> db.Entry | None:
        return self.target.results.get(self.target.arch, self.site.region)

    def runs_on_a_kernel(self, **changes: Any) -> bool:
        with (
            options.options(**{"on_miss": "xla", **changes}),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("error")
            return TARGET in lowered(jax_bolt.optimize(lambda *args: dense(*args)))


@pytest.fixture
def world(gpu, nvcc, monkeypatch, tmp_path) -> World:  # noqa: F811
    monkeypatch.setattr(paths, "shipped_tuning", lambda: tmp_path / "shipped")
    monkeypatch.setattr(results, "_tried", set())
    target = resolve.target_for(gpu, options.current())
    (site,) = program.trace(dense, (), ARGS, {}, options.current())[0].family.sites
    made = World(site, target, tmp_path / "shipped")

    def check(site: Any, candidate: Any, digest: str, *_: Any) -> measure.Errors:
        made.checked.append(digest)
        return made.verdict()

    monkeypatch.setattr(adopt, "check", check)
    nowhere = contextlib.nullcontext()
    monkeypatch.setattr(isolate, "worker", lambda ordinal: nowhere)
    monkeypatch.setattr(adopt.jax, "default_device", lambda device: nowhere)
    return made


def test_without_a_result_there_is_nothing_to_adopt(world, nvcc):  # noqa: F811
    assert not world.runs_on_a_kernel()
    assert not world.checked and not nvcc.calls


@pytest.mark.parametrize("changes", [{}, {"sources": "older headers"}])
@pytest.mark.parametrize("where", ["save", "ship"])
def test_a_result_of_other_versions_is_checked_once_and_kept(
    world,
    nvcc,  # noqa: F811
    changes,
    where,
):
    getattr(world, where)(world.entry(**changes))
    before = store.stats()["adopted"]
    assert world.runs_on_a_kernel()
    (digest,) = world.checked
    # With what was found here, and the times there were.
    assert world.own == world.entry(
        digest=digest,
        compiler=world.target.origin.compiler,
        error=1e-3,
        xla_error=1e-3,
    )
    assert store.stats()["adopted"] == before + 1
    results.forget()  # the next process
    assert world.runs_on_a_kernel()
    assert len(world.checked) == len(nvcc.calls) == 1


def test_an_inaccurate_kernel_is_not_used(world):
    def inaccurate() -> measure.Errors:
        raise job.Untunable("its error is too large")

    world.verdict = inaccurate
    world.save(world.entry())
    assert not world.runs_on_a_kernel()
    assert world.own == world.entry()
    assert not world.runs_on_a_kernel()
    assert len(world.checked) == 1, "one try for each process"


def test_a_kernel_that_does_not_compile_is_not_used(world, nvcc):  # noqa: F811
    script = nvcc.nvcc.read_text()
    nvcc.nvcc.write_text(script.replace("grep -q FAIL source.cu", "true"))
    world.ship(world.entry())
    assert not world.runs_on_a_kernel()
    assert not world.checked and world.own is None


def test_what_cannot_be_recorded_is_left(world, monkeypatch):
    def fail(*_: Any) -> None:
        raise UserWarning("tuning results cannot be saved")  # python -W error

    world.save(world.entry())
    monkeypatch.setattr(db.Database, "put", fail)
    assert not world.runs_on_a_kernel()
    assert len(world.checked) == 1


def test_what_fails_is_tuned(world, monkeypatch):
    tuned: list[Any] = []

    def tune(sites: Any, *rest: Any) -> dict[str, str]:
        tuned.extend(sites)
        return {site.region.text: "a fake" for site in sites}

    monkeypatch.setattr(search, "tune", tune)
    world.verdict = lambda: measure.Errors(1 / 0, 0)
    world.save(world.entry())
    assert not world.runs_on_a_kernel(on_miss="tune")
    assert len(world.checked) == len(tuned) == 1


def test_what_is_adopted_is_not_tuned(world, monkeypatch):
    def tune(*args: Any) -> dict[str, str]:
        raise AssertionError("tuned")

    monkeypatch.setattr(search, "tune", tune)
    world.ship(world.entry(sources="older headers"))
    assert world.runs_on_a_kernel(on_miss="tune")


def test_a_shipped_result_of_these_versions_is_used_as_it_is(world):
    origin = world.target.origin
    world.ship(world.entry(compiler=origin.compiler))
    assert world.runs_on_a_kernel()
    assert not world.checked and world.own is None
    with options.options(on_miss="xla"):
        (site,) = jax_bolt.explain(dense, *ARGS).sites
    assert (site.provenance, site.time_us) == ("shipped", 2.0)


def test_the_users_own_result_wins(world):
    origin = world.target.origin
    world.ship(world.entry(compiler=origin.compiler))
    world.save(world.entry(choice="xla", compiler=origin.compiler))
    assert not world.runs_on_a_kernel()
    # Unless it is void and the shipped one is not.
    world.save(world.entry(choice="xla", sources="older headers"))
    assert world.runs_on_a_kernel()
    assert not world.checked


def test_a_choice_of_xla_holds_with_another_compiler_not_with_other_headers(world):
    assert world.target.origin.holds(world.entry(choice="xla"))
    other = world.entry(choice="xla", sources="older headers")
    assert not world.target.origin.holds(other)


def test_a_config_that_is_gone_is_void(world):
    world.save(world.entry(config="tile=1x1x1"))
    assert not world.runs_on_a_kernel()
    assert not world.checked
    # And the shipped one has its turn.
    world.ship(world.entry())
    results.forget()
    assert world.runs_on_a_kernel()


def test_without_a_compiler_nothing_is_adopted(world, monkeypatch):
    def none(_: Any) -> Any:
        raise CompileError("no compiler")

    world.save(world.entry(sources="older headers"))
    monkeypatch.setattr(toolchains, "find", none)
    assert not world.runs_on_a_kernel()
    assert not world.checked


def test_the_check_itself(world, monkeypatch):
    """What it asks of a kernel, on a device that only says what it is told."""
    monkeypatch.undo()
    candidate = world.candidate
    seen: list[dict[str, Any]] = []

    class Worker:
        def __init__(self, failed: isolate.Failed | None):
            self.failed = failed

        def time(self, request: dict[str, Any], limit_s: float, poll: Any) -> None:
            seen.append(request)
            if self.failed is not None:
                raise self.failed

    def check(failed: isolate.Failed | None, error: float) -> measure.Errors:
        found = measure.Errors(error, 1e-3)
        monkeypatch.setattr(measure, "errors", lambda *args: found)
        monkeypatch.setattr(adopt, "executable", lambda *args: "the kernel")
        worker: Any = Worker(failed)
        known = "digest", Path("artifact")
        return adopt.check(world.site, candidate, *known, world.target, worker)

    assert check(None, 1.2e-3).kernel == 1.2e-3
    with pytest.raises(isolate.Failed, match="unwritten"):
        check(isolate.Failed("left elements unwritten"), 0.0)
    with pytest.raises(job.Untunable, match="its error is"):
        check(None, 1.3e-3)
    with pytest.raises(isolate.Failed, match="crashed"):
        check(isolate.Failed("crashed the worker", fatal=True), 0.0)
    assert [request["digest"] for request in seen] == ["digest"] * 4
    with pytest.raises(isolate.Failed, match="crashed the worker, before"):
        check(None, 0.0)
    assert len(seen) == 4
    assert all(request["verify"] for request in seen)


def test_explain_says_what_will_be_taken_over(world):
    """And that it is checked before; not what was found to fail here."""

    def explained() -> Site:
        with options.options(on_miss="xla"):
            (site,) = jax_bolt.explain(dense, *ARGS).sites
        return site

    assert explained().provenance == "heuristic"
    world.ship(world.entry(notes="one crashed"))
    results.forget()
    site = explained()
    assert (site.provenance, site.time_us, site.xla_time_us) == ("shipped", 2.0, 3.0)
    assert site.kernel == world.candidate.text
    assert site.notes.startswith("made by other versions: checked here before")
    assert site.notes.endswith("; one crashed")
    assert not world.checked
    assert world.runs_on_a_kernel()
    site = explained()
    assert (site.provenance, site.notes) == ("user", "one crashed")


def test_explain_when_the_check_has_failed(world):
    def inaccurate() -> measure.Errors:
        raise job.Untunable("its error is too large")

    world.verdict = inaccurate
    world.save(world.entry())
    assert not world.runs_on_a_kernel()
    (site,) = jax_bolt.explain(dense, *ARGS).sites
    assert (site.provenance, site.notes) == ("heuristic", "")
