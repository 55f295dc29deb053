# SPDX-License-Identifier: Apache-2.0
"""Tuning on the GPU among candidates that crash or never end, and in two stages."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import fresh_python
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import region_cases as cases

import jax_bolt
from jax_bolt._src import base, compat, options, plan, resolve, results
from jax_bolt._src.jit import loader, store
from jax_bolt._src.tune import isolate

# In place of a kernel of the Hopper family: it takes the same parameters.
SOURCE = """
struct Params {{ alignas(64) char bytes[{size}]; }};
__device__ void run(Params const& p) {{ {body} }}
#define JAX_BOLT_DEVICE_KERNEL(Type) \\
  extern "C" __global__ void jax_bolt_kernel(const __grid_constant__ Type p) {{ \\
    run(p);  \\
  }}
JAX_BOLT_DEVICE_KERNEL(Params)
"""
TRAPS = 'asm volatile("trap;");'
STRAYS = "*reinterpret_cast<volatile int*>(16) = 1;"
LOOPS = 'while (true) asm volatile("nanosleep.u32 1000;");'
DOES_NOTHING = ""
PARAMETERS = 128, 8, 4  # bytes of a map, a pointer and an int: recipe.py


@pytest.fixture(autouse=True)
def hopper():
    if target().arch.sm != 90:
        pytest.skip("takes the place of sm_90a's kernels")


def target():
    return resolve.target_for(compat.cuda_device(), options.current())


def fun(x, w):
    return jax.nn.silu(cases.conv(x, w))


@pytest.fixture(scope="module")
def args():
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (8, 28, 28, 128)).astype(jnp.bfloat16)
    w = jax.random.normal(keys[1], (3, 3, 128, 128)).astype(jnp.bfloat16)
    return x, w * 0.03


def region(args):
    return cases.Case("conv", fun, tuple(map(jax.typeof, args))).site().region


def candidates(args):
    return plan.candidates(region(args), target().arch)[0]


def bad_source(candidate, body):
    """The TU of a kernel that takes what ``candidate``'s recipe gives."""
    maps, pointers, ints = candidate.recipe[8:11]
    counts = zip((maps, pointers, ints), PARAMETERS, strict=True)
    size = sum(n * bytes_ for n, bytes_ in counts)
    return SOURCE.format(size=-(-size // 64) * 64, body=body)


@pytest.fixture
def replace(monkeypatch):
    """``replace({config text: body})``: what is compiled for these candidates."""

    def do(bodies):
        honest = plan.Candidate.source.fget
        assert honest is not None

        def source(self):
            if self.config.text in bodies:
                return bad_source(self, bodies[self.config.text])
            return honest(self)

        monkeypatch.setattr(plan.Candidate, "source", property(source))

    return do


def is_right(args):
    got, want = (f(*args) for f in (jax_bolt.optimize(fun), jax.jit(fun)))
    got, want = (np.asarray(v, np.float32) for v in (got, want))
    assert np.linalg.norm(got - want) <= 1e-2 * np.linalg.norm(want)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (TRAPS, "cuStreamSynchronize"),
        (STRAYS, "cuStreamSynchronize"),
        (LOOPS, "did not end"),
    ],
    ids=["traps", "strays", "loops"],
)
def test_a_site_is_tuned_in_spite_of_a_bad_candidate(
    args, cache_dir, replace, monkeypatch, body, reason
):
    monkeypatch.setattr(isolate, "_LIMIT_S", 5.0)
    bad = candidates(args)[0].config.text
    replace({bad: body})
    before = store.stats()
    (site,) = jax_bolt.tune(fun, *args).sites
    assert site.time_us and site.xla_time_us and bad not in site.kernel
    assert bad in site.notes and reason in site.notes
    after = store.stats()
    assert after["restarts"] == before["restarts"] + 1
    assert after["stage2"] - before["stage2"] >= 3
    is_right(args)
    # Nor is it tried again, by whichever process tunes the region next.
    (tuned,) = (cache_dir / "tuned").glob("*.json")
    tuned.unlink()
    results.forget()
    (site,) = jax_bolt.tune(fun, *args).sites
    assert f"{reason}" in site.notes and site.notes.endswith("before")
    assert store.stats()["restarts"] == after["restarts"]


def test_a_kernel_that_writes_nothing_is_not_chosen(args, cache_dir, replace):
    """It would be the fastest by far."""
    bad = candidates(args)[0].config.text
    replace({bad: DOES_NOTHING})
    (site,) = jax_bolt.tune(fun, *args).sites
    assert site.time_us and bad not in site.kernel
    is_right(args)


def test_base_programs_are_timed_and_few_kernels_built(args, cache_dir):
    here = target()
    found = candidates(args)
    stands = [base.stand_in(c) for c in found]
    sources = sorted({s.source for s in stands if s is not None})
    assert len(sources) >= 4
    built = here.kernels.build(here.toolchain, sources, here.arch)
    assert all(isinstance(path, Path) for path in built.values())
    before = store.stats()
    (site,) = jax_bolt.tune(fun, *args).sites
    assert site.time_us
    made = {name: n - before[name] for name, n in store.stats().items()}
    assert made["stage1"] == sum(s is not None for s in stands)
    assert 1 <= made["stage2"] <= 6
    assert made["compiled"] <= 6
    assert made["tuned"] == 1 and made["restarts"] == 0
    is_right(args)


def test_the_worker_leaves_no_memory_behind(args, cache_dir):
    native = loader.native()
    ordinal = target().ordinal
    jax_bolt.tune(fun, *args)  # what JAX itself takes, it has now
    (tuned,) = (cache_dir / "tuned").glob("*.json")
    tuned.unlink()
    results.forget()
    before = native.device_info(ordinal)["free_bytes"]
    jax_bolt.tune(fun, *args)
    for _ in range(50):
        if native.device_info(ordinal)["free_bytes"] >= before - (64 << 20):
            return
        time.sleep(0.1)
    raise AssertionError("device memory is still taken")


PARENT = """
import json, sys
from jax_bolt._src.tune.isolate import Worker
worker = Worker(sys.argv[1], int(sys.argv[2]))
worker.start()
print(worker._process.pid, flush=True)
worker.time(json.loads(sys.argv[3]), limit_s=600.0)
"""


def test_it_ends_with_its_parent_out_of_a_kernel_that_never_ends(args, cache_dir):
    here = target()
    candidate = candidates(args)[0]
    source = bad_source(candidate, LOOPS)
    built = here.kernels.build(here.toolchain, [source], here.arch)
    ((digest, path),) = built.items()
    assert isinstance(path, Path)
    request = isolate.request_for(candidate, digest, path, 2, 3, verify=False)
    uuid = loader.native().device_info(here.ordinal)["uuid"]
    arguments = [uuid, str(here.ordinal), json.dumps(request)]
    with subprocess.Popen(
        [sys.executable, "-P", "-c", PARENT, *arguments],
        env=fresh_python.environ(),
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        time.sleep(5.0)  # it is in the kernel by now
        os.kill(worker, 0)
        parent.send_signal(signal.SIGKILL)
    for _ in range(300):
        try:
            state = Path(f"/proc/{worker}/status").read_text()
        except FileNotFoundError:
            break
        if "State:\tZ" in state:
            break
        time.sleep(0.1)
    else:
        raise AssertionError("the worker outlives its parent")
    # And the GPU works.
    assert float(jnp.ones(8).sum()) == 8.0
