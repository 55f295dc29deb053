# SPDX-License-Identifier: Apache-2.0
"""jaxpr → jaxpr with every region replaced by one ``bolt_call`` equation."""

from __future__ import annotations

import dataclasses
from typing import Any

from .canonicalize import inline_calls
from .compat import (
    ClosedJaxpr,
    JaxprEqn,
    Literal,
    Var,
    call_equation,
    closed,
    like_body,
    rebuilt,
    region_jaxpr,
    source_line,
    sub_jaxprs,
)
from .match import Match, Refusal, find_regions
from .options import Options
from .primitive import Family, SiteInfo, bolt_call_p


@dataclasses.dataclass(slots=True)
class Rewritten:
    """A rewritten program, its regions, and the roots that stay with XLA."""

    program: ClosedJaxpr
    family: Family
    refusals: list[Refusal]


def rewrite(program: ClosedJaxpr, options: Options) -> Rewritten:
    """Replaces the regions of ``program`` and of the bodies inside it.

    Bodies of ``scan``, ``while``, ``cond``, ``remat``, ``shard_map`` and of calls that
    could not be inlined are rewritten in place; any other higher-order primitive is
    left alone. Rewriting a rewritten program changes nothing.
    """
    family, refusals = Family(), []
    return Rewritten(_rewrite(program, family, refusals, options), family, refusals)


def _rewrite(
    program: ClosedJaxpr, family: Family, refusals: list[Refusal], options: Options
) -> ClosedJaxpr:
    program = inline_calls(program)
    jaxpr = program.jaxpr
    matches, refused = find_regions(jaxpr)
    refusals += refused
    calls: dict[int, JaxprEqn] = {}
    replaced: set[int] = set()
    for match in matches:
        # At the last equation's place: all inputs, side inputs too, exist by then.
        calls[match.eqns[-1]] = _call(jaxpr, match, family, options)
        replaced.update(match.eqns)
    eqns: list[JaxprEqn] = []
    origin: list[int | None] = []
    for index, eqn in enumerate(jaxpr.eqns):
        if index in calls:
            eqns.append(calls[index])
            origin.append(None)
        elif index not in replaced:
            eqns.append(_with_bodies(eqn, family, refusals, options))
            origin.append(index)
    absorbed = {i for match in matches for i in match.absorbed}
    return rebuilt(program, _without_unused(eqns, origin, absorbed, jaxpr.outvars))


def _call(jaxpr: Any, match: Match, family: Family, options: Options) -> JaxprEqn:
    operands = list(dict.fromkeys(match.inputs))
    indices = sorted({*match.eqns, *match.absorbed})
    root = jaxpr.eqns[match.root]
    site = SiteInfo(
        region=match.region,
        reference=region_jaxpr(
            jaxpr, [jaxpr.eqns[i] for i in indices], operands, match.output
        ),
        operands=tuple(operands.index(v) for v in match.inputs),
        name=match.name,
        label=match.label,
        line=source_line(root),
        root=root.primitive.name,
    )
    family.sites.append(site)
    params = dict(reference=site.reference, site=site, family=family, options=options)
    return call_equation(operands, match.output, bolt_call_p, params, root)


def _with_bodies(
    eqn: JaxprEqn, family: Family, refusals: list[Refusal], options: Options
) -> JaxprEqn:
    """``eqn`` with its bodies rewritten."""
    changes: dict[str, Any] = {}
    for name, body in sub_jaxprs(eqn):
        if isinstance(body, tuple):
            new = tuple(_body(b, family, refusals, options) for b in body)
            changed = any(a is not b for a, b in zip(new, body, strict=True))
        else:
            new = _body(body, family, refusals, options)
            changed = new is not body
        if changed:
            changes[name] = new
    return eqn.replace(params={**eqn.params, **changes}) if changes else eqn


def _body(body: Any, family: Family, refusals: list[Refusal], options: Options) -> Any:
    old = closed(body)
    found = len(family.sites)
    new = _rewrite(old, family, refusals, options)
    if len(family.sites) == found or len(new.consts) != len(old.consts):
        # Untouched, or a constant of an inlined call has no binder in this body.
        del family.sites[found:]
        return body
    return like_body(new, body)


def _without_unused(
    eqns: list[JaxprEqn],
    origin: list[int | None],
    candidates: set[int],
    outvars: list[Any],
) -> list[JaxprEqn]:
    """Drops absorbed per-channel equations that nothing reads any more."""
    used: set[Var] = {v for v in outvars if isinstance(v, Var)}
    kept: list[JaxprEqn] = []
    for eqn, index in zip(reversed(eqns), reversed(origin), strict=True):
        if index in candidates and not any(v in used for v in eqn.outvars):
            continue
        kept.append(eqn)
        used.update(v for v in eqn.invars if not isinstance(v, Literal))
    return kept[::-1]
