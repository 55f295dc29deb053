# SPDX-License-Identifier: Apache-2.0
"""jaxpr → jaxpr with every region replaced by one ``bolt_call`` equation.

The casts of arguments that regions read become one ``bolt_cast`` equation, calls that
follow each other one ``bolt_sequence``, and each max-pooling a ``bolt_pool``.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar

import jax

from . import cast, ir, layout, pool, sequence
from .canonicalize import inline_calls
from .compat import (
    ClosedJaxpr,
    JaxprEqn,
    Var,
    call_equation,
    closed,
    equations_of,
    fresh_vars,
    like_body,
    live_equations,
    part_of_jaxpr,
    rebuilt,
    renamed,
    source_line,
    sub_jaxprs,
    variables,
)
from .match import AUXILIARY, Match, Refusal, find_regions
from .options import Options
from .pool import PoolInfo
from .primitive import Family, SiteInfo, bolt_call_p
from .views import View

logger = logging.getLogger(__name__)

_Named = TypeVar("_Named", bound=Match | Refusal | SiteInfo)
# A region, and its right operand's shape and dtype -> the form of the kernel that will
# run it, and what makes the operand that this reads; None where there is nothing to
# make.
Prepare: TypeAlias = Callable[
    [ir.Region, Any], tuple[str, Callable[[jax.Array], jax.Array]] | None
]


@dataclasses.dataclass(slots=True)
class Rewritten:
    """A rewritten program, its regions, all its roots, and its pools.

    ``roots`` are in program order, a body's after those of the program around it; those
    of optimized functions that it calls are among them, and not in ``family``. Of the
    ``pools`` a body's come first.
    """

    program: ClosedJaxpr
    family: Family
    roots: list[SiteInfo | Refusal]
    pools: list[PoolInfo]

    @property
    def refusals(self) -> list[Refusal]:
        """The roots that stay with XLA."""
        return [root for root in self.roots if isinstance(root, Refusal)]


def rewrite(
    program: ClosedJaxpr,
    options: Options,
    frozen: int = 0,
    prepare: Prepare | None = None,
) -> Rewritten:
    """Replaces the regions of ``program`` and of the bodies inside it.

    Right operands that are among the first ``frozen`` arguments are also given to their
    regions as ``prepare`` makes them.

    Bodies of ``scan``, ``while``, ``cond``, ``remat``, ``shard_map`` and of calls that
    could not be inlined are rewritten in place; any other higher-order primitive is
    left alone. Rewriting a rewritten program changes nothing.
    """
    program = inline_calls(program)
    pass_ = _Pass(options, program.jaxpr.invars[:frozen], prepare)
    done = pass_.program(program)
    if cast.NAME not in options.disable:
        done = cast.gather(done, pass_.family, options)
    done = pass_.gathered(done)
    return Rewritten(done, pass_.family, pass_.roots, pass_.pools)


class _Pass:
    """One rewriting of a program: what it found so far."""

    def __init__(
        self, options: Options, frozen: Sequence[Var], prepare: Prepare | None
    ):
        self.options = options
        self._frozen, self._prepare = frozenset(frozen), prepare
        self.family = Family()
        self.roots: list[SiteInfo | Refusal] = []
        self.pools: list[PoolInfo] = []
        self._names: collections.Counter[str] = collections.Counter()

    def program(self, program: ClosedJaxpr) -> ClosedJaxpr:
        jaxpr = program.jaxpr
        disable = self.options.disable
        matches, refusals = find_regions(
            jaxpr,
            0 if AUXILIARY in disable else ir.MAX_AUXILIARY,
            pools=pool.NAME not in disable,
        )
        calls: dict[int, list[JaxprEqn]] = {}
        replaced: set[int] = set()
        for root in sorted([*matches, *refusals], key=lambda found: found.root):
            root = self._named(root)
            if isinstance(root, Refusal):
                self.roots.append(root)
                continue
            # At the last equation's place: all inputs, side inputs too, exist by then.
            calls[root.eqns[-1]] = self._call(jaxpr, root)
            replaced.update(root.eqns)
        eqns: list[JaxprEqn] = []
        for index, eqn in enumerate(jaxpr.eqns):
            if index in calls:
                eqns += calls[index]
            elif index not in replaced:
                # Of an optimized function that this one calls.
                self.roots += map(self._named, sequence.sites_of(eqn))
                eqns.append(self._with_bodies(eqn))
        if any(len(match.outputs) > 1 for match in matches):
            eqns = _in_order(eqns)
        # Per-channel arithmetic that only regions read is in their kernels.
        absorbed = {id(jaxpr.eqns[i]) for match in matches for i in match.absorbed}
        live = live_equations(eqns, jaxpr.outvars, lambda eqn: id(eqn) in absorbed)
        done = rebuilt(program, live)
        if any(match.is_rearranged for match in matches):
            done = layout.without_transposes(done)
        return done

    def gathered(self, program: ClosedJaxpr) -> ClosedJaxpr:
        """``program`` with its pools, and with consecutive calls as sequences."""
        # Once transposes are gone: a model in NCHW pools in NHWC.
        if pool.NAME not in self.options.disable:
            program, pools = pool.gather(program)
            self.pools += pools
        if sequence.NAME in self.options.disable:
            return program
        return sequence.gather(program, self.family, self.options)

    def _named(self, root: _Named) -> _Named:
        """``root``, with a number where another has its name: in a loop, say."""
        self._names[root.name] += 1
        count = self._names[root.name]
        if count == 1:
            return root
        return dataclasses.replace(root, name=f"{root.name} #{count}")

    def _call(self, jaxpr: Any, match: Match) -> list[JaxprEqn]:
        """The call, between views where the root is not as kernels take it."""
        root = jaxpr.eqns[match.root]
        edges = _Edges(match, root)
        ready = self._ready(match, edges)
        indices = sorted({*match.eqns, *match.absorbed})
        body = [jaxpr.eqns[i] for i in indices]
        # A pool at the end of a region may take two passes, too, where XLA runs it.
        reference, _ = pool.gather(
            part_of_jaxpr(jaxpr, edges.around(body), edges.operands, edges.results)
        )
        site = SiteInfo(
            region=match.region,
            reference=reference,
            operands=edges.positions,
            name=match.name,
            label=match.label,
            line=source_line(root),
            root=root.primitive.name,
            prologue=match.prologue,
            views=edges.views,
            result=None if match.shares_layout else match.result,
            ready=ready,
        )
        self.family.sites.append(site)
        self.roots.append(site)
        params = {
            "reference": site.reference,
            "site": site,
            "family": self.family,
            "options": self.options,
            "held": frozenset(),
        }
        call = call_equation(edges.operands, edges.outputs, bolt_call_p, params, root)
        return [*edges.before, call, *edges.after]

    def _ready(self, match: Match, edges: _Edges) -> str | None:
        """Adds the right operand as a kernel will read it; its form, or None."""
        if self._prepare is None or match.inputs[1] not in self._frozen:
            return None
        given = edges.operands[edges.positions[1]]
        try:
            found = self._prepare(match.region, given.aval)
            if found is not None:
                # As it is sharded, which may forbid it.
                jax.eval_shape(found[1], given.aval)
                edges.add(found[1], given)
        except Exception as error:  # then it is prepared at every call
            logger.info("%s: %s", match.name, error)
            return None
        return None if found is None else found[0]

    def _with_bodies(self, eqn: JaxprEqn) -> JaxprEqn:
        """``eqn`` with its bodies rewritten."""
        changes: dict[str, Any] = {}
        for name, body in sub_jaxprs(eqn):
            if isinstance(body, tuple):
                new = tuple(self._body(b) for b in body)
                changed = any(a is not b for a, b in zip(new, body, strict=True))
            else:
                new = self._body(body)
                changed = new is not body
            if changed:
                changes[name] = new
        return eqn.replace(params={**eqn.params, **changes}) if changes else eqn

    def _body(self, body: Any) -> Any:
        found = len(self.family.sites)
        # A body has no binder for a constant of a call inside it.
        new = self.program(inline_calls(closed(body), lift_constants=False))
        if len(self.family.sites) == found:
            return body
        return like_body(self.gathered(new), body)


def _in_order(eqns: Sequence[JaxprEqn]) -> list[JaxprEqn]:
    """``eqns``, each after what it reads, and otherwise as they are.

    An auxiliary output may be read before the place of its call: then the call, and
    what it waits for, come earlier. Effects stay in order.
    """
    producer = {v: i for i, eqn in enumerate(eqns) for v in eqn.outvars}
    effect: int | None = None
    needed: list[list[int]] = []
    for index, eqn in enumerate(eqns):
        needed.append([producer[v] for v in variables(eqn.invars) if v in producer])
        if eqn.effects:
            needed[-1] += [] if effect is None else [effect]
            effect = index
    placed: dict[int, JaxprEqn] = {}
    for index in range(len(eqns)):
        pending = [index]
        while pending:
            last = pending[-1]
            missing = [i for i in needed[last] if i not in placed]
            assert not set(missing) & set(pending), "equations wait for each other"
            pending += missing[:1]
            if not missing:
                placed.setdefault(last, eqns[last])
                pending.pop()
    return list(placed.values())


class _Edges:
    """A call's operands and outputs, and what rearranges them for the kernel.

    The reference is the user's own equations between the same views undone.
    """

    def __init__(self, match: Match, root: JaxprEqn):
        self.before: list[JaxprEqn] = []
        self.after: list[JaxprEqn] = []
        # For a value that is also an operand as it is, or in two orders, one suffices.
        self._back: dict[Any, list[JaxprEqn]] = {}
        self._root = root
        self._make_var = fresh_vars()
        wanted = list(zip(match.inputs, match.views, strict=True))
        made = {key: self._operand(*key) for key in dict.fromkeys(wanted)}
        self.operands = list(dict.fromkeys(made.values()))
        self.positions = tuple(self.operands.index(made[key]) for key in wanted)
        kept = {} if match.shares_layout else {v: view for (_, view), v in made.items()}
        self.views = tuple(kept.get(var) for var in self.operands)
        # The call's, and the reference's.
        self.outputs, self.results = list(match.outputs), list(match.outputs)
        self._last: list[JaxprEqn] = []
        if match.result is not None:
            for i, output in enumerate(match.outputs):
                there, self.results[i] = self._applied(match.result.there, output)
                self._last += there
                self.outputs[i] = self._make_var(self.results[i].aval)
                after, back = self._applied(match.result.back, self.outputs[i])
                self.after += renamed(after, {back: output})

    def add(self, fun: Any, var: Any) -> None:
        """Another operand, ``fun`` of ``var``, that the reference does not read."""
        eqns, made = self._applied(fun, var)
        self.before += live_equations(eqns, [made], lambda _: True)
        self.operands.append(made)
        self.views = (*self.views, None)

    def around(self, body: list[JaxprEqn]) -> list[JaxprEqn]:
        """The reference's equations."""
        back = [eqns for v, eqns in self._back.items() if v not in self.operands]
        return [*itertools.chain(*back), *body, *self._last]

    def _operand(self, var: Any, view: View | None) -> Any:
        if view is None:
            return var
        eqns, made = self._applied(view.there, var)
        self.before += eqns
        back, got = self._applied(view.back, made)
        self._back[var] = renamed(back, {got: var})
        return made

    def _applied(self, fun: Any, var: Any) -> tuple[list[JaxprEqn], Any]:
        """The equations of ``fun`` of ``var``, and its result."""
        return equations_of(fun, var, self._root, self._make_var)
