# SPDX-License-Identifier: Apache-2.0
"""Several kernels as one custom call: where each finds its buffers.

``Launches`` collects them. Their results are promises until the call is made; then
those that somebody else reads are results of the call, and the others, with all
workspaces, lie in one arena, where what is no longer needed makes room.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from . import forms, ir
from .invoke import (
    JAX_DTYPES,
    SEQUENCE,
    AnyExecutable,
    ChainExecutable,
    Executable,
    launched,
)
from .jit import loader

VERSION = 2
_NOWHERE, _OPERAND, _RESULT, _ARENA = range(4)  # sequence_launcher.h
_ALIGNMENT = 256  # bytes; as much as XLA's own buffers have

Value = Any  # an array, or a Promise
# The left operand, the right one, side inputs and vectors.
Roles: TypeAlias = tuple[Value, Value, Sequence[Value], Sequence[Value]]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Promise:
    """An output of a launch that was not made yet, with the user's shape."""

    step: int
    shape: tuple[int, ...]
    dtype: Any

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize


@dataclasses.dataclass(frozen=True, slots=True)
class _Step:
    kernel: AnyExecutable
    a: Value
    b: Value
    sides: list[Value]
    vectors: list[Value]
    promises: list[Promise]

    @property
    def inputs(self) -> list[Value]:
        return [self.a, self.b, *self.sides, *self.vectors]


class Launches:
    """Launches in the order in which they were added."""

    def __init__(self) -> None:
        self._steps: list[_Step] = []

    def __len__(self) -> int:
        return len(self._steps)

    def takes(self, kernel: AnyExecutable, *products: tuple[Value, Value]) -> bool:
        """Whether the kernel can read what is only promised.

        Not where its form rearranges a promised operand: XLA has to do that. A chain
        has several ``products``; a left operand that it makes itself is None.
        """
        if isinstance(kernel, ChainExecutable):
            forms_, problems = kernel.form.forms, kernel.problems
        else:
            forms_, problems = (kernel.form,), (kernel.problem,)
        for form, problem, (lhs, rhs) in zip(forms_, problems, products, strict=True):
            if isinstance(rhs, Promise):
                return False
            if isinstance(lhs, Promise):
                like = tuple(lhs.shape), jnp.dtype(lhs.dtype)
                if not forms.only_views(form.name, problem, *like, right=False):
                    return False
        return True

    def add(
        self,
        kernel: Executable,
        lhs: Value,
        rhs: Value,
        sides: Sequence[Value],
        vectors: Sequence[Value],
        shape: Sequence[int],
    ) -> list[Promise]:
        """As ``invoke.call``; ``takes`` must have been true."""
        promises = [
            self._promise(shape, output.dtype)
            for output in kernel.form.region.epilogue.outputs
        ]
        a, b = _prepared(kernel.form.name, kernel.problem, lhs, rhs)
        self._steps.append(_Step(kernel, a, b, list(sides), list(vectors), promises))
        return promises

    def add_chain(
        self,
        kernel: ChainExecutable,
        roles: Sequence[Roles],
        shapes: Sequence[Sequence[int]],
    ) -> list[Promise]:
        """As ``add``, of several regions in one kernel.

        ``shapes`` are of all results; the promise of the one before the last is among
        those returned where the kernel stores it. What is between two regions is not
        looked at.
        """
        chain = kernel.form.region
        kept = [
            self._promise(shape, region.epilogue.out_dtype)
            for shape, region in zip(shapes, chain.regions, strict=True)
        ][-2 if chain.stored else -1 :]
        self._steps.append(_Step(kernel, *bound(kernel, roles, shapes), kept))
        return kept

    def _promise(self, shape: Sequence[int], dtype: str) -> Promise:
        return Promise(len(self._steps), tuple(shape), JAX_DTYPES[dtype])

    def launch(self, needed: Sequence[Promise]) -> dict[Promise, jax.Array]:
        """Makes the call and forgets the launches; ``needed`` are read elsewhere."""
        steps, self._steps = self._steps, []
        operands: dict[int, tuple[int, Any]] = {}  # id -> number, array
        results = {promise: i for i, promise in enumerate(dict.fromkeys(needed))}
        arena = _Arena(steps, results)
        digests: dict[str, int] = {}
        program: list[int] = [VERSION, len(steps)]

        def place(value: Value) -> tuple[int, int]:
            if isinstance(value, Promise):
                if value in results:
                    return _RESULT, results[value]
                return _ARENA, arena.results[value]
            return _OPERAND, operands.setdefault(id(value), (len(operands), value))[0]

        for number, step in enumerate(steps):
            kernel = step.kernel
            result, *auxiliary = step.promises
            kind, dims = launched(kernel.form.region)
            index = digests.setdefault(kernel.digest, len(digests))
            program += [index, kind, len(dims), *dims]
            program += [len(kernel.recipe), *kernel.recipe]
            workspace = (_NOWHERE, 0)
            if kernel.workspace_bytes:
                workspace = (_ARENA, arena.workspaces[number])
            program += [*place(step.a), *place(step.b), *place(result)]
            program += workspace
            for group in (step.sides, step.vectors, auxiliary):
                program += [len(group), *(n for value in group for n in place(value))]
            program.append(kernel.workspace_bytes)

        outputs = [jax.ShapeDtypeStruct(p.shape, p.dtype) for p in results]
        if arena.bytes:
            outputs.append(jax.ShapeDtypeStruct((arena.bytes,), jnp.uint8))
        made = jax.ffi.ffi_call(loader.ffi_target(), outputs)(
            *(array for _, array in operands.values()),
            kind=np.int64(SEQUENCE),
            digests=",".join(digests),
            program=np.asarray(program, np.int64),
        )
        return dict(zip(results, made, strict=False))


def bound(
    kernel: ChainExecutable,
    roles: Sequence[Roles],
    shapes: Sequence[Sequence[int]],
) -> tuple[Value, Value, list[Value], list[Value]]:
    """A, B, side inputs and vectors of a chain's kernel, from every region's.

    Later products' operands come ahead of all side inputs.
    """
    chain, (first, *others) = kernel.form.region, roles
    names = [form.name for form in kernel.form.forms]
    a, b = _prepared(names[0], kernel.problems[0], *first[:2])
    products: list[Value] = []
    sides, vectors = [*first[2]], [*first[3]]
    for i, (made, (lhs, rhs, own, columns)) in enumerate(
        zip(chain.joints, others, strict=True), start=1
    ):
        if made is None:
            lhs = Promise(-1, tuple(shapes[i - 1]), JAX_DTYPES[chain.dtype])
        product = _prepared(names[i], kernel.problems[i], lhs, rhs)
        products += product[1:] if made is None else product
        sides += [side for n, side in enumerate(own) if n != made]
        vectors += columns
    return a, b, [*products, *sides], vectors


def _prepared(form: str, problem: ir.Problem, lhs: Value, rhs: Value) -> Any:
    """The kernel's operands; a promise is taken as it lies."""
    if isinstance(lhs, Promise):
        return lhs, forms.prepare_right(form, problem, rhs)
    return forms.prepare(form, problem, lhs, rhs)


class _Arena:
    """Where results that nobody else reads, and workspaces, lie: bytes from its start.

    The largest first, each at the lowest place that nothing else has at its time.
    """

    def __init__(self, steps: Sequence[_Step], kept: dict[Promise, int]):
        last = {promise: promise.step for step in steps for promise in step.promises}
        for index, step in enumerate(steps):
            for value in step.inputs:
                if isinstance(value, Promise):
                    last[value] = index
        # Bytes, first and last step, whose place it is and where that is noted.
        wanted: list[tuple[int, int, int, Any, dict[Any, int]]] = []
        self.results: dict[Promise, int] = {}
        self.workspaces: dict[int, int] = {}
        for index, step in enumerate(steps):
            for promise in step.promises:
                if promise not in kept:
                    until = last[promise]
                    wanted.append((promise.bytes, index, until, promise, self.results))
            if step.kernel.workspace_bytes:
                size = step.kernel.workspace_bytes
                wanted.append((size, index, index, index, self.workspaces))
        placed: list[tuple[int, int, int, int]] = []  # first and last step, start, end
        self.bytes = 0
        for size, first, until, key, where in sorted(wanted, key=lambda w: -w[0]):
            start = 0
            for begin, end in sorted(
                (begin, end)
                for other_first, other_until, begin, end in placed
                if other_first <= until and first <= other_until
            ):
                if start + size <= begin:
                    break
                start = max(start, end)
            end = -(-(start + size) // _ALIGNMENT) * _ALIGNMENT
            placed.append((first, until, start, end))
            where[key] = start
            self.bytes = max(self.bytes, end)
