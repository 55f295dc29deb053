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
import importlib.metadata
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

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
    toolchain: toolchain.Toolchain
    jobs: int | None
    disable: tuple[str, ...]

    @property
    def sources(self) -> str:
        """What the kernels are made of: our headers and CUTLASS."""
        return sources_key(self.toolchain)


def sources_key(tools: toolchain.Toolchain) -> str:
    return f"{tools.own_digest} cutlass {tools.cutlass_version}"


class Untunable(Exception):
    """Why a region could not be tuned; it runs on XLA in this process."""


def tune(
    sites: Sequence[SiteInfo],
    target: Target,
    budget_s: float | None,
    show_progress: bool = True,
) -> dict[ir.Region, str]:
    """Tunes ``sites``, records the results and returns the failures with reasons.

    Runs in a thread of its own: the caller may be in the middle of a trace, and what
    tuning runs must not become part of it.
    """
    unique = list({site.region: site for site in sites}.values())
    failures: dict[ir.Region, str] = {}
    error: list[BaseException] = []

    def work() -> None:
        try:
            with jax.default_device(target.device), jax.debug_nans(False):
                _tune(unique, target, budget_s, failures, show_progress)
        except BaseException as raised:
            error.append(raised)

    thread = threading.Thread(target=work, name="jax_bolt-tune")
    thread.start()
    thread.join()
    if error:
        raise error[0]
    return failures


def _tune(
    sites: list[SiteInfo],
    target: Target,
    budget_s: float | None,
    failures: dict[ir.Region, str],
    show_progress: bool,
) -> None:
    deadline = None if budget_s is None else time.monotonic() + budget_s
    candidates = {
        site.region: plan.candidates(site.region, target.arch, target.disable)
        for site in sites
    }
    with Progress(show_progress) as progress:
        built = _build(candidates, target, progress)
        progress.start("tuning", len(sites))
        for site in sites:
            if deadline is not None and time.monotonic() > deadline:
                failures[site.region] = f"the tuning budget of {budget_s} s is spent"
                continue
            found, reasons = candidates[site.region]
            if not found:
                failures[site.region] = "no kernel takes it: " + "; ".join(reasons)
                continue
            try:
                with _memory_guard():
                    entry = _tune_site(site, found, built, target)
            except Untunable as reason:
                failures[site.region] = str(reason)
            else:
                store.count("tuned")
                target.results.put(target.arch, {site.region: entry})
                progress.result(entry)
            progress.step(site.label)


def _build(candidates: Any, target: Target, progress: Progress) -> dict[str, Any]:
    """source -> (its digest, the path of its artifact or the CompileError)."""
    sources = list(
        dict.fromkeys(c.source for found, _ in candidates.values() for c in found)
    )
    keys = {
        source: target.kernels.digest(target.toolchain, source, target.arch)
        for source in sources
    }
    progress.start("compiling", len(sources))
    results = target.kernels.build(
        target.toolchain,
        sources,
        target.arch,
        target.jobs,
        on_done=lambda digest, result: progress.step(digest[:8]),
    )
    return {source: (keys[source], results[keys[source]]) for source in sources}


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
    site: SiteInfo, found: list[Candidate], built: dict[str, Any], target: Target
) -> db.Entry:
    operands = measure.make_operands(site, target.arch.l2_bytes)
    problems: list[str] = []
    groups = _time_kernels(site, found, built, operands, target, problems)
    xla_us = measure.time_region(reference_fun(site.reference), operands)
    entry = db.Entry(
        choice="xla",
        sources=target.sources,
        xla_time_us=xla_us,
        candidates=sum(map(len, groups)),
        versions=_versions(target),
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
    )
    for group in groups:
        entry = _with_best(entry, site, group, operands, problems)
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
        fun = measure.kernel_function(site, timed.kernel)
        time_us = measure.time_region(fun, operands)
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


def _time_kernels(
    site: SiteInfo,
    found: list[Candidate],
    built: dict[str, Any],
    operands: measure.Operands,
    target: Target,
    problems: list[str],
) -> list[list[_Timed]]:
    """The candidates of each form that ran, the fastest first."""
    groups: list[list[_Timed]] = []
    for name in dict.fromkeys(c.form.name for c in found):
        timed: list[_Timed] = []
        same_form = [c for c in found if c.form.name == name]
        buffers = measure.Buffers(operands, same_form[0].form)
        for candidate in same_form:
            digest, result = built[candidate.source]
            try:
                kernel = executable(site.region, candidate, digest, result, target)
                micros = measure.time_kernel(kernel, buffers, target.ordinal)
            except (CompileError, RuntimeError) as error:
                problems.append(f"{candidate.text}: {_first_line(error)}")
            else:
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
    reason = native.check(digest, kind, dims)
    if reason is not None:
        raise CompileError(f"{candidate.text} refuses the problem: {reason}")
    workspace = native.workspace_bytes(
        digest, kind, dims, target.ordinal, target.arch.sm_count
    )
    return Executable(digest, region.problem, candidate.form, workspace)


def _versions(target: Target) -> str:
    versions = [f"{n} {importlib.metadata.version(n)}" for n in ("jax", "jaxlib")]
    return ", ".join([*versions, f"nvcc {target.toolchain.version}"])


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
