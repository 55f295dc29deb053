# SPDX-License-Identifier: Apache-2.0
"""Models in other layouts than the kernels': results, and the transposes left."""

from __future__ import annotations

import collections
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jax_bolt
from jax_bolt._src import options, program, views
from jax_bolt._src.compat import ClosedJaxpr

NCHW = ("NCHW", "OIHW", "NCHW")


def normal(seed: int, *dims: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), dims, jnp.float32)


def conv(x: Any, w: Any, stride: int = 1, numbers: Any = NCHW) -> Any:
    return lax.conv_general_dilated(
        x, w, (stride, stride), "SAME", dimension_numbers=numbers
    )


def norm(x: Any, p: Any) -> Any:
    """BatchNorm as in a model ported from PyTorch."""
    mean, var, scale, bias = (v[None, :, None, None] for v in p)
    return (x - mean) * (lax.rsqrt(var + 1e-5) * scale) + bias


def norm_params(seed: int, channels: int) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(seed), 4)
    draw = [jax.random.uniform(k, (channels,), jnp.float32, 0.5, 1.5) for k in keys]
    return tuple(draw)


def max_pool(x: Any) -> Any:
    return lax.reduce_window(
        x,
        -jnp.inf,
        lax.max,
        (1, 1, 3, 3),
        (1, 1, 2, 2),
        [(0, 0), (0, 0), (1, 1), (1, 1)],
    )


def parameters() -> dict[str, Any]:
    return {
        "w": [
            normal(1, 8, 16, 3, 3),
            normal(2, 8, 8, 3, 3),
            normal(3, 8, 8, 1, 1),
            normal(4, 24, 16, 1, 1),
        ],
        "n": [norm_params(i, c) for i, c in enumerate((8, 8, 8, 24))],
        "dense": normal(9, 24, 8),
    }


def model(p: Any, x: Any) -> Any:
    """A stem, a residual block, a concatenation, and a head: NCHW throughout."""
    y = max_pool(jax.nn.relu(norm(conv(x, p["w"][0], 2), p["n"][0])))
    z = jax.nn.relu(norm(conv(y, p["w"][1]), p["n"][1]))
    z = jax.nn.relu(norm(conv(z, p["w"][2]), p["n"][2]) + y)
    z = jnp.concatenate([z, y], axis=1)
    z = jax.nn.relu(norm(conv(z, p["w"][3]), p["n"][3]))
    return z.mean(axis=(2, 3)) @ p["dense"]


ARGS = parameters(), normal(0, 2, 16, 17, 15)


def rewritten(fun: Any, *args: Any) -> Any:
    return program.trace(fun, (), args, {}, options.Options())[0]


def primitives(done: ClosedJaxpr) -> collections.Counter[str]:
    return collections.Counter(e.primitive.name for e in done.jaxpr.eqns)


def close(got: Any, want: Any, bound: float = 1e-5) -> None:
    got, want = (np.asarray(v, np.float64) for v in (got, want))
    assert np.linalg.norm(got - want) <= bound * np.linalg.norm(want)


def test_a_depthwise_conv_between_pointwise_ones():
    """An inverted residual block in NCHW: transposes of its input, for either reader,
    of its result and of the three filters."""

    def block(x: Any, wide: Any, w: Any, narrow: Any, scale: Any) -> Any:
        y = jax.nn.relu6(conv(x, wide))
        y = lax.conv_general_dilated(
            y, w, (1, 1), "SAME", dimension_numbers=NCHW, feature_group_count=24
        )
        y = jax.nn.relu6(y * scale[None, :, None, None])
        return conv(y, narrow) + x

    args = (
        *(normal(0, 2, 8, 7, 9), normal(1, 24, 8, 1, 1), normal(2, 24, 1, 3, 3)),
        *(normal(3, 8, 24, 1, 1), normal(4, 24)),
    )
    done = rewritten(block, *args)
    assert [site.label for site in done.family.sites] == [
        *("conv1x1+relu", "depthwise3x3+affine+relu", "conv1x1+add")
    ]
    assert primitives(done.program)["transpose"] == 6
    assert not primitives(done.program)["conv_general_dilated"]
    close(jax_bolt.optimize(block)(*args), block(*args))


def test_a_ported_model_keeps_transposes_at_its_edges_only():
    done = rewritten(model, *ARGS)
    assert not done.refusals and len(done.family.sites) == 5
    assert [site.label for site in done.family.sites] == [
        "conv3x3+bn+relu",
        "conv3x3+bn+relu",
        "conv1x1+bn+add+relu",
        "conv1x1+bn+relu+mean5x4",
        "dot",
    ]
    # The image's and four filters'; pooling and joining work in between.
    found = primitives(done.program)
    assert found["transpose"] == 5
    assert found["bolt_pool"] == found["concatenate"] == 1
    assert not found["conv_general_dilated"]
    transposes = [e for e in done.program.jaxpr.eqns if e.primitive.name == "transpose"]
    inputs = set(done.program.jaxpr.invars)
    assert all(eqn.invars[0] in inputs for eqn in transposes)
    # Kernels see NHWC: the stem's result has its channels last.
    (pool,) = done.pools
    assert pool.window.out_shape == (2, 5, 4, 8)
    assert pool.window.window == (1, 3, 3, 1)


def test_it_computes_what_it_did():
    close(jax_bolt.optimize(model)(*ARGS), jax.jit(model)(*ARGS))


def test_gradients_and_batches_of_it():
    def loss(fun: Any) -> Any:
        return jax.grad(lambda p, x: jnp.square(fun(p, x)).sum(), argnums=(0, 1))

    got, want = (loss(f)(*ARGS) for f in (jax_bolt.optimize(model), model))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        close(a, b, 1e-4)
    xs = jnp.stack([ARGS[1], 2 * ARGS[1]])
    got, want = (
        jax.vmap(f, (None, 0))(ARGS[0], xs) for f in (jax_bolt.optimize(model), model)
    )
    close(got, want)
    close(
        jax_bolt.optimize(loss(model))(*ARGS)[0]["dense"],
        loss(model)(*ARGS)[0]["dense"],
    )


ORDERS = ["".join(order) for order in itertools.permutations("NHWC")]


@pytest.mark.parametrize("order", ORDERS[::4])
def test_any_order_of_dimensions(order: str) -> None:
    """Input, filter and result each in an order of their own, with a side input."""
    others = ORDERS[(ORDERS.index(order) * 7 + 5) % len(ORDERS)]
    sizes = dict(zip("NHWC", (2, 7, 5, 8), strict=True))
    taps = dict(zip("HWIO", (3, 2, 8, 16), strict=True))
    filters = order.replace("N", "O").replace("C", "I")
    out = {**sizes, "C": 16}
    x = normal(0, *(sizes[d] for d in order))
    w = normal(1, *(taps[d] for d in filters))
    side = normal(2, *(out[d] for d in others))
    spread = [1] * 4
    spread[others.index("C")] = 16
    bias = normal(3, 16).reshape(spread)

    def fun(x: Any, w: Any, side: Any, bias: Any) -> Any:
        y = conv(x, w, numbers=(order, filters, others))
        return jax.nn.silu(y + bias) * side

    done = rewritten(fun, x, w, side, bias)
    (site,) = done.family.sites
    problem = site.region.problem
    # What comes first in the input counts as the height.
    down, right = (d for d in order if d in "HW")
    image = (2, sizes[down], sizes[right], 8)
    assert (problem.n, problem.h, problem.w, problem.c) == image
    assert (problem.r, problem.s, problem.k) == (taps[down], taps[right], 16)
    assert len(site.region.epilogue.sides) == len(site.region.epilogue.vectors) == 1
    close(jax_bolt.optimize(fun)(x, w, side, bias), fun(x, w, side, bias))


def test_a_vector_along_another_axis_is_no_bias():
    """Heights as many as channels: what varies with the row is a side input."""

    def fun(x: Any, w: Any, rows: Any) -> Any:
        return conv(x, w) + rows[None, None, :, None]

    args = normal(0, 1, 4, 8, 8), normal(1, 8, 4, 3, 3), normal(2, 8)
    (site,) = rewritten(fun, *args).family.sites
    assert not site.region.epilogue.vectors
    close(jax_bolt.optimize(fun)(*args), fun(*args))


def test_transposes_of_the_users_own_cancel():
    """A model for NHWC images that works in NCHW, and gives NHWC back."""

    def fun(x: Any, w: Any) -> Any:
        y = jax.nn.relu(conv(x.transpose(0, 3, 1, 2), w))
        return y.transpose(0, 2, 3, 1)

    args = normal(0, 2, 9, 9, 8), normal(1, 16, 8, 3, 3)
    assert primitives(rewritten(fun, *args).program)["transpose"] == 1  # the filter's
    close(jax_bolt.optimize(fun)(*args), fun(*args))


def test_programs_in_our_layout_are_not_touched():
    def fun(x: Any, w: Any) -> Any:
        return conv(x, w, numbers=("NHWC", "HWIO", "NHWC")).transpose(3, 0, 1, 2).T

    args = normal(0, 2, 9, 9, 8), normal(1, 3, 3, 8, 16)
    assert primitives(rewritten(fun, *args).program)["transpose"] == 2


def test_what_needs_the_written_order_gets_it():
    """A flattening reads the features as they were written."""

    def fun(x: Any, w: Any, dense: Any) -> Any:
        y = jax.nn.relu(conv(x, w))
        return y.reshape(y.shape[0], -1) @ dense, y.mean(axis=1), y[:, 3]

    args = normal(0, 2, 8, 5, 5), normal(1, 16, 8, 3, 3), normal(2, 400, 8)
    for got, want in zip(jax_bolt.optimize(fun)(*args), fun(*args), strict=True):
        close(got, want)


def test_a_body_of_a_loop():
    def fun(x: Any, w: Any) -> Any:
        def body(carry: Any, _: Any) -> Any:
            return jax.nn.relu(conv(carry, w)) * 0.1, carry.sum()

        return lax.scan(body, x, None, 3)

    args = normal(0, 1, 8, 6, 6), normal(1, 8, 8, 3, 3)
    got, want = jax_bolt.optimize(fun)(*args), fun(*args)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        close(a, b)


def test_inside_of_shard_map() -> None:
    """What rearranges a value varies over the manual axes that the value does."""
    mesh = jax.make_mesh((1,), ("d",), (jax.sharding.AxisType.Auto,))
    rows, all_ = jax.sharding.PartitionSpec("d"), jax.sharding.PartitionSpec()

    def one(x: Any, w: Any, u: Any) -> Any:
        y = jax.nn.relu(conv(x, w))
        return jax.nn.relu(
            lax.conv_transpose(y, u, (2, 2), "SAME", dimension_numbers=NCHW)
        )

    fun = jax.shard_map(one, mesh=mesh, in_specs=(rows, all_, all_), out_specs=rows)
    # A filter of 3x3 gets zeros for the phases that have fewer taps.
    args = normal(0, 2, 8, 5, 6), normal(1, 8, 8, 3, 3), normal(2, 16, 8, 3, 3)
    assert len(rewritten(fun, *args).family.sites) == 2
    close(jax_bolt.optimize(fun)(*args), fun(*args))

    def loss(f: Any) -> Any:
        return jax.grad(lambda w, u: jnp.sin(f(args[0], w, u)).sum(), argnums=(0, 1))

    want = loss(fun)(*args[1:])
    for made in (loss(jax_bolt.optimize(fun)), jax_bolt.optimize(loss(fun))):
        for got, expected in zip(made(*args[1:]), want, strict=True):
            close(got, expected, 1e-4)


@pytest.mark.parametrize("permutation", list(itertools.permutations(range(4))))
def test_inverse(permutation: tuple[int, ...]) -> None:
    x = np.arange(24).reshape(1, 2, 3, 4)
    back = x.transpose(permutation).transpose(views.inverse(permutation))
    assert (back == x).all()
