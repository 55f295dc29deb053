# SPDX-License-Identifier: Apache-2.0
"""Frozen models, as users write them, and random programs."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("flax")
sys.path.append(str(Path(__file__).resolve().parents[2]))

import flax.linen as nn
from flax import nnx

import jax_bolt
from benchmarks.models import models
from jax_bolt._src import compat, options, rewrite, split

pytestmark = pytest.mark.usefixtures("as_users_run_it")


def left(name: str) -> tuple[Counter[str], Any]:
    """What a call of the frozen model runs, regions one by one, and the model."""
    apply, variables, x = models.shapes(name, 2, 64)
    frozen = jax_bolt.freeze(apply, variables)
    parts = frozen._part((x,), {})
    assert parts is not None
    found: Counter[str] = Counter()
    for eqn in parts.rewritten.program.jaxpr.eqns:
        calls = eqn.params["calls"].jaxpr.eqns if "calls" in eqn.params else [eqn]
        found.update(call.primitive.name for call in calls)
    return found, parts


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_resnet_is_regions_alone(name: str) -> None:
    found, parts = left(name)
    roots = models.MODELS[name].roots
    # Its pool is the stem's, and its mean the last conv's.
    assert found == {"bolt_call": roots}
    # A filter and, of BatchNorm, three vectors; a product's bias is cast to bf16.
    residuals = parts.rewritten.program.in_avals[:-1]
    assert len(residuals) == 4 * (roots - 1) + 2
    for aval in residuals:
        assert str(aval.dtype) == (
            "float32" if aval.shape[:-1] == (1,) * 3 else "bfloat16"
        )


@pytest.mark.parametrize("name", ["vgg16", "repvgg_a0", "repvgg_a0_hard_swish"])
def test_other_models_read_no_parameter_as_it_was(name: str) -> None:
    found, parts = left(name)
    assert found["bolt_call"] == models.MODELS[name].roots
    assert found.keys() <= {
        *("bolt_call", "reduce_window_max", "reduce_sum", "div", "reshape"),
        "convert_element_type",
    }
    dtypes = {str(a.dtype) for a in parts.rewritten.program.in_avals}
    assert dtypes == {"bfloat16"}


@pytest.mark.parametrize(("name", "error"), [("resnet18", 0), ("repvgg_a0", 5e-3)])
def test_results_are_those_of_optimize(name: str, error: float) -> None:
    """Where a vector is cast in between, XLA's CPU backend does not round it."""
    apply, variables, x = models.build(name, 2, 64)
    got, want = (
        np.asarray(y, np.float32)
        for y in (
            jax_bolt.freeze(apply, variables)(x),
            jax_bolt.optimize(apply)(variables, x),
        )
    )
    assert np.linalg.norm(got - want) <= error * np.linalg.norm(want)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.Conv(8, (3, 3), dtype=jnp.bfloat16)(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        return nn.Dense(4)(nn.Dropout(0.5, deterministic=not train)(nn.relu(x)))


def test_a_bound_apply_and_keywords() -> None:
    net = Net()
    x = jnp.linspace(0, 1, 2 * 5 * 5 * 3, dtype=jnp.bfloat16).reshape(2, 5, 5, 3)
    variables = net.init(jax.random.key(0), x)
    frozen = jax_bolt.freeze(net.apply, variables)
    want = jax_bolt.optimize(net.apply)(variables, x)
    np.testing.assert_array_equal(frozen(x), want)
    again = jax_bolt.freeze(net.apply, variables)
    assert again._function.shared is frozen._function.shared
    rngs = {"dropout": jax.random.key(1)}

    def trained(variables: Any, x: jax.Array, rngs: Any) -> Any:
        return net.apply(variables, x, train=True, mutable="batch_stats", rngs=rngs)

    got = jax_bolt.freeze(trained, variables)(x, rngs)
    for a, b in zip(
        jax.tree.leaves(got),
        jax.tree.leaves(jax.jit(trained)(variables, x, rngs)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=2e-2, atol=2e-2)


def test_the_state_of_nnx() -> None:
    class Model(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.conv = nnx.Conv(3, 8, (3, 3), dtype=jnp.bfloat16, rngs=rngs)
            self.norm = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, deterministic=True, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.dropout(nnx.relu(self.norm(self.conv(x))))

    graph, state = nnx.split(Model(nnx.Rngs(0)))
    x = jnp.linspace(0, 1, 2 * 5 * 5 * 3).reshape(2, 5, 5, 3)

    def apply(graph: Any, state: Any, x: jax.Array) -> jax.Array:
        return nnx.merge(graph, state)(x)

    frozen = jax_bolt.freeze(apply, graph, state)
    want = jax.jit(apply, static_argnums=0)(graph, state, x)
    np.testing.assert_allclose(frozen(x), want, rtol=1e-2, atol=1e-2)
    other = nnx.state(Model(nnx.Rngs(1)))
    want = jax.jit(apply, static_argnums=0)(graph, other, x)
    np.testing.assert_allclose(
        frozen.replace(graph, other)(x), want, rtol=1e-2, atol=1e-2
    )


# --- Random programs


@st.composite
def programs(draw: st.DrawFn) -> tuple[list[tuple[str, int, int]], list[int]]:
    """Steps on a growing list of values, and which values are the results."""
    names = ("add", "mul", "dot", "relu", "cast", "row", "spread", "sum", "jit", "iota")
    steps = [
        (
            draw(st.sampled_from(names)),
            draw(st.integers(0, 99)),
            draw(st.integers(0, 99)),
        )
        for _ in range(draw(st.integers(1, 9)))
    ]
    return steps, draw(st.lists(st.integers(0, 99), min_size=1, max_size=3))


def run(program: Any, *values: jax.Array) -> list[jax.Array]:
    """The program on matrices of 4 by 4."""
    steps, results = program
    known = list(values)
    for name, i, j in steps:
        a, b = known[i % len(known)], known[j % len(known)]
        made = {
            "add": lambda a, b: a + b,
            "mul": lambda a, b: a * b,
            "dot": lambda a, b: jnp.tanh(a @ b),
            "relu": lambda a, b: jax.nn.relu(a),
            "cast": lambda a, b: a.astype(jnp.bfloat16).astype(jnp.float32),
            "row": lambda a, b: b + jnp.tanh(a[0]),
            "spread": lambda a, b: jnp.broadcast_to(a[:1], (4, 4)) * 2,
            "sum": lambda a, b: a / (1 + jnp.abs(b).sum()),
            "jit": lambda a, b: jax.jit(lambda x: (x - b) * 0.5)(a),
            "iota": lambda a, b: a + jax.lax.iota(jnp.float32, 4),
        }[name]
        known.append(made(a, b))
    return [known[i % len(known)] for i in results]


@settings(max_examples=60, deadline=None)
@given(programs(), st.integers(0, 3))
def test_random_programs(program: Any, frozen: int) -> None:
    rng = np.random.default_rng(0)
    values = [jnp.asarray(rng.standard_normal((4, 4)), jnp.float32) for _ in range(3)]

    def fun(*values: jax.Array) -> list[jax.Array]:
        return run(program, *values)

    if frozen:
        got = jax_bolt.freeze(fun, *values[:frozen])(*values[frozen:])
        for a, b in zip(got, jax.jit(fun)(*values), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)

    traced = jax.make_jaxpr(fun)(*values)
    parts = split.split(traced, frozen)
    assert parts is not None
    # Nothing is left that could have been computed once and takes work.
    rest = parts.rest.jaxpr
    known = set(rest.invars[: len(parts.sources)])
    for eqn in rest.eqns:
        if known.issuperset(read := compat.variables(eqn.invars)) and read:
            known.update(eqn.outvars)
            assert eqn.primitive.name not in ("dot_general", "reduce_sum", "tanh")
    again = split.split(jax.make_jaxpr(lambda *v: run(program, *v))(*values), frozen)
    # Derivative rules have no equality.
    rules = "custom_jvp" in str(parts.prepare)
    assert again is not None and split.same(parts.prepare, again.prepare) is not rules
    assert rewrite.rewrite(parts.rest, options.Options()).program.out_avals == (
        traced.out_avals
    )


@pytest.mark.parametrize(
    "other",
    [
        lambda w: (w * 2.0, w + 1.0),
        lambda w: (w * 3.0, w + 2.0),
        lambda w: (w * 3.0, w - 1.0),
        lambda w: (w * 3.0, w * 3.0 + 1.0),
        lambda w: (w + 1.0, w * 3.0),
        lambda w: (w.T * 3.0, w + 1.0),
        lambda w: (w * 3.0,),
        lambda w: (w.astype(jnp.bfloat16) * 3.0, w + 1.0),
        lambda w: (w * np.full((4, 4), 3.0, np.float32), w + 1.0),
    ],
)
def test_programs_that_differ_are_told_apart(other: Any) -> None:
    w = jnp.ones((4, 4))

    def program(fun: Any) -> Any:
        return jax.make_jaxpr(fun)(w)

    one = program(lambda w: (w * 3.0, w + 1.0))
    assert split.same(one, program(lambda v: (v * 3.0, v + 1.0)))
    assert not split.same(one, program(other))
