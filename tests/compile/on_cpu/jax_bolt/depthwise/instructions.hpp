// SPDX-License-Identifier: Apache-2.0
// The depthwise kernel's instructions on a CPU, with one thread of it for each of the block, and
// what CUDA declares besides. Copies are made when they are waited for and no earlier, so that what
// is read without waiting is not there.
#ifndef JAX_BOLT_DEPTHWISE_INSTRUCTIONS_HPP_
#define JAX_BOLT_DEPTHWISE_INSTRUCTIONS_HPP_

#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "jax_bolt/epilogue/math.hpp"

#define __device__
#define __forceinline__ inline
#define __shared__
#define __align__(bytes) __attribute__((aligned(bytes)))

using std::max;
using std::min;

struct Dimensions {
  unsigned x;
};
inline thread_local Dimensions threadIdx;
inline Dimensions blockIdx;
inline std::unique_ptr<std::barrier<>> block_barrier;
inline void __syncthreads() { block_barrier->arrive_and_wait(); }
inline void __syncwarp() { block_barrier->arrive_and_wait(); }  // of blocks of one warp

struct uint2 {
  std::uint32_t x, y;
};
struct uint4 {
  std::uint32_t x, y, z, w;
};
inline uint2 make_uint2(std::uint32_t x, std::uint32_t y) { return {x, y}; }
inline uint4 make_uint4(std::uint32_t x, std::uint32_t y, std::uint32_t z, std::uint32_t w) {
  return {x, y, z, w};
}
inline unsigned __umulhi(unsigned a, unsigned b) { return std::uint64_t(a) * b >> 32; }
inline std::uint32_t __float_as_uint(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

namespace cutlass {
struct bfloat16_t {
  std::uint16_t bits;
  explicit operator float() const {
    std::uint32_t const wide = std::uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof(value));
    return value;
  }
};
}  // namespace cutlass

namespace jax_bolt::depthwise {

alignas(16) inline char memory[1 << 18];

template <class T>
struct Pair {
  static std::uint32_t pack(float low, float high) {
    return __float_as_uint(math::to_bf16(low)) >> 16 |
           (__float_as_uint(math::to_bf16(high)) & 0xffff0000u);
  }
};

inline std::uint32_t shared_address(void const* pointer) {
  return static_cast<std::uint32_t>(static_cast<char const*>(pointer) - memory);
}

inline void begin_after_earlier_kernels() {}
inline float computed_once(float value) { return value; }

struct Copy {
  std::uint32_t to;
  char const* from;
  int bytes;
  bool valid;

  void make() const {
    if (valid) {
      std::memcpy(memory + to, from, bytes);
    } else {
      std::memset(memory + to, 0, bytes);
    }
  }
};
inline thread_local std::vector<std::vector<Copy>> groups(1);

template <int kBytes>
void copy_async(std::uint32_t to, char const* from, bool valid) {
  if (to % kBytes != 0 || (valid && reinterpret_cast<std::uintptr_t>(from) % kBytes != 0)) {
    std::abort();
  }
  Copy const copy{to, from, kBytes, valid};
  if (kBytes == 2) {
    copy.make();
  } else {
    groups.back().push_back(copy);
  }
}
inline void commit_copies() { groups.emplace_back(); }

template <int kPending>
void wait_for_copies() {
  while (groups.size() > kPending + 1) {
    for (Copy const& copy : groups.front()) copy.make();
    groups.erase(groups.begin());
  }
}

/// A launch of `grid` blocks, one after the other.
template <class Kernel>
void launch(void const* bytes, int grid) {
  typename Kernel::Parameters params;
  std::memcpy(&params, bytes, sizeof(params));
  for (int block = 0; block < grid; ++block) {
    std::memset(memory, 0xff, sizeof(memory));  // NaN
    blockIdx.x = block;
    block_barrier = std::make_unique<std::barrier<>>(Kernel::kThreads);
    std::vector<std::thread> threads;
    for (int i = 0; i < Kernel::kThreads; ++i) {
      threads.emplace_back([&params, i] {
        threadIdx.x = i;
        Kernel::run(params);
        block_barrier->arrive_and_drop();
      });
    }
    for (std::thread& thread : threads) thread.join();
  }
}

}  // namespace jax_bolt::depthwise

#endif  // JAX_BOLT_DEPTHWISE_INSTRUCTIONS_HPP_
