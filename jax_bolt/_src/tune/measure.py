# SPDX-License-Identifier: Apache-2.0
"""Times and errors of one region on the GPU: kernels alone, and whole against XLA.

Kernels are compared with each other by the native profiler (CUDA events around a
replayed graph, buffers rotated to keep L2 cold). The best of them and XLA's own
lowering are then compared as what a program would run, rearranged operands and all,
through one and the same path: a jitted function that runs the region several times on
rotated operands, dispatched many times behind a long matrix product, so that host
time hides behind the device's.

All memory is JAX's own, so tuning fits into what JAX left free.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .. import evaluate, forms, invoke, ir
from ..invoke import Executable
from ..jit import loader
from ..primitive import SiteInfo, reference_fun

_TARGET_S = 4e-3  # device time of one timed batch
_REPEATS = 5
_BLOCKER = 6144  # side of the matrix product that hides the dispatch of a batch
# A result that XLA itself gets this wrong was not described right by the matcher.
_SANE_ERROR = {"bf16": 3e-2, "f16": 1e-2, "f32": 1e-2}


@dataclasses.dataclass(frozen=True, slots=True)
class Operands:
    """Random operands of a region, several sets of them, in the user's shapes.

    Activations and side inputs differ from set to set; filters and vectors are shared.
    """

    site: SiteInfo
    sets: tuple[tuple[jax.Array, ...], ...]

    def roles(self, index: int) -> tuple[Any, Any, list[Any], list[Any]]:
        """``(lhs, rhs, sides, vectors)`` of one set."""
        return split(self.site, self.sets[index])


def split(site: SiteInfo, operands: Sequence[Any]) -> tuple[Any, Any, list, list]:
    """The operands of a ``bolt_call`` by role: ``(lhs, rhs, sides, vectors)``."""
    lhs, rhs, *rest = (operands[i] for i in site.operands)
    count = len(site.region.epilogue.sides)
    return lhs, rhs, rest[:count], rest[count:]


def make_operands(site: SiteInfo, l2_bytes: int, seed: int = 0) -> Operands:
    """Random operands, enough sets to exceed the L2 cache twice (2 to 8)."""
    per_set = site.region.bytes_moved
    count = max(2, min(8, math.ceil(2 * l2_bytes / per_set)))
    key = jax.random.key(seed)
    shared = set(site.operands[2 + len(site.region.epilogue.sides) :])
    shared.add(site.operands[1])
    shared.discard(site.operands[0])
    first = _random_set(site, key)
    sets = [first]
    for i in range(1, count):
        fresh = _random_set(site, jax.random.fold_in(key, i))
        sets.append(
            tuple(first[p] if p in shared else value for p, value in enumerate(fresh))
        )
    return Operands(site, tuple(jax.block_until_ready(sets)))


def _random_set(site: SiteInfo, key: jax.Array) -> tuple[jax.Array, ...]:
    roles = {position: role for role, position in enumerate(site.operands)}
    first_vector = 2 + len(site.region.epilogue.sides)
    _, filter_elements = site.region.problem.operand_elements
    depth = max(1, filter_elements // site.region.problem.channels)
    values = []
    for position, aval in enumerate(site.in_avals):
        role = roles[position]
        at = jax.random.fold_in(key, position)
        if aval.dtype == jnp.bool_:
            value = jax.random.bernoulli(at, 0.5, aval.shape)
        elif role >= first_vector:
            # Positive: a per-channel input may be a variance.
            value = jax.random.uniform(at, aval.shape, minval=0.5, maxval=1.5)
        else:
            value = jax.random.normal(at, aval.shape)
            if role == 1:
                value = value / math.sqrt(depth)
        values.append(value.astype(aval.dtype))
    return tuple(values)


def kernel_function(site: SiteInfo, kernel: Executable) -> Callable:
    """The region on ``kernel``, as a function of the ``bolt_call``'s operands."""
    shape = site.out_aval.shape

    def fun(*operands: Any) -> Any:
        return invoke.call(kernel, *split(site, operands), shape)

    return fun


class Buffers:
    """Prepared operands of one form, and a result, as device addresses."""

    def __init__(self, operands: Operands, form: forms.Form):
        site = operands.site
        prepare = jax.jit(
            lambda lhs, rhs: forms.prepare(form.name, site.region.problem, lhs, rhs)
        )
        problem = form.region.problem
        dtype = invoke.JAX_DTYPES[form.region.epilogue.out_dtype]
        self._arrays: list[tuple] = []
        for index in range(len(operands.sets)):
            lhs, rhs, sides, vectors = operands.roles(index)
            a, b = prepare(lhs, rhs)
            # Poisoned: an element that a kernel does not write shows.
            out = jnp.full((problem.rows, problem.channels), jnp.nan, dtype)
            self._arrays.append((a, b, out, sides, vectors))
        jax.block_until_ready([entry[:3] for entry in self._arrays])

    @property
    def result(self) -> jax.Array:
        return self._arrays[0][2]

    def addresses(self, workspace: jax.Array | None) -> list[tuple]:
        space = 0 if workspace is None else workspace.unsafe_buffer_pointer()
        return [
            (
                *(x.unsafe_buffer_pointer() for x in (a, b, out)),
                [side.unsafe_buffer_pointer() for side in sides],
                [vector.unsafe_buffer_pointer() for vector in vectors],
                space,
            )
            for a, b, out, sides, vectors in self._arrays
        ]


def time_kernel(kernel: Executable, buffers: Buffers, ordinal: int) -> float:
    """Median µs per launch; raises RuntimeError with the CUDA error."""
    workspace = None
    if kernel.workspace_bytes:
        workspace = jax.block_until_ready(jnp.zeros(kernel.workspace_bytes, jnp.uint8))
    kind, dims = invoke.abi_problem(kernel.form.region.problem)
    times = loader.native().profile(
        kernel.digest, kind, dims, buffers.addresses(workspace), ordinal, _REPEATS
    )
    return statistics.median(times)


@dataclasses.dataclass(frozen=True, slots=True)
class Errors:
    """Relative errors in the 2-norm against the float32 yardstick, XLA's and ours."""

    kernel: float
    xla: float


def errors(operands: Operands, kernel: Executable) -> Errors:
    """Compares the region on ``kernel`` and on XLA with the IR's value."""
    site = operands.site
    ours = kernel_function(site, kernel)
    xla = reference_fun(site.reference)

    def both(*values: Any) -> Any:
        truth = _truth(site, values)
        flat = (ours(*values), xla(*values))
        return [_relative(value.reshape(truth.shape), truth) for value in flat]

    kernel_error, xla_error = map(float, jax.jit(both)(*operands.sets[0]))
    return Errors(kernel_error, xla_error)


def is_accurate(found: Errors, region: ir.Region) -> bool:
    """Contract 1: at most 1.25 times XLA's own error; and that one must be sane."""
    sane = found.xla <= _SANE_ERROR[region.problem.dtype]
    return sane and found.kernel <= 1.25 * found.xla + 1e-6


def _truth(site: SiteInfo, operands: Sequence[Any]) -> Any:
    """The region from its IR in float32."""
    lhs, rhs, sides, vectors = split(site, operands)
    if isinstance(site.region.problem, ir.ConvProblem):
        rhs = jnp.transpose(rhs, (3, 0, 1, 2))
    return evaluate.evaluate(site.region, lhs, rhs, sides, vectors)


def _relative(value: Any, truth: Any) -> Any:
    # Where the truth itself is not finite, only the kind of value can be compared.
    value = value.astype(truth.dtype)
    same = (value == truth) | (jnp.isnan(value) & jnp.isnan(truth))
    difference = jnp.where(same, 0.0, value - truth)
    scale = jnp.sum(jnp.square(jnp.where(jnp.isfinite(truth), truth, 0.0)))
    return jnp.sqrt(jnp.sum(jnp.square(difference)) / jnp.maximum(scale, 1e-30))


def time_region(fun: Callable, operands: Operands) -> float:
    """Median µs of the region as a jitted function, operand sets rotated.

    The runs in one call are chained by a barrier: XLA may neither merge nor reorder
    them.
    """

    def chain(sets: Sequence[tuple]) -> list[Any]:
        results: list[Any] = []
        for values in sets:
            if results:
                values, results[-1] = lax.optimization_barrier((values, results[-1]))
            results.append(fun(*values))
        return results

    compiled = jax.jit(chain).lower(operands.sets).compile()
    block = jax.jit(lambda x: (x @ x) @ x)
    x = jnp.ones((_BLOCKER, _BLOCKER), jnp.bfloat16)

    def batch(count: int) -> float:
        start = time.perf_counter()
        block(x)
        last = None
        for _ in range(count):
            last = compiled(operands.sets)
        # One stream: when the last call is done they all are.
        jax.block_until_ready(last)
        return time.perf_counter() - start

    def median(count: int) -> float:
        return statistics.median(batch(count) for _ in range(_REPEATS))

    batch(2)
    # The difference of two batches cancels the product in front of both.
    few = median(1)
    once = max(20e-6, median(3) - few) / 2
    count = max(3, min(64, math.ceil(_TARGET_S / once)))
    many = median(1 + count)
    return max(0.0, many - few) / (count * len(operands.sets)) * 1e6
