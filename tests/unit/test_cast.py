# SPDX-License-Identifier: Apache-2.0
"""Casts of arguments: which are gathered, what they mean, how they are lowered."""

import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_lower
from fake_nvcc import FakeNvcc
from jax import lax
from test_lower import cuda_text, failing, fresh_warnings, kernel  # noqa: F401

import jax_bolt
from jax_bolt._src import arch, cast, compat, invoke, resolve, rewrite
from jax_bolt._src.errors import CompileError
from jax_bolt._src.jit import loader, store
from jax_bolt._src.options import Options

BF16, F16, F32 = jnp.bfloat16, jnp.float16, jnp.float32


def model(x, w, v):
    """Two products in bf16 with f32 weights, as Flax computes them."""
    return jax.nn.relu(x @ w.astype(BF16)) @ v.astype(BF16)


def shape(*dims, dtype=F32):
    return jax.ShapeDtypeStruct(dims, dtype)


X, W, V = shape(4, 16, dtype=BF16), shape(16, 8), shape(8, 24)


@pytest.fixture
def xwv():
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = zip(keys, (X, W, V), strict=True)
    return tuple(jax.random.normal(k, s.shape).astype(s.dtype) for k, s in shapes)


def rewritten(fun, *args, **options):
    return rewrite.rewrite(jax.make_jaxpr(fun)(*args), Options(**options)).program


def primitives(program):
    return [eqn.primitive.name for eqn in program.jaxpr.eqns]


def shapes(eqn):
    return [compat.aval_of(v).shape for v in eqn.invars]


def gathered(fun, *args, **options):
    """For each ``bolt_cast``, to what it casts, and the shapes."""
    return [
        (str(eqn.params["dtype"]), shapes(eqn))
        for eqn in rewritten(fun, *args, **options).jaxpr.eqns
        if eqn.primitive is cast.bolt_cast_p
    ]


def test_the_casts_of_weights_are_one_equation_at_the_start():
    program = rewritten(model, X, W, V)
    assert primitives(program) == ["bolt_cast", "bolt_sequence"]
    eqn, sequence = program.jaxpr.eqns
    assert list(eqn.invars) == program.jaxpr.invars[1:]
    assert [compat.aval_of(v).dtype for v in eqn.outvars] == [BF16, BF16]
    assert [s.label for (s,) in eqn.params["readers"]] == ["dot+relu", "dot"]
    assert list(sequence.invars) == [program.jaxpr.invars[0], *eqn.outvars]


def test_types_are_kept_apart():
    def fun(x, w, v, u, t):
        y = model(x, w, v).astype(F16)
        return y @ u.astype(F16) @ t.astype(F16)

    found = gathered(fun, X, W, V, shape(24, 8), shape(8, 16))
    halves = ("float16", [(24, 8), (8, 16)])
    assert found == [("bfloat16", [(16, 8), (8, 24)]), halves]


def test_an_argument_that_is_cast_twice_is_cast_once(xwv):
    x, w, v = xwv

    def shared(x, w, v):
        return model(model(x, w, v) + 1, w, v)

    (eqn, *_) = rewritten(shared, x, w, v[:, :16]).jaxpr.eqns
    assert shapes(eqn) == [(16, 8), (8, 16)]
    assert [len(sites) for sites in eqn.params["readers"]] == [2, 2]
    equal(jax_bolt.optimize(shared)(x, w, v[:, :16]), shared(x, w, v[:, :16]))


def scanned(x, w, v):
    def step(c, _):
        return model(c, w, v), None

    return lax.scan(step, x, None, length=2)[0]


def closed_over(x, w, v):
    constant = jnp.asarray(np.ones((16, 8), np.float32))
    return model(x, constant, v)


def weak(x, w, v):
    def half(a):
        params = {"new_dtype": jnp.dtype(BF16), "weak_type": True, "sharding": None}
        return lax.convert_element_type_p.bind(a, **params)

    return jax.nn.relu(x @ half(w)) @ half(v)


def sharded_cast(x, w, v):
    def half(a):
        sharding = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
        params = {"new_dtype": jnp.dtype(BF16), "weak_type": False}
        return lax.convert_element_type_p.bind(a, sharding=sharding, **params)

    return jax.nn.relu(x @ half(w)) @ half(v)


def returned(x, w, v):
    half = v.astype(BF16)
    return jax.nn.relu(x @ w.astype(BF16)) @ half, half


def also_summed(x, w, v):
    y, half = returned(x, w, v)
    return y, half.sum()


@pytest.mark.parametrize(
    ("fun", "args"),
    [
        (lambda x, w, v: x @ w.astype(BF16), (X, W, V)),
        (returned, (X, W, V)),
        (also_summed, (X, W, V)),
        (lambda x, w, v: model(x, w * 2, v), (X, W, V)),
        (lambda x, w, v: model(x, w, v.astype(F16)), (X, W, V)),
        (scanned, (X, W, shape(8, 16))),
        (weak, (X, W, V)),
        (model, (X, *(shape(*a.shape, dtype=F16) for a in (W, V)))),
        (sharded_cast, (X, W, V)),
        (closed_over, (X, W, V)),
        (model, (X, shape(16, 0), shape(0, 24))),
        (model, (X, shape(16, 2**18 + 8), shape(2**18 + 8, 24))),
    ],
    ids=[
        *("alone", "a result", "summed", "no argument", "twice", "body", "weak"),
        *("from f16", "sharded"),
        *("constant", "empty", "large"),
    ],
)
def test_left_alone(fun, args):
    assert gathered(fun, *args) == []


def test_it_can_be_disabled():
    assert gathered(model, X, W, V, disable=("cast",)) == []


def test_rewriting_twice_changes_nothing():
    once = rewritten(model, X, W, V)
    twice = rewrite.rewrite(once, Options())
    assert str(twice.program) == str(once)


# --- What it means


def equal(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


def both(transform, *args, fun=model):
    """``transform`` of the optimized function, and of the function without kernels."""
    return transform(jax_bolt.optimize(fun))(*args), transform(fun)(*args)


def test_call(xwv):
    equal(jax_bolt.optimize(model)(*xwv), jax.jit(model)(*xwv))
    with jax.disable_jit():
        equal(*both(lambda f: f, *xwv))


@pytest.mark.parametrize("axes", [(0, None, None), (0, 0, None), (None, None, 1)])
def test_vmap(xwv, axes):
    args = [
        a if axis is None else jnp.stack([a, 2 * a], axis)
        for a, axis in zip(xwv, axes, strict=True)
    ]
    equal(*both(lambda f: jax.jit(jax.vmap(f, axes)), *args))


def loss(fun):
    return lambda *args: fun(*args).astype(F32).sum()


@pytest.mark.parametrize("arguments", [(0,), (1,), (0, 1, 2)])
def test_derivatives(xwv, arguments):
    got, want = both(lambda f: jax.jit(jax.grad(loss(f), arguments)), *xwv)
    equal(got, want)
    assert [g.dtype for g in got] == [xwv[i].dtype for i in arguments]
    inside = jax_bolt.optimize(jax.grad(loss(model), arguments))
    equal(inside(*xwv), want)

    def forward(f):
        fixed = list(xwv)

        def of_some(*values):
            for i, value in zip(arguments, values, strict=True):
                fixed[i] = value
            return f(*fixed)

        some = tuple(xwv[i] for i in arguments)
        return lambda: jax.jvp(of_some, some, some)

    equal(*both(forward))


def test_linear_transpose(xwv):
    _, w, v = xwv
    halves = [w.astype(BF16), v.astype(BF16)]

    def casts(w, v):
        """As gathered, with no region behind it."""
        params = {"readers": (), "family": None, "options": None}
        return cast.bolt_cast_p.bind(w, v, dtype=jnp.dtype(BF16), **params)

    got = jax.linear_transpose(casts, w, v)(halves)
    equal(got, tuple(half.astype(F32) for half in halves))
    fun = jax_bolt.optimize(lambda w: casts(w, v)[0])
    equal(jax.linear_transpose(fun, w)(halves[0]), (halves[0].astype(F32),))


# --- How it is lowered for CUDA


@pytest.fixture
def cast_kernel(kernel, monkeypatch):  # noqa: F811
    monkeypatch.setattr(resolve, "cast_kernel", lambda *_: "c" * 64)


def calls(text):
    return [line for line in text.splitlines() if f"kind = {invoke.CAST}" in line]


def test_one_custom_call(cast_kernel):
    text = cuda_text(model, X, W, V)
    (call,) = calls(text)
    assert f'digest = "{"c" * 64}"' in call
    assert "(tensor<16x8xf32>, tensor<8x24xf32>)" in call
    assert "(tensor<16x8xbf16>, tensor<8x24xbf16>)" in call
    assert "stablehlo.convert" not in text
    assert text.count("kind = 3") == 1


def test_what_no_kernel_reads_xla_casts(cast_kernel, monkeypatch):
    found = resolve.resolve

    def but_one(site, *rest):
        if site.region.problem.n == 40:
            return resolve.Rejection("XLA was timed faster")
        return found(site, *rest)

    monkeypatch.setattr(resolve, "resolve", but_one)

    def fun(x, w, v, u):
        return model(x, w, v) @ u.astype(BF16)

    text = cuda_text(fun, X, W, V, shape(24, 40))
    (call,) = calls(text)
    assert "(tensor<16x8xf32>, tensor<8x24xf32>)" in call
    assert text.count("stablehlo.convert") == 1
    # One that is left gains nothing.
    text = cuda_text(lambda x, w, u: model(x, w, u), X, W, shape(8, 40))
    assert calls(text) == [] and text.count("stablehlo.convert") == 2


def test_inside_a_shard_map(cast_kernel):
    spec = jax.sharding.PartitionSpec
    fun = jax.shard_map(
        jax_bolt.optimize(model),
        mesh=test_lower.MESH,
        in_specs=(spec("i"), spec(), spec()),
        out_specs=spec("i"),
        check_vma=False,  # else a pcast comes between the cast and its reader
    )
    args = [test_lower.sharded(a) for a in (X, W, V)]
    assert len(calls(test_lower.lowered(fun, *args).as_text())) == 1


@pytest.mark.parametrize("broken", ["no compiler", "an error"])
def test_failures(cast_kernel, fresh_warnings, monkeypatch, broken):  # noqa: F811
    error = CompileError("cast.hpp does not compile", "a log")
    monkeypatch.setattr(
        resolve,
        "cast_kernel",
        failing(error) if broken == "an error" else lambda *_: None,
    )
    if broken == "an error":
        with pytest.warns(UserWarning, match="casts run on XLA: cast.hpp does not"):
            text = cuda_text(model, X, W, V)
        strict = jax_bolt.optimize(lambda *a: model(*a), on_error="raise")
        with pytest.raises(CompileError, match="a log"):
            test_lower.lowered(strict, X, W, V)
    else:
        text = cuda_text(model, X, W, V)
    assert calls(text) == [] and text.count("stablehlo.convert") == 2
    assert text.count("kind = 3") == 1


def test_partitioned_programs(cast_kernel):
    args = [test_lower.sharded(a) for a in (X, W, V)]
    text = test_lower.lowered(jax_bolt.optimize(model), *args).as_text()
    assert "custom_call" not in text


def test_the_kernel_is_built_once_and_loaded(tmp_path, monkeypatch):
    nvcc = FakeNvcc(tmp_path / "home")
    target = types.SimpleNamespace(
        tools=nvcc.toolchain(),
        kernels=store.Store(tmp_path / "kernels"),
        arch=arch.from_name("sm_75"),
    )
    loaded = {}
    monkeypatch.setattr(resolve, "target_for", lambda *_: target)
    monkeypatch.setattr(loader, "load", loaded.__setitem__)
    dtypes = ("bfloat16", "float16", "bfloat16")
    digests = [resolve.cast_kernel(dtype, Options(), None) for dtype in dtypes]
    assert len(nvcc.calls) == 2 and digests[0] == digests[2]
    assert set(loaded) == set(digests)
    assert [path.name for path in loaded.values()] == ["cast.cubin"] * 2
    assert "__half" in loaded[digests[1]].with_name("source.cu").read_text()
    target.tools = CompileError("no compiler")
    assert resolve.cast_kernel("bfloat16", Options(), None) is None


# --- A whole model


def test_resnet50():
    pytest.importorskip("flax")
    sys.path.append(str(Path(__file__).resolve().parents[2]))
    from benchmarks.models import models

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        apply, variables, x = models.shapes("resnet50", 2, 64)
        program = rewritten(apply, variables, x)
    (eqn,) = (e for e in program.jaxpr.eqns if e.primitive is cast.bolt_cast_p)
    assert len(eqn.invars) == 54
    left = [e for e in program.jaxpr.eqns if e.primitive is lax.convert_element_type_p]
    assert not {v for e in left for v in e.invars} & set(program.jaxpr.invars)
