# SPDX-License-Identifier: Apache-2.0
"""An optimized function means what the original means, under every transform."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jax_bolt
from jax_bolt._src import options, rewrite

F32 = jnp.float32


def count_calls(fun, *args):
    """Regions in the optimized function's jaxpr, bodies included."""
    program = rewrite.rewrite(jax.make_jaxpr(fun)(*args), options.Options()).program
    return str(program).count("bolt_call[")


def dense(x, w, b):
    return jax.nn.relu(x @ w + b[None])


@pytest.fixture
def xwb():
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (4, 6))
    return x, jax.random.normal(keys[1], (6, 6)), jax.random.normal(keys[2], (6,))


def same(got, want, **kw):
    kw = {"rtol": 1e-5, "atol": 1e-5} | kw
    jax.tree.map(functools.partial(np.testing.assert_allclose, **kw), got, want)


def test_call(xwb):
    assert count_calls(dense, *xwb) == 1
    same(jax_bolt.optimize(dense)(*xwb), dense(*xwb))


def test_pytrees_and_keywords(xwb):
    @jax_bolt.optimize
    def fun(params, *, x):
        return {"y": dense(x, params["w"], params["b"]), "aux": (x, None)}

    x, w, b = xwb
    out = fun({"w": w, "b": b}, x=x)
    same(out["y"], dense(x, w, b))
    assert out["aux"][1] is None


def test_static_and_donated_arguments(xwb):
    @functools.partial(jax_bolt.optimize, static_argnums=(1,))
    def fun(x, n, w):
        return x @ w if n == "plain" else jnp.tanh(x @ w)

    x, w, _ = xwb
    same(fun(x, "plain", w), x @ w)
    same(fun(x, "tanh", w), jnp.tanh(x @ w))
    same(fun(x, w=w, n="tanh"), jnp.tanh(x @ w))
    assert fun.explain(x, w=w, n="tanh").coverage == 1.0
    donated = jax_bolt.optimize(lambda x, w: x @ w, donate_argnums=0)
    same(donated(x + 0, w), x @ w)


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_grad(xwb, where):
    def loss(f):
        return lambda *args: f(*args).sum()

    want = jax.grad(loss(dense), (0, 1, 2))(*xwb)
    if where == "outside":
        got = jax.grad(loss(jax_bolt.optimize(dense)), (0, 1, 2))(*xwb)
    else:
        got = jax_bolt.optimize(jax.grad(loss(dense), (0, 1, 2)))(*xwb)
    same(got, want)


def test_grad_with_side_inputs_of_booleans(xwb):
    x, w, _ = xwb
    keep = jax.random.bernoulli(jax.random.key(3), 0.5, (4, 6))

    def fun(x, w, keep):
        return jnp.where(keep, x @ w, 0.0).sum()

    got = jax.grad(jax_bolt.optimize(fun), (0, 1))(x, w, keep)
    same(got, jax.grad(fun, (0, 1))(x, w, keep))


def test_custom_derivative_rules_survive(xwb):
    """relu at 0 has JAX's derivative; a straight-through estimator stays straight."""
    zeros = jnp.zeros((2, 2))
    relu = jax_bolt.optimize(lambda x, w: jax.nn.relu(x @ w).sum())
    same(jax.grad(relu)(zeros, zeros + 1), jnp.zeros((2, 2)))

    @jax.custom_vjp
    def rounded(x):
        return jnp.round(x)

    rounded.defvjp(lambda x: (jnp.round(x), None), lambda _, g: (g * 3,))
    x, w, _ = xwb

    def fun(x, w):
        return rounded(x @ w).sum()

    assert count_calls(fun, x, w) == 1
    same(jax.grad(jax_bolt.optimize(fun), (0, 1))(x, w), jax.grad(fun, (0, 1))(x, w))


def test_roots_inside_custom_rules_are_found(xwb):
    @jax.custom_jvp
    def product(x, w):
        return jnp.tanh(x @ w)

    product.defjvp(lambda p, t: (product(*p), t[0] @ p[1] * 7))
    x, w, _ = xwb
    assert count_calls(lambda x, w: product(x, w) + 1, x, w) == 1
    got = jax.jvp(jax_bolt.optimize(product), (x, w), (x, w))
    same(got, jax.jvp(product, (x, w), (x, w)))


def test_vmap(xwb):
    x, w, b = xwb
    xs = jnp.stack([x, 2 * x])
    got = jax.vmap(jax_bolt.optimize(dense), in_axes=(0, None, None))(xs, w, b)
    same(got, jax.vmap(dense, in_axes=(0, None, None))(xs, w, b))
    inside = jax_bolt.optimize(jax.vmap(dense, in_axes=(0, None, None)))
    same(inside(xs, w, b), got)


def test_vmap_of_grad(xwb):
    x, w, b = xwb
    xs = jnp.stack([x, 2 * x])

    def per_example(f):
        return jax.vmap(jax.grad(lambda x: f(x, w, b).sum()))(xs)

    same(per_example(jax_bolt.optimize(dense)), per_example(dense))


def test_jit_and_closure_over_tracers(xwb):
    x, w, b = xwb

    @jax.jit
    def outer(x, w, b):
        return jax_bolt.optimize(lambda x: dense(x, w, b))(x) * 2

    same(outer(x, w, b), dense(x, w, b) * 2)


@pytest.mark.parametrize("side", ["inside", "outside"])
def test_scan(xwb, side):
    x, w, b = xwb

    def step(f):
        return lambda carry, _: (f(carry, w, b), None)

    def loop(f, x):
        return lax.scan(step(f), x, None, length=3)[0]

    want = loop(dense, x)
    if side == "outside":
        same(loop(jax_bolt.optimize(dense), x), want)
    else:
        fun = functools.partial(loop, dense)
        assert count_calls(fun, x) == 1
        same(jax_bolt.optimize(fun)(x), want)
        same(jax.grad(lambda x: jax_bolt.optimize(fun)(x).sum())(x),
             jax.grad(lambda x: fun(x).sum())(x))  # fmt: skip


def test_while_cond_and_remat(xwb):
    x, w, b = xwb

    def loop(x):
        body = lambda s: (s[0] + 1, dense(s[1], w, b))  # noqa: E731
        return lax.while_loop(lambda s: s[0] < 2, body, (0, x))[1]

    def branch(x):
        return lax.cond(x[0, 0] > 0, lambda x: dense(x, w, b), lambda x: x - 1, x)

    def remat(x):
        return jax.checkpoint(lambda x: dense(x, w, b))(x)

    for fun in (loop, branch, remat):
        assert count_calls(fun, x) == 1, fun
        same(jax_bolt.optimize(fun)(x), fun(x))
    same(jax.grad(lambda x: jax_bolt.optimize(remat)(x).sum())(x),
         jax.grad(lambda x: remat(x).sum())(x))  # fmt: skip


def test_constants_of_inlined_calls(xwb):
    x, w, _ = xwb
    table = np.arange(6.0, dtype=np.float32)

    def fun(x, w):
        return jax.jit(lambda y: jnp.tanh(y + table[None]))(x @ w)

    same(jax_bolt.optimize(fun)(x, w), fun(x, w))
    remat = jax.checkpoint(fun)
    same(jax_bolt.optimize(remat)(x, w), fun(x, w))


def test_bodies_whose_calls_have_constants(xwb):
    x, w, _ = xwb
    table = np.arange(6.0, dtype=np.float32)
    shifted = jax.jit(lambda y: y + table[None])

    def loop(x):
        step = lambda c, _: (jax.nn.relu(shifted(c) @ w), None)  # noqa: E731
        return lax.scan(step, x, None, length=2)[0]

    assert count_calls(loop, x) == 1
    same(jax_bolt.optimize(loop)(x), loop(x))


def test_disable_jit(xwb):
    with jax.disable_jit():
        same(jax_bolt.optimize(dense)(*xwb), dense(*xwb))


def test_linear_transpose(xwb):
    x, w, _ = xwb
    got = jax.linear_transpose(jax_bolt.optimize(lambda x: 2 * (x @ w)), x)(x)
    same(got, jax.linear_transpose(lambda x: 2 * (x @ w), x)(x))


def test_effects_stay_in_order(xwb, capsys):
    x, w, b = xwb

    @jax_bolt.optimize
    def fun(x):
        jax.debug.print("before", ordered=True)
        y = dense(x, w, b)
        jax.debug.print("{}", y.shape[0] + 0 * y[0, 0], ordered=True)
        return dense(y, w, b)

    same(fun(x), dense(dense(x, w, b), w, b))
    jax.effects_barrier()
    assert capsys.readouterr().out.split() == ["before", "4.0"]


def test_weak_types_and_x64(xwb):
    x, w, _ = xwb
    out = jax_bolt.optimize(lambda x, w: (x @ w) * 2.0)(
        x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
    )
    assert out.dtype == jnp.bfloat16
    with jax.enable_x64(True):
        wide = np.arange(4.0).reshape(2, 2)
        out = jax_bolt.optimize(lambda a: a @ a)(wide)
        assert out.dtype == jnp.float64
        same(out, wide @ wide, rtol=1e-15)


def test_rewriting_twice_changes_nothing(xwb):
    once = rewrite.rewrite(jax.make_jaxpr(dense)(*xwb), options.Options())
    twice = rewrite.rewrite(once.program, options.Options())
    assert not twice.family.sites
    assert str(twice.program) == str(once.program)


def test_shard_map_bodies_are_rewritten(xwb):
    x, w, b = xwb
    mesh = jax.make_mesh((1,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec()
    fun = jax.shard_map(dense, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec)
    assert count_calls(fun, x, w, b) == 1
    same(jax_bolt.optimize(fun)(x, w, b), dense(x, w, b))
