// SPDX-License-Identifier: Apache-2.0
// The smallest module with the C ABI, for test_compile.py.
#include <cuda_runtime.h>

#include "cutlass/version.h"
#include "jax_bolt/abi.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

__global__ void Fill(float* d) { d[threadIdx.x] = CUTLASS_MAJOR; }

int hidden() { return 1; }

EXPORT int32_t jax_bolt_abi_version(void) { return JAX_BOLT_ABI_VERSION; }
EXPORT JaxBoltStatus jax_bolt_check(const JaxBoltProblem* problem) {
  return problem->kind == JAX_BOLT_GEMM ? JAX_BOLT_OK : JAX_BOLT_WRONG_KIND;
}
EXPORT int64_t jax_bolt_workspace_bytes(const JaxBoltProblem* problem, const JaxBoltDevice*) {
  return 4 * problem->dims[0];
}
EXPORT JaxBoltStatus jax_bolt_launch(const JaxBoltProblem*, const JaxBoltBuffers* buffers,
                                     const JaxBoltDevice*, void* stream) {
  Fill<<<1, 32, 0, static_cast<cudaStream_t>(stream)>>>(static_cast<float*>(buffers->d));
  return cudaGetLastError();
}
EXPORT const char* jax_bolt_error_string(JaxBoltStatus) { return "an error"; }
