// SPDX-License-Identifier: Apache-2.0
#include "kernel_call.h"

#include <exception>
#include <utility>

#include "registry.h"

namespace jax_bolt::native {

namespace ffi = xla::ffi;

ffi::Error Fail(ffi::ErrorCode code, const KernelCall& call, std::string_view reason) {
  std::string message = "jax_bolt.launch: kernel ";
  message += call.digest;
  if (!call.site.empty()) (message += " at ") += call.site;
  (message += ": ") += reason;
  return ffi::Error(code, std::move(message));
}

ffi::Error FailStatus(const Kernel& kernel, const KernelCall& call, JaxBoltStatus status) {
  return Fail(ffi::ErrorCode::kInternal, call,
              kernel.ErrorString(status) + " (status " + std::to_string(status) + ")");
}

std::string CheckProblem(const Kernel& kernel, const Problem& problem) {
  return kernel.Check(problem);
}

ffi::Error InstantiateKernel(const KernelCall& call, KernelCheck check) {
  try {
    std::string reason;
    const Kernel* kernel = Registry::Get().FindOrResolve(std::string(call.digest), &reason);
    if (kernel == nullptr) return Fail(ffi::ErrorCode::kNotFound, call, reason);
    reason = check(*kernel, call.problem);
    return reason.empty() ? ffi::Error::Success()
                          : Fail(ffi::ErrorCode::kInvalidArgument, call, reason);
  } catch (const std::exception& error) {
    return Fail(ffi::ErrorCode::kInternal, call, error.what());
  }
}

ffi::Error LaunchKernel(const KernelCall& call, const JaxBoltBuffers& buffers, int64_t have,
                        const JaxBoltDevice& device, void* stream) {
  const Kernel* kernel = Registry::Get().Find(call.digest);
  if (kernel == nullptr) return Fail(ffi::ErrorCode::kNotFound, call, "it is not loaded");
  // The size depends on the device, and an executable may run on one with more SMs than the one it
  // was lowered for.
  const int64_t need = kernel->WorkspaceBytes(call.problem, device);
  if (need > have) {
    return Fail(ffi::ErrorCode::kFailedPrecondition, call,
                "it needs " + std::to_string(need) + " bytes of workspace on device " +
                    std::to_string(device.ordinal) + " and was given " + std::to_string(have));
  }
  // XLA has made the stream's context current on this thread, as it does for every handler.
  const JaxBoltStatus status = kernel->Launch(call.problem, buffers, device, stream);
  if (status != JAX_BOLT_OK) return FailStatus(*kernel, call, status);
  kernel->launches.fetch_add(1, std::memory_order_relaxed);
  return ffi::Error::Success();
}

}  // namespace jax_bolt::native
