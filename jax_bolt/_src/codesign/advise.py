# SPDX-License-Identifier: Apache-2.0
"""A traced function → advice: its regions and what they could be, timed or estimated.

On a GPU all of them are tuned as a program's own sites are, the longest first, so the
results serve the model that takes the advice. Without one the rank model answers.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

from .. import arch as arch_
from .. import chain as chain_
from .. import compat, floor, ir, options, plan, resolve, results
from ..arch import GpuArch
from ..chain import ChainInfo
from ..errors import UnsupportedError
from ..match import Refusal
from ..options import Options
from ..primitive import SiteInfo
from ..rewrite import Rewritten
from ..tune import target as targets
from ..tune.progress import Progress
from . import activation, variants
from .advice import Advice, Padding, Pointwise, SiteAdvice, Time

ACTIVATIONS = ("relu", "gelu", "silu", "hard_swish", "softplus", "mish")
_USUAL = "sm_90a"  # where no architecture is named and no GPU is seen


@dataclasses.dataclass(frozen=True, slots=True)
class _Subject:
    """A region of the model, and what it could be."""

    site: SiteInfo
    count: int
    activations: dict[str, ir.Region]
    padded: tuple[variants.Padded, ...]
    chain: ir.Chain | None

    @property
    def regions(self) -> list[ir.Region]:
        """All but its own."""
        found = [*self.activations.values(), *(pad.region for pad in self.padded)]
        return [*found, self.chain.second] if self.chain else found


class _Clock:
    """Times of regions and chains on ``arch``: estimated, and measured if ``origin`` is
    given."""

    def __init__(self, arch: GpuArch, active: Options, origin: plan.Origin | None):
        self._arch = arch
        self._active = active
        self._origin = origin
        self._known: dict[str, Time] = {}

    def time(self, region: ir.Work) -> Time:
        if region.text not in self._known:
            self._known[region.text] = self._time(region)
        return self._known[region.text]

    def _time(self, region: ir.Work) -> Time:
        estimate = plan.estimate(region, self._arch, self._active.disable)
        guess = Time(estimate_us=estimate, runs="xla" if estimate is None else "kernel")
        if self._origin is None:
            return guess
        made = results.stored(region, self._arch, self._active, self._origin)
        if made is None or made.entry is None:
            return guess
        entry = made.entry
        is_xla = entry.choice == "xla"
        return dataclasses.replace(
            guess,
            # Of a chain that was not faster, too: it is what was asked for.
            measured_us=entry.xla_time_us if is_xla else entry.time_us,
            xla_us=entry.xla_time_us,
            runs=entry.choice,
        )

    def chain(self, chain: ir.Chain) -> Time | None:
        """Of two regions in one kernel; None where there is none."""
        if chain_.NAME in self._active.disable:
            return None
        time = self.time(chain)
        return None if time.estimate_us is None else time


def advise(
    rewritten: Rewritten,
    name: str | None,
    activations: Sequence[str],
    budget_s: float | None,
    progress: bool,
) -> Advice:
    """See ``jax_bolt.advise``."""
    active = options.current()
    if budget_s is not None:
        active = dataclasses.replace(active, budget_s=budget_s)
    for each in activations:
        activation.named(each, "f32")  # a wrong name, before anything is timed
    device = compat.cuda_device() if name is None else None
    if device is None:
        arch = arch_.from_name(name or _USUAL)
    else:
        arch = resolve.arch_of(device)
    if not arch.has_kernels:
        others = ", ".join(arch_.with_kernels())
        raise UnsupportedError(
            f"jax_bolt has no kernels for {arch.name}; it has them for {others}"
        )
    subjects = _subjects(rewritten, activations)
    guess = _Clock(arch, active, None)
    subjects.sort(key=lambda subject: -_all_of(subject, guess))
    origin = None
    if device is not None:
        target = resolve.target_for(device, active)
        origin = targets.origin(target.tools)
        _measure(subjects, target, active, progress)
    clock = _Clock(arch, active, origin)
    sites: list[SiteAdvice] = []
    with Progress(progress) as bar:
        bar.start("estimating", len(subjects))
        for subject in subjects:
            sites.append(_advice(subject, clock, arch))
            bar.step(subject.site.label)
    return Advice(
        sites=tuple(sites),
        activations=tuple(activations),
        arch=arch.name,
        device="" if device is None else arch.gpu or "",
        refused=sum(isinstance(root, Refusal) for root in rewritten.roots),
        board=arch.board,
    )


def _subjects(rewritten: Rewritten, activations: Sequence[str]) -> list[_Subject]:
    sites = [root for root in rewritten.roots if not isinstance(root, Refusal)]
    counts = collections.Counter(site.region.text for site in sites)
    first = {site.region.text: site for site in reversed(sites)}
    return [_subject(first[text], counts[text], activations) for text in counts]


def _subject(site: SiteInfo, count: int, activations: Sequence[str]) -> _Subject:
    region, epilogue = site.region, site.region.epilogue
    others: dict[str, ir.Region] = {}
    found = activation.find(epilogue)
    if found is not None:
        for name in activations:
            other = activation.named(name, epilogue.out_dtype)
            changed = activation.replaced(epilogue, found, other)
            others[name] = dataclasses.replace(region, epilogue=changed)
    return _Subject(
        site=site,
        count=count,
        activations=others,
        # Of a transposed conv the kernel's channels are not the model's.
        padded=tuple(variants.padded(region)) if site.result is None else (),
        chain=variants.chained(region) if site.result is None else None,
    )


def _all_of(subject: _Subject, clock: _Clock) -> float:
    """About how long the model is in it."""
    return subject.count * (clock.time(subject.site.region).estimate_us or 0.0)


def _measure(
    subjects: Sequence[_Subject], target: Any, active: Options, progress: bool
) -> None:
    """Tunes what has no result yet: the model's own regions, what they could be, and
    chains last, which are compared with both.

    What is not reached within the budget is no failure of a region: it is tuned where
    a program needs it.
    """
    wanted = [subject.site for subject in subjects]
    plain = [s for s in subjects if not _is_rearranged(s.site)]
    wanted += [
        variants.site(region, subject.site.name)
        for subject in plain
        for region in subject.regions
    ]
    chains = [chain_site(s.chain, s.site.name) for s in plain if s.chain is not None]
    unique = {site.region.text: site for site in reversed(wanted)}
    sites = [unique[text] for text in dict.fromkeys(s.region.text for s in wanted)]
    with results.remembering_no_failures():
        results.tune_all(sites, chains, target, active, progress)


def chain_site(chain: ir.Chain, name: str) -> ChainInfo:
    """As ``variants.site``, of a chain."""
    first, second = chain.regions  # advice has no chain of three
    after = variants.site(second, f"{name}, a 1x1 conv after it")
    return ChainInfo(variants.site(first, name), after, chain)


def _is_rearranged(site: SiteInfo) -> bool:
    """Whether XLA puts its operands or result in order, which ``variants.site`` lacks.

    What it could be is only estimated: a time without that would not compare.
    """
    return site.result is not None or any(view is not None for view in site.views)


def _advice(subject: _Subject, clock: _Clock, arch: GpuArch) -> SiteAdvice:
    site = subject.site
    return SiteAdvice(
        name=site.name,
        line=site.line,
        epilogue=site.label,
        problem=site.region.problem.text,
        count=subject.count,
        now=clock.time(site.region),
        activations={n: clock.time(r) for n, r in subject.activations.items()},
        channels=tuple(
            Padding(
                operand=pad.operand,
                channels=pad.channels,
                to=pad.to,
                unit=pad.unit,
                idle=pad.idle,
                time=clock.time(pad.region),
            )
            for pad in subject.padded
        ),
        pointwise=_pointwise(subject.chain, clock, arch),
    )


def _pointwise(
    chain: ir.Chain | None, clock: _Clock, arch: GpuArch
) -> Pointwise | None:
    if chain is None:
        return None
    return Pointwise(
        channels=chain.second.problem.channels,
        time=clock.time(chain.second),
        chain_floor_us=floor.of_chain(chain, arch).time_us,
        chain=clock.chain(chain),
    )
