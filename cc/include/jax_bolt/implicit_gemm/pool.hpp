// SPDX-License-Identifier: Apache-2.0
// What leaves a block of the implicit GEMM: its results, the maxima of windows of them, or the mean
// of each image.
#ifndef JAX_BOLT_IMPLICIT_GEMM_POOL_HPP_
#define JAX_BOLT_IMPLICIT_GEMM_POOL_HPP_

#include <cstdint>

#include "jax_bolt/implicit_gemm/geometry.hpp"
#include "jax_bolt/implicit_gemm/ptx.hpp"

namespace jax_bolt::implicit_gemm {

// kPools: what leaves is fewer outputs than results. kInPlace: these are made in the slot itself,
// where the results are left as they are without a pool.

struct NoPool {
  static constexpr bool kPools = false, kInPlace = false;
  using Geometry = implicit_gemm::Geometry;
};

/// Windows of kRows x kCols results, kDown and kRight apart.
template <int kRows, int kCols, int kDown, int kRight>
struct MaxPool {
  static constexpr bool kPools = true, kInPlace = false;
  using Geometry = PooledGeometry;

  /// A warpgroup's block, whose first output has this row and column: from `results`, in the
  /// accumulators' order, to `slot`, one output after the other; both [pixel][64 channels] with the
  /// 128-byte swizzle. A thread takes 8 channels of every 16th output, two of these at a time:
  /// their windows are read without waiting for each other.
  template <class Element>
  __device__ static __forceinline__ void reduce(PooledGeometry const& g, int block_row,
                                                int block_col, std::uint32_t results,
                                                std::uint32_t slot) {
    constexpr int kApart = 16;
    int const thread = threadIdx.x & 127, eighth = thread & 7;
    View const view(g, block_row, block_col);
    int output = thread / 8;
    int const line = output / g.output_cols, image = line / g.output_rows;
    Place place = {image, line - image * g.output_rows, output - line * g.output_cols};
    int const down = kApart / g.output_cols, right = kApart - down * g.output_cols;
    auto const next = [&](Place at) {
      at.row += down;
      at.col += right;
      if (at.col >= g.output_cols) {
        at.col -= g.output_cols;
        ++at.row;
      }
      while (at.row >= g.output_rows) {
        at.row -= g.output_rows;
        ++at.image;
      }
      return at;
    };
    while (output < g.block_outputs) {
      bool const both = output + kApart < g.block_outputs;
      Place const after = next(place);
      std::uint32_t values[2][kRows * kCols][4];
      view.read(g, place, results, eighth, values[0]);
      view.read(g, both ? after : place, results, eighth, values[1]);
#pragma unroll
      for (int each = 0; each < 2; ++each, output += kApart) {
#pragma unroll
        for (int i = 1; i < kRows * kCols; ++i) {
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            std::uint32_t& most = values[each][0][k];
            most = ptx::Pair<Element>::max(most, values[each][i][k]);
          }
        }
        if (each == 0 || both) {
          ptx::store(slot + output * 128 + ((eighth ^ (output & 7)) << 4), values[each][0]);
        }
      }
      place = next(after);
    }
  }

 private:
  /// An output of a block.
  struct Place {
    int image, row, col;
  };

  /// An image's first and last result as seen from a block's first. For what a window has beyond
  /// them the nearest is taken, which it has as well, so that nothing is added. Of a block that
  /// lies beyond the image, nothing is stored; what it reads only has to be there.
  struct View {
    int top, bottom, left, right;

    __device__ __forceinline__ View(PooledGeometry const& g, int block_row, int block_col) {
      int const row = block_row * kDown + g.origin_row, col = block_col * kRight + g.origin_col;
      top = max(-row, 0), bottom = max(g.result_rows - 1 - row, 0);
      left = max(-col, 0), right = max(g.result_cols - 1 - col, 0);
    }

    /// 8 channels of all results in an output's window.
    __device__ __forceinline__ void read(PooledGeometry const& g, Place const& output,
                                         std::uint32_t results, int eighth,
                                         std::uint32_t (&values)[kRows * kCols][4]) const {
      int const y = output.row * kDown + g.window_row, x = output.col * kRight + g.window_col;
      int const first = output.image * g.pitch_rows;
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        int const line = (first + min(max(y + i, top), bottom)) * g.pitch;
#pragma unroll
        for (int j = 0; j < kCols; ++j) {
          int const result = line + min(max(x + j, left), right);
          ptx::load(results + result * 128 + ((eighth ^ (result & 7)) << 4), values[i * kCols + j]);
        }
      }
    }
  };
};

/// The mean of each image of a block of whole images.
struct MeanPool {
  static constexpr bool kPools = true, kInPlace = true;
  using Geometry = PooledGeometry;

  /// From the results in `slot`, [pixel][64 channels] with the 128-byte swizzle (of a 4-byte type
  /// two tiles of 32 channels), to one pixel for each image there. A warp has the 16 channels whose
  /// results it left itself, so that warps need not wait for each other. The sum's order is always
  /// the same: a lane's own results, then those of the lanes, in pairs.
  template <class Output>
  __device__ static __forceinline__ void reduce(PooledGeometry const& g, std::uint32_t slot) {
    constexpr int kValues = 16 / sizeof(Output);  // channels of a load
    constexpr int kLoads = 16 / kValues;          // that a result's 16 channels take
    constexpr int kStep = 32 / kLoads;            // results that a warp reads at once
    int const lane = threadIdx.x & 31, warp = (threadIdx.x & 127) / 32;
    int const eighth = warp * kLoads + lane % kLoads;  // of a tile, those of the second from 8 on
    std::uint32_t const tile = slot + eighth / 8 * g.slot_bytes;
    // The lane's first result, and the way to its next one. What lies between rows, between images
    // and after the last one is passed over.
    int const first_row = lane / kLoads / g.result_cols;
    int const first_col = lane / kLoads - first_row * g.result_cols;
    int const down = kStep / g.result_cols, right = kStep - down * g.result_cols;
    float const count = static_cast<float>(g.result_rows * g.result_cols);
    for (int image = 0; image < g.block_outputs; ++image) {
      float sums[kValues] = {};
      int row = first_row, col = first_col;
      while (row < g.result_rows) {
        int const result = (image * g.pitch_rows + row) * g.pitch + col;
        std::uint32_t words[4];
        ptx::load(tile + result * 128 + (((eighth ^ result) & 7) << 4), words);
        add<Output>(sums, words);
        row += down;
        col += right;
        if (col >= g.result_cols) {
          col -= g.result_cols;
          ++row;
        }
      }
#pragma unroll
      for (int other = kLoads; other < 32; other *= 2) {
#pragma unroll
        for (int k = 0; k < kValues; ++k) sums[k] += __shfl_xor_sync(0xffffffffu, sums[k], other);
      }
#pragma unroll
      for (int k = 0; k < kValues; ++k) sums[k] = __fdiv_rn(sums[k], count);
      // The mean takes the place of pixel `image`, which is no later image's: all lanes have read
      // the results of this one.
      __syncwarp();
      if (lane < kLoads) {
        std::uint32_t words[4];
        pack<Output>(sums, words);
        ptx::store(tile + image * 128 + (((eighth ^ image) & 7) << 4), words);
      }
    }
  }

 private:
  /// Adds the values of 16 bytes.
  template <class Output, int kValues>
  __device__ static __forceinline__ void add(float (&sums)[kValues],
                                             std::uint32_t const (&words)[4]) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if constexpr (kValues == 8) {
        sums[2 * k] += ptx::Pair<Output>::low(words[k]);
        sums[2 * k + 1] += ptx::Pair<Output>::high(words[k]);
      } else {
        sums[k] += __uint_as_float(words[k]);
      }
    }
  }

  /// The values as 16 bytes.
  template <class Output, int kValues>
  __device__ static __forceinline__ void pack(float const (&values)[kValues],
                                              std::uint32_t (&words)[4]) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if constexpr (kValues == 8) {
        words[k] = ptx::Pair<Output>::pack(values[2 * k], values[2 * k + 1]);
      } else {
        words[k] = __float_as_uint(values[k]);
      }
    }
  }
};

}  // namespace jax_bolt::implicit_gemm

#endif  // JAX_BOLT_IMPLICIT_GEMM_POOL_HPP_
