# SPDX-License-Identifier: Apache-2.0
"""Advice measured on the GPU, and a model that takes it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
import region_cases as cases

import jax_bolt
from jax_bolt._src import options
from jax_bolt._src.jit import store

ARGS = (
    cases.shape(4, 28, 28, 64),
    cases.shape(3, 3, 64, 96),
    cases.shape(96, dtype=jnp.float32),
)


def model(act, x, w, bias):
    y = cases.conv(x, w).astype(jnp.float32) + cases.over_channels(bias, x)
    return act(y.astype(x.dtype))


def with_relu(*args):
    return model(jax.nn.relu, *args)


def with_silu(*args):
    return model(jax.nn.silu, *args)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def test_all_is_measured_and_serves_the_model_that_takes_it(cache):
    with options.options(cache_dir=cache):
        advice = jax_bolt.advise(
            with_relu, *ARGS, activations=["relu", "silu"], progress=False
        )
        assert advice.device
        (site,) = advice.sites
        compared = (site.now, *site.activations.values())
        assert all(time.measured_us for time in compared)
        assert site.activations["relu"] == site.now
        assert [pad.to for pad in site.channels] == [128]
        assert site.pointwise is not None
        for time in (site.activations["silu"], site.channels[0].time, site.now):
            assert time.measured_us and time.xla_us and time.runs
            assert time.measured_us <= time.xla_us * 1.03
        # The changed model is the region that was measured: nothing is tuned again.
        before = store.stats()
        report = jax_bolt.tune(with_silu, *ARGS, progress=False)
        assert store.stats()["tuned"] == before["tuned"]
        (taken,) = report.sites
        assert taken.chosen_us == site.activations["silu"].measured_us


LARGE = (
    cases.shape(32, 56, 56, 64),
    cases.shape(3, 3, 64, 64),
    cases.shape(64, dtype=jnp.float32),
)


def deeper(x, w, bias, after, after_bias):
    y = with_relu(x, w, bias)
    return jax.nn.relu(cases.conv(y, after) + after_bias)


def test_a_chain_that_was_timed_serves_the_deeper_model(cache):
    after = cases.shape(1, 1, 64, 64), cases.shape(1, 1, 1, 64)
    with options.options(cache_dir=cache):
        (site,) = jax_bolt.advise(
            with_relu, *LARGE, activations=["relu"], progress=False
        ).sites
        one = site.pointwise
        assert one is not None
        if jax_bolt.explain(with_relu, *LARGE).arch != "sm_90a":
            assert one.chain is None
            return
        assert one.chain is not None and one.chain.measured_us
        assert one.chain.runs in ("kernel", "apart")
        assert one.chain.measured_us > one.chain_floor_us
        before = store.stats()
        report = jax_bolt.tune(deeper, *LARGE, *after, progress=False)
        assert store.stats()["tuned"] == before["tuned"]
        (link,) = report.sites[0].chains
        assert link.time_us == one.chain.measured_us


def test_no_budget_leaves_estimates_and_no_failure(tmp_path):
    with options.options(cache_dir=tmp_path):
        advice = jax_bolt.advise(
            with_relu, *ARGS, activations=["elu"], budget_s=0.0, progress=False
        )
        (site,) = advice.sites
        assert site.activations["elu"].measured_us is None
        assert site.activations["elu"].estimate_us
        # It is tuned where a program needs it.
        (tuned,) = jax_bolt.tune(with_relu, *ARGS, progress=False).sites
        assert tuned.time_us is not None
