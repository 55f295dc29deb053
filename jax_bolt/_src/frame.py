# SPDX-License-Identifier: Apache-2.0
"""How the values of a region lie, seen from the kernel that computes them.

A kernel has rows and channels. A user's value has axes, of which some are taken apart
or stand elsewhere: NCHW, a product transposed, heads split off the channels, the pixels
of a transposed conv. A frame says which is which, and follows a value through reshapes
and transposes.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

from .compat import JaxprEqn, aval_of
from .views import RESHAPES, Factored, Permutation, Transposed, View, inverse

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Frame:
    """A value of ``shape``, whose axes are products of ``factors`` (none are 1).

    The factors of all axes are numbered from the first axis on. In ``order`` they are
    the kernel's rows and channels. ``channels`` are those that a per-channel value
    varies along, the last ones in ``order``; the kernel has each channel ``repeats``
    times.
    """

    shape: Shape
    factors: tuple[Shape, ...]
    order: Permutation
    channels: Permutation
    repeats: int = 1

    @staticmethod
    def of(shape: Shape, order: Permutation, channel_axes: int) -> Frame:
        """``value.transpose(order)`` is the kernel's, channels on its last axes."""
        number = list(itertools.accumulate((d > 1 for d in shape), initial=0))
        places = [number[axis] for axis in order if shape[axis] > 1]
        first = len(order) - channel_axes
        channels = [number[axis] for axis in order[first:] if shape[axis] > 1]
        factors = tuple((d,) if d > 1 else () for d in shape)
        return Frame(shape, factors, tuple(places), tuple(channels))

    @property
    def moves(self) -> bool:
        """Whether the kernel's elements are in another order than the value's."""
        return self.order != tuple(range(len(self.order)))

    @property
    def is_transposition(self) -> bool:
        """Whether each axis is whole."""
        return all(len(parts) <= 1 for parts in self.factors)

    @property
    def view(self) -> View | None:
        """From the value to the kernel's; None where that is a reshape."""
        if not self.moves:
            return None
        if not self.is_transposition:
            flat = tuple(itertools.chain(*self.factors))
            return Factored(self.shape, flat, self.order)
        # Axes of size 1 go with the axis they precede, and the first ones first.
        axes: list[list[int]] = [[]]
        for axis, parts in enumerate(self.factors):
            axes[-1].append(axis)
            if parts:
                axes.append([])
        lead = [axis for axis in axes[0] if not self.factors[axis]]
        axes[0] = axes[0][len(lead) :]
        order = [axis for number in self.order for axis in axes[number]]
        return Transposed((*lead, *order, *axes[-1]))

    def is_per_channel(self, shape: Shape) -> bool:
        """One element in all, or one per channel, where the channels are.

        Of a lower rank a value is on its way there: ``spreads`` follows it.
        """
        if math.prod(shape) == 1:
            return True
        if list(self.channels) != sorted(self.channels):
            return False
        if len(shape) != len(self.shape):
            flat = list(itertools.chain(*self.factors))
            return math.prod(shape) == math.prod(flat[i] for i in self.channels)
        numbers = iter(range(len(self.order)))
        for size, whole, parts in zip(shape, self.shape, self.factors, strict=True):
            varies = {next(numbers) in self.channels for _ in parts}
            # An axis of both rows and channels has {True, False}.
            if size not in (1, whole) or (parts and varies != {size > 1}):
                return False
        return True

    def spreads(self, eqn: JaxprEqn) -> bool:
        """Whether a change of shape keeps each channel's value at its channel."""
        source, result = (
            tuple(aval_of(v).shape) for v in (eqn.invars[0], eqn.outvars[0])
        )
        if len(eqn.invars) != 1:
            return False
        if math.prod(source) == 1:
            return True
        if not self.is_per_channel(source):
            return False
        if math.prod(source) == math.prod(result):
            return self.is_per_channel(result)
        if len(result) != len(self.shape) or eqn.primitive.name != "broadcast_in_dim":
            return False
        spread = [1] * len(result)
        for axis, size in zip(eqn.params["broadcast_dimensions"], source, strict=True):
            spread[axis] = size
        return self.is_per_channel(tuple(spread))

    def after(self, eqn: JaxprEqn) -> Frame | None:
        """The frame of what ``eqn``, a change of shape, makes of the value.

        None where that has none, or it is not a change of shape.
        """
        name = eqn.primitive.name
        if name == "transpose":
            return self._transposed(tuple(eqn.params["permutation"]))
        if name not in RESHAPES or len(eqn.invars) != 1:
            return None
        shape = tuple(aval_of(eqn.outvars[0]).shape)
        if math.prod(shape) != math.prod(self.shape):
            return None
        if eqn.params.get("dimensions") is not None and name == "reshape":
            return None
        return self.reshaped(shape)

    def _transposed(self, permutation: Permutation) -> Frame:
        starts = list(itertools.accumulate(map(len, self.factors), initial=0))
        moved = tuple(
            starts[axis] + i
            for axis in permutation
            for i in range(len(self.factors[axis]))
        )
        now = inverse(moved)
        return dataclasses.replace(
            self,
            shape=tuple(self.shape[axis] for axis in permutation),
            factors=tuple(self.factors[axis] for axis in permutation),
            order=tuple(now[i] for i in self.order),
            channels=tuple(now[i] for i in self.channels),
        )

    def reshaped(self, shape: Shape) -> Frame | None:
        """The frame of the value reshaped; None where it would have none."""
        flat = list(itertools.chain(*self.factors))
        common = refinement(flat, shape)
        if common is None:
            return None
        parts, factors = common
        starts = list(itertools.accumulate(map(len, parts), initial=0))

        def refined(positions: Permutation) -> Permutation:
            return tuple(
                starts[i] + part for i in positions for part in range(len(parts[i]))
            )

        return dataclasses.replace(
            self,
            shape=shape,
            factors=factors,
            order=refined(self.order),
            channels=refined(self.channels),
        )


def refinement(
    one: Sequence[int], other: Sequence[int]
) -> tuple[tuple[Shape, ...], tuple[Shape, ...]] | None:
    """Two factorings of one number taken apart into common factors, none of them 1.

    For each factor of either the parts of it; None where they have none in common.
    """
    parts: tuple[list[list[int]], list[list[int]]] = ([], [])
    left = [iter(one), iter(other)]
    rest = [1, 1]
    while True:
        for side in (0, 1):
            while rest[side] == 1:
                factor = next(left[side], None)
                if factor is None:
                    break
                parts[side].append([])
                rest[side] = factor
        if rest == [1, 1]:
            return tuple(map(tuple, parts[0])), tuple(map(tuple, parts[1]))
        common = min(rest)
        if max(rest) % common:
            return None
        for side in (0, 1):
            parts[side][-1].append(common)
            rest[side] //= common
