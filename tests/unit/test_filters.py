# SPDX-License-Identifier: Apache-2.0
"""Frozen filters as a kernel wants them: made once, and read by that kernel alone."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import region_cases as cases
from test_errors import TARGET, gpu, nvcc  # noqa: F401

import jax_bolt
from jax_bolt._src import agree, filters, forms, ir, options, plan, program, resolve
from jax_bolt._src import arch as arch_
from jax_bolt._src.primitive import SiteInfo

X = cases.shape(2, 8, 8, 64)
HOPPER = arch_.from_name("sm_90a")


def grouped(w: Any, x: Any) -> Any:
    return jax.nn.relu(cases.conv(x, w, groups=16))


def three_by_three(w: Any, x: Any) -> Any:
    return jax.nn.relu(cases.conv(x, w))


def filter_of(*shape: int, dtype: Any = jnp.bfloat16) -> jax.Array:
    values = np.random.default_rng(0).standard_normal(shape, np.float32)
    return jnp.asarray(values / np.sqrt(shape[0] * shape[1] * shape[2])).astype(dtype)


def lowered(fun: Any, *args: Any) -> str:
    traced = jax.jit(lambda *args: fun(*args)).trace(*args)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


def sites_of(frozen: Any, *args: Any) -> list[SiteInfo]:
    return frozen._rewritten(args, {}).family.sites


def test_groups_are_merged_ahead_of_all_calls(gpu, nvcc):  # noqa: F811
    w = filter_of(3, 3, 4, 64)
    at_call = lowered(jax_bolt.optimize(grouped), w, X)
    frozen = jax_bolt.freeze(grouped, w)
    once = lowered(frozen, X)
    assert TARGET in at_call and "stablehlo.select" in at_call
    assert TARGET in once and "stablehlo.select" not in once
    (site,) = sites_of(frozen, X)
    assert site.ready == "merged_groups"


def test_in_a_sequence_too(gpu, nvcc):  # noqa: F811
    w = filter_of(3, 3, 4, 64)
    frozen = jax_bolt.freeze(lambda w, x: grouped(w, grouped(w, x) / 4), w)
    text = lowered(frozen, X)
    assert text.count(f"@{TARGET}") == 1 and "stablehlo.select" not in text
    assert [site.ready for site in sites_of(frozen, X)] == ["merged_groups"] * 2


def test_what_was_made_is_what_the_form_makes(gpu, nvcc):  # noqa: F811
    w = filter_of(3, 3, 4, 64)
    frozen = jax_bolt.freeze(grouped, w)
    frozen(jnp.zeros(X.shape, X.dtype))
    (values,) = frozen._function.shared.known(frozen._leaves).values()
    problem = sites_of(frozen, X)[0].region.problem
    want = forms.prepare_right("merged_groups", problem, w)
    assert any(v.shape == want.shape and bool((v == want).all()) for v in values)


def test_the_values_are_the_users_on_a_cpu(gpu, nvcc):  # noqa: F811
    w = filter_of(3, 3, 4, 64, dtype=jnp.float32)
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 64), jnp.float32)
    frozen = jax_bolt.freeze(grouped, w)
    np.testing.assert_array_equal(frozen(x), jax.jit(grouped)(w, x))

    def loss(fun: Any) -> Any:
        return jax.grad(lambda x: jnp.sum(jnp.square(fun(x))))(x)

    np.testing.assert_allclose(
        loss(frozen), loss(lambda x: grouped(w, x)), rtol=1e-4, atol=1e-4
    )
    batched = jax.vmap(frozen)(x[None])
    np.testing.assert_allclose(batched[0], frozen(x), rtol=1e-5, atol=1e-5)


def test_nothing_is_made_where_a_kernel_takes_the_filter_as_it_is(gpu, nvcc):  # noqa: F811
    frozen = jax_bolt.freeze(three_by_three, filter_of(3, 3, 64, 64))
    assert TARGET in lowered(frozen, X)
    (site,) = sites_of(frozen, X)
    assert site.ready is None and len(site.in_avals) == 2


def test_only_what_is_frozen_is_made_ahead(gpu, nvcc):  # noqa: F811
    both = jax_bolt.freeze(lambda scale, w, x: grouped(w, x) * scale, jnp.bfloat16(2))
    (site,) = sites_of(both, cases.shape(3, 3, 4, 64), X)
    assert site.ready is None


def test_without_a_gpu_nothing_is_made():
    frozen = jax_bolt.freeze(grouped, filter_of(3, 3, 4, 64))
    (site,) = sites_of(frozen, X)
    assert site.ready is None
    assert filters.for_device(options.current()) is None


def test_another_form_reads_the_filter_as_the_user_has_it(gpu, nvcc, monkeypatch):  # noqa: F811
    """The choice may have changed since: it was tuned at the first call, say."""
    w = filter_of(3, 3, 64, 64)
    monkeypatch.setattr(filters, "form_of", lambda *_: "krsc")
    frozen = jax_bolt.freeze(three_by_three, w)
    (site,) = sites_of(frozen, X)
    assert site.ready == "krsc"
    text = lowered(frozen, X)
    assert TARGET in text and "stablehlo.transpose" not in text
    made = plan.heuristic(site.region, HOPPER)
    assert isinstance(made, plan.Plan) and made.candidate.form.name == "hwio"


def test_several_processes_have_the_same_program(gpu, nvcc, monkeypatch):  # noqa: F811
    """So only a form that is the only one is made ahead, not one that was tuned."""
    monkeypatch.setattr(agree, "group", lambda *_: object())
    monkeypatch.setattr(
        filters.results, "stored", lambda *_: pytest.fail("asked what was tuned")
    )
    stem = ir.ConvProblem(
        n=2,
        h=8,
        w=8,
        c=3,
        k=64,
        r=3,
        s=3,
        stride=(2, 2),
        padding=(1, 1, 1, 1),
        dtype="bf16",
    )
    (alone,) = program.trace(
        grouped, (), (cases.shape(3, 3, 4, 64), X), {}, options.current()
    )[0].family.sites
    several = ir.Region(problem=stem, epilogue=alone.region.epilogue)
    device, active = gpu, options.current()
    assert filters.form_of(alone.region, device, active) == "merged_groups"
    assert filters.form_of(several, device, active) is None
    assert resolve.arch_of(device).sm == 90


def test_a_filter_that_is_sharded_as_it_cannot_be_split(gpu, nvcc):  # noqa: F811
    """Its channels' axis cannot be reshaped then: XLA takes it as it is."""
    mesh = jax.make_mesh((1,), ("i",), axis_types=(jax.sharding.AxisType.Explicit,))
    spec = jax.sharding.PartitionSpec(None, None, None, "i")
    w = jax.device_put(filter_of(3, 3, 4, 64), jax.NamedSharding(mesh, spec))
    x = jnp.ones(X.shape, X.dtype)
    with jax.set_mesh(mesh):
        want = jax.jit(grouped)(w, x)
        frozen = jax_bolt.freeze(grouped, w)
        np.testing.assert_array_equal(frozen(x), want)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert "stablehlo.convolution" in lowered(jax_bolt.optimize(grouped), w, x)


@pytest.mark.parametrize("on_miss", ["xla", "error"])
def test_nothing_is_made_where_nothing_runs(gpu, nvcc, monkeypatch, on_miss):  # noqa: F811
    with options.options(on_miss=on_miss):
        (site,) = sites_of(jax_bolt.freeze(grouped, filter_of(3, 3, 4, 64)), X)
    assert site.ready is None


def test_what_fails_is_made_at_every_call(gpu, nvcc, monkeypatch):  # noqa: F811
    def fail(*_: Any) -> None:
        raise RuntimeError("no such device")

    monkeypatch.setattr(filters, "form_of", fail)
    (site,) = sites_of(jax_bolt.freeze(grouped, filter_of(3, 3, 4, 64)), X)
    assert site.ready is None
