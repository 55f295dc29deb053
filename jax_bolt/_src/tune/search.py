# SPDX-License-Identifier: Apache-2.0
"""Tunes the regions of a program: build all candidates, time them, keep the best.

Candidates of all regions are compiled together, since compiling takes most of the
time and runs in parallel; they are then timed one after the other. XLA's own lowering
of the region is always among the candidates.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import jax

from .. import ir, plan
from ..arch import GpuArch
from ..errors import CompileError
from ..invoke import Executable, abi_problem
from ..jit import loader, store, toolchain
from ..plan import Candidate
from ..primitive import SiteInfo, reference_fun
from . import db, measure
from .progress import Progress

logger = logging.getLogger(__name__)

# XLA keeps a site unless a kernel is faster by more than timing noise, so that
# near-ties are decided the same way every time.
_MARGIN = 0.98


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """The device to tune for and the stores to tune into."""

    device: Any  # jax.Device
    ordinal: int  # CUDA's, in this process
    arch: GpuArch
    kernels: store.Store
    results: db.Database
    tools: toolchain.Toolchain | CompileError  # or why there is none
    origin: plan.Origin
    jobs: int | None
    disable: tuple[str, ...]

    @property
    def toolchain(self) -> toolchain.Toolchain:
        """Raises CompileError where there is none."""
        if isinstance(self.tools, CompileError):
            raise self.tools
        return self.tools


def origin(tools: toolchain.Toolchain | CompileError) -> plan.Origin:
    """Raises CompileError where our headers or CUTLASS's are missing."""
    compiler = None if isinstance(tools, CompileError) else f"nvcc {tools.version}"
    return plan.Origin(toolchain.sources(), compiler)


class Untunable(Exception):
    """Why a region could not be tuned; it runs on XLA in this process."""


# source -> (its digest, the path of its artifact or the CompileError)
Built: TypeAlias = dict[str, tuple[str, Any]]


class Stopped(Exception):
    """The caller no longer waits, or the budget is spent."""


def tune(
    sites: Sequence[SiteInfo],
    target: Target,
    budget_s: float | None,
    show_progress: bool = True,
) -> dict[str, str]:
    """Tunes ``sites`` and records the results; one reason per region that failed.

    Runs in a thread of its own: the caller may be in the middle of a trace, and what
    tuning runs must not become part of it. An interrupt of the caller ends it.
    """
    unique = list({site.region.text: site for site in sites}.values())
    run = _Run(target, budget_s, Progress(show_progress))
    error: list[BaseException] = []

    def work() -> None:
        try:
            with jax.default_device(target.device), jax.debug_nans(False):
                run.tune(unique)
        except BaseException as raised:
            error.append(raised)

    logger.warning(
        "jax_bolt: building and timing kernels for %d regions, once for this GPU; "
        "this takes minutes",
        len(unique),
    )
    thread = threading.Thread(target=work, name="jax_bolt-tune", daemon=True)
    thread.start()
    try:
        thread.join()
    except BaseException:
        run.stop.set()
        raise
    if error:
        raise error[0]
    return run.failures


class _Run:
    """One tuning of several regions."""

    def __init__(self, target: Target, budget_s: float | None, progress: Progress):
        self.target = target
        self.progress = progress
        self.failures: dict[str, str] = {}
        self.stop = threading.Event()
        self._budget_s = budget_s
        self._deadline = None if budget_s is None else time.monotonic() + budget_s

    def check(self) -> None:
        """Raises Stopped when it is time to stop."""
        if self.stop.is_set():
            raise Stopped("tuning was interrupted")
        if self._deadline is not None and time.monotonic() > self._deadline:
            raise Stopped(f"the tuning budget of {self._budget_s} s is spent")

    def tune(self, sites: list[SiteInfo]) -> None:
        target = self.target
        candidates = [
            plan.candidates(site.region, target.arch, target.disable) for site in sites
        ]
        with self.progress:
            built = self._build([c for found, _ in candidates for c in found])
            self.progress.start("tuning", len(sites))
            for site, (found, reasons) in zip(sites, candidates, strict=True):
                if not found:
                    reason = "no kernel takes it: " + "; ".join(reasons)
                    self.failures[site.region.text] = reason
                else:
                    self._tune_one(site, found, built)
                self.progress.step(site.label)
        measure.release()

    def _tune_one(self, site: SiteInfo, found: list[Candidate], built: Built) -> None:
        try:
            self.check()
            with _memory_guard():
                entry = _tune_site(site, found, built, self)
        except (Stopped, Untunable) as reason:
            self.failures[site.region.text] = str(reason)
        except Exception as error:  # a fault of the device, say: the others may work
            logger.info("%s", site, exc_info=True)
            reason = f"tuning failed: {_first_line(error)}"
            self.failures[site.region.text] = reason
        else:
            store.count("tuned")
            self.target.results.put(self.target.arch, {site.region: entry})
            self.progress.result(entry)

    def _build(self, candidates: list[Candidate]) -> Built:
        def step(digest: str) -> None:
            self.progress.step(digest[:8])
            self.check()

        self.progress.start("compiling", len({c.source for c in candidates}))
        return build(candidates, self.target, step)


def build(
    candidates: Sequence[Candidate], target: Target, step: Callable[[str], None]
) -> Built:
    """Compiles all of them together.

    ``step`` is called with the digest of every kernel that is done. It may raise
    Stopped, which ends the compilers; what they had left is a CompileError.
    """
    sources = list(dict.fromkeys(c.source for c in candidates))
    keys = {
        source: target.kernels.digest(target.toolchain, source, target.arch)
        for source in sources
    }
    results: dict[str, Any] = {}

    def on_done(digest: str, result: Any) -> None:
        results[digest] = result
        step(digest)

    with contextlib.suppress(Stopped):
        target.kernels.build(
            target.toolchain, sources, target.arch, target.jobs, on_done
        )
    missing = CompileError("not compiled: tuning stopped before")
    return {s: (keys[s], results.get(keys[s], missing)) for s in sources}


@contextlib.contextmanager
def _memory_guard() -> Iterator[None]:
    """Too little memory is a reason not to tune, never an error of the user's."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise Untunable("not tuned: too little free device memory") from error


@dataclasses.dataclass(frozen=True, slots=True)
class _Timed:
    """A candidate that ran, and its own time in µs."""

    candidate: Candidate
    kernel: Executable
    micros: float


def _tune_site(
    site: SiteInfo, found: list[Candidate], built: Built, run: _Run
) -> db.Entry:
    target = run.target
    operands = measure.make_operands(site, target.arch.l2_bytes)
    problems: list[str] = []
    groups = _time_kernels(site, found, built, operands, run, problems)
    xla = reference_fun(site.reference)
    xla_us = measure.time_region(xla, operands, target.ordinal)
    entry = db.Entry(
        choice="xla",
        sources=target.origin.sources,
        compiler=target.origin.compiler or "",
        xla_time_us=xla_us,
        candidates=sum(map(len, groups)),
        versions=db.versions(),
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
    )
    for group in groups:
        entry = _with_best(entry, site, group, operands, target, problems)
    if entry.time_us is None:
        raise Untunable("no candidate ran: " + "; ".join(problems))
    for problem in problems:
        logger.info("%s: %s", site, problem)
    if entry.time_us < _MARGIN * xla_us:
        entry = dataclasses.replace(entry, choice="kernel")
    return entry


def _with_best(
    entry: db.Entry,
    site: SiteInfo,
    group: list[_Timed],
    operands: measure.Operands,
    target: Target,
    problems: list[str],
) -> db.Entry:
    """``entry`` with the fastest accurate kernel of one form, if it is faster."""
    for timed in group:
        errors = measure.errors(operands, timed.kernel)
        if not measure.is_accurate(errors, site.region):
            problems.append(
                f"{timed.candidate.text}: error {errors.kernel:.2e}, "
                f"XLA's {errors.xla:.2e}"
            )
            continue
        time_us = time_in_program(timed.kernel, operands, target)
        if entry.time_us is not None and time_us >= entry.time_us:
            return entry
        return dataclasses.replace(
            entry,
            form=timed.candidate.form.name,
            template=timed.candidate.template.name,
            config=timed.candidate.config.text,
            digest=timed.kernel.digest,
            time_us=time_us,
            kernel_time_us=timed.micros,
            error=errors.kernel,
            xla_error=errors.xla,
        )
    return entry


def time_in_program(
    kernel: Executable, operands: measure.Operands, target: Target
) -> float:
    """Median µs of the region on ``kernel``, as programs for ``target`` run it."""
    if "sequence" not in target.disable:
        return measure.time_in_sequence(kernel, operands, target.ordinal)
    fun = measure.kernel_function(operands.site, kernel)
    return measure.time_region(fun, operands, target.ordinal)


def _time_kernels(
    site: SiteInfo,
    found: list[Candidate],
    built: Built,
    operands: measure.Operands,
    run: _Run,
    problems: list[str],
) -> list[list[_Timed]]:
    """The candidates of each form that ran, the fastest first."""
    groups: list[list[_Timed]] = []
    for name in dict.fromkeys(c.form.name for c in found):
        timed: list[_Timed] = []
        same_form = [c for c in found if c.form.name == name]
        buffers = measure.Buffers(operands, same_form[0].form)
        for candidate in same_form:
            run.check()
            digest, result = built[candidate.source]
            try:
                kernel = executable(site.region, candidate, digest, result, run.target)
                micros = measure.time_kernel(kernel, buffers, run.target.ordinal)
            except (CompileError, RuntimeError) as error:
                problems.append(f"{candidate.text}: {_first_line(error)}")
                continue
            if measure.left_unwritten(buffers, operands):
                problems.append(f"{candidate.text}: left elements unwritten")
                continue
            timed.append(_Timed(candidate, kernel, micros))
        # Stable: of equal times the heuristic's earlier one.
        groups.append(sorted(timed, key=lambda t: t.micros))
    return groups


def executable(
    region: ir.Region,
    candidate: Candidate,
    digest: str,
    artifact: Path | CompileError,
    target: Any,
) -> Executable:
    """Loads a built kernel and asks it whether it takes the problem.

    Raises:
      CompileError: it was not built, cannot be loaded, or refuses.
    """
    if isinstance(artifact, CompileError):
        raise artifact
    loader.load(digest, artifact)
    kind, dims = abi_problem(candidate.form.region.problem)
    native = loader.native()
    try:
        recipe = candidate.recipe
    except ValueError as error:
        raise CompileError(f"{candidate.text} cannot be launched: {error}") from error
    reason = native.check(digest, kind, dims, recipe)
    if reason is not None:
        raise CompileError(f"{candidate.text} refuses the problem: {reason}")
    workspace = native.workspace_bytes(
        digest, kind, dims, target.ordinal, target.arch.sm_count, recipe
    )
    return Executable(digest, region.problem, candidate.form, workspace, recipe)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
