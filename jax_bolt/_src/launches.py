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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import forms
from .invoke import JAX_DTYPES, SEQUENCE, Executable, abi_problem
from .jit import loader

VERSION = 2
_NOWHERE, _OPERAND, _RESULT, _ARENA = range(4)  # sequence_launcher.h
_ALIGNMENT = 256  # bytes; as much as XLA's own buffers have

Value = Any  # an array, or a Promise


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
    kernel: Executable
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
    ) -> list[Promise]:
        """As ``invoke.call``; ``takes`` must have been true."""
        promises = [
            Promise(len(self._steps), tuple(shape), JAX_DTYPES[output.dtype])
            for output in kernel.form.region.epilogue.outputs
        ]
        if isinstance(lhs, Promise):
            a = lhs
            # Of the form's operands only the filter is made.
            like = jnp.zeros((), lhs.dtype)
            _, b = forms.prepare(
                kernel.form.name, kernel.problem, jnp.broadcast_to(like, lhs.shape), rhs
            )
        else:
            a, b = forms.prepare(kernel.form.name, kernel.problem, lhs, rhs)
        self._steps.append(_Step(kernel, a, b, list(sides), list(vectors), promises))
        return promises

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
            kind, dims = abi_problem(kernel.form.region.problem)
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
