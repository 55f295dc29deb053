# SPDX-License-Identifier: Apache-2.0
"""A frozen function means what the original means, and does less at each call."""

import contextlib
import dataclasses
import functools
import gc
import inspect
import operator
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax
from jax.core import Tracer
from jax.experimental import io_callback

import jax_bolt
from jax_bolt._src import freeze, resolve

BF16, F32 = jnp.bfloat16, jnp.float32


def conv(x, w):
    return lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def block(params, x):
    """A conv, BatchNorm with stored statistics and a relu, as Flax computes them."""
    y = conv(x, params["kernel"].astype(BF16)).astype(F32)
    scale = lax.rsqrt(params["var"] + 1e-5) * params["scale"]
    y = (y - params["mean"][None, None, None]) * scale[None, None, None]
    return jax.nn.relu((y + params["bias"][None, None, None]).astype(BF16))


@pytest.fixture
def params():
    rng = np.random.default_rng(0)
    vectors = {k: rng.uniform(0.5, 1.5, 8) for k in ("var", "scale", "mean", "bias")}
    kernel = rng.standard_normal((3, 3, 4, 8)) / 6
    return {k: jnp.asarray(v, F32) for k, v in (vectors | {"kernel": kernel}).items()}


@pytest.fixture
def x():
    return jax.random.normal(jax.random.key(0), (2, 6, 5, 4)).astype(BF16)


def equal(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


def close(got, want):
    check = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(check, got, want)


def parts(frozen, *args, **kwargs):
    """The split of a call."""
    made = frozen._part(args, kwargs)
    assert made is not None
    return made


def at_call(frozen, *args, **kwargs):
    """The primitives that a call runs."""
    program = parts(frozen, *args, **kwargs).rewritten.program
    return [eqn.primitive.name for eqn in program.jaxpr.eqns]


def residuals(frozen, *args):
    (found,) = frozen._bound(args, {})[1]
    return found


@contextlib.contextmanager
def counting():
    """Counts, by kind, what JAX traces, lowers and compiles."""
    counts = {"jaxpr_trace": 0, "jaxpr_to_mlir_module": 0, "backend_compile": 0}

    def count(event, *_, **__):
        name = event.rpartition("/")[2].removesuffix("_duration")
        if name in counts:
            counts[name] += 1

    jax.monitoring.register_event_duration_secs_listener(count)
    yield counts
    jax.monitoring.clear_event_listeners()


class Traced:
    """A function that counts how often it is traced."""

    def __init__(self, fun):
        self.fun, self.count = fun, 0

    def __call__(self, *args, **kwargs):
        self.count += 1
        return self.fun(*args, **kwargs)


# --- What a call does


def test_results_are_those_of_optimize(params, x):
    want = jax_bolt.optimize(block)(params, x)
    equal(jax_bolt.freeze(block, params)(x), want)
    equal(jax_bolt.freeze(jax_bolt.optimize(block), params)(x), want)
    equal(jax_bolt.freeze(block, params, x)(), want)


def test_a_call_runs_regions_alone(params, x):
    frozen = jax_bolt.freeze(block, params)
    assert at_call(frozen, x) == ["bolt_call"]
    found = residuals(frozen, x)
    assert sorted((r.shape, str(r.dtype)) for r in found) == [
        *[((1, 1, 1, 8), "float32")] * 3,
        ((3, 3, 4, 8), "bfloat16"),
    ]
    (site,) = frozen.explain(x, arch="sm_90a").sites
    assert site.fused and "rsqrt" not in str(site.region)
    assert "rsqrt" in str(jax_bolt.explain(block, params, x).sites[0].region)
    assert jax_bolt.explain(frozen, x).coverage == 1


def test_filters_in_another_layout_are_transposed_once():
    """As in models ported from PyTorch: NCHW activations and OIHW filters."""
    numbers = ("NCHW", "OIHW", "NCHW")
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (2, 4, 6, 5)).astype(BF16)
    ws = [jax.random.normal(k, (4, 4, 3, 3)) for k in keys[1:]]

    def fun(ws, x):
        for w in ws:
            x = lax.conv_general_dilated(
                x, w.astype(BF16), (1, 1), "SAME", dimension_numbers=numbers
            )
        return x

    frozen = jax_bolt.freeze(fun, ws)
    assert at_call(frozen, x) == ["transpose", "bolt_sequence", "transpose"]
    assert [r.shape for r in residuals(frozen, x)] == [(3, 3, 4, 4)] * 2
    equal(frozen(x), jax_bolt.optimize(fun)(ws, x))


def test_an_unchanged_array_is_not_copied(params, x):
    w = params["kernel"].astype(BF16)
    assert residuals(jax_bolt.freeze(lambda w, x: conv(x, w), w), x)[0] is w


def test_what_only_spreads_a_value_is_left_at_the_call(x):
    b = jnp.linspace(0.5, 1, 4)

    def fun(b, x):
        wide = jnp.broadcast_to(b.astype(BF16) * 2, x.shape)
        rows = lax.iota(F32, 5).astype(BF16)[None, None, :, None]
        return x * wide + jnp.tanh(wide).reshape(x.shape) + rows

    frozen = jax_bolt.freeze(fun, b)
    assert [r.shape for r in residuals(frozen, x)] == [(4,)]
    equal(frozen(x), jax.jit(fun)(b, x))


def test_a_larger_value_that_takes_work_is_kept(x):
    def fun(w, x):
        return x @ (w[:, None] * w[None]).astype(BF16)

    w = jnp.linspace(0.5, 1, 4)
    frozen = jax_bolt.freeze(fun, w)
    assert [r.shape for r in residuals(frozen, x)] == [(4, 4)]
    equal(frozen(x), jax.jit(fun)(w, x))


def test_what_cannot_be_computed_once_is_computed_at_every_call(params, x, monkeypatch):
    def fail(self, prepare):
        raise RuntimeError("out of memory")

    want = jax_bolt.optimize(block)(params, x)
    monkeypatch.setattr(freeze.Frozen, "_computed", fail)
    equal(jax_bolt.freeze(block, params)(x), want)


def test_results_that_are_frozen_themselves(params, x):
    def fun(params, x):
        return params["scale"], params["bias"] * 2, x, 3.0

    equal(jax_bolt.freeze(fun, params)(x), jax.jit(fun)(params, x))


def test_bodies_stay_whole(x):
    """What a loop reads of the frozen arguments it reads at every call."""
    ws = jax.random.normal(jax.random.key(1), (3, 4, 4))

    def fun(ws, x):
        step = lambda c, w: (jnp.tanh(c @ w.astype(BF16)), None)  # noqa: E731
        return lax.scan(step, x, ws * 2)[0]

    frozen = jax_bolt.freeze(fun, ws)
    assert at_call(frozen, x) == ["scan"]
    assert [r.shape for r in residuals(frozen, x)] == [(3, 4, 4)]
    equal(frozen(x), jax_bolt.optimize(fun)(ws, x))


def test_batch_sizes_share_what_was_computed(params, x):
    frozen = jax_bolt.freeze(block, params)
    one, other = residuals(frozen, x), residuals(frozen, x[:1])
    assert all(a is b for a, b in zip(one, other, strict=True))
    equal(frozen(x[:1]), jax_bolt.optimize(block)(params, x[:1]))


def test_programs_that_differ_share_nothing(x):
    def fun(w, x):
        return x @ (w * (3.0 if len(x) == 1 else 2.0)).astype(BF16)

    w = jax.random.normal(jax.random.key(1), (4, 4))
    frozen = jax_bolt.freeze(fun, w)
    for some in (x, x[:1], x):
        equal(frozen(some), jax.jit(fun)(w, some))


def test_the_text_is_the_same_every_time(params, x):
    texts = {
        jax_bolt.freeze(lambda p, x: block(p, x), params).lower(x).as_text()
        for _ in range(2)
    }
    assert len(texts) == 1


# --- Replacing, and freezing again


def scaled(params):
    return jax.tree.map(lambda v: v * 1.25, params)


def test_replacing_compiles_nothing(params, x):
    fun = Traced(block)
    old = jax_bolt.freeze(fun, params)
    old(x)
    others = jax.block_until_ready(scaled(params))
    with counting() as counts:
        new = old.replace(others)
        got = new(x)
    assert fun.count == 1 and set(counts.values()) == {0}, counts
    equal(got, jax_bolt.optimize(block)(others, x))
    equal(old(x), jax_bolt.optimize(block)(params, x))
    with counting() as counts:
        new(x[:1])
    assert fun.count == 2 and counts["backend_compile"] > 0  # the counter works


def test_replacing_by_other_shapes_traces_again(params, x):
    frozen = jax_bolt.freeze(block, params)
    frozen(x)
    wider = jax.tree.map(lambda v: jnp.concatenate([v, v], -1), params)
    equal(frozen.replace(wider)(x), jax_bolt.optimize(block)(wider, x))


def test_freezing_again_costs_nothing(params, x):
    fun = Traced(block)
    first = jax_bolt.freeze(fun, params)
    first(x)
    kept = residuals(first, x)
    del first
    with counting() as counts:
        again = jax_bolt.freeze(fun, dict(params))
        again(x)
    assert fun.count == 1 and set(counts.values()) == {0}, counts
    assert all(a is b for a, b in zip(kept, residuals(again, x), strict=True))


def test_methods_are_recognised(params, x):
    traced = []

    @dataclasses.dataclass(frozen=True)
    class Model:
        factor: float

        def apply(self, params, x):
            traced.append(self.factor)
            return block(params, x) * self.factor

    models = [Model(2.0), Model(2.0), Model(0.5)]
    for model in models:
        equal(jax_bolt.freeze(model.apply, params)(x), block_by(model, params, x))
    assert traced == [2.0, 0.5]
    gone = [weakref.ref(model) for model in models]
    model = models = None
    gc.collect()
    assert not any(ref() for ref in gone)


def block_by(model, params, x):
    return jax.jit(block)(params, x) * model.factor


def test_an_object_that_may_change_is_traced_again(params, x):
    class Model:
        factor = 2.0

        def apply(self, params, x):
            return block(params, x) * self.factor

    model = Model()
    for model.factor in (2.0, 0.5):
        equal(jax_bolt.freeze(model.apply, params)(x), block_by(model, params, x))


def test_functions_are_told_apart(x):
    w = jnp.full((4, 4), 2, BF16)
    for fun in (operator.matmul, operator.add):  # both belong to one module
        equal(jax_bolt.freeze(fun, w)(w), fun(w, w))


def test_what_was_computed_goes_with_the_arrays(params, x):
    mine = scaled(params)
    frozen = jax_bolt.freeze(lambda p, x: block(p, x), mine)
    shared = frozen._function.shared
    frozen(x)
    kept = [weakref.ref(r) for r in residuals(frozen, x)]
    assert len(shared._known) == 1 and len(kept) == 4
    del frozen, mine
    gc.collect()
    assert not shared._known and not any(r() for r in kept)


def test_arrays_of_numpy_are_copied(params, x):
    host = {k: np.asarray(v).copy() for k, v in params.items()}
    want = jax.jit(block)(params, x)
    frozen = jax_bolt.freeze(block, host)
    for v in host.values():
        v *= 2
    equal(frozen(x), want)
    equal(jax_bolt.freeze(block, host)(x), jax.jit(block)(host, x))


def test_arrays_closed_over_are_read_when_freezing(params, x):
    held = [params]

    def fun(x):
        return block(held[0], x)

    frozen = jax_bolt.freeze(fun)
    want = frozen(x)
    equal(want, jax.jit(block)(params, x))
    assert at_call(frozen, x) == ["bolt_call"]
    held[0] = scaled(params)
    equal(frozen(x), want)
    equal(jax_bolt.freeze(fun)(x), jax.jit(block)(held[0], x))


# --- Under JAX's transformations


def test_jit(params, x):
    frozen = jax_bolt.freeze(block, params)
    want = jax.jit(block)(params, x)
    equal(jax.jit(lambda x: frozen(x) * 2)(x), want * 2)
    assert not any(isinstance(r, Tracer) for r in residuals(frozen, x))
    equal(frozen(x), want)
    assert "rsqrt" not in str(jax.make_jaxpr(frozen)(x))


@pytest.mark.parametrize("inside", [False, True])
def test_grad_and_jvp(params, x, inside):
    x = x.astype(F32)

    def fun(params, x):
        return (block(params, x.astype(BF16)).astype(F32) ** 2).sum()

    want = jax.jit(jax.grad(fun, 1))(params, x)
    if inside:
        got = jax_bolt.freeze(jax.grad(fun, 1), params)(x)
    else:
        got = jax.grad(jax_bolt.freeze(fun, params))(x)
    np.testing.assert_allclose(got, want, rtol=2e-2, atol=2e-2)
    frozen = jax_bolt.freeze(fun, params)
    tangents = (
        jax.jvp(frozen, (x,), (x,)),
        jax.jvp(lambda x: fun(params, x), (x,), (x,)),
    )
    np.testing.assert_allclose(*tangents, rtol=2e-2)


def test_vmap_and_scan(params, x):
    frozen = jax_bolt.freeze(block, params)
    xs = jnp.stack([x, 2 * x])
    want = jax.jit(jax.vmap(block, (None, 0)))(params, xs)
    equal(jax.vmap(frozen)(xs), want)
    equal(lax.map(frozen, xs), lax.map(functools.partial(block, params), xs))
    equal(jax_bolt.freeze(jax.vmap(block, (None, 0)), params)(xs), want)


def test_frozen_values_that_are_traced(params, x):
    """They are not known yet, so nothing is computed ahead."""

    @jax.jit
    def outer(params, x):
        frozen = jax_bolt.freeze(lambda p, x: block(p, x), params)
        y = frozen(x)
        assert not frozen._function.shared.parts
        return y

    equal(outer(params, x), jax.jit(block)(params, x))

    @jax.jit
    def closes_over(params, x):
        scale = params["scale"]
        fun = lambda w, x: conv(x, w.astype(BF16)) * scale.astype(BF16)  # noqa: E731
        frozen = jax_bolt.freeze(fun, held)
        y = frozen(x)
        assert list(frozen._function.shared.parts.values()) == [None]
        return y

    held = params["kernel"]
    want = conv(x, held.astype(BF16)) * params["scale"].astype(BF16)[None, None, None]
    close(closes_over_f32(closes_over, params, x), np.asarray(want, np.float32))


def closes_over_f32(fun, params, x):
    with jax.numpy_rank_promotion("allow"):
        return np.asarray(fun(params, x), np.float32)


def test_a_pytree_of_its_frozen_arguments(params, x):
    frozen = jax_bolt.freeze(block, params)
    assert len(jax.tree.leaves(frozen)) == len(params)
    want = jax.jit(block)(params, x)
    fun = Traced(lambda f, x: f(x))
    outer = jax.jit(fun)
    equal(outer(frozen, x), want)
    others = scaled(params)
    equal(outer(frozen.replace(others), x), jax.jit(block)(others, x))
    assert fun.count == 1
    doubled = jax.tree.map(lambda v: v * 1.25, frozen)
    equal(doubled(x), jax.jit(block)(others, x))
    again = jax_bolt.freeze(block, params)
    assert jax.tree.structure(again) == jax.tree.structure(doubled)


def test_derivatives_by_frozen_arguments(params, x):
    def loss(fun):
        return lambda *args: (fun(*args).astype(F32) ** 2).sum()

    frozen = jax_bolt.freeze(block, params)
    gradients = jax.grad(loss(lambda f: f(x)))(frozen)
    want = jax.grad(loss(lambda p: jax.jit(block)(p, x)))(params)
    (got,) = gradients._frozen
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=2e-2, atol=1e-2)


def test_shard_map(params, x):
    mesh = jax.make_mesh((1,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec

    def fun(params, x):
        return (
            lax.psum(block(params, x), "i")
            + lax.psum(params["scale"], "i").astype(BF16)[None, None, None]
        )

    frozen = jax_bolt.freeze(fun, params)
    sharded = jax.shard_map(frozen, mesh=mesh, in_specs=spec("i"), out_specs=spec())
    plain = jax.shard_map(
        functools.partial(fun, params), mesh=mesh, in_specs=spec("i"), out_specs=spec()
    )
    equal(jax.jit(sharded)(x), jax.jit(plain)(x))
    assert not frozen._function.shared.parts


def test_devices_and_shardings(params, x):
    """As jit: where the arrays are."""
    mesh = jax.make_mesh((1,), ("i",), axis_types=(jax.sharding.AxisType.Explicit,))
    spec = jax.sharding.PartitionSpec
    want = jax.jit(block)(params, x)
    with jax.set_mesh(mesh):
        held = jax.device_put(params, spec())
        equal(jax_bolt.freeze(block, held)(jax.device_put(x, spec("i"))), want)


def test_disable_jit(params, x):
    want = block(params, x)
    with jax.disable_jit():
        got = jax_bolt.freeze(block, params)(x)
    np.testing.assert_allclose(got.astype(F32), want.astype(F32), rtol=1e-2, atol=1e-2)


def test_export(params, x):
    frozen = jax_bolt.freeze(block, params)
    exported = export.export(jax.jit(frozen))(x)
    equal(exported.call(x), frozen(x))


def test_donation(params, x):
    frozen = jax_bolt.freeze(
        lambda p, y, x: x + p["scale"][0].astype(BF16), params, donate_argnums=1
    )
    y = x + 1
    text = frozen.lower(x, y).as_text()
    assert text.count("tf.aliasing_output") + text.count("jax.buffer_donor") == 1
    frozen(x, y)
    assert y.is_deleted() and not x.is_deleted()
    assert not any(v.is_deleted() for v in params.values())


# --- Arguments


def test_static_arguments_and_keywords(params, x):
    def fun(params, x, mode, *, shift):
        y = block(params, x) + shift
        return y if mode == "plain" else jnp.tanh(y)

    frozen = jax_bolt.freeze(fun, params, static_argnums=1)
    assert list(inspect.signature(frozen).parameters) == ["x", "mode", "shift"]
    shift = jnp.ones((), BF16)
    for mode in ("plain", "tanh", "plain"):
        want = jax.jit(fun, static_argnums=2)(params, x, mode, shift=shift)
        equal(frozen(x, mode, shift=shift), want)
        equal(frozen(x, mode=mode, shift=shift), want)
        assert frozen.explain(x, mode=mode, shift=shift).coverage == 1
    optimized = jax_bolt.optimize(fun, static_argnums=2)
    equal(jax_bolt.freeze(optimized, params)(x, "plain", shift=shift), want)
    message = r"argument 1 is 'plain'.*static_argnums=1 \(among .* not frozen\)"
    with pytest.raises(TypeError, match=message):
        jax_bolt.freeze(fun, params)(x, "plain", shift=shift)


def test_equal_static_arguments_of_two_types(x):
    frozen = jax_bolt.freeze(
        lambda w, x, n: x + w if n is True else x - w,
        jnp.ones(4, BF16)[None, None, None],
        static_argnums=1,
    )
    equal(frozen(x, True), x + 1)
    equal(frozen(x, 1), x - 1)
    equal(frozen(x, n=True), x + 1)
    equal(frozen(x, n=1), x - 1)


def test_wrong_arguments(params, x):
    with pytest.raises(TypeError, match="takes a function of arrays, got 3"):
        jax_bolt.freeze(3, params)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"argument 1 is 'a' .*functools.partial"):
        jax_bolt.freeze(block, params, "a")
    frozen = jax_bolt.freeze(block, params)
    with pytest.raises(TypeError, match="has 1 frozen arguments, not 2"):
        frozen.replace(params, x)
    with pytest.raises(TypeError, match=r"frozen argument 0\['kernel'\] is 'a'"):
        frozen.replace(params | {"kernel": "a"})
    with pytest.raises(TypeError, match="argument 0 is 'a'"):
        frozen("a")
    with pytest.raises(ValueError, match="on_miss"):
        jax_bolt.freeze(block, params, on_miss="later")  # type: ignore[arg-type]
    static = jax_bolt.optimize(lambda a, b: a, static_argnums=0)
    with pytest.raises(TypeError, match=r"argument 0 .* is static and cannot"):
        jax_bolt.freeze(static, x)


def test_shapes_in_place_of_arrays(params, x):
    def like(v):
        return jax.ShapeDtypeStruct(v.shape, v.dtype)

    frozen = jax_bolt.freeze(block, jax.tree.map(like, params))
    report = frozen.explain(like(x), arch="sm_90a")
    assert report.coverage == 1 and report.sites[0].kernel
    assert "convolution" in frozen.lower(like(x)).as_text()
    with pytest.raises(TypeError):
        frozen(x)
    equal(frozen.replace(params)(x), jax.jit(block)(params, x))


def test_scalars_are_weak_as_in_jit(x):
    def fun(half, x):
        return x * (half * 2)

    frozen = jax_bolt.freeze(fun, 0.25)
    equal(frozen(x), jax.jit(fun)(0.25, x))
    assert frozen(x).dtype == BF16
    assert frozen.replace(0.5)(x).dtype == BF16
    equal(frozen.replace(0.5)(x), x)


def test_x64(x):
    with jax.enable_x64(True):
        w = np.linspace(0.1, 1, 16).reshape(4, 4)
        frozen = jax_bolt.freeze(lambda w, x: x @ (w * w), w)
        wide = np.asarray(x, np.float64)
        assert frozen(wide).dtype == np.float64
        np.testing.assert_allclose(frozen(wide), wide @ (w * w), rtol=1e-14)


def test_a_setting_of_jax_is_no_stale_trace(x):
    w = jax.random.normal(jax.random.key(1), (4, 4))
    frozen = jax_bolt.freeze(lambda w, x: x.astype(F32) @ (w * 2), w)
    assert frozen.explain(x).coverage == 1
    assert "HIGHEST" not in frozen.lower(x).as_text()
    with jax.default_matmul_precision("highest"):
        assert frozen.explain(x).coverage == 0
        assert "HIGHEST" in frozen.lower(x).as_text()


def test_options_count_when_called(params, x):
    seen = []

    def of(frozen, *args):
        frozen(*args)
        for made in frozen._function.shared.parts.values():
            seen.extend(
                eqn.params["options"].on_miss
                for eqn in made.rewritten.program.jaxpr.eqns
            )
        return seen[-1]

    frozen = jax_bolt.freeze(block, params)
    assert of(frozen, x) == "tune"
    with jax_bolt.options(on_miss="heuristic"):
        assert of(frozen, x) == "heuristic"
    assert of(jax_bolt.freeze(block, params, on_miss="xla"), x) == "xla"
    optimized = jax_bolt.optimize(block, on_miss="error")
    assert of(jax_bolt.freeze(optimized, params), x) == "error"


def test_random_keys():
    x = jnp.ones((4, 4))

    def fun(key, x):
        keep = jax.random.bernoulli(key, 0.5, x.shape)
        return jnp.where(keep, x @ x, 0)

    for key in (jax.random.key(3), jax.random.PRNGKey(3)):
        frozen = jax_bolt.freeze(fun, key)
        equal(frozen(x), jax.jit(fun)(key, x))
        assert "random_bits" not in str(parts(frozen, x).rewritten.program)
        assert at_call(frozen, x)[-1] == "bolt_call"
    # As a residual, too.
    fold = jax_bolt.freeze(lambda k, i: jax.random.fold_in(k, i), jax.random.key(3))
    equal(
        *(
            jax.random.key_data(k)
            for k in (fold(2), jax.random.fold_in(jax.random.key(3), 2))
        )
    )


# --- Effects


def test_effects_happen_at_every_call_in_order(x, capsys):
    def fun(w, x):
        jax.debug.print("w {}", w.sum(), ordered=True)
        y = x @ w.astype(BF16)
        jax.debug.print("y", ordered=True)
        return y

    frozen = jax_bolt.freeze(fun, jnp.ones((4, 4)))
    for _ in range(2):
        frozen(x)
    jax.effects_barrier()
    assert capsys.readouterr().out.split() == ["w", "16.0", "y"] * 2


def test_callbacks(x):
    calls = {"pure": 0, "io": 0}

    def callback(kind, w):
        calls[kind] += 1
        return np.asarray(w)

    def fun(w, x):
        pure = jax.pure_callback(functools.partial(callback, "pure"), w, w)
        kept = io_callback(functools.partial(callback, "io"), w, w)
        return x @ (pure + kept).astype(BF16)

    w = jnp.ones((4, 4))
    frozen = jax_bolt.freeze(fun, w)
    for _ in range(3):
        equal(frozen(x), x @ (2 * w).astype(BF16))
    assert calls == {"pure": 1, "io": 3}


def test_references_are_read_and_written_at_every_call():
    def fun(w, total, x):
        total[...] = total[...] + x * (w * 2)
        return total[...] * (w * 0 + 1)

    w, x = jnp.linspace(0, 1, 3), jnp.ones(3)
    total = jax.new_ref(jnp.zeros(3))
    frozen = jax_bolt.freeze(fun, w)
    with jax.enable_checks(True):
        equal(frozen(total, x), 2 * w)
    equal(frozen(total, x), 4 * w)
    held = jax_bolt.freeze(lambda total, x: total[...] * x, total)
    equal(held(x), 4 * w)
    total[...] = w
    equal(held(x), w)


def test_custom_derivatives_survive(x):
    @jax.custom_vjp
    def clipped(x, w):
        return jnp.clip(x @ w, -1, 1)

    clipped.defvjp(
        lambda x, w: (clipped(x, w), (x, w)), lambda r, g: (3 * (g @ r[1].T), r[1])
    )
    w, z = jnp.ones((4, 4)), x.astype(F32)[0, 0]

    def fun(w, z):
        return clipped(z, w * 2).sum()

    got = jax.grad(jax_bolt.freeze(fun, w))(z)
    close(got, jax.grad(fun, 1)(w, z))


# --- What is lowered for a GPU


def test_cuda(params, x, monkeypatch):
    from test_lower import TARGET

    from jax_bolt._src import arch, compat, invoke, plan

    def found(site, *_):
        made = plan.heuristic(site.region, arch.from_name("sm_90a"))
        assert isinstance(made, plan.Plan)
        form = made.candidate.form
        return made, invoke.Executable("d" * 64, site.region.problem, form, 0)

    monkeypatch.setattr(compat, "cuda_device", lambda: object())
    monkeypatch.setattr(resolve, "resolve", found)
    frozen = jax_bolt.freeze(lambda p, x: block(p, x), params)
    allowed = [export.DisabledSafetyCheck.custom_call(TARGET)]
    run, first = frozen._bound((x,), {})
    text = export.export(run, platforms=["cuda"], disabled_checks=allowed)(
        *first, x
    ).mlir_module()
    assert text.count("@jax_bolt.launch") == 1
    for gone in ("rsqrt", "convert", "transpose", "stablehlo.add", "constant"):
        assert gone not in text, gone
