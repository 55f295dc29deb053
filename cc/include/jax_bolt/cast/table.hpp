// SPDX-License-Identifier: Apache-2.0
// What one launch of the cast kernel works on: its one parameter, filled by cc/native/cast.cc.
#ifndef JAX_BOLT_CAST_TABLE_HPP_
#define JAX_BOLT_CAST_TABLE_HPP_

#include <cstdint>

namespace jax_bolt::cast {

inline constexpr int kMaxTensors = 128;
inline constexpr int kThreads = 256;
inline constexpr int kVector = 8;   // elements of one 16-byte store
inline constexpr int kVectors = 4;  // for each thread of a block
inline constexpr std::int64_t kBlockElements = kThreads * kVector * kVectors;

/// Tensor i is cast by blocks first_block[i] and on, up to the next tensor's first; each has one.
struct Table {
  void const* from[kMaxTensors];
  void* to[kMaxTensors];
  std::int64_t count[kMaxTensors];
  std::uint32_t first_block[kMaxTensors];
  std::int32_t tensors;
};
static_assert(sizeof(Table) <= 4096, "what every architecture takes as parameters");

/// The tensor that a block works on.
constexpr int tensor_of(Table const& table, std::uint32_t block) {
  int low = 0;
  int high = table.tensors;
  while (high - low > 1) {
    int const middle = (low + high) / 2;
    (block < table.first_block[middle] ? high : low) = middle;
  }
  return low;
}

}  // namespace jax_bolt::cast

#endif  // JAX_BOLT_CAST_TABLE_HPP_
