// SPDX-License-Identifier: Apache-2.0
// Compiled kernels by digest. Host code only; knows nothing about any one kernel.
#ifndef JAX_BOLT_NATIVE_REGISTRY_H_
#define JAX_BOLT_NATIVE_REGISTRY_H_

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <string_view>

#include "jax_bolt/abi.h"

namespace jax_bolt::native {

// A loaded artifact. The launcher and the profiler see kernels through this alone, so an artifact
// of another kind is another implementation beside ModuleKernel (registry.cc) and a case in
// Registry::Load: a device-only cubin, for which this side encodes the tensor maps and calls
// cuLaunchKernelEx, belongs there.
class Kernel {
 public:
  virtual ~Kernel() = default;

  // Whether the kernel can run the problem; touches no device.
  virtual JaxBoltStatus Check(const JaxBoltProblem& problem) const = 0;
  virtual int64_t WorkspaceBytes(const JaxBoltProblem& problem,
                                 const JaxBoltDevice& device) const = 0;
  // Enqueues one launch on `stream`: no allocation, no synchronisation, any thread.
  virtual JaxBoltStatus Launch(const JaxBoltProblem& problem, const JaxBoltBuffers& buffers,
                               const JaxBoltDevice& device, void* stream) const = 0;
  virtual const char* ErrorString(JaxBoltStatus status) const = 0;

  // Launches through XLA. A command buffer counts once, when it is recorded.
  mutable std::atomic<int64_t> launches{0};
};

// Thread-safe. Kernels are never unloaded: XLA executables and CUDA graphs may refer to their code
// until the process ends.
class Registry {
 public:
  static Registry& Get();

  // Loads the artifact at `path` (absolute) under `digest`; does nothing when one is loaded
  // already. Throws std::runtime_error with the reason.
  void Load(const std::string& digest, const std::string& path);

  // Null when the digest is not loaded.
  const Kernel* Find(std::string_view digest) const;

 private:
  Registry() = default;

  std::mutex load_mutex_;  // one load at a time; readers do not wait for a dlopen
  mutable std::shared_mutex mutex_;
  std::map<std::string, std::unique_ptr<const Kernel>, std::less<>> kernels_;
};

// The problem as the C ABI has it. Returns a reason, or null and fills `problem`.
const char* MakeProblem(int64_t kind, const int64_t* dims, size_t num_dims,
                        JaxBoltProblem* problem);

}  // namespace jax_bolt::native

#endif  // JAX_BOLT_NATIVE_REGISTRY_H_
