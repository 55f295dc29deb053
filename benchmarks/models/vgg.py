# SPDX-License-Identifier: Apache-2.0
"""VGG-16 (configuration D) for inference: dropout, being off, is left out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class VGG(nn.Module):
    """Images [N, H, W, 3] to logits [N, num_classes], computed in ``dtype``.

    ``stages`` holds (convs, features) for each run of convs that ends in a pooling.
    """

    stages: Sequence[tuple[int, int]] = (
        (2, 64),
        (2, 128),
        (3, 256),
        (3, 512),
        (3, 512),
    )
    hidden: int = 4096
    num_classes: int = 1000
    dtype: Any = jnp.bfloat16

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for convs, features in self.stages:
            for _ in range(convs):
                x = nn.relu(nn.Conv(features, (3, 3), dtype=self.dtype)(x))
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = x.reshape((x.shape[0], -1))
        for _ in range(2):
            x = nn.relu(nn.Dense(self.hidden, dtype=self.dtype)(x))
        return nn.Dense(self.num_classes, dtype=self.dtype)(x)
