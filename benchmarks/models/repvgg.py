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

    The first conv of every stage, and the stem, halve the image.
    """

    stages: Sequence[int]
    widths: Sequence[int]
    stem: int
    activation: Callable[[jax.Array], jax.Array] = nn.relu
    num_classes: int = 1000
    dtype: Any = jnp.bfloat16

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        pad = ((1, 1), (1, 1))

        def block(x: jax.Array, features: int, stride: int, name: str) -> jax.Array:
            conv = nn.Conv(
                features, (3, 3), stride, padding=pad, dtype=self.dtype, name=name
            )
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
