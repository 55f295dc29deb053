# SPDX-License-Identifier: Apache-2.0
"""The benchmarked models: their shapes, roots, parameters and reference path."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax")
# Appended, so that an installed jax_bolt still comes before the source tree.
sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks import environment, floor
from benchmarks.models import models

NAMES = list(models.MODELS)


pytestmark = pytest.mark.usefixtures("as_users_run_it")


def _out(name: str, *, batch: int = 2, image: int = 64) -> Any:
    apply, variables, x = models.shapes(name, batch, image)
    return jax.eval_shape(apply, variables, x)


@pytest.mark.parametrize("name", NAMES)
def test_shapes(name: str) -> None:
    out = _out(name)
    shape = (2, 64, 64, 2) if name == "unet" else (2, 1000)
    assert (out.shape, out.dtype) == (shape, jnp.bfloat16)


@pytest.mark.parametrize(
    ("name", "convs", "products"),
    [
        ("resnet18", 20, 1),
        ("resnet50", 53, 1),
        ("vgg16", 13, 3),
        ("repvgg_a0", 22, 1),
        ("repvgg_a0_hard_swish", 22, 1),
        ("densenet121", 120, 1),
        ("mobilenet_v3", 62, 2),
        ("convnext_t", 22, 37),
        ("unet", 23, 0),
        ("vit_b16", 1, 97),
    ],
)
def test_roots(name: str, convs: int, products: int) -> None:
    found = [r.primitive for r in floor.roots(*models.shapes(name, 2, 64))]
    assert found.count("conv_general_dilated") == convs
    assert found.count("dot_general") == products
    assert len(found) == models.MODELS[name].roots


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("resnet18", 11.690),
        ("resnet50", 25.557),
        ("vgg16", 138.358),
        ("wide_resnet50", 68.883),
        ("densenet121", 7.979),
        ("mobilenet_v2", 3.505),
        ("mobilenet_v3", 5.483),
        ("efficientnet_b0", 5.289),
        ("convnext_t", 28.589),
        ("mixer_b16", 59.880),
    ],
)
def test_parameter_count_is_the_papers(name: str, millions: float) -> None:
    params = models.shapes(name, 1, 224)[1]["params"]
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert count / 1e6 == pytest.approx(millions, abs=5e-4)


def test_repvgg_a0_widths() -> None:
    params = models.shapes("repvgg_a0", 1, 64)[1]["params"]
    widths = {name: leaf["bias"].shape[0] for name, leaf in params.items()}
    assert widths.pop("Dense_0") == 1000
    assert widths.pop("stem") == 48
    assert sorted(widths.values()) == [48] * 2 + [96] * 4 + [192] * 14 + [1280]


def test_activation_of_repvgg_is_the_named_one() -> None:
    def primitives(name: str) -> str:
        return str(jax.make_jaxpr(models.shapes(name, 1, 32)[0])(*_abstract(name)))

    # JAX's other name for hard_swish is hard_silu.
    assert "name=hard_silu" in primitives("repvgg_a0_hard_swish")
    assert "name=hard_silu" not in primitives("repvgg_a0")
    assert "name=relu" in primitives("repvgg_a0")


@pytest.mark.parametrize("name", ["resnet18", "repvgg_a0"])
def test_parameters_are_float32_and_never_trivial(name: str) -> None:
    _, variables, x = models.build(name, 1, 32)
    assert x.shape == (1, 32, 32, 3) and x.dtype == jnp.bfloat16
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        values = np.asarray(leaf)
        where = jax.tree_util.keystr(path)
        assert values.dtype == np.float32, where
        assert np.isfinite(values).all() and values.std() > 0, where
        assert (values == 0).mean() < 1e-3 and (values == 1).mean() < 1e-3, where
        if path[-1] == jax.tree_util.DictKey("var"):
            assert values.min() > 0, where


def test_parameters_follow_the_key() -> None:
    def kernel(key: int) -> np.ndarray:
        variables = models.build("resnet18", 1, 32, key=key)[1]
        return np.asarray(variables["params"]["stem"]["kernel"])

    np.testing.assert_array_equal(kernel(1), kernel(1))
    assert (kernel(1) != kernel(2)).mean() > 0.9


@pytest.mark.parametrize("name", ["resnet18", "repvgg_a0_hard_swish"])
def test_bfloat16_is_close_to_the_reference(name: str) -> None:
    apply, variables, x = models.build(name, 2, 96)
    expected = np.asarray(jax.jit(models.reference(name))(variables, x))
    options = environment.sound_cpu_options() if jax.default_backend() == "cpu" else {}
    compiled = jax.jit(apply, compiler_options=options)
    got = np.asarray(compiled(variables, x).astype(jnp.float32))
    error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
    assert expected.dtype == np.float32
    assert 1e-4 < error < 3e-2
    # Logits that all rows share would hide an error that mixes rows up.
    assert np.abs(expected[0] - expected[1]).max() > 0.1 * expected.std()


def test_reference_asks_for_the_highest_precision() -> None:
    _, variables, x = models.shapes("resnet18", 1, 32)
    jaxpr = jax.make_jaxpr(models.reference("resnet18"))(variables, x)
    precisions = [
        eqn.params["precision"]
        for eqn in jaxpr.jaxpr.eqns
        if eqn.primitive.name in floor.ROOTS
    ]
    highest = (jax.lax.Precision.HIGHEST,) * 2
    assert precisions == [highest] * 21


def test_unknown_model() -> None:
    with pytest.raises(KeyError, match="resnet18"):
        models.make("alexnet")


def _abstract(name: str) -> tuple[Any, Any]:
    _, variables, x = models.shapes(name, 1, 32)
    return variables, x
