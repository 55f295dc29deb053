# SPDX-License-Identifier: Apache-2.0
"""DenseNet-121: every layer reads what all layers before it in its block made."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class DenseNet(nn.Module):
    """Images [N, H, W, 3] to logits [N, num_classes], computed in ``dtype``.

    ``growth`` channels are what a layer adds; ``stages`` counts the layers of a block.
    """

    stages: Sequence[int] = (6, 12, 24, 16)
    growth: int = 32
    stem: int = 64
    num_classes: int = 1000
    dtype: Any = jnp.bfloat16

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype)
        norm = functools.partial(
            nn.BatchNorm, use_running_average=True, epsilon=1e-5, dtype=self.dtype
        )
        x = conv(self.stem, (7, 7), (2, 2), padding=((3, 3), (3, 3)), name="stem")(x)
        x = nn.relu(norm(name="stem_norm")(x))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        for stage, layers in enumerate(self.stages):
            if stage:
                x = conv(x.shape[-1] // 2, (1, 1))(nn.relu(norm()(x)))
                x = nn.avg_pool(x, (2, 2), strides=(2, 2))
            for _ in range(layers):
                y = conv(4 * self.growth, (1, 1))(nn.relu(norm()(x)))
                y = conv(self.growth, (3, 3))(nn.relu(norm()(y)))
                x = jnp.concatenate([x, y], axis=-1)
        x = jnp.mean(nn.relu(norm(name="last_norm")(x)), axis=(1, 2))
        return nn.Dense(self.num_classes, dtype=self.dtype)(x)
