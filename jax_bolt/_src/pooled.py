# SPDX-License-Identifier: Apache-2.0
"""Equations that alone read a conv's result, as the pool of a region: a maximum over
windows, or the mean over an image as ``jnp.mean`` and Flax's ``avg_pool`` write it.

    result -> reduce_window_max
    result (-> float32) -> reduce_sum (-> reshape) -> div by the count (-> its dtype)
    result -> reduce_window_sum -> div by the count
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from . import ir
from .compat import JaxprEqn, Literal, Var, aval_of, is_drop, variables
from .frame import Frame
from .graph import Graph
from .layout import is_reshape
from .views import Permutation, Transposed

# Kernels take the larger of two values at once, in one register.
_MAX_DTYPES = ("bfloat16", "float16")
_LONGEST = 5  # equations of a mean


@dataclasses.dataclass(frozen=True, slots=True)
class Pooling:
    """A pool, and the equations that it is, in order: the last one's result is what is
    stored."""

    pool: ir.Pool
    eqns: tuple[int, ...]


def find(
    graph: Graph, result: Var, frame: Frame, problem: ir.Problem, taken: set[int]
) -> Pooling | None:
    """The pool of ``result``, which lies in ``frame`` and is that of ``problem``.

    None for anything else, where something besides reads what is not stored, and for
    windows that kernels do not take. Equations of ``taken`` belong to other regions.
    """
    if not isinstance(problem, ir.ConvProblem) or frame.repeats > 1:
        return None
    order = _order(frame, problem)
    if order is None:
        return None
    chain = _chain(graph, result, taken)
    eqns = [graph.eqns[index] for index in chain]
    if eqns and eqns[0].primitive.name == "reduce_window_max":
        pool = _maximum(eqns[0], aval_of(result), problem) if not frame.moves else None
        return None if pool is None else Pooling(pool, (chain[0],))
    count = _mean(eqns, aval_of(result), order)
    if count is None:
        return None
    pool = ir.Pool(window=(problem.p, problem.q), operation="mean")
    return Pooling(pool, tuple(chain[:count]))


def _order(frame: Frame, problem: ir.ConvProblem) -> Permutation | None:
    """The value's axes of images, rows, columns and channels; None if it has others."""
    view = frame.view
    order = view.order if isinstance(view, Transposed) else tuple(range(4))
    if len(frame.shape) != 4 or not (view is None or isinstance(view, Transposed)):
        return None
    p = problem
    found = tuple(frame.shape[axis] for axis in order)
    return order if found == (p.n, p.p, p.q, p.k) else None


def _chain(graph: Graph, result: Var, taken: set[int]) -> list[int]:
    """Equations of which each alone reads the result of the one before."""
    found: list[int] = []
    while len(found) < _LONGEST:
        readers = graph.users.get(result, set())
        if result in graph.escapes or len(readers) != 1:
            break
        (index,) = readers
        eqn = graph.eqns[index]
        if index in taken or eqn.effects or len(eqn.outvars) != 1:
            break
        if is_drop(eqn.outvars[0]) or variables(eqn.invars) != [result]:
            break
        found.append(index)
        (result,) = eqn.outvars
    return found


def _maximum(eqn: JaxprEqn, of: Any, p: ir.ConvProblem) -> ir.Pool | None:
    """``eqn``'s pool of a result in NHWC."""
    if str(of.dtype) not in _MAX_DTYPES:
        return None
    window, strides = (
        _of_images(eqn.params[name]) for name in ("window_dimensions", "window_strides")
    )
    dilations = {*eqn.params["base_dilation"], *eqn.params["window_dilation"]}
    outside, *padding, last = eqn.params["padding"]
    if window is None or strides is None or dilations != {1}:
        return None
    if (tuple(outside), tuple(last)) != ((0, 0), (0, 0)):
        return None
    (top, bottom), (left, right) = padding
    try:
        pool = ir.Pool(
            window=window, stride=strides, padding=(top, bottom, left, right)
        )
    except ValueError:
        return None
    sizes = (p.n, *pool.sizes(p.p, p.q), p.k)
    fits = window[0] * window[1] <= ir.MAX_WINDOW
    same = sizes == tuple(aval_of(eqn.outvars[0]).shape)
    return pool if fits and same and 0 not in sizes else None


def _of_images(sizes: Sequence[int]) -> tuple[int, int] | None:
    """Those of rows and columns, where the others are 1."""
    outside, rows, cols, last = sizes
    return (rows, cols) if outside == last == 1 else None


def _mean(eqns: Sequence[JaxprEqn], of: Any, order: Permutation) -> int | None:
    """How many of ``eqns`` are the mean over rows and columns, in the value's dtype.

    The value has the axes ``order``, and images come before channels in what is left.
    """
    images, down, right, channels = order
    count = of.shape[down] * of.shape[right]
    if images > channels or not count:
        return None
    # Read from the last one on.
    left = [*reversed(eqns)]

    def take(*names: str) -> JaxprEqn | None:
        return left.pop() if left and left[-1].primitive.name in names else None

    def dtype(eqn: JaxprEqn) -> Any:
        return aval_of(eqn.outvars[0]).dtype

    widened = take("convert_element_type")
    if widened is not None and dtype(widened) != np.float32:
        return None
    total = take("reduce_sum", "reduce_window_sum")
    if total is None:
        return None
    if total.primitive.name == "reduce_sum":
        axes = {int(axis) for axis in total.params["axes"]}
        # Of a narrower type it would be rounded at every step.
        if axes != {down, right} or dtype(total) != np.float32:
            return None
    elif not _is_whole(total, of.shape, (down, right)):
        return None
    while left and is_reshape(left[-1]):
        left.pop()
    quotient = take("div")
    if quotient is None or not _divides_by(quotient, count):
        return None
    if dtype(quotient) != of.dtype:
        back = take("convert_element_type")
        if back is None or dtype(back) != of.dtype:
            return None
    return len(eqns) - len(left)


def _is_whole(eqn: JaxprEqn, shape: Sequence[int], axes: Sequence[int]) -> bool:
    """Whether a sum over windows has one window, of all along ``axes``."""
    sizes = tuple(size if i in axes else 1 for i, size in enumerate(shape))
    left = tuple(1 if i in axes else size for i, size in enumerate(shape))
    params = eqn.params
    dilations = {*params["base_dilation"], *params["window_dilation"]}
    padding = {n for pads in params["padding"] for n in pads}
    whole = tuple(params["window_dimensions"]) == sizes
    made = tuple(aval_of(eqn.outvars[0]).shape)
    return whole and made == left and dilations == {1} and padding == {0}


def _divides_by(eqn: JaxprEqn, count: int) -> bool:
    _, divisor = eqn.invars
    return (
        isinstance(divisor, Literal)
        and np.ndim(divisor.val) == 0
        and float(divisor.val) == count
    )
