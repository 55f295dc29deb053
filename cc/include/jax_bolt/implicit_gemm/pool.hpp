// SPDX-License-Identifier: Apache-2.0
// What leaves a block of the implicit GEMM: its results, or the maxima of windows of them.
#ifndef JAX_BOLT_IMPLICIT_GEMM_POOL_HPP_
#define JAX_BOLT_IMPLICIT_GEMM_POOL_HPP_

#include <cstdint>

#include "jax_bolt/implicit_gemm/geometry.hpp"
#include "jax_bolt/implicit_gemm/ptx.hpp"

namespace jax_bolt::implicit_gemm {

struct NoPool {
  static constexpr bool kPools = false;
  using Geometry = implicit_gemm::Geometry;
};

/// Windows of kRows x kCols results, kDown and kRight apart.
template <int kRows, int kCols, int kDown, int kRight>
struct MaxPool {
  static constexpr bool kPools = true;
  using Geometry = PooledGeometry;

  /// A warpgroup's block, whose first output has this row and column: from `results`, in the
  /// accumulators' order, to `slot`, one output after the other; both [pixel][64 channels] with the
  /// 128-byte swizzle. A thread takes 8 channels of every 16th output.
  template <class Element>
  __device__ static __forceinline__ void reduce(PooledGeometry const& g, int block_row,
                                                int block_col, std::uint32_t results,
                                                std::uint32_t slot) {
    int const thread = threadIdx.x & 127, eighth = thread & 7;
    // The image's first and last result as seen from the block's first. For what a window has
    // beyond them the nearest is taken, which it has as well, so that nothing is added. Of a block
    // that lies beyond the image, nothing is stored; what it reads only has to be there.
    int const row = block_row * kDown + g.origin_row, col = block_col * kRight + g.origin_col;
    int const top = max(-row, 0), bottom = max(g.result_rows - 1 - row, 0);
    int const left = max(-col, 0), right = max(g.result_cols - 1 - col, 0);
    for (int output = thread / 8; output < g.block_outputs; output += 16) {
      int const line = output / g.output_cols, image = line / g.output_rows;
      int const y = (line - image * g.output_rows) * kDown + g.window_row;
      int const x = (output - line * g.output_cols) * kRight + g.window_col;
      std::uint32_t most[4];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        int const first = (image * g.pitch_rows + min(max(y + i, top), bottom)) * g.pitch;
#pragma unroll
        for (int j = 0; j < kCols; ++j) {
          int const result = first + min(max(x + j, left), right);
          std::uint32_t values[4];
          ptx::load(results + result * 128 + ((eighth ^ (result & 7)) << 4), values);
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            most[k] = i + j == 0 ? values[k] : ptx::Pair<Element>::max(most[k], values[k]);
          }
        }
      }
      ptx::store(slot + output * 128 + ((eighth ^ (output & 7)) << 4), most);
    }
  }
};

}  // namespace jax_bolt::implicit_gemm

#endif  // JAX_BOLT_IMPLICIT_GEMM_POOL_HPP_
