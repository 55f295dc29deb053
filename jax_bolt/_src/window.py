# SPDX-License-Identifier: Apache-2.0
"""The sizes of a maximum over windows, and what it loads in one pass or in two."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Sizes of a ``reduce_window``, one number for each axis.

    ``operation`` is "max" or "min".
    """

    operation: str
    dtype: str
    item_bytes: int
    shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    window: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def label(self) -> str:
        """Such as "max3x3/2", without axes of which a window has one element."""
        axes = self._axes
        strides = [self.strides[i] for i in axes]
        if len(set(strides)) == 1:
            strides = strides[:1]
        text = self.operation + "x".join(str(self.window[i]) for i in axes)
        return text if strides == [1] else f"{text}/{'x'.join(map(str, strides))}"

    @property
    def text(self) -> str:
        return f"{self.label}[{self.dtype} {'x'.join(map(str, self.shape))}]"

    @property
    def order(self) -> tuple[int, int] | None:
        """Its two axes in the order in which two passes load least.

        That is the axis first of which less is left. None where there are not two, and
        where one pass loads less: windows of 3x3 at stride 2 take as many loads either
        way (without padding a few more in two passes), at stride 1 fewer in two passes,
        and 2x2 at stride 2 more.
        """
        axes = self._axes
        if len(axes) != 2 or not math.prod(self.out_shape):
            return None
        first, second = min(itertools.permutations(axes), key=self.loads_of_two)
        few = self.loads_of_two((first, second)) <= self.loads
        return (first, second) if few else None

    @property
    def loads(self) -> int:
        """Of one pass over all axes."""
        return math.prod(self.window) * math.prod(self.out_shape)

    def loads_of_two(self, order: Sequence[int]) -> int:
        """Of a pass over each of two axes."""
        first, second = order
        results = math.prod(self.out_shape)
        return self.window[first] * self.between(first) + self.window[second] * results

    def between(self, first: int) -> int:
        """Elements of what a pass over the axis ``first`` alone gives."""
        shape = list(self.shape)
        shape[first] = self.out_shape[first]
        return math.prod(shape)

    @property
    def _axes(self) -> list[int]:
        return [axis for axis, size in enumerate(self.window) if size > 1]
