// SPDX-License-Identifier: Apache-2.0
// A chain of f32 products as a module of host code, bound as chains are: y = A x B + its side
// input and vector, z = y x side 0 + the second vector. -DFAKE_CHANNELS=<columns of z>,
// -DFAKE_SIDES=<side inputs of y>. With an auxiliary output y is the result and z that output.
// -DFAKE_MERGED=<columns of side 0>: z = side 0 x side 1 + y + the second vector instead.
// -DFAKE_JOINED=<columns of side 0>: that is y, and z = y x side 2 + the third vector.
#include <cstdint>
#include <vector>

#include "jax_bolt/abi.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

// c [m, n] = a [m, k] x b [k, n].
void Product(const float* a, const float* b, float* c, int64_t m, int64_t n, int64_t k) {
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      float sum = 0;
      for (int64_t l = 0; l < k; ++l) sum += a[i * k + l] * b[l * n + j];
      c[i * n + j] = sum;
    }
  }
}

void Add(float* c, const void* vector, int64_t m, int64_t n) {
  for (int64_t i = 0; i < m * n; ++i) c[i] += static_cast<const float*>(vector)[i % n];
}

}  // namespace

EXPORT int32_t jax_bolt_abi_version(void) { return JAX_BOLT_ABI_VERSION; }
EXPORT JaxBoltStatus jax_bolt_check(const JaxBoltProblem*) { return JAX_BOLT_OK; }
EXPORT int64_t jax_bolt_workspace_bytes(const JaxBoltProblem*, const JaxBoltDevice*) { return 0; }
EXPORT const char* jax_bolt_error_string(JaxBoltStatus) { return "a fake failure"; }

EXPORT JaxBoltStatus jax_bolt_launch(const JaxBoltProblem* problem, const JaxBoltBuffers* buffers,
                                     const JaxBoltDevice*, void*) {
  const int64_t m = problem->dims[0], n = problem->dims[1], k = problem->dims[2];
  std::vector<float> y(m * n);
  Product(static_cast<const float*>(buffers->a), static_cast<const float*>(buffers->b), y.data(), m,
          n, k);
  for (int64_t i = 0; i < m * n * FAKE_SIDES; ++i) {
    y[i] += static_cast<const float*>(buffers->sides[1])[i];
  }
  Add(y.data(), buffers->vectors[0], m, n);
  auto* z = static_cast<float*>(buffers->d);
#ifdef FAKE_MERGED
  Product(static_cast<const float*>(buffers->sides[0]),
          static_cast<const float*>(buffers->sides[1]), z, m, n, FAKE_MERGED);
  for (int64_t i = 0; i < m * n; ++i) z[i] += y[i];
  Add(z, buffers->vectors[1], m, n);
  return JAX_BOLT_OK;
#endif
  int later = 0;  // operands of the product ahead of the last
#ifdef FAKE_JOINED
  std::vector<float> sum(m * n);
  Product(static_cast<const float*>(buffers->sides[0]),
          static_cast<const float*>(buffers->sides[1]), sum.data(), m, n, FAKE_JOINED);
  for (int64_t i = 0; i < m * n; ++i) y[i] += sum[i];
  Add(y.data(), buffers->vectors[1], m, n);
  later = 2;
#endif
  if (buffers->auxiliary[0] != nullptr) {
    for (int64_t i = 0; i < m * n; ++i) z[i] = y[i];
    z = static_cast<float*>(buffers->auxiliary[0]);
  }
  Product(y.data(), static_cast<const float*>(buffers->sides[later]), z, m, FAKE_CHANNELS, n);
  Add(z, buffers->vectors[1 + later / 2], m, FAKE_CHANNELS);
  return JAX_BOLT_OK;
}
