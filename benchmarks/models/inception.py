# SPDX-License-Identifier: Apache-2.0
"""The 35x35 and 17x17 parts of Inception-v3: branches that are concatenated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class ConvNorm(nn.Module):
    """Conv, BatchNorm, relu."""

    features: int
    window: tuple[int, int] = (1, 1)
    strides: tuple[int, int] = (1, 1)
    padding: str = "SAME"
    dtype: Any = jnp.bfloat16

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(
            self.features,
            self.window,
            self.strides,
            self.padding,
            use_bias=False,
            dtype=self.dtype,
        )(x)
        norm = nn.BatchNorm(use_running_average=True, epsilon=1e-3, dtype=self.dtype)
        return nn.relu(norm(x))


class Inception(nn.Module):
    """Images [N, H, W, 3] to logits [N, num_classes], computed in ``dtype``.

    ``width`` is 64 in the paper; ``square`` and ``factored`` count the blocks with 5x5
    and 3x3 branches and those with branches of 1x7 and 7x1.
    """

    width: int = 64
    square: int = 3
    factored: int = 4
    num_classes: int = 1000
    dtype: Any = jnp.bfloat16

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        w = self.width
        x = self._conv(x, (w // 2, (3, 3)), strides=(2, 2), padding="VALID")
        x = self._conv(x, (w // 2, (3, 3)), padding="VALID")
        x = self._conv(x, (w, (3, 3)))
        x = nn.max_pool(x, (3, 3), strides=(2, 2))
        x = self._conv(x, (w + w // 4, (1, 1)))
        x = self._conv(x, (3 * w, (3, 3)), padding="VALID")
        x = nn.max_pool(x, (3, 3), strides=(2, 2))
        for _ in range(self.square):
            x = self._square(x)
        x = self._smaller(x)
        for _ in range(self.factored):
            x = self._factored(x)
        x = jnp.mean(x, axis=(1, 2))
        return nn.Dense(self.num_classes, dtype=self.dtype)(x)

    def _conv(
        self, x: jax.Array, *layers: tuple[int, tuple[int, int]], **kwargs: Any
    ) -> jax.Array:
        for features, window in layers:
            x = ConvNorm(features, window, dtype=self.dtype, **kwargs)(x)
        return x

    def _branches(
        self, x: jax.Array, pooled: int, *branches: Sequence[Any]
    ) -> jax.Array:
        parts = [self._conv(x, *layers) for layers in branches]
        pool = nn.avg_pool(x, (3, 3), strides=(1, 1), padding="SAME")
        return jnp.concatenate([*parts, self._conv(pool, (pooled, (1, 1)))], axis=-1)

    def _square(self, x: jax.Array) -> jax.Array:
        w = self.width
        three = (w + w // 2, (3, 3))
        return self._branches(
            x,
            w,
            [(w, (1, 1))],
            [(3 * w // 4, (1, 1)), (w, (5, 5))],
            [(w, (1, 1)), three, three],
        )

    def _smaller(self, x: jax.Array) -> jax.Array:
        w = self.width
        last = {"strides": (2, 2), "padding": "VALID"}
        one = self._conv(x, (6 * w, (3, 3)), **last)
        two = self._conv(x, (w, (1, 1)), (w + w // 2, (3, 3)))
        two = self._conv(two, (w + w // 2, (3, 3)), **last)
        return jnp.concatenate([one, two, nn.max_pool(x, (3, 3), (2, 2))], axis=-1)

    def _factored(self, x: jax.Array) -> jax.Array:
        inner, out = 2 * self.width, 3 * self.width
        row, column = (1, 7), (7, 1)
        return self._branches(
            x,
            out,
            [(out, (1, 1))],
            [(inner, (1, 1)), (inner, row), (out, column)],
            [
                *((inner, (1, 1)), (inner, column), (inner, row)),
                *((inner, column), (out, row)),
            ],
        )
