# SPDX-License-Identifier: Apache-2.0
"""An SM's cycles, in which rank models count, as time."""

from __future__ import annotations

CLOCK = 1.7e9  # about what an SM runs at under load


def micros(cycles: float) -> float:
    """In µs."""
    return cycles / CLOCK * 1e6


def us(cycles: float) -> str:
    """The same, to be read."""
    return f"{micros(cycles):.1f}"
