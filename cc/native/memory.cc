// SPDX-License-Identifier: Apache-2.0
#include "memory.h"

#include <algorithm>
#include <new>

#include "driver.h"

namespace jax_bolt::native {

Memory::Memory(int ordinal) : driver_(Driver::Get()), device_(driver_.Device(ordinal)) {
  CuContext context;
  driver_.Check(driver_.DevicePrimaryCtxRetain(&context, device_), "cuDevicePrimaryCtxRetain");
}

Memory::~Memory() {
  // A context that a kernel has broken frees nothing, and neither can be pushed.
  try {
    const ScopedContext context(driver_, device_);
    for (CuDevicePointer buffer : buffers_) driver_.MemFree(buffer);
  } catch (const DriverError&) {
  }
  driver_.DevicePrimaryCtxRelease(device_);
}

uintptr_t Memory::Allocate(size_t bytes, std::string_view pattern) {
  const ScopedContext context(driver_, device_);
  CuDevicePointer address = 0;
  const CuResult result = driver_.MemAlloc(&address, std::max<size_t>(bytes, 1));
  if (result == kCuOutOfMemory) throw std::bad_alloc();
  driver_.Check(result, "cuMemAlloc");
  buffers_.push_back(address);
  Fill(address, bytes, pattern);
  driver_.Check(driver_.CtxSynchronize(), "cuCtxSynchronize");
  return static_cast<uintptr_t>(address);
}

void Memory::Fill(CuDevicePointer address, size_t bytes, std::string_view pattern) const {
  if (pattern.empty()) {
    driver_.Check(driver_.MemsetD8(address, 0, bytes), "cuMemsetD8");
    return;
  }
  size_t filled = std::min(bytes, pattern.size());
  driver_.Check(driver_.MemcpyHtoD(address, pattern.data(), filled), "cuMemcpyHtoD");
  while (filled < bytes) {
    const size_t more = std::min(filled, bytes - filled);
    driver_.Check(driver_.MemcpyDtoD(address + filled, address, more), "cuMemcpyDtoD");
    filled += more;
  }
}

}  // namespace jax_bolt::native
