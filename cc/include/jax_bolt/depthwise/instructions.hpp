// SPDX-License-Identifier: Apache-2.0
// The instructions that the depthwise kernel is written with. A test has a header of this name for
// the CPU, where the kernel is run thread by thread.
#ifndef JAX_BOLT_DEPTHWISE_INSTRUCTIONS_HPP_
#define JAX_BOLT_DEPTHWISE_INSTRUCTIONS_HPP_

#include <cstdint>

#include "jax_bolt/implicit_gemm/ptx.hpp"

namespace jax_bolt::depthwise {

using implicit_gemm::ptx::Pair;
using implicit_gemm::ptx::shared_address;

/// Programmatic launch, where there is any: lets the next kernel begin, and waits for those before.
__device__ __forceinline__ void begin_after_earlier_kernels() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  implicit_gemm::ptx::allow_next_kernel();
  implicit_gemm::ptx::wait_for_earlier_kernels();
#endif
}

/// `value`, which the compiler must not compute again where it is used, in a loop say.
__device__ __forceinline__ float computed_once(float value) {
  asm volatile("" : "+f"(value));
  return value;
}

/// kBytes from global to shared memory, or zeros where not `valid`. Does not wait for them, but for
/// single elements of 2 bytes, which the hardware does not copy.
template <int kBytes>
__device__ __forceinline__ void copy_async(std::uint32_t to, char const* from, bool valid) {
  int const read = valid ? kBytes : 0;
  if constexpr (kBytes == 2) {
    std::uint16_t found = 0;
    if (valid) found = *reinterpret_cast<std::uint16_t const*>(from);
    asm volatile("st.shared.u16 [%0], %1;" ::"r"(to), "h"(found) : "memory");
  } else if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(read)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(to), "l"(from), "r"(read),
                 "n"(kBytes)
                 : "memory");
  }
}

/// Ends a group of this thread's copies.
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

/// Until all but the latest kPending groups are there.
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace jax_bolt::depthwise
#endif  // JAX_BOLT_DEPTHWISE_INSTRUCTIONS_HPP_
