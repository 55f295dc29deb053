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
    Var,
    closed,
    fresh_vars,
    is_drop,
    prefixed,
    rebuilt,
    substituted,
)

_INLINED = ("jit", "pjit", "closed_call", "core_call")


def inline_calls(program: ClosedJaxpr, *, lift_constants: bool = True) -> ClosedJaxpr:
    """Inlines every call that means nothing but its body.

    A call with constants of its own is left as it is unless ``lift_constants``: the
    program then gets them as its own.
    """
    inliner = _Inliner(program, lift_constants)
    inliner.emit(program.jaxpr, None, env := {})
    outvars = [substituted(env, v) for v in program.jaxpr.outvars]
    return rebuilt(
        program,
        inliner.eqns,
        outvars=outvars,
        constvars=inliner.constvars,
        consts=inliner.consts,
    )


class _Inliner:
    """The flat list of equations that a program becomes."""

    def __init__(self, program: ClosedJaxpr, lift_constants: bool):
        self.constvars = list(program.jaxpr.constvars)
        self.consts = list(program.consts)
        self.eqns: list[JaxprEqn] = []
        self._lift = lift_constants
        self._make_var = fresh_vars()

    def emit(self, jaxpr: Jaxpr, outer: JaxprEqn | None, env: dict[Var, Any]) -> None:
        """Appends ``jaxpr``'s equations; ``outer`` is the call they are inlined for."""
        for eqn in jaxpr.eqns:
            invars = [substituted(env, v) for v in eqn.invars]
            if outer is not None:
                eqn = eqn.replace(source_info=prefixed(eqn, outer))
            if self._inlines(eqn):
                self._inline(eqn, invars, env)
                continue
            outvars = eqn.outvars
            if outer is not None:
                # One cached body may be inlined many times; its variables may not.
                outvars = [v if is_drop(v) else self._make_var(v.aval) for v in outvars]
                env.update(zip(eqn.outvars, outvars, strict=True))
            self.eqns.append(eqn.replace(invars=invars, outvars=outvars))

    def _inline(self, eqn: JaxprEqn, invars: list[Any], env: dict[Var, Any]) -> None:
        body = _body(eqn)
        inner: dict[Var, Any] = dict(zip(body.jaxpr.invars, invars, strict=True))
        for var, value in zip(body.jaxpr.constvars, body.consts, strict=True):
            inner[var] = self._make_var(var.aval)
            self.constvars.append(inner[var])
            self.consts.append(value)
        self.emit(body.jaxpr, eqn, inner)
        for out, result in zip(eqn.outvars, body.jaxpr.outvars, strict=True):
            env[out] = substituted(inner, result)

    def _inlines(self, eqn: JaxprEqn) -> bool:
        return _may_inline(eqn) and (self._lift or not _body(eqn).consts)


def _body(eqn: JaxprEqn) -> ClosedJaxpr:
    return closed(eqn.params.get("jaxpr", eqn.params.get("call_jaxpr")))


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
