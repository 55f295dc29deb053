# SPDX-License-Identifier: Apache-2.0
"""Gathered casts on the GPU: the same bits as XLA's, from one kernel."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import region_cases as cases

import jax_bolt
from jax_bolt._src import compat, invoke, options, paths, resolve, results
from jax_bolt._src.jit import loader, store

DTYPES = ["bfloat16", "float16"]


def digest_of(dtype: str) -> str:
    digest = resolve.cast_kernel(dtype, options.current(), compat.cuda_device())
    assert digest is not None
    return digest


def bits(x) -> np.ndarray:
    """The bits of 16-bit floats, all NaN as one."""
    x = np.asarray(x)
    return np.where(np.isnan(x.astype(np.float32)), 0x7FFF, x.view(np.uint16))


def check(arrays, dtype: str) -> None:
    """Compares one call with ``astype``, on the GPU and where that is by itself."""
    digest = digest_of(dtype)
    launches = -(-len(arrays) // 128)
    before = loader.native().launches(digest)
    got = jax.jit(lambda *xs: invoke.cast(digest, xs, jnp.dtype(dtype)))(*arrays)
    jax.block_until_ready(got)
    assert loader.native().launches(digest) == before + launches
    want = jax.jit(lambda *xs: [x.astype(dtype) for x in xs])(*arrays)
    for ours, theirs in zip(got, want, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        np.testing.assert_array_equal(bits(ours), bits(theirs))


def special() -> np.ndarray:
    """Every bf16 and its neighbours and midpoints in f32; every f16 and the same."""
    high = np.arange(1 << 16, dtype=np.uint32) << 16
    low = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    of_bf16 = (high[:, None] | low).reshape(-1)
    half = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    steps = np.array([-1, 0, 1, 0xFFF, 0x1000, 0x1001], np.int64)
    of_f16 = (half.view(np.uint32).astype(np.int64)[:, None] + steps).reshape(-1)
    return np.concatenate([of_bf16, of_f16.astype(np.uint32)]).view(np.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_rounding(dtype):
    values = special()
    # In vectors and one by one.
    check([values, *(values[i : i + 7] for i in range(0, 70, 7))], dtype)
    tail = values[: len(values) // 8191 * 8191].reshape(-1, 8191)
    check(list(tail[:40]), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 7, 8, 9, 4095, 8191, 8192, 8193, (1 << 20) + 3])
def test_ragged_sizes(count, dtype):
    keys = jax.random.split(jax.random.key(count), 2)
    check([jax.random.normal(key, (count,)) for key in keys], dtype)


def test_many_tensors():
    rng = np.random.default_rng(0)  # JAX's would compile for every shape
    shapes = [(1 + i % 5, 1 + 37 * i) for i in range(300)]
    arrays = [rng.standard_normal(shape, np.float32) for shape in shapes]
    check([jnp.asarray(array) for array in arrays], "bfloat16")


class Table(ctypes.Structure):
    """``jax_bolt::cast::Table``."""

    _fields_ = (
        ("source", ctypes.c_void_p * 128),
        ("target", ctypes.c_void_p * 128),
        ("count", ctypes.c_int64 * 128),
        ("first_block", ctypes.c_uint32 * 128),
        ("tensors", ctypes.c_int32),
    )


@pytest.mark.parametrize(("to", "at"), [(0, 1), (1, 0), (4, 8), (2, 8), (4, 4), (5, 3)])
def test_addresses_that_are_not_aligned(to, at):
    """XLA aligns its buffers, so here the driver is called without it."""
    count, blocks = 20_000, 3
    path = store.Store(paths.kernel_root(options.current())).find(digest_of("bfloat16"))
    source = jax.random.normal(jax.random.key(0), (count + 8,))
    target = jnp.ones((count + 16,), jnp.bfloat16)
    jax.block_until_ready((source, target))
    table = Table(tensors=1)
    table.source[0] = source.unsafe_buffer_pointer() + 4 * to
    table.target[0] = target.unsafe_buffer_pointer() + 2 * at
    table.count[0] = count
    cuda = ctypes.CDLL("libcuda.so.1")
    context, library, kernel = (ctypes.c_void_p() for _ in range(3))
    arguments = (ctypes.c_void_p * 1)(ctypes.addressof(table))
    sizes = (*(blocks, 1, 1), *(256, 1, 1), 0)

    def call(name, *args):
        assert getattr(cuda, name)(*args) == 0, name

    call("cuDevicePrimaryCtxRetain", ctypes.byref(context), 0)
    call("cuCtxPushCurrent_v2", context)
    load = (ctypes.byref(library), str(path).encode(), None, None, 0, None, None, 0)
    call("cuLibraryLoadFromFile", *load)
    call("cuLibraryGetKernel", ctypes.byref(kernel), library, b"jax_bolt_cast")
    call("cuLaunchKernel", kernel, *sizes, None, arguments, None)
    call("cuCtxSynchronize")
    call("cuCtxPopCurrent_v2", ctypes.byref(context))
    want = np.ones(count + 16, jnp.bfloat16)
    want[at : at + count] = np.asarray(source)[to : to + count].astype(jnp.bfloat16)
    np.testing.assert_array_equal(bits(target), bits(want))


def network(x, weights):
    for w in weights:
        x = jax.nn.relu(cases.conv(x, w.astype(x.dtype)) + x)
    return x


@pytest.fixture(scope="module")
def args():
    keys = jax.random.split(jax.random.key(0), 9)
    weights = [jax.random.normal(k, (3, 3, 64, 64)) * 0.05 for k in keys[1:]]
    return jax.random.normal(keys[0], (4, 14, 14, 64)).astype(jnp.bfloat16), weights


@pytest.fixture
def forced(monkeypatch):
    """Kernels wherever there are any, whatever tuning chose."""
    monkeypatch.setattr(results, "stored", lambda *_: None)
    with jax_bolt.options(on_miss="heuristic"):
        yield


def test_a_network_has_one_cast_kernel(args, forced):
    fun = jax_bolt.optimize(network)
    text = fun.lower(*args).as_text()
    assert text.count(f"kind = {invoke.CAST} ") == 1
    assert "stablehlo.convert" not in text
    digest = digest_of("bfloat16")
    before = loader.native().launches(digest)
    got = fun(*args)
    assert loader.native().launches(digest) == before + 1
    # The same kernels on weights that XLA has cast: bit for bit.
    with jax_bolt.options(on_miss="heuristic", disable=("cast",)):
        apart = jax_bolt.optimize(lambda *a: network(*a))
        assert f"kind = {invoke.CAST} " not in apart.lower(*args).as_text()
        want = apart(*args)
    np.testing.assert_array_equal(bits(got), bits(want))


def test_changed_weights_are_never_read_stale(args, forced):
    """The cast may start before the kernel ahead of it ends, and so may its readers."""
    x, weights = args
    fun = jax_bolt.optimize(network)
    sets = [[w * s for w in weights] for s in (1.0, 0.5, -1.0)]
    want = [bits(fun(x, each)) for each in sets]
    for i in range(300):
        np.testing.assert_array_equal(bits(fun(x, sets[i % 3])), want[i % 3])


SECOND = """
import json, sys
import jax
sys.path[:0] = sys.argv[1:]
import test_cast as t
from jax_bolt._src.jit import store
for dtype in t.DTYPES:
    t.check([jax.numpy.ones(5)] * 2, dtype)
print(json.dumps(store.stats()))
"""


def test_a_second_process_compiles_nothing():
    for dtype in DTYPES:
        digest_of(dtype)
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
    assert stats["compiled"] == 0 and stats["found"] == len(DTYPES), stats
