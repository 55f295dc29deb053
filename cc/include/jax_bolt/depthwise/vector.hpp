// SPDX-License-Identifier: Apache-2.0
// A few neighbouring channels of one pixel: moved in one access, seen as floats.
#ifndef JAX_BOLT_DEPTHWISE_VECTOR_HPP_
#define JAX_BOLT_DEPTHWISE_VECTOR_HPP_

#include <cstdint>

#include "jax_bolt/depthwise/instructions.hpp"
#include "jax_bolt/epilogue/traits.hpp"

namespace jax_bolt::depthwise {

/// kCount stored values of T, as they lie in memory at a multiple of their bytes, or of 16.
template <class T, int kCount>
struct Vector {
  static constexpr int kBytes = kCount * int(sizeof(T));
  static constexpr int kWords = kBytes < 4 ? 1 : kBytes / 4;
  static_assert(kBytes == 1 || kBytes == 2 || kBytes == 4 || kBytes == 8 || kBytes % 16 == 0);

  std::uint32_t words[kWords];

  __device__ __forceinline__ void load(void const* from) {
    if constexpr (kBytes == 1) {
      words[0] = *static_cast<std::uint8_t const*>(from);
    } else if constexpr (kBytes == 2) {
      words[0] = *static_cast<std::uint16_t const*>(from);
    } else if constexpr (kBytes == 4) {
      words[0] = *static_cast<std::uint32_t const*>(from);
    } else if constexpr (kBytes == 8) {
      uint2 const found = *static_cast<uint2 const*>(from);
      words[0] = found.x;
      words[1] = found.y;
    } else {
#pragma unroll
      for (int i = 0; i < kWords; i += 4) {
        uint4 const found = static_cast<uint4 const*>(from)[i / 4];
        words[i] = found.x;
        words[i + 1] = found.y;
        words[i + 2] = found.z;
        words[i + 3] = found.w;
      }
    }
  }

  __device__ __forceinline__ void store(void* to) const {
    if constexpr (kBytes == 1) {
      *static_cast<std::uint8_t*>(to) = static_cast<std::uint8_t>(words[0]);
    } else if constexpr (kBytes == 2) {
      *static_cast<std::uint16_t*>(to) = static_cast<std::uint16_t>(words[0]);
    } else if constexpr (kBytes == 4) {
      *static_cast<std::uint32_t*>(to) = words[0];
    } else if constexpr (kBytes == 8) {
      *static_cast<uint2*>(to) = make_uint2(words[0], words[1]);
    } else {
#pragma unroll
      for (int i = 0; i < kWords; i += 4) {
        static_cast<uint4*>(to)[i / 4] =
            make_uint4(words[i], words[i + 1], words[i + 2], words[i + 3]);
      }
    }
  }

  __device__ __forceinline__ float get(int i) const {
    int const bit = i * int(sizeof(T)) * 8;
    return float_of_bits<T>(words[bit / 32] >> (bit % 32));
  }

  /// From floats, rounded to nearest even as `Output` is stored.
  template <class Output>
  __device__ static __forceinline__ Vector rounded(float const (&values)[kCount]) {
    static_assert(sizeof(Storage<Output>) == sizeof(T));
    Vector made;
    if constexpr (sizeof(T) == 2) {
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        float const high = 2 * i + 1 < kCount ? values[(2 * i + 1) % kCount] : 0.0f;
        made.words[i] = Pair<Output>::pack(values[2 * i], high);
      }
    } else if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) made.words[i] = __float_as_uint(values[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kWords; ++i) made.words[i] = 0;
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        made.words[i / 4] |= std::uint32_t(from_float<Output>(values[i])) << (i % 4 * 8);
      }
    }
    return made;
  }
};

}  // namespace jax_bolt::depthwise
#endif  // JAX_BOLT_DEPTHWISE_VECTOR_HPP_
