// SPDX-License-Identifier: Apache-2.0
// The kernel that casts many tensors in one launch (jax_bolt/cast/cast.hpp): a cubin, which a store
// names cast.cubin, with the entry point jax_bolt_cast.
#ifndef JAX_BOLT_NATIVE_CAST_H_
#define JAX_BOLT_NATIVE_CAST_H_

#include <cstdint>
#include <string>

#include "driver.h"
#include "jax_bolt/abi.h"
#include "jax_bolt/cast/table.hpp"
#include "kernel.h"

namespace jax_bolt::native {

// The work of one launch.
struct Casts {
  cast::Table table = {};
  uint32_t blocks = 0;

  bool full() const { return table.tensors == cast::kMaxTensors; }
  // Does nothing for an empty tensor.
  void Add(const void* from, void* to, int64_t count);
};

class CastKernel final : public Kernel {
 public:
  // As LoadKernel. Throws DriverError.
  explicit CastKernel(const std::string& path);

  // Enqueues one launch; none where there is no work.
  JaxBoltStatus Cast(const Casts& casts, const JaxBoltDevice& device, void* stream) const;
  std::string ErrorString(JaxBoltStatus status) const override;

  // It runs no region.
  std::string Check(const Problem&) const override { return "it only casts"; }
  int64_t WorkspaceBytes(const Problem&, const JaxBoltDevice&) const override { return 0; }
  JaxBoltStatus Launch(const Problem&, const JaxBoltBuffers&, const JaxBoltDevice&,
                       void*) const override {
    return JAX_BOLT_WRONG_KIND;
  }

 private:
  const Driver& driver_;
  const LoadedKernel loaded_;
};

}  // namespace jax_bolt::native

#endif  // JAX_BOLT_NATIVE_CAST_H_
