// SPDX-License-Identifier: Apache-2.0
// Kernels without host code: a cubin with one entry point, launched as a recipe says.
//
//   extern "C" __global__ void jax_bolt_kernel(const __grid_constant__ Params p)
//
// Params is the recipe's tensor maps, pointers and ints, in this order. A recipe with a prologue
// launches jax_bolt_prologue of the same cubin and form before it.
#ifndef JAX_BOLT_NATIVE_CUBIN_H_
#define JAX_BOLT_NATIVE_CUBIN_H_

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <shared_mutex>
#include <string>
#include <utility>
#include <vector>

#include "driver.h"
#include "jax_bolt/abi.h"
#include "kernel.h"
#include "recipe.h"

namespace jax_bolt::native {

class CubinKernel final : public Kernel {
 public:
  // As LoadKernel. Throws DriverError.
  explicit CubinKernel(const std::string& path);
  ~CubinKernel() override;

  std::string Check(const Problem& problem) const override;
  int64_t WorkspaceBytes(const Problem& problem, const JaxBoltDevice& device) const override;
  JaxBoltStatus Launch(const Problem& problem, const JaxBoltBuffers& buffers,
                       const JaxBoltDevice& device, void* stream) const override;
  std::string ErrorString(JaxBoltStatus status) const override;

 private:
  struct Prepared;
  struct Step;
  using Key = std::pair<int, std::vector<int64_t>>;
  using KeyView = std::pair<int, RecipeView>;
  struct Less {
    using is_transparent = void;
    bool operator()(const Key& a, const Key& b) const { return a < b; }
    bool operator()(const Key& a, const KeyView& b) const;
    bool operator()(const KeyView& a, const Key& b) const;
  };

  const Prepared* Find(const KeyView& key) const;
  // What is the same for all launches of a recipe on a device: made at the first, from `buffers`,
  // and kept. Null with the reason in `status`.
  const Prepared* Prepare(const KeyView& key, const JaxBoltBuffers& buffers,
                          JaxBoltStatus* status) const;
  // The kernel's share of that, and the prologue's.
  std::unique_ptr<Step> PrepareStep(CuKernel kernel, const Recipe& recipe,
                                    const JaxBoltBuffers& buffers, JaxBoltStatus* status) const;
  JaxBoltStatus LaunchStep(const Step& step, const JaxBoltBuffers& buffers, void* stream) const;
  JaxBoltStatus AllowSharedBytes(int ordinal, unsigned bytes) const;  // under mutex_

  const Driver& driver_;
  const LoadedKernel loaded_;
  mutable std::shared_mutex mutex_;
  // Entries are never removed, so one that was found stays valid without the lock.
  mutable std::map<Key, std::unique_ptr<const Prepared>, Less> prepared_;
  mutable std::map<int, unsigned> allowed_shared_bytes_;  // by device; only ever raised
};

}  // namespace jax_bolt::native

#endif  // JAX_BOLT_NATIVE_CUBIN_H_
