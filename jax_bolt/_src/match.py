# SPDX-License-Identifier: Apache-2.0
"""Finds regions: each root with the largest epilogue that only it feeds.

    conv(x, w) -> cast -> sub mean -> mul scale -> add offset -> cast -> relu
    root          \\______________________ epilogue ______________________/

Growth is from the root outwards. Every elementwise equation that (transitively) reads
the root's result is a candidate; the region ends at the last candidate result that
everything before it leads to, that is, past which no other value of the region is
used. Reshapes and transposes between its equations are part of a region, as long as
rows and channels can be told apart after them (``frame``). Per-channel inputs are then
followed *inwards* through broadcasts and the arithmetic on them, so that
``rsqrt(var + eps) * scale`` is part of the region.

A value that is also used elsewhere (a leaking intermediate) ends the region, unless
something further on has to be in memory anyway: a region or a loop reads it, or the
program returns it. Then the region goes on to there and stores the intermediate
besides, as an auxiliary output. Else another kernel would read the one and write the
other.

    conv(x, w) -> add the residual -> sub, mul, add, relu -> the next conv
                         \\________ the next residual

Where all that reads a conv's one result is max-pooling, or a mean over the image, the
region ends in that: then the result need not be in memory.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from . import elementwise, ir, pooled
from .compat import (
    Jaxpr,
    JaxprEqn,
    Var,
    aval_of,
    is_drop,
    name_stack,
    source_line,
    variables,
)
from .elementwise import NotElementwise
from .emission import Emission, is_input, is_view, label
from .frame import Frame
from .graph import Graph
from .roots import ROOTS, Refused, Root, read_root
from .views import View

AUXILIARY = "auxiliary"  # in the option ``disable``

_CALL = re.compile(r"jit\((.*?)\)")
# What XLA gives its operands to in memory.
_LOOPS = ("scan", "while", "cond")


@dataclasses.dataclass(frozen=True, slots=True)
class Match:
    """A region found in one jaxpr.

    ``eqns`` are the indices it replaces, the root's first; ``absorbed`` those of
    per-channel arithmetic, which go too unless something else reads them. ``inputs``
    are the left operand, the right one, the side inputs, the vectors; ``outputs`` the
    result and the auxiliary outputs. ``views`` is how each input is rearranged for the
    kernel, if at all, and ``result`` how the outputs are; where it ``shares_layout``,
    that can be expected to cancel. ``prologue`` names elementwise work on the left
    operand that no region does.
    """

    root: int
    eqns: tuple[int, ...]
    absorbed: tuple[int, ...]
    inputs: tuple[Any, ...]
    outputs: tuple[Var, ...]
    region: ir.Region
    name: str
    label: str
    views: tuple[View | None, ...]
    result: View | None
    shares_layout: bool
    prologue: str = ""

    @property
    def output(self) -> Var:
        """The result."""
        return self.outputs[0]

    @property
    def is_rearranged(self) -> bool:
        """Whether the kernel's operands or its result are not the user's."""
        return any(view is not None for view in (*self.views, self.result))


@dataclasses.dataclass(frozen=True, slots=True)
class Refusal:
    """A root that stays as it is, and why."""

    root: int
    primitive: str
    reason: str
    name: str
    line: str


def find_regions(
    jaxpr: Jaxpr, auxiliary: int = ir.MAX_AUXILIARY, *, pools: bool = True
) -> tuple[list[Match], list[Refusal]]:
    """All regions of one (canonical) jaxpr; bodies of calls are not entered.

    A region has at most so many ``auxiliary`` outputs, and ends in a pool only if
    ``pools``. Later roots choose first: where two branches meet, as in a residual add,
    the epilogue belongs to one of them and the other's result is its side input.
    """
    graph = Graph(jaxpr)
    matches: list[Match] = []
    refusals: list[Refusal] = []
    taken: set[int] = set()
    several = False  # outputs of any region
    for index in reversed(range(len(jaxpr.eqns))):
        eqn = jaxpr.eqns[index]
        if eqn.primitive.name not in ROOTS or is_drop(eqn.outvars[0]):
            continue
        name = site_name(eqn)
        try:
            roots = read_root(eqn)
        except Refused as refused:
            line = source_line(eqn)
            refusals.append(
                Refusal(index, eqn.primitive.name, str(refused), name, line)
            )
            continue
        grown = [
            _Growth(graph, index, root, taken, auxiliary, pools).match(name, several)
            for root in roots
        ]
        match = max(grown, key=lambda match: _rank(graph, match))
        taken.update(match.eqns, match.absorbed)
        graph.put_together(match.eqns, match.inputs)
        several |= len(match.outputs) > 1
        matches.append(match)
    found = [
        dataclasses.replace(match, prologue=graph.prologue(match.inputs[0]))
        for match in reversed(matches)
    ]
    return found, refusals[::-1]


def site_name(eqn: JaxprEqn) -> str:
    """The module path Flax and ``jax.named_scope`` give, else the source line."""
    path = "/".join(p for p in name_stack(eqn).split("/") if not _CALL.fullmatch(p))
    return path or source_line(eqn) or eqn.primitive.name


@dataclasses.dataclass(frozen=True, slots=True)
class _Ending:
    """A region's equations in order, its result and its auxiliary outputs.

    With ``pooling`` the last equations are that of the result.
    """

    eqns: list[int]
    outputs: tuple[Var, ...]
    pooling: pooled.Pooling | None = None

    @property
    def computed(self) -> list[int]:
        """Its equations but those of the pool."""
        pooling = () if self.pooling is None else self.pooling.eqns
        return self.eqns[: len(self.eqns) - len(pooling)]


def _rank(graph: Graph, match: Match) -> tuple[int, ...]:
    """Which of two regions of one root is better: that of the larger value.

    A result that has to be moved costs as much as work that stays outside.
    """
    readers = graph.users.get(match.output, set())
    moved = [graph.eqns[i].primitive.name == "transpose" for i in readers]
    # Two transposes after each other are one.
    stays = match.result is None or (moved and all(moved))
    return (
        bool(stays),
        len(match.eqns),
        -len(match.region.epilogue.sides),
        -sum(view is not None for view in match.views),
        match.region.problem.channels % 8 == 0,
    )


class _Growth:
    """The growth of one region; see the module's docstring."""

    def __init__(
        self,
        graph: Graph,
        root: int,
        problem: Root,
        taken: set[int],
        auxiliary: int,
        pools: bool,
    ):
        self.auxiliary = auxiliary
        self.pools = pools
        self.graph = graph
        self.root = root
        self.problem = problem
        self.taken = taken
        self.out = graph.eqns[root].outvars[0]
        self.frames: dict[Var, Frame] = {self.out: problem.frame}

    def match(self, name: str, several: bool) -> Match:
        """``several``: whether there is a region of several outputs already."""
        for ending in self._endings():
            # Regions of one output never do: each may come where its result did.
            may_wait = several or len(ending.outputs) > 1
            if may_wait and self.graph.waits_for_itself(ending.eqns):
                continue
            try:
                return self._emit(name, ending)
            except NotElementwise:
                # Too many inputs for a kernel: the next shorter ending.
                continue
        raise AssertionError("the root alone is always a region")

    def _endings(self) -> list[_Ending]:
        """Where it may end, the largest first; the last is the root alone."""
        # value -> equations of the region that it is computed by
        ancestors: dict[Var, frozenset[int]] = {self.out: frozenset([self.root])}
        endings = [_Ending([self.root], (self.out,))]
        for index in range(self.root + 1, len(self.graph.eqns)):
            eqn = self.graph.eqns[index]
            if index in self.taken or not self._grows(eqn, ancestors):
                continue
            (out,) = eqn.outvars
            inside = frozenset([index]).union(
                *(
                    ancestors[v]
                    for v in eqn.invars
                    if isinstance(v, Var) and v in ancestors
                )
            )
            ancestors[out] = inside
            outputs = (out, *self._leaks(inside, out))
            if self._ends_at(index) and self._pays(outputs):
                endings.append(_Ending(sorted(inside), outputs))
        # Where no float value ends the region well the root alone still does.
        endings.reverse()
        found = [each for each in map(self._pooled, endings) if each is not None]
        # A mean begins with a cast, with which a region without it might end.
        found.sort(key=lambda ending: -len(ending.eqns))
        return [*found, *endings]

    def _pooled(self, ending: _Ending) -> _Ending | None:
        """``ending`` with the pool of its result, if there is one."""
        out, *auxiliary = ending.outputs
        if not self.pools or auxiliary:
            return None
        frame, problem = self.frames[out], self.problem.problem
        pooling = pooled.find(self.graph, out, frame, problem, self.taken)
        if pooling is None:
            return None
        return _Ending([*ending.eqns, *pooling.eqns], ending.outputs, pooling)

    def _grows(self, eqn: JaxprEqn, ancestors: dict[Var, frozenset[int]]) -> bool:
        if len(eqn.outvars) != 1 or eqn.effects or is_drop(eqn.outvars[0]):
            return False
        ours = [v for v in variables(eqn.invars) if v in ancestors]
        frames = {self.frames[v] for v in ours}
        if len(frames) != 1:
            return False
        frame = frames.pop()
        if is_view(eqn):
            frame = frame.after(eqn)
        elif not self._computes(eqn, frame, ancestors):
            return False
        if frame is None:
            return False
        self.frames[eqn.outvars[0]] = frame
        return True

    def _computes(
        self, eqn: JaxprEqn, frame: Frame, ancestors: dict[Var, frozenset[int]]
    ) -> bool:
        """Whether it is elementwise on values of the region and on possible inputs."""
        if tuple(aval_of(eqn.outvars[0]).shape) != frame.shape:
            return False
        if not elementwise.supported(eqn):
            return False
        return all(_in(v, ancestors) or is_input(v, frame) for v in eqn.invars)

    def _ends_at(self, index: int) -> bool:
        """A region gives floats, and in its root's order or in the kernel's.

        XLA moves data in one go with the work after it, which a kernel would leave it
        to do by itself.
        """
        eqn = self.graph.eqns[index]
        moves, moved = self.frames[eqn.outvars[0]].moves, self.problem.frame.moves
        # A change of shape is worth having where it puts the root's order right.
        fits = moved and not moves if is_view(eqn) else moved or not moves
        return fits and _is_float(eqn.outvars[0])

    def _leaks(self, inside: frozenset[int], out: Var) -> list[Var]:
        """The values of the region beside ``out`` that are used outside it."""
        users = set(inside)
        made = [self.graph.eqns[index].outvars[0] for index in sorted(inside)]
        return [
            v for v in made if v is not out and not self.graph.used_only_in(v, users)
        ]

    def _pays(self, outputs: Sequence[Var]) -> bool:
        """Whether one kernel for all ``outputs`` moves less than one that ends before.

        That one writes what leaks, too. The result is then read from it and written by
        another kernel, where something reads the result from memory; else what reads it
        computes it.
        """
        result, *auxiliary = outputs
        if len(auxiliary) > self.auxiliary or not all(map(_is_float, auxiliary)):
            return False
        # A kernel gives all of them in one and the same order.
        alike = all(self.frames[v] == self.frames[result] for v in auxiliary)
        return not auxiliary or (alike and self._is_in_memory(result))

    def _is_in_memory(self, var: Var) -> bool:
        """Returned, or read by a region, a root or a loop, maybe reshaped."""
        if var in self.graph.escapes:
            return True
        for index in self.graph.users.get(var, ()):
            eqn = self.graph.eqns[index]
            name = eqn.primitive.name
            if index in self.taken or name in ROOTS or name in _LOOPS:
                return True
            if name == "reshape" and self._is_in_memory(eqn.outvars[0]):
                return True
        return False

    def _emit(self, name: str, ending: _Ending) -> Match:
        eqns = ending.eqns
        emission = Emission(
            self.graph, self.root, self.problem, self.frames, set(eqns), self.taken
        )
        pool, results = None, ending.outputs
        if ending.pooling is not None:
            pool = ending.pooling.pool
            results = tuple(self.graph.eqns[eqns[-1]].outvars)
        for index in ending.computed[1:]:
            emission.equation(index)
        builder = emission.builder
        if len(builder.vectors) > ir.MAX_VECTORS or len(builder.sides) > ir.MAX_SIDES:
            raise NotElementwise("more inputs than a kernel takes")
        if pool is not None and not pool.is_mean and builder.sides:
            raise NotElementwise("side inputs are as large as the result, not its pool")
        read = self.graph.eqns[self.root].invars
        operands = [read[i] for i in self.problem.operands]
        inputs = (*operands, *emission.sides, *emission.vectors)
        needed = self._needed(results, inputs)
        stored = [
            ir.Output(emission.values[v], elementwise.dtype_of(v))
            for v in ending.outputs
        ]
        region = ir.Region(
            problem=self.problem.problem,
            epilogue=builder.epilogue(stored),
            pool=pool,
        )
        callees = _callees(self, ending.computed)
        names = label(self.problem.label, region.epilogue, callees)
        # Of a mean only images and channels are left, in the kernel's order.
        is_mean = pool is not None and pool.is_mean
        return Match(
            root=self.root,
            eqns=tuple(eqns),
            absorbed=tuple(sorted(needed - set(eqns))),
            inputs=inputs,
            outputs=results,
            region=region,
            name=name,
            views=(self.problem.lhs, self.problem.rhs, *emission.views()),
            result=None if is_mean else self.frames[ending.outputs[0]].view,
            shares_layout=self.problem.shares_layout,
            label=names if pool is None else f"{names}+{pool.label}",
        )

    def _needed(self, outputs: Sequence[Var], inputs: Sequence[Any]) -> set[int]:
        """Equations that compute ``outputs`` from ``inputs``."""
        needed: set[int] = set()
        pending: list[Any] = list(outputs)
        while pending:
            var = pending.pop()
            if not isinstance(var, Var) or var in inputs:
                continue
            index = self.graph.producer[var]
            if index not in needed:
                needed.add(index)
                pending += self.graph.eqns[index].invars
        return needed


def _callees(growth: _Growth, eqns: list[int]) -> list[str]:
    """Names of the user's own elementwise functions (relu, silu) in the region."""
    around = _CALL.findall(name_stack(growth.graph.eqns[growth.root]))
    names: list[str] = []
    for index in eqns[1:]:
        eqn = growth.graph.eqns[index]
        calls = _CALL.findall(name_stack(eqn))[len(around) :]
        names += calls[:1] or [str(eqn.params.get("name", ""))]
    return [name for name in dict.fromkeys(names) if name.isidentifier()]


def _in(atom: Any, values: dict[Var, Any]) -> bool:
    return isinstance(atom, Var) and atom in values


def _is_float(var: Var) -> bool:
    return elementwise.dtype_of(var) != "bool"
