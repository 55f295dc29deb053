# SPDX-License-Identifier: Apache-2.0
"""``bolt_sequence``: consecutive ``bolt_call`` equations as one.

XLA records every custom call into a graph of its own, and between two of them the
device drains. The kernels of one custom call follow each other by programmatic
dependent launch: the next one sets itself up while the one ahead still runs. Except on
a CUDA device the equation is its calls, one by one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax

from .compat import (
    ClosedJaxpr,
    JaxprEqn,
    Primitive,
    Var,
    ad,
    aval_of,
    batching,
    jaxpr_as_fun,
    live_equations,
    mlir,
    new_equation,
    part_of_jaxpr,
    rebuilt,
    register_dce,
    variables,
    without_unused,
)
from .options import Options
from .primitive import Family, SiteInfo, bolt_call_p, is_call, jvp, transpose

NAME = "sequence"  # in the option ``disable``
# Of results that wait for a sequence, where the program as written has each when it is
# read: weights that are dequantised layer by layer, say.
MAX_EARLY_BYTES = 64 << 20

bolt_sequence_p = Primitive("bolt_sequence")
bolt_sequence_p.multiple_results = True


def sites_of(eqn: JaxprEqn) -> list[SiteInfo]:
    """The regions of an equation that is a call or a sequence of calls, else none."""
    if eqn.primitive is bolt_call_p:
        return [eqn.params["site"]]
    if eqn.primitive is bolt_sequence_p:
        calls = eqn.params["calls"].jaxpr.eqns
        return [site for call in calls for site in sites_of(call)]
    return []


def ready_operands(eqn: JaxprEqn) -> list[Any]:
    """The operands of a call, or of a sequence's calls, that are made for a kernel."""
    if eqn.primitive is bolt_call_p:
        return [] if eqn.params["site"].ready is None else [eqn.invars[-1]]
    if eqn.primitive is bolt_sequence_p:
        calls = eqn.params["calls"].jaxpr
        outside = dict(zip(calls.invars, eqn.invars, strict=True))
        ready = [v for call in calls.eqns for v in ready_operands(call)]
        return [outside[v] for v in ready if v in outside]
    return []


def gather(program: ClosedJaxpr, family: Family, options: Options) -> ClosedJaxpr:
    """Puts runs of ``family``'s calls together; bodies are left alone.

    What does not read a run's results may come before it, so a run ends where something
    else reads one of them; and where too much would have to be kept for it. Calls that
    nothing reads are dropped. A single call stays as it is.
    """
    jaxpr = program.jaxpr
    # Equations in their new order; a run of calls is one list.
    units: list[list[JaxprEqn]] = []
    run: list[JaxprEqn] = []
    results: set[Var] = set()
    early: dict[Var, float] = {}  # bytes of what moved ahead of the run
    live = live_equations(jaxpr.eqns, jaxpr.outvars, lambda eqn: is_call(eqn, family))
    for eqn in live:
        read = variables(eqn.invars)
        ours = is_call(eqn, family)
        if ours:
            kept = sum(early.values()) if early.keys() & read else 0
            ends = kept > MAX_EARLY_BYTES or (run and run[0].ctx != eqn.ctx)
        else:
            ends = not results.isdisjoint(read)
        if ends:
            units.append(run)
            run, results, early = [], set(), {}
        if ours:
            run.append(eqn)
            results.update(eqn.outvars)
        else:
            units.append([eqn])
            if run:
                early.update({v: _bytes(v) for v in eqn.outvars})
    units.append(run)

    readers = _readers(units, jaxpr.outvars)
    eqns: list[JaxprEqn] = []
    for index, unit in enumerate(units):
        if len(unit) < 2:
            eqns += unit
            continue
        made = dict.fromkeys(v for eqn in unit for v in eqn.outvars)
        read = dict.fromkeys(v for eqn in unit for v in variables(eqn.invars))
        operands = [v for v in read if v not in made]
        outputs = [v for v in made if readers.get(v, set()) - {index}]
        calls = part_of_jaxpr(jaxpr, unit, operands, outputs)
        params = {"calls": calls, "family": family, "options": options}
        eqns.append(
            new_equation(operands, outputs, bolt_sequence_p, params, unit[0].ctx)
        )
    return rebuilt(program, eqns)


def _bytes(var: Var) -> float:
    """Unbounded where the shape is symbolic: such sizes cannot be compared."""
    aval = aval_of(var)
    if not all(isinstance(d, int) for d in aval.shape):
        return math.inf
    return math.prod(aval.shape) * aval.dtype.itemsize


def _readers(
    units: Sequence[Sequence[JaxprEqn]], outvars: Sequence[Any]
) -> dict[Var, set[int]]:
    """The units that read each variable; -1 stands for the program's results."""
    readers: dict[Var, set[int]] = {}
    for var in variables(outvars):
        readers.setdefault(var, set()).add(-1)
    for index, unit in enumerate(units):
        for eqn in unit:
            for var in variables(eqn.invars):
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
    return jvp(jaxpr_as_fun(calls), primals, tangents)


def _transpose(cotangents, *args, calls, **_):
    given = [ad.instantiate_zeros(c) for c in cotangents]
    return transpose(jaxpr_as_fun(calls), given, args)


def _drop_unused(used: list[bool], eqn: JaxprEqn) -> tuple[list[bool], Any]:
    """What remains when only some results are read: jaxpr's dead code elimination."""
    if not any(used):
        return [False] * len(eqn.invars), None
    calls, read = without_unused(eqn.params["calls"], used)
    return read, new_equation(
        [v for v, keep in zip(eqn.invars, read, strict=True) if keep],
        [v for v, keep in zip(eqn.outvars, used, strict=True) if keep],
        bolt_sequence_p,
        {**eqn.params, "calls": calls},
        eqn.ctx,
    )


batching.primitive_batchers[bolt_sequence_p] = _batch
register_dce(bolt_sequence_p, _drop_unused)
ad.primitive_jvps[bolt_sequence_p] = _jvp
ad.primitive_transposes[bolt_sequence_p] = _transpose


def lower_calls(ctx: mlir.LoweringRuleContext, *args: Any, **params: Any) -> Any:
    """XLA's own path: the calls, each lowered for itself."""
    fun = jaxpr_as_fun(params["calls"])
    return mlir.lower_fun(fun, multiple_results=True)(ctx, *args)


mlir.register_lowering(bolt_sequence_p, lower_calls)
