# SPDX-License-Identifier: Apache-2.0
"""``bolt_call``: one equation that stands for a region and carries its reference.

Whatever JAX does to the equation other than lowering it for a CUDA device goes
through the reference jaxpr, the user's own equations: a CPU runs it, ``vmap`` batches
it, ``grad`` differentiates it (with the user's custom rules), so an optimized function
means what the original means. Under ``vmap`` and ``grad`` *outside* an optimized
function the region is plain JAX again; ``optimize(grad(f))`` keeps its kernels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from . import ir
from .compat import (
    ClosedJaxpr,
    JaxprEqn,
    Primitive,
    ad,
    batching,
    jaxpr_as_fun,
    mlir,
)
from .views import View


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class SiteInfo:
    """A region in a program: what it computes, where, and from which operands.

    ``operands`` gives, for the left operand, the right one, each side input and each
    vector, its position among the equation's inputs. ``views`` are what the program
    around it makes of its own values for each input, ``result`` of the output; None
    where nothing is done, or where it can be expected to cancel.
    """

    region: ir.Region
    reference: ClosedJaxpr
    operands: tuple[int, ...]
    name: str
    label: str
    line: str
    root: str
    views: tuple[View | None, ...]
    result: View | None

    @property
    def in_avals(self) -> list[Any]:
        return list(self.reference.in_avals)

    @property
    def out_aval(self) -> Any:
        return self.reference.out_avals[0]

    def __repr__(self) -> str:
        return f"{self.name}: {self.label}"


@dataclasses.dataclass(slots=True, eq=False)
class Family:
    """All sites of one traced function, so that they can be tuned together.

    ``unled``: the process that chooses for all did not choose for a site in time.
    """

    sites: list[SiteInfo] = dataclasses.field(default_factory=list)
    unled: bool = False

    def __repr__(self) -> str:
        return f"<{len(self.sites)} sites>"


bolt_call_p = Primitive("bolt_call")


def reference_fun(reference: ClosedJaxpr):
    """The region as a function of its operands, in plain JAX; one result."""
    fun = jaxpr_as_fun(reference)
    return lambda *args: fun(*args)[0]


@bolt_call_p.def_impl
def _impl(*args: Any, reference: ClosedJaxpr, **_: Any) -> Any:
    # Outside jit (disable_jit, say) nothing is compiled, so nothing is tuned either.
    return reference_fun(reference)(*args)


@bolt_call_p.def_abstract_eval
def _abstract_eval(*_avals: Any, reference: ClosedJaxpr, **_: Any) -> Any:
    return reference.out_avals[0]


def is_call(eqn: JaxprEqn, family: Family) -> bool:
    """Whether ``eqn`` is a region of ``family``."""
    return eqn.primitive is bolt_call_p and eqn.params["family"] is family


def _batch(args, dims, *, reference, **_):
    out = jax.vmap(reference_fun(reference), in_axes=tuple(dims))(*args)
    return out, 0


def jvp(fun: Callable, primals: Any, tangents: Any) -> Any:
    """Forward mode through ``fun``; operands with zero tangents stay fixed."""
    moving = [i for i, t in enumerate(tangents) if not isinstance(t, ad.Zero)]
    return jax.jvp(
        _of_some(fun, moving, primals),
        tuple(primals[i] for i in moving),
        tuple(tangents[i] for i in moving),
    )


def transpose(fun: Callable, cotangents: Any, args: Any) -> list[Any]:
    """Reverse mode of a ``fun`` that is linear in its undefined operands."""
    linear = [i for i, a in enumerate(args) if ad.is_undefined_primal(a)]
    avals = [args[i].aval for i in linear]
    transposed = jax.linear_transpose(
        _of_some(fun, linear, args),
        *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals),
    )
    results = dict(zip(linear, transposed(cotangents), strict=True))
    return [results.get(i) for i in range(len(args))]


def _of_some(fun: Callable, positions: Sequence[int], args: Any) -> Callable:
    """``fun`` as a function of the operands at ``positions``; the others are given."""

    def of_some(*values: Any) -> Any:
        operands = list(args)
        for i, value in zip(positions, values, strict=True):
            operands[i] = value
        return fun(*operands)

    return of_some


def _jvp(primals, tangents, *, reference, **_):
    return jvp(reference_fun(reference), primals, tangents)


def _transpose(cotangent, *args, reference, **_):
    if isinstance(cotangent, ad.Zero):
        return [ad.Zero(a.aval) if ad.is_undefined_primal(a) else None for a in args]
    return transpose(reference_fun(reference), cotangent, args)


batching.primitive_batchers[bolt_call_p] = _batch
ad.primitive_jvps[bolt_call_p] = _jvp
ad.primitive_transposes[bolt_call_p] = _transpose


def lower_reference(ctx: mlir.LoweringRuleContext, *args: Any, **params: Any) -> Any:
    """XLA's own path: the reference jaxpr, inlined."""
    fun = reference_fun(params["reference"])
    return mlir.lower_fun(fun, multiple_results=False)(ctx, *args)


mlir.register_lowering(bolt_call_p, lower_reference)
