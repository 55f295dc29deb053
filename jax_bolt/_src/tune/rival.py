# SPDX-License-Identifier: Apache-2.0
"""What a chain has to beat: what it joins, each on what was chosen for it."""

from __future__ import annotations

import dataclasses
import math

from ..invoke import AnyExecutable, Executable
from . import measure


@dataclasses.dataclass(frozen=True, slots=True)
class Rival:
    """The best kernel of each: of two regions, or of a merged pair and a region.

    ``chosen_us`` is what both take as they were chosen, where that is XLA's lowering of
    one; else None.
    """

    kernels: tuple[AnyExecutable, Executable]
    chosen_us: float | None = None

    def time_us(self, operands: measure.Operands, ordinal: int) -> float:
        """Both kernels one after the other, timed as the chain is; or as chosen."""
        both = measure.time_apart(self.kernels, operands, ordinal).micros
        return min(both, self.chosen_us or math.inf)
