# SPDX-License-Identifier: Apache-2.0
"""Every template against float64, on random data and ragged sizes (contract 1)."""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import region_cases as cases

from jax_bolt._src import compat, options, plan, resolve
from jax_bolt._src.errors import CompileError
from jax_bolt._src.jit import loader
from jax_bolt._src.kernels import depthwise, depthwise_tiles, implicit_gemm_sm90
from jax_bolt._src.kernels.image import Image
from jax_bolt._src.kernels.implicit_gemm_tiles import Tile, tiles_of
from jax_bolt._src.primitive import reference_fun
from jax_bolt._src.tune import isolate, measure
from jax_bolt._src.tune.target import executable


@functools.cache
def target():
    return resolve.target_for(compat.cuda_device(), options.current())


def chosen(case, candidates):
    """One candidate of each template and form; which one differs from case to case."""
    groups: dict = {}
    for candidate in candidates:
        key = (candidate.template.name, candidate.form.name)
        groups.setdefault(key, []).append(candidate)
    turn = len(case.name)
    found = [group[turn % len(group)] for group in groups.values()]
    found += first(candidates, lambda tile: tile.parts > 1)
    found += first(candidates, lambda tile: tile.im2col)
    found += kinds(candidates)
    return found + (splits(candidates) if is_deep(case) else [])


def first(candidates, is_wanted):
    """A candidate of each form with such a tile."""
    found = {}
    for candidate, tile in tiles(candidates):
        if is_wanted(tile):
            found.setdefault(candidate.form.name, with_tile(candidate, tile))
    return list(found.values())


def kinds(candidates):
    """Depthwise candidates: for every number of channels that a thread may have, and
    for strips that are rows or halves of them, spread over the SMs or not."""
    found: dict = {}
    for candidate in candidates:
        if candidate.template is depthwise:
            for tile in depthwise_tiles.tiles_of(candidate.form.region, candidate.arch):
                made = with_tile(candidate, tile)
                found.setdefault((tile.width, None), made)
                found.setdefault((tile.whole, tile.spread), made)
            break
    return list(dict.fromkeys(found.values()))


def splits(candidates):
    """One candidate for every number of CTAs that can share a tile, with something to
    finish for each of them and without."""
    found = {}
    for candidate, tile in tiles(candidates):
        if tile.splits > 1:
            key = (tile.splits, tile.pixels < 8 * tile.splits)
            found.setdefault(key, with_tile(candidate, tile))
    return list(found.values())


def with_tile(candidate, tile):
    return dataclasses.replace(candidate, config=tile.config())


def tiles(candidates):
    """Every tile of the Hopper family in every form, whatever its rank."""
    forms = {}
    for candidate in candidates:
        if candidate.template is implicit_gemm_sm90:
            forms.setdefault(candidate.form.name, candidate)
    for candidate in forms.values():
        region = candidate.form.region
        image = Image.of_region(region)
        for tile in tiles_of(image, region.epilogue, candidate.arch):
            yield candidate, tile


def is_deep(case):
    """Whether its sums are long and its tiles few."""
    deep = ("1000x136", "7x7x320", "7x7x256", "7x7x464")
    return any(text in case.name for text in deep)


@functools.cache
def all_candidates():
    """case name -> its candidates; everything is compiled together, in parallel."""
    found = {}
    for case in (*cases.GEMMS, *cases.CONVS):
        region = case.site().region
        possible, _ = plan.candidates(region, target().arch, superseded=True)
        possible = [c for c in possible if c.form.part is None]
        found[case.name] = chosen(case, plan.likeliest(possible))
    sources = {c.source for group in found.values() for c in group}
    built = target().kernels.build(target().toolchain, sorted(sources), target().arch)
    return found, built


def built(candidate):
    """Its digest and its artifact."""
    digest = target().digest(candidate.source)
    return digest, all_candidates()[1][digest]


def load(site, candidate):
    return executable(site.region, candidate, *built(candidate), target())


def truth(site, operands):
    """The region's outputs in float64 on the CPU."""
    cpu = jax.devices("cpu")[0]
    with jax.enable_x64(True), jax.default_device(cpu):
        operands = [jax.device_put(np.asarray(x), cpu) for x in operands]
        return list(map(np.asarray, measure.truth(site, operands, jnp.float64)))


def errors(outputs, wanted):
    return [
        relative_error(got, want) for got, want in zip(outputs, wanted, strict=True)
    ]


def relative_error(got, want):
    got = np.asarray(got).astype(np.float64).reshape(want.shape)
    assert np.isfinite(got).all()
    return np.linalg.norm(got - want) / np.linalg.norm(want)


@pytest.mark.parametrize("case", [*cases.GEMMS, *cases.CONVS], ids=str)
def test_error_is_at_most_1_25_of_xla(case):
    site = case.site()
    operands = measure.make_operands(site, l2_bytes=1).sets[0]
    wanted = truth(site, operands)
    xla = errors(jax.jit(reference_fun(site.reference))(*operands), wanted)
    candidates = all_candidates()[0][case.name]
    assert candidates
    for candidate in candidates:
        kernel = load(site, candidate)
        ours = jax.jit(measure.kernel_function(site, kernel))
        before = loader.native().launches(kernel.digest)
        found = errors(ours(*operands), wanted)
        assert loader.native().launches(kernel.digest) == before + 1
        for error, of_xla in zip(found, xla, strict=True):
            assert error <= 1.25 * of_xla + 1e-7, (candidate.text, found, xla)


STORING = [c for c in (*cases.GEMMS, *cases.CONVS) if "stores-" in c.name]


@pytest.mark.parametrize(
    "case", [*STORING, *cases.POOLED[:3], *cases.AVERAGED[:3]], ids=str
)
def test_a_part_and_what_xla_makes_of_it(case):
    """As accurate as plain JAX is when it rounds what is stored before it reads it."""
    site = case.site()
    possible, _ = plan.candidates(site.region, target().arch)
    candidate = next(c for c in possible if c.form.ends_on_xla)
    toolchain, arch = target().toolchain, target().arch
    made = target().kernels.build(toolchain, [candidate.source], arch)
    ((digest, artifact),) = made.items()
    kernel = executable(site.region, candidate, digest, artifact, target())
    operands = measure.make_operands(site, l2_bytes=1).sets[0]
    wanted = truth(site, operands)
    exactly = {"xla_allow_excess_precision": False}
    plain = jax.jit(reference_fun(site.reference), compiler_options=exactly)
    before = loader.native().launches(digest)
    ours = jax.jit(measure.kernel_function(site, kernel))(*operands)
    assert loader.native().launches(digest) == before + 1
    found, of_xla = errors(ours, wanted), errors(plain(*operands), wanted)
    for error, allowed in zip(found, of_xla, strict=True):
        assert error <= 1.25 * allowed + 1e-7, (candidate.text, found, of_xla)


def test_every_template_ran():
    ran = {c.template.name for group in all_candidates()[0].values() for c in group}
    expected = {"gemm_sm80", "conv_sm80", "depthwise"}
    if target().arch.sm == 90:
        expected |= {"implicit_gemm_sm90"}
    assert ran == expected
    texts = {c.config.text for group in all_candidates()[0].values() for c in group}
    seen = {int(n) for text in texts for n in re.findall(r"splits=(\d+)", text)}
    assert seen == ({1, 2, 3, 4, 6, 8} if target().arch.sm == 90 else set())


REPEATED = [
    case
    for case in (*cases.GEMMS, *cases.CONVS)
    if is_deep(case)
    or case in (cases.DEPTHWISE[0], *cases.POOLED, *cases.AVERAGED)
    or "33x31x3-64" in case.name
]


@pytest.mark.parametrize("case", [cases.GEMMS[0], cases.CONVS[0], *REPEATED], ids=str)
def test_results_are_bitwise_equal_over_runs(case):
    site = case.site()
    operands = measure.make_operands(site, l2_bytes=1).sets[0]
    for candidate in all_candidates()[0][case.name]:
        fun = jax.jit(measure.kernel_function(site, load(site, candidate)))
        first = [np.asarray(output).tobytes() for output in fun(*operands)]
        for _ in range(100):
            again = [np.asarray(output).tobytes() for output in fun(*operands)]
            assert again == first, candidate.text


PARTLY = [
    case
    for case in cases.CONVS
    if re.search("conv-.*x(96-96|112-64|464-96|100-24)x3x3", case.name)
]


@pytest.mark.parametrize("case", PARTLY, ids=str)
def test_products_of_zeros_change_nothing(case):
    """A kernel leaves those of its last chunk out, and its sums are the same."""
    if target().arch.sm != 90:
        pytest.skip("needs Hopper's kernels")
    site = case.site()
    operands = measure.make_operands(site, l2_bytes=1).sets[0]
    own = [
        candidate
        for candidate in all_candidates()[0][case.name]
        if candidate.template is implicit_gemm_sm90
    ]
    assert own
    whole = [
        with_tile(c, dataclasses.replace(Tile.of(c.config), zeros=True)) for c in own
    ]
    sources = {candidate.source for candidate in whole}
    assert sources.isdisjoint(candidate.source for candidate in own)
    made = target().kernels.build(target().toolchain, sorted(sources), target().arch)
    for candidate, other in zip(own, whole, strict=True):
        digest = target().digest(other.source)
        kernels = (
            load(site, candidate),
            executable(site.region, other, digest, made[digest], target()),
        )
        results = [
            jax.jit(measure.kernel_function(site, k))(*operands) for k in kernels
        ]
        for got, want in zip(*results, strict=True):
            # A zero may have another sign.
            np.testing.assert_array_equal(got, want, candidate.text)


def test_every_output_element_is_written():
    """The tuner's worker looks for what two launches leave as it was."""
    with isolate.worker(target().ordinal) as worker:
        some = (cases.GEMMS[0], cases.CONVS[0], cases.CONVS[6])
        pooled = (*cases.POOLED, *cases.AVERAGED)
        for case in (*some, *STORING, *pooled, *cases.DEPTHWISE):
            for candidate in all_candidates()[0][case.name]:
                digest, path = built(candidate)
                assert not isinstance(path, CompileError)
                request = isolate.request_for(
                    candidate, digest, path, 2, 3, verify=True
                )
                assert worker.time(request).micros > 0


def test_small_tiles_of_resident_filters_end():
    """However often a CTA has another tile, a warp that loads never waits for ever.

    Tens of thousands of launches: what this is for happened once in hundreds.
    """
    site = cases.Case("many tiles", *_dense_of(1 << 16, 64, 64)).site()
    smallest = {}
    for candidate, tile in tiles(plan.candidates(site.region, target().arch)[0]):
        best = smallest.get(tile.schedule)
        if tile.rings.resident and (best is None or tile.pixels < best[1].pixels):
            smallest[tile.schedule] = (with_tile(candidate, tile), tile)
    if target().arch.sm == 90:
        assert set(smallest) == {"cooperative", "pingpong"}
    with isolate.worker(target().ordinal) as worker:
        for candidate, _ in smallest.values():
            digest = target().digest(candidate.source)
            made = target().kernels.build(
                target().toolchain, [candidate.source], target().arch
            )
            path = made[digest]
            assert not isinstance(path, CompileError), path
            request = isolate.request_for(candidate, digest, path, 1, 300, verify=True)
            assert worker.time(request, 20.0).micros > 0, candidate.text


LARGE = [
    cases.Case(
        "input", cases.conv, (cases.shape(700, 56, 56, 512), cases.shape(3, 3, 512, 8))
    ),
    cases.Case(
        "output", cases.conv, (cases.shape(700, 56, 56, 8), cases.shape(1, 1, 8, 512))
    ),
    cases.Case(
        "depthwise",
        functools.partial(cases.conv, groups=512),
        (cases.shape(700, 56, 56, 512), cases.shape(3, 3, 1, 512)),
    ),
]


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_tensors_of_more_than_two_gib(case):
    """The first images and the last are those of a small batch."""
    stats = jax.devices("cuda")[0].memory_stats() or {}
    if stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0) < 12 * 2**30:
        pytest.skip("needs 12 GiB of free device memory")
    site = case.site()
    candidate = plan.candidates(site.region, target().arch)[0][0]
    built = target().kernels.build(
        target().toolchain, [candidate.source], target().arch
    )
    ((digest, artifact),) = built.items()
    kernel = executable(site.region, candidate, digest, artifact, target())
    keys = jax.random.split(jax.random.key(0), 2)
    x, w = (
        jax.random.normal(key, a.shape, a.dtype)
        for key, a in zip(keys, case.args, strict=True)
    )
    (got,) = jax.jit(measure.kernel_function(site, kernel))(x, w)
    assert max(x.nbytes, got.nbytes) > 2**31
    for ends in (slice(0, 2), slice(-2, None)):
        want = np.asarray(jax.jit(case.fun)(x[ends], w)).astype(np.float64)
        assert relative_error(got[ends], want) <= 1e-2


def test_a_problem_the_kernel_was_not_built_for_is_refused():
    site = cases.GEMMS[0].site()
    candidate = all_candidates()[0][cases.GEMMS[0].name][0]
    load(site, candidate)
    narrow = cases.Case("odd", *_dense_of(300, 200, 263)).site()
    with pytest.raises(CompileError, match=r"refuses|cannot be launched"):
        form = plan.forms.Form(candidate.form.name, narrow.region)
        odd = plan.Candidate(form, candidate.template, candidate.config, candidate.arch)
        digest = target().kernels.digest(
            target().toolchain, candidate.source, target().arch
        )
        path = target().kernels.find(digest)
        assert path is not None
        executable(narrow.region, odd, digest, path, target())


def _dense_of(m, k, n):
    args = (cases.shape(m, k), cases.shape(k, n))
    return (lambda x, w: x @ w), args
