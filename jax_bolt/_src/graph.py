# SPDX-License-Identifier: Apache-2.0
"""The equations of a jaxpr as a graph: what reads what, and what has to come first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import elementwise
from .compat import Jaxpr, Var, aval_of, operation_name, variables


class Graph:
    """Who produces and who uses each variable; one pass.

    The equations of a region happen at once, and effects happen in order.
    """

    def __init__(self, jaxpr: Jaxpr):
        self.eqns = jaxpr.eqns
        self.producer: dict[Var, int] = {}
        self.users: dict[Var, set[int]] = {}
        self.escapes: set[Var] = {v for v in jaxpr.outvars if isinstance(v, Var)}
        # What the region reads that an equation is in; the effect before an effect.
        self._together: dict[int, Sequence[Any]] = {}
        self._before: dict[int, int] = {}
        last: int | None = None
        for i, eqn in enumerate(jaxpr.eqns):
            for atom in eqn.invars:
                if isinstance(atom, Var):
                    self.users.setdefault(atom, set()).add(i)
            for var in eqn.outvars:
                self.producer[var] = i
            if eqn.effects:
                if last is not None:
                    self._before[i] = last
                last = i

    def used_only_in(self, var: Var, inside: set[int]) -> bool:
        """Whether no equation but these, and no result of the program, reads it."""
        return var not in self.escapes and self.users.get(var, set()) <= inside

    def put_together(self, eqns: Sequence[int], inputs: Sequence[Any]) -> None:
        """From here on ``eqns`` are a region, which reads ``inputs``."""
        self._together.update(dict.fromkeys(eqns, inputs))

    def waits_for_itself(self, eqns: Sequence[int]) -> bool:
        """Whether what a region reads would take some of its results.

        ``eqns`` are in order, the first one the root.
        """
        inside, seen = set(eqns), set(eqns)
        read = [v for i in eqns for v in self.eqns[i].invars]
        pending = self._producers(read) - inside
        while pending:
            index = pending.pop()
            seen.add(index)
            if index < eqns[0]:
                continue  # nor does anything that it takes come after the root
            needed = self._producers(self._together.get(index, self.eqns[index].invars))
            if index in self._before:
                needed.add(self._before[index])
            if needed & inside:
                return True
            pending |= needed - seen
        return False

    def prologue(self, operand: Any) -> str:
        """The names of elementwise equations, if any, that lead to a root's operand.

        In order; those of regions are none.
        """
        names: list[str] = []
        while isinstance(operand, Var) and operand in self.producer:
            index = self.producer[operand]
            eqn = self.eqns[index]
            if index in self._together:
                break
            shape_only = eqn.primitive.name in elementwise.SHAPE_ONLY
            size = aval_of(eqn.outvars[0]).size
            full = [v for v in eqn.invars if aval_of(v).size == size]
            if not full or not elementwise.supported(eqn):
                break
            if not shape_only:
                names.append(operation_name(eqn))
            operand = full[0]
        return ", ".join(reversed(names))

    def _producers(self, atoms: Sequence[Any]) -> set[int]:
        return {self.producer[v] for v in variables(atoms) if v in self.producer}
