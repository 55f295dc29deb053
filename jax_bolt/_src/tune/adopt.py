# SPDX-License-Identifier: Apache-2.0
"""Tuning results of other versions: built here, checked once, and recorded as ours.

What was shipped, and what was tuned before our headers or nvcc changed, names a kernel
that is likely still the best one. It is used only if it still compiles and is accurate
on this GPU; then it costs seconds, where tuning anew would cost minutes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
from collections.abc import Sequence
from pathlib import Path

import jax

from .. import ir
from ..chain import AnySite
from ..errors import CompileError
from ..jit import store
from ..plan import AnyCandidate
from . import builder, db, isolate, measure
from .builder import Stopped
from .failures import Failures
from .job import Untunable
from .target import Target, executable

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class Old:
    """A site, the tuning result that another version left for it, and its kernel."""

    site: AnySite
    candidate: AnyCandidate
    entry: db.Entry


def adopt(old: Sequence[Old], target: Target) -> None:
    """Records those of ``old`` whose kernels compile and are accurate here.

    The others are left as they are. Runs in a thread of its own, as ``search.tune``.
    """
    stop = threading.Event()
    failed: list[BaseException] = []

    def step(digest: str) -> None:
        if stop.is_set():
            raise Stopped("it was interrupted")

    def work() -> None:
        taken: dict[ir.Work, db.Entry] = {}
        try:
            with jax.default_device(target.device), jax.debug_nans(False):
                built = builder.build([each.candidate for each in old], target, step)
                with (
                    contextlib.suppress(Stopped),
                    isolate.worker(target.ordinal) as worker,
                ):
                    for each in old:
                        step("")
                        known = built[each.candidate.source]
                        entry = _checked(each, *known, target, worker)
                        if entry is not None:
                            taken[each.site.region] = entry
            target.results.put(target.arch, taken)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work, name="jax_bolt-adopt", daemon=True)
    thread.start()
    try:
        thread.join()
    except BaseException:
        stop.set()
        raise
    if failed:
        logger.info("results of other versions are left as they are: %s", failed[0])


def _checked(
    old: Old,
    digest: str,
    artifact: Path | CompileError,
    target: Target,
    worker: isolate.Worker,
) -> db.Entry | None:
    """The entry with what was found here; None where its kernel cannot be used."""
    site = old.site
    try:
        if isinstance(artifact, CompileError):
            raise artifact
        errors = check(site, old.candidate, digest, artifact, target, worker)
    except Exception as error:  # too little memory, say: then it is tuned, or XLA's
        logger.info("%s: %s is not taken over: %s", site, old.candidate.text, error)
        return None
    store.count("adopted")
    return dataclasses.replace(
        old.entry,
        digest=digest,
        sources=target.origin.sources_of(site.region),
        compiler=target.origin.compiler or "",
        error=errors.kernel,
        xla_error=errors.xla,
    )


def check(
    site: AnySite,
    candidate: AnyCandidate,
    digest: str,
    artifact: Path,
    target: Target,
    worker: isolate.Worker,
) -> measure.Errors:
    """Runs a kernel on random operands, as tuning does before it trusts one.

    Raises Untunable where it is wrong, and isolate's errors where it does not
    run or leaves elements unwritten.
    """
    request = isolate.request_for(candidate, digest, artifact, 1, 1, verify=True)
    # For the first launches, which may do harm, and not for the time.
    limit_s = isolate.limit_s(site.region, 1, target.arch.bandwidth)
    isolate.launch(worker, request, limit_s, Failures(target.results.root))
    kernel = executable(site.region, candidate, digest, artifact, target)
    operands = measure.make_operands(site, l2_bytes=0)
    errors = measure.errors(operands, kernel)
    if not measure.is_accurate(errors, site.region):
        raise Untunable(f"its error is {errors.kernel:.2e}, XLA's {errors.xla:.2e}")
    return errors
