# SPDX-License-Identifier: Apache-2.0
"""ResNet-18, ResNet-50 and its wide form, v1.5 (the stride sits in the 3x3 conv)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Layer = Callable[..., Any]


class BasicBlock(nn.Module):
    """Two 3x3 convs and a shortcut."""

    features: int
    strides: tuple[int, int]
    conv: Layer
    norm: Layer
    widen: int = 1

    expansion = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shortcut = x
        features = self.features * self.widen
        y = self.conv(features, (3, 3), self.strides)(x)
        y = nn.relu(self.norm()(y))
        y = self.conv(features, (3, 3))(y)
        y = self.norm()(y)
        if shortcut.shape != y.shape:
            shortcut = self.conv(features, (1, 1), self.strides, name="shortcut_conv")(
                shortcut
            )
            shortcut = self.norm(name="shortcut_norm")(shortcut)
        return nn.relu(shortcut + y)


class Bottleneck(nn.Module):
    """1x1 down, 3x3, 1x1 up to four times the features, and a shortcut.

    ``widen`` times the features in between.
    """

    features: int
    strides: tuple[int, int]
    conv: Layer
    norm: Layer
    widen: int = 1

    expansion = 4

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shortcut = x
        wide = self.features * self.expansion
        inner = self.features * self.widen
        y = nn.relu(self.norm()(self.conv(inner, (1, 1))(x)))
        y = nn.relu(self.norm()(self.conv(inner, (3, 3), self.strides)(y)))
        y = self.norm()(self.conv(wide, (1, 1))(y))
        if shortcut.shape != y.shape:
            shortcut = self.conv(wide, (1, 1), self.strides, name="shortcut_conv")(
                shortcut
            )
            shortcut = self.norm(name="shortcut_norm")(shortcut)
        return nn.relu(shortcut + y)


class ResNet(nn.Module):
    """Images [N, H, W, 3] to logits [N, num_classes], computed in ``dtype``.

    Parameters and running statistics are float32; Flax casts them at every call.
    """

    block: type[BasicBlock] | type[Bottleneck]
    stages: Sequence[int]
    num_classes: int = 1000
    width: int = 64
    widen: int = 1
    dtype: Any = jnp.bfloat16

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype)
        norm = functools.partial(
            nn.BatchNorm, use_running_average=True, epsilon=1e-5, dtype=self.dtype
        )
        x = conv(self.width, (7, 7), (2, 2), padding=((3, 3), (3, 3)), name="stem")(x)
        x = nn.relu(norm(name="stem_norm")(x))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        for stage, blocks in enumerate(self.stages):
            for index in range(blocks):
                strides = (2, 2) if stage > 0 and index == 0 else (1, 1)
                features = self.width * 2**stage
                x = self.block(features, strides, conv, norm, self.widen)(x)
        x = jnp.mean(x, axis=(1, 2))
        return nn.Dense(self.num_classes, dtype=self.dtype)(x)


ResNet18 = functools.partial(ResNet, block=BasicBlock, stages=(2, 2, 2, 2))
ResNet50 = functools.partial(ResNet, block=Bottleneck, stages=(3, 4, 6, 3))
WideResNet50 = functools.partial(ResNet50, widen=2)
