# SPDX-License-Identifier: Apache-2.0
"""ResNet-50 v2: BatchNorm and relu stand before each conv, not after it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Layer = Callable[..., Any]


class Bottleneck(nn.Module):
    """1x1 down, 3x3, 1x1 up to four times the features, each on an activation."""

    features: int
    strides: tuple[int, int]
    conv: Layer
    norm: Layer

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        wide = 4 * self.features
        y = nn.relu(self.norm()(x))
        shortcut = x
        if x.shape[-1] != wide or self.strides != (1, 1):
            shortcut = self.conv(wide, (1, 1), self.strides, name="shortcut_conv")(y)
        y = self.conv(self.features, (1, 1))(y)
        y = self.conv(self.features, (3, 3), self.strides)(nn.relu(self.norm()(y)))
        y = self.conv(wide, (1, 1))(nn.relu(self.norm()(y)))
        return shortcut + y


class ResNetV2(nn.Module):
    """Images [N, H, W, 3] to logits [N, num_classes], computed in ``dtype``."""

    stages: Sequence[int] = (3, 4, 6, 3)
    num_classes: int = 1000
    width: int = 64
    dtype: Any = jnp.bfloat16

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype)
        norm = functools.partial(
            nn.BatchNorm, use_running_average=True, epsilon=1e-5, dtype=self.dtype
        )
        x = conv(self.width, (7, 7), (2, 2), padding=((3, 3), (3, 3)), name="stem")(x)
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        for stage, blocks in enumerate(self.stages):
            for index in range(blocks):
                strides = (2, 2) if stage > 0 and index == 0 else (1, 1)
                x = Bottleneck(self.width * 2**stage, strides, conv, norm)(x)
        x = nn.relu(norm(name="last_norm")(x))
        x = jnp.mean(x, axis=(1, 2))
        return nn.Dense(self.num_classes, dtype=self.dtype)(x)
