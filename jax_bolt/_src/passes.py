# SPDX-License-Identifier: Apache-2.0
"""(window, architecture) → whether XLA takes less time for two passes than for one.

A model of two rates, fitted to one measurement: XLA's kernel for a ``reduce_window``
over two axes takes 2.5 times as long as memory does, and with as many loads in two
passes of one axis each it takes 1.7 times less. So the loads are taken for the bound,
where memory is none. Two passes cost a launch, and what is between them goes through
memory where L2 does not hold it.
"""

from __future__ import annotations

import math

from .arch import GpuArch
from .window import Window

# Loads per second and SM in one pass and in two, from 33.6 and 19.6 µs for windows of
# 3x3 at stride 2 on bf16 of 32x112x112x64, on an H200.
_LOADS_OF_ONE, _LOADS_OF_TWO = 13e9, 22e9
_LAUNCH_S = 2e-6
_MARGIN = 0.9  # these are estimates; what is about as fast stays as it was written


def two_pay(window: Window, arch: GpuArch) -> bool:
    """Whether two passes, in the window's ``order``, can be expected to be faster.

    Never where a window lies along the innermost axis (NCHW): only windows of which
    threads beside each other read elements beside each other were measured.
    """
    if window.order is None or len(window.shape) - 1 in window.order:
        return False
    elements = math.prod(window.shape) + math.prod(window.out_shape)
    between = window.between(window.order[0]) * window.item_bytes
    moved = elements * window.item_bytes
    one = max(window.loads / (_LOADS_OF_ONE * arch.sm_count), moved / arch.bandwidth)
    # Half of L2, since what is read and written besides passes through it, too.
    if between > arch.l2_bytes / 2:
        moved += 2 * between
    loads = window.loads_of_two(window.order)
    two = max(loads / (_LOADS_OF_TWO * arch.sm_count), moved / arch.bandwidth)
    return two + _LAUNCH_S < _MARGIN * one
