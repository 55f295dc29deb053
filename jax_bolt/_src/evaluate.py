# SPDX-License-Identifier: Apache-2.0
"""A region evaluated from its IR alone, in float32 or float64: the yardstick.

Kernels are verified against this in tuning and in tests. It shares no code with the
matcher's reference jaxpr nor with the printed C++, so that a mistake in either shows.
What XLA does after a kernel for a part of a region (``part``) is evaluated here, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from . import ir
from .part import Part

_RENAMED: dict[str, Callable] = {
    "neg": jnp.negative,
    "mul": jnp.multiply,
    "sub": jnp.subtract,
    "div": jnp.divide,
    "rem": lax.rem,
    "max": jnp.maximum,
    "min": jnp.minimum,
    "pow": jnp.power,
    "atan2": jnp.arctan2,
    "asin": jnp.arcsin,
    "acos": jnp.arccos,
    "atan": jnp.arctan,
    "asinh": jnp.arcsinh,
    "acosh": jnp.arccosh,
    "atanh": jnp.arctanh,
    "rsqrt": lax.rsqrt,
    "logistic": lax.logistic,
    "erf": lax.erf,
    "erfc": lax.erfc,
    "erf_inv": lax.erf_inv,
    "round_even": lambda x: lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN),
    "round_away": lambda x: lax.round(x, lax.RoundingMethod.AWAY_FROM_ZERO),
    "clamp": lambda lo, x, hi: jnp.minimum(jnp.maximum(x, lo), hi),
    "eq": jnp.equal,
    "ne": jnp.not_equal,
    "lt": jnp.less,
    "le": jnp.less_equal,
    "gt": jnp.greater,
    "ge": jnp.greater_equal,
    "and": jnp.logical_and,
    "or": jnp.logical_or,
    "xor": jnp.logical_xor,
    "not": jnp.logical_not,
    "is_finite": jnp.isfinite,
    "select": lambda which, off, on: jnp.where(which, on, off),
    "to_float": lambda x: x,
}


def evaluate(
    region: ir.Region,
    a: jax.Array,
    b: jax.Array,
    sides: Sequence[jax.Array],
    vectors: Sequence[jax.Array],
    dtype: Any = jnp.float32,
) -> jax.Array:
    """The region's result, the first of its ``outputs``."""
    result, *_ = outputs(region, a, b, sides, vectors, dtype)
    return result


def outputs(
    region: ir.Region,
    a: jax.Array,
    b: jax.Array,
    sides: Sequence[jax.Array],
    vectors: Sequence[jax.Array],
    dtype: Any = jnp.float32,
) -> tuple[jax.Array, ...]:
    """The region's outputs, unrounded: the result and the auxiliary ones.

    Args:
      region: whose problem says how ``a`` and ``b`` are stored (a gemm's matrices, a
        conv's N H W C input and its filter).
      sides: each of as many elements as the result.
      vectors: each of N (K) elements or one.
      dtype: what to compute in; float64 needs JAX's x64 mode.

    Returns:
      each ``[rows, channels]`` of ``dtype``.
    """
    highest = lax.Precision.HIGHEST
    acc = _product(region.problem, a.astype(dtype), b.astype(dtype), highest)
    return _from(acc, region, sides, vectors)


def as_programs_do(
    region: ir.Region,
    a: jax.Array,
    b: jax.Array,
    sides: Sequence[jax.Array],
    vectors: Sequence[jax.Array],
) -> tuple[jax.Array, ...]:
    """The region's outputs as plain JAX has them: the root in the operands' dtype, what
    follows in float32, unrounded.

    Arguments and results are those of ``outputs``.
    """
    acc = _product(region.problem, a, b, None).astype(jnp.float32)
    return _from(acc, region, sides, vectors)


def _from(
    acc: jax.Array,
    region: ir.Region,
    sides: Sequence[jax.Array],
    vectors: Sequence[jax.Array],
) -> tuple[jax.Array, ...]:
    """The outputs, from the root's result, and in its dtype."""
    values: dict[int, Any] = {}
    _values(values, enumerate(region.epilogue.ops), acc, sides, vectors)
    results = [
        jnp.broadcast_to(values[output.value], acc.shape).astype(acc.dtype)
        for output in region.epilogue.outputs
    ]
    if region.pool is not None:
        results = [pooled(region, result) for result in results]
    return tuple(results)


def pooled(region: ir.Region, result: jax.Array) -> jax.Array:
    """``[rows, channels]`` of a conv's result, as the region's pool leaves it."""
    pool, p = region.pool, region.problem
    assert pool is not None and isinstance(p, ir.ConvProblem)
    images = result.reshape(p.n, p.p, p.q, p.k)
    if pool.is_mean:
        return images.sum((1, 2)) / (p.p * p.q)
    top, bottom, left, right = pool.padding
    found = lax.reduce_window(
        images,
        jnp.asarray(-jnp.inf, result.dtype),
        lax.max,
        (1, *pool.window, 1),
        (1, *pool.stride, 1),
        ((0, 0), (top, bottom), (left, right), (0, 0)),
    )
    return found.reshape(region.stored_rows, p.k)


def rest(
    part: Part,
    stored: jax.Array,
    sides: Sequence[jax.Array],
    vectors: Sequence[jax.Array],
) -> jax.Array:
    """The whole's result, unrounded float32, from what the part stored.

    Args:
      stored: ``[rows, channels]``.
      sides, vectors: as of ``outputs``, those of the whole.
    """
    values: dict[int, Any] = {part.stored.value: stored.astype(jnp.float32)}
    _values(values, part.rest, values[part.stored.value], sides, vectors)
    return jnp.broadcast_to(values[part.whole.result], stored.shape)


def _values(
    values: dict[int, Any],
    ops: Iterable[tuple[int, ir.Op]],
    acc: jax.Array,
    sides: Sequence[jax.Array],
    vectors: Sequence[jax.Array],
) -> None:
    """Adds those of ``ops``, by position, in the shape and dtype of ``acc``."""
    dtype = acc.dtype
    for position, op in ops:
        if op.name == "acc":
            value = acc
        elif op.name == "side":
            value = _wide(sides[int(op.attr or 0)], dtype).reshape(acc.shape)
        elif op.name == "vector":
            value = _wide(vectors[int(op.attr or 0)], dtype).reshape(1, -1)
        elif op.name == "const":
            value = jnp.asarray(op.attr, dtype)
        else:
            value = _apply(op, [values[i] for i in op.args], dtype)
        values[position] = value


def _apply(op: ir.Op, args: list[Any], dtype: Any) -> Any:
    if op.name == "integer_pow":
        return lax.integer_pow(args[0], int(op.attr or 0))
    if op.name in ("to_bf16", "to_f16"):
        narrow = jnp.bfloat16 if op.name == "to_bf16" else jnp.float16
        return lax.reduce_precision(
            args[0], jnp.finfo(narrow).nexp, jnp.finfo(narrow).nmant
        )
    fun = _RENAMED.get(op.name) or getattr(jnp, op.name)
    return _wide(fun(*args), dtype)


def _wide(x: Any, dtype: Any) -> Any:
    return x if x.dtype == bool else x.astype(dtype)


def _product(
    problem: ir.Problem, a: jax.Array, b: jax.Array, precision: Any
) -> jax.Array:
    if isinstance(problem, ir.ConvProblem):
        top, bottom, left, right = problem.padding
        k, r, s, c = problem.k, problem.r, problem.s, problem.group_channels
        packed = problem.filter_layout == "krsc"
        y = lax.conv_general_dilated(
            a.reshape(problem.n, problem.h, problem.w, problem.c),
            b.reshape((k, r, s, c) if packed else (r, s, c, k)),
            window_strides=problem.stride,
            padding=((top, bottom), (left, right)),
            rhs_dilation=problem.dilation,
            dimension_numbers=("NHWC", "OHWI" if packed else "HWIO", "NHWC"),
            feature_group_count=problem.groups,
            precision=precision,
        )
        return y.reshape(problem.rows, problem.channels)
    p = problem
    shape_a = (p.m, p.k) if p.a_layout == "row" else (p.k, p.m)
    shape_b = (p.k, p.n) if p.b_layout == "row" else (p.n, p.k)
    a, b = a.reshape(p.batch, *shape_a), b.reshape(p.batch, *shape_b)
    contract = ((2 if p.a_layout == "row" else 1,), (1 if p.b_layout == "row" else 2,))
    y = lax.dot_general(a, b, (contract, ((0,), (0,))), precision=precision)
    return y.reshape(p.rows, p.channels)
