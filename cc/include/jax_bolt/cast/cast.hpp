// SPDX-License-Identifier: Apache-2.0
// Casts many float tensors to a 16-bit type in one launch, on any architecture. Rounds to nearest
// even; NaN stays NaN.
#ifndef JAX_BOLT_CAST_CAST_HPP_
#define JAX_BOLT_CAST_CAST_HPP_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

#include "jax_bolt/cast/table.hpp"

namespace jax_bolt::cast {

__device__ __forceinline__ void round(__nv_bfloat16& y, float x) { y = __float2bfloat16_rn(x); }
__device__ __forceinline__ void round(__half& y, float x) { y = __float2half_rn(x); }
__device__ __forceinline__ void round(__nv_bfloat162& y, float2 x) { y = __float22bfloat162_rn(x); }
__device__ __forceinline__ void round(__half2& y, float2 x) { y = __float22half2_rn(x); }

template <class Element>
struct PairOf;
template <>
struct PairOf<__nv_bfloat16> {
  using Type = __nv_bfloat162;
};
template <>
struct PairOf<__half> {
  using Type = __half2;
};

template <class Element>
struct Cast {
  using Pair = typename PairOf<Element>::Type;

  __device__ static uint4 rounded(float4 a, float4 b) {
    Pair pairs[4];
    round(pairs[0], {a.x, a.y});
    round(pairs[1], {a.z, a.w});
    round(pairs[2], {b.x, b.y});
    round(pairs[3], {b.z, b.w});
    uint4 packed;
    static_assert(sizeof(packed) == sizeof(pairs));
    memcpy(&packed, pairs, sizeof(packed));
    return packed;
  }

  /// `count` elements, at 16-byte addresses.
  __device__ static void vectors(float const* from, Element* to, std::int64_t count) {
    auto const* in = reinterpret_cast<float4 const*>(from);
    auto* out = reinterpret_cast<uint4*>(to);
    // Not kept in L2: only the results are read soon.
    if (count >= kBlockElements) {
      float4 x[kVectors][2];
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        int const at = i * kThreads + threadIdx.x;
        x[i][0] = __ldcs(in + 2 * at);
        x[i][1] = __ldcs(in + 2 * at + 1);
      }
#pragma unroll
      for (int i = 0; i < kVectors; ++i)
        out[i * kThreads + threadIdx.x] = rounded(x[i][0], x[i][1]);
      return;
    }
    int const whole = static_cast<int>(count) / kVector;
    for (int at = threadIdx.x; at < whole; at += kThreads) {
      out[at] = rounded(__ldcs(in + 2 * at), __ldcs(in + 2 * at + 1));
    }
    scalars(from, to, whole * kVector, static_cast<int>(count));
  }

  __device__ static void scalars(float const* from, Element* to, int begin, int end) {
    for (int at = begin + threadIdx.x; at < end; at += kThreads) round(to[at], from[at]);
  }

  __device__ static void run(Table const& table) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
    // A kernel ahead may still write the sources, or read what lay where the results go.
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
    int const i = tensor_of(table, blockIdx.x);
    std::int64_t const begin = (blockIdx.x - table.first_block[i]) * kBlockElements;
    std::int64_t const count = table.count[i] - begin;  // of this block and those after it
    auto const* from = static_cast<float const*>(table.from[i]) + begin;
    auto* to = static_cast<Element*>(table.to[i]) + begin;
    auto const bits = reinterpret_cast<std::uintptr_t>(from) | reinterpret_cast<std::uintptr_t>(to);
    if (bits % 16 == 0) {
      vectors(from, to, count);
    } else {
      scalars(from, to, 0, static_cast<int>(count < kBlockElements ? count : kBlockElements));
    }
  }
};

}  // namespace jax_bolt::cast

/// The kernel of an artifact that casts to a type, under the name that the launcher looks for.
#define JAX_BOLT_CAST_KERNEL(Element)                                      \
  extern "C" __global__ void __launch_bounds__(jax_bolt::cast::kThreads)   \
      jax_bolt_cast(const __grid_constant__ jax_bolt::cast::Table table) { \
    jax_bolt::cast::Cast<Element>::run(table);                             \
  }

#endif  // JAX_BOLT_CAST_CAST_HPP_
