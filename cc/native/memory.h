// SPDX-License-Identifier: Apache-2.0
// Device memory of a process without JAX: the tuner's worker has no other.
#ifndef JAX_BOLT_NATIVE_MEMORY_H_
#define JAX_BOLT_NATIVE_MEMORY_H_

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

#include "driver.h"

namespace jax_bolt::native {

// Buffers on one device, which are freed together. Keeps the device's primary context alive:
// without JAX nobody else does. Functions throw DriverError, and std::bad_alloc where the device is
// full.
class Memory {
 public:
  explicit Memory(int ordinal);
  ~Memory();
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  // `bytes` of device memory that repeat `pattern`; zeros where that is empty. Waits.
  uintptr_t Allocate(size_t bytes, std::string_view pattern);

 private:
  void Fill(CuDevicePointer address, size_t bytes, std::string_view pattern) const;

  const Driver& driver_;
  const CuDevice device_;
  std::vector<CuDevicePointer> buffers_;
};

}  // namespace jax_bolt::native

#endif  // JAX_BOLT_NATIVE_MEMORY_H_
