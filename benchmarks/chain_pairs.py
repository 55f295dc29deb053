# SPDX-License-Identifier: Apache-2.0
"""The pairs that ``bench_chains.py`` measures: Bolt's, ResNet-50's and perceptrons'.

Everything here works on shapes, without a device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_bolt._src import chain, options, program
from jax_bolt._src.chain import ChainInfo

TABLE1, TABLE2, RESNET, PERCEPTRONS = "table1", "table2", "resnet50", "perceptrons"
GROUPS = (TABLE1, TABLE2, RESNET, PERCEPTRONS)

# M, N and K of the first product, N of the second, and the paper's speed-up (table 1,
# but for a row whose first product has one column: 40 kB in all).
_PRODUCTS = (
    (16384, 64, 256, 16, 1.34),
    (32768, 128, 576, 64, 1.28),
    (128320, 32, 96, 96, 1.46),
)
# Pixels per side, channels in and out of the 3x3 conv, its stride, and the paper's
# speed-up (table 2); the 1x1 conv keeps the channels.
_CONVS = (
    (224, 3, 48, 2, 1.10),
    (112, 48, 48, 2, 1.41),
    (56, 48, 48, 1, 1.87),
    (224, 3, 64, 2, 1.24),
    (112, 64, 64, 2, 1.12),
    (56, 64, 64, 1, 2.02),
)
# Pixels per side, narrow and wide channels of a stage's bottlenecks.
_STAGES = ((56, 64, 256), (28, 128, 512), (14, 256, 1024), (7, 512, 2048))
# Rows, channels, and hidden channels.
_PERCEPTRONS = (
    (100352, 96, 384),  # ConvNeXt-T's first two stages at batch 32
    (25088, 192, 768),
    (16384, 64, 256),
    (6304, 192, 768),  # ViT-Ti at batch 32
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two regions, the second over the first one's result; ``paper`` is a speed-up."""

    group: str
    name: str
    site: ChainInfo
    paper: float | None = None


def collect(groups: tuple[str, ...], batch: int, dtype: Any) -> list[Pair]:
    """The pairs of ``groups``, the batch that of images."""
    makers = {
        TABLE1: _table1,
        TABLE2: _table2,
        RESNET: _bottlenecks,
        PERCEPTRONS: _perceptrons,
    }
    return [
        Pair(group=group, name=name, site=_site(fun, args), paper=paper)
        for group in groups
        for name, fun, args, paper in makers[group](batch, jnp.dtype(dtype))
    ]


_Made = Iterator[tuple[str, Callable, tuple[Any, ...], float | None]]


def _site(fun: Callable, args: tuple[Any, ...]) -> ChainInfo:
    traced, _ = program.trace(fun, (), args, {}, options.Options())
    found = [each for group in chain.sequences(traced.program) for each in group]
    return max(found, key=lambda each: len(each.calls)).info


def _table1(batch: int, dtype: Any) -> _Made:
    del batch

    def fun(x: Any, first: Any, second: Any) -> Any:
        return jax.nn.relu(jax.nn.relu(x @ first) @ second)

    for m, n, k, then, paper in _PRODUCTS:
        args = (_like(dtype, m, k), _like(dtype, k, n), _like(dtype, n, then))
        yield f"{m}x{n}x{k} > {then}", fun, args, paper


def _table2(batch: int, dtype: Any) -> _Made:
    for side, c, k, stride, paper in _CONVS:

        def fun(x: Any, first: Any, second: Any, *biases: Any, stride=stride) -> Any:
            y = jax.nn.relu(_conv(x, first, stride) + _over(biases[0], dtype))
            return jax.nn.relu(_conv(y, second) + _over(biases[1], dtype))

        x = _like(dtype, batch, side, side, c)
        filters = _like(dtype, 3, 3, c, k), _like(dtype, 1, 1, k, k)
        vectors = (_like("float32", k),) * 2
        name = f"{batch}x{side}x{side} {c}>{k} 3x3 s{stride} > {k}"
        yield name, fun, (x, *filters, *vectors), paper


def _bottlenecks(batch: int, dtype: Any) -> _Made:
    """Expand, residual and relu of one bottleneck, and the reduction of the next; the
    same of a stage's first bottleneck, whose shortcut is projected; and the 3x3 conv of
    one with what expands it."""

    def joint(x: Any, residual: Any, up: Any, down: Any, *stats: Any) -> Any:
        y = jax.nn.relu(_norm(_conv(x, up), *stats[:4]) + residual)
        return jax.nn.relu(_norm(_conv(y, down), *stats[4:])), y

    def expand(x: Any, residual: Any, first: Any, up: Any, *stats: Any) -> Any:
        y = jax.nn.relu(_norm(_conv(x, first), *stats[:4]))
        return jax.nn.relu(_norm(_conv(y, up), *stats[4:]) + residual)

    def block(x: Any, wide: Any, up: Any, other: Any, down: Any, *stats: Any) -> Any:
        stride = wide.shape[1] // x.shape[1]
        y = _norm(_conv(x, up), *stats[:4]) + _norm(
            _conv(wide, other, stride), *stats[4:8]
        )
        y = jax.nn.relu(y)
        return jax.nn.relu(_norm(_conv(y, down), *stats[8:])), y

    for side, c, k in _STAGES:
        image = batch, side, side
        x, wide = _like(dtype, *image, c), _like(dtype, *image, k)
        up, down = _like(dtype, 1, 1, c, k), _like(dtype, 1, 1, k, c)
        stats = (_like("float32", k),) * 4, (_like("float32", c),) * 4
        args = (x, wide, up, down, *stats[0], *stats[1])
        yield f"{batch}x{side}x{side} {c}>{k}+res > {c}", joint, args, None
        stride = 1 if c == _STAGES[0][1] else 2
        before = c if stride == 1 else k // 2
        wider = _like(dtype, batch, side * stride, side * stride, before)
        other = _like(dtype, 1, 1, before, k)
        args = (x, wider, up, other, down, *stats[0], *stats[0], *stats[1])
        name = f"{batch}x{side}x{side} {c}>{k} + {before}>{k} s{stride} > {c}"
        yield name, block, args, None
        args = (x, wide, _like(dtype, 3, 3, c, c), up, *stats[1], *stats[0])
        yield f"{batch}x{side}x{side} {c}>{c} 3x3 > {k}+res", expand, args, None


def _perceptrons(batch: int, dtype: Any) -> _Made:
    del batch

    def fun(x: Any, up: Any, down: Any, bias: Any, then: Any, residual: Any) -> Any:
        y = jax.nn.gelu(x @ up + bias.reshape(1, -1), approximate=False)
        return y @ down + then.reshape(1, -1) + residual

    for m, c, k in _PERCEPTRONS:
        dims = (m, c), (c, k), (k, c), (k,), (c,), (m, c)
        args = tuple(_like(dtype, *d) for d in dims)
        yield f"{m} {c}>{k} gelu > {c}+res", fun, args, None


def _like(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def _over(vector: Any, dtype: Any = jnp.float32) -> Any:
    return vector.reshape(1, 1, 1, -1).astype(dtype)


def _conv(x: Any, w: Any, stride: int = 1) -> Any:
    edge = (w.shape[0] // 2,) * 2
    return lax.conv_general_dilated(
        x, w, (stride, stride), (edge, edge), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _norm(y: Any, mean: Any, var: Any, scale: Any, offset: Any) -> Any:
    """Inference BatchNorm as Flax computes it."""
    wide = y.astype(jnp.float32) - _over(mean)
    wide = wide * (lax.rsqrt(_over(var) + 1e-5) * _over(scale)) + _over(offset)
    return wide.astype(y.dtype)
