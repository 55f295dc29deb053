# SPDX-License-Identifier: Apache-2.0
"""What the image runs: a small CNN, and the arguments it is explained and tuned for."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import jax_bolt


class Net(nn.Module):
    """Images [N, H, W, 16] to logits [N, 64]."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for width in (32, 64):
            x = nn.Conv(width, (3, 3), use_bias=False, dtype=jnp.bfloat16)(x)
            x = nn.BatchNorm(use_running_average=True, dtype=jnp.bfloat16)(x)
            x = nn.relu(x)
        return nn.Dense(64, dtype=jnp.bfloat16)(x.mean((1, 2)))


net = Net()


@jax_bolt.optimize
def predict(variables: Any, images: jax.Array) -> Any:
    return net.apply(variables, images)


def example_args() -> tuple[Any, jax.ShapeDtypeStruct]:
    """Shapes are enough, so that no GPU and no weights are needed."""
    images = jax.ShapeDtypeStruct((8, 32, 32, 16), jnp.bfloat16)
    return jax.eval_shape(net.init, jax.random.key(0), images), images


def main() -> None:
    images = jnp.ones((8, 32, 32, 16), jnp.bfloat16)
    variables = net.init(jax.random.key(0), images)
    print(predict(variables, images).shape, "on", jax.devices()[0])


if __name__ == "__main__":
    main()
