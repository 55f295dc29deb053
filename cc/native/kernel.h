// SPDX-License-Identifier: Apache-2.0
// What the launcher and the profiler know of a loaded artifact, and of a call's problem.
#ifndef JAX_BOLT_NATIVE_KERNEL_H_
#define JAX_BOLT_NATIVE_KERNEL_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>

#include "jax_bolt/abi.h"

namespace jax_bolt::native {

// How a cubin is launched (recipe.h), as the call's attribute has it; empty for a module. A view.
struct RecipeView {
  const int64_t* data = nullptr;
  size_t size = 0;
};

struct Problem {
  JaxBoltProblem sizes;
  RecipeView recipe;
};

// Fills the sizes as the C ABI has them. Returns a reason, or null.
const char* MakeProblem(int64_t kind, const int64_t* dims, size_t num_dims, Problem* problem);

// A loaded artifact: ModuleKernel (registry.cc), CubinKernel (cubin.h) or CastKernel (cast.h).
// Thread-safe.
class Kernel {
 public:
  virtual ~Kernel() = default;

  // Why the kernel cannot run the problem, or "". Touches no device.
  virtual std::string Check(const Problem& problem) const = 0;
  virtual int64_t WorkspaceBytes(const Problem& problem, const JaxBoltDevice& device) const = 0;
  // Enqueues one launch on `stream`: no synchronisation, any thread; no allocation but for what a
  // kernel keeps of the first launch of a problem. The problem has passed Check.
  virtual JaxBoltStatus Launch(const Problem& problem, const JaxBoltBuffers& buffers,
                               const JaxBoltDevice& device, void* stream) const = 0;
  virtual std::string ErrorString(JaxBoltStatus status) const = 0;

  // Launches through XLA. A command buffer counts once, when it is recorded.
  mutable std::atomic<int64_t> launches{0};
};

}  // namespace jax_bolt::native

#endif  // JAX_BOLT_NATIVE_KERNEL_H_
