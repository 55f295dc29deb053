// SPDX-License-Identifier: Apache-2.0
// Puts an image of few channels, and its filter, before the implicit GEMM: blocks of kFold x kFold
// pixels become pixels of kFold * kFold * kChannels channels (space to depth), rounded up to 16
// bytes, as TMA needs, and the padding in width is written out. Exact; jax_bolt/_src/kernels/
// packing.py computes the numbers.
#ifndef JAX_BOLT_IMPLICIT_GEMM_PACK_HPP_
#define JAX_BOLT_IMPLICIT_GEMM_PACK_HPP_

#include <cstdint>

#include "jax_bolt/implicit_gemm/ptx.hpp"

namespace jax_bolt::implicit_gemm {

/// The prologue's only parameter, in the order of packing.py.
struct PackParams {
  void const* image;   // [images, height, width, kChannels]
  void const* filter;  // [filter_rows, filter_cols, kChannels, channels]
  void* workspace;     // the packed image, and from filter_offset (16 bytes each) the filter
  std::int32_t images, height, width;
  std::int32_t rows, cols, lead_cols;  // of the packed image; the zeros on its left
  std::int32_t filter_rows, filter_cols, channels;
  std::int32_t taps_down, taps_right, shift_down, shift_right;  // of the packed filter
  std::int32_t filter_offset;
  std::int32_t image_blocks;  // thread blocks that pack the image; the others pack the filter
};

/// kPairs: rows of a block begin at even elements and lie inside the image or outside it.
template <int kChannels, int kFold, bool kPairs>
struct Pack {
  static constexpr int kThreads = 256;
  static constexpr int kRow = kFold * kChannels;  // elements of one row of a block
  static constexpr int kPacked = (kFold * kRow + 7) / 8 * 8;
  using Element = std::uint16_t;  // of any 2-byte type: bits are moved

  /// One packed pixel.
  __device__ static void image(PackParams const& p, int index) {
    int const col = index % p.cols, line = index / p.cols;
    int const row = line % p.rows, image = line / p.rows;
    int const left = (col - p.lead_cols) * kFold;
    alignas(16) Element packed[kPacked] = {};
    auto const* source = static_cast<Element const*>(p.image);
#pragma unroll
    for (int down = 0; down < kFold; ++down) {
      int const y = row * kFold + down;
      if (y >= p.height) continue;
      Element const* from = source + (std::int64_t(image) * p.height + y) * p.width * kChannels +
                            std::int64_t(left) * kChannels;
      if constexpr (kPairs) {
        if (left < 0 || left >= p.width) continue;
#pragma unroll
        for (int i = 0; i < kRow; i += 2) {
          std::uint32_t const pair = *reinterpret_cast<std::uint32_t const*>(from + i);
          packed[down * kRow + i] = static_cast<Element>(pair);
          packed[down * kRow + i + 1] = static_cast<Element>(pair >> 16);
        }
      } else {
#pragma unroll
        for (int i = 0; i < kRow; ++i) {
          int const x = left + i / kChannels;
          if (x >= 0 && x < p.width) packed[down * kRow + i] = from[i];
        }
      }
    }
    auto* to = static_cast<uint4*>(p.workspace) + std::int64_t(index) * (kPacked / 8);
#pragma unroll
    for (int i = 0; i < kPacked / 8; ++i) to[i] = reinterpret_cast<uint4 const*>(packed)[i];
  }

  /// Eight output channels of one packed input channel and tap.
  __device__ static void filter(PackParams const& p, int index) {
    int const eighths = p.channels / 8;
    int const eighth = index % eighths, line = index / eighths;
    int const channel = line % kPacked, tap = line / kPacked;
    int const down = tap / p.taps_right * kFold + channel / kRow - p.shift_down;
    int const right = tap % p.taps_right * kFold + channel % kRow / kChannels - p.shift_right;
    uint4 found = {};
    if (channel < kFold * kRow && down >= 0 && down < p.filter_rows && right >= 0 &&
        right < p.filter_cols) {
      int const from = (down * p.filter_cols + right) * kChannels + channel % kChannels;
      found = static_cast<uint4 const*>(p.filter)[from * eighths + eighth];
    }
    static_cast<uint4*>(p.workspace)[p.filter_offset + index] = found;
  }

  __device__ static void run(PackParams const& p) {
    ptx::allow_next_kernel();
    // The kernel before this one may still read the workspace, or write the operands.
    ptx::wait_for_earlier_kernels();
    int const block = blockIdx.x;
    if (block < p.image_blocks) {
      int const index = block * kThreads + threadIdx.x;
      if (index < p.images * p.rows * p.cols) image(p, index);
    } else {
      int const index = (block - p.image_blocks) * kThreads + threadIdx.x;
      if (index < p.taps_down * p.taps_right * kPacked * (p.channels / 8)) filter(p, index);
    }
  }
};

}  // namespace jax_bolt::implicit_gemm

/// The kernel that a recipe's prologue launches.
#define JAX_BOLT_PROLOGUE(...)                                                                \
  using JaxBoltPrologue = __VA_ARGS__;                                                        \
  extern "C" __global__ void __launch_bounds__(JaxBoltPrologue::kThreads)                     \
      jax_bolt_prologue(const __grid_constant__ jax_bolt::implicit_gemm::PackParams params) { \
    JaxBoltPrologue::run(params);                                                             \
  }

#endif  // JAX_BOLT_IMPLICIT_GEMM_PACK_HPP_
