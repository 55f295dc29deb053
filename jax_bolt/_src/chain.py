# SPDX-License-Identifier: Apache-2.0
"""Chains in a program: two calls of a sequence that one kernel could run back to back.

Finding them takes no architecture. Whether one runs is decided by measurement, and
calls stay as they are in the program: a chain is made when a sequence is lowered.
"""

from __future__ import annotations

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
    the left one, which the kernel makes.
    """

    first: SiteInfo
    second: SiteInfo
    region: ir.Chain

    @property
    def name(self) -> str:
        return f"{self.first.name} to {self.second.name}"

    @property
    def label(self) -> str:
        return f"{self.first.label} to {self.second.label}"

    @property
    def in_avals(self) -> list[Any]:
        return [*self.first.in_avals, *self._without_left(self.second.in_avals)]

    @property
    def out_avals(self) -> list[Any]:
        """Of the first site's result where it is stored, and of the second's."""
        stored = self.first.out_avals if self.region.stored else []
        return [*stored, *self.second.out_avals]

    @property
    def views(self) -> tuple[View | None, ...]:
        return (*self.first.views, *self._without_left(self.second.views))

    @property
    def results(self) -> tuple[View | None, ...]:
        stored = self.first.results if self.region.stored else ()
        return (*stored, *self.second.results)

    @property
    def reference(self) -> ClosedJaxpr:
        """Both sites' references, one after the other."""

        def fun(*operands: Any) -> list[Any]:
            mine, others = self.split(operands)
            (left,) = reference_fun(self.first.reference)(*mine)
            made = reference_fun(self.second.reference)(*self.joined(others, left))
            return [left, *made] if self.region.stored else made

        shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in self.in_avals]
        return jax.make_jaxpr(fun)(*shapes)

    def split(self, operands: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """The first site's operands, and the second's without the left one."""
        count = len(self.first.in_avals)
        return list(operands[:count]), list(operands[count:])

    def joined(self, others: Sequence[Any], left: Any) -> list[Any]:
        """The operands of the second site's call, from those without the left one."""
        position = self.second.operands[0]
        return [*others[:position], left, *others[position:]]

    def owner(self, position: int) -> tuple[SiteInfo, int]:
        """Whose operand it is, and its position there."""
        count = len(self.first.in_avals)
        if position < count:
            return self.first, position
        position -= count
        return self.second, position + (position >= self.second.operands[0])

    def _without_left(self, values: Sequence[Any]) -> list[Any]:
        position = self.second.operands[0]
        return [*values[:position], *values[position + 1 :]]

    def __repr__(self) -> str:
        return f"{self.name}: {self.label}"


# What is tuned and resolved.
AnySite: TypeAlias = SiteInfo | ChainInfo
S = TypeVar("S", bound=AnySite)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """Two equations of a sequence, by position, that may be a chain."""

    producer: int
    consumer: int
    info: ChainInfo


def pairs(calls: ClosedJaxpr) -> list[Pair]:
    """Every two calls of a sequence that could be one kernel, in order.

    The consumer's left operand is the producer's result as it lies, and nothing else
    that it reads is made by the producer or after it: both can be launched where the
    producer is. A result that others read, too, is stored.
    """
    jaxpr = calls.jaxpr
    made = {var: i for i, eqn in enumerate(jaxpr.eqns) for var in eqn.outvars}
    leaving = set(variables(jaxpr.outvars))
    readers: dict[Var, set[int]] = {}
    for index, eqn in enumerate(jaxpr.eqns):
        for var in variables(eqn.invars):
            readers.setdefault(var, set()).add(index)
    found: list[Pair] = []
    for consumer, eqn in enumerate(jaxpr.eqns):
        site = eqn.params["site"]
        left = site.operands[0]
        var = eqn.invars[left]
        producer = made.get(var) if isinstance(var, Var) else None
        if producer is None:
            continue
        others = [v for i, v in enumerate(eqn.invars) if i != left]
        waits = any(made.get(v, -1) >= producer for v in variables(others))
        if waits or site.operands.count(left) > 1:
            continue
        stored = var in leaving or readers[var] != {consumer}
        first = jaxpr.eqns[producer].params["site"]
        region = _region(first.region, site.region, stored)
        if region is not None:
            found.append(Pair(producer, consumer, ChainInfo(first, site, region)))
    return found


def _region(first: ir.Region, second: ir.Region, stored: bool) -> ir.Chain | None:
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
        return ir.Chain(first=first, second=second, stored=stored)
    except ValueError:
        return None


def sequences(program: ClosedJaxpr) -> Iterator[list[Pair]]:
    """``pairs`` of each sequence of ``program`` and of the bodies inside it."""
    for eqn in program.jaxpr.eqns:
        if eqn.primitive is bolt_sequence_p:
            yield pairs(eqn.params["calls"])
            continue
        for _, bodies in sub_jaxprs(eqn):
            for body in bodies if isinstance(bodies, tuple) else (bodies,):
                yield from sequences(closed(body))


def best(found: Sequence[Pair], savings: Sequence[float]) -> list[Pair]:
    """Those of ``found`` that save most together, no call in two of them.

    A call has one producer, so that the pairs are the edges of a forest, in which a
    consumer comes after its producer: from the last call to the first, the most that a
    call and all that hang on it can save, with it left to its own producer and without.
    """
    edges: dict[int, list[tuple[Pair, float]]] = {}
    for pair, saving in zip(found, savings, strict=True):
        edges.setdefault(pair.producer, []).append((pair, saving))
    alone: dict[int, float] = {}
    most: dict[int, float] = {}
    choice: dict[int, Pair] = {}
    for producer in sorted(edges, reverse=True):
        hanging = edges[producer]
        alone[producer] = sum(most.get(pair.consumer, 0.0) for pair, _ in hanging)
        most[producer] = alone[producer]
        for pair, saving in hanging:
            freed = alone.get(pair.consumer, 0.0) - most.get(pair.consumer, 0.0)
            if saving > 0 and alone[producer] + saving + freed > most[producer]:
                most[producer] = alone[producer] + saving + freed
                choice[producer] = pair
    chosen: list[Pair] = []
    for producer in sorted(choice):
        if all(pair.consumer != producer for pair in chosen):
            chosen.append(choice[producer])
    return chosen
