# SPDX-License-Identifier: Apache-2.0
"""``bolt_sequence``: consecutive ``bolt_call`` equations as one.

XLA records every custom call into a graph of its own, and between two of them the
device drains. The kernels of one custom call follow each other by programmatic
dependent launch: the next one sets itself up while the one ahead still runs. Except on
a CUDA device the equation is its calls, one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from .compat import (
    ClosedJaxpr,
    JaxprEqn,
    Literal,
    Primitive,
    Var,
    ad,
    batching,
    is_drop,
    jaxpr_as_fun,
    mlir,
    new_equation,
    part_of_jaxpr,
    rebuilt,
)
from .options import Options
from .primitive import Family, bolt_call_p

NAME = "sequence"  # in the option ``disable``

bolt_sequence_p = Primitive("bolt_sequence")
bolt_sequence_p.multiple_results = True


def gather(program: ClosedJaxpr, family: Family, options: Options) -> ClosedJaxpr:
    """Puts runs of ``family``'s calls together; bodies are left alone.

    What does not read a run's results may come before it, so a run ends where something
    else reads one of them. A single call stays as it is.
    """
    jaxpr = program.jaxpr
    # Equations in their new order; a run of calls is one list.
    units: list[list[JaxprEqn]] = []
    run: list[JaxprEqn] = []
    results: set[Var] = set()
    for eqn in jaxpr.eqns:
        if eqn.primitive is bolt_call_p and eqn.params["family"] is family:
            run.append(eqn)
            results.update(eqn.outvars)
            continue
        if results.intersection(_variables(eqn)):
            units.append(run)
            run, results = [], set()
        units.append([eqn])
    units.append(run)

    readers = _readers(units, jaxpr.outvars)
    eqns: list[JaxprEqn] = []
    for index, unit in enumerate(units):
        if len(unit) < 2:
            eqns += unit
            continue
        made = dict.fromkeys(v for eqn in unit for v in eqn.outvars if not is_drop(v))
        read = dict.fromkeys(v for eqn in unit for v in _variables(eqn))
        operands = [v for v in read if v not in made]
        outputs = [v for v in made if readers.get(v, set()) - {index}]
        calls = part_of_jaxpr(jaxpr, unit, operands, outputs)
        params = {"calls": calls, "family": family, "options": options}
        eqns.append(
            new_equation(operands, outputs, bolt_sequence_p, params, unit[0].ctx)
        )
    return rebuilt(program, eqns)


def _variables(eqn: JaxprEqn) -> list[Var]:
    return [v for v in eqn.invars if not isinstance(v, Literal)]


def _readers(
    units: Sequence[Sequence[JaxprEqn]], outvars: Sequence[Any]
) -> dict[Var, set[int]]:
    """The units that read each variable; -1 stands for the program's results."""
    readers: dict[Var, set[int]] = {}
    for var in outvars:
        if not isinstance(var, Literal):
            readers.setdefault(var, set()).add(-1)
    for index, unit in enumerate(units):
        for eqn in unit:
            for var in _variables(eqn):
                readers.setdefault(var, set()).add(index)
    return readers


@bolt_sequence_p.def_impl
def _impl(*args: Any, calls: ClosedJaxpr, **_: Any) -> list[Any]:
    return jaxpr_as_fun(calls)(*args)


@bolt_sequence_p.def_abstract_eval
def _abstract_eval(*_avals: Any, calls: ClosedJaxpr, **_: Any) -> list[Any]:
    return list(calls.out_avals)


def _batch(args, dims, *, calls, **_):
    results = jax.vmap(jaxpr_as_fun(calls), in_axes=tuple(dims))(*args)
    return results, [0] * len(results)


def _jvp(primals, tangents, *, calls, **_):
    """Forward mode through the calls; operands with zero tangents stay fixed."""
    moving = [i for i, t in enumerate(tangents) if not isinstance(t, ad.Zero)]

    def of_moving(*values):
        args = list(primals)
        for i, value in zip(moving, values, strict=True):
            args[i] = value
        return jaxpr_as_fun(calls)(*args)

    return jax.jvp(
        of_moving,
        tuple(primals[i] for i in moving),
        tuple(tangents[i] for i in moving),
    )


def _transpose(cotangents, *args, calls, **_):
    """Reverse mode of calls that are linear in their undefined operands."""
    linear = [i for i, a in enumerate(args) if ad.is_undefined_primal(a)]

    def of_linear(*values):
        operands = list(args)
        for i, value in zip(linear, values, strict=True):
            operands[i] = value
        return jaxpr_as_fun(calls)(*operands)

    avals = [args[i].aval for i in linear]
    transposed = jax.linear_transpose(
        of_linear, *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals)
    )
    results = transposed([ad.instantiate_zeros(c) for c in cotangents])
    found = dict(zip(linear, results, strict=True))
    return [found.get(i) for i in range(len(args))]


batching.primitive_batchers[bolt_sequence_p] = _batch
ad.primitive_jvps[bolt_sequence_p] = _jvp
ad.primitive_transposes[bolt_sequence_p] = _transpose


def lower_calls(ctx: mlir.LoweringRuleContext, *args: Any, **params: Any) -> Any:
    """XLA's own path: the calls, each lowered for itself."""
    fun = jaxpr_as_fun(params["calls"])
    return mlir.lower_fun(fun, multiple_results=True)(ctx, *args)


mlir.register_lowering(bolt_sequence_p, lower_calls)
