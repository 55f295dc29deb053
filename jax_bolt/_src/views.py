# SPDX-License-Identifier: Apache-2.0
"""How a value is rearranged before a kernel, and how it is got back.

The operands and the result of a call are the kernel's; its reference jaxpr is the
user's own equations between the views undone. So each view has both directions.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Protocol, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

Permutation: TypeAlias = tuple[int, ...]
# Primitives whose result has the operand's elements in their order, or repeats some.
RESHAPES = ("reshape", "squeeze", "expand_dims", "broadcast_in_dim")


class View(Protocol):
    """Hashable: values that are viewed alike are rearranged once.

    ``is_redundant``: the kernel's value has elements that the user's does not have.
    """

    @property
    def is_redundant(self) -> bool: ...

    def there(self, x: jax.Array) -> jax.Array:
        """The kernel's value, from the user's."""
        ...

    def back(self, x: jax.Array) -> jax.Array:
        """The user's value, from the kernel's."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class Transposed:
    """The axes in another order."""

    order: Permutation
    is_redundant = False

    def there(self, x: jax.Array) -> jax.Array:
        return lax.transpose(x, self.order)

    def back(self, x: jax.Array) -> jax.Array:
        return lax.transpose(x, inverse(self.order))


@dataclasses.dataclass(frozen=True, slots=True)
class Factored:
    """Axes taken apart into ``factors``, and these in another order."""

    shape: tuple[int, ...]
    factors: tuple[int, ...]
    order: Permutation
    is_redundant = False

    def there(self, x: jax.Array) -> jax.Array:
        return lax.transpose(x.reshape(self.factors), self.order)

    def back(self, x: jax.Array) -> jax.Array:
        factors = [self.factors[i] for i in self.order]
        x = lax.transpose(x.reshape(factors), inverse(self.order))
        return x.reshape(self.shape)


@dataclasses.dataclass(frozen=True, slots=True)
class Repeated:
    """A per-channel value ``times`` times, one after the other."""

    shape: tuple[int, ...]
    times: int
    is_redundant = True

    def there(self, x: jax.Array) -> jax.Array:
        size = math.prod(self.shape)
        spread = lax.broadcast_in_dim(x.reshape(size), (self.times, size), (1,))
        return spread.reshape(self.times * size)

    def back(self, x: jax.Array) -> jax.Array:
        size = math.prod(self.shape)
        return lax.slice(x, (0,), (size,)).reshape(self.shape)


@dataclasses.dataclass(frozen=True, slots=True)
class Phases:
    """One axis of a transposed conv as a plain conv that gives ``stride`` outputs.

    Output ``stride * i + phase`` of taps ``w`` reads input ``i + t`` through tap
    ``stride * t + pad - phase``, for the ``t`` for which there is one. So the filter,
    with ``before`` zeros ahead and some after, is cut into ``taps`` runs of ``stride``;
    of a run the last is phase 0's. ``lead`` is how far the first ``t`` is below 0.
    """

    stride: int
    size: int  # taps of the transposed conv
    before: int
    taps: int
    lead: int

    @staticmethod
    def of(stride: int, size: int, pad: int) -> Phases:
        """``pad``: zeros ahead of the input that is dilated by ``stride``."""
        lead = pad // stride
        taps = (stride - 1 + size - 1 - pad) // stride + lead + 1
        return Phases(stride, size, stride - 1 - pad % stride, taps, lead)

    @property
    def after(self) -> int:
        return self.stride * self.taps - self.before - self.size


@dataclasses.dataclass(frozen=True, slots=True)
class PhaseFilter:
    """A transposed conv's filter as that of a conv with a channel for each phase.

    From ``shape``, [..., C, K], to [taps, taps, C, phases * phases * K].
    """

    shape: tuple[int, ...]
    down: Phases
    right: Phases

    @property
    def axes(self) -> tuple[Phases, Phases]:
        return self.down, self.right

    @property
    def is_redundant(self) -> bool:
        return any(phases.before or phases.after for phases in self.axes)

    @property
    def _runs(self) -> tuple[int, ...]:
        down, right = self.axes
        return (down.taps, down.stride, right.taps, right.stride, *self.shape[-2:])

    def there(self, x: jax.Array) -> jax.Array:
        x = x.reshape(self.down.size, self.right.size, *self.shape[-2:])
        pads = [(phases.before, phases.after, 0) for phases in self.axes]
        if any(map(any, pads)):
            x = lax.pad(x, _zero_like(x), [*pads, (0, 0, 0), (0, 0, 0)])
        x = lax.rev(x.reshape(self._runs), (1, 3))
        x = lax.transpose(x, (0, 2, 4, 1, 3, 5))
        return x.reshape(*x.shape[:3], math.prod(x.shape[3:]))

    def back(self, x: jax.Array) -> jax.Array:
        runs, (c, k) = self._runs, self.shape[-2:]
        x = x.reshape([runs[i] for i in (0, 2, 4, 1, 3, 5)])
        x = lax.rev(lax.transpose(x, (0, 3, 1, 4, 2, 5)), (1, 3))
        x = x.reshape(runs[0] * runs[1], runs[2] * runs[3], c, k)
        starts = [phases.before for phases in self.axes]
        ends = [phases.before + phases.size for phases in self.axes]
        return lax.slice(x, (*starts, 0, 0), (*ends, c, k)).reshape(self.shape)


@dataclasses.dataclass(frozen=True, slots=True)
class Both:
    """One view after another."""

    first: View
    second: View

    @property
    def is_redundant(self) -> bool:
        return self.first.is_redundant or self.second.is_redundant

    def there(self, x: jax.Array) -> jax.Array:
        return self.second.there(self.first.there(x))

    def back(self, x: jax.Array) -> jax.Array:
        return self.first.back(self.second.back(x))


def _zero_like(x: jax.Array) -> jax.Array:
    """A zero that varies over the manual axes of a ``shard_map`` that ``x`` does.

    A constant varies over none, and JAX does not mix them. XLA sees a constant here.
    """
    bits = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
    one = lax.slice(x, (0,) * x.ndim, (1,) * x.ndim).reshape(())
    same = lax.bitcast_convert_type(one, bits)
    return lax.bitcast_convert_type(lax.bitwise_xor(same, same), x.dtype)


def inverse(permutation: Permutation) -> Permutation:
    """The permutation that undoes it."""
    return tuple(sorted(range(len(permutation)), key=permutation.__getitem__))


def transposition(shape: Sequence[int], order: Permutation) -> Transposed | None:
    """None where only axes of size 1 would move, which a reshape does as well."""
    moved = [axis for axis in order if shape[axis] > 1]
    return None if moved == sorted(moved) else Transposed(order)
