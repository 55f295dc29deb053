# SPDX-License-Identifier: Apache-2.0
"""The end of a tuning: the fastest candidates verified, and compared with XLA.

A chain's are compared with its two regions' kernels, too (``rival.py``).
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Callable, Sequence

from ..errors import CompileError
from ..invoke import AnyExecutable
from ..primitive import reference_fun
from . import db, measure, stages
from .builder import Built
from .job import Job, Untunable, first_line, spending_on
from .stages import Timed
from .target import Target, executable


@dataclasses.dataclass(frozen=True, slots=True)
class _Measured:
    """What kernels are held against: operands, the truth, and XLA's errors."""

    operands: measure.Operands
    yardstick: measure.Yardstick
    xla_errors: Sequence[float]


def decided(
    job: Job,
    groups: Sequence[Sequence[Timed]],
    built: Built,
    target: Target,
    is_late: Callable[[], bool],
) -> db.Entry:
    """The result for a region, of the candidates of each form that ran, by time.

    Forms after the first are left out when ``is_late``. Raises Untunable where no
    candidate ran, or none is right.
    """
    site = job.site
    if not groups:
        raise Untunable("no candidate ran: " + "; ".join(job.problems))
    with spending_on("operands"):
        operands = measure.make_operands(site, target.arch.l2_bytes)
    with spending_on("yardstick"):
        yardstick = measure.Yardstick(operands)
    with spending_on("XLA"):
        xla = reference_fun(site.reference)
        xla_us, outputs = measure.time_region(xla, operands, target.ordinal)
        measured = _Measured(operands, yardstick, yardstick.errors(outputs))
    del outputs
    entry = db.Entry(
        choice="xla",
        sources=target.origin.sources_of(site.region),
        compiler=target.origin.compiler or "",
        candidates=sum(map(len, groups)),
        versions=db.versions(),
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        notes="; ".join(job.notes)[:500],
        xla_time_us=xla_us,
        xla_error=max(measured.xla_errors),
    )
    for group in groups:
        if entry.time_us is not None and is_late():
            break
        entry = _with_best(entry, job, group, built, target, measured)
    time_us = entry.time_us
    if time_us is None:
        raise Untunable("no candidate is right: " + "; ".join(job.problems))
    if job.rival is None:
        chosen = stages.choice(time_us, xla_us, job.before)
        return dataclasses.replace(entry, choice=chosen)
    with spending_on("apart"):
        apart_us = job.rival.time_us(operands, target.ordinal)
    wins = stages.choice(time_us, min(xla_us, apart_us), job.before) == "kernel"
    return dataclasses.replace(
        entry, apart_time_us=apart_us, choice="kernel" if wins else "apart"
    )


def _with_best(
    entry: db.Entry,
    job: Job,
    group: Sequence[Timed],
    built: Built,
    target: Target,
    measured: _Measured,
) -> db.Entry:
    """``entry`` with a form's first accurate kernel, if it is clearly faster."""
    region = job.site.region
    for timed in group:
        candidate = timed.candidate
        path = built[candidate.source][1]
        try:
            kernel = executable(region, candidate, timed.digest, path, target)
        except CompileError as error:
            job.problems.append(f"{candidate.text}: {first_line(error)}")
            continue
        with spending_on("in program"):
            time_us, outputs = time_in_program(kernel, measured.operands, target)
            ours = measured.yardstick.errors(outputs)
            errors = measure.worst(ours, measured.xla_errors, region)
        if not measure.is_accurate(errors, region):
            job.problems.append(
                f"{candidate.text}: error {errors.kernel:.2e}, XLA's {errors.xla:.2e}"
            )
            continue
        if entry.time_us is not None and time_us >= stages.MARGIN * entry.time_us:
            return entry
        return dataclasses.replace(
            entry,
            form=candidate.form.name,
            template=candidate.template.name,
            config=candidate.config.text,
            digest=timed.digest,
            time_us=time_us,
            kernel_time_us=timed.timing.micros,
            spread=timed.timing.spread,
            error=errors.kernel,
            xla_error=errors.xla,
        )
    return entry


def time_in_program(
    kernel: AnyExecutable, operands: measure.Operands, target: Target
) -> measure.Run:
    """The region on ``kernel``, as programs for ``target`` run it."""
    if "sequence" not in target.disable and not kernel.form.ends_on_xla:
        return measure.time_in_sequence(kernel, operands, target.ordinal)
    fun = measure.kernel_function(operands.site, kernel)
    return measure.time_region(fun, operands, target.ordinal)
