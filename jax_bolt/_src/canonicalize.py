# SPDX-License-Identifier: Apache-2.0
"""jaxpr → jaxpr with the bodies of plain ``jit`` calls inlined.

``jax.nn.relu``, ``jnp.where`` and most of ``jax.numpy`` are little jitted functions;
inlined, a block of a model is one flat list of equations that the matcher can read.
``custom_jvp_call`` and ``custom_vjp_call`` stay calls: the matcher sees an elementwise
one as a single equation, so that the user's derivative rule survives in the region.
"""

from __future__ import annotations

from typing import Any

from .compat import (
    ClosedJaxpr,
    Jaxpr,
    JaxprEqn,
    Literal,
    Var,
    closed,
    fresh_vars,
    is_drop,
    prefixed,
    rebuilt,
)

_INLINED = ("jit", "pjit", "closed_call", "core_call")


def inline_calls(program: ClosedJaxpr) -> ClosedJaxpr:
    """Inlines every call that means nothing but its body."""
    constvars = list(program.jaxpr.constvars)
    consts = list(program.consts)
    eqns: list[JaxprEqn] = []
    env: dict[Var, Any] = {}
    _emit(program.jaxpr, None, env, eqns, constvars, consts, fresh_vars())
    outvars = [_read(env, v) for v in program.jaxpr.outvars]
    return rebuilt(program, eqns, outvars=outvars, constvars=constvars, consts=consts)


def _emit(jaxpr: Jaxpr, outer, env, eqns, constvars, consts, make_var) -> None:
    """Appends ``jaxpr``'s equations under ``env``; ``outer`` is the call inlined."""
    for eqn in jaxpr.eqns:
        invars = [_read(env, v) for v in eqn.invars]
        if outer is not None:
            eqn = eqn.replace(source_info=prefixed(eqn, outer))
        if _may_inline(eqn):
            body = closed(eqn.params.get("jaxpr", eqn.params.get("call_jaxpr")))
            inner: dict[Var, Any] = dict(zip(body.jaxpr.invars, invars, strict=True))
            for var, value in zip(body.jaxpr.constvars, body.consts, strict=True):
                inner[var] = make_var(var.aval)
                constvars.append(inner[var])
                consts.append(value)
            _emit(body.jaxpr, eqn, inner, eqns, constvars, consts, make_var)
            for out, result in zip(eqn.outvars, body.jaxpr.outvars, strict=True):
                env[out] = _read(inner, result)
            continue
        outvars = eqn.outvars
        if outer is not None:
            # One cached body may be inlined many times; its variables may not.
            outvars = [v if is_drop(v) else make_var(v.aval) for v in eqn.outvars]
            env.update(zip(eqn.outvars, outvars, strict=True))
        eqns.append(eqn.replace(invars=invars, outvars=outvars))


def _read(env: dict[Var, Any], atom: Any) -> Any:
    return atom if isinstance(atom, Literal) else env.get(atom, atom)


def _may_inline(eqn: JaxprEqn) -> bool:
    """Not with effects (their order is the call's) nor with shardings of its own."""
    if eqn.primitive.name not in _INLINED or eqn.effects:
        return False
    shardings = (
        *eqn.params.get("in_shardings", ()),
        *eqn.params.get("out_shardings", ()),
    )
    layouts = (*eqn.params.get("in_layouts", ()), *eqn.params.get("out_layouts", ()))
    if any(type(s).__name__ != "UnspecifiedValue" for s in shardings):
        return False
    return all(layout is None for layout in layouts)
