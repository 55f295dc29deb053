# SPDX-License-Identifier: Apache-2.0
"""Chains in programs on the GPU: tuned, run as one kernel, right, the same each time.

The kernels alone are in test_chain_kernels.py.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import region_cases as cases

import jax_bolt
from jax_bolt._src import chain, compat, kernels, options, program, resolve, results
from jax_bolt._src.jit import loader
from jax_bolt._src.tune import db, stages


def target():
    return resolve.target_for(compat.cuda_device(), options.current())


@pytest.fixture(scope="module", autouse=True)
def hopper():
    if not kernels.CHAIN_TEMPLATES or target().arch.sm != 90:
        pytest.skip(f"no template takes chains on {target().arch.name}")


def normal(seed, *dims, dtype=jnp.bfloat16):
    return jax.random.normal(jax.random.key(seed), dims).astype(dtype)


def stored(x, residual, up, down, bias):
    """The result between is the next residual, too."""
    y = jax.nn.relu(cases.conv(x, up) + residual)
    return jax.nn.relu(cases.conv(y, down) + cases.over_channels(bias, y)), y


def kept(x, residual, up, down, bias):
    z, _ = stored(x, residual, up, down, bias)
    return jax.nn.relu(z * 2)


def among_others(x, residual, up, down, bias):
    """Calls before and after, in one sequence, and two chains that share a call."""
    x = jax.nn.relu(cases.conv(x, up[:, :, :, : x.shape[-1]]))
    z, y = stored(x, residual, up, down, bias)
    return jax.nn.relu(cases.conv(z, up) + y)


def first_block(a, b, wa, wb, down):
    """A projected shortcut, and the next block's reduction: three in one kernel."""
    y = jax.nn.relu(cases.conv(a, wa) + cases.conv(b, wb, stride=2))
    return jax.nn.relu(cases.conv(y, down)), y


@pytest.fixture(scope="module")
def args():
    return (
        normal(0, 8, 28, 28, 128),
        normal(1, 8, 28, 28, 512),
        normal(2, 1, 1, 128, 512) * 0.1,
        normal(3, 1, 1, 512, 128) * 0.05,
        normal(4, 128),
    )


PROGRAMS = {"stored": stored, "kept": kept, "among_others": among_others}


@pytest.fixture(params=PROGRAMS)
def fun(request):
    return PROGRAMS[request.param]


def infos(fun, args):
    done = program.trace(fun, (), args, {}, options.current())[0]
    return [p.info for found in chain.sequences(done.program) for p in found]


def entry_of(info):
    entry = target().results.get(target().arch, info.region)
    assert entry is not None
    return entry


@pytest.fixture
def tuned(fun, args, cache_dir, monkeypatch):
    """The report of a program whose chains were all measured, however they look."""
    monkeypatch.setattr(results, "_FAR", math.inf)
    report = jax_bolt.tune(fun, *args, progress=False)
    for site in report.sites:
        for link in site.chains:
            assert link.time_us and link.apart_time_us and link.xla_time_us, link
    return report


def test_the_decision_is_what_was_measured(fun, args, tuned):
    assert any(site.chains for site in tuned.sites)
    for info in infos(fun, args):
        entry = entry_of(info)
        rival_us = db.rival_us(entry)
        assert entry.time_us and rival_us
        wins = entry.time_us < stages.MARGIN * rival_us
        assert entry.choice == ("kernel" if wins else "apart")
        assert db.is_verified(entry)
    again = jax_bolt.tune(fun, *args, progress=False)
    assert again.counters["tuned"] == tuned.counters["tuned"]


@pytest.fixture
def forced(fun, args, tuned):
    """Every chain is chosen, however long it took; its kernels' digests."""
    digests = []
    for info in infos(fun, args):
        entry = entry_of(info)
        chosen = dataclasses.replace(entry, choice="kernel", apart_time_us=1e6)
        chosen = dataclasses.replace(chosen, xla_time_us=1e6)
        target().results.put(target().arch, {info.region: chosen})
        digests.append(entry.digest)
    assert all(digests)
    return digests


def choose(info):
    """Its kernel runs, however long it took, and saves more than any two calls'."""
    entry = entry_of(info)
    us = 1e6 * len(info.sites)
    chosen = dataclasses.replace(entry, choice="kernel", apart_time_us=us)
    chosen = dataclasses.replace(chosen, xla_time_us=us)
    target().results.put(target().arch, {info.region: chosen})
    return entry.digest


def test_three_calls_in_one_kernel(cache_dir, monkeypatch):
    """Timed against the merged pair's kernel and the reduction's, and right."""
    monkeypatch.setattr(results, "_FAR", math.inf)
    args = (
        *(normal(0, 8, 14, 14, 64), normal(1, 8, 28, 28, 128)),
        *(normal(2, 1, 1, 64, 256) * 0.1, normal(3, 1, 1, 128, 256) * 0.1),
        normal(4, 1, 1, 256, 64) * 0.05,
    )
    jax_bolt.tune(first_block, *args, progress=False)
    *pairs, longest = infos(first_block, args)
    assert [len(info.sites) for info in (*pairs, longest)] == [2, 2, 3]
    for info in pairs:
        choose(info)
    jax_bolt.tune(first_block, *args, progress=False)
    entry = entry_of(longest)
    assert entry.time_us and entry.apart_time_us and db.is_verified(entry)
    digest = choose(longest)
    optimized = jax_bolt.optimize(first_block)
    assert digest in optimized.lower(*args).as_text()
    before = loader.native().launches(digest)
    got = jax.block_until_ready(optimized(*args))
    assert loader.native().launches(digest) == before + 1
    check(first_block, args, got)
    first = [np.asarray(v).view(np.uint16) for v in got]
    for _ in range(100):
        for again, once in zip(optimized(*args), first, strict=True):
            assert (np.asarray(again).view(np.uint16) == once).all()


def relative(got, want):
    got, want = (np.asarray(v, np.float64) for v in (got, want))
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def test_chains_run_and_are_right(fun, args, forced):
    """Against float64, with an error of at most 1.25 times XLA's."""
    optimized = jax_bolt.optimize(fun)
    text = optimized.lower(*args).as_text()
    running = [digest for digest in dict.fromkeys(forced) if digest in text]
    assert len(running) >= 1
    before = sum(map(loader.native().launches, running))
    got = jax.block_until_ready(optimized(*args))
    assert sum(map(loader.native().launches, running)) > before
    check(fun, args, got)


def check(fun, args, got):
    """Contract 1: against float64, beside XLA."""
    xla = jax.tree.leaves(jax.jit(fun)(*args))
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        wide = [jnp.asarray(np.asarray(a, np.float64)) for a in args]
        truth = jax.tree.leaves(jax.jit(fun)(*wide))
    for ours, theirs, true in zip(jax.tree.leaves(got), xla, truth, strict=True):
        assert ours.dtype == theirs.dtype
        assert relative(ours, true) <= 1.25 * relative(theirs, true) + 1e-6


def test_runs_are_bitwise_equal_and_none_reads_too_early(fun, args, forced):
    """Every call writes over the last one's buffers with other values."""
    optimized = jax_bolt.optimize(fun)
    inputs = [(normal(10 + i, *args[0].shape), *args[1:]) for i in range(4)]

    def bits(values):
        return [
            np.asarray(v).view(np.uint16) for v in jax.tree.leaves(optimized(*values))
        ]

    want = [bits(values) for values in inputs]
    for i in range(300):
        for got, first in zip(bits(inputs[i % 4]), want[i % 4], strict=True):
            assert (got == first).all(), i


def test_one_kernel_and_two_give_the_same(fun, args, forced):
    """Up to the order of the sums: what is between is rounded in both."""
    with options.options(disable=("chain",)):
        apart = jax.tree.leaves(jax_bolt.optimize(lambda *a: fun(*a))(*args))
    both = jax.tree.leaves(jax_bolt.optimize(lambda *a: fun(*a))(*args))
    for one, two in zip(both, apart, strict=True):
        assert relative(one, two) < 2e-3


def test_frozen(fun, args, forced):
    """Filters are packed once, and an executable of it launches a chain, too."""
    frozen = jax_bolt.freeze(
        lambda up, down, bias, *x: fun(*x, up, down, bias), *args[2:]
    )
    want = jax.tree.leaves(jax_bolt.optimize(fun)(*args))
    for got, expected in zip(jax.tree.leaves(frozen(*args[:2])), want, strict=True):
        assert relative(got, expected) < 2e-3
