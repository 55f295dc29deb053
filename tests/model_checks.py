# SPDX-License-Identifier: Apache-2.0
"""What every model is held to: results, regions, and nothing left beside them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from jax_bolt._src import elementwise, options, program
from jax_bolt._src.compat import Jaxpr, JaxprEqn, Var, aval_of, is_drop
from jax_bolt._src.match import is_view
from jax_bolt._src.primitive import SiteInfo, reference_fun
from jax_bolt._src.rewrite import Rewritten
from jax_bolt._src.tune import measure

# Why an equation stands outside a region that it could be in.
READ_TWICE = "a value of the region is read in two places"
TRANSPOSED = "the result is transposed in between"
SPREAD = "an input is neither per channel nor as large as the result"


def rewritten(fun: Any, *args: Any) -> Rewritten:
    """The rewritten program, its calls one by one."""
    alone = options.Options(disable=("sequence",))
    return program.trace(fun, (), args, {}, alone)[0]


def check_close(got: Any, want: Any, bound: float) -> None:
    """In the 2-norm."""
    got, want = (np.asarray(v, np.float64) for v in (got, want))
    assert got.shape == want.shape
    assert np.isfinite(want).all() and np.linalg.norm(want) > 0
    assert np.linalg.norm(got - want) <= bound * np.linalg.norm(want)


def check_region(site: SiteInfo, bound: float = 1e-5) -> None:
    """What a kernel is made from is worth what the user's equations are."""
    operands = measure.make_operands(site, l2_bytes=1).sets[0]

    @jax.jit
    def both(*operands: Any) -> tuple[Any, Any]:
        made = measure.truth(site, operands)
        return made, reference_fun(site.reference)(*operands)

    for made, want in zip(*both(*operands), strict=True):
        check_close(made.reshape(want.shape), want, bound)


@dataclasses.dataclass(frozen=True, slots=True)
class Leftover:
    """An elementwise equation outside a region whose inputs would all be there.

    ``reason`` is "" where nothing is in the way.
    """

    primitive: str
    shape: tuple[int, ...]
    reason: str


def leftovers(done: Rewritten) -> list[Leftover]:
    """Elementwise equations on a region's result, vectors and tensors there by then.

    The result may have been reshaped or transposed, and other such equations may stand
    between. Bodies are not entered.
    """
    return list(_Search(done.program.jaxpr).leftovers())


class _Search:
    def __init__(self, jaxpr: Jaxpr):
        self.jaxpr = jaxpr
        self.producer = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
        self.readers: dict[Var, list[JaxprEqn]] = {}
        for eqn in jaxpr.eqns:
            for atom in eqn.invars:
                if isinstance(atom, Var):
                    self.readers.setdefault(atom, []).append(eqn)

    def leftovers(self) -> Iterator[Leftover]:
        for call in self.jaxpr.eqns:
            # What follows a pool could not be ahead of it.
            is_call = call.primitive.name == "bolt_call"
            if is_call and call.params["site"].region.pool is None:
                for result in call.outvars:
                    yield from self._after(result, call.params["site"])

    def _after(self, result: Var, site: SiteInfo) -> Iterator[Leftover]:
        """Those that ``result`` reaches through nothing but such equations."""
        reached = {result: frozenset[int]()}  # value -> equations on the way, by id
        depends = {result}  # on the result, in whatever way
        for eqn in self.jaxpr.eqns:
            read = {v for v in eqn.invars if isinstance(v, Var)}
            if depends.isdisjoint(read):
                continue
            depends.update(eqn.outvars)
            ours = read & depends
            if not ours <= reached.keys() or is_drop(eqn.outvars[0]):
                continue
            way = frozenset({id(eqn)}).union(*(reached[v] for v in ours))
            if is_view(eqn):
                sizes = [aval_of(v).size for v in (eqn.invars[0], eqn.outvars[0])]
                if sizes[0] == sizes[1]:
                    reached[eqn.outvars[0]] = way
            elif elementwise.supported(eqn) and self._is_candidate(eqn, ours):
                reached[eqn.outvars[0]] = way
                shape = tuple(aval_of(eqn.outvars[0]).shape)
                reason = self._reason(result, site, eqn, way)
                yield Leftover(eqn.primitive.name, shape, reason)

    def _is_candidate(self, eqn: JaxprEqn, ours: set[Var]) -> bool:
        """Whether it gives floats of the shape of what it reads of the region."""
        out = aval_of(eqn.outvars[0])
        return out.dtype != bool and all(aval_of(v).shape == out.shape for v in ours)

    def _reason(
        self, result: Var, site: SiteInfo, eqn: JaxprEqn, way: frozenset[int]
    ) -> str:
        on_way = [e for e in self.jaxpr.eqns if id(e) in way]
        values = [result, *(e.outvars[0] for e in on_way if e is not eqn)]
        for value in values:
            inside = all(id(e) in way for e in self.readers.get(value, ()))
            if not inside or value in self.jaxpr.outvars:
                return READ_TWICE
        names = [e.primitive.name for e in on_way]
        if "transpose" in names:
            return TRANSPOSED
        sizes = {aval_of(v).size for e in on_way for v in e.invars}
        fits = {1, site.region.problem.channels, aval_of(eqn.outvars[0]).size}
        return "" if sizes <= fits else SPREAD
