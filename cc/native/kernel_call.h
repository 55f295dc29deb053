// SPDX-License-Identifier: Apache-2.0
// What a custom call does with each kernel it names, be it one or a sequence.
#ifndef JAX_BOLT_NATIVE_KERNEL_CALL_H_
#define JAX_BOLT_NATIVE_KERNEL_CALL_H_

#include <cstdint>
#include <string>
#include <string_view>

#include "jax_bolt/abi.h"
#include "kernel.h"
#include "xla/ffi/api/ffi.h"

namespace jax_bolt::native {

// Views into XLA's storage. `site` may be empty.
struct KernelCall {
  std::string_view digest;
  std::string_view site;
  Problem problem = {};
};

// An error that names the kernel and its site.
xla::ffi::Error Fail(xla::ffi::ErrorCode code, const KernelCall& call, std::string_view reason);
xla::ffi::Error FailStatus(const Kernel& kernel, const KernelCall& call, JaxBoltStatus status);

// Why a kernel cannot serve a call, or "".
using KernelCheck = std::string (*)(const Kernel& kernel, const Problem& problem);

// Makes sure that the kernel is loaded and passes `check`.
xla::ffi::Error InstantiateKernel(const KernelCall& call, KernelCheck check);
// As Kernel::Check.
std::string CheckProblem(const Kernel& kernel, const Problem& problem);

// Checks the workspace of `have` bytes and enqueues a launch.
xla::ffi::Error LaunchKernel(const KernelCall& call, const JaxBoltBuffers& buffers, int64_t have,
                             const JaxBoltDevice& device, void* stream);

}  // namespace jax_bolt::native

#endif  // JAX_BOLT_NATIVE_KERNEL_CALL_H_
