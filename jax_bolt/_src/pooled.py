# SPDX-License-Identifier: Apache-2.0
"""An equation that takes maxima of a conv's result, as the pool of a region."""

from __future__ import annotations

from collections.abc import Sequence

from . import ir
from .compat import JaxprEqn, Var, aval_of, is_drop, variables

# Kernels pool two values at once, in one register.
_DTYPES = ("bfloat16", "float16")


def read(eqn: JaxprEqn, result: Var, problem: ir.Problem) -> ir.Pool | None:
    """``eqn``'s pool of ``result``, that of ``problem`` in NHWC.

    None for anything else, and for windows that kernels do not take.
    """
    if eqn.primitive.name != "reduce_window_max" or is_drop(eqn.outvars[0]):
        return None
    if variables(eqn.invars) != [result] or not isinstance(problem, ir.ConvProblem):
        return None
    of, p = aval_of(result), problem
    if tuple(of.shape) != (p.n, p.p, p.q, p.k) or str(of.dtype) not in _DTYPES:
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
