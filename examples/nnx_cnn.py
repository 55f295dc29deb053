# SPDX-License-Identifier: Apache-2.0
"""A Flax nnx CNN with its parameters frozen, beside the same one under ``nnx.jit``.

    python examples/nnx_cnn.py

On an NVIDIA GPU the first call tunes. Elsewhere both are plain JAX, and the plan for an
H100 or H200 is printed.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import jax_bolt


class Block(nnx.Module):
    """Two convs with BatchNorm, and a residual."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        conv = {"kernel_size": (3, 3), "use_bias": False, "dtype": jnp.bfloat16}
        self.conv1 = nnx.Conv(width, width, rngs=rngs, **conv)
        self.conv2 = nnx.Conv(width, width, rngs=rngs, **conv)
        self.norm1 = nnx.BatchNorm(width, dtype=jnp.bfloat16, rngs=rngs)
        self.norm2 = nnx.BatchNorm(width, dtype=jnp.bfloat16, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = nnx.relu(self.norm1(self.conv1(x)))
        return nnx.relu(self.norm2(self.conv2(y)) + x)


class Net(nnx.Module):
    """Images [N, H, W, 16] to logits [N, 64]."""

    def __init__(self, width: int, blocks: int, rngs: nnx.Rngs):
        self.stem = nnx.Conv(16, width, (3, 3), dtype=jnp.bfloat16, rngs=rngs)
        self.blocks = nnx.List([Block(width, rngs) for _ in range(blocks)])
        self.head = nnx.Linear(width, 64, dtype=jnp.bfloat16, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))


def main() -> None:
    on_gpu = jax.default_backend() == "gpu"
    batch, image, width = (32, 56, 64) if on_gpu else (2, 16, 16)
    net = Net(width, 3, nnx.Rngs(0))
    net.eval()  # BatchNorm with its running statistics
    graph, state = nnx.split(net)

    def call(state: Any, images: jax.Array) -> jax.Array:
        return nnx.merge(graph, state)(images)

    images = jax.random.normal(jax.random.key(1), (batch, image, image, 16))
    images = images.astype(jnp.bfloat16)
    predict = jax_bolt.freeze(call, state)
    logits = predict(images).astype(jnp.float32)
    plain = nnx.jit(lambda net, images: net(images))(net, images).astype(jnp.float32)
    distance = jnp.linalg.norm(logits - plain) / jnp.linalg.norm(plain)
    print(f"{logits.shape} logits, {distance:.1e} from plain JAX's\n")
    print(predict.explain(images, arch=None if on_gpu else "sm_90a"))


if __name__ == "__main__":
    main()
