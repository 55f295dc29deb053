# SPDX-License-Identifier: Apache-2.0
"""Max-pooling in two passes: which, what it means, and what XLA is given."""

from __future__ import annotations

import re
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax import lax
from test_lower import cuda_text, kernel, shape  # noqa: F401

import jax_bolt
from jax_bolt._src import arch, compat, passes, pool, rewrite
from jax_bolt._src.options import Options
from jax_bolt._src.window import Window

STEM = shape(32, 112, 112, 64)
H200 = arch.of_device("9.0", "NVIDIA H200")


def pooled(x, window=(3, 3), strides=(2, 2), padding: Any = "SAME", operation="max"):
    """As Flax pools: windows of an image in NHWC."""
    high = jnp.issubdtype(x.dtype, jnp.integer)
    least = jnp.iinfo(x.dtype).min if high else -jnp.inf
    most = jnp.iinfo(x.dtype).max if high else jnp.inf
    init, reduce = (least, lax.max) if operation == "max" else (most, lax.min)
    if not isinstance(padding, str):
        padding = ((0, 0), *padding, (0, 0))
    init = np.array(init, x.dtype)
    return lax.reduce_window(
        x, init, reduce, (1, *window, 1), (1, *strides, 1), padding
    )


def rewritten(fun, *args, **options):
    return rewrite.rewrite(jax.make_jaxpr(fun)(*args), Options(**options))


def names(program):
    return [eqn.primitive.name for eqn in program.jaxpr.eqns]


def in_two(fun, x):
    """``fun``, which pools, with its pools in two passes."""
    done = rewritten(fun, x)
    (eqn,) = done.program.jaxpr.eqns
    return pool.in_two_passes(eqn.params["reference"], eqn.params["pool"], x)[0]


def equal_bits(got, want):
    """The same dtype, shape and bits; every NaN is alike."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.dtype == want.dtype and got.shape == want.shape
    if jnp.issubdtype(got.dtype, jnp.floating):
        nan = np.isnan(want.astype(np.float32))
        np.testing.assert_array_equal(np.isnan(got.astype(np.float32)), nan)
        got, want = (np.where(nan, 0, x).astype(x.dtype) for x in (got, want))
    assert got.tobytes() == want.tobytes()


# --- Which


@pytest.mark.parametrize(
    ("window", "strides", "order"),
    [
        ((3, 3), (2, 2), (1, 2)),
        ((3, 3), (1, 1), (1, 2)),
        ((5, 5), (1, 1), (1, 2)),
        ((3, 3), (1, 2), (2, 1)),  # the second axis leaves less
        ((2, 2), (2, 2), None),  # six loads where one pass has four
        ((3, 3), (3, 3), None),
        ((3, 1), (2, 1), None),  # one axis
        ((3, 1), (2, 2), None),
    ],
)
def test_the_order_is_that_which_loads_least(window, strides, order):
    done = rewritten(lambda x: pooled(x, window, strides), shape(4, 32, 32, 8))
    assert names(done.program) == ["bolt_pool" if order else "reduce_window_max"]
    assert [info.window.order for info in done.pools] == ([order] if order else [])


def summed(x):
    return lax.reduce_window(x, np.array(0, x.dtype), lax.add, (3, 3), (2, 2), "SAME")


def from_zero(x):
    return lax.reduce_window(x, np.array(0, x.dtype), lax.max, (3, 3), (2, 2), "SAME")


def padded_channels(x):
    sizes = (1, 3, 3, 1), (1, 2, 2, 1)
    padding = ((0, 0), (1, 1), (1, 1), (0, 1))
    return lax.reduce_window(x, np.array(-np.inf, x.dtype), lax.max, *sizes, padding)


def in_space(x):
    sizes = (1, 3, 3, 3), (1, 2, 2, 2)
    return lax.reduce_window(x, np.array(-np.inf, x.dtype), lax.max, *sizes, "SAME")


@pytest.mark.parametrize(
    ("fun", "size"),
    [
        (summed, (16, 16)),
        (from_zero, (16, 16)),
        (padded_channels, (2, 16, 16, 8)),
        (in_space, (2, 16, 16, 16)),
        (lambda x: pooled(x, padding="VALID"), (2, 2, 2, 8)),  # nothing is left
    ],
    ids=["sum", "another init", "a third axis", "three axes", "empty"],
)
def test_left_alone(fun, size):
    done = rewritten(fun, shape(*size))
    assert "bolt_pool" not in names(done.program) and done.pools == []


def test_it_can_be_disabled():
    done = rewritten(pooled, STEM, disable=("pool",))
    assert names(done.program) == ["reduce_window_max"] and not done.pools


def test_rewriting_twice_changes_nothing():
    once = rewritten(lambda x: pooled(x) + 1, STEM)
    twice = rewrite.rewrite(once.program, Options())
    assert str(twice.program) == str(once.program)
    assert [p.window for p in twice.pools] == [p.window for p in once.pools]


def conv(x, w, layout=("NHWC", "HWIO", "NHWC")):
    return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=layout)


def test_a_model_in_nchw_pools_in_nhwc():
    layout = ("NCHW", "OIHW", "NCHW")

    def model(x, w, v):
        y = jax.nn.relu(conv(x, w, layout))
        sizes = (1, 1, 3, 3), (1, 1, 2, 2)
        y = lax.reduce_window(y, np.array(-np.inf, y.dtype), lax.max, *sizes, "SAME")
        return conv(y, v, layout)

    args = shape(2, 8, 16, 24), shape(16, 8, 3, 3), shape(8, 16, 3, 3)
    (info,) = rewritten(model, *args).pools
    assert info.window.shape == (2, 16, 24, 16) and info.window.order == (1, 2)


def blocks(x, w, v, u):
    """Two convs, a pool of the second that no region ends in, and one conv that is not
    after it."""
    y = jax.nn.relu(conv(jax.nn.relu(conv(x, w)), v))
    return conv(pooled(y, operation="min"), v), jax.nn.relu(
        conv(jax.nn.relu(conv(x, u)), u)
    )


BLOCKS = shape(2, 8, 8, 16), *(shape(3, 3, 16, 16) for _ in range(3))


def test_sequences_are_as_without_it():
    done = rewritten(blocks, *BLOCKS)
    plain = rewritten(blocks, *BLOCKS, disable=("pool",))
    found = [n.replace("bolt_pool", "reduce_window_min") for n in names(done.program)]
    assert found == names(plain.program)
    assert found.count("bolt_sequence") == 2 and "bolt_pool" in names(done.program)


def test_a_pool_in_a_loop_with_a_region():
    def model(x, w):
        def step(x, _):
            y = jax.nn.relu(conv(x, w))
            return pooled(y, strides=(1, 1), operation="min"), None

        return lax.scan(step, x, None, length=2)[0]

    done = rewritten(model, *BLOCKS[:2])
    assert [info.window.label for info in done.pools] == ["min3x3"]
    args = tuple(jnp.ones(a.shape, a.dtype) for a in BLOCKS[:2])
    equal_bits(jax_bolt.optimize(model)(*args), model(*args))


# --- What it means

DTYPES = ["bfloat16", "float16", "float32", "int8", "uint8", "int32"]


def image(size, dtype, seed=0):
    """Random: many equal values, and both zeros, infinities and NaN of floats."""
    random = np.random.default_rng(seed)
    x = random.integers(-4, 5, size)
    if jnp.issubdtype(dtype, jnp.integer):
        limits = jnp.iinfo(dtype)
        ends = random.choice([limits.min, limits.max], size)
        x = np.where(random.random(size) < 0.2, ends, x % limits.max)
        return jnp.asarray(x.astype(dtype))
    x = np.copysign(x.astype(np.float32), random.choice([-1, 1], size))
    special = random.choice(np.array([np.inf, -np.inf, np.nan], np.float32), size)
    x = np.where(random.random(size) < 0.1, special, x)
    return jnp.asarray(x).astype(dtype)


SIZES = st.integers(1, 9)
PADS = st.tuples(st.integers(0, 2), st.integers(0, 2))


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(SIZES, SIZES),
    window=st.tuples(st.integers(2, 4), st.integers(2, 4)),
    strides=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    padding=st.tuples(PADS, PADS),
    dtype=st.sampled_from(DTYPES),
    operation=st.sampled_from(["max", "min"]),
    seed=st.integers(0, 99),
)
def test_random_windows(size, window, strides, padding, dtype, operation, seed):
    x = image((2, *size, 3), dtype, seed)

    def fun(x):
        return pooled(x, window, strides, padding, operation)

    assume(
        min(n + sum(pad) - w for n, pad, w in zip(size, padding, window, strict=True))
        >= 0
    )
    assume(rewritten(fun, x).pools)
    want = fun(x)
    equal_bits(in_two(fun, x), want)
    equal_bits(jax_bolt.optimize(fun)(x), want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operation", ["max", "min"])
def test_two_passes_of_the_stem(dtype, operation):
    x = image((2, 13, 14, 5), dtype)

    def fun(x):
        return pooled(x, operation=operation)

    equal_bits(in_two(fun, x), fun(x))


def test_dilated_windows():
    x = image((2, 12, 13, 3), "float32")

    def fun(x):
        return lax.reduce_window(
            *(x, np.float32(-np.inf), lax.max, (1, 3, 3, 1), (1, 1, 1, 1)),
            padding=((0, 0), (2, 1), (1, 2), (0, 0)),
            base_dilation=(1, 2, 1, 1),
            window_dilation=(1, 2, 3, 1),
        )

    equal_bits(in_two(fun, x), fun(x))


def test_derivatives_are_the_users():
    x = jnp.round(4 * jax.random.normal(jax.random.key(0), (2, 9, 8, 3)))
    weights = jax.random.normal(jax.random.key(1), pooled(x).shape)

    def loss(fun):
        return lambda x: (fun(x) * weights).sum()

    fun = jax_bolt.optimize(pooled)
    want = jax.grad(loss(pooled))(x)
    # Of equal values in a window one alone has the derivative.
    assert 0 < np.count_nonzero(want) < want.size / 2
    np.testing.assert_array_equal(jax.grad(loss(fun))(x), want)
    np.testing.assert_array_equal(jax_bolt.optimize(jax.grad(loss(pooled)))(x), want)
    for got, expected in zip(
        jax.jvp(fun, (x,), (x * x,)), jax.jvp(pooled, (x,), (x * x,)), strict=True
    ):
        np.testing.assert_array_equal(got, expected)


def test_vmap():
    x = image((2, 3, 9, 8, 4), "float32")
    mapped = jax.vmap(jax_bolt.optimize(pooled), 1, 2)(x)
    equal_bits(mapped, jax.vmap(pooled, 1, 2)(x))
    inside = jax_bolt.optimize(jax.vmap(pooled, 1, 2))
    equal_bits(inside(x), jax.vmap(pooled, 1, 2)(x))


# --- What XLA is given


@pytest.fixture
def h200(monkeypatch):
    device = types.SimpleNamespace(
        compute_capability="9.0", device_kind="NVIDIA H200", local_hardware_id=0
    )
    monkeypatch.setattr(compat, "cuda_device", lambda: device)
    return device


def windows(text):
    found = re.findall(r"window_dimensions = array<i64: ([\d, ]+)>", text)
    return [tuple(map(int, numbers.split(", "))) for numbers in found]


BOTH, FIRST, SECOND = (1, 3, 3, 1), (1, 3, 1, 1), (1, 1, 3, 1)


def test_two_windows_of_one_axis_each(h200):
    text = cuda_text(pooled, STEM)
    assert windows(text) == [FIRST, SECOND]
    assert "tensor<32x56x112x64xbf16>" in text
    assert text.count("stablehlo.maximum") == 2


def test_partitioned_programs_have_one(h200):
    mesh = jax.sharding.AbstractMesh(
        (2,), ("i",), axis_types=(jax.sharding.AxisType.Auto,)
    )
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("i"))
    x = jax.ShapeDtypeStruct(STEM.shape, STEM.dtype, sharding=sharding)
    fun = jax.jit(jax_bolt.optimize(lambda x: pooled(x)))
    text = fun.trace(x).lower(lowering_platforms=("cuda",)).as_text()
    assert windows(text) == [BOTH]


@pytest.mark.parametrize(
    "device",
    [
        None,
        types.SimpleNamespace(compute_capability="6.1", device_kind="GTX 1080"),
        types.SimpleNamespace(compute_capability="8.9", device_kind="NVIDIA L4"),
    ],
    ids=["none", "unknown", "of little bandwidth"],
)
def test_other_devices_have_one(monkeypatch, device):
    monkeypatch.setattr(compat, "cuda_device", lambda: device)
    assert windows(cuda_text(pooled, STEM)) == [BOTH]


def test_small_pools_have_one(h200):
    assert windows(cuda_text(pooled, shape(1, 112, 112, 64))) == [BOTH]


def test_no_other_platform_has_two():
    text = jax.jit(jax_bolt.optimize(lambda x: pooled(x))).lower(STEM).as_text()
    assert windows(text) == [BOTH]


# --- Where it pays


def stem(batch, window=(3, 3), strides=(2, 2), dtype=jnp.bfloat16) -> Window:
    x = shape(batch, 112, 112, 64, dtype=dtype)
    (info,) = rewritten(lambda x: pooled(x, window, strides), x).pools
    return info.window


@pytest.mark.parametrize(
    ("kind", "capability", "batch", "pays"),
    [
        ("NVIDIA H200", "9.0", 32, True),  # measured: 19.6 µs, not 33.6
        ("NVIDIA H100 80GB HBM3", "9.0", 32, True),
        ("NVIDIA H200", "9.0", 1, False),  # the launch
        ("NVIDIA H100 80GB HBM3", "9.0", 128, False),  # what is between leaves L2
        ("NVIDIA A100-SXM4-80GB", "8.0", 32, False),
        ("NVIDIA GeForce RTX 4090", "8.9", 32, False),  # memory takes longer than loads
    ],
)
def test_where_two_passes_pay(kind, capability, batch, pays):
    assert passes.two_pay(stem(batch), arch.of_device(capability, kind)) is pays


def test_windows_along_the_innermost_axis_stay():
    def fun(x):
        sizes = (1, 1, 3, 3), (1, 1, 2, 2)
        return lax.reduce_window(x, np.array(-np.inf, x.dtype), lax.max, *sizes, "SAME")

    (info,) = rewritten(fun, shape(32, 64, 112, 112)).pools
    assert info.window.order == (2, 3) and not passes.two_pay(info.window, H200)
    assert passes.two_pay(stem(32), H200)


def test_more_overlap_pays_on_more_gpus():
    wide = stem(32, (5, 5), (1, 1))
    for name in ("sm_80", "sm_89", "sm_90a", "sm_100a", "sm_120a"):
        assert passes.two_pay(wide, arch.from_name(name))


# --- The report


def test_the_report_has_a_line_for_it():
    def model(x):
        with jax.named_scope("Net"):
            return pooled(pooled(x)[:1], strides=(1, 1))

    report = jax_bolt.explain(model, STEM, arch="sm_90a")
    first, second = report.pools
    assert (first.name, first.problem) == ("Net", "max3x3/2[bfloat16 32x112x112x64]")
    assert (first.passes, second.passes) == (2, 1)
    assert second.problem == "max3x3[bfloat16 1x56x56x64]"
    assert "test_pool.py" in first.line
    assert report.sites == () and report.coverage == 1.0
    table = str(report)
    assert re.search(r"Net .*max3x3/2 .*xla, one axis after the other", table)
    assert '"passes": 2' in report.to_json()
    assert jax_bolt.explain(model, STEM).pools[0].what_runs == ""
    assert "max3x3/2[bfloat16 32x112x112x64]" in report._repr_html_()
