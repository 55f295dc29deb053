# SPDX-License-Identifier: Apache-2.0
"""Programs of two roots, the second over the channels of the first one's result; and
of three, the first of them a shortcut."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from region_cases import BF16, F16, F32, batch_norm, conv, over_channels, shape

from jax_bolt._src import chain, options, program
from jax_bolt._src.chain import ChainInfo


@dataclasses.dataclass(frozen=True)
class Case:
    """A function of one chain, all of it, and its arguments' shapes and dtypes."""

    name: str
    fun: Callable
    args: tuple[Any, ...]

    def __str__(self) -> str:
        return self.name

    def site(self) -> ChainInfo:
        traced = program.trace(self.fun, (), self.args, {}, options.Options())[0]
        found = [each for group in chain.sequences(traced.program) for each in group]
        return max(found, key=lambda each: len(each.calls)).info


def bottlenecks(x: Any, residual: Any, up: Any, down: Any, *stats: Any) -> Any:
    """Of a ResNet, between its 3x3 convs: expand, residual, relu, and reduce."""
    y = jax.nn.relu(batch_norm(conv(x, up), *stats[:4]) + residual)
    return jax.nn.relu(batch_norm(conv(y, down), *stats[4:])), y


def perceptron(x: Any, up: Any, bias: Any, down: Any, residual: Any) -> Any:
    """A feed-forward block; what is between is not needed elsewhere."""
    y = x @ up
    y = jax.nn.gelu(y + over_channels(bias, y).astype(y.dtype))
    return y @ down + residual


def pair(x: Any, first: Any, second: Any, *biases: Any, stride: int = 1) -> Any:
    """Two convs with biases and relus: Bolt's table 2."""
    y = conv(x, first, stride=stride)
    y = jax.nn.relu(y + over_channels(biases[0], y).astype(y.dtype))
    z = conv(y, second)
    return jax.nn.relu(z + over_channels(biases[1], z).astype(z.dtype))


def shortcut(a: Any, b: Any, wa: Any, wb: Any, *stats: Any, stride: int = 1) -> Any:
    """A ResNet's first block of a stage: both convs are projections."""
    y = batch_norm(conv(a, wa), *stats[:4])
    return jax.nn.relu(y + batch_norm(conv(b, wb, stride=stride), *stats[4:]))


def first_block(a: Any, b: Any, wa: Any, wb: Any, down: Any, *stats: Any, stride=1):
    """``shortcut``, and the next block's reduction."""
    y = shortcut(a, b, wa, wb, *stats[:8], stride=stride)
    return jax.nn.relu(batch_norm(conv(y, down), *stats[8:])), y


def bare(x: Any, first: Any, second: Any) -> Any:
    return (x @ first) @ second


def bare_transposed(x: Any, first: Any, second: Any) -> Any:
    return (x @ first.T) @ second.T


def _bottlenecks(n: int, side: int, c: int, k: int, then: int, dtype: Any = BF16):
    image = shape(n, side, side, c, dtype=dtype), shape(n, side, side, k, dtype=dtype)
    filters = shape(1, 1, c, k, dtype=dtype), shape(1, 1, k, then, dtype=dtype)
    stats = *(shape(k, dtype=F32),) * 4, *(shape(then, dtype=F32),) * 4
    name = f"bottlenecks-{jnp.dtype(dtype).name}-{n}x{side}x{side}-{c}-{k}-{then}"
    return Case(name, bottlenecks, (*image, *filters, *stats))


def _perceptron(m: int, c: int, k: int, then: int, dtype: Any = BF16):
    args = [shape(*d, dtype=dtype) for d in ((m, c), (c, k), (k, then), (m, then))]
    name = f"perceptron-{jnp.dtype(dtype).name}-{m}-{c}-{k}-{then}"
    args.insert(2, shape(k, dtype=F32))
    return Case(name, perceptron, tuple(args))


def _shortcut(
    n: int, side: int, ca: int, cb: int, k: int, stride: int = 1, dtype: Any = BF16
):
    a = shape(n, side, side, ca, dtype=dtype)
    b = shape(n, side * stride, side * stride, cb, dtype=dtype)
    filters = (shape(1, 1, c, k, dtype=dtype) for c in (ca, cb))
    name = f"shortcut-{jnp.dtype(dtype).name}-{n}x{side}x{side}-{ca}-{cb}-{k}s{stride}"
    fun = functools.partial(shortcut, stride=stride)
    return Case(name, fun, (a, b, *filters, *(shape(k, dtype=F32),) * 8))


def _first_block(
    n: int,
    side: int,
    ca: int,
    cb: int,
    k: int,
    then: int,
    stride: int = 1,
    dtype: Any = BF16,
):
    merged = _shortcut(n, side, ca, cb, k, stride, dtype)
    args = [*merged.args, *(shape(then, dtype=F32),) * 4]
    args.insert(4, shape(1, 1, k, then, dtype=dtype))
    name = f"{merged.name.replace('shortcut', 'first_block')}-{then}"
    fun = functools.partial(first_block, stride=stride)
    return Case(name, fun, tuple(args))


def _bare(m: int, c: int, k: int, then: int, transposed: bool = False):
    name = f"bare{'-transposed' * transposed}-{m}-{c}-{k}-{then}"
    dims = [(c, k), (k, then)]
    filters = [shape(*(d[::-1] if transposed else d)) for d in dims]
    fun = bare_transposed if transposed else bare
    return Case(name, fun, (shape(m, c), *filters))


def _pair(n: int, side: int, c: int, k: int, then: int, taps: int, stride: int = 1):
    args = shape(n, side, side, c), shape(taps, taps, c, k), shape(1, 1, k, then)

    def fun(*args: Any) -> Any:
        return pair(*args, stride=stride)

    name = f"pair-{n}x{side}x{side}-{c}-{k}-{then}-{taps}x{taps}s{stride}"
    return Case(name, fun, (*args, shape(k, dtype=F32), shape(then, dtype=F32)))


CASES = [
    _bottlenecks(3, 14, 64, 256, 64),
    _bottlenecks(5, 7, 128, 512, 128, F16),
    _bottlenecks(1, 9, 256, 1024, 256),
    _bottlenecks(2, 56, 64, 256, 128),
    _perceptron(1000, 96, 384, 96),
    _perceptron(333, 192, 768, 192, F16),
    _perceptron(4100, 64, 200, 40),
    _bare(1, 8, 8, 8),
    _bare(2464, 64, 128, 72),
    _bare(777, 576, 128, 64),
    _bare(130, 96, 32, 96, transposed=True),
    _bare(65, 264, 328, 136, transposed=True),
    _pair(3, 14, 48, 48, 48, 3),
    _pair(2, 56, 64, 64, 64, 3),
    _pair(3, 28, 48, 48, 48, 3, stride=2),
    _pair(2, 15, 64, 64, 200, 3, stride=2),
    _pair(2, 32, 3, 48, 48, 3, stride=2),
    _pair(5, 7, 128, 64, 256, 3),
    _pair(2, 14, 24, 72, 24, 5),
]
MERGED = [
    _shortcut(3, 14, 64, 64, 256),
    _shortcut(5, 7, 128, 256, 512, stride=2),
    _shortcut(2, 9, 200, 72, 136, stride=2, dtype=F16),
    _shortcut(1, 3, 8, 24, 8),
    _shortcut(33, 8, 64, 320, 72, stride=3),
]
JOINED = [
    _first_block(3, 14, 64, 64, 256, 64),
    _first_block(5, 7, 128, 256, 512, 128, stride=2),
    _first_block(2, 9, 200, 72, 136, 40, stride=2, dtype=F16),
    _first_block(1, 3, 8, 24, 8, 8),
    _first_block(2, 56, 64, 64, 256, 64),
]
