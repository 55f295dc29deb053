# SPDX-License-Identifier: Apache-2.0
"""EfficientNet-B0: MobileNet's blocks with swish and squeeze-and-excite throughout."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import flax.linen as nn

from .mobilenet import Block, MobileNet


def blocks(
    stem: int, rows: Sequence[tuple[int, int, int, int, int]]
) -> tuple[Block, ...]:
    """From rows of expansion, window, features, repeats and first stride."""
    made: list[Block] = []
    before = stem
    for expansion, window, features, repeats, stride in rows:
        for index in range(repeats):
            first = stride if index == 0 else 1
            squeezed = max(1, before // 4)
            made.append(
                Block(expansion * before, features, window, first, squeezed, nn.silu)
            )
            before = features
    return tuple(made)


_B0 = (
    *((1, 3, 16, 1, 1), (6, 3, 24, 2, 2), (6, 5, 40, 2, 2), (6, 3, 80, 3, 2)),
    *((6, 5, 112, 3, 1), (6, 5, 192, 4, 2), (6, 3, 320, 1, 1)),
)

EfficientNetB0 = functools.partial(
    MobileNet,
    blocks=blocks(32, _B0),
    stem=32,
    last=1280,
    activation=nn.silu,
    gate=nn.sigmoid,
    epsilon=1e-3,
)
