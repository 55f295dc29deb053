# SPDX-License-Identifier: Apache-2.0
"""Tunes the regions or the chains of a program, in two stages, and keeps the best.

Stage 1 times base programs (``base.py``): nothing is compiled. Stage 2 compiles the
best few with the region's own epilogue, times them, verifies the fastest and compares
it with XLA's own lowering (``verdict.py``). Compilers work on the next regions while
the GPU times one.

Chains have no base programs. They are tuned once their regions are, and are compared
with these, too (``rival.py``).

Whatever is launched for the first time is launched in a process of its own
(``isolate.py``). Only what ran there, ended and wrote its whole result is then run in
this one, to be verified and to be compared with XLA.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax

from .. import base, ir, plan
from ..chain import AnySite
from ..errors import CacheError, CompileError
from ..jit import store
from ..plan import AnyCandidate, Candidate
from . import db, isolate, measure, stages
from .builder import Builder, Built, Stopped
from .failures import Failures
from .isolate import Timing
from .job import Job, Untunable, first_line, spending_on
from .progress import Progress
from .rival import Rival
from .stages import Timed
from .target import Target
from .verdict import decided

logger = logging.getLogger(__name__)

_REPEATS_BASE, _REPEATS = 3, 7
_END_S = 5.0


def tune(
    sites: Sequence[AnySite],
    target: Target,
    budget_s: float | None,
    show_progress: bool = True,
    rivals: Mapping[str, Rival] | None = None,
) -> dict[str, str]:
    """Tunes ``sites`` and records the results; one reason per region that failed.

    ``rivals`` are those of chains, by their texts.

    Runs in a thread of its own: the caller may be in the middle of a trace, and what
    tuning runs must not become part of it. An interrupt of the caller ends it.
    """
    unique = list({site.region.text: site for site in sites}.values())
    run = _Run(target, budget_s, Progress(show_progress), rivals or {})
    error: list[BaseException] = []

    def work() -> None:
        try:
            with jax.default_device(target.device), jax.debug_nans(False):
                run.tune(unique)
        except BaseException as raised:
            error.append(raised)

    logger.warning(
        "jax_bolt: building and timing kernels for %d %s, once for this GPU; "
        "this takes minutes",
        *(len(unique), "chains" if rivals else "regions"),
    )
    thread = threading.Thread(target=work, name="jax_bolt-tune", daemon=True)
    thread.start()
    try:
        thread.join()
    except BaseException:
        run.stop.set()
        thread.join(_END_S)  # it has a bar on the terminal, and a worker
        raise
    if error:
        raise error[0]
    return run.failures


class _Run:
    """One tuning of several regions."""

    def __init__(
        self,
        target: Target,
        budget_s: float | None,
        progress: Progress,
        rivals: Mapping[str, Rival],
    ):
        self.target = target
        self._rivals = rivals
        self.progress = progress
        self.failures: dict[str, str] = {}
        self.stop = threading.Event()
        self._budget_s = budget_s
        self._deadline = None if budget_s is None else time.monotonic() + budget_s
        self._finish_s = 0.0  # the longest that the end of a region took
        self._crashes = Failures(target.results.root)
        self._builder = Builder(target)
        self._jobs: list[Job] = []  # those that have neither a result nor a reason
        self._base: dict[str, tuple[str, Path]] = {}

    def check(self, reserve_s: float = 0.0) -> None:
        """Raises Stopped when it is time to stop, or will be in ``reserve_s``."""
        if self.stop.is_set():
            raise Stopped("tuning was interrupted")
        late = time.monotonic() + reserve_s
        if self._deadline is not None and late > self._deadline:
            raise Stopped(f"the tuning budget of {self._budget_s} s is spent")

    def tune(self, sites: list[AnySite]) -> None:
        self._jobs = [job for site in sites if (job := self._job(site)) is not None]
        if not self._jobs:
            return
        try:
            with self.progress, self._builder:
                self.progress.start("tuning", len(self._jobs))
                with isolate.worker(self.target.ordinal) as self._worker:
                    # Hidden behind looking for what is built.
                    self._worker.start()
                    self._tune_all()
        except (Stopped, isolate.Unavailable) as error:
            for job in self._jobs:
                self.failures[job.site.region.text] = str(error)

    def _tune_all(self) -> None:
        with spending_on("base programs"):
            self._build_base_programs()
        ready: collections.deque[Job] = collections.deque()
        for job in list(self._jobs):
            with self._giving_a_reason(job):
                with spending_on("stage 1"):
                    self._first_stage(job)
                self._builder.add(job.sources)
                ready.append(job)
            # As long as compilers are behind, the next region's first stage.
            while ready and self._builder.are_built(ready[0].sources):
                self._second_stage(ready.popleft())
        while ready:
            self._second_stage(ready.popleft())

    def _job(self, site: AnySite) -> Job | None:
        target = self.target
        found: Sequence[AnyCandidate]
        try:
            found, reasons = _candidates(site.region, target)
        except Exception as error:  # a fault of ours: the other regions have none
            logger.info("%s", site, exc_info=True)
            found, reasons = [], [first_line(error)]
        if not found:
            reason = "no kernel takes it: " + "; ".join(reasons)
            self.failures[site.region.text] = reason
            return None
        before = target.results.get(target.arch, site.region)
        sets = measure.sets_for(site.region, target.arch.l2_bytes)
        whole = [c for c in found if c.form.part is None]
        parts = [c for c in found if c.form.part is not None]
        rival = self._rivals.get(site.region.text)
        # Where there are none for the whole, those for a part at once.
        return Job(site, whole or parts, before, sets, rival, parts if whole else [])

    @contextlib.contextmanager
    def _giving_a_reason(self, job: Job) -> Iterator[None]:
        """What ends the tuning of a region is its reason to run on XLA."""
        try:
            with _memory_guard():
                yield
        except (isolate.Unavailable, CacheError):
            raise
        except (Stopped, Untunable) as error:
            reason = str(error)
        except Exception as error:  # a fault of the device, say: the others may work
            logger.info("%s", job.site, exc_info=True)
            reason = f"tuning failed: {first_line(error)}"
        else:
            return
        self._jobs.remove(job)
        self.failures[job.site.region.text] = reason

    # --- Stage 1

    def _build_base_programs(self) -> None:
        """Those that are missing, where that is worth it.

        A program costs what a kernel does, and saves one only where enough of a
        region's candidates have one. So missing ones are built where there are fewer of
        them than of the kernels that are then not built; for other models they remain.
        """
        wanted = dict.fromkeys(
            stand.source
            for job in self._jobs
            for candidate in job.found
            if (stand := _stand_in(candidate)) is not None
        )
        missing = [source for source in wanted if self._base_program(source) is None]
        if 0 < len(missing) <= stages.savings([job.found for job in self._jobs]):
            self._builder.add(missing)
            self._builder.wait(missing, self.check)

    def _base_program(self, source: str) -> tuple[str, Path] | None:
        """Its digest and artifact, where it is built by now, here or elsewhere."""
        if source not in self._base:
            digest = self.target.digest(source)
            path = self.target.kernels.find(digest)
            if path is None:
                return None
            self._base[source] = digest, path
        return self._base[source]

    def _first_stage(self, job: Job) -> None:
        """Leaves those candidates in ``job`` that are to be built."""
        self._check_for_finish()
        times: dict[AnyCandidate, float] = {}
        failed: set[AnyCandidate] = set()
        for candidate in job.found:
            stand = _stand_in(candidate)
            built = None if stand is None else self._base_program(stand.source)
            if stand is None or built is None:
                continue
            timing = self._time(job, stand, *built, _REPEATS_BASE)
            if timing is None:
                failed.add(candidate)
            else:
                times[candidate] = timing.micros
                store.count("stage1")
        left = [c for c in job.found if c not in failed]
        job.found = stages.finalists(left, times, job.before)

    # --- Stage 2

    def _second_stage(self, job: Job) -> None:
        site = job.site
        self.progress.step(site.label, self._builder.left())
        with self._giving_a_reason(job):
            with spending_on("compilers"):
                built = self._builder.wait(job.sources, self._check_for_finish)
            with spending_on("stage 2"):
                groups = self._time_all(job, built)
            start = time.monotonic()
            entry = decided(job, groups, built, self.target, self._is_late)
            self._finish_s = max(self._finish_s, time.monotonic() - start)
            if entry.choice == "xla" and job.parts:
                entry = self._with_parts(job, entry)
            store.count("tuned")
            self.target.results.put(self.target.arch, {site.region: entry})
            self.progress.result(entry)
            self._jobs.remove(job)
        for problem in job.problems:
            logger.info("%s: %s", site, problem)

    def _with_parts(self, job: Job, whole: db.Entry) -> db.Entry:
        """What a kernel for a part of the region gives, if it beats XLA, or ``whole``.

        Kernels that end early are compiled only here: mostly they are not needed.
        """
        job.found, job.parts = job.parts, []
        try:
            with spending_on("stage 1"):
                self._first_stage(job)
            self._builder.add(job.sources)
            with spending_on("compilers"):
                built = self._builder.wait(job.sources, self._check_for_finish)
            with spending_on("stage 2"):
                groups = self._time_all(job, built)
            entry = decided(job, groups, built, self.target, self._is_late)
        except (Stopped, Untunable) as error:
            if self.stop.is_set():
                raise
            job.problems.append(str(error))
            return whole
        tried = whole.candidates + entry.candidates
        better = entry if entry.choice == "kernel" else whole
        return dataclasses.replace(better, candidates=tried)

    def _check_for_finish(self) -> None:
        """As ``check``, keeping the time that verifying what was found takes."""
        self.check(self._finish_s)

    def _time_all(self, job: Job, built: Built) -> list[list[Timed]]:
        """The candidates of each form that ran, the choice first.

        Those for which there is no time any more are left out, if there are others.
        """
        groups: dict[str, list[Timed]] = {}
        try:
            for candidate in job.found:
                self._check_for_finish()
                digest, path = built[candidate.source]
                if isinstance(path, CompileError):
                    job.problems.append(f"{candidate.text}: {first_line(path)}")
                    continue
                timing = self._time(job, candidate, digest, path, _REPEATS, verify=True)
                if timing is not None:
                    store.count("stage2")
                    timed = Timed(candidate, digest, timing)
                    groups.setdefault(candidate.form.name, []).append(timed)
        except Stopped:
            if not groups or self.stop.is_set():
                raise
        ordered = [stages.in_order(group, job.before) for group in groups.values()]
        # What was chosen before comes first, and stays unless it is clearly beaten.
        return sorted(
            ordered, key=lambda group: not stages.is_of(job.before, group[0].candidate)
        )

    def _is_late(self) -> bool:
        return self._deadline is not None and time.monotonic() > self._deadline

    # --- Both

    def _time(
        self,
        job: Job,
        candidate: AnyCandidate,
        digest: str,
        path: Path,
        repeats: int,
        *,
        verify: bool = False,
    ) -> Timing | None:
        """Of a launch in the worker; None where there is none, which is noted."""
        region, bandwidth = candidate.form.region, self.target.arch.bandwidth
        try:
            while True:
                request = isolate.request_for(
                    candidate, digest, path, job.sets, repeats, verify=verify
                )
                limit_s = isolate.limit_s(region, job.sets, bandwidth)
                try:
                    return isolate.launch(
                        *(self._worker, request, limit_s),
                        *(self._crashes, self._check_for_finish),
                    )
                except isolate.NoMemory:
                    if job.sets == 1:
                        raise Untunable(_NO_MEMORY) from None
                    job.sets //= 2
        except isolate.Failed as error:
            problem = f"{candidate.text}: {error}"
            job.problems.append(problem)
            if error.fatal:
                logger.warning("jax_bolt: %s: %s", job.site, problem)
                job.notes.append(problem)
            return None


_NO_MEMORY = "not tuned: too little free device memory"


@contextlib.contextmanager
def _memory_guard() -> Iterator[None]:
    """Too little memory is a reason not to tune, never an error of the user's."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise Untunable(_NO_MEMORY) from error


def _candidates(
    work: ir.Work, target: Target
) -> tuple[Sequence[AnyCandidate], list[str]]:
    if isinstance(work, ir.Chain):
        return plan.chain_candidates(work, target.arch, target.disable)
    return plan.candidates(work, target.arch, target.disable)


def _stand_in(candidate: AnyCandidate) -> Candidate | None:
    return base.stand_in(candidate) if isinstance(candidate, Candidate) else None
