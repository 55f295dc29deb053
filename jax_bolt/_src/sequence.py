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
    Jaxpr,
    JaxprEqn,
    Literal,
    Primitive,
    Var,
    ad,
    aval_of,
    batching,
    jaxpr_as_fun,
    mlir,
    new_equation,
    part_of_jaxpr,
    rebuilt,
    register_dce,
    without_unused,
)
from .options import Options
from .primitive import Family, bolt_call_p

NAME = "sequence"  # in the option ``disable``
# Of results that wait for a sequence, where the program as written has each when it is
# read: weights that are dequantised layer by layer, say.
MAX_EARLY_BYTES = 64 << 20

bolt_sequence_p = Primitive("bolt_sequence")
bolt_sequence_p.multiple_results = True


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
    for eqn in _live(jaxpr, family):
        read = _variables(eqn)
        ours = _is_call(eqn, family)
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
        read = dict.fromkeys(v for eqn in unit for v in _variables(eqn))
        operands = [v for v in read if v not in made]
        outputs = [v for v in made if readers.get(v, set()) - {index}]
        calls = part_of_jaxpr(jaxpr, unit, operands, outputs)
        params = {"calls": calls, "family": family, "options": options}
        eqns.append(
            new_equation(operands, outputs, bolt_sequence_p, params, unit[0].ctx)
        )
    return rebuilt(program, eqns)


def _is_call(eqn: JaxprEqn, family: Family) -> bool:
    return eqn.primitive is bolt_call_p and eqn.params["family"] is family


def _live(jaxpr: Jaxpr, family: Family) -> list[JaxprEqn]:
    """The equations but for calls whose results nobody needs."""
    needed = {v for v in jaxpr.outvars if not isinstance(v, Literal)}
    kept: list[JaxprEqn] = []
    for eqn in reversed(jaxpr.eqns):
        if not _is_call(eqn, family) or needed.intersection(eqn.outvars):
            kept.append(eqn)
            needed.update(_variables(eqn))
    return kept[::-1]


def _bytes(var: Var) -> float:
    """Unbounded where the shape is symbolic: such sizes cannot be compared."""
    aval = aval_of(var)
    if not all(isinstance(d, int) for d in aval.shape):
        return math.inf
    return math.prod(aval.shape) * aval.dtype.itemsize


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
