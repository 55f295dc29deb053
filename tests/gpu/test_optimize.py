# SPDX-License-Identifier: Apache-2.0
"""Optimized functions on the GPU: tuning, caching, transforms, streams, graphs."""

from __future__ import annotations

import concurrent.futures
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import region_cases as cases

import jax_bolt
from jax_bolt._src import options, results
from jax_bolt._src.jit import loader


def normal(seed, *dims, dtype=jnp.bfloat16):
    return jax.random.normal(jax.random.key(seed), dims).astype(dtype)


def block(x, w1, w2, b):
    y = jax.nn.relu(cases.conv(x, w1) + cases.over_channels(b, x).astype(x.dtype))
    return jax.nn.relu(cases.conv(y, w2) + x)


@pytest.fixture(scope="module")
def args():
    return (
        normal(0, 4, 28, 28, 64),
        normal(1, 3, 3, 64, 64) * 0.05,
        normal(2, 1, 1, 64, 64) * 0.1,
        normal(3, 64, dtype=jnp.float32),
    )


@pytest.fixture(scope="module")
def tuned(args):
    """The block, tuned; XLA may have won, which some tests cannot use."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = jax_bolt.tune(block, *args)
    assert all(site.xla_time_us and site.time_us for site in report.sites), report
    return report


def close(got, want):
    got, want = (np.asarray(v, np.float32) for v in (got, want))
    assert np.linalg.norm(got - want) <= 1e-2 * np.linalg.norm(want)


@pytest.fixture
def forced(monkeypatch):
    """Kernels wherever there are any, whatever tuning chose; the store is shared."""
    monkeypatch.setattr(results, "stored", lambda *_: None)
    with jax_bolt.options(on_miss="heuristic"):
        yield


def test_tuned_and_plain_agree(args, tuned):
    close(jax_bolt.optimize(block)(*args), jax.jit(block)(*args))


def test_both_times_and_errors_are_reported(tuned):
    for site in tuned.sites:
        assert site.fused and site.kernel
        if site.kernel == "xla":
            assert "timed faster" in site.reason
        assert site.error <= 1.25 * site.xla_error + 1e-6


def test_heuristic_kernels_run_in_every_transform(args, forced):
    fun = jax_bolt.optimize(block)
    want = jax.jit(block)(*args)
    text = fun.lower(*args).as_text()
    assert text.count("kind = 3") == 1
    close(fun(*args), want)
    close(jax.jit(lambda *a: fun(*a) * 2)(*args), want * 2)
    loop = jax.jit(
        lambda x: jax.lax.scan(lambda c, _: (fun(c, *args[1:]), None), x, None, 2)[0]
    )
    close(loop(args[0]), block(block(*args), *args[1:]))
    xs = jnp.stack([args[0], args[0] * 2])
    close(
        jax.vmap(fun, in_axes=(0, None, None, None))(xs, *args[1:]),
        jax.vmap(block, in_axes=(0, None, None, None))(xs, *args[1:]),
    )

    def gradient(f, args):
        loss = lambda w: f(args[0], w, *args[2:]).astype(jnp.float32).sum()  # noqa: E731
        return np.asarray(jax.grad(loss)(args[1]), np.float64)

    # Sums over thousands of bfloat16 values: compared by their distance from float32.
    truth = gradient(block, jax.tree.map(lambda x: x.astype(jnp.float32), args))
    ours, plain = (
        np.linalg.norm(gradient(f, args) - truth) for f in (fun, jax.jit(block))
    )
    assert ours <= 1.25 * plain


def test_the_end_of_a_network_is_one_custom_call(forced):
    """Its last conv takes the mean, and the last product waits for that."""

    def head(x, residual, w, dense):
        y = jax.nn.relu(cases.conv(x, w) + residual)
        return jnp.mean(y, axis=(1, 2)) @ dense

    args = (
        *(normal(0, 9, 7, 7, 64), normal(1, 9, 7, 7, 256)),
        *(normal(2, 1, 1, 64, 256) * 0.1, normal(3, 256, 72) * 0.1),
    )
    fun = jax_bolt.optimize(head)
    first, _ = jax_bolt.explain(head, *args).sites
    if not first.kernel.startswith("implicit_gemm_sm90"):
        pytest.skip("Hopper's kernel alone pools")
    assert first.region is not None and first.region.pool is not None
    text = fun.lower(*args).as_text()
    assert text.count("kind = 3") == 1 and "stablehlo.reduce" not in text
    close(fun(*args), jax.jit(head)(*args))
    xs = jnp.stack([args[0], args[0] * 2])
    close(
        jax.vmap(fun, in_axes=(0, None, None, None))(xs, *args[1:]),
        jax.vmap(head, in_axes=(0, None, None, None))(xs, *args[1:]),
    )


def test_depthwise_convs_between_pointwise_ones(forced):
    """Inverted residual blocks: each kernel may start while the one before it runs."""

    def block(x, wide, w, narrow, stride=1):
        y = jax.nn.relu6(cases.conv(x, wide))
        y = jax.nn.relu6(cases.conv(y, w, stride=stride, groups=w.shape[3]))
        return cases.conv(y, narrow)

    def model(x, *filters):
        for _ in range(2):
            x = x + block(x, *filters)
        return block(x, *filters, stride=2)

    args = (
        *(normal(0, 8, 28, 28, 32), normal(1, 1, 1, 32, 192) * 0.2),
        *(normal(2, 3, 3, 1, 192) * 0.3, normal(3, 1, 1, 192, 32) * 0.1),
    )
    fun = jax_bolt.optimize(model)
    labels = [site.epilogue for site in fun.explain(*args).sites]
    assert labels.count("depthwise3x3+relu") == 3
    assert all(site.fused for site in fun.explain(*args).sites)
    want = jax.jit(model)(*args)
    for _ in range(20):
        close(fun(*args), want)


def test_another_layout(forced):
    def fun(x, w1, w2, scale):
        numbers = ("NCHW", "OIHW", "NCHW")
        y = jax.lax.conv_general_dilated(
            x, w1, (1, 1), "SAME", dimension_numbers=numbers
        )
        y = jax.nn.relu(y * scale[None, :, None, None])
        y = jax.lax.conv_general_dilated(
            y, w2, (2, 2), "SAME", dimension_numbers=numbers
        )
        return jax.nn.silu(y + x[:, :, ::2, ::2])

    args = (
        normal(0, 4, 64, 28, 28),
        normal(1, 64, 64, 3, 3) * 0.05,
        normal(2, 64, 64, 1, 1) * 0.1,
        normal(3, 64),
    )
    made = jax_bolt.optimize(fun)
    assert made.lower(*args).as_text().count("jax_bolt.launch") >= 1
    assert all(site.kernel != "xla" for site in made.explain(*args).sites)
    close(made(*args), jax.jit(fun)(*args))


def test_command_buffers_hold_the_launches(args, forced):
    """At batch 1, consecutive launches are recorded once and then replayed by XLA.

    XLA makes a command buffer of several calls, so every block ends a sequence here.
    """

    def chain(x, w1, w2, b):
        for _ in range(6):
            x = jnp.cumsum(block(x, w1, w2, b), axis=1)
        return x / 100

    fun = jax_bolt.optimize(chain)
    one = (args[0][:1], *args[1:])
    want = np.asarray(jax.jit(chain)(*one), np.float32)
    text = fun.lower(*one).as_text()
    assert text.count("kind = 3") == 6
    digests = set(re.findall(r"\b[0-9a-f]{64}\b", text))
    assert digests

    def launched():
        return sum(loader.native().launches(digest) for digest in digests)

    counts = []
    for _ in range(20):
        before = launched()
        close(fun(*one), want)
        counts.append(launched() - before)
    # The host launches all twelve, or, for a replay with the same addresses, none.
    assert set(counts) <= {0, 12, 24}
    assert counts.count(0) >= 10, counts


def test_a_dependent_read_never_sees_stale_data(forced):
    """A kernel may start before the one ahead of it has ended; it must wait to read.

    At batch 1, one conv after the other; every call writes over the last one's buffers
    with other values, which a read too early would find there.
    """
    filters = [normal(i, 3, 3, 64, 64) * 0.05 for i in range(6)]

    def chain(x):
        for w in filters:
            x = jax.nn.relu(cases.conv(x, w) + x)
        return x

    fun = jax_bolt.optimize(chain)
    inputs = [normal(10 + i, 1, 14, 14, 64) for i in range(4)]
    want = [np.asarray(fun(x)).view(np.uint16) for x in inputs]
    close(fun(inputs[0]), jax.jit(chain)(inputs[0]))
    for i in range(1000):
        got = np.asarray(fun(inputs[i % 4])).view(np.uint16)
        assert (got == want[i % 4]).all(), i


def test_held_filters_are_never_read_stale(forced):
    """What ``freeze`` keeps is read while the kernel ahead still runs.

    The parameters of every call were computed just before, by a program that ends in
    kernels of ours; and the memory of the last ones is free for these.
    """

    def chain(filters, biases, x):
        for w, b in zip(filters, biases, strict=True):
            x = jax.nn.relu(cases.conv(x, w) + cases.over_channels(b, x))
        return x

    def made(seed):
        w = normal(seed, 6, 3, 3, 64, 64) * 0.05
        return [*w], [*normal(30 + seed, 6, 64)]

    @jax_bolt.optimize
    def scaled(parameters, factor):
        return jax.tree.map(
            lambda p: (p.reshape(-1, 64) @ factor).reshape(p.shape), parameters
        )

    x = normal(9, 1, 14, 14, 64)
    factors = [jnp.eye(64, dtype=jnp.bfloat16) * s for s in (1, 0.5, -1, 0.25)]
    parameters = made(0)
    plain = jax_bolt.optimize(chain)
    want = [
        np.asarray(plain(*scaled(parameters, f), x)).view(np.uint16) for f in factors
    ]
    frozen = jax_bolt.freeze(chain, *parameters)
    close(frozen(x), jax.jit(chain)(*parameters, x))
    for i in range(500):
        frozen = frozen.replace(*scaled(parameters, factors[i % 4]))
        for _ in range(2):
            got = np.asarray(frozen(x)).view(np.uint16)
            assert (got == want[i % 4]).all(), i


def preactivation(x, filters, scales):
    """Blocks that read the sum, and what a scale and a relu make of it."""
    for w, (first, second) in zip(filters, scales, strict=True):
        y = jax.nn.relu(x * cases.over_channels(first, x))
        y = jax.nn.relu(cases.conv(y, w) * cases.over_channels(second, x))
        x = x + cases.conv(y, w.swapaxes(0, 1))
    return x


def preactivation_args(blocks, channels):
    filters = [normal(i, 3, 3, channels, channels) * 0.05 for i in range(blocks)]
    scales = [(normal(20 + i, channels), normal(40 + i, channels)) for i in range(6)]
    return filters, scales[:blocks]


def outputs(report):
    """How many each region has."""
    regions = [site.region for site in report.sites]
    return [len(region.epilogue.outputs) for region in regions]


@pytest.mark.parametrize(("batch", "size", "channels"), [(1, 14, 64), (3, 9, 40)])
def test_what_is_stored_is_read_when_it_is_there(forced, batch, size, channels):
    """As above: sums lie in the call's arena until the end of the next block."""
    parameters = preactivation_args(6, channels)

    def chain(x):
        return preactivation(x, *parameters)

    fun = jax_bolt.optimize(chain)
    inputs = [normal(60 + i, batch, size, size, channels) for i in range(4)]
    report = fun.explain(inputs[0])
    assert outputs(report).count(2) == 5
    assert all(site.kernel != "xla" for site in report.sites)
    assert fun.lower(inputs[0]).as_text().count("kind = 3") == 1
    want = [np.asarray(fun(x)).view(np.uint16) for x in inputs]
    for x in inputs:
        close(fun(x), jax.jit(chain)(x))
    for i in range(400):
        got = np.asarray(fun(inputs[i % 4])).view(np.uint16)
        assert (got == want[i % 4]).all(), i


def test_two_outputs_are_tuned():
    filters, scales = preactivation_args(2, 128)

    def fun(x):
        return preactivation(x, filters, scales)

    x = normal(60, 8, 14, 14, 128)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = jax_bolt.tune(fun, x)
    assert outputs(report) == [1, 2, 1, 1]
    for site in report.sites:
        assert site.time_us and site.xla_time_us, report
        assert site.error is not None and site.xla_error is not None
        assert site.error <= 1.25 * site.xla_error + 1e-6
    close(jax_bolt.optimize(fun)(x), jax.jit(fun)(x))


def test_a_result_and_what_it_comes_from(forced):
    """Both are the caller's, in the user's layout, shape and dtypes."""

    def fun(x, w):
        y = jnp.einsum("bnc,cd->bnd", x, w)
        return y, jnp.tanh(y.astype(jnp.float32))

    args = normal(0, 3, 50, 64), normal(1, 64, 72) * 0.1
    made = jax_bolt.optimize(fun)
    (site,) = made.explain(*args).sites
    assert site.kernel != "xla" and site.region.text.endswith("f32:%1,bf16:%0}")
    for got, want in zip(made(*args), jax.jit(fun)(*args), strict=True):
        assert (got.dtype, got.shape) == (want.dtype, want.shape)
        close(got, want)


def test_threads_share_kernels(args, forced):
    fun = jax_bolt.optimize(block)
    want = np.asarray(fun(*args))

    def work(_):
        # Options hold for the thread that sets them.
        with jax_bolt.options(on_miss="heuristic"):
            return np.asarray(fun(*args))

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for got in pool.map(work, range(64)):
            assert (got.view(np.uint16) == want.view(np.uint16)).all()


def test_on_miss_error_names_the_site(args):
    strict = jax_bolt.optimize(lambda x, w: jnp.tanh(x @ w) * 3, on_miss="error")
    with pytest.raises(jax_bolt.UnsupportedError, match="no tuning result"):
        strict(normal(0, 24, 40), normal(1, 40, 56))


def test_a_kernel_that_does_not_compile_is_one_warning(args, monkeypatch, tmp_path):
    from jax_bolt._src.kernels import TEMPLATES

    for template in TEMPLATES:
        monkeypatch.setattr(template, "instantiate", lambda *_: "no::such::Kernel")
    x, w = normal(0, 64, 64), normal(1, 64, 64)
    with jax_bolt.options(on_miss="heuristic", cache_dir=tmp_path):
        with pytest.warns(UserWarning, match="runs on XLA"):
            close(jax_bolt.optimize(lambda x, w: x @ w)(x, w), x @ w)
        strict = jax_bolt.optimize(lambda x, w: x @ w, on_error="raise")
        with pytest.raises(jax_bolt.CompileError, match="identifier"):
            strict(x, w)


SECOND = """
import json, sys
import jax, jax.numpy as jnp
sys.path[:0] = sys.argv[1:]
import jax_bolt
from jax_bolt._src.jit import store
import test_optimize as t
args = (t.normal(0, 4, 28, 28, 64), t.normal(1, 3, 3, 64, 64) * 0.05,
        t.normal(2, 1, 1, 64, 64) * 0.1, t.normal(3, 64, dtype=jnp.float32))
jax.block_until_ready(jax_bolt.optimize(t.block)(*args))
print(json.dumps(store.stats()))
"""


def test_a_second_process_compiles_and_tunes_nothing(args, tuned):
    environ = os.environ | {
        "JAX_BOLT_CACHE_DIR": str(options.current().cache_dir),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-P", "-c", SECOND, str(here), str(here.parent)],
        env=environ,
        capture_output=True,
        text=True,
        check=True,
    )
    stats = json.loads(done.stdout.splitlines()[-1])
    assert stats["compiled"] == 0 and stats["tuned"] == 0, stats
