# SPDX-License-Identifier: Apache-2.0
"""(region, architecture, tuning results) → which kernel, or why none. Pure."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any, Generic, Literal, TypeAlias, TypeVar, cast, overload

from . import floor, forms, ir, kernels
from .arch import GpuArch
from .jit import codegen
from .kernels.config import Config
from .kernels.template import ChainTemplate, CubinTemplate, Elsewhere, Template
from .tune import db

# The winner is among the first eight for nearly every problem (docs/kernels.md).
_BY_RANK = 8
# Of the least time of two regions, what their chain has to save to be worth a look.
_WORTH = 0.1
_CHAIN_CONFIGS = 8  # of a chain, to build
_LEAST_US = 0.01
_POOLING = 2.0  # times as long as its bytes take: XLA's pools of ResNet's and VGG's
_LAUNCH_US = 2.0

Provenance: TypeAlias = Literal["shipped", "user", "heuristic", "xla"]


@dataclasses.dataclass(frozen=True, slots=True)
class Candidate:
    """One kernel that could run a region: a form, a template and its config."""

    form: forms.Form
    template: Template
    config: Config
    arch: GpuArch

    @property
    def source(self) -> str:
        """The generated TU."""
        return codegen.source(self.form.region, self.template, self.config, self.arch)

    @property
    def recipe(self) -> tuple[int, ...]:
        """How the artifact is launched; empty for a module, which knows it itself."""
        return self._recipe(held=False)

    @property
    def held_recipe(self) -> tuple[int, ...]:
        """The same where its filter and its per-channel inputs are held (``held``)."""
        return self._recipe(held=True)

    def _recipe(self, *, held: bool) -> tuple[int, ...]:
        if self.template.artifact == "module":
            return ()
        template, region = cast(CubinTemplate, self.template), self.form.region
        return template.recipe(region, self.config, self.arch, held=held).encode()

    @property
    def kind(self) -> tuple[object, ...]:
        """The same where only a block's size and its stages differ."""
        params = self.config.params
        choices = (p for p in params if p[0] not in ("pixels", "block", "stages"))
        return self.form.name, self.template.name, *choices

    @property
    def reasoning(self) -> str:
        """Why it stands where it does among the candidates."""
        return self.template.reasoning(self.form.region, self.config, self.arch)

    @property
    def micros(self) -> float:
        """About what a launch takes, in µs: an estimate of its template's."""
        return self.template.micros(self.form.region, self.config, self.arch)

    @property
    def text(self) -> str:
        return f"{self.template.name} {self.config.text} ({self.form.name})"


@dataclasses.dataclass(frozen=True, slots=True)
class ChainCandidate:
    """One kernel that could run a chain."""

    form: forms.ChainForm
    template: ChainTemplate
    config: Config
    arch: GpuArch

    @property
    def source(self) -> str:
        """The generated TU."""
        region = self.form.region
        return codegen.chain_source(region, self.template, self.config, self.arch)

    @property
    def recipe(self) -> tuple[int, ...]:
        """How the artifact is launched."""
        return self._recipe(held=False)

    @property
    def held_recipe(self) -> tuple[int, ...]:
        """As of ``Candidate``."""
        return self._recipe(held=True)

    def _recipe(self, *, held: bool) -> tuple[int, ...]:
        region = self.form.region
        made = self.template.recipe(region, self.config, self.arch, held=held)
        return made.encode()

    @property
    def micros(self) -> float:
        """As of ``Candidate``."""
        return self.template.micros(self.form.region, self.config, self.arch)

    @property
    def kind(self) -> tuple[object, ...]:
        """As of ``Candidate``."""
        return self.form.name, self.template.name

    @property
    def reasoning(self) -> str:
        """What it saves, and why it stands where it does."""
        chain = self.form.region
        apart = sum(region.bytes_moved for region in chain.regions)
        saved = apart - chain.bytes_moved
        rank = self.template.reasoning(chain, self.config, self.arch)
        return f"saves {saved / 1e6:.3g} MB of {apart / 1e6:.3g} MB; {rank}"

    @property
    def text(self) -> str:
        return f"{self.template.name} {self.config.text} ({self.form.name})"


AnyCandidate: TypeAlias = Candidate | ChainCandidate
C = TypeVar("C", bound=AnyCandidate)


@dataclasses.dataclass(frozen=True, slots=True)
class Plan(Generic[C]):
    """The kernel that a region, or a chain, runs on.

    ``saved_us`` is what a chain was measured to save.
    """

    candidate: C
    provenance: Provenance
    entry: db.Entry | None = None
    saved_us: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class Rejection:
    """Why a region runs on XLA, or the regions of a chain each for itself."""

    reason: str
    entry: db.Entry | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Origin:
    """What kernels are made from here (headers), and with which compiler.

    ``compiler`` is None where there is none: kernels of any may then be loaded.
    ``sources`` are regions' headers, ``chains`` those of chains.
    """

    sources: str
    compiler: str | None
    chains: str = ""

    def holds(self, entry: db.Entry) -> bool:
        """Whether the kernels of a tuning result were made from the same.

        Of a choice against a kernel only the headers count: another compiler hardly
        makes one win that lost.
        """
        same_compiler = self.compiler in (None, entry.compiler)
        same = same_compiler or entry.choice != "kernel"
        names = [template.name for template in kernels.CHAIN_TEMPLATES]
        is_chain = entry.choice == "apart" or entry.template in names
        return entry.sources == (self.chains if is_chain else self.sources) and same

    def sources_of(self, work: ir.Work) -> str:
        """What the kernels of a region or a chain are made from."""
        return self.chains if isinstance(work, ir.Chain) else self.sources


def candidates(
    region: ir.Region,
    arch: GpuArch,
    disable: tuple[str, ...] = (),
    *,
    superseded: bool = False,
) -> tuple[list[Candidate], list[str]]:
    """Every candidate, the heuristic's choice first, and why templates refused.

    With ``superseded``, those of templates too that another one replaces here.
    """
    found: list[Candidate] = []
    reasons = _Reasons()
    taken: set[tuple[str, str]] = set()
    for form in forms.forms(region):
        for template in kernels.TEMPLATES:
            if reasons.of(template, form, arch, disable):
                continue
            same = form.name.replace("krsc", "hwio")
            if same != form.name and (same, template.name) in taken:
                continue  # the same kernels, and a filter to transpose
            taken.add((form.name, template.name))
            for config in template.configs(form.region, arch):
                found.append(Candidate(form, template, config, arch))
    names = dict.fromkeys(c.template.name for c in found)
    for better in () if superseded else names.keys() & kernels.SUPERSEDED.keys():
        others = kernels.SUPERSEDED[better]
        reasons.own += [f"{n}: {better} takes it" for n in names if n in others]
        found = [c for c in found if c.template.name not in others]
    return found, reasons.listed


def chain_candidates(
    chain: ir.Chain, arch: GpuArch, disable: tuple[str, ...] = ()
) -> tuple[list[ChainCandidate], list[str]]:
    """As ``candidates``; none where the chain could not save much.

    Of its forms the plainest alone that a template takes: few are compiled.
    """
    worth = saving(chain, arch)
    if worth < _WORTH:
        return [], [f"it could save at most {worth:.0%} of the time"]
    reasons = _Reasons()
    for form in forms.chain_forms(chain):
        for template in kernels.CHAIN_TEMPLATES:
            if reasons.of(template, form, arch, disable):
                continue
            configs = template.configs(form.region, arch)[:_CHAIN_CONFIGS]
            found = [ChainCandidate(form, template, c, arch) for c in configs]
            return found, reasons.listed
    return [], reasons.listed


class _Reasons:
    """Why templates refused: their ``own`` reasons, or those of others if all are."""

    def __init__(self) -> None:
        self.own: list[str] = []
        self._others: list[str] = []

    def of(
        self, template: Any, form: Any, arch: GpuArch, disable: tuple[str, ...]
    ) -> bool:
        """Whether ``template`` refuses ``form``; the reason is kept."""
        if template.name in disable:
            self.own.append(f"{template.name} is disabled")
            return True
        reason = template.supports(form.region, arch)
        if reason is not None:
            kept = self._others if isinstance(reason, Elsewhere) else self.own
            kept.append(f"{template.name} ({form.name}): {reason}")
        return reason is not None

    @property
    def listed(self) -> list[str]:
        return list(dict.fromkeys(self.own or self._others))


def saving(chain: ir.Chain, arch: GpuArch) -> float:
    """The part of its regions' least time that the bytes a chain saves take."""
    saved = sum(region.bytes_moved for region in chain.regions) - chain.bytes_moved
    least = sum(floor.floor(region, arch).time_us for region in chain.regions)
    return saved / arch.bandwidth * 1e6 / least if least else 0.0


def likeliest(found: Sequence[C]) -> list[C]:
    """The first few of every form and template: what to build by their rank alone."""
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    chosen: list[C] = []
    for candidate in found:
        group = (candidate.form.name, candidate.template.name)
        counts[group] += 1
        if counts[group] <= _BY_RANK:
            chosen.append(candidate)
    return chosen


def heuristic(
    region: ir.Region, arch: GpuArch, disable: tuple[str, ...] = ()
) -> Plan[Candidate] | Rejection:
    """The first candidate, unmeasured."""
    found, reasons = candidates(region, arch, disable)
    if found:
        first = found[0]
        if region.pool is not None:
            # Windows that overlap are computed twice: it may be XLA that should pool.
            firsts = _first_of_each(found)
            first = min(firsts, key=lambda c: c.micros + _around(region, c.form, arch))
        return Plan(first, "heuristic")
    return Rejection("no kernel takes it: " + "; ".join(reasons))


def unmeasured(
    chain: ir.Chain,
    arch: GpuArch,
    disable: tuple[str, ...] = (),
    failed: str | None = None,
) -> Rejection:
    """Why a chain without a tuning result does not run."""
    found, reasons = chain_candidates(chain, arch, disable)
    refused = "; ".join(reasons) or "no kernel takes it"
    return Rejection(refused if not found else failed or "it was not timed")


def estimate(
    region: ir.Work, arch: GpuArch, disable: tuple[str, ...] = ()
) -> float | None:
    """About what the best kernel takes, in µs, unmeasured; None where there is none.

    Rearranging the left operand counts, the right one's does not: it is a parameter.
    """
    if isinstance(region, ir.Chain):
        made, _ = chain_candidates(region, arch, disable)
        first = region.regions[0]
        times = [c.micros + _gathering(first, c.form.forms[0], arch) for c in made]
        return min(times, default=None)
    found, _ = candidates(region, arch, disable)
    firsts = _first_of_each(found)
    times = [c.micros + _around(region, c.form, arch) for c in firsts]
    return min(times, default=None)


def _first_of_each(found: Sequence[Candidate]) -> list[Candidate]:
    """The first candidate of every form and template."""
    firsts: dict[tuple[str, str], Candidate] = {}
    for candidate in found:
        firsts.setdefault((candidate.form.name, candidate.template.name), candidate)
    return list(firsts.values())


def _around(region: ir.Region, form: forms.Form, arch: GpuArch) -> float:
    """What XLA takes ahead of a kernel and, where it pools, after it, in µs."""
    before = _gathering(region, form, arch)
    if form.pool is None:
        return before
    rows = region.problem.rows + region.stored_rows
    item = ir.ITEM_BYTES[region.epilogue.out_dtype]
    moved = rows * region.problem.channels * item
    return before + _LAUNCH_US + _POOLING * moved / arch.bandwidth * 1e6


def _gathering(region: ir.Region, form: forms.Form, arch: GpuArch) -> float:
    """What XLA takes to write the form's left operand, in µs."""
    read, _ = region.problem.operand_elements
    written, _ = form.region.problem.operand_elements
    if read == written:
        return 0.0
    moved = (read + written) * ir.ITEM_BYTES[region.problem.dtype]
    return moved / arch.bandwidth * 1e6


def tuned(
    region: ir.Work,
    arch: GpuArch,
    entry: db.Entry,
    origin: Origin,
    disable: tuple[str, ...] = (),
    provenance: Provenance = "user",
) -> Plan | Rejection | None:
    """What a tuning result says, or None where it no longer holds.

    It does not hold when its kernel came from elsewhere than ``origin`` or its
    candidate no longer exists.
    """
    if not origin.holds(entry):
        return None
    if entry.choice == "xla":
        ours = "" if entry.time_us is None else f" (kernel {entry.time_us:.1f} µs)"
        time = "" if entry.xla_time_us is None else f": {entry.xla_time_us:.1f} µs"
        return Rejection(f"XLA was timed faster{time}{ours}", entry)
    if entry.choice == "apart":
        times = (entry.time_us, db.rival_us(entry))
        ours, others = ("?" if t is None else f"{t:.1f}" for t in times)
        return Rejection(f"it was not timed faster: {ours} µs to {others} µs", entry)
    found = chosen(region, arch, entry, disable)
    if found is None:
        return None
    saved = (db.rival_us(entry) or 0.0) - (entry.time_us or 0.0)
    # One that was chosen before may have been kept at about the same time.
    return Plan(found, provenance, entry, saved_us=max(saved, _LEAST_US))


@overload
def chosen(
    region: ir.Region, arch: GpuArch, entry: db.Entry, disable: tuple[str, ...] = ()
) -> Candidate | None: ...
@overload
def chosen(
    region: ir.Work, arch: GpuArch, entry: db.Entry, disable: tuple[str, ...] = ()
) -> AnyCandidate | None: ...
def chosen(
    region: ir.Work, arch: GpuArch, entry: db.Entry, disable: tuple[str, ...] = ()
) -> AnyCandidate | None:
    """The candidate that a tuning result chose, whatever it was made from.

    None where it chose no kernel, or the candidate no longer exists.
    """
    if entry.choice != "kernel" or entry.template in disable:
        return None
    return named(region, arch, entry.form, entry.template, entry.config)


@overload
def named(
    region: ir.Region, arch: GpuArch, form: str, template: str, config: str
) -> Candidate | None: ...
@overload
def named(
    region: ir.Work, arch: GpuArch, form: str, template: str, config: str
) -> AnyCandidate | None: ...
def named(
    region: ir.Work, arch: GpuArch, form: str, template: str, config: str
) -> AnyCandidate | None:
    """The candidate of these names, or None where there is none (any more)."""
    # Not by way of candidates(): every site of every trace asks.
    if isinstance(region, ir.Chain):
        joint = next((f for f in forms.chain_forms(region) if f.name == form), None)
        if joint is None:
            return None
        for known in kernels.CHAIN_TEMPLATES:
            if found := _configured(known, joint, arch, template, config):
                return ChainCandidate(joint, known, found, arch)
        return None
    made = forms.form(region, form)
    if made is None:
        return None
    for known in kernels.TEMPLATES:
        if found := _configured(known, made, arch, template, config):
            return Candidate(made, known, found, arch)
    return None


def _configured(
    known: Any, form: Any, arch: GpuArch, template: str, config: str
) -> Config | None:
    """The config of that text, if ``known`` is the template of that name and has it."""
    if known.name != template or known.supports(form.region, arch) is not None:
        return None
    # What was chosen when others were thought likely is as good as it was.
    for configs in (known.configs, known.space):
        for found in configs(form.region, arch):
            if found.text == config:
                return found
    return None
