# SPDX-License-Identifier: Apache-2.0
"""jaxpr → what depends on its frozen arguments alone, and the rest.

    prepare:  frozen arguments -> computed values
    rest:     residuals (some of both), other arguments -> results

Equations move as they are, so that every value is computed by what the user wrote. An
equation stays in the rest if it has effects, which happen at every call; its body is
not taken apart. Two kinds that could move stay as well, since keeping their results
would cost more than computing them: what reads no argument at all, and what only
spreads a smaller value (and the elementwise work on it), which XLA or a kernel makes
where it is read. But the operands that calls have ready (``filters.py``) move.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

import numpy as np
from jax.core import Tracer

from . import elementwise
from .canonicalize import inline_calls
from .compat import (
    ClosedJaxpr,
    Jaxpr,
    JaxprEqn,
    Literal,
    Var,
    aval_of,
    live_equations,
    program_like,
    variables,
)
from .sequence import ready_operands


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Split:
    """A program in two parts.

    ``sources`` has, for each of the rest's leading arguments (the residuals), its
    position among the frozen arguments followed by what ``prepare`` computes.
    """

    prepare: ClosedJaxpr
    rest: ClosedJaxpr
    sources: tuple[int, ...]


class _When(enum.Enum):
    NEVER = enum.auto()  # it reads no argument
    ONCE = enum.auto()
    SPREAD = enum.auto()  # could be ONCE
    CALL = enum.auto()


def split(program: ClosedJaxpr, frozen: int) -> Split | None:
    """``program`` parted by its first ``frozen`` arguments.

    Constants count as frozen. None where one of them is a tracer: nothing is known of
    it, and its trace may be over when the next call comes.
    """
    program = inline_calls(program)
    jaxpr = program.jaxpr
    if any(isinstance(value, Tracer) for value in program.consts):
        return None
    when = _times(jaxpr, frozen)

    def at_call(eqn: JaxprEqn) -> bool:
        return when[id(eqn)] is _When.CALL

    rest = live_equations(
        [eqn for eqn in jaxpr.eqns if when[id(eqn)] is not _When.ONCE],
        jaxpr.outvars,
        lambda eqn: not at_call(eqn),
    )
    made = {v for eqn in rest for v in eqn.outvars}
    made.update(jaxpr.constvars, jaxpr.invars[frozen:])
    read = [v for eqn in rest for v in variables(eqn.invars)]
    residuals = {v for v in (*read, *variables(jaxpr.outvars)) if v not in made}
    computed = [v for eqn in jaxpr.eqns for v in eqn.outvars if v in residuals]
    prepare = live_equations(
        [eqn for eqn in jaxpr.eqns if not at_call(eqn)], computed, lambda _: True
    )
    known = [*jaxpr.invars[:frozen], *computed]
    sources = tuple(i for i, v in enumerate(known) if v in residuals)
    inputs = [*(known[i] for i in sources), *jaxpr.invars[frozen:]]
    return Split(
        prepare=program_like(
            program, prepare, jaxpr.invars[:frozen], computed, frozenset()
        ),
        rest=program_like(program, rest, inputs, jaxpr.outvars, jaxpr.effects),
        sources=sources,
    )


def further(parts: Split, rest: ClosedJaxpr) -> Split:
    """``parts`` once their rest was rewritten: what that added moves, too.

    A filter that is transposed to a kernel's layout, say. ``rest`` has the arguments
    and the constants of ``parts.rest``.
    """
    second = split(rest, len(parts.sources))
    assert second is not None  # its constants are those of the first
    first = parts.prepare.jaxpr
    residuals = second.rest.jaxpr.invars[: len(second.sources)]
    computed = [v for v in residuals if v not in first.invars]
    known = [*first.invars, *computed]
    eqns = [*first.eqns, *second.prepare.jaxpr.eqns]
    return Split(
        prepare=program_like(
            parts.prepare,
            live_equations(eqns, computed, lambda _: True),
            first.invars,
            computed,
            frozenset(),
        ),
        rest=second.rest,
        sources=tuple(known.index(v) for v in residuals),
    )


def _times(jaxpr: Jaxpr, frozen: int) -> dict[int, _When]:
    """When each equation (by ``id``) is computed."""
    of: dict[Var, _When] = dict.fromkeys(jaxpr.constvars, _When.ONCE)
    of.update(dict.fromkeys(jaxpr.invars[:frozen], _When.ONCE))
    of.update(dict.fromkeys(jaxpr.invars[frozen:], _When.CALL))
    ready = {v for eqn in jaxpr.eqns for v in ready_operands(eqn)}
    found: dict[int, _When] = {}
    for eqn in jaxpr.eqns:
        inputs = {of[v] for v in variables(eqn.invars)}
        if eqn.effects or _When.CALL in inputs:
            when = _When.CALL
        elif not inputs - {_When.NEVER}:
            when = _When.NEVER
        elif _When.SPREAD in inputs and elementwise.supported(eqn):
            when = _When.SPREAD
        else:
            when = _When.SPREAD if _spreads(eqn) else _When.ONCE
        if when is _When.SPREAD and not ready.isdisjoint(eqn.outvars):
            when = _When.ONCE
        found[id(eqn)] = when
        of.update(dict.fromkeys(eqn.outvars, when))
    return found


def _spreads(eqn: JaxprEqn) -> bool:
    if eqn.primitive.name != "broadcast_in_dim":
        return False
    source, result = aval_of(eqn.invars[0]), aval_of(eqn.outvars[0])
    if not all(isinstance(d, int) for d in result.shape):
        return True
    return result.size > source.size


def same(a: ClosedJaxpr, b: ClosedJaxpr) -> bool:
    """Whether two programs are surely equal, equation by equation."""
    one, other = a.jaxpr, b.jaxpr
    sizes = [
        tuple(map(len, (j.constvars, j.invars, j.eqns, j.outvars)))
        for j in (one, other)
    ]
    if sizes[0] != sizes[1] or any(
        x is not y for x, y in zip(a.consts, b.consts, strict=True)
    ):
        return False
    names: dict[Var, Var] = {}

    def bind(left: Any, right: Any) -> bool:
        names.update(zip(left, right, strict=True))
        return all(x.aval == y.aval for x, y in zip(left, right, strict=True))

    def equal(x: Any, y: Any) -> bool:
        if isinstance(x, Literal) or isinstance(y, Literal):
            return type(x) is type(y) and x.aval == y.aval and _bits(x) == _bits(y)
        return names[x] is y

    def read(left: Any, right: Any) -> bool:
        return len(left) == len(right) and all(map(equal, left, right))

    return (
        bind((*one.constvars, *one.invars), (*other.constvars, *other.invars))
        and all(
            x.primitive is y.primitive
            and x.ctx == y.ctx
            and _same_params(x.params, y.params)
            and read(x.invars, y.invars)
            and len(x.outvars) == len(y.outvars)
            and bind(x.outvars, y.outvars)
            for x, y in zip(one.eqns, other.eqns, strict=True)
        )
        and read(one.outvars, other.outvars)
    )


def _bits(literal: Any) -> bytes:
    # 0.0 equals -0.0, and NaN does not equal itself.
    return np.asarray(literal.val).tobytes()


def _same_params(a: dict[str, Any], b: dict[str, Any]) -> bool:
    try:
        # Of what has no equality of its own, bodies say, only the same object is equal.
        return a.keys() == b.keys() and all(
            a[k] is b[k] or bool(a[k] == b[k]) for k in a
        )
    except Exception:  # arrays of several elements, or anything of another library's
        return False
