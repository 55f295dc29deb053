# SPDX-License-Identifier: Apache-2.0
"""Layouts other than the kernels': transposes around calls, and few of them left.

Kernels take NHWC activations and HWIO filters. A conv written otherwise (NCHW and OIHW,
as in models ported from PyTorch) becomes a call with transposes around it. Those
between two calls cancel, and ``without_transposes`` moves the others past what does not
care (pooling, elementwise work, concatenation, means) until they cancel or reach the
edges of the program. Reshapes that undo each other, as ``vmap`` leaves them, go.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from .compat import (
    ClosedJaxpr,
    JaxprEqn,
    Literal,
    Var,
    aval_of,
    call_equation,
    fresh_vars,
    is_drop,
    rebuilt,
    substituted,
    transpose_p,
    transposed,
)
from .views import RESHAPES, Permutation, inverse


def transpose_equation(
    source: Any, result: Var, permutation: Permutation, like: JaxprEqn
) -> JaxprEqn:
    """``result = source.transpose(permutation)``."""
    params = {"permutation": permutation}
    return call_equation([source], [result], transpose_p, params, like)


def without_transposes(program: ClosedJaxpr) -> ClosedJaxpr:
    """``program`` with transposes cancelled and moved towards its results.

    Equations that nothing reads any more are left out only if they are transposes or
    reshapes.
    """
    sinking = _Sinking()
    for eqn in program.jaxpr.eqns:
        sinking.equation(eqn)
    outvars = [sinking.read(v) for v in program.jaxpr.outvars]
    return rebuilt(program, sinking.eqns, outvars=outvars)


@dataclasses.dataclass(frozen=True, slots=True)
class _View:
    """A value that is ``source.transpose(permutation)`` and not computed so far."""

    source: Var
    permutation: Permutation
    like: JaxprEqn


class _Sinking:
    """One pass over a program, in order."""

    def __init__(self) -> None:
        self.eqns: list[JaxprEqn] = []
        self._same: dict[Var, Any] = {}
        self._views: dict[Var, _View] = {}
        self._written: set[Var] = set()
        # Not computed so far, and what each is a reshape of, however often.
        self._reshapes: dict[Var, JaxprEqn] = {}
        self._whole: dict[Var, Var] = {}
        self._broadcasts: dict[Var, JaxprEqn] = {}
        self._make_var = fresh_vars()

    def read(self, atom: Any) -> Any:
        """The atom for a use that needs the value as it was written."""
        atom = substituted(self._same, atom)
        if isinstance(atom, Var) and atom in self._reshapes:
            self._append(self._reshapes.pop(atom))
        view = self.view(atom)
        if view is not None and atom not in self._written:
            self._written.add(atom)
            source = self.read(view.source)
            self.eqns.append(
                transpose_equation(source, atom, view.permutation, view.like)
            )
        return atom

    def equation(self, eqn: JaxprEqn) -> None:
        name = eqn.primitive.name
        if name == "transpose" and not is_drop(eqn.outvars[0]):
            self._transpose(eqn)
            return
        permutation = self._permutation(eqn)
        if permutation is not None:
            rule = _RULES.get(name) or (_elementwise if name in _ELEMENTWISE else None)
            if rule is not None and rule(self, eqn, permutation):
                return
        if not self._reshape(eqn):
            self._append(eqn)

    def _append(self, eqn: JaxprEqn) -> None:
        eqn = eqn.replace(invars=[self.read(v) for v in eqn.invars])
        self.eqns.append(eqn)
        if eqn.primitive.name == "broadcast_in_dim" and len(eqn.invars) == 1:
            self._broadcasts[eqn.outvars[0]] = eqn

    def _reshape(self, eqn: JaxprEqn) -> bool:
        """Whether it is one, which is then computed where it is read, if at all."""
        if not is_reshape(eqn) or is_drop(eqn.outvars[0]):
            return False
        (out,) = eqn.outvars
        source = substituted(self._same, eqn.invars[0])
        whole: Any = self._whole.get(source, source)
        if aval_of(whole) == aval_of(out):
            self._same[out] = whole
        else:
            self._whole[out] = whole
            self._reshapes[out] = eqn
        return True

    def _transpose(self, eqn: JaxprEqn) -> None:
        (atom,), (out,) = eqn.invars, eqn.outvars
        atom = substituted(self._same, atom)
        permutation = tuple(eqn.params["permutation"])
        if isinstance(atom, Literal):
            self.eqns.append(eqn)
            return
        view = self.view(atom)
        if view is not None:
            permutation = tuple(view.permutation[i] for i in permutation)
            atom = view.source
        if is_identity(permutation):
            self._same[out] = atom
        else:
            self._views[out] = _View(atom, permutation, eqn)

    def _permutation(self, eqn: JaxprEqn) -> Permutation | None:
        """That of the views among the operands, where they all have one."""
        if len(eqn.outvars) != 1 or eqn.effects or is_drop(eqn.outvars[0]):
            return None
        found = {v.permutation for a in eqn.invars if (v := self.view(a)) is not None}
        return found.pop() if len(found) == 1 else None

    def view(self, atom: Any) -> _View | None:
        atom = substituted(self._same, atom)
        return self._views.get(atom) if isinstance(atom, Var) else None

    def sink(
        self,
        eqn: JaxprEqn,
        operands: Sequence[Any],
        permutation: Permutation,
        **changes: Any,
    ) -> None:
        """``eqn`` on the views' sources; its result is a view of what that gives."""
        (out,) = eqn.outvars
        made = out
        if not is_identity(permutation):
            made = self._make_var(transposed(out.aval, inverse(permutation)))
            self._views[out] = _View(made, permutation, eqn)
        params = {**eqn.params, **changes}
        operands = [self.read(v) for v in operands]
        self.eqns.append(eqn.replace(invars=operands, outvars=[made], params=params))

    def broadcast(self, atom: Any, permutation: Permutation) -> Var | None:
        """A broadcast value as it would be before the transpose."""
        eqn = self._broadcasts.get(atom)
        if eqn is None:
            return None
        axes = [permutation[a] for a in eqn.params["broadcast_dimensions"]]
        if axes != sorted(axes):
            return None
        aval = transposed(atom.aval, inverse(permutation))
        made = self._make_var(aval)
        params = {
            **eqn.params,
            "shape": tuple(aval.shape),
            "broadcast_dimensions": tuple(axes),
        }
        self.eqns.append(eqn.replace(outvars=[made], params=params))
        return made


# Equations that may go before a transpose of their operands ---------------------------

_Rule: TypeAlias = Callable[[_Sinking, JaxprEqn, Permutation], bool]
_ELEMENTWISE = frozenset(
    "abs add and ceil clamp convert_element_type cos div eq erf exp exp2 expm1 floor "
    "ge gt integer_pow is_finite le log log1p logistic lt max min mul ne neg not or "
    "pow rsqrt select_n sign sin sqrt square sub tanh xor".split()
)


def _elementwise(sinking: _Sinking, eqn: JaxprEqn, permutation: Permutation) -> bool:
    out = aval_of(eqn.outvars[0])
    shape, operands = out.shape, []
    if aval_of(eqn.invars[-1]).dtype.itemsize < out.dtype.itemsize:
        return False  # the transpose would move more
    for atom in eqn.invars:
        view = sinking.view(atom)
        if view is not None:
            operands.append(view.source)
        elif not aval_of(atom).shape:
            operands.append(sinking.read(atom))
        elif aval_of(atom).shape == shape and isinstance(atom, Var):
            made = sinking.broadcast(sinking.read(atom), permutation)
            if made is None:
                return False
            operands.append(made)
        else:
            return False
    sinking.sink(eqn, operands, permutation)
    return True


def _window(sinking: _Sinking, eqn: JaxprEqn, permutation: Permutation) -> bool:
    names = ("window_dimensions", "window_strides", "padding", "base_dilation")
    names = (*names, "window_dilation")
    before = inverse(permutation)
    changes = {n: tuple(eqn.params[n][i] for i in before) for n in names}
    view = sinking.view(eqn.invars[0])
    if len(eqn.invars) != 1 or view is None:
        return False
    sinking.sink(eqn, [view.source], permutation, **changes)
    return True


def _without_axes(name: str) -> _Rule:
    """Of an equation whose parameter ``name`` lists axes that the result lacks."""

    def rule(sinking: _Sinking, eqn: JaxprEqn, permutation: Permutation) -> bool:
        view = sinking.view(eqn.invars[0])
        if len(eqn.invars) != 1 or view is None:
            return False
        axes = tuple(permutation[a] for a in eqn.params[name])
        order = [a for a in permutation if a not in axes]
        kept = tuple(sorted(order).index(a) for a in order)
        sinking.sink(eqn, [view.source], kept, **{name: tuple(sorted(axes))})
        return True

    return rule


def _concatenate(sinking: _Sinking, eqn: JaxprEqn, permutation: Permutation) -> bool:
    views = [sinking.view(atom) for atom in eqn.invars]
    if any(view is None for view in views):
        return False
    sources = [view.source for view in views if view is not None]
    axis = permutation[eqn.params["dimension"]]
    sinking.sink(eqn, sources, permutation, dimension=axis)
    return True


def _pad(sinking: _Sinking, eqn: JaxprEqn, permutation: Permutation) -> bool:
    operand, value = eqn.invars
    view = sinking.view(operand)
    if view is None:
        return False
    config = tuple(eqn.params["padding_config"][i] for i in inverse(permutation))
    operands = [view.source, sinking.read(value)]
    sinking.sink(eqn, operands, permutation, padding_config=config)
    return True


_RULES: dict[str, _Rule] = {
    **dict.fromkeys(("reduce_window_max", "reduce_window_min"), _window),
    "reduce_window_sum": _window,
    **dict.fromkeys(("reduce_sum", "reduce_max", "reduce_min"), _without_axes("axes")),
    "squeeze": _without_axes("dimensions"),
    "concatenate": _concatenate,
    "pad": _pad,
}


def is_reshape(eqn: JaxprEqn) -> bool:
    """Whether its result has the operand's elements in their order."""
    if eqn.primitive.name not in RESHAPES or len(eqn.invars) != 1:
        return False
    if isinstance(eqn.invars[0], Literal) or eqn.params.get("sharding") is not None:
        return False
    if eqn.primitive.name == "reshape" and eqn.params["dimensions"] is not None:
        return False
    return aval_of(eqn.invars[0]).size == aval_of(eqn.outvars[0]).size


def is_identity(permutation: Sequence[int]) -> bool:
    """Whether it leaves everything where it is."""
    return tuple(permutation) == tuple(range(len(permutation)))
