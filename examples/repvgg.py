# SPDX-License-Identifier: Apache-2.0
"""RepVGG: a network of three branches, folded into one of plain 3x3 convs.

    python examples/repvgg.py

A block is trained as act(BN(conv3x3(x)) + BN(conv1x1(x)) + BN(x)). In inference all of
it is linear up to the activation, so that the three branches are one 3x3 conv with a
bias, which is one kernel here. Without a GPU everything runs small, as plain JAX.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jax_bolt

Params = dict[str, Any]
EPSILON = 1e-5


def conv(x: jax.Array, w: jax.Array) -> jax.Array:
    return lax.conv_general_dilated(
        x, w.astype(x.dtype), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def batch_norm(y: jax.Array, norm: Params) -> jax.Array:
    """In float32, as Flax does."""
    scale = lax.rsqrt(norm["var"] + EPSILON) * norm["scale"]
    wide = (y.astype(jnp.float32) - norm["mean"]) * scale + norm["offset"]
    return wide.astype(y.dtype)


@jax_bolt.optimize
def branches(blocks: Sequence[Params], x: jax.Array) -> jax.Array:
    """As trained; ``x`` is [N, H, W, C]."""
    for p in blocks:
        y = batch_norm(conv(x, p["w3"]), p["norm3"])
        y += batch_norm(conv(x, p["w1"]), p["norm1"])
        y += batch_norm(x, p["norm0"])
        x = jax.nn.relu(y)
    return x


@jax_bolt.optimize
def folded(blocks: Sequence[Params], x: jax.Array) -> jax.Array:
    """As deployed."""
    for p in blocks:
        x = jax.nn.relu(conv(x, p["w"]) + p["b"].astype(x.dtype))
    return x


def fold(p: Params) -> Params:
    """One filter and one bias for the three branches of a block."""
    width = p["w3"].shape[-1]
    filters = {
        "norm3": p["w3"],
        # A 1x1 conv is a 3x3 one whose other taps are zero, and so is the identity.
        "norm1": jnp.pad(p["w1"], ((1, 1), (1, 1), (0, 0), (0, 0))),
        "norm0": jnp.pad(jnp.eye(width)[None, None], ((1, 1), (1, 1), (0, 0), (0, 0))),
    }
    w, b = jnp.zeros_like(p["w3"]), jnp.zeros(width)
    for name, kernel in filters.items():
        norm = p[name]
        scale = lax.rsqrt(norm["var"] + EPSILON) * norm["scale"]
        w += kernel * scale
        b += norm["offset"] - norm["mean"] * scale
    return {"w": w, "b": b}


def random_block(width: int, rng: np.random.Generator) -> Params:
    def norm() -> Params:
        def uniform(low: float, high: float) -> jax.Array:
            return jnp.asarray(rng.uniform(low, high, width), jnp.float32)

        return {
            "mean": uniform(-0.1, 0.1),
            "var": uniform(0.5, 2.0),
            "scale": uniform(0.3, 0.6),
            "offset": uniform(-0.1, 0.1),
        }

    def filters(size: int) -> jax.Array:
        spread = (2 / (size * size * width)) ** 0.5
        shape = (size, size, width, width)
        return jnp.asarray(spread * rng.standard_normal(shape), jnp.float32)

    norms = {name: norm() for name in ("norm3", "norm1", "norm0")}
    return {"w3": filters(3), "w1": filters(1), **norms}


def main() -> None:
    on_gpu = jax.default_backend() == "gpu"
    batch, image, width, count = (32, 56, 64, 4) if on_gpu else (2, 14, 16, 2)
    rng = np.random.default_rng(0)
    blocks = [random_block(width, rng) for _ in range(count)]
    deployed = [fold(block) for block in blocks]
    x = jnp.asarray(rng.standard_normal((batch, image, image, width)), jnp.bfloat16)
    results = {}
    for fun, params in ((branches, blocks), (folded, deployed)):
        result = jax.block_until_ready(fun(params, x))
        start = time.perf_counter()
        for _ in range(20):
            result = fun(params, x)
        jax.block_until_ready(result)
        seconds = (time.perf_counter() - start) / 20
        report = fun.explain(params, x, arch=None if on_gpu else "sm_90a")
        label = report.sites[0].epilogue
        print(
            f"{fun.__name__:9} {len(report.sites):2} sites, the first {label}, "
            f"{seconds * 1e3:.3f} ms a call"
        )
        results[fun.__name__] = np.asarray(result, np.float32)
    distance = np.linalg.norm(results["folded"] - results["branches"])
    distance /= np.linalg.norm(results["branches"])
    print(f"folding changes the result by {distance:.1e}, bfloat16's rounding")


if __name__ == "__main__":
    main()
