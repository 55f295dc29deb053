# SPDX-License-Identifier: Apache-2.0
"""Kernels that pool their result, or take its mean: every kind of tile, to the bit."""

from __future__ import annotations

import dataclasses
import functools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import region_cases as cases

from jax_bolt._src import compat, invoke, options, plan, resolve
from jax_bolt._src.kernels.image import Image
from jax_bolt._src.kernels.implicit_gemm_tiles import tiles_of
from jax_bolt._src.tune import measure
from jax_bolt._src.tune.target import executable

_TILES = 12  # of a case: some of all, whatever their rank


@functools.cache
def target():
    return resolve.target_for(compat.cuda_device(), options.current())


@functools.cache
def chosen(case):
    """Candidates of each form whose kernel pools: a tile of each kind, and others."""
    site = case.site()
    possible, _ = plan.candidates(site.region, target().arch)
    forms = {}
    for candidate in possible:
        if not candidate.form.ends_on_xla:
            forms.setdefault(candidate.form.name, candidate)
    found = []
    for candidate in forms.values():
        region = candidate.form.region
        image = Image.of_region(region)
        tiles = list(tiles_of(image, region.epilogue, candidate.arch))
        random.Random(case.name).shuffle(tiles)
        kinds = {}
        for tile in tiles:
            layout = tile.layout(image)
            kind = (tile.schedule, layout.count, tile.warpgroups, tile.block.images)
            kinds.setdefault((*kind, layout.whole_images, layout.whole_rows), tile)
        for tile in dict.fromkeys((*kinds.values(), *tiles[:_TILES])):
            found.append(dataclasses.replace(candidate, config=tile.config()))
    return found


def outputs(case, candidates, operands):
    site = case.site()
    sources = sorted({c.source for c in candidates})
    built = target().kernels.build(target().toolchain, sources, target().arch)
    for candidate in candidates:
        digest = target().digest(candidate.source)
        kernel = executable(site.region, candidate, digest, built[digest], target())
        (made,) = jax.jit(measure.kernel_function(site, kernel))(*operands)
        yield candidate, np.asarray(made.astype(jnp.float32))


def integers(site):
    """Small ones, whose sums are exact in any order; statistics that keep them so."""
    rng = np.random.default_rng(0)
    *avals, _, _, _, _ = site.in_avals
    drawn = (rng.integers(-2, 3, aval.shape) for aval in avals)
    operands = [jnp.asarray(v, a.dtype) for v, a in zip(drawn, avals, strict=True)]
    # With the variance's addend, 1e-5, the root is of 1.
    values = (1.0, np.float32(1) - np.float32(1e-5), 1.0, -3.0)
    for aval, value in zip(site.in_avals[-4:], values, strict=True):
        operands.append(jnp.full(aval.shape, value, aval.dtype))
    return operands


HOPPER = [case for case in cases.POOLED if "-33x3x3" not in case.name]
# All but those that no kernel takes the mean of.
MEANS = cases.AVERAGED[:-2]


def maxima(site, operands):
    (truth,) = measure.truth(site, operands)
    dtype = site.out_avals[0].dtype
    return np.asarray(truth.astype(dtype).astype(jnp.float32))


def means(site, operands):
    """Of the results as they are rounded; the sums of integers are exact."""
    whole = dataclasses.replace(site.region, pool=None)
    (results,) = measure.truth(dataclasses.replace(site, region=whole), operands)
    dtype = invoke.JAX_DTYPES[site.region.epilogue.out_dtype]
    problem = site.region.problem
    pixels = np.float32(problem.p * problem.q)
    rounded = np.asarray(results.astype(dtype).astype(jnp.float32))
    sums = rounded.reshape(problem.n, -1, problem.k).sum(1, dtype=np.float32)
    return np.asarray(jnp.asarray(sums / pixels).astype(dtype).astype(jnp.float32))


@pytest.mark.parametrize("case", [*HOPPER, *MEANS], ids=str)
def test_every_tile_gives_what_it_should_of_the_results(case):
    if target().arch.sm != 90:
        pytest.skip("Hopper's kernel alone pools")
    site = case.site()
    operands = integers(site)
    wanted = (means if case in MEANS else maxima)(site, operands)
    assert len(np.unique(wanted)) > 4
    candidates = chosen(case)
    assert len(candidates) >= 4
    for candidate, got in outputs(case, candidates, operands):
        same = got.reshape(wanted.shape)
        np.testing.assert_array_equal(same, wanted, candidate.text)


def _packs(candidate) -> bool:
    """Whether its filter has more taps than the conv, which read more pixels."""
    form = candidate.form
    packed = candidate.template.prologue(form.region) is not None
    return packed or "space_to_depth" in form.name


@pytest.mark.parametrize("case", HOPPER[:3], ids=str)
def test_nan_is_in_all_windows_that_have_it(case):
    if target().arch.sm != 90:
        pytest.skip("Hopper's kernel alone pools")
    site = case.site()
    operands = integers(site)
    operands[0] = operands[0].at[0, 5, 6, 1].set(jnp.nan)
    (truth,) = measure.truth(site, operands)
    wanted = np.isnan(np.asarray(truth))
    assert wanted.any() and not wanted.all()
    for candidate, got in outputs(case, chosen(case)[:4], operands):
        found = np.isnan(got.reshape(wanted.shape))
        if _packs(candidate):
            # Taps that pad a packed filter are zeros, and zero times NaN is NaN.
            assert (found | ~wanted).all(), candidate.text
        else:
            np.testing.assert_array_equal(found, wanted, candidate.text)


@pytest.mark.parametrize("case", MEANS[:3], ids=str)
def test_nan_is_in_the_mean_of_its_image_alone(case):
    if target().arch.sm != 90:
        pytest.skip("Hopper's kernel alone pools")
    site = case.site()
    operands = integers(site)
    operands[0] = operands[0].at[1, 2, 3, 1].set(jnp.nan)
    for candidate, got in outputs(case, chosen(case), operands):
        found = np.isnan(got.reshape(-1, site.region.problem.k))
        wanted = np.zeros_like(found)
        wanted[1] = True
        np.testing.assert_array_equal(found, wanted, candidate.text)


@pytest.mark.parametrize("case", [*HOPPER[:3], *MEANS], ids=str)
def test_results_are_those_of_the_kernel_and_xlas_pool(case):
    """Random numbers: of the same results; means are sums in another order."""
    site = case.site()
    possible, _ = plan.candidates(site.region, target().arch)
    after = next(c for c in possible if c.form.ends_on_xla)
    operands = measure.make_operands(site, l2_bytes=1).sets[0]
    ((_, apart),) = outputs(case, [after], operands)
    first = next((c for c in possible if not c.form.ends_on_xla), None)
    if first is None:
        pytest.skip("no kernel pools here")
    ((_, got),) = outputs(case, [first], operands)
    error = np.linalg.norm(got.reshape(apart.shape) - apart) / np.linalg.norm(apart)
    assert error <= 0.002
