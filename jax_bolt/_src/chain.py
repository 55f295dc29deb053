# SPDX-License-Identifier: Apache-2.0
"""Several kernels as one custom call: where each finds its buffers.

``Chain`` collects launches. Their results are promises until the call is made; then
those that somebody else reads are results of the call, and the others, with all
workspaces, lie in one arena, where what is no longer needed makes room.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import forms
from .invoke import JAX_DTYPES, SEQUENCE, Executable, abi_problem
from .jit import loader

VERSION = 1
_NOWHERE, _OPERAND, _RESULT, _ARENA = range(4)  # sequence_launcher.h
_ALIGNMENT = 256  # bytes; as much as XLA's own buffers have

Value = Any  # an array, or a Promise


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Promise:
    """The result of a launch that was not made yet, with the user's shape."""

    step: int
    shape: tuple[int, ...]
    dtype: Any


@dataclasses.dataclass(frozen=True, slots=True)
class _Step:
    kernel: Executable
    a: Value
    b: Value
    sides: list[Value]
    vectors: list[Value]
    promise: Promise

    @property
    def inputs(self) -> list[Value]:
        return [self.a, self.b, *self.sides, *self.vectors]

    @property
    def bytes(self) -> int:
        """Of the result."""
        return math.prod(self.promise.shape) * jnp.dtype(self.promise.dtype).itemsize


class Chain:
    """Launches in the order in which they were added."""

    def __init__(self) -> None:
        self._steps: list[_Step] = []

    def __len__(self) -> int:
        return len(self._steps)

    def takes(self, kernel: Executable, lhs: Value, rhs: Value) -> bool:
        """Whether the kernel can read what is only promised.

        Not where its form rearranges a promised operand: XLA has to do that.
        """
        if isinstance(rhs, Promise):
            return False
        if not isinstance(lhs, Promise):
            return True
        like = ((tuple(x.shape), jnp.dtype(x.dtype)) for x in (lhs, rhs))
        return forms.only_views(kernel.form.name, kernel.problem, *like)

    def add(
        self,
        kernel: Executable,
        lhs: Value,
        rhs: Value,
        sides: Sequence[Value],
        vectors: Sequence[Value],
        shape: Sequence[int],
    ) -> Promise:
        """As ``invoke.call``; ``takes`` must have been true."""
        dtype = JAX_DTYPES[kernel.form.region.epilogue.out_dtype]
        promise = Promise(len(self._steps), tuple(shape), dtype)
        if isinstance(lhs, Promise):
            a = lhs
            # Of the form's operands only the filter is made.
            like = jnp.zeros((), lhs.dtype)
            _, b = forms.prepare(
                kernel.form.name, kernel.problem, jnp.broadcast_to(like, lhs.shape), rhs
            )
        else:
            a, b = forms.prepare(kernel.form.name, kernel.problem, lhs, rhs)
        self._steps.append(_Step(kernel, a, b, list(sides), list(vectors), promise))
        return promise

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
                return _ARENA, arena.results[value.step]
            return _OPERAND, operands.setdefault(id(value), (len(operands), value))[0]

        for step in steps:
            kernel = step.kernel
            kind, dims = abi_problem(kernel.form.region.problem)
            index = digests.setdefault(kernel.digest, len(digests))
            program += [index, kind, len(dims), *dims]
            program += [len(kernel.recipe), *kernel.recipe]
            workspace = (_NOWHERE, 0)
            if kernel.workspace_bytes:
                workspace = (_ARENA, arena.workspaces[step.promise.step])
            program += [*place(step.a), *place(step.b), *place(step.promise)]
            program += workspace
            for group in (step.sides, step.vectors):
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


class _Arena:
    """Where results that nobody else reads, and workspaces, lie: bytes from its start.

    The largest first, each at the lowest place that nothing else has at its time.
    """

    def __init__(self, steps: Sequence[_Step], kept: dict[Promise, int]):
        last = {step.promise.step: step.promise.step for step in steps}
        for index, step in enumerate(steps):
            for value in step.inputs:
                if isinstance(value, Promise):
                    last[value.step] = index
        wanted: list[tuple[int, int, int, dict[int, int]]] = []
        self.results: dict[int, int] = {}
        self.workspaces: dict[int, int] = {}
        for index, step in enumerate(steps):
            if step.promise not in kept:
                wanted.append((step.bytes, index, last[index], self.results))
            if step.kernel.workspace_bytes:
                size = step.kernel.workspace_bytes
                wanted.append((size, index, index, self.workspaces))
        placed: list[tuple[int, int, int, int]] = []  # first and last step, start, end
        self.bytes = 0
        for size, first, until, where in sorted(wanted, key=lambda w: -w[0]):
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
            where[first] = start
            self.bytes = max(self.bytes, end)
