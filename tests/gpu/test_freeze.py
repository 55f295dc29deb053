# SPDX-License-Identifier: Apache-2.0
"""Frozen functions on the GPU: the same kernels, the same bits, nothing beside them."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import region_cases as cases

import jax_bolt
from jax_bolt._src import compat, results
from jax_bolt._src.jit import loader, store


def layers(params, x):
    """Two convs as Flax computes them, the first with BatchNorm."""
    y = cases.conv(x, params["w1"].astype(x.dtype)).astype(jnp.float32)
    scale = jax.lax.rsqrt(params["var"] + 1e-5) * params["scale"]
    y = (y - params["mean"][None, None, None]) * scale[None, None, None]
    y = jax.nn.relu(y.astype(x.dtype))
    return jax.nn.relu(cases.conv(y, params["w2"].astype(x.dtype)) + x)


@pytest.fixture
def params():
    rng = np.random.default_rng(0)
    filters = {k: rng.standard_normal((3, 3, 64, 64)) / 24 for k in ("w1", "w2")}
    vectors = {k: rng.uniform(0.5, 1.5, 64) for k in ("var", "scale", "mean")}
    return {k: jnp.asarray(v, jnp.float32) for k, v in (filters | vectors).items()}


@pytest.fixture
def x():
    return jax.random.normal(jax.random.key(0), (4, 28, 28, 64)).astype(jnp.bfloat16)


@pytest.fixture
def forced(monkeypatch):
    """Kernels wherever there are any, whatever tuning chose; the store is shared."""
    monkeypatch.setattr(results, "stored", lambda *_: None)
    with jax_bolt.options(on_miss="heuristic"):
        yield


def bits(y):
    return np.asarray(y).view(np.uint16)


def close(got, want):
    got, want = (np.asarray(v, np.float32) for v in (got, want))
    assert np.linalg.norm(got - want) <= 1e-2 * np.linalg.norm(want)


def test_tuned(params, x):
    frozen = jax_bolt.freeze(layers, params)
    report = frozen.tune(x, progress=False)
    assert all(site.fused for site in report.sites), report
    close(frozen(x), jax.jit(layers)(params, x))


def test_kernels_are_all_that_runs(params, x, forced):
    frozen = jax_bolt.freeze(lambda p, x: layers(p, x), params)
    text = frozen.lower(x).as_text()
    assert text.count("@jax_bolt.launch") == 1
    for gone in ("convert", "rsqrt", "transpose"):
        assert gone not in text, gone
    close(frozen(x), jax.jit(layers)(params, x))


def test_groups_are_merged_once(x, forced):
    """The filter comes as the kernel reads it, in a sequence and by itself."""
    device = compat.cuda_device()
    assert device is not None
    if device.compute_capability != "9.0":
        pytest.skip("only Hopper's kernels take convs in groups")
    w = jax.random.normal(jax.random.key(1), (3, 3, 8, 64)).astype(x.dtype) / 8

    def grouped(w, x):
        return jax.nn.relu(cases.conv(x, w, groups=8))

    def twice(w, x):
        return grouped(w, grouped(w, x) / 4)

    for fun in (grouped, twice):
        frozen = jax_bolt.freeze(fun, w)
        text = frozen.lower(x).as_text()
        assert text.count("@jax_bolt.launch") == 1 and "select" not in text
        close(frozen(x), jax.jit(fun)(w, x))


def test_the_same_kernels_give_the_same_bits(params, x, forced):
    """Without arithmetic on vectors the regions are those of ``optimize``."""

    def casts(params, x):
        y = jax.nn.relu(cases.conv(x, params["w1"].astype(x.dtype)))
        return jax.nn.relu(cases.conv(y, params["w2"].astype(x.dtype)) + x)

    want = jax_bolt.optimize(casts)(params, x)
    assert (bits(jax_bolt.freeze(casts, params)(x)) == bits(want)).all()


def test_replacing_builds_and_loads_nothing(params, x, forced):
    frozen = jax_bolt.freeze(layers, params)
    first = bits(frozen(x))
    others = jax.tree.map(lambda v: v * 1.25, params)
    digests = set(re.findall(r"\b[0-9a-f]{64}\b", frozen.lower(x).as_text()))
    before = dict(store.stats())
    replaced = frozen.replace(others)
    got = replaced(x)
    assert store.stats() == before
    assert digests and all(loader.native().launches(d) for d in digests)
    close(got, jax.jit(layers)(others, x))
    assert (bits(got) == bits(jax_bolt.freeze(layers, others)(x))).all()
    assert (bits(frozen(x)) == first).all() and (bits(got) != first).any()


def test_inside_jit_and_vmap(params, x, forced):
    frozen = jax_bolt.freeze(layers, params)
    want = frozen(x)
    close(jax.jit(lambda x: frozen(x) * 2)(x), want * 2)
    close(jax.vmap(frozen)(x[None])[0], want)
