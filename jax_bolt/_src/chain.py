# SPDX-License-Identifier: Apache-2.0
"""Chains in a program: calls of a sequence that one kernel could run back to back.

Finding them takes no architecture. Whether one runs is decided by measurement, and
calls stay as they are in the program: a chain is made when a sequence is lowered.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias, TypeVar

import jax

from . import ir
from .compat import ClosedJaxpr, Var, closed, sub_jaxprs, variables
from .primitive import SiteInfo, reference_fun
from .sequence import bolt_sequence_p
from .views import View

NAME = "chain"  # in the option ``disable``


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class ChainInfo:
    """A chain in a program, described as ``SiteInfo`` describes a region.

    Its operands are those of the first site's call, then those of the second's without
    what is between them, which the kernel makes. ``first`` is a chain where its region
    is one.
    """

    first: SiteInfo | ChainInfo
    second: SiteInfo
    region: ir.Chain

    @property
    def sites(self) -> tuple[SiteInfo, ...]:
        """All of them, in order."""
        first = self.first
        return (
            *(first.sites if isinstance(first, ChainInfo) else (first,)),
            self.second,
        )

    @property
    def name(self) -> str:
        return f"{self.first.name} to {self.second.name}"

    @property
    def label(self) -> str:
        return f"{self.first.label} to {self.second.label}"

    @property
    def between(self) -> int:
        """Which operand of the second site's call the first one makes."""
        side = self.region.side
        return self.second.operands[0 if side is None else 2 + side]

    @property
    def in_avals(self) -> list[Any]:
        return [*self.first.in_avals, *self._without_between(self.second.in_avals)]

    @property
    def out_avals(self) -> list[Any]:
        """Of the first site's result where it is stored, and of the second's."""
        stored = self.first.out_avals if self.region.stored else []
        return [*stored, *self.second.out_avals]

    @property
    def views(self) -> tuple[View | None, ...]:
        return (*self.first.views, *self._without_between(self.second.views))

    @property
    def results(self) -> tuple[View | None, ...]:
        stored = self.first.results if self.region.stored else ()
        return (*stored, *self.second.results)

    @property
    def reference(self) -> ClosedJaxpr:
        """All sites' references, one after the other."""

        def fun(*operands: Any) -> list[Any]:
            mine, others = self.split(operands)
            (value,) = reference_fun(self.first.reference)(*mine)
            made = reference_fun(self.second.reference)(*self.joined(others, value))
            return [value, *made] if self.region.stored else made

        shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in self.in_avals]
        return jax.make_jaxpr(fun)(*shapes)

    def split(self, operands: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """The first site's operands, and the second's without what is between them."""
        count = len(self.first.in_avals)
        return list(operands[:count]), list(operands[count:])

    def joined(self, others: Sequence[Any], value: Any) -> list[Any]:
        """The operands of the second site's call, ``value`` being between them."""
        return [*others[: self.between], value, *others[self.between :]]

    def owner(self, position: int) -> tuple[SiteInfo, int]:
        """Whose operand it is, and its position there."""
        count = len(self.first.in_avals)
        if position < count:
            first = self.first
            if isinstance(first, ChainInfo):
                return first.owner(position)
            return first, position
        position -= count
        return self.second, position + (position >= self.between)

    def _without_between(self, values: Sequence[Any]) -> list[Any]:
        return [*values[: self.between], *values[self.between + 1 :]]

    def __repr__(self) -> str:
        return f"{self.name}: {self.label}"


# What is tuned and resolved.
AnySite: TypeAlias = SiteInfo | ChainInfo
S = TypeVar("S", bound=AnySite)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Chained:
    """Equations of a sequence, by position and in order, that may be a chain."""

    calls: tuple[int, ...]
    info: ChainInfo

    @property
    def place(self) -> int:
        """Where all are launched: what they read is made by then, and nothing that
        they make is read before."""
        merged = self.info.region.side is not None
        return self.calls[-1 if merged else -2]


def chains_of(calls: ClosedJaxpr) -> list[Chained]:
    """All calls of a sequence that could be one kernel: two, and three that begin with
    a merged shortcut."""
    found = _pairs(calls)
    merged = {
        each.calls[1]: each for each in found if each.info.region.side is not None
    }
    longer: list[Chained] = []
    for each in found:
        producer, consumer = each.calls
        start = merged.get(producer)
        if start is None or each in merged.values():
            continue
        with contextlib.suppress(ValueError):
            region = dataclasses.replace(each.info.region, first=start.info.region)
            info = ChainInfo(start.info, each.info.second, region)
            longer.append(Chained((*start.calls, consumer), info))
    return [*found, *longer]


def _pairs(calls: ClosedJaxpr) -> list[Chained]:
    """Every two calls of a sequence that could be one kernel, in order.

    The consumer's left operand is the producer's result as it lies, and nothing else
    that it reads is made by the producer or after it: both can be launched where the
    producer is. A result that others read, too, is stored. Or a side input is, which
    then nothing else reads: both can be launched where the consumer is.
    """
    jaxpr = calls.jaxpr
    made = {var: i for i, eqn in enumerate(jaxpr.eqns) for var in eqn.outvars}
    leaving = set(variables(jaxpr.outvars))
    readers: dict[Var, set[int]] = {}
    for index, eqn in enumerate(jaxpr.eqns):
        for var in variables(eqn.invars):
            readers.setdefault(var, set()).add(index)
    found: list[Chained] = []
    for consumer, eqn in enumerate(jaxpr.eqns):
        site = eqn.params["site"]
        roles = [None, *range(len(site.region.epilogue.sides))]
        for side in roles:
            position = site.operands[0 if side is None else 2 + side]
            var = eqn.invars[position]
            producer = made.get(var) if isinstance(var, Var) else None
            if producer is None or site.operands.count(position) > 1:
                continue
            stored = var in leaving or readers[var] != {consumer}
            others = [v for i, v in enumerate(eqn.invars) if i != position]
            waits = any(made.get(v, -1) >= producer for v in variables(others))
            if stored if side is not None else waits:
                continue
            first = jaxpr.eqns[producer].params["site"]
            region = _region(first.region, site.region, stored, side)
            if region is not None:
                info = ChainInfo(first, site, region)
                found.append(Chained((producer, consumer), info))
    return found


def _region(
    first: ir.Region, second: ir.Region, stored: bool, side: int | None
) -> ir.Chain | None:
    """The chain, or None where the second does not read the first's rows as its own."""
    if first.epilogue.auxiliary or second.epilogue.auxiliary:
        return None
    for problem in (first.problem, second.problem):
        if isinstance(problem, ir.GemmProblem) and problem.batch > 1:
            return None
    read = second.problem
    if isinstance(read, ir.GemmProblem) and read.a_layout != "row":
        return None
    try:
        return ir.Chain(first=first, second=second, stored=stored, side=side)
    except ValueError:
        return None


def sequences(program: ClosedJaxpr) -> Iterator[list[Chained]]:
    """``chains_of`` each sequence of ``program`` and of the bodies inside it."""
    for eqn in program.jaxpr.eqns:
        if eqn.primitive is bolt_sequence_p:
            yield chains_of(eqn.params["calls"])
            continue
        for _, bodies in sub_jaxprs(eqn):
            for body in bodies if isinstance(bodies, tuple) else (bodies,):
                yield from sequences(closed(body))


def whole(found: Sequence[Chained], savings: Sequence[float]) -> list[float]:
    """What each of ``found`` saves of its calls in a kernel each.

    One of three calls was compared with the pair that it begins with: where that does
    not run, it is not known to save anything.
    """
    pairs = {each.calls: saving for each, saving in zip(found, savings, strict=True)}

    def of(each: Chained, saving: float) -> float:
        if len(each.calls) == 2 or saving <= 0:
            return saving
        before = pairs.get(each.calls[:-1], 0.0)
        return saving + before if before > 0 else 0.0

    return [of(*each) for each in zip(found, savings, strict=True)]


def best(found: Sequence[Chained], savings: Sequence[float]) -> list[Chained]:
    """Those of ``found`` that save most together, no call in two of them.

    One by one, with and without it. What is left to choose depends on the calls that
    are taken already and that later ones have, of which there are few at any time.
    """
    order = sorted(
        (
            (each, saving)
            for each, saving in zip(found, savings, strict=True)
            if saving > 0
        ),
        key=lambda each: each[0].calls[::-1],
    )
    taking = [frozenset(each.calls) for each, _ in order]
    # By the calls taken: what is saved, and the chains.
    states: dict[frozenset[int], tuple[float, tuple[Chained, ...]]] = {
        frozenset(): (0.0, ())
    }
    for index, (each, saving) in enumerate(order):
        later = frozenset().union(*taking[index + 1 :])
        reached: dict[frozenset[int], tuple[float, tuple[Chained, ...]]] = {}
        for taken, (total, chosen) in states.items():
            options = [(taken, total, chosen)]
            if not taken & taking[index]:
                options.append((taken | taking[index], total + saving, (*chosen, each)))
            for calls, sum_, those in options:
                key = calls & later
                if key not in reached or sum_ > reached[key][0]:
                    reached[key] = (sum_, those)
        states = reached
    _, chosen = max(states.values(), key=lambda state: state[0])
    return sorted(chosen, key=lambda each: each.calls)
