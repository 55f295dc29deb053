# SPDX-License-Identifier: Apache-2.0
"""Chains against float64, on random data and ragged sizes (contract 1)."""

from __future__ import annotations

import functools

import chain_cases as cases
import jax
import numpy as np
import pytest
from test_kernels import errors, target, truth

from jax_bolt._src import forms, plan
from jax_bolt._src.errors import CompileError
from jax_bolt._src.invoke import ChainExecutable
from jax_bolt._src.jit import loader
from jax_bolt._src.kernels import chain_sm90, chain_tiles, merged_sm90
from jax_bolt._src.launches import Launches
from jax_bolt._src.plan import ChainCandidate
from jax_bolt._src.primitive import reference_fun
from jax_bolt._src.tune import isolate, measure
from jax_bolt._src.tune.target import executable

ALL = [*cases.CASES, *cases.MERGED, *cases.JOINED]


@pytest.fixture(scope="module", autouse=True)
def hopper():
    if target().arch.sm != 90:
        pytest.skip(f"the kernel is Hopper's; this is an {target().arch.name}")


def candidates(case) -> list[ChainCandidate]:
    """The first by rank, and one of each kind of tile; the largest of these. Whether
    that has groups of several blocks differs from case to case."""
    arch = target().arch
    if case in cases.MERGED:
        return merged(case)
    form = next(
        form
        for form in forms.chain_forms(case.site().region)
        if chain_sm90.supports(form.region, arch) is None
    )
    kinds, grouped = {}, len(case.name) % 2
    for tile in chain_tiles.tiles_of(form.region, arch):
        rings = tile.rings.resident, tile.ahead
        kind = tile.warpgroups, tile.cluster, tile.im2col, *rings
        if kind not in kinds or (tile.group > 1) == grouped:
            kinds[kind] = tile
    first = chain_sm90.configs(form.region, arch)[0]
    configs = dict.fromkeys((first, *(tile.config() for tile in kinds.values())))
    return [ChainCandidate(form, chain_sm90, config, arch) for config in configs]


def merged(case) -> list[ChainCandidate]:
    """The first by rank, and one of each kind that the tuner may take."""
    found, _ = plan.chain_candidates(case.site().region, target().arch)
    if not found:  # not worth a look, on so little data
        form = forms.chain_forms(case.site().region)[0]
        configs = merged_sm90.configs(form.region, target().arch)
        found = [ChainCandidate(form, merged_sm90, c, target().arch) for c in configs]
    kinds = {}
    for candidate in found:
        kinds.setdefault((candidate.kind, candidate.config["stages"]), candidate)
    return list(kinds.values())


@functools.cache
def all_candidates():
    """case name -> its candidates; everything is compiled together, in parallel."""
    found = {case.name: candidates(case) for case in ALL}
    sources = {c.source for group in found.values() for c in group}
    built = target().kernels.build(target().toolchain, sorted(sources), target().arch)
    return found, built


def built(candidate):
    """Its digest and its artifact."""
    digest = target().digest(candidate.source)
    return digest, all_candidates()[1][digest]


def load(site, candidate):
    return executable(site.region, candidate, *built(candidate), target())


@pytest.mark.parametrize("case", ALL, ids=str)
def test_every_output_element_is_written(case):
    """In a process of its own, which a launch that never ends does not outlive."""
    with isolate.worker(target().ordinal) as worker:
        for candidate in all_candidates()[0][case.name]:
            digest, path = built(candidate)
            assert not isinstance(path, CompileError), path
            request = isolate.request_for(candidate, digest, path, 2, 3, verify=True)
            assert worker.time(request).micros > 0, candidate.text


@pytest.mark.parametrize("case", ALL, ids=str)
def test_error_is_at_most_1_25_of_xla(case):
    site = case.site()
    operands = measure.make_operands(site, l2_bytes=1).sets[0]
    wanted = truth(site, operands)
    xla = errors(jax.jit(reference_fun(site.reference))(*operands), wanted)
    for candidate in all_candidates()[0][case.name]:
        kernel = load(site, candidate)
        ours = jax.jit(measure.kernel_function(site, kernel))
        before = loader.native().launches(kernel.digest)
        found = errors(ours(*operands), wanted)
        assert loader.native().launches(kernel.digest) == before + 1
        for error, of_xla in zip(found, xla, strict=True):
            assert error <= 1.25 * of_xla + 1e-7, (candidate.text, found, xla)


@pytest.mark.parametrize("case", ALL[::3], ids=str)
def test_results_are_bitwise_equal_over_runs(case):
    site = case.site()
    operands = measure.make_operands(site, l2_bytes=1).sets[0]
    for candidate in all_candidates()[0][case.name]:
        fun = jax.jit(measure.kernel_function(site, load(site, candidate)))
        first = [np.asarray(output).tobytes() for output in fun(*operands)]
        for _ in range(100):
            again = [np.asarray(output).tobytes() for output in fun(*operands)]
            assert again == first, candidate.text


@pytest.mark.parametrize("case", cases.CASES[:1], ids=str)
def test_one_starts_while_another_ends(case):
    """Each of several in a custom call reads the last one's result."""
    site = case.site()
    operands = measure.make_operands(site, l2_bytes=1).sets[0]
    first, second = measure.roles_of(site, operands)
    shapes = [each.out_avals[0].shape for each in site.sites]
    for candidate in all_candidates()[0][case.name]:
        kernel = load(site, candidate)
        assert isinstance(kernel, ChainExecutable)

        def run(x, kernel=kernel, count=1):
            launches, promises = Launches(), []
            for _ in range(count):
                roles = (x, *first[1:]), second
                _, x = launches.add_chain(kernel, roles, shapes)
                promises.append(x)
            made = launches.launch(promises)
            return [made[promise] for promise in promises]

        together = jax.jit(functools.partial(run, count=8))(first[0])
        x = first[0]
        for got in together:
            (x,) = jax.jit(run)(x)
            got, alone = np.asarray(got), np.asarray(x)
            np.testing.assert_array_equal(got, alone, candidate.text)
