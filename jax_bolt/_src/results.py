# SPDX-License-Identifier: Apache-2.0
"""What the tuning results say of regions and chains, and making those missing.

The user's own come before those shipped with jax_bolt. What this process tried in vain
it does not try again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from . import chain as chain_
from . import ir, paths, plan
from .arch import GpuArch
from .chain import AnySite, ChainInfo
from .errors import CompileError
from .forms import only_views
from .invoke import AnyExecutable, Executable
from .options import Options
from .plan import Plan, Rejection
from .primitive import SiteInfo
from .tune import adopt, db, search
from .tune.job import Untunable
from .tune.rival import Rival
from .tune.target import Target, executable

logger = logging.getLogger(__name__)

# Held by the thread that tunes or builds; the others then find the result.
lock = threading.RLock()
# Estimated at more than this times its regions' kernels, a chain is not timed.
_FAR = 1.25
# Regions that failed here, with the reason: not tried again by this process.
failures: dict[tuple[str, str], str] = {}
# Regions whose results of other versions were looked at by this process.
_tried: set[tuple[str, str]] = set()


def database(options: Options) -> db.Database:
    return _database(paths.tuning_root(options))


@functools.cache
def _database(root: Path) -> db.Database:
    return db.Database(root)


def stored(
    region: ir.Work, arch: GpuArch, options: Options, origin: plan.Origin
) -> Plan | Rejection | None:
    """What the tuning results say of ``region``, or None where they say nothing."""
    for provenance, entry in _entries(region, arch, options):
        made = plan.tuned(region, arch, entry, origin, options.disable, provenance)
        if made is not None:
            return made
    return None


def _entries(
    region: ir.Work, arch: GpuArch, options: Options
) -> Iterator[tuple[plan.Provenance, db.Entry]]:
    """The tuning results of ``region``, the user's own first."""
    user, shipped = database(options), _database(paths.shipped_tuning())
    entry = user.get(arch, region)
    if entry is not None:
        yield "user", entry
    entry = shipped.get(arch, region)
    if entry is not None:
        yield "shipped", entry


def adoptable(
    region: ir.Work, arch: GpuArch, options: Options
) -> tuple[db.Entry, Plan] | None:
    """The result of other versions that ``adopt_missing`` would try, and its kernel."""
    if (db.device_key(arch), region.text) in _tried:
        return None
    for provenance, entry in _entries(region, arch, options):
        found = plan.chosen(region, arch, entry, options.disable)
        if found is not None:
            return entry, Plan(found, provenance, entry)
    return None


def adopt_missing(sites: Sequence[AnySite], target: Target, options: Options) -> None:
    """Takes over what results of other versions say of sites without a result.

    Each is tried once by this process.
    """
    device = db.device_key(target.arch)
    with lock:
        if isinstance(target.tools, CompileError):
            return
        old: list[adopt.Old] = []
        for site in {site.region.text: site for site in sites}.values():
            region, key = site.region, (device, site.region.text)
            if key in _tried or stored(region, target.arch, options, target.origin):
                continue
            found = adoptable(region, target.arch, options)
            _tried.add(key)
            if found is not None:
                entry, made = found
                old.append(adopt.Old(site, made.candidate, entry))
        if old:
            adopt.adopt(old, target)


def tune_all(
    sites: Sequence[SiteInfo],
    chains: Sequence[ChainInfo],
    target: Target,
    options: Options,
    show_progress: bool = True,
) -> None:
    """Tunes what has no result yet: ``sites``, then ``chains`` in what is left of the
    budget. Raises as ``tune_missing``."""
    start = time.monotonic()
    tune_missing(sites, target, options, retry=True, show_progress=show_progress)
    if chain_.NAME in options.disable:
        return
    left = _left(options, start)
    tune_chains(chains, target, left, retry=True, show_progress=show_progress)


def _left(options: Options, start: float) -> Options:
    """``options`` with what is left of the budget since ``start``."""
    if options.budget_s is None:
        return options
    left_s = max(0.0, options.budget_s - (time.monotonic() - start))
    return dataclasses.replace(options, budget_s=left_s)


def tune_missing(
    sites: Sequence[SiteInfo],
    target: Target,
    options: Options,
    *,
    retry: bool = False,
    show_progress: bool = True,
) -> None:
    """Tunes the sites that have no result yet.

    A site that failed in this process before (or was not reached within the budget) is
    left alone unless ``retry``.
    """
    device = db.device_key(target.arch)
    with lock:
        adopt_missing(sites, target, options)
        missing = [
            site
            for site in sites
            if stored(site.region, target.arch, options, target.origin) is None
            and (retry or (device, site.region.text) not in failures)
        ]
        if not missing:
            return
        if isinstance(target.tools, CompileError):
            raise target.tools
        # Before anything is done for it: every site of the program comes here.
        target.kernels.check()
        for site in missing:
            failures.pop((device, site.region.text), None)
        failed = search.tune(missing, target, options.budget_s, show_progress)
        failures.update({(device, text): reason for text, reason in failed.items()})


def tune_chains(
    chains: Sequence[ChainInfo],
    target: Target,
    options: Options,
    *,
    retry: bool = False,
    show_progress: bool = True,
) -> None:
    """As ``tune_missing``, for chains, whose sites were tuned before.

    Those that no kernel takes are left alone; and all of them without a compiler, since
    their sites have kernels of their own.
    """
    with lock:
        if isinstance(target.tools, CompileError):
            return
        adopt_missing(chains, target, options)
        start = time.monotonic()
        # Those of three sites are compared with the pairs that they begin with.
        for count in sorted({len(site.sites) for site in chains}):
            alike = [site for site in chains if len(site.sites) == count]
            _tune_chains(alike, target, _left(options, start), retry, show_progress)


def _tune_chains(
    chains: Sequence[ChainInfo],
    target: Target,
    options: Options,
    retry: bool,
    show_progress: bool,
) -> None:
    device = db.device_key(target.arch)
    missing: list[ChainInfo] = []
    rivals: dict[str, Rival] = {}
    for site in {site.region.text: site for site in chains}.values():
        chain, key = site.region, (device, site.region.text)
        if stored(chain, target.arch, options, target.origin) is not None:
            continue
        if key in failures and not retry:
            continue
        failures.pop(key, None)
        try:
            found, _ = plan.chain_candidates(chain, target.arch, options.disable)
            if not found:
                continue
            least_us = min(candidate.micros for candidate in found)
            rivals[chain.text] = _rival(site, least_us, target, options)
            missing.append(site)
        except Exception as error:  # a fault of ours, say: the others have none
            logger.info("%s", site, exc_info=True)
            failures[key] = str(error) or type(error).__name__
    if not missing:
        return
    target.kernels.check()
    budget_s = options.budget_s
    failed = search.tune(missing, target, budget_s, show_progress, rivals)
    failures.update({(device, text): reason for text, reason in failed.items()})


def _rival(site: ChainInfo, least_us: float, target: Target, options: Options) -> Rival:
    """What a chain is to be compared with.

    Raises Untunable where there is nothing, or the chain is far behind by ``least_us``,
    an estimate.
    """
    plans: list[Plan] = []
    chosen: list[db.Entry] = []
    for each in (site.first, site.second):
        made = stored(each.region, target.arch, options, target.origin)
        if made is None or made.entry is None:
            raise Untunable(f"{each.name} was not tuned")
        entry = made.entry
        if isinstance(each, ChainInfo) and entry.choice != "kernel":
            raise Untunable(f"{each.name} is not one kernel")
        names = (entry.form, entry.template, entry.config)
        candidate = plan.named(each.region, target.arch, *names)
        if candidate is None:
            raise Untunable(f"{each.name} has no kernel of its own")
        plans.append(Plan(candidate, "user", entry))
        chosen.append(entry)
    apart_us = sum(entry.kernel_time_us or entry.time_us or 0.0 for entry in chosen)
    if least_us > _FAR * apart_us > 0.0:
        reason = f"about {least_us:.0f} µs in one kernel, {apart_us:.0f} apart"
        raise Untunable(f"{reason}: it was not timed")
    first = loaded(site.first, plans[0], target, options)
    second = loaded(site.second, plans[1], target, options)
    assert isinstance(second, Executable)
    read = site.second.in_avals[site.second.operands[0]]
    like = read.shape, read.dtype
    takes = only_views(second.form.name, second.problem, *like, right=False)
    # A side input is read as it lies by every kernel.
    if site.region.side is None and not takes:
        raise Untunable(f"{site.second.name} rearranges what it reads")
    times = [e.time_us if e.choice == "kernel" else e.xla_time_us for e in chosen]
    mixed = any(entry.choice == "xla" for entry in chosen) and None not in times
    return Rival((first, second), sum(t or 0.0 for t in times) if mixed else None)


def loaded(
    site: AnySite,
    made: Plan,
    target: Target,
    options: Options,
    together: Sequence[AnySite] = (),
) -> AnyExecutable:
    """The kernel of a plan, from the store or compiled. Raises CompileError.

    What ``together`` is known to run on is compiled with it: compilers run in parallel.
    """
    candidate = made.candidate
    if made.entry is not None and isinstance(target.tools, CompileError):
        digest = made.entry.digest
        artifact = target.kernels.find(digest) or target.tools
        return executable(site.region, candidate, digest, artifact, target)
    sources = [candidate.source]
    digest = target.kernels.digest(target.toolchain, candidate.source, target.arch)
    if target.kernels.find(digest) is None:
        for each in together:
            # What is wrong with another site is said where that one is resolved.
            with contextlib.suppress(Exception):
                known = foreseen(each.region, target.arch, options, target.origin)
                if isinstance(known, Plan):
                    sources.append(known.candidate.source)
    built = target.kernels.build(target.toolchain, sources, target.arch, options.jobs)
    return executable(site.region, candidate, digest, built[digest], target)


def foreseen(
    region: ir.Work, arch: GpuArch, options: Options, origin: plan.Origin
) -> Plan | Rejection | None:
    """What ``region`` runs on if nothing is tuned; None where only that would tell."""
    known = stored(region, arch, options, origin)
    if known is not None or failure(arch, region) is not None:
        return known
    if options.on_miss == "heuristic" and not isinstance(region, ir.Chain):
        return plan.heuristic(region, arch, options.disable)
    return None


@contextlib.contextmanager
def remembering_no_failures() -> Iterator[None]:
    """What fails to be tuned inside is tried again after it, by whoever needs it."""
    with lock:
        before = dict(failures)
        try:
            yield
        finally:
            failures.clear()
            failures.update(before)


def forget() -> None:
    """Drops what this process remembers of tuning: results and failures."""
    failures.clear()
    _tried.clear()
    _database.cache_clear()


def failure(arch: GpuArch, region: ir.Work) -> str | None:
    """Why ``region`` failed to be tuned in this process, if it did."""
    return failures.get((db.device_key(arch), region.text))
