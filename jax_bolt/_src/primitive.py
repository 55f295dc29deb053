# SPDX-License-Identifier: Apache-2.0
"""``bolt_call``: one equation that stands for a region and carries its reference.

Its results are the region's: the result, then the auxiliary outputs.

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
    register_dce,
    without_unused,
)
from .views import View


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class SiteInfo:
    """A region in a program: what it computes, where, and from which operands.

    ``operands`` gives, for the left operand, the right one, each side input and each
    vector, its position among the equation's inputs. ``views`` are what the program
    around it makes of its own values for each input, ``result`` of the outputs; None
    where nothing is done, or where it can be expected to cancel. ``prologue`` names
    elementwise work on the left operand that is done ahead of the region. ``ready`` is
    the form that the last of the equation's inputs is the right operand of, where there
    is such an input, which the reference does not read.
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
    prologue: str = ""
    ready: str | None = None

    @property
    def in_avals(self) -> list[Any]:
        return list(self.reference.in_avals)

    @property
    def out_avals(self) -> list[Any]:
        """Of the result and of the auxiliary outputs."""
        return list(self.reference.out_avals)

    @property
    def results(self) -> tuple[View | None, ...]:
        """``result``, for every output."""
        return (self.result,) * len(self.out_avals)

    def __repr__(self) -> str:
        return f"{self.name}: {self.label}"


@dataclasses.dataclass(slots=True, eq=False)
class Family:
    """All sites of one traced function, so that they can be tuned together.

    ``unled``: the process that chooses for all did not choose for a site in time.
    """

    sites: list[SiteInfo] = dataclasses.field(default_factory=list)
    unled: bool = False

    def add(self, site: SiteInfo) -> None:
        """Adds what became of a site, where there is nothing like it yet."""
        if all(site.region != known.region for known in self.sites):
            self.sites.append(site)

    def __repr__(self) -> str:
        return f"<{len(self.sites)} sites>"


bolt_call_p = Primitive("bolt_call")
bolt_call_p.multiple_results = True


def reference_fun(reference: ClosedJaxpr) -> Callable[..., list[Any]]:
    """The region as a function of its operands, in plain JAX; all its results."""
    return jaxpr_as_fun(reference)


@bolt_call_p.def_impl
def _impl(*args: Any, reference: ClosedJaxpr, **_: Any) -> list[Any]:
    # Outside jit (disable_jit, say) nothing is compiled, so nothing is tuned either.
    return reference_fun(reference)(*args)


@bolt_call_p.def_abstract_eval
def _abstract_eval(*_avals: Any, reference: ClosedJaxpr, **_: Any) -> list[Any]:
    return list(reference.out_avals)


def is_call(eqn: JaxprEqn, family: Family) -> bool:
    """Whether ``eqn`` is a region of ``family``."""
    return eqn.primitive is bolt_call_p and eqn.params["family"] is family


def _batch(args, dims, *, reference, **_):
    results = jax.vmap(reference_fun(reference), in_axes=tuple(dims))(*args)
    return results, [0] * len(results)


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


def _transpose(cotangents, *args, reference, **_):
    if all(isinstance(c, ad.Zero) for c in cotangents):
        return [ad.Zero(a.aval) if ad.is_undefined_primal(a) else None for a in args]
    given = [ad.instantiate_zeros(c) for c in cotangents]
    return transpose(reference_fun(reference), given, args)


def _drop_unused(used: list[bool], eqn: JaxprEqn) -> tuple[list[bool], Any]:
    """What remains when only some results are read: jaxpr's dead code elimination."""
    if all(used):
        return [True] * len(eqn.invars), eqn
    if not any(used):
        return [False] * len(eqn.invars), None
    site = _storing(eqn.params["site"], used)
    eqn.params["family"].add(site)
    params = {**eqn.params, "site": site, "reference": site.reference}
    kept = [v for v, keep in zip(eqn.outvars, used, strict=True) if keep]
    return [True] * len(eqn.invars), eqn.replace(outvars=kept, params=params)


def _storing(site: SiteInfo, used: Sequence[bool]) -> SiteInfo:
    """The site with those of its outputs only that are used."""
    epilogue = site.region.epilogue
    outputs = [o for o, keep in zip(epilogue.outputs, used, strict=True) if keep]
    first, *auxiliary = outputs
    stored = dataclasses.replace(
        epilogue,
        result=first.value,
        out_dtype=first.dtype,
        auxiliary=tuple(auxiliary),
    )
    # All operands stay: which of them a kernel takes is in the region.
    reference, _ = without_unused(site.reference, used, keep_inputs=True)
    region = dataclasses.replace(site.region, epilogue=stored)
    label = site.label.removesuffix("+aux")
    return dataclasses.replace(site, region=region, reference=reference, label=label)


batching.primitive_batchers[bolt_call_p] = _batch
register_dce(bolt_call_p, _drop_unused)
ad.primitive_jvps[bolt_call_p] = _jvp
ad.primitive_transposes[bolt_call_p] = _transpose


def lower_reference(ctx: mlir.LoweringRuleContext, *args: Any, **params: Any) -> Any:
    """XLA's own path: the reference jaxpr, inlined."""
    fun = reference_fun(params["reference"])
    return mlir.lower_fun(fun, multiple_results=True)(ctx, *args)


mlir.register_lowering(bolt_call_p, lower_reference)
