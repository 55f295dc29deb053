# SPDX-License-Identifier: Apache-2.0
"""U-Net with padded convs: down by pooling, up by transposed convs, joined by skips."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class UNet(nn.Module):
    """Images [N, H, W, 3] to logits [N, H, W, num_classes], computed in ``dtype``.

    H and W are multiples of ``2**depth``.
    """

    width: int = 64
    depth: int = 4
    num_classes: int = 2
    dtype: Any = jnp.bfloat16

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        skips = []
        for level in range(self.depth):
            x = self._twice(x, self.width * 2**level)
            skips.append(x)
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = self._twice(x, self.width * 2**self.depth)
        for level in reversed(range(self.depth)):
            features = self.width * 2**level
            x = nn.ConvTranspose(features, (2, 2), (2, 2), dtype=self.dtype)(x)
            x = self._twice(jnp.concatenate([skips[level], x], axis=-1), features)
        return nn.Conv(self.num_classes, (1, 1), dtype=self.dtype)(x)

    def _twice(self, x: jax.Array, features: int) -> jax.Array:
        for _ in range(2):
            x = nn.Conv(features, (3, 3), use_bias=False, dtype=self.dtype)(x)
            norm = nn.BatchNorm(use_running_average=True, dtype=self.dtype)
            x = nn.relu(norm(x))
        return x
