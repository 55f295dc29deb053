# SPDX-License-Identifier: Apache-2.0
"""Regions that exercise every template: ragged sizes, dtypes, layouts, epilogues."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_bolt._src import ir, options, rewrite
from jax_bolt._src.primitive import SiteInfo

BF16, F16, F32 = jnp.bfloat16, jnp.float16, jnp.float32


@dataclasses.dataclass(frozen=True)
class Case:
    """A function with one root, and the shapes and dtypes of its arguments."""

    name: str
    fun: Callable
    args: tuple[Any, ...]

    def __str__(self) -> str:
        return self.name

    def site(self) -> SiteInfo:
        program = jax.make_jaxpr(self.fun)(*self.args)
        (site,) = rewrite.rewrite(program, options.Options()).family.sites
        return site


def shape(*dims: int, dtype: Any = BF16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, dtype)


def over_channels(v: Any, y: Any) -> Any:
    return v.reshape((1,) * (y.ndim - 1) + (-1,))


def batch_norm(y: Any, mean: Any, var: Any, scale: Any, offset: Any) -> Any:
    """Inference BatchNorm as Flax writes it: in float32, statistics live."""
    mean, var, scale, offset = (over_channels(v, y) for v in (mean, var, scale, offset))
    wide = (y.astype(F32) - mean) * (lax.rsqrt(var + F32(1e-5)) * scale)
    return (wide + offset).astype(y.dtype)


def conv(
    x: Any,
    w: Any,
    stride: Any = 1,
    padding: Any = "SAME",
    dilation: int = 1,
    groups: int = 1,
):
    stride = (stride, stride) if isinstance(stride, int) else stride
    return lax.conv_general_dilated(
        x,
        w,
        stride,
        padding,
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def _norm_add_relu(y: Any, stats: Any, side: Any) -> Any:
    return jax.nn.relu(batch_norm(y, *stats) + side)


def _dense(m: int, k: int, n: int, dtype: Any = BF16) -> list[Case]:
    def norm_add_relu(x, w, side, *stats):
        return _norm_add_relu(x @ w, stats, side)

    def gelu(x, w, b):
        y = x @ w
        return jax.nn.gelu(y + over_channels(b, y).astype(y.dtype))

    vectors = (shape(n, dtype=F32),) * 4
    operands = (shape(m, k, dtype=dtype), shape(k, n, dtype=dtype))
    tag = f"{jnp.dtype(dtype).name}-{m}x{k}x{n}"
    return [
        Case(
            f"dense-bn-add-relu-{tag}",
            norm_add_relu,
            (*operands, shape(m, n, dtype=dtype), *vectors),
        ),
        Case(f"dense-gelu-{tag}", gelu, (*operands, vectors[0])),
    ]


def _plain(spec: str, a: tuple, b: tuple, dtype: Any = BF16) -> Case:
    name = f"{spec}-{jnp.dtype(dtype).name}-{'x'.join(map(str, (*a, *b)))}"
    args = (shape(*a, dtype=dtype), shape(*b, dtype=dtype))
    return Case(name, lambda x, y: jnp.einsum(spec, x, y), args)


def _conv(
    n, h, w, c, k, r, s, dtype: Any = BF16, bare: bool = False, **kw: Any
) -> Case:
    x = shape(n, h, w, c, dtype=dtype)
    f = shape(r, s, c // kw.get("groups", 1), k, dtype=dtype)
    out = jax.eval_shape(lambda x, f: conv(x, f, **kw), x, f)
    tag = f"{jnp.dtype(dtype).name}-{n}x{h}x{w}x{c}-{k}x{r}x{s}-{kw}"

    def fused(x, f, side, *stats):
        return _norm_add_relu(conv(x, f, **kw), stats, side)

    if bare:
        return Case(f"conv-{tag}", lambda x, f: conv(x, f, **kw), (x, f))
    args = (x, f, shape(*out.shape, dtype=dtype), *(shape(k, dtype=F32),) * 4)
    return Case(f"conv-bn-add-relu-{tag}", fused, args)


def depthwise_problem(
    n: int, h: int, w: int, c: int, r: int, s: int | None = None, **kw: Any
) -> ir.ConvProblem:
    """As the kernel takes it; by default square, padded to keep the size."""
    s = r if s is None else s
    default: dict[str, Any] = {"k": c, "groups": c, "filter_layout": "hwio"}
    default |= {"padding": (r // 2, r // 2, s // 2, s // 2), "dtype": "bf16"}
    return ir.ConvProblem(n=n, h=h, w=w, c=c, r=r, s=s, **default | kw)


def _depthwise(
    n, h, w, c, r, s, dtype: Any = BF16, act: Any = None, multiplier: int = 1, **kw: Any
) -> Case:
    """A depthwise conv, BatchNorm and an activation; or relu and a side input."""
    k = c * multiplier
    x, f = shape(n, h, w, c, dtype=dtype), shape(r, s, 1, k, dtype=dtype)
    kw["groups"] = c
    out = jax.eval_shape(lambda x, f: conv(x, f, **kw), x, f)
    name = "add-relu" if act is None else act.__name__
    tag = f"{name}-{jnp.dtype(dtype).name}-{n}x{h}x{w}x{c}-{k}x{r}x{s}-{kw}"
    stats = (shape(k, dtype=F32),) * 4

    def with_side(x, f, side, *stats):
        return _norm_add_relu(conv(x, f, **kw), stats, side)

    if act is None:
        side = shape(*out.shape, dtype=dtype)
        return Case(f"depthwise-{tag}", with_side, (x, f, side, *stats))

    def activated(x, f, *stats):
        return act(batch_norm(conv(x, f, **kw), *stats))

    return Case(f"depthwise-{tag}", activated, (x, f, *stats))


def _wide(case: Case) -> Case:
    """``case`` with a float32 result."""

    def fun(*args):
        return case.fun(*args).astype(F32)

    return Case(f"{case.name}-to-f32", fun, case.args)


def _wide_side() -> Case:
    def fun(x, w, narrow, wide):
        return (x @ w).astype(F32) * narrow.astype(F32) + wide

    sides = (shape(90, 72), shape(90, 72, dtype=F32))
    return Case("f32-side", fun, (shape(90, 136), shape(136, 72), *sides))


def _two_sides() -> Case:
    def fun(x, w, a, b, keep, temperature):
        y = jax.nn.silu(x @ w + a) * b
        keep = jnp.broadcast_to(keep, y.shape)
        return jnp.where(keep > 0, y, -y) / temperature.astype(y.dtype)

    n = 40
    args = (
        *(shape(77, 24), shape(24, n), shape(77, n), shape(77, n)),
        *(shape(1, n, dtype=F32), shape(dtype=F32)),
    )
    return Case("two-sides", fun, args)


def _pooled(size: int, every: int, around: Any, *sizes: Any, **kw: Any) -> Case:
    """A conv of such sizes, BatchNorm and relu, and a maximum over square windows."""
    n, h, w, c, k, r, s, *dtype = sizes
    of: Any = dtype[0] if dtype else BF16

    def fun(x, f, *stats):
        y = jax.nn.relu(batch_norm(conv(x, f, **kw), *stats))
        lowest = np.array(-np.inf, y.dtype)
        window, strides = (1, size, size, 1), (1, every, every, 1)
        return lax.reduce_window(y, lowest, lax.max, window, strides, around)

    tag = f"{jnp.dtype(of).name}-{n}x{h}x{w}x{c}-{k}x{r}x{s}-{kw}"
    args = (shape(n, h, w, c, dtype=of), shape(r, s, c, k, dtype=of))
    stats = (shape(k, dtype=F32),) * 4
    return Case(f"conv-{tag}-max{size}-{every}-{around}", fun, (*args, *stats))


def _averaged(average: Callable, *sizes: Any, **kw: Any) -> Case:
    """A conv of such sizes, BatchNorm, a residual and relu, and the mean of that."""
    n, h, w, c, k, r, s, *dtype = sizes
    of: Any = dtype[0] if dtype else BF16
    args = (shape(n, h, w, c, dtype=of), shape(r, s, c, k, dtype=of))
    out = jax.eval_shape(lambda x, f: conv(x, f, **kw), *args)

    def fun(x, f, side, *stats):
        return average(_norm_add_relu(conv(x, f, **kw), stats, side))

    tag = f"{jnp.dtype(of).name}-{n}x{h}x{w}x{c}-{k}x{r}x{s}-{kw}"
    stats = (shape(k, dtype=F32),) * 4
    side = shape(*out.shape, dtype=of)
    return Case(f"conv-{tag}-{average.__name__}", fun, (*args, side, *stats))


def _mean(y: Any) -> Any:
    return jnp.mean(y, axis=(1, 2))


def _mean_kept(y: Any) -> Any:
    return jnp.mean(y, axis=(1, 2), keepdims=True)


def _mean_of_float32(y: Any) -> Any:
    return jnp.mean(y.astype(F32), axis=(1, 2))


def _mean_as_window(y: Any) -> Any:
    """As Flax's ``avg_pool`` over the whole image."""
    window = (1, *y.shape[1:3], 1)
    return lax.reduce_window(y, 0.0, lax.add, window, window, "VALID") / (
        y.shape[1] * y.shape[2]
    )


def _stores_sum(case: Case, dtype: Any = None) -> Case:
    """``case``, a root alone, in a block of a pre-activation ResNet: the sum with the
    residual is stored, and what BatchNorm and relu make of it.

    With a ``dtype`` the sum is of that one.
    """
    out = jax.eval_shape(case.fun, *case.args)
    vectors = (shape(out.shape[-1], dtype=F32),) * 4

    def fun(a, b, side, *stats):
        total = case.fun(a, b) + side
        total = total.astype(dtype or total.dtype)
        return total, jax.nn.relu(batch_norm(total, *stats)).astype(side.dtype)

    tag = "" if dtype is None else f"-{jnp.dtype(dtype).name}"
    args = (*case.args, shape(*out.shape, dtype=out.dtype), *vectors)
    return Case(f"{case.name}-stores-sum{tag}", fun, args)


def _stores_product(m: int, k: int, n: int, dtype: Any = BF16) -> Case:
    """What a hidden layer leaves for the backward pass: before and after the bias and
    the activation."""

    def fun(x, w, b):
        y = x @ w
        return y, jax.nn.gelu(y + over_channels(b, y).astype(y.dtype))

    args = (shape(m, k, dtype=dtype), shape(k, n, dtype=dtype), shape(n, dtype=F32))
    return Case(f"stores-product-{jnp.dtype(dtype).name}-{m}x{k}x{n}", fun, args)


def _masked() -> Case:
    def fun(x, w, keep):
        return jnp.where(keep, x @ w, BF16(-1e4))

    args = (shape(33, 16), shape(16, 24), shape(33, 24, dtype=jnp.bool_))
    return Case("bool-side", fun, args)


GEMMS = [
    *_dense(300, 200, 264),
    *_dense(1, 8, 8),
    *_dense(129, 40, 72),
    *_dense(77, 72, 1000, F16),
    *_dense(65, 33, 51),
    *_dense(130, 36, 70),
    *_dense(100, 28, 60, F32),
    *_dense(300, 200, 264, F32),
    *_dense(2050, 200, 520),
    *_dense(4100, 264, 776),
    _plain("mk,nk->mn", (150, 72), (40, 72)),
    _plain("km,kn->mn", (72, 152), (72, 40)),
    _plain("bmk,bkn->bmn", (3, 70, 24), (3, 24, 48)),
    _plain("bkm,bnk->bmn", (3, 24, 72), (3, 40, 24)),
    _plain("mk,kn->mn", (70, 24), (24, 48), F32),
    _two_sides(),
    _wide_side(),
    _masked(),
    # Long sums on few tiles, which may be split over the CTAs of a cluster.
    *_dense(40, 1000, 136),
    _dense(40, 1000, 136, F32)[0],
    _wide(_dense(70, 520, 72)[0]),
    _wide(_dense(300, 72, 200)[1]),
    # Auxiliary outputs.
    _stores_product(300, 200, 264),
    _stores_product(65, 33, 51),
    _stores_product(130, 36, 70, F16),
    _stores_product(100, 28, 60, F32),
    _stores_product(40, 1000, 136),
    _stores_sum(_plain("bmk,bkn->bmn", (3, 70, 24), (3, 24, 48))),
]
CONVS = [
    _conv(1, 7, 9, 64, 64, 3, 3),
    _conv(2, 15, 13, 64, 128, 3, 3, stride=2),
    _conv(3, 8, 8, 8, 24, 3, 3, F16),
    _conv(2, 9, 11, 16, 40, 5, 3, padding=((0, 3), (2, 0)), dilation=2),
    _conv(2, 14, 14, 48, 48, 3, 3, stride=(2, 1)),
    _conv(2, 12, 10, 46, 33, 3, 3),
    _conv(2, 33, 31, 3, 64, 7, 7, stride=2, padding=((3, 3), (3, 3))),
    _conv(2, 33, 31, 3, 48, 3, 3, stride=2),
    _conv(2, 9, 9, 3, 16, 3, 3),
    _conv(1, 8, 8, 32, 64, 1, 1, stride=2),
    _conv(2, 7, 7, 24, 40, 1, 1),
    _conv(2, 10, 10, 12, 20, 3, 3, F32),
    _conv(2, 15, 13, 64, 72, 3, 3, F32, stride=2),
    _conv(2, 6, 6, 64, 64, 3, 3, bare=True, padding="VALID"),
    # What the Hopper family cuts differently: whole images, columns, folded strides,
    # stepped strides, padding wider than the filter's reach.
    _conv(5, 7, 7, 128, 192, 3, 3),
    _conv(1, 5, 300, 64, 64, 3, 3),
    _conv(2, 28, 28, 128, 128, 3, 3, stride=2, padding=((1, 1), (1, 1))),
    _conv(3, 15, 17, 24, 40, 3, 3, stride=2, padding=((1, 1), (1, 1))),
    _conv(2, 9, 11, 64, 64, 3, 3, F16, padding=((2, 2), (2, 2))),
    # Packed by its prologue: patches, other channel counts.
    _conv(2, 16, 20, 3, 96, 4, 4, stride=4, padding="VALID"),
    _conv(1, 9, 14, 12, 40, 3, 3, F16),
    _conv(1, 7, 7, 320, 200, 3, 3),
    _wide(_conv(3, 7, 7, 256, 72, 3, 3, stride=2)),
    # Gathered by TMA, across the ends of rows and images.
    _conv(3, 21, 23, 64, 136, 1, 1, stride=2),
    _conv(5, 14, 15, 320, 72, 1, 1, F16, stride=(3, 2), padding=((1, 0), (1, 2))),
    # Of their last 64 input channels (32 of float32) some are not there.
    _conv(2, 14, 14, 96, 96, 3, 3),
    _conv(3, 15, 13, 112, 64, 3, 3, F16, stride=2),
    _conv(1, 7, 7, 464, 96, 3, 3),
    _conv(2, 9, 9, 100, 24, 3, 3, F32),
    # Auxiliary outputs.
    _stores_sum(_conv(2, 15, 13, 64, 128, 3, 3, bare=True, stride=2)),
    _stores_sum(_conv(1, 7, 7, 320, 200, 3, 3, bare=True)),
    _stores_sum(_conv(5, 7, 7, 128, 192, 3, 3, bare=True), F32),
    _stores_sum(_conv(2, 12, 10, 46, 33, 3, 3, bare=True)),
    _stores_sum(_conv(2, 9, 11, 16, 40, 5, 3, F16, bare=True)),
    _stores_sum(_conv(2, 10, 10, 12, 20, 3, 3, F32, bare=True)),
]
# Groups of several channels: merged until they have 64 outputs, or all; or wide enough.
GROUPED = [
    _conv(2, 15, 13, 128, 128, 3, 3, groups=32),
    _conv(3, 14, 14, 192, 384, 3, 3, F16, groups=6, stride=2),
    _conv(2, 9, 11, 72, 72, 3, 3, groups=3),
    _conv(2, 10, 9, 256, 256, 3, 3, groups=2, dilation=2),
    _conv(3, 13, 15, 256, 128, 1, 1, groups=8, stride=2),
    _conv(1, 7, 7, 320, 640, 3, 3, groups=10, padding="VALID", bare=True),
    _conv(2, 9, 10, 192, 128, 3, 3, groups=2),
]
CONVS += GROUPED
# A pool of the result: stems, whole images, rows and columns, and what no kernel pools.
ONE = ((0, 0), (1, 1), (1, 1), (0, 0))
POOLED = [
    _pooled(3, 2, ONE, 2, 33, 31, 3, 64, 7, 7, stride=2, padding=((3, 3), (3, 3))),
    _pooled(3, 2, "SAME", 1, 65, 70, 3, 24, 7, 7, F16, stride=2),
    _pooled(2, 2, "VALID", 2, 28, 28, 64, 64, 3, 3),
    _pooled(2, 2, "VALID", 1, 21, 150, 64, 72, 3, 3),
    _pooled(3, 2, "SAME", 3, 15, 13, 64, 136, 3, 3, F16),
    _pooled(3, 1, "SAME", 5, 7, 7, 128, 192, 3, 3),
    _pooled(3, 2, "VALID", 2, 29, 30, 64, 64, 3, 3, stride=2),
    _pooled(2, 2, "VALID", 2, 14, 14, 24, 40, 1, 1),
    _pooled(2, 2, "VALID", 2, 12, 10, 46, 33, 3, 3),
]
CONVS += POOLED
# The mean of each image: one to a block or several, in boxes with and without gaps.
AVERAGED = [
    _averaged(_mean, 5, 7, 7, 64, 136, 1, 1),
    _averaged(_mean, 9, 7, 7, 128, 200, 3, 3),
    _averaged(_mean_kept, 7, 4, 4, 64, 72, 3, 3, F16),
    _averaged(_mean_as_window, 3, 14, 14, 24, 136, 3, 3, F16, stride=2),
    _averaged(_mean_of_float32, 3, 8, 9, 64, 72, 1, 1),
    _averaged(_mean, 5, 7, 7, 64, 136, 1, 1, F32),
    _averaged(_mean, 3, 9, 8, 12, 64, 3, 3, F32),
    _averaged(_mean, 2, 24, 20, 16, 64, 3, 3),
    _averaged(_mean, 2, 12, 10, 46, 33, 3, 3),
]
CONVS += AVERAGED
SAME3, SAME5, SAME7 = (((i, i), (i, i)) for i in (1, 2, 3))
DEPTHWISE = [
    _depthwise(2, 15, 13, 40, 3, 3),
    _depthwise(2, 28, 28, 96, 3, 3, F16, jax.nn.relu6),
    _depthwise(3, 15, 17, 72, 3, 3, act=jax.nn.relu6, stride=2, padding=SAME3),
    _depthwise(2, 14, 14, 48, 5, 5, F16, jax.nn.silu, stride=2, padding=SAME5),
    _depthwise(1, 28, 13, 240, 5, 5, act=jax.nn.silu, stride=2),
    _depthwise(2, 28, 30, 96, 7, 7, padding=SAME7),
    _depthwise(5, 7, 7, 136, 7, 7, F16, padding=SAME7),
    _depthwise(3, 14, 14, 72, 7, 7, padding=SAME7),
    _depthwise(2, 15, 13, 40, 5, 5, F16, jax.nn.silu),
    _depthwise(2, 12, 11, 32, 3, 3, act=jax.nn.silu, dilation=2),
    _depthwise(1, 17, 19, 24, 3, 3, dilation=2, stride=2, padding=((3, 1), (0, 4))),
    # Channels of no 16 bytes: copied in pieces of 8, 4 and 2.
    _depthwise(2, 9, 10, 36, 3, 3, act=jax.nn.relu6),
    _depthwise(2, 9, 10, 50, 3, 3, F16),
    _depthwise(2, 9, 10, 33, 3, 3, act=jax.nn.silu),
    # Padding beyond the filter's reach, several outputs of an input channel, a filter
    # in shared memory, strides that skip rows.
    _depthwise(1, 5, 6, 16, 3, 3, padding=((4, 5), (3, 4))),
    _depthwise(2, 9, 8, 20, 3, 3, multiplier=3),
    _depthwise(1, 20, 18, 24, 13, 13),
    _depthwise(1, 17, 16, 24, 2, 2, stride=(4, 3), padding="VALID"),
    _depthwise(2, 13, 12, 20, 3, 3, F32),
    _depthwise(2, 14, 13, 33, 5, 5, F32, jax.nn.silu, stride=2),
    _wide(_depthwise(2, 14, 13, 32, 3, 3)),
    _depthwise(1, 40, 60, 64, 3, 5, stride=(1, 2)),
]
CONVS += DEPTHWISE
