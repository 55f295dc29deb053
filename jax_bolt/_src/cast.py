# SPDX-License-Identifier: Apache-2.0
"""``bolt_cast``: one equation, and on a GPU one kernel, for the casts of arguments.

A model with f32 parameters that computes in bf16 casts every parameter at every call,
each with a kernel of its own. ``gather`` puts those casts together at the program's
start. Except on a CUDA device the equation is the casts themselves.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .compat import (
    ClosedJaxpr,
    Jaxpr,
    JaxprEqn,
    Primitive,
    Var,
    ad,
    batching,
    mlir,
    new_equation,
    rebuilt,
    substituted,
    variables,
)
from .options import Options
from .primitive import Family, SiteInfo, is_call

NAME = "cast"  # in the option ``disable``
# Beside the time of a larger one a launch does not count, and a gathered result is
# alive from the start of the program.
MAX_BYTES = 16 << 20

_DTYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))

bolt_cast_p = Primitive("bolt_cast")
bolt_cast_p.multiple_results = True


def gather(program: ClosedJaxpr, family: Family, options: Options) -> ClosedJaxpr:
    """Gathers the casts of arguments to bf16, and to f16, that only regions read.

    The regions are those of ``family``; bodies are left alone. So are constants, which
    XLA casts when it compiles.
    """
    jaxpr = program.jaxpr
    readers = _readers(jaxpr, family)
    # For each equation to come: argument -> what it is cast to. A layer that is called
    # twice casts its parameters twice.
    found: dict[tuple[Any, Any], dict[Var, list[Var]]] = {}
    for eqn in jaxpr.eqns:
        if eqn.primitive is lax.convert_element_type_p and _may_move(eqn, jaxpr):
            argument, result = _ends(eqn)
            if result in readers:
                casts = found.setdefault((result.aval.dtype, eqn.ctx), {})
                casts.setdefault(argument, []).append(result)
    gathered: list[JaxprEqn] = []
    renamed: dict[Var, Var] = {}
    for (dtype, ctx), casts in found.items():
        if len(casts) < 2:
            continue
        for same in casts.values():
            renamed.update(dict.fromkeys(same, same[0]))
        params = {
            "dtype": dtype,
            "readers": tuple(
                tuple(site for result in same for site in readers[result])
                for same in casts.values()
            ),
            "family": family,
            "options": options,
        }
        results = [same[0] for same in casts.values()]
        gathered.append(new_equation(list(casts), results, bolt_cast_p, params, ctx))
    kept = [
        eqn.replace(invars=[substituted(renamed, v) for v in eqn.invars])
        for eqn in jaxpr.eqns
        if not any(v in renamed for v in eqn.outvars)
    ]
    return rebuilt(program, [*gathered, *kept]) if gathered else program


def _ends(eqn: JaxprEqn) -> tuple[Any, Any]:
    """The operand and the result of a cast."""
    return eqn.invars[0], eqn.outvars[0]


def _readers(jaxpr: Jaxpr, family: Family) -> dict[Var, list[SiteInfo]]:
    """The regions that read each variable; none where something else does too."""
    readers: dict[Var, list[SiteInfo]] = {}
    others = set(variables(jaxpr.outvars))
    for eqn in jaxpr.eqns:
        read = variables(eqn.invars)
        if not is_call(eqn, family):
            others.update(read)
            continue
        for var in read:
            readers.setdefault(var, []).append(eqn.params["site"])
    return {v: sites for v, sites in readers.items() if v not in others}


def _may_move(eqn: JaxprEqn, jaxpr: Jaxpr) -> bool:
    """Whether a cast is of an argument, to one of our types, and nothing but a cast."""
    argument, result = _ends(eqn)
    if argument not in jaxpr.invars:
        return False
    old, new = argument.aval, result.aval
    return (
        old.dtype == jnp.float32
        and new.dtype in _DTYPES
        and new == _cast_aval(old, new.dtype)
        and eqn.params.get("sharding") is None
        and 0 < 4 * math.prod(old.shape) <= MAX_BYTES
    )


def _cast_aval(aval: Any, dtype: Any) -> Any:
    return aval.update(dtype=dtype, weak_type=False)


@bolt_cast_p.def_impl
def _impl(*args: Any, dtype: Any, **_: Any) -> list[Any]:
    return [lax.convert_element_type(x, dtype) for x in args]


@bolt_cast_p.def_abstract_eval
def _abstract_eval(*avals: Any, dtype: Any, **_: Any) -> list[Any]:
    return [_cast_aval(aval, dtype) for aval in avals]


def _batch(args, dims, *, dtype, **_):
    return [lax.convert_element_type(x, dtype) for x in args], dims


def _jvp(primals, tangents, *, dtype, **_):
    results = [lax.convert_element_type(x, dtype) for x in primals]
    moved = [
        ad.Zero(jax.typeof(y))
        if isinstance(t, ad.Zero)
        else lax.convert_element_type(t, dtype)
        for y, t in zip(results, tangents, strict=True)
    ]
    return results, moved


def _transpose(cotangents, *args, **_):
    def one(cotangent, arg):
        if not ad.is_undefined_primal(arg):
            return None
        if isinstance(cotangent, ad.Zero):
            return ad.Zero(arg.aval)
        return lax.convert_element_type(cotangent, arg.aval.dtype)

    return [one(c, a) for c, a in zip(cotangents, args, strict=True)]


batching.primitive_batchers[bolt_cast_p] = _batch
ad.primitive_jvps[bolt_cast_p] = _jvp
ad.primitive_transposes[bolt_cast_p] = _transpose


def lower_casts(ctx: mlir.LoweringRuleContext, *args: Any, **params: Any) -> Any:
    """XLA's own path: the casts, one by one."""
    return mlir.lower_fun(lambda *xs: _impl(*xs, **params), multiple_results=True)(
        ctx, *args
    )


mlir.register_lowering(bolt_cast_p, lower_casts)
