# SPDX-License-Identifier: Apache-2.0
"""The benchmarked models by name, with random parameters that hide nothing.

Fresh Flax parameters have zero biases, zero means and unit variances, which let a
compiler or a wrong epilogue off the hook; these have none.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from .repvgg import RepVGGA0
from .resnet import ResNet18, ResNet50
from .vgg import VGG

Apply = Callable[[Any, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True, slots=True)
class Model:
    """``make(dtype=...)`` gives the module; ``roots`` is its convs plus products.

    ``gain`` over the fan-in is the variance of a random kernel: what keeps activations
    of order one through the model's depth at 224x224.
    """

    title: str
    make: Callable[..., nn.Module]
    roots: int
    gain: float = 2.0


MODELS: dict[str, Model] = {
    "resnet18": Model("ResNet-18", ResNet18, 21),
    "resnet50": Model("ResNet-50", ResNet50, 54),
    "vgg16": Model("VGG-16", VGG, 16),
    "repvgg_a0": Model("RepVGG-A0 relu", RepVGGA0, 23),
    "repvgg_a0_hard_swish": Model(
        "RepVGG-A0 hard_swish",
        functools.partial(RepVGGA0, activation=nn.hard_swish),
        23,
        gain=2.6,
    ),
}


def make(name: str, dtype: Any = jnp.bfloat16) -> nn.Module:
    """The Flax module called ``name``, computing in ``dtype``; KeyError if unknown."""
    if name not in MODELS:
        raise KeyError(f"unknown model {name!r}; one of {', '.join(MODELS)}")
    return MODELS[name].make(dtype=dtype)


def shapes(
    name: str, batch: int = 32, image: int = 224, dtype: Any = jnp.bfloat16
) -> tuple[Apply, Any, jax.ShapeDtypeStruct]:
    """As ``build``, with ``jax.ShapeDtypeStruct`` in place of every array."""
    module = make(name, dtype)
    x = jax.ShapeDtypeStruct((batch, image, image, 3), dtype)
    variables = jax.eval_shape(module.init, jax.random.key(0), x)
    return _apply(module), variables, x


def build(
    name: str,
    batch: int = 32,
    image: int = 224,
    dtype: Any = jnp.bfloat16,
    key: int = 0,
) -> tuple[Apply, Any, jax.Array]:
    """``(apply, variables, x)`` with ``apply(variables, x)`` the logits in ``dtype``.

    ``variables`` are float32, as Flax keeps them; ``x`` is [batch, image, image, 3].
    """
    apply, like, x_like = shapes(name, batch, image, dtype)
    # NumPy's generator: JAX's would be compiled anew for every parameter's shape.
    rng = np.random.default_rng(key)
    gain = MODELS[name].gain
    variables = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.asarray(_leaf(path[-1].key, leaf, gain, rng)), like
    )
    x = jnp.asarray(rng.standard_normal(x_like.shape, np.float32)).astype(dtype)
    return apply, variables, x


def reference(name: str, dtype: Any = jnp.float32) -> Apply:
    """The same model in ``dtype`` at the highest matmul precision.

    Takes the variables and the ``x`` of ``build``. float64 needs JAX's x64 mode.
    """
    module = make(name, dtype)

    def apply(variables: Any, x: jax.Array) -> jax.Array:
        with jax.default_matmul_precision("highest"):
            return module.apply(variables, x.astype(dtype))  # type: ignore[return-value]

    return apply


def _apply(module: nn.Module) -> Apply:
    def apply(variables: Any, x: jax.Array) -> jax.Array:
        return module.apply(variables, x)  # type: ignore[return-value]

    return apply


def _leaf(
    name: str, like: jax.ShapeDtypeStruct, gain: float, rng: np.random.Generator
) -> np.ndarray:
    # Activations stay of order one, so that an error in a late layer is as visible as
    # one in the first.
    match name:
        case "kernel":
            scale = math.sqrt(gain / math.prod(like.shape[:-1]))
            values = scale * rng.standard_normal(like.shape, np.float32)
        case "bias" | "mean":
            values = 0.1 * rng.standard_normal(like.shape, np.float32)
        case "scale":
            values = rng.uniform(0.5, 1.0, like.shape)
        case "var":
            values = rng.uniform(0.5, 2.0, like.shape)
        case _:
            raise ValueError(f"no random values are defined for a parameter {name!r}")
    return values.astype(like.dtype)
