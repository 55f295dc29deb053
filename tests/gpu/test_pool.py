# SPDX-License-Identifier: Apache-2.0
"""Max-pooling in two passes on the GPU: the same bits as in one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jax_bolt
from jax_bolt._src import passes, pool, rewrite
from jax_bolt._src.options import Options


def image(size, dtype) -> jax.Array:
    """Random: many equal values, and both zeros, infinities and NaN of floats."""
    random = np.random.default_rng(3)
    x = random.integers(-40, 41, size)
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.asarray(x, dtype)
    x = np.copysign(x.astype(np.float32), random.choice([-1, 1], size))
    special = random.choice(np.array([np.inf, -np.inf, np.nan], np.float32), size)
    return jnp.asarray(np.where(random.random(size) < 1e-3, special, x), dtype)


def bits(x: jax.Array) -> np.ndarray:
    """The bits, all NaN as one."""
    if jnp.issubdtype(x.dtype, jnp.floating):
        x = jnp.where(jnp.isnan(x), jnp.array(jnp.nan, x.dtype), x)
    return np.asarray(x).view(f"u{x.dtype.itemsize}")


def pooling(window, strides, reduce=lax.max):
    def fun(x):
        low, high = -np.inf, np.inf
        if not jnp.issubdtype(x.dtype, jnp.floating):
            low, high = np.iinfo(x.dtype).min, np.iinfo(x.dtype).max
        init = np.array(low if reduce is lax.max else high, x.dtype)
        return lax.reduce_window(x, init, reduce, window, strides, "SAME")

    return fun


STEM = (1, 3, 3, 1), (1, 2, 2, 1)


@pytest.mark.parametrize(
    ("window", "strides", "size"),
    [
        (*STEM, (8, 113, 110, 64)),
        ((1, 3, 3, 1), (1, 1, 1, 1), (4, 35, 34, 24)),
        ((1, 5, 5, 1), (1, 1, 1, 1), (4, 20, 21, 40)),
        ((1, 1, 3, 3), (1, 1, 2, 2), (8, 64, 57, 58)),  # NCHW
    ],
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "int32"])
@pytest.mark.parametrize("reduce", [lax.max, lax.min])
def test_two_passes_give_the_same_bits(window, strides, size, dtype, reduce):
    x = image(size, dtype)
    fun = pooling(window, strides, reduce)
    (eqn,) = rewrite.rewrite(jax.make_jaxpr(fun)(x), Options()).program.jaxpr.eqns
    reference, info = eqn.params["reference"], eqn.params["pool"]
    two = jax.jit(lambda x: pool.in_two_passes(reference, info, x)[0])
    np.testing.assert_array_equal(bits(two(x)), bits(jax.jit(fun)(x)))


def test_what_the_rule_chooses_is_right(monkeypatch):
    x, fun = image((32, 112, 112, 64), "bfloat16"), pooling(*STEM)
    want = bits(jax.jit(fun)(x))
    for chosen in (True, False):
        monkeypatch.setattr(passes, "two_pay", lambda *_, chosen=chosen: chosen)
        ours = jax.jit(jax_bolt.optimize(lambda x: fun(x)))
        text = ours.lower(x).as_text()
        assert text.count("stablehlo.reduce_window") == (2 if chosen else 1)
        np.testing.assert_array_equal(bits(ours(x)), want)
