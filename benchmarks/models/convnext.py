# SPDX-License-Identifier: Apache-2.0
"""ConvNeXt-T: 7x7 depthwise convs, LayerNorm, and two products with GELU between."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class Block(nn.Module):
    """Depthwise conv, LayerNorm, up four times, GELU, down, scaled, and a shortcut."""

    features: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = self.features
        y = nn.Conv(width, (7, 7), feature_group_count=width, dtype=self.dtype)(x)
        y = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype)(y)
        y = nn.gelu(nn.Dense(4 * width, dtype=self.dtype)(y), approximate=False)
        y = nn.Dense(width, dtype=self.dtype)(y)
        gamma = self.param("gamma", nn.initializers.constant(1e-6), (width,))
        return x + y * gamma.astype(self.dtype)


class ConvNeXt(nn.Module):
    """Images [N, H, W, 3] to logits [N, num_classes], computed in ``dtype``."""

    stages: Sequence[int] = (3, 3, 9, 3)
    width: int = 96
    num_classes: int = 1000
    dtype: Any = jnp.bfloat16

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for stage, blocks in enumerate(self.stages):
            width = self.width * 2**stage
            patch = 4 if stage == 0 else 2
            if stage:
                x = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype)(x)
            x = nn.Conv(width, (patch, patch), patch, dtype=self.dtype)(x)
            if not stage:
                x = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype)(x)
            for _ in range(blocks):
                x = Block(width, self.dtype)(x)
        x = jnp.mean(x, axis=(1, 2))
        x = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype)(x)
        return nn.Dense(self.num_classes, dtype=self.dtype)(x)
