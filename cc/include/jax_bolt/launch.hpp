// SPDX-License-Identifier: Apache-2.0
// What every kernel's host side needs around a launch.
#ifndef JAX_BOLT_LAUNCH_HPP_
#define JAX_BOLT_LAUNCH_HPP_

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>

#include "jax_bolt/abi.h"
#include "jax_bolt/epilogue/traits.hpp"

namespace jax_bolt {

inline bool is_aligned(void const* pointer, std::int64_t bytes) {
  return reinterpret_cast<std::uintptr_t>(pointer) % static_cast<std::uintptr_t>(bytes) == 0;
}

/// Whether every output and side input can be accessed `elements` at a time, at most 16 bytes each.
template <class Epilogue>
bool epilogue_is_aligned(JaxBoltBuffers const& buffers, int elements) {
  auto const access = [elements](std::int64_t item) {
    std::int64_t const bytes = item * elements;
    return bytes < 16 ? bytes : std::int64_t{16};
  };
  bool aligned = is_aligned(buffers.d, access(sizeof(Storage<typename Epilogue::Output>)));
  using Auxiliary = AuxiliaryOf<Epilogue>;
  for_each_index<Auxiliary::kCount>([&](auto index) {
    using Type = Storage<TypeAt<decltype(index)::value, Auxiliary>>;
    void const* output = buffers.auxiliary[decltype(index)::value];
    aligned = aligned && is_aligned(output, access(sizeof(Type)));
  });
  for_each_index<Epilogue::kSides>([&](auto index) {
    using Side = Storage<TypeAt<decltype(index)::value, typename Epilogue::Sides>>;
    aligned = aligned && is_aligned(buffers.sides[decltype(index)::value], access(sizeof(Side)));
  });
  return aligned;
}

/// Lets `Kernel` use `bytes` of dynamic shared memory: once for each device, since the attribute
/// belongs to the kernel as loaded on the current device. Two threads may both set it: no harm.
template <auto Kernel>
cudaError_t allow_shared_memory(int bytes, int ordinal) {
  constexpr int kMaxDevices = 64;
  static std::atomic<bool> done[kMaxDevices];
  bool const known = ordinal >= 0 && ordinal < kMaxDevices;
  if (bytes <= 48 * 1024 || (known && done[ordinal].load(std::memory_order_relaxed))) {
    return cudaSuccess;
  }
  cudaError_t const error = cudaFuncSetAttribute(
      reinterpret_cast<void const*>(Kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess && known) done[ordinal].store(true, std::memory_order_relaxed);
  return error;
}

}  // namespace jax_bolt
#endif  // JAX_BOLT_LAUNCH_HPP_
