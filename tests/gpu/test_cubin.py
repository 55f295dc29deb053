# SPDX-License-Identifier: Apache-2.0
"""A cubin launched by its recipe: tensor map, cluster, pointers and integers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_bolt._src import arch, compat, options, paths, resolve
from jax_bolt._src.jit import loader, store
from jax_bolt._src.kernels import recipe

ROWS, COLUMNS, BOX = 100, 64, 32  # the last box hangs over

# Each block loads a box with TMA and writes it times a factor, plus a vector of float.
SOURCE = """
#include <cstdint>
struct Params {
  struct alignas(64) { unsigned long long opaque[16]; } map;
  float* d;
  float const* vector;
  int factor, rows;
};
__device__ void run(Params const& p) {
  __shared__ alignas(1024) float tile[32 * 32];
  extern __shared__ char unused[];
  __shared__ alignas(8) std::uint64_t barrier;
  auto shared = [](void const* x) {
    return static_cast<std::uint32_t>(__cvta_generic_to_shared(x));
  };
  int const row = blockIdx.x / 2 * 32, column = blockIdx.x % 2 * 32;
  asm volatile("griddepcontrol.wait;" ::: "memory");
  if (threadIdx.x == 0) {
    unused[100000] = 1;
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared(&barrier)));
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], 4096;" ::"r"(
        shared(&barrier)) : "memory");
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
        " [%0], [%1, {%3, %4}], [%2];" ::"r"(shared(tile)), "l"(&p.map),
        "r"(shared(&barrier)), "r"(column), "r"(row) : "memory");
  }
  __syncthreads();
  asm volatile(
      "{.reg .pred done;\\n"
      "wait: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], 0;\\n"
      "@!done bra wait;}" ::"r"(shared(&barrier)) : "memory");
  int const i = threadIdx.x / 32, j = threadIdx.x % 32;
  int ranks;
  asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(ranks));
  if (row + i < p.rows) {
    // 128-byte swizzle: 16-byte chunks are exchanged by the row's place among eight.
    float const x = tile[i * 32 + ((j / 4) ^ (i % 8)) * 4 + j % 4];
    float const y = ranks == 2 ? p.vector[column + j] : 0.0f;
    p.d[(row + i) * 64 + column + j] = x * p.factor + y;
  }
}
#define JAX_BOLT_DEVICE_KERNEL(Type) \\
  extern "C" __global__ void jax_bolt_kernel(const __grid_constant__ Type p) { run(p); }
JAX_BOLT_DEVICE_KERNEL(Params)
"""
RECIPE = recipe.Recipe(
    threads=1024,
    grid=8,
    cluster=2,
    smem_bytes=100_352,
    programmatic=True,
    maps=(
        recipe.TensorMap(
            operand=recipe.A,
            dtype=recipe.DTYPES.index("f32"),
            dims=(COLUMNS, ROWS),
            strides=(COLUMNS * 4,),
            box=(BOX, BOX),
            steps=(1, 1),
            swizzle=128,
        ),
    ),
    pointers=(recipe.D, recipe.vector(0)),
    ints=(3, ROWS),
)
DIMS = [ROWS, COLUMNS, 8, 1]


@pytest.fixture(scope="module")
def digest() -> str:
    target = resolve.target_for(compat.cuda_device(), options.current())
    if target.arch.sm != 90:
        pytest.skip("a kernel for sm_90a")
    kernels = store.Store(paths.kernel_root(options.current()))
    ((digest, built),) = kernels.build(
        target.toolchain, [SOURCE], arch.from_name("sm_90a")
    ).items()
    if isinstance(built, Exception):
        raise built
    loader.load(digest, built)
    return digest


def operands(seed: int):
    rng = np.random.default_rng(seed)
    shapes = ((ROWS, COLUMNS), (8, COLUMNS), (COLUMNS,))
    return [rng.standard_normal(shape, np.float32) for shape in shapes]


def test_inside_a_program(digest):
    loader.ffi_target()

    @jax.jit
    def program(a, b, vector):
        out = jax.ShapeDtypeStruct((ROWS, COLUMNS), jnp.float32)
        call = jax.ffi.ffi_call(loader.TARGET, out)
        given = dict(digest=digest, kind=np.int64(0), sides=np.int64(0))
        dims, numbers = np.array(DIMS), np.array(RECIPE.encode())
        # Two in a row, the second on the first's result.
        for _ in range(2):
            a = call(a, b, vector, dims=dims, recipe=numbers, **given)
        return a

    for seed in range(5):
        a, b, vector = operands(seed)
        want = (a * 3 + vector) * 3 + vector
        np.testing.assert_allclose(program(a, b, vector), want, rtol=1e-5, atol=1e-5)


def test_profiled(digest):
    sets, kept = [], []
    for seed in range(2):
        a, b, vector = jax.device_put(operands(seed))
        d = jnp.zeros((ROWS, COLUMNS), jnp.float32)
        kept.append(jax.block_until_ready((a, b, vector, d)))
        where = [x.unsafe_buffer_pointer() for x in kept[-1]]
        sets.append((where[0], where[1], [where[3]], [], [where[2]], 0))
    native = loader.native()
    times = native.profile(digest, 0, DIMS, sets, 0, 3, RECIPE.encode())
    assert 0.5 < min(times) < 100  # as many launches in a graph
    for a, _, vector, d in kept:
        want = np.asarray(a) * 3 + np.asarray(vector)
        np.testing.assert_allclose(np.asarray(d), want, rtol=1e-5, atol=1e-5)


def test_a_recipe_for_another_kernel(digest):
    short = recipe.Recipe(32, 1, ints=(1,)).encode()
    reason = loader.native().check(digest, 0, DIMS, short)
    assert reason == "its parameters take 192 bytes, and the launch recipe has 4"
