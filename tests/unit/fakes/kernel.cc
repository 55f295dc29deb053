// SPDX-License-Identifier: Apache-2.0
// A kernel module of host code: f32 gemm plus every side input and vector; an auxiliary output is
// the gemm alone. Compiled several ways by the tests: -DFAKE_ABI_VERSION=n,
// -DFAKE_WITHOUT_<function>, and for a launch on a stream -DFAKE_LAUNCH=<statement>,
// -DFAKE_RESULT_BYTES=<of an element>, -DFAKE_LEAVES=<bytes of the result not written>,
// -DFAKE_LEAVES_AUXILIARY=<bytes of an auxiliary output>.
#include <dlfcn.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "jax_bolt/abi.h"

#ifndef FAKE_ABI_VERSION
#define FAKE_ABI_VERSION JAX_BOLT_ABI_VERSION
#endif
#ifndef FAKE_LAUNCH
#define FAKE_LAUNCH
#endif
#ifndef FAKE_RESULT_BYTES
#define FAKE_RESULT_BYTES 4
#endif
#ifndef FAKE_LEAVES
#define FAKE_LEAVES 0
#endif
#ifndef FAKE_LEAVES_AUXILIARY
#define FAKE_LEAVES_AUXILIARY 0
#endif
#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr int64_t kFailingK = 13;
std::atomic<int64_t> launches{0};
JaxBoltDevice last_device;

}  // namespace

// Read by the tests.
EXPORT int64_t fake_launches() { return launches; }
EXPORT int32_t fake_last_sm_count() { return last_device.sm_count; }

#ifndef FAKE_WITHOUT_ABI_VERSION
EXPORT int32_t jax_bolt_abi_version(void) { return FAKE_ABI_VERSION; }
#endif

#ifndef FAKE_WITHOUT_CHECK
EXPORT JaxBoltStatus jax_bolt_check(const JaxBoltProblem* problem) {
  return problem->kind == JAX_BOLT_GEMM ? JAX_BOLT_OK : JAX_BOLT_WRONG_KIND;
}
#endif

#ifndef FAKE_WITHOUT_WORKSPACE_BYTES
EXPORT int64_t jax_bolt_workspace_bytes(const JaxBoltProblem* problem,
                                        const JaxBoltDevice* device) {
  return problem->dims[3] > 1 ? 64 * device->sm_count : 0;
}
#endif

#ifndef FAKE_WITHOUT_LAUNCH
EXPORT JaxBoltStatus jax_bolt_launch(const JaxBoltProblem* problem, const JaxBoltBuffers* buffers,
                                     const JaxBoltDevice* device, void* stream) {
  const int64_t m = problem->dims[0], n = problem->dims[1], k = problem->dims[2];
  if (k == kFailingK) return JAX_BOLT_INTERNAL;
  launches++;
  last_device = *device;
  if (stream != nullptr) {
    FAKE_LAUNCH;
    // On the driver of cuda.cc: a launch of M microseconds, which writes a result.
    const int64_t bytes = m * n * FAKE_RESULT_BYTES;
    if (buffers->d != nullptr) std::memset(buffers->d, 1, bytes - FAKE_LEAVES);
    for (void* output : buffers->auxiliary) {
      if (output != nullptr) std::memset(output, 1, bytes - FAKE_LEAVES_AUXILIARY);
    }
    using Launch = int (*)(void*, double, uintptr_t);
    static const auto launch =
        reinterpret_cast<Launch>(dlsym(dlopen("libcuda.so.1", RTLD_NOW), "fake_launch"));
    return launch(stream, static_cast<double>(m), reinterpret_cast<uintptr_t>(buffers->a));
  }
  const auto* a = static_cast<const float*>(buffers->a);
  const auto* b = static_cast<const float*>(buffers->b);
  auto* d = static_cast<float*>(buffers->d);
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      float sum = 0;
      for (int64_t l = 0; l < k; ++l) sum += a[i * k + l] * b[l * n + j];
      for (void* output : buffers->auxiliary) {
        if (output != nullptr) static_cast<float*>(output)[i * n + j] = sum;
      }
      for (const void* side : buffers->sides) {
        if (side != nullptr) sum += static_cast<const float*>(side)[i * n + j];
      }
      for (const void* vector : buffers->vectors) {
        if (vector != nullptr) sum += static_cast<const float*>(vector)[j];
      }
      d[i * n + j] = sum;
    }
  }
  const int64_t bytes = jax_bolt_workspace_bytes(problem, device);
  for (int64_t i = 0; i < bytes; ++i) static_cast<uint8_t*>(buffers->workspace)[i] = 7;
  return JAX_BOLT_OK;
}
#endif

#ifndef FAKE_WITHOUT_ERROR_STRING
EXPORT const char* jax_bolt_error_string(JaxBoltStatus status) {
  switch (status) {
    case JAX_BOLT_WRONG_KIND:
      return "not a gemm";
    case JAX_BOLT_INTERNAL:
      return "a fake failure";
    default:
      return status > 0 ? "a fake CUDA error" : nullptr;
  }
}
#endif
