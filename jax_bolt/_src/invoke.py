# SPDX-License-Identifier: Apache-2.0
"""A loaded kernel as a JAX function: operands rearranged, then one custom call."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from . import evaluate, forms, ir, pool
from .forms import ChainForm, Form
from .jit import loader

GEMM, CONV_FPROP = 0, 1  # abi.h: JaxBoltProblemKind
CAST, SEQUENCE = 2, 3  # launcher.h: kCastKind, kSequenceKind
JAX_DTYPES = {
    "bf16": jnp.bfloat16,
    "f16": jnp.float16,
    "f32": jnp.float32,
    "bool": jnp.bool_,
}


@dataclasses.dataclass(frozen=True, slots=True)
class Executable:
    """A kernel loaded under ``digest``, and the user's problem it runs as ``form``.

    ``recipe`` is how a cubin is launched (``kernels.recipe``), empty for a module, and
    ``held_recipe`` how where its parameters are held (``held``).
    """

    digest: str
    problem: ir.Problem
    form: Form
    workspace_bytes: int
    recipe: tuple[int, ...] = ()
    held_recipe: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class ChainExecutable:
    """As ``Executable``, of a chain: the user's ``problems`` run as ``form``."""

    digest: str
    problems: tuple[ir.Problem, ...]
    form: ChainForm
    workspace_bytes: int
    recipe: tuple[int, ...]
    held_recipe: tuple[int, ...] = ()


AnyExecutable: TypeAlias = Executable | ChainExecutable


def launched(work: ir.Work) -> tuple[int, list[int]]:
    """``abi_problem`` of what a kernel runs; a chain's recipe has all of its sizes."""
    region = work.regions[0] if isinstance(work, ir.Chain) else work
    return abi_problem(region.problem)


def abi_problem(problem: ir.Problem) -> tuple[int, list[int]]:
    """``(kind, dims)`` of ``JaxBoltProblem``."""
    if isinstance(problem, ir.GemmProblem):
        return GEMM, [problem.m, problem.n, problem.k, problem.batch]
    p = problem
    return CONV_FPROP, [
        *(p.n, p.h, p.w, p.c, p.k, p.r, p.s, p.p, p.q),
        *p.stride,
        *(p.padding[0], p.padding[2]),
        *p.dilation,
    ]


def call(
    kernel: Executable,
    lhs: jax.Array,
    rhs: jax.Array,
    sides: Sequence[jax.Array],
    vectors: Sequence[jax.Array],
    shape: Sequence[int],
) -> list[jax.Array]:
    """Runs the region on its operands as the user has them; outputs of ``shape``.

    What the kernel leaves to XLA is part of it.
    """
    a, b = forms.prepare(kernel.form.name, kernel.problem, lhs, rhs)
    part = kernel.form.part
    if kernel.form.pool is not None:
        (stored,) = launch(kernel, a, b, sides, vectors)
        outputs = [pooled(kernel, stored)]
    elif part is None:
        outputs = launch(kernel, a, b, sides, vectors)
    else:
        read = [sides[i] for i in part.sides], [vectors[i] for i in part.vectors]
        (stored,) = launch(kernel, a, b, *read)
        result = evaluate.rest(part, stored, sides, vectors)
        outputs = [result.astype(JAX_DTYPES[part.whole.out_dtype]), stored]
    return [output.reshape(tuple(shape)) for output in outputs]


def pooled(kernel: Executable, stored: jax.Array) -> jax.Array:
    """The pool that a kernel's form leaves to XLA, of what the kernel stored."""
    p, window = kernel.problem, kernel.form.pool
    assert isinstance(p, ir.ConvProblem) and window is not None
    return pool.apply(window, stored.reshape(p.n, p.p, p.q, p.k))


def launch(
    kernel: Executable,
    a: jax.Array,
    b: jax.Array,
    sides: Sequence[jax.Array],
    vectors: Sequence[jax.Array],
) -> list[jax.Array]:
    """The custom call alone, on prepared operands; outputs ``[rows, channels]``."""
    region = kernel.form.region
    full = (region.problem.rows, region.problem.channels)
    stored = (region.stored_rows, region.problem.channels)
    dtypes = [JAX_DTYPES[output.dtype] for output in region.epilogue.outputs]
    outputs = [jax.ShapeDtypeStruct(stored, dtype) for dtype in dtypes]
    if kernel.workspace_bytes:
        outputs.append(jax.ShapeDtypeStruct((kernel.workspace_bytes,), jnp.uint8))
    kind, dims = abi_problem(region.problem)
    results = jax.ffi.ffi_call(loader.ffi_target(), outputs)(
        a,
        b,
        *(side.reshape(full) for side in sides),
        *(vector.reshape(-1) for vector in vectors),
        digest=kernel.digest,
        kind=np.int64(kind),
        dims=np.asarray(dims, np.int64),
        recipe=np.asarray(kernel.recipe, np.int64),
        sides=np.int64(len(sides)),
        outputs=np.int64(len(dtypes)),
    )
    return list(results[: len(dtypes)])


def cast(digest: str, arrays: Sequence[jax.Array], dtype: jnp.dtype) -> list[jax.Array]:
    """Casts f32 arrays to the type that the loaded kernel ``digest`` is for."""
    outputs = [jax.ShapeDtypeStruct(x.shape, dtype) for x in arrays]
    call = jax.ffi.ffi_call(loader.ffi_target(), outputs)
    return list(call(*arrays, digest=digest, kind=np.int64(CAST)))
