// SPDX-License-Identifier: Apache-2.0
// Turns a kernel class into a module: the five functions of abi.h.
//
// A kernel class has three static members:
//   JaxBoltStatus check(JaxBoltProblem const&);
//   int64_t workspace_bytes(JaxBoltProblem const&, JaxBoltDevice const&);
//   JaxBoltStatus launch(JaxBoltProblem const&, JaxBoltBuffers const&, JaxBoltDevice const&,
//                        cudaStream_t);
#ifndef JAX_BOLT_EXPORT_HPP_
#define JAX_BOLT_EXPORT_HPP_

#include <cuda_runtime_api.h>

#include "jax_bolt/abi.h"

namespace jax_bolt {

inline char const* error_string(JaxBoltStatus status) {
  switch (status) {
    case JAX_BOLT_OK:
      return "success";
    case JAX_BOLT_WRONG_KIND:
      return "the kernel was built for another kind of problem";
    case JAX_BOLT_UNSUPPORTED:
      return "the kernel does not support this problem size";
    case JAX_BOLT_INTERNAL:
      return "CUTLASS refused to start the kernel";
    case JAX_BOLT_MISALIGNED:
      return "a buffer is not aligned as the kernel needs";
    default:
      return status > 0 ? cudaGetErrorString(static_cast<cudaError_t>(status))
                        : "unknown kernel status";
  }
}

/// The status a module reports; a launch failure is taken from the runtime, which clears it.
template <class Kernel>
JaxBoltStatus launch(JaxBoltProblem const& problem, JaxBoltBuffers const& buffers,
                     JaxBoltDevice const& device, void* stream) {
  JaxBoltStatus const status = Kernel::check(problem);
  if (status != JAX_BOLT_OK) return status;
  return Kernel::launch(problem, buffers, device, static_cast<cudaStream_t>(stream));
}

}  // namespace jax_bolt

#define JAX_BOLT_EXPORT __attribute__((visibility("default")))

// Variadic, because a kernel's template arguments hold commas.
#define JAX_BOLT_KERNEL(...)                                                                 \
  using JaxBoltKernel = __VA_ARGS__;                                                         \
  extern "C" {                                                                               \
  JAX_BOLT_EXPORT int32_t jax_bolt_abi_version(void) { return JAX_BOLT_ABI_VERSION; }        \
  JAX_BOLT_EXPORT JaxBoltStatus jax_bolt_check(const JaxBoltProblem* problem) {              \
    return JaxBoltKernel::check(*problem);                                                   \
  }                                                                                          \
  JAX_BOLT_EXPORT int64_t jax_bolt_workspace_bytes(const JaxBoltProblem* problem,            \
                                                   const JaxBoltDevice* device) {            \
    return JaxBoltKernel::workspace_bytes(*problem, *device);                                \
  }                                                                                          \
  JAX_BOLT_EXPORT JaxBoltStatus jax_bolt_launch(const JaxBoltProblem* problem,               \
                                                const JaxBoltBuffers* buffers,               \
                                                const JaxBoltDevice* device, void* stream) { \
    return jax_bolt::launch<JaxBoltKernel>(*problem, *buffers, *device, stream);             \
  }                                                                                          \
  JAX_BOLT_EXPORT const char* jax_bolt_error_string(JaxBoltStatus status) {                  \
    return jax_bolt::error_string(status);                                                   \
  }                                                                                          \
  }
#endif  // JAX_BOLT_EXPORT_HPP_
