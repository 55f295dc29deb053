# SPDX-License-Identifier: Apache-2.0
"""Parameters that are *held*: no kernel that may still run can be writing them.

By programmatic dependent launch a kernel starts while the one ahead of it still runs,
and waits before it reads what that one may have written. What ``freeze`` keeps was
finished before the program began, so that filters and per-channel values are read
without waiting: shared memory fills with filters while the kernel ahead ends.

Only what a program passes to a call as it came in is held. A copy that XLA makes (of an
array in another layout, or on another device), or another argument, which a kernel of
the program before may still be writing, is not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any, TypeVar

from . import forms
from .compat import ClosedJaxpr, JaxprEqn, rebuilt
from .forms import ChainForm, Form
from .invoke import AnyExecutable
from .primitive import SiteInfo, bolt_call_p
from .sequence import bolt_sequence_p

K = TypeVar("K", bound=AnyExecutable)


def marked(program: ClosedJaxpr, count: int) -> ClosedJaxpr:
    """``program``, its calls told which of their inputs are its first ``count`` ones.

    Calls in bodies are not: a loop may carry copies.
    """
    return _marked(program, program.jaxpr.invars[:count])


def _marked(program: ClosedJaxpr, held: Collection[Any]) -> ClosedJaxpr:
    # By identity: a literal has no hash.
    known = {id(v) for v in held}
    return rebuilt(program, [_equation(eqn, known) for eqn in program.jaxpr.eqns])


def _equation(eqn: JaxprEqn, known: Collection[int]) -> JaxprEqn:
    places = [i for i, v in enumerate(eqn.invars) if id(v) in known]
    if eqn.primitive is bolt_call_p:
        return eqn.replace(params={**eqn.params, "held": frozenset(places)})
    if eqn.primitive is bolt_sequence_p:
        calls = eqn.params["calls"]
        inside = _marked(calls, [calls.jaxpr.invars[i] for i in places])
        return eqn.replace(params={**eqn.params, "calls": inside})
    return eqn


def early(kernel: K, calls: Sequence[dict[str, Any]]) -> K:
    """``kernel``, launched so that it does not wait for parameters that are held.

    ``calls`` are the parameters of the equations that it runs.
    """
    if not all(call["held"] for call in calls):
        return kernel
    form = kernel.form
    each = form.forms if isinstance(form, ChainForm) else (form,)
    pairs = zip(calls, each, strict=True)
    if not all(_holds(call["site"], form, call["held"]) for call, form in pairs):
        return kernel
    return dataclasses.replace(kernel, recipe=kernel.held_recipe or kernel.recipe)


def _holds(site: SiteInfo, form: Form, held: Collection[int]) -> bool:
    """Whether the right operand, as ``form`` reads it, and all vectors are held."""
    _, right, *others = site.operands
    vectors = others[len(site.region.epilogue.sides) :]
    given = site.in_avals[right]
    if site.ready == forms.whole(form.name):
        right = len(site.in_avals) - 1
    elif not forms.only_views(
        form.name, site.region.problem, given.shape, given.dtype, right=True
    ):
        return False
    return all(i in held for i in (right, *vectors))
