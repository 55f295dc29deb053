# SPDX-License-Identifier: Apache-2.0
"""Models of Flax nnx, Haiku and Equinox, made of their own modules.

Haiku's published ones are traced at full size; small ones are run. Equinox's modules
take one image in NCHW, or one vector, and are mapped over the batch.
"""

from __future__ import annotations

import inspect
import math
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import model_checks
import numpy as np
import pytest

import jax_bolt

hk = pytest.importorskip("haiku")
eqx = pytest.importorskip("equinox")
nnx = pytest.importorskip("flax.nnx")


pytestmark = pytest.mark.usefixtures("as_users_run_it")


def check(
    fun: Callable[..., Any],
    parameters: Any,
    x: jax.Array,
    labels: dict[str, int],
) -> None:
    """All that is asked of ``fun(parameters, x)``, whose regions have ``labels``."""
    done = model_checks.rewritten(fun, parameters, x)
    assert Counter(site.label for site in done.family.sites) == labels
    assert not done.refusals and not model_checks.leftovers(done)
    for site in {site.label: site for site in done.family.sites}.values():
        model_checks.check_region(site)
    want = jax.jit(fun)(parameters, x)
    model_checks.check_close(jax_bolt.optimize(fun)(parameters, x), want, 1e-5)
    model_checks.check_close(jax_bolt.freeze(fun, parameters)(x), want, 1e-5)


def image(*dims: int) -> jax.Array:
    return jax.random.normal(jax.random.key(7), dims, jnp.float32)


# --- Flax nnx


class Residual(nnx.Module):
    """A stem, a residual block, a transposed conv and a head."""

    def __init__(self, rngs: Any):
        norm = {"use_running_average": True, "rngs": rngs}
        self.stem = nnx.Conv(3, 8, (3, 3), 2, rngs=rngs)
        self.stem_norm = nnx.BatchNorm(8, **norm)
        self.conv = nnx.Conv(8, 8, (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(8, **norm)
        self.up = nnx.ConvTranspose(8, 16, (2, 2), (2, 2), rngs=rngs)
        self.line = nnx.Conv(16, 8, 3, rngs=rngs)
        self.head = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.stem_norm(self.stem(x)))
        x = nnx.relu(self.norm(self.conv(x)) + x)
        x = nnx.gelu(self.up(x)).reshape(x.shape[0], -1, 16)
        return self.head(nnx.silu(self.line(x)).mean(axis=1))


class Attention(nnx.Module):
    def __init__(self, rngs: Any):
        self.attention = nnx.MultiHeadAttention(2, 16, decode=False, rngs=rngs)
        self.up = nnx.Linear(16, 32, rngs=rngs)
        self.down = nnx.Linear(32, 16, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(x)
        return x + self.down(nnx.gelu(self.up(x)))


def of_nnx(module: Any) -> tuple[Callable[..., Any], Any]:
    graph, state = nnx.split(module)
    return lambda state, x: nnx.merge(graph, state)(x), state


def test_nnx_convs() -> None:
    labels = {
        "conv3x3+bn+relu": 1,
        "conv3x3+bn+add+relu": 1,
        "conv_transpose2x2+bias+tanh": 1,
        "conv3+bias+silu": 1,
        "dot+bias": 1,
    }
    check(*of_nnx(Residual(nnx.Rngs(0))), image(2, 9, 9, 3), labels)


def test_sites_of_nnx_are_named_by_the_models_lines() -> None:
    """Which gives no scopes: else all convs would have the name of Flax's own line."""
    fun, state = of_nnx(Residual(nnx.Rngs(0)))
    sites = jax_bolt.explain(fun, state, image(2, 9, 9, 3)).sites
    lines, start = inspect.getsourcelines(Residual.__call__)
    convs = ("self.stem(", "self.conv(", "self.up(", "self.line(", "self.head(")
    assert len(sites) == len(convs)
    for site, conv in zip(sites, convs, strict=True):
        place = r"\S*test_model_frameworks\.py:(\d+):\d+ \(Residual.__call__\)"
        parts = re.fullmatch(place, site.line)
        assert parts is not None and site.name == site.line
        assert conv in lines[int(parts[1]) - start]


def test_nnx_attention() -> None:
    labels = {"dot+bias": 3, "dot": 2, "dot+bias+add": 2, "dot+bias+tanh": 1}
    check(*of_nnx(Attention(nnx.Rngs(0))), image(2, 6, 16), labels)


# --- Haiku


def of_haiku(
    make: Callable[[], Callable[..., Any]], *dims: int, **kwargs: Any
) -> tuple[Callable[..., Any], Any]:
    """``fun`` and its parameters' shapes, for an input of ``dims``."""

    def forward(x: jax.Array, **kwargs: Any) -> jax.Array:
        return make()(x, **kwargs)

    model = hk.without_apply_rng(hk.transform_with_state(forward))
    # In training a state is made that inference reads.
    training = dict.fromkeys(kwargs, True)
    parameters = jax.eval_shape(
        lambda key, x: model.init(key, x, **training),
        jax.random.key(0),
        jax.ShapeDtypeStruct(dims, jnp.float32),
    )
    return lambda variables, x: model.apply(*variables, x, **kwargs)[0], parameters


def drawn(shapes: Any) -> Any:
    """Positive, since a variance is one of them, and smaller the more are added up."""
    rng = np.random.default_rng(3)

    def leaf(like: Any) -> jax.Array:
        values = rng.uniform(0.5, 1.0, like.shape) / math.prod(like.shape[:-1])
        return jnp.asarray(values.astype(like.dtype))

    return jax.tree.map(leaf, shapes)


@pytest.mark.parametrize(
    ("make", "roots", "outside"),
    [
        (lambda: hk.nets.ResNet50(1000), 54, set()),
        (lambda: hk.nets.ResNet50(1000, resnet_v2=True), 54, set()),
        (lambda: hk.nets.MobileNetV1(), 28, set()),
    ],
)
def test_published_models_of_haiku(make: Any, roots: int, outside: set[str]) -> None:
    dims = (8, 224, 224, 3)
    fun, parameters = of_haiku(make, *dims, is_training=False)
    x = jax.ShapeDtypeStruct(dims, jnp.float32)
    done = model_checks.rewritten(fun, parameters, x)
    assert len(done.family.sites) == roots
    assert all("grouped conv" in refusal.reason for refusal in done.refusals)
    assert {left.reason for left in model_checks.leftovers(done)} == outside


def test_a_small_haiku_resnet() -> None:
    def make() -> Any:
        return hk.nets.ResNet(
            (1, 1, 1, 1),
            8,
            bottleneck=False,
            channels_per_group=(64, 8, 16, 16),
            use_projection=(False, True, True, True),
        )

    dims = (2, 32, 32, 3)
    fun, parameters = of_haiku(make, *dims, is_training=False)
    labels = {
        "conv7x7+bn+relu": 1,
        "conv3x3+bn+relu": 4,
        "conv3x3+bn+add+relu": 3,
        "conv3x3+bn+add+relu+mean1x1": 1,
        "conv1x1+bn": 3,
        "dot+bias": 1,
    }
    check(fun, drawn(parameters), image(*dims), labels)


def test_haiku_attention() -> None:
    def make() -> Any:
        init = hk.initializers.VarianceScaling(1.0)
        attention = hk.MultiHeadAttention(2, 8, w_init=init)
        return lambda x: hk.Linear(16)(attention(x, x, x)) + x

    fun, parameters = of_haiku(make, 2, 6, 16)
    labels = {"dot+bias": 4, "dot": 2, "dot+bias+add": 1}
    check(fun, drawn(parameters), image(2, 6, 16), labels)


# --- Equinox


class Net(eqx.Module):
    """A residual block in NCHW, a transposed conv, and a head."""

    stem: Any
    norm: Any
    conv: Any
    up: Any
    head: Any

    def __init__(self, key: jax.Array):
        keys = jax.random.split(key, 4)
        self.stem = eqx.nn.Conv2d(3, 8, 3, stride=2, padding=1, key=keys[0])
        self.norm = eqx.nn.BatchNorm(8, "batch", mode="ema")
        self.conv = eqx.nn.Conv2d(8, 8, 3, padding=1, use_bias=False, key=keys[1])
        self.up = eqx.nn.ConvTranspose2d(8, 4, 2, stride=2, key=keys[2])
        self.head = eqx.nn.MLP(4, 8, 16, 1, key=keys[3])

    def __call__(self, x: jax.Array, state: Any) -> jax.Array:
        y, _ = self.norm(self.stem(x), state)
        y = jax.nn.relu(y)
        y = jax.nn.relu(self.conv(y) + y)
        return self.head(jax.nn.silu(self.up(y)).mean((1, 2)))


def of_equinox(model: Any, state: Any = None) -> tuple[Callable[..., Any], Any]:
    """The model mapped over a batch, and its arrays."""
    arrays, rest = eqx.partition((eqx.nn.inference_mode(model), state), eqx.is_array)

    def fun(arrays: Any, x: jax.Array) -> jax.Array:
        model, state = eqx.combine(arrays, rest)
        one = model if state is None else lambda x: model(x, state)
        return jax.vmap(one, axis_name="batch")(x)

    return fun, arrays


def test_equinox_convs() -> None:
    model, state = eqx.nn.make_with_state(Net)(jax.random.key(0))
    labels = {
        "conv3x3+bias+relu": 1,
        "conv3x3+add+relu": 1,
        "conv_transpose2x2+bias+silu": 1,
        "dot+bias+relu": 1,
        "dot+bias": 1,
    }
    x = image(2, 3, 16, 16)
    fun, arrays = of_equinox(model, state)
    check(fun, arrays, x, labels)
    done = model_checks.rewritten(fun, arrays, x)
    found = Counter(eqn.primitive.name for eqn in done.program.jaxpr.eqns)
    # The image's, the filters', and both of the transposed conv's pixels.
    assert found["transpose"] == 6


def test_equinox_attention() -> None:
    class Block(eqx.Module):
        attention: Any

        def __call__(self, x: jax.Array) -> jax.Array:
            return x + self.attention(x, x, x)

    attention = eqx.nn.MultiheadAttention(2, 16, key=jax.random.key(0))
    labels = {"dot": 5, "dot+add": 1}
    check(*of_equinox(Block(attention)), image(2, 6, 16), labels)
