# SPDX-License-Identifier: Apache-2.0
"""MLP-Mixer B/16: products over the tokens and over the channels, in turn."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class Mlp(nn.Module):
    """Two products with GELU between, over the last axis."""

    hidden: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.gelu(nn.Dense(self.hidden, dtype=self.dtype)(x))
        return nn.Dense(x.shape[-1], dtype=self.dtype)(y)


class Mixer(nn.Module):
    """Images [N, H, W, 3] to logits [N, num_classes], computed in ``dtype``."""

    patch: int = 16
    width: int = 768
    depth: int = 12
    tokens_hidden: int = 384
    channels_hidden: int = 3072
    num_classes: int = 1000
    dtype: Any = jnp.bfloat16

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        patch = (self.patch, self.patch)
        x = nn.Conv(self.width, patch, patch, dtype=self.dtype)(x)
        x = x.reshape(x.shape[0], -1, self.width)
        for _ in range(self.depth):
            y = nn.LayerNorm(dtype=self.dtype)(x).swapaxes(1, 2)
            x = x + Mlp(self.tokens_hidden, self.dtype)(y).swapaxes(1, 2)
            y = nn.LayerNorm(dtype=self.dtype)(x)
            x = x + Mlp(self.channels_hidden, self.dtype)(y)
        x = jnp.mean(nn.LayerNorm(dtype=self.dtype)(x), axis=1)
        return nn.Dense(self.num_classes, dtype=self.dtype)(x)
