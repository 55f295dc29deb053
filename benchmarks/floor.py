# SPDX-License-Identifier: Apache-2.0
"""The least time a device could take for a function's convs and products.

The floor is the sum over them of max(FLOPs / peak, bytes / bandwidth), where bytes
are both operands and the output once each, a conv's input only where it is read (a
1x1 conv of stride 2 reads a quarter); everything elementwise is free.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jex_core

from jax_bolt._src.floor import touched

from . import timing

ROOTS = ("conv_general_dilated", "dot_general")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """``flops`` in FLOP/s and ``bandwidth`` in bytes/s."""

    flops: float
    bandwidth: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Root:
    """One conv or product, run ``times`` times; ``flops`` and ``bytes`` are of one."""

    primitive: str
    flops: int
    bytes: int
    times: int = 1

    def seconds(self, ceilings: Ceilings) -> float:
        once = max(self.flops / ceilings.flops, self.bytes / ceilings.bandwidth)
        return self.times * once


def roots(fun: Callable[..., Any], *args: Any) -> tuple[Root, ...]:
    """The roots of ``fun`` at ``args`` (arrays or ShapeDtypeStructs), in order.

    A scan's body counts once for every step, a while loop's once; of a cond every
    branch counts.
    """
    return tuple(_walk(jax.make_jaxpr(fun)(*args).jaxpr, 1))


def of_problems(problems: Iterable[Any]) -> tuple[Root, ...]:
    """The roots of ``jax_bolt`` problems: ``site.region.problem`` of a report's sites.

    The output counts with the problem's own dtype.
    """
    return tuple(_of_problem(p) for p in problems)


def seconds(found: Iterable[Root], ceilings: Ceilings) -> float:
    """The floor of ``found`` on a device with these ceilings."""
    return sum(root.seconds(ceilings) for root in found)


def measure(*, quick: bool = False) -> Ceilings:
    """What the default device reaches: a large bf16 product, and a large copy.

    Random operands, since a GPU draws less power, and so clocks higher, on zeros.
    ``quick`` uses sizes small enough for a CPU; they mean nothing on a GPU.
    """
    size = 512 if quick else 8192
    a_key, b_key, x_key = jax.random.split(jax.random.key(0), 3)
    a = jax.random.normal(a_key, (size, size), jnp.bfloat16)
    b = jax.random.normal(b_key, (size, size), jnp.bfloat16)
    matmul_s = timing.back_to_back(jax.jit(jnp.matmul), a, b)

    count = 2**20 if quick else 2**28
    x = jax.random.normal(x_key, (count,), jnp.float32)
    copy_s = timing.back_to_back(jax.jit(jnp.negative), x)
    return Ceilings(flops=2 * size**3 / matmul_s, bandwidth=2 * x.nbytes / copy_s)


def _walk(jaxpr: Any, times: int) -> Iterator[Root]:
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name in ROOTS:
            yield _of_equation(eqn, times)
            continue
        steps = eqn.params["length"] if name == "scan" else 1
        for inner in jex_core.jaxprs_in_params(eqn.params):
            yield from _walk(inner, times * steps)


def _of_equation(eqn: Any, times: int) -> Root:
    a, b = (v.aval for v in eqn.invars[:2])
    out = eqn.outvars[0].aval
    read = math.prod(a.shape)
    if eqn.primitive.name == "dot_general":
        (contracting, _), _ = eqn.params["dimension_numbers"]
        depth = math.prod(a.shape[d] for d in contracting)
    else:
        # The filter's output features are one of its dims; every other one is summed.
        features = eqn.params["dimension_numbers"].rhs_spec[0]
        depth = math.prod(b.shape) // b.shape[features]
        read = _read_elements(a.shape, b.shape, out.shape, eqn.params)
    moved = (
        read * a.dtype.itemsize
        + math.prod(b.shape) * b.dtype.itemsize
        + math.prod(out.shape) * out.dtype.itemsize
    )
    return Root(
        primitive=eqn.primitive.name,
        flops=2 * math.prod(out.shape) * depth,
        bytes=moved,
        times=times,
    )


def _read_elements(
    a: tuple[int, ...],
    b: tuple[int, ...],
    out: tuple[int, ...],
    params: dict[str, Any],
) -> int:
    if any(d != 1 for d in params["lhs_dilation"]):
        return math.prod(a)
    numbers = params["dimension_numbers"]
    read = a[numbers.lhs_spec[0]] * a[numbers.lhs_spec[1]]
    for i, dim in enumerate(numbers.lhs_spec[2:]):
        read *= touched(
            a[dim],
            out[numbers.out_spec[2 + i]],
            b[numbers.rhs_spec[2 + i]],
            params["window_strides"][i],
            params["rhs_dilation"][i],
            params["padding"][i][0],
        )
    return read


def _of_problem(problem: Any) -> Root:
    item = {"bf16": 2, "f16": 2, "f32": 4}[problem.dtype]
    read, filters = problem.operand_elements
    kind = "dot_general"
    if hasattr(problem, "stride"):
        kind = "conv_general_dilated"
        (sh, sw), (dh, dw) = problem.stride, problem.dilation
        top, _, left, _ = problem.padding
        rows = touched(problem.h, problem.p, problem.r, sh, dh, top)
        columns = touched(problem.w, problem.q, problem.s, sw, dw, left)
        read = problem.n * rows * columns * problem.c
    moved = (read + filters + problem.rows * problem.channels) * item
    return Root(primitive=kind, flops=problem.flops, bytes=moved)
