# SPDX-License-Identifier: Apache-2.0
"""MobileNetV2 and MobileNetV3-Large: inverted bottlenecks around depthwise convs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

Activation = Callable[[jax.Array], jax.Array]


class Block(NamedTuple):
    """``expanded`` channels in the depthwise conv, of ``window`` x ``window``."""

    expanded: int
    features: int
    window: int = 3
    stride: int = 1
    squeeze: int = 0  # channels of the squeeze-and-excite part, 0 for none
    activation: Activation = nn.relu6


def rounded(channels: float, unit: int = 8) -> int:
    """To a multiple of ``unit`` that is not more than a tenth below."""
    nearest = max(unit, int(channels + unit / 2) // unit * unit)
    return nearest if nearest >= 0.9 * channels else nearest + unit


class SqueezeExcite(nn.Module):
    """Scales each image's channels by what their means say."""

    squeezed: int
    activation: Activation
    gate: Activation
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        s = jnp.mean(x, axis=(1, 2), keepdims=True)
        s = self.activation(nn.Conv(self.squeezed, (1, 1), dtype=self.dtype)(s))
        return x * self.gate(nn.Conv(x.shape[-1], (1, 1), dtype=self.dtype)(s))


class InvertedBottleneck(nn.Module):
    """1x1 up, depthwise, squeeze-and-excite, 1x1 down, and a shortcut."""

    block: Block
    gate: Activation
    dtype: Any
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        expanded, features, window, stride, squeeze, activation = self.block
        conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype)
        norm = functools.partial(
            nn.BatchNorm,
            use_running_average=True,
            epsilon=self.epsilon,
            dtype=self.dtype,
        )
        y = x
        if expanded != x.shape[-1]:
            y = activation(norm()(conv(expanded, (1, 1))(y)))
        y = conv(expanded, (window, window), stride, feature_group_count=expanded)(y)
        y = activation(norm()(y))
        if squeeze:
            act = nn.silu if activation is nn.silu else nn.relu
            y = SqueezeExcite(squeeze, act, self.gate, self.dtype)(y)
        y = norm()(conv(features, (1, 1))(y))
        return x + y if x.shape == y.shape else y


class MobileNet(nn.Module):
    """Images [N, H, W, 3] to logits [N, num_classes], computed in ``dtype``.

    ``hidden`` is the width of the dense layer before the last, 0 where there is none.
    """

    blocks: Sequence[Block]
    stem: int
    last: int
    hidden: int = 0
    activation: Activation = nn.relu6
    gate: Activation = nn.hard_sigmoid
    epsilon: float = 1e-5
    num_classes: int = 1000
    dtype: Any = jnp.bfloat16

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = self._conv(x, self.stem, (3, 3), 2)
        for block in self.blocks:
            x = InvertedBottleneck(block, self.gate, self.dtype, self.epsilon)(x)
        x = self._conv(x, self.last, (1, 1), 1)
        x = jnp.mean(x, axis=(1, 2))
        if self.hidden:
            x = self.activation(nn.Dense(self.hidden, dtype=self.dtype)(x))
        return nn.Dense(self.num_classes, dtype=self.dtype)(x)

    def _conv(self, x: jax.Array, features: int, window: Any, stride: int) -> jax.Array:
        conv = nn.Conv(features, window, stride, use_bias=False, dtype=self.dtype)
        norm = nn.BatchNorm(
            use_running_average=True, epsilon=self.epsilon, dtype=self.dtype
        )
        return self.activation(norm(conv(x)))


def _repeated(
    stem: int, rows: Sequence[tuple[int, int, int, int]]
) -> tuple[Block, ...]:
    """From rows of expansion, features, repeats and first stride."""
    blocks: list[Block] = []
    before = stem
    for expansion, features, repeats, stride in rows:
        for index in range(repeats):
            first = stride if index == 0 else 1
            blocks.append(Block(expansion * before, features, stride=first))
            before = features
    return tuple(blocks)


_V2 = (
    *((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2)),
    *((6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)),
)
_HARD, _RELU = nn.hard_swish, nn.relu
_V3 = (
    Block(16, 16, 3, 1, 0, _RELU),
    Block(64, 24, 3, 2, 0, _RELU),
    Block(72, 24, 3, 1, 0, _RELU),
    Block(72, 40, 5, 2, 24, _RELU),
    Block(120, 40, 5, 1, 32, _RELU),
    Block(120, 40, 5, 1, 32, _RELU),
    Block(240, 80, 3, 2, 0, _HARD),
    Block(200, 80, 3, 1, 0, _HARD),
    Block(184, 80, 3, 1, 0, _HARD),
    Block(184, 80, 3, 1, 0, _HARD),
    Block(480, 112, 3, 1, 120, _HARD),
    Block(672, 112, 3, 1, 168, _HARD),
    Block(672, 160, 5, 2, 168, _HARD),
    Block(960, 160, 5, 1, 240, _HARD),
    Block(960, 160, 5, 1, 240, _HARD),
)

MobileNetV2 = functools.partial(
    MobileNet, blocks=_repeated(32, _V2), stem=32, last=1280
)
MobileNetV3 = functools.partial(
    MobileNet,
    blocks=_V3,
    stem=16,
    last=960,
    hidden=1280,
    activation=_HARD,
    epsilon=1e-3,
)
