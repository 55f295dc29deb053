// SPDX-License-Identifier: Apache-2.0
// D[64, N] += A[64, K] B[N, K]^T by one warpgroup, both operands in shared memory, f32 in
// registers; and the descriptors of those operands. K is 32 bytes: 16 elements, or 8 of f32, of
// which TF32 reads the upper 19 bits.
#ifndef JAX_BOLT_IMPLICIT_GEMM_WGMMA_HPP_
#define JAX_BOLT_IMPLICIT_GEMM_WGMMA_HPP_

#include <cstdint>
#include <utility>

#include "cute/arch/mma_sm90_gmma.hpp"
#include "cute/arch/mma_sm90_gmma_ext.hpp"
#include "cutlass/bfloat16.h"
#include "cutlass/half.h"

namespace jax_bolt::implicit_gemm {

namespace gmma = cute::SM90::GMMA;

/// CuTe's instruction for an element type, N, and whether A has K (not M) innermost.
template <class Element, int kN, gmma::Major kMajorA>
struct Wgmma;

#define JAX_BOLT_WGMMA(N)                                                     \
  template <gmma::Major kMajorA>                                              \
  struct Wgmma<cutlass::bfloat16_t, N, kMajorA> {                             \
    using Op = gmma::MMA_64x##N##x16_F32BF16BF16_SS<kMajorA, gmma::Major::K>; \
  };                                                                          \
  template <gmma::Major kMajorA>                                              \
  struct Wgmma<cutlass::half_t, N, kMajorA> {                                 \
    using Op = gmma::MMA_64x##N##x16_F32F16F16_SS<kMajorA, gmma::Major::K>;   \
  };                                                                          \
  template <>                                                                 \
  struct Wgmma<float, N, gmma::Major::K> {                                    \
    using Op = gmma::MMA_64x##N##x8_F32TF32TF32_SS_TN<>;                      \
  }
// clang-format off
JAX_BOLT_WGMMA(8);   JAX_BOLT_WGMMA(16);  JAX_BOLT_WGMMA(24);  JAX_BOLT_WGMMA(32);
JAX_BOLT_WGMMA(40);  JAX_BOLT_WGMMA(48);  JAX_BOLT_WGMMA(56);  JAX_BOLT_WGMMA(64);
JAX_BOLT_WGMMA(72);  JAX_BOLT_WGMMA(80);  JAX_BOLT_WGMMA(88);  JAX_BOLT_WGMMA(96);
JAX_BOLT_WGMMA(104); JAX_BOLT_WGMMA(112); JAX_BOLT_WGMMA(120); JAX_BOLT_WGMMA(128);
JAX_BOLT_WGMMA(136); JAX_BOLT_WGMMA(144); JAX_BOLT_WGMMA(152); JAX_BOLT_WGMMA(160);
JAX_BOLT_WGMMA(168); JAX_BOLT_WGMMA(176); JAX_BOLT_WGMMA(184); JAX_BOLT_WGMMA(192);
JAX_BOLT_WGMMA(200); JAX_BOLT_WGMMA(208); JAX_BOLT_WGMMA(216); JAX_BOLT_WGMMA(224);
JAX_BOLT_WGMMA(232); JAX_BOLT_WGMMA(240); JAX_BOLT_WGMMA(248); JAX_BOLT_WGMMA(256);
// clang-format on
#undef JAX_BOLT_WGMMA

template <class Op, std::size_t... I>
__device__ __forceinline__ void wgmma(std::uint64_t a, std::uint64_t b, float* d,
                                      gmma::ScaleOut scale, std::index_sequence<I...>) {
  Op::fma(a, b, d[I]..., scale);
}

/// A descriptor of rows of 128 bytes with the 128-byte swizzle, 8 rows every 1024 bytes: K-major
/// operands, and M-major ones of 64 rows, whose atoms follow one another along K.
///
/// The swizzle takes bits of the absolute address, so that a start at any row (a multiple of 128
/// bytes) of such a tile is right with a base offset of 0. PTX documents starts at atoms only;
/// tests/gpu covers the others.
__device__ __forceinline__ std::uint64_t descriptor(std::uint32_t address) {
  constexpr std::uint64_t kAtomStride = 1024 >> 4, kSwizzle128 = 1;
  return std::uint64_t((address & 0x3ffff) >> 4) | 1ull << 16 | kAtomStride << 32 |
         kSwizzle128 << 62;
}

/// What to add to a descriptor to move its start by a multiple of 16 bytes.
__device__ __forceinline__ std::uint32_t moved(int bytes) {
  return static_cast<unsigned>(bytes) >> 4;
}

}  // namespace jax_bolt::implicit_gemm
#endif  // JAX_BOLT_IMPLICIT_GEMM_WGMMA_HPP_
