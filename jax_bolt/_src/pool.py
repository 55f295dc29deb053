# SPDX-License-Identifier: Apache-2.0
"""``bolt_pool``: a maximum over windows of two axes, for a GPU maybe in two passes.

``gather`` puts one in the place of each ``reduce_window_max`` and ``reduce_window_min``
of which two passes load no more than one. Its reference is the user's equation: except
on a CUDA device it is that equation, and so are its derivatives and ``vmap`` of it. As
a maximum may be taken in any order, and what is padded with is its identity, two passes
give the same values, of NaN too.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from . import ir
from .compat import (
    ClosedJaxpr,
    JaxprEqn,
    Primitive,
    ad,
    aval_of,
    batching,
    call_equation,
    is_drop,
    mlir,
    part_of_jaxpr,
    rebuilt,
    source_line,
    variables,
)
from .match import site_name
from .primitive import jvp, lower_reference, reference_fun
from .window import Window

NAME = "pool"  # in the option ``disable``

_OPERATIONS = {lax.reduce_window_max_p: "max", lax.reduce_window_min_p: "min"}
# Parameters with one entry for each axis, and the entry that leaves an axis alone.
_PER_AXIS: dict[str, Any] = {
    "window_dimensions": 1,
    "window_strides": 1,
    "padding": (0, 0),
    "base_dilation": 1,
    "window_dilation": 1,
}

bolt_pool_p = Primitive("bolt_pool")
bolt_pool_p.multiple_results = True


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class PoolInfo:
    """A maximum over windows in a program; ``name`` and ``line`` as of a site."""

    window: Window
    name: str
    line: str

    def __repr__(self) -> str:
        return f"{self.name}: {self.window.label}"


def gather(program: ClosedJaxpr) -> tuple[ClosedJaxpr, list[PoolInfo]]:
    """``program`` with a ``bolt_pool`` for each pool, and all those that it has then.

    Bodies are left alone.
    """
    eqns = [_pool(program, eqn) for eqn in program.jaxpr.eqns]
    pools = [e.params["pool"] for e in eqns if e.primitive is bolt_pool_p]
    return (rebuilt(program, eqns) if pools else program), pools


def _pool(program: ClosedJaxpr, eqn: JaxprEqn) -> JaxprEqn:
    """``eqn``, or what takes its place."""
    window = _window(eqn)
    if window is None or window.order is None:
        return eqn
    (operand,), outvars = variables(eqn.invars), list(eqn.outvars)
    params = {
        "reference": part_of_jaxpr(program.jaxpr, [eqn], [operand], outvars),
        "pool": PoolInfo(window, site_name(eqn), source_line(eqn)),
    }
    return call_equation([operand], outvars, bolt_pool_p, params, eqn)


def _window(eqn: JaxprEqn) -> Window | None:
    """None where an equation is no such maximum, or its sizes are not known."""
    operation = _OPERATIONS.get(eqn.primitive)
    if operation is None or is_drop(eqn.outvars[0]) or len(variables(eqn.invars)) != 1:
        return None
    operand, result = aval_of(eqn.invars[0]), aval_of(eqn.outvars[0])
    params = [eqn.params[name] for name in _PER_AXIS]
    changed = [
        entry != tuple(_PER_AXIS.values()) for entry in zip(*params, strict=True)
    ]
    sizes = (*operand.shape, *result.shape)
    if sum(changed) != 2 or not all(isinstance(size, int) for size in sizes):
        return None
    return Window(
        operation=operation,
        dtype=str(operand.dtype),
        item_bytes=operand.dtype.itemsize,
        shape=tuple(operand.shape),
        out_shape=tuple(result.shape),
        window=tuple(eqn.params["window_dimensions"]),
        strides=tuple(eqn.params["window_strides"]),
    )


def in_two_passes(reference: ClosedJaxpr, pool: PoolInfo, operand: Any) -> list[Any]:
    """The reference's result from a pass over each of its axes, in the pool's order."""
    (eqn,) = reference.jaxpr.eqns
    for axis in pool.window.order or ():
        params = dict(eqn.params)
        for name, neutral in _PER_AXIS.items():
            entries = enumerate(eqn.params[name])
            params[name] = tuple(e if i == axis else neutral for i, e in entries)
        operand = eqn.primitive.bind(operand, **params)
    return [operand]


def apply(pool: ir.Pool, x: jax.Array) -> jax.Array:
    """``pool`` of what a kernel left in NHWC, as a program that has it would run."""
    if pool.is_mean:
        return jnp.mean(x, axis=(1, 2))

    def written(x: jax.Array) -> jax.Array:
        top, bottom, left, right = pool.padding
        return lax.reduce_window(
            x,
            np.array(-np.inf, x.dtype),
            lax.max,
            (1, *pool.window, 1),
            (1, *pool.stride, 1),
            ((0, 0), (top, bottom), (left, right), (0, 0)),
        )

    program, _ = gather(jax.make_jaxpr(written)(x))
    (made,) = reference_fun(program)(x)
    return made


@bolt_pool_p.def_impl
def _impl(operand: Any, *, reference: ClosedJaxpr, **_: Any) -> list[Any]:
    return reference_fun(reference)(operand)


@bolt_pool_p.def_abstract_eval
def _abstract_eval(_aval: Any, *, reference: ClosedJaxpr, **_: Any) -> list[Any]:
    return list(reference.out_avals)


def _batch(args, dims, *, reference, **_):
    results = jax.vmap(reference_fun(reference), in_axes=tuple(dims))(*args)
    return results, [0] * len(results)


def _jvp(primals, tangents, *, reference, **_):
    return jvp(reference_fun(reference), primals, tangents)


# A maximum is not linear, so there is nothing to transpose.
batching.primitive_batchers[bolt_pool_p] = _batch
ad.primitive_jvps[bolt_pool_p] = _jvp
mlir.register_lowering(bolt_pool_p, lower_reference)
