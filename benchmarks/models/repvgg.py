# SPDX-License-Identifier: Apache-2.0
"""RepVGG in its deploy form: every block folded into one 3x3 conv with a bias."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class RepVGG(nn.Module):
    """Images [N, H, W, 3] to logits [N, num_classes], computed in ``dtype``.

    The first conv of every stage, and the stem, halve the image. After each of the
    first ``pointwise`` of them is a 1x1 conv of as many channels, also activated.
    """

    stages: Sequence[int]
    widths: Sequence[int]
    stem: int
    activation: Callable[[jax.Array], jax.Array] = nn.relu
    num_classes: int = 1000
    dtype: Any = jnp.bfloat16
    pointwise: int = 0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        pad = ((1, 1), (1, 1))
        left = self.pointwise

        def block(x: jax.Array, features: int, stride: int, name: str) -> jax.Array:
            nonlocal left
            conv = nn.Conv(
                features, (3, 3), stride, padding=pad, dtype=self.dtype, name=name
            )
            x = self.activation(conv(x))
            if left == 0:
                return x
            left -= 1
            conv = nn.Conv(features, (1, 1), dtype=self.dtype, name=f"{name}_1x1")
            return self.activation(conv(x))

        x = block(x, self.stem, 2, "stem")
        for stage, (blocks, width) in enumerate(
            zip(self.stages, self.widths, strict=True)
        ):
            for index in range(blocks):
                x = block(x, width, 2 if index == 0 else 1, f"stage{stage}_{index}")
        x = jnp.mean(x, axis=(1, 2))
        return nn.Dense(self.num_classes, dtype=self.dtype)(x)


RepVGGA0 = functools.partial(
    RepVGG, stages=(2, 4, 14, 1), widths=(48, 96, 192, 1280), stem=48
)
RepVGGA1 = functools.partial(
    RepVGG, stages=(2, 4, 14, 1), widths=(64, 128, 256, 1280), stem=64
)
RepVGGB0 = functools.partial(
    RepVGG, stages=(4, 6, 16, 1), widths=(64, 128, 256, 1280), stem=64
)
