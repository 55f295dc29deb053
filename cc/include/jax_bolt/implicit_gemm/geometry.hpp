// SPDX-License-Identifier: Apache-2.0
// How an implicit GEMM lies over a problem: plain integers that Layout.integers of
// kernels/geometry.py computes, in the order in which it lists them. Nothing here depends on a
// shape at compile time, so one binary serves every problem its tile suits.
//
// Names: an output pixel is (image, row, column). A GEMM is one image, or one per batch entry, of
// one row. A chunk is 128 bytes of input channels. A phase is one box of input pixels: all taps
// whose offset has the same remainder by the stride read the same box. A tap is one filter
// position. With a pool, an output is the maximum or the mean of a window of the conv's results.
#ifndef JAX_BOLT_IMPLICIT_GEMM_GEOMETRY_HPP_
#define JAX_BOLT_IMPLICIT_GEMM_GEOMETRY_HPP_

#include <cstdint>

namespace jax_bolt::implicit_gemm {

inline constexpr int kMaxPhases = 16;
inline constexpr int kMaxTaps = 64;
inline constexpr int kMaxPixelStages = 8;
inline constexpr int kMaxFilterStages = 64;
inline constexpr int kMaxStoreStages = 8;

struct Geometry {
  // Output channels; those of a group (all, where there are no groups), and its input channels.
  std::int32_t channels, group_outputs, group_inputs;

  // Tiles of a launch: images x rows x columns x channels, channels varying fastest, and the
  // outputs that one covers.
  std::int32_t tiles, channel_tiles, col_tiles, row_tiles;
  std::int32_t tile_images, tile_rows, tile_cols;

  // The main loop's steps, and the input pixels between the origins of neighbouring outputs.
  std::int32_t chunks, phases, step_rows, step_cols;

  // Stages of the rings in shared memory. `resident`: 1 where the filter's hold all of it, loaded
  // once. With side inputs there are two store stages or more, without them one or two.
  std::int32_t pixel_stages, filter_stages, store_stages, resident;

  // A pixel stage: `loads` boxes of load_bytes, load_cols columns apart; zeros up to stage_bytes.
  std::int32_t loads, load_cols, load_bytes, stage_bytes;

  // From one block of kPixels pixels to the next: in a stage, and over the output.
  std::int32_t block_bytes, block_images, block_rows, block_cols;

  // A block leaves in `stores` boxes, one row and store_bytes apart, from a slot of slot_bytes; a
  // side input's box has side_bytes.
  std::int32_t stores, store_bytes, slot_bytes, side_bytes;

  // 1 where every image has a filter of its own: a batched product.
  std::int32_t filter_batch;

  // 1 where no kernel that may still run writes the filter or the per-channel inputs: they are read
  // without waiting for earlier kernels.
  std::int32_t held;

  // Where a tile's line is gathered from images, by TMA's im2col mode: the rows and columns of an
  // image of output pixels, and where the first one's first tap reads. A phase is then one tap, its
  // column and row counted from the first tap's. Else all 0.
  std::int32_t image_rows, image_cols, first_row, first_col;

  // Where a phase's box begins relative to the tile's first output (in input pixels), the channel
  // and row parity it is read at, and its number of taps.
  std::int32_t phase_channel[kMaxPhases], phase_col[kMaxPhases], phase_parity[kMaxPhases],
      phase_row[kMaxPhases], phase_taps[kMaxPhases];

  // Taps in the order of the phases: bytes from a stage's start, and the position in the filter.
  std::int32_t tap_offset[kMaxTaps], tap_filter[kMaxTaps];
};

/// The geometry of a kernel with a pool. A block's results are in the accumulators' order, and
/// `pitch` from one row of them to the next.
struct PooledGeometry : Geometry {
  // A block's outputs, and an image's rows and columns of these.
  std::int32_t block_outputs, output_rows, output_cols;

  // Rows of results from an image of a block to the next, results from a row to the next, and the
  // bytes that a warpgroup has for them besides its slots.
  std::int32_t pitch_rows, pitch, results_bytes;

  // Results of an image. There are none beyond them.
  std::int32_t result_rows, result_cols;

  // Of a tile at the first output: the row and the column of its first result, and where the first
  // window begins relative to that.
  std::int32_t origin_row, origin_col, window_row, window_col;
};

}  // namespace jax_bolt::implicit_gemm
#endif  // JAX_BOLT_IMPLICIT_GEMM_GEOMETRY_HPP_
