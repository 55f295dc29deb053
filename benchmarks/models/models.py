# SPDX-License-Identifier: Apache-2.0
"""The benchmarked models by name, with random parameters that hide nothing.

Fresh Flax parameters have zero biases, zero means and unit variances, which let a
compiler or a wrong epilogue off the hook; these have none.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from .convnext import ConvNeXt
from .densenet import DenseNet
from .efficientnet import EfficientNetB0, blocks
from .inception import Inception
from .mixer import Mixer
from .mobilenet import Block, MobileNetV2, MobileNetV3
from .repvgg import RepVGGA0
from .resnet import ResNet18, ResNet50, WideResNet50
from .resnet_v2 import ResNetV2
from .unet import UNet
from .vgg import VGG
from .vit import ViT

Apply = Callable[[Any, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True, slots=True)
class Model:
    """``make(dtype=...)`` gives the module; ``roots`` is its convs plus products.

    ``small`` has arguments for ``make`` that give a small model of the same layers.
    ``gain`` over the fan-in is the variance of a random kernel: what keeps activations
    of order one through the model's depth at 224x224.
    """

    title: str
    make: Callable[..., nn.Module]
    roots: int
    small: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    gain: float = 2.0


_PATCHES = {"patch": 4, "width": 16, "depth": 2, "num_classes": 8}
_V2_SMALL = (Block(8, 8), Block(48, 16, stride=2), Block(96, 16))
_V3_SMALL = (
    Block(16, 16, activation=nn.relu),
    Block(48, 24, 5, 2, 8, nn.relu),
    Block(96, 24, 3, 1, 24, nn.hard_swish),
)
MODELS: dict[str, Model] = {
    "resnet18": Model(
        "ResNet-18",
        ResNet18,
        21,
        {"stages": (1, 1), "width": 8, "num_classes": 8},
    ),
    "resnet50": Model(
        "ResNet-50",
        ResNet50,
        54,
        {"stages": (2, 1), "width": 8, "num_classes": 8},
    ),
    "vgg16": Model(
        "VGG-16",
        VGG,
        16,
        {"stages": ((1, 8), (2, 16)), "hidden": 16, "num_classes": 8},
    ),
    "repvgg_a0": Model(
        "RepVGG-A0 relu",
        RepVGGA0,
        23,
        {"stages": (1, 2), "widths": (8, 16), "stem": 8, "num_classes": 8},
    ),
    "repvgg_a0_hard_swish": Model(
        "RepVGG-A0 hard_swish",
        functools.partial(RepVGGA0, activation=nn.hard_swish),
        23,
        {"stages": (1, 2), "widths": (8, 16), "stem": 8, "num_classes": 8},
        gain=2.6,
    ),
    "wide_resnet50": Model(
        "Wide ResNet-50-2",
        WideResNet50,
        54,
        {"stages": (2, 1), "width": 8, "num_classes": 8},
    ),
    "resnet50_v2": Model(
        "ResNet-50 v2",
        ResNetV2,
        54,
        {"stages": (2, 1), "width": 8, "num_classes": 8},
    ),
    "densenet121": Model(
        "DenseNet-121",
        DenseNet,
        121,
        {"stages": (2, 2), "growth": 8, "stem": 16, "num_classes": 8},
    ),
    "inception": Model(
        "Inception-v3 blocks",
        Inception,
        71,
        {"width": 8, "square": 1, "factored": 1, "num_classes": 8},
    ),
    "mobilenet_v2": Model(
        "MobileNetV2",
        MobileNetV2,
        53,
        {"blocks": _V2_SMALL, "stem": 8, "last": 32, "num_classes": 8},
    ),
    "mobilenet_v3": Model(
        "MobileNetV3-Large",
        MobileNetV3,
        64,
        {"blocks": _V3_SMALL, "stem": 16, "last": 32, "hidden": 16, "num_classes": 8},
    ),
    "efficientnet_b0": Model(
        "EfficientNet-B0",
        EfficientNetB0,
        82,
        {
            "blocks": blocks(16, ((1, 3, 8, 1, 1), (6, 5, 16, 2, 2))),
            "stem": 16,
            "last": 32,
            "num_classes": 8,
        },
    ),
    "convnext_t": Model(
        "ConvNeXt-T",
        ConvNeXt,
        59,
        {"stages": (1, 1), "width": 16, "num_classes": 8},
    ),
    "unet": Model("U-Net", UNet, 23, {"width": 8, "depth": 2}),
    "mixer_b16": Model(
        "MLP-Mixer-B/16",
        Mixer,
        50,
        {**_PATCHES, "tokens_hidden": 24, "channels_hidden": 32},
    ),
    "vit_b16": Model("ViT-B/16", ViT, 98, {**_PATCHES, "heads": 2, "hidden": 32}),
}

# What the README's table has, and what kernels are tuned and timed for by default.
MEASURED = ("resnet18", "resnet50", "vgg16", "repvgg_a0", "repvgg_a0_hard_swish")


def _known(model: str | Model) -> Model:
    if isinstance(model, Model):
        return model
    if model not in MODELS:
        raise KeyError(f"unknown model {model!r}; one of {', '.join(MODELS)}")
    return MODELS[model]


def make(
    model: str | Model, dtype: Any = jnp.bfloat16, small: bool = False
) -> nn.Module:
    """The Flax module of a model, given by its name or as one, computing in ``dtype``.

    Raises KeyError on an unknown name.
    """
    model = _known(model)
    return model.make(dtype=dtype, **(model.small if small else {}))


def shapes(
    model: str | Model,
    batch: int = 32,
    image: int = 224,
    dtype: Any = jnp.bfloat16,
    small: bool = False,
) -> tuple[Apply, Any, jax.ShapeDtypeStruct]:
    """As ``build``, with ``jax.ShapeDtypeStruct`` in place of every array."""
    module = make(model, dtype, small)
    x = jax.ShapeDtypeStruct((batch, image, image, 3), dtype)
    variables = jax.eval_shape(module.init, jax.random.key(0), x)
    return _apply(module), variables, x


def build(
    model: str | Model,
    batch: int = 32,
    image: int = 224,
    dtype: Any = jnp.bfloat16,
    key: int = 0,
    small: bool = False,
) -> tuple[Apply, Any, jax.Array]:
    """``(apply, variables, x)`` with ``apply(variables, x)`` the logits in ``dtype``.

    ``variables`` are float32, as Flax keeps them; ``x`` is [batch, image, image, 3].
    """
    apply, like, x_like = shapes(model, batch, image, dtype, small)
    # NumPy's generator: JAX's would be compiled anew for every parameter's shape.
    rng = np.random.default_rng(key)
    gain = _known(model).gain
    variables = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.asarray(_leaf(path[-1].key, leaf, gain, rng)), like
    )
    x = jnp.asarray(rng.standard_normal(x_like.shape, np.float32)).astype(dtype)
    return apply, variables, x


def reference(
    model: str | Model, dtype: Any = jnp.float32, small: bool = False
) -> Apply:
    """The same model in ``dtype`` at the highest matmul precision.

    Takes the variables and the ``x`` of ``build``. float64 needs JAX's x64 mode.
    """
    module = make(model, dtype, small)

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
        case "bias" | "mean" | "position":
            values = 0.1 * rng.standard_normal(like.shape, np.float32)
        case "scale" | "gamma":
            values = rng.uniform(0.5, 1.0, like.shape)
        case "var":
            values = rng.uniform(0.5, 2.0, like.shape)
        case _:
            raise ValueError(f"no random values are defined for a parameter {name!r}")
    return values.astype(like.dtype)
