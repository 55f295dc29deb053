// SPDX-License-Identifier: Apache-2.0
// Implicit GEMM for Hopper: convs, and products as 1x1 convs over one row of pixels.
//
// The operands are swapped: the filter is wgmma's A (64 output channels a warpgroup and block), the
// pixels are B, so that a tile may have any multiple of 8 pixels and be cut to the image. One TMA
// box of input pixels serves all taps of a phase: a tap is another start address in it.
//
// A persistent CTA has one or two warpgroups that multiply and, last, one that loads: warp 0 the
// pixels, warp 1 the filters, warps 2 and 3 the side inputs of a warpgroup each. Rings of stages in
// shared memory, each with a full and an empty barrier, connect them. From load to store:
// load_pixels, load_filters, load_sides; then multiply, finish, store. The CTAs of a cluster
// may share a tile, each with some of the input channels: combine and gather connect them.
#ifndef JAX_BOLT_IMPLICIT_GEMM_SM90_HPP_
#define JAX_BOLT_IMPLICIT_GEMM_SM90_HPP_

#include <cstdint>
#include <utility>

#include "jax_bolt/device_kernel.hpp"
#include "jax_bolt/epilogue/math.hpp"
#include "jax_bolt/epilogue/traits.hpp"
#include "jax_bolt/implicit_gemm/geometry.hpp"
#include "jax_bolt/implicit_gemm/pack.hpp"
#include "jax_bolt/implicit_gemm/pool.hpp"
#include "jax_bolt/implicit_gemm/ptx.hpp"
#include "jax_bolt/implicit_gemm/wgmma.hpp"

namespace jax_bolt::implicit_gemm {

/// How the filter lies in memory: output channels outermost, or innermost as JAX has it.
enum class Filters { kKrsc, kHwio };

/// Two warpgroups share a tile, or take tiles in turn: one multiplies while the other stores.
enum class Schedule { kCooperative, kPingPong };

/// The kernel's only parameter. The launcher fills it from a recipe, field by field.
template <class Epilogue, class Pool>
struct Params {
  ptx::TensorMap pixels, filters;
  ptx::TensorMap outputs[1 + AuxiliaryOf<Epilogue>::kCount];
  ptx::TensorMap sides[array_size(Epilogue::kSides)];
  void const* vectors[array_size(Epilogue::kVectors)];
  typename Pool::Geometry geometry;
};

/// A position in a ring of `stages`, and the parity of the round it is in.
struct Ring {
  int stage = 0;
  std::uint32_t parity = 0;

  __device__ __forceinline__ void advance(int stages) {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
  __device__ __forceinline__ void skip(int steps, int stages) {
    stage += steps;
    parity ^= (stage / stages) & 1;
    stage %= stages;
  }
};

/// kPixels: of one wgmma. kPixelBlocks, kChannelBlocks: wgmmas of one warpgroup side by side.
/// kWarpgroupsM, kWarpgroupsN: warpgroups along channels and pixels. kSplits: CTAs of a cluster
/// that share a tile, each with its part of the chunks (split-K); a cluster has one tile then.
/// kParts: what a block leaves in, one slot after the other; more than 1 for pixels of one line
/// only. kSteps: products in a chunk, of 32 bytes each; kLastSteps: in the last one, of which some
/// may be zeros alone. Pool: what leaves of the results.
template <class Epilogue_, class Element, Filters kFilters, int kPixels, int kPixelBlocks,
          int kChannelBlocks, int kWarpgroupsM, int kWarpgroupsN, Schedule kSchedule, int kSplits,
          int kParts, int kSteps, int kLastSteps, class Pool = NoPool>
struct Sm90 {
  using Epilogue = Epilogue_;
  using Parameters = Params<Epilogue, Pool>;
  using Output = typename Epilogue::Output;
  using Auxiliary = AuxiliaryOf<Epilogue>;

  static constexpr bool kPingPong = kSchedule == Schedule::kPingPong;
  static constexpr int kWarpgroups = kPingPong ? 2 : kWarpgroupsM * kWarpgroupsN;
  static constexpr int kThreads = 128 * (kWarpgroups + 1);
  // One warpgroup that multiplies leaves room for a second CTA beside this one.
  static constexpr int kCtas = kWarpgroups == 1 ? 2 : 1;
  static constexpr int kSides = Epilogue::kSides;
  static constexpr int kAuxiliary = Auxiliary::kCount;
  static constexpr int kColumns = Epilogue::kColumns;
  static constexpr int kVectors = Epilogue::kVectors;
  static_assert(sizeof(Element) == 2 || (sizeof(Element) == 4 && kFilters == Filters::kKrsc),
                "TF32 tensor cores take K-major operands only");
  static_assert(sizeof(Output) == 2 || sizeof(Output) == 4);
  static_assert(kWarpgroups <= 2, "named barriers and side producers are for two");
  static_assert(!kPingPong || kWarpgroupsM * kWarpgroupsN == 1, "a warpgroup has a tile alone");
  static_assert(kSplits == 1 || (!kPingPong && kPixelBlocks * kChannelBlocks == 1),
                "a warpgroup of a split tile has one block");

  static_assert(!Pool::kPools || (kSplits == 1 && kParts == 1 && kAuxiliary == 0),
                "one warpgroup has all results of a pooled block");
  static_assert(!Pool::kPools || Pool::kInPlace || (kSides == 0 && sizeof(Output) == 2),
                "results beside the slots are of one tile, and no side input lies there");
  static_assert(0 < kLastSteps && kLastSteps <= kSteps && kSteps <= 4, "a chunk has 128 bytes");
  static constexpr bool kAlike = kLastSteps == kSteps;  // the chunks

  static constexpr int kBlock = 64;                     // output channels
  static constexpr int kChunk = 128 / sizeof(Element);  // input channels: the widest swizzle
  static constexpr int kFilterBlock = kBlock * 128;
  static constexpr int kFilterBlocks = kChannelBlocks * kWarpgroupsM;
  static constexpr int kFilterStage = kFilterBlocks * kFilterBlock;
  // A slot holds a block in tiles of 128 bytes a pixel: the results, the auxiliary outputs, and the
  // side inputs. The first of these lies in the results' place where it is as wide.
  static constexpr int kOutputTiles = sizeof(Output) / 2;
  template <int kIndex>
  __device__ static constexpr int auxiliary_tiles() {
    return sizeof(TypeAt<kIndex, Auxiliary>) / 2;
  }
  /// The first tile of auxiliary output kIndex; of kAuxiliary, the number of all stored tiles.
  template <int kIndex>
  __device__ static constexpr int auxiliary_tile() {
    if constexpr (kIndex == 0) {
      return kOutputTiles;
    } else {
      return auxiliary_tile<kIndex - 1>() + auxiliary_tiles<kIndex - 1>();
    }
  }
  static constexpr int kStoredTiles = auxiliary_tile<kAuxiliary>();
  template <int kSide>
  __device__ static constexpr int side_tiles() {
    return sizeof(TypeAt<kSide, typename Epilogue::Sides>) / 2;
  }
  /// The first tile of side input kSide; of kSides, the number of all tiles.
  template <int kSide>
  __device__ static constexpr int side_tile() {
    if constexpr (kSides == 0) {
      return kStoredTiles;
    } else if constexpr (kSide == 0) {
      return side_tiles<0>() == kOutputTiles ? 0 : kStoredTiles;
    } else {
      constexpr int kNext = side_tile<kSide - 1>() + side_tiles<kSide - 1>();
      return kNext < kStoredTiles ? kStoredTiles : kNext;
    }
  }
  static constexpr int kSlotTiles = side_tile<kSides>();
  // One K step: 32 bytes along a row of a K-major filter, 16 rows down an M-major one.
  static constexpr int kFilterStep = kFilters == Filters::kKrsc ? 32 : 2048;
  static constexpr auto kMajorA = kFilters == Filters::kKrsc ? gmma::Major::K : gmma::Major::MN;
  using Mma = typename Wgmma<Element, kPixels, kMajorA>::Op;

  // Named barriers; 0 is __syncthreads'.
  static constexpr int kSetUp = 1, kTurn = 2, kStore = 4;

  // Of a split tile, each CTA finishes some groups of 8 pixels, from first_group(rank) on. The
  // others send it theirs: 64 channels by 8 pixels in f32.
  static constexpr int kGroups = kPixels / 8;
  static constexpr int kPartGroups = kGroups / kParts;
  static_assert(kParts == 1 || (kSplits == 1 && kPixels % (16 * kParts) == 0),
                "a part is finished in pairs of groups, by one CTA");
  static constexpr int kPartial = 2048;
  static constexpr int kPartials =
      kWarpgroups * (kSplits - 1) * ((kGroups + kSplits - 1) / kSplits) * kPartial;
  static constexpr int kGroupBytes = 1024;  // in a slot
  __device__ static constexpr int owner(int group) { return group * kSplits / kGroups; }
  __device__ static constexpr int first_group(int rank) {
    return (rank * kGroups + kSplits - 1) / kSplits;
  }

  struct Barriers {
    ptx::Barrier pixels_full[kMaxPixelStages], pixels_empty[kMaxPixelStages];
    ptx::Barrier filters_full[kMaxFilterStages], filters_empty[kMaxFilterStages];
    ptx::Barrier sides_full[2][kMaxStoreStages], sides_empty[2][kMaxStoreStages];
    ptx::Barrier partials_full[2], results_full[2];  // [2]: of a warpgroup each
  };

  /// Where things lie in shared memory.
  struct Memory {
    std::uint32_t pixels, filters, slots, partials, results;
    Barriers* barriers;

    __device__ __forceinline__ Memory(std::uint8_t* base, typename Pool::Geometry const& g) {
      std::uint32_t const address = ptx::shared_address(base);
      pixels = address;
      filters = pixels + g.pixel_stages * g.stage_bytes;
      slots = filters + g.filter_stages * kFilterStage;
      partials = slots + kWarpgroups * g.store_stages * kSlotTiles * g.slot_bytes;
      results = partials + kPartials;
      std::uint32_t end = results;
      if constexpr (Pool::kPools) end += kWarpgroups * g.results_bytes;
      barriers = reinterpret_cast<Barriers*>(base + (end - address));
    }
    __device__ __forceinline__ std::uint32_t slot(Geometry const& g, int warpgroup,
                                                  int stage) const {
      return slots + (warpgroup * g.store_stages + stage) * kSlotTiles * g.slot_bytes;
    }
  };

  /// The first output of a tile.
  struct Tile {
    int channel, image, row, col;

    __device__ __forceinline__ Tile(Geometry const& g, int index) {
      int const pixels = index / g.channel_tiles;
      channel = (index - pixels * g.channel_tiles) * kBlock * kFilterBlocks;
      int const strip = pixels / g.col_tiles;
      col = (pixels - strip * g.col_tiles) * g.tile_cols;
      int const group = strip / g.row_tiles;
      row = (strip - group * g.row_tiles) * g.tile_rows;
      image = group * g.tile_images;
    }
    /// Part `index` of a block.
    __device__ __forceinline__ Tile part(int index) const {
      Tile moved = *this;
      moved.col += index * 8 * kPartGroups;
      return moved;
    }
    /// Pixel block `pixel` and channel block `channel_block` of this tile.
    __device__ __forceinline__ Tile block(Geometry const& g, int pixel, int channel_block) const {
      Tile moved = *this;
      moved.channel += channel_block * kBlock;
      moved.image += pixel * g.block_images;
      moved.row += pixel * g.block_rows;
      moved.col += pixel * g.block_cols;
      return moved;
    }
  };

  // A cluster is a worker: its tiles are first_tile(), and every tile_step() further.
  __device__ static __forceinline__ int first_tile() { return blockIdx.x / kSplits; }
  __device__ static __forceinline__ int tile_step() { return gridDim.x / kSplits; }
  __device__ static __forceinline__ int rank() { return kSplits == 1 ? 0 : blockIdx.x % kSplits; }
  /// The CTA's chunks, and where they end.
  __device__ static __forceinline__ int first_chunk(Geometry const& g) {
    return kSplits == 1 ? 0 : g.chunks * rank() / kSplits;
  }
  __device__ static __forceinline__ int end_chunk(Geometry const& g) {
    return kSplits == 1 ? g.chunks : g.chunks * (rank() + 1) / kSplits;
  }

  /// Whether the CTA's `turn`-th tile is this warpgroup's.
  __device__ static __forceinline__ bool takes(int warpgroup, int turn) {
    return !kPingPong || (turn & 1) == warpgroup;
  }

  // Producers --------------------------------------------------------------------------------

  /// Sets up the barriers of a ring. The warp that fills it does so and may start at once.
  __device__ static __forceinline__ void set_up(ptx::Barrier* full, ptx::Barrier* empty, int stages,
                                                int readers) {
    for (int i = 0; i < stages; ++i) {
      full[i].init(1);
      empty[i].init(readers);
    }
    ptx::fence_barrier_init();
    ptx::fence_async_proxy();
  }

  /// One round for each warpgroup of a split tile: the other CTAs' partial sums, and results.
  __device__ static __forceinline__ void set_up_exchange(Barriers& barriers, int warpgroup) {
    int const groups = first_group(rank() + 1) - first_group(rank());
    ptx::Barrier& partials = barriers.partials_full[warpgroup];
    ptx::Barrier& results = barriers.results_full[warpgroup];
    partials.init(1);
    results.init(1);
    ptx::fence_barrier_init();
    partials.arrive_and_expect((kSplits - 1) * groups * kPartial);
    results.arrive_and_expect((kGroups - groups) * kGroupBytes * kStoredTiles);
  }

  __device__ static void load_pixels(Parameters const& p, Memory const& memory) {
    Geometry const& g = p.geometry;
    Ring ring;
    bool waits = true;
    for (int index = first_tile(); index < g.tiles; index += tile_step()) {
      load_pixels(p.pixels, g, memory, Tile(g, index), ring, waits);
    }
  }

  /// A tile's input pixels, of the group that its output channels are of. The first load `waits`
  /// for earlier kernels, and what leads to it does not: divisions take a while.
  __device__ static __forceinline__ void load_pixels(ptx::TensorMap const& map, Geometry const& g,
                                                     Memory const& memory, Tile const& tile,
                                                     Ring& ring, bool& waits) {
    Barriers& barriers = *memory.barriers;
    int const group = tile.channel / g.group_outputs * g.group_inputs;
    for (int chunk = first_chunk(g); chunk < end_chunk(g); ++chunk) {
      int const channel = group + chunk * kChunk;
      for (int phase = 0; phase < g.phases; ++phase) {
        ptx::Barrier& full = barriers.pixels_full[ring.stage];
        barriers.pixels_empty[ring.stage].wait(ring.parity ^ 1);
        full.arrive_and_expect(g.loads * g.load_bytes);
        if (waits) ptx::wait_for_earlier_kernels();
        waits = false;
        std::uint32_t const to = memory.pixels + ring.stage * g.stage_bytes;
        for (int i = 0; i < g.loads; ++i) {
          if (g.image_cols > 0) {
            gather_pixels(map, g, full, to + i * g.load_bytes, channel, phase,
                          tile.col + i * g.load_cols);
            continue;
          }
          ptx::load(map, full, to + i * g.load_bytes, channel + g.phase_channel[phase],
                    tile.col * g.step_cols + g.phase_col[phase] + i * g.load_cols,
                    g.phase_parity[phase], tile.row * g.step_rows + g.phase_row[phase], tile.image);
        }
        ring.advance(g.pixel_stages);
      }
    }
  }

  /// One tap's inputs of output pixels from `pixel` on, counted over all images.
  __device__ static __forceinline__ void gather_pixels(ptx::TensorMap const& map, Geometry const& g,
                                                       ptx::Barrier& full, std::uint32_t to,
                                                       int channel, int phase, int pixel) {
    int const line = pixel / g.image_cols, image = line / g.image_rows;
    int const col = pixel - line * g.image_cols, row = line - image * g.image_rows;
    ptx::gather(map, full, to, channel, col * g.step_cols + g.first_col,
                row * g.step_rows + g.first_row, image, g.phase_col[phase], g.phase_row[phase]);
  }

  __device__ static void load_filters(Parameters const& p, Memory const& memory) {
    Geometry const& g = p.geometry;
    Ring ring;
    for (int index = first_tile(); index < g.tiles; index += tile_step()) {
      load_filters(p.filters, g, memory, Tile(g, index), ring);
      if (g.resident) return;
    }
  }

  /// A tile's filters.
  __device__ static __forceinline__ void load_filters(ptx::TensorMap const& map, Geometry const& g,
                                                      Memory const& memory, Tile const& tile,
                                                      Ring& ring) {
    int const taps = count_taps(g);
    for (int chunk = first_chunk(g); chunk < end_chunk(g); ++chunk) {
      for (int tap = 0; tap < taps; ++tap) {
        memory.barriers->filters_empty[ring.stage].wait(ring.parity ^ 1);
        load_stage(map, memory, ring.stage, tile, chunk, g.tap_filter[tap],
                   g.filter_batch * tile.image);
        ring.advance(g.filter_stages);
      }
    }
  }

  /// One tap's filter for the input channels of a chunk.
  __device__ static __forceinline__ void load_stage(ptx::TensorMap const& map, Memory const& memory,
                                                    int stage, Tile const& tile, int chunk, int tap,
                                                    int batch) {
    ptx::Barrier& full = memory.barriers->filters_full[stage];
    full.arrive_and_expect(kFilterStage);
    std::uint32_t const to = memory.filters + stage * kFilterStage;
    if constexpr (kFilters == Filters::kKrsc) {
      ptx::load(map, full, to, chunk * kChunk, tap, tile.channel, batch);
    } else {
      for (int i = 0; i < kFilterBlocks; ++i) {
        ptx::load(map, full, to + i * kFilterBlock, tile.channel + i * kBlock, chunk * kChunk, tap,
                  batch);
      }
    }
  }

  /// The side inputs of one warpgroup, into the slots that its results leave from.
  __device__ static void load_sides(Parameters const& p, Memory const& memory, int warpgroup) {
    Geometry const& g = p.geometry;
    Barriers& barriers = *memory.barriers;
    Ring ring;
    int turn = 0;
    for (int index = first_tile(); index < g.tiles; index += tile_step(), ++turn) {
      if (!takes(warpgroup, turn)) continue;
      Tile const tile(g, index);
      for (int unit = 0; unit < kPixelBlocks * kChannelBlocks * kParts; ++unit) {
        int const index = unit / kParts;
        Tile const block = part(g, tile, warpgroup, index / kChannelBlocks, index % kChannelBlocks)
                               .part(unit % kParts);
        ptx::Barrier& full = barriers.sides_full[warpgroup][ring.stage];
        barriers.sides_empty[warpgroup][ring.stage].wait(ring.parity ^ 1);
        constexpr int kInPlace = side_tile<0>() == 0 ? kOutputTiles : 0;
        constexpr int kTiles = kSlotTiles - kStoredTiles + kInPlace;
        full.arrive_and_expect(kTiles * g.stores * g.side_bytes);
        std::uint32_t const slot = memory.slot(g, warpgroup, ring.stage);
        for_each_index<kSides>([&](auto index) {
          constexpr int side = decltype(index)::value;
          for (int tile = 0; tile < side_tiles<side>(); ++tile) {
            std::uint32_t const to = slot + (side_tile<side>() + tile) * g.slot_bytes;
            int const channel = block.channel + tile * (kBlock / side_tiles<side>());
            for (int i = 0; i < g.stores; ++i) {
              ptx::load(p.sides[side], full, to + i * g.store_bytes, channel, block.col,
                        block.row + i, block.image);
            }
          }
        });
        ring.advance(g.store_stages);
      }
    }
  }

  // Consumers --------------------------------------------------------------------------------

  /// The block that a warpgroup's blocks `nb` of pixels and `mb` of channels make.
  __device__ static __forceinline__ Tile part(Geometry const& g, Tile const& tile, int warpgroup,
                                              int nb, int mb) {
    return tile.block(g, warpgroup_n(warpgroup) * kPixelBlocks + nb,
                      warpgroup_m(warpgroup) * kChannelBlocks + mb);
  }
  __device__ static __forceinline__ int warpgroup_m(int warpgroup) {
    return kPingPong ? 0 : warpgroup % kWarpgroupsM;
  }
  __device__ static __forceinline__ int warpgroup_n(int warpgroup) {
    return kPingPong ? 0 : warpgroup / kWarpgroupsM;
  }

  __device__ static __forceinline__ int count_taps(Geometry const& g) {
    int taps = 0;
    for (int phase = 0; phase < g.phases; ++phase) taps += g.phase_taps[phase];
    return taps;
  }

  /// Zeros after the boxes of every pixel stage: the padding after a tile's last row.
  __device__ static void clear_tails(Geometry const& g, Memory const& memory, int thread) {
    int const box = g.loads * g.load_bytes;
    for (int stage = 0; stage < g.pixel_stages; ++stage) {
      std::uint32_t const base = memory.pixels + stage * g.stage_bytes;
      for (int at = box + thread * 16; at < g.stage_bytes; at += 128 * kWarpgroups * 16) {
        asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(base + at), "r"(0)
                     : "memory");
      }
    }
    ptx::fence_async_proxy();
  }

  using Accumulators = float[kPixelBlocks][kChannelBlocks][kPixels / 2];

  /// One warp's word that it has read a stage.
  __device__ static __forceinline__ void release(ptx::Barrier& empty) {
    if ((threadIdx.x & 31) == 0) empty.arrive();
  }

  /// All products of a tile, the last of them still under way; returns the stages they read, -1 of
  /// resident filters, which are never freed. A warp that waited for that without loading anything
  /// would hold nobody up: two rounds behind, it would take the parity of the next one for its own,
  /// and wait for ever.
  __device__ static __forceinline__ void multiply(Geometry const& g, Memory const& memory,
                                                  int warpgroup, Ring& pixels, Ring& filters,
                                                  Accumulators& accumulators, int& pixel_stage,
                                                  int& filter_stage) {
    Barriers& barriers = *memory.barriers;
    std::uint64_t const filter_base =
        descriptor(memory.filters + warpgroup_m(warpgroup) * kChannelBlocks * kFilterBlock);
    std::uint64_t const pixel_base =
        descriptor(memory.pixels) + moved(warpgroup_n(warpgroup) * kPixelBlocks * g.block_bytes);
    pixel_stage = filter_stage = -1;
    if constexpr (kAlike) {
      multiply_chunks<kSteps>(g, barriers, first_chunk(g), filter_base, pixel_base, pixels, filters,
                              accumulators, pixel_stage, filter_stage);
    } else {
      // One loop: between two of them ptxas puts a tile's divisions, and products run out
      // meanwhile. Of a split tile, the last CTA alone has the problem's last chunk.
      for (int chunk = first_chunk(g); chunk < end_chunk(g); ++chunk) {
        if (chunk + 1 < g.chunks) {
          multiply_chunks<kSteps>(g, barriers, chunk, filter_base, pixel_base, pixels, filters,
                                  accumulators, pixel_stage, filter_stage);
        } else {
          multiply_chunks<kLastSteps>(g, barriers, chunk, filter_base, pixel_base, pixels, filters,
                                      accumulators, pixel_stage, filter_stage);
        }
      }
    }
  }

  /// kCount products of every tap in chunk `first`, or in all from there on where they are alike. A
  /// run-time count, or a branch between two of a tap's products, would make ptxas run wgmmas one
  /// at a time. The stages are those that earlier products of the tile read, -1 where there are
  /// none.
  template <int kCount>
  __device__ static __forceinline__ void multiply_chunks(Geometry const& g, Barriers& barriers,
                                                         int first, std::uint64_t filter_base,
                                                         std::uint64_t pixel_base, Ring& pixels,
                                                         Ring& filters, Accumulators& accumulators,
                                                         int& pixel_stage, int& filter_stage) {
    gmma::ScaleOut scale = pixel_stage < 0 ? gmma::ScaleOut::Zero : gmma::ScaleOut::One;
    int free_pixels = pixel_stage;
    for (int chunk = first; chunk < (kAlike ? end_chunk(g) : first + 1); ++chunk) {
      int tap = 0;
      for (int phase = 0; phase < g.phases; ++phase) {
        barriers.pixels_full[pixels.stage].wait(pixels.parity);
        std::uint64_t const stage = pixel_base + moved(pixels.stage * g.stage_bytes);
        for (int left = g.phase_taps[phase]; left > 0; --left, ++tap) {
          barriers.filters_full[filters.stage].wait(filters.parity);
          std::uint64_t const a = filter_base + moved(filters.stage * kFilterStage);
          std::uint64_t const b = stage + moved(g.tap_offset[tap]);
          cute::warpgroup_arrive();
#pragma unroll
          for (int k = 0; k < kCount; ++k) {
#pragma unroll
            for (int nb = 0; nb < kPixelBlocks; ++nb) {
#pragma unroll
              for (int mb = 0; mb < kChannelBlocks; ++mb) {
                wgmma<Mma>(a + moved(k * kFilterStep + mb * kFilterBlock),
                           b + moved(k * 32 + nb * g.block_bytes), accumulators[nb][mb], scale,
                           std::make_index_sequence<kPixels / 2>{});
              }
            }
            scale = gmma::ScaleOut::One;
          }
          cute::warpgroup_commit_batch();
          // All but the products just issued are done with their stages.
          cute::warpgroup_wait<1>();
          if (filter_stage >= 0) release(barriers.filters_empty[filter_stage]);
          if (free_pixels >= 0) release(barriers.pixels_empty[free_pixels]);
          free_pixels = -1;
          filter_stage = g.resident ? -1 : filters.stage;
          filters.advance(g.filter_stages);
        }
        free_pixels = pixel_stage = pixels.stage;
        pixels.advance(g.pixel_stages);
      }
    }
  }

  /// Waits for the last products of `multiply`, and gives back the stages they read.
  __device__ static __forceinline__ void settle(Memory const& memory, Accumulators& accumulators,
                                                int pixel_stage, int filter_stage) {
    cute::warpgroup_wait<0>();
    float* const flat = &accumulators[0][0][0];
#pragma unroll
    for (int i = 0; i < kPixelBlocks * kChannelBlocks * kPixels / 2; ++i) {
      cute::warpgroup_fence_operand(flat[i]);
    }
    if (filter_stage >= 0) release(memory.barriers->filters_empty[filter_stage]);
    release(memory.barriers->pixels_empty[pixel_stage]);
  }

  /// The per-channel values of a thread's two channels in every channel block.
  using Columns = float[kChannelBlocks][2][array_size(kColumns)];

  __device__ static __forceinline__ void load_columns(void const* const* vectors, int channels,
                                                      Tile const& tile, int warpgroup,
                                                      Columns& columns) {
    if constexpr (kColumns > 0) {
      int const thread = threadIdx.x & 127;
      int const first = tile.channel + warpgroup_m(warpgroup) * kChannelBlocks * kBlock +
                        thread / 32 * 16 + thread % 32 / 4;
#pragma unroll
      for (int mb = 0; mb < kChannelBlocks; ++mb) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          int const channel = min(first + mb * kBlock + half * 8, channels - 1);
          float values[array_size(kVectors)] = {};
          for_each_index<kVectors>([&](auto index) {
            constexpr int i = decltype(index)::value;
            using Vector = TypeAt<i, typename Epilogue::Vectors>;
            auto const* base = static_cast<Storage<typename Vector::Element> const*>(vectors[i]);
            values[i] = to_float(base[Vector::kScalar ? 0 : channel]);
          });
          Epilogue::columns(values, columns[mb][half]);
        }
      }
    }
  }

  /// Where a thread's 4-byte value lies: in matrix `i` (of four, as in `finish`) of those that
  /// begin at `first`, of the left or right one of its two pixels. A tile has 32 channels.
  __device__ static __forceinline__ std::uint32_t wide_at(std::uint32_t first, int slot_bytes,
                                                          int i, int right) {
    int const lane = threadIdx.x & 31, warp = (threadIdx.x & 127) / 32;
    int const channel = warp * 16 + lane / 4 + (i & 1) * 8, pixel = lane % 4 * 2 + right;
    return first + channel / 32 * slot_bytes + (i / 2 * 8 + pixel) * 128 +
           ((channel % 32 / 4 ^ pixel) << 4) + channel % 4 * 4;
  }

  /// kCount 8 x 8 matrices of a block (4: 16 channels by 16 pixels; 2: by 8): epilogue, and into
  /// the slot. `at` is this lane's row of a matrix there, `first` the first pixel.
  template <int kCount>
  __device__ static __forceinline__ void finish(float const* accumulators,
                                                float const (&columns)[2][array_size(kColumns)],
                                                std::uint32_t at, std::uint32_t first,
                                                int slot_bytes) {
    std::uint32_t sides[array_size(kSides)][kCount], results[kCount];
    std::uint32_t auxiliary[array_size(kAuxiliary)][kCount];
    for_each_index<kSides>([&](auto index) {
      constexpr int side = decltype(index)::value;
      if constexpr (side_tiles<side>() == 1) {
        ptx::load_transposed(at + side_tile<side>() * slot_bytes, sides[side]);
      }
    });
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      float low[array_size(kSides)] = {}, high[array_size(kSides)] = {};
      for_each_index<kSides>([&](auto index) {
        constexpr int side = decltype(index)::value;
        using Type = TypeAt<side, typename Epilogue::Sides>;
        if constexpr (side_tiles<side>() == 1) {
          low[side] = ptx::Pair<Type>::low(sides[side][i]);
          high[side] = ptx::Pair<Type>::high(sides[side][i]);
        } else {
          std::uint32_t const from = first + side_tile<side>() * slot_bytes;
          low[side] = ptx::load_float(wide_at(from, slot_bytes, i, 0));
          high[side] = ptx::load_float(wide_at(from, slot_bytes, i, 1));
        }
      });
      // Matrices 0 and 2 are the thread's first channel, 1 and 3 its second, 8 further on.
      float lefts[array_size(kAuxiliary)], rights[array_size(kAuxiliary)];
      float const left = apply<Epilogue>(accumulators[2 * i], columns[i & 1], low, lefts);
      float const right = apply<Epilogue>(accumulators[2 * i + 1], columns[i & 1], high, rights);
      if constexpr (kOutputTiles == 1) {
        results[i] = ptx::Pair<Output>::pack(left, right);
      } else {
        ptx::store(wide_at(first, slot_bytes, i, 0), left);
        ptx::store(wide_at(first, slot_bytes, i, 1), right);
      }
      for_each_index<kAuxiliary>([&](auto index) {
        constexpr int k = decltype(index)::value;
        if constexpr (auxiliary_tiles<k>() == 1) {
          auxiliary[k][i] = ptx::Pair<TypeAt<k, Auxiliary>>::pack(lefts[k], rights[k]);
        } else {
          std::uint32_t const to = first + auxiliary_tile<k>() * slot_bytes;
          ptx::store(wide_at(to, slot_bytes, i, 0), lefts[k]);
          ptx::store(wide_at(to, slot_bytes, i, 1), rights[k]);
        }
      });
    }
    if constexpr (kOutputTiles == 1) ptx::store_transposed(at, results);
    for_each_index<kAuxiliary>([&](auto index) {
      constexpr int k = decltype(index)::value;
      if constexpr (auxiliary_tiles<k>() == 1) {
        ptx::store_transposed(at + auxiliary_tile<k>() * slot_bytes, auxiliary[k]);
      }
    });
  }

  /// Sends the other CTAs the groups that they finish, and adds theirs to this one's.
  __device__ static __forceinline__ void combine(Memory const& memory, int warpgroup,
                                                 float (&accumulators)[kPixels / 2]) {
    constexpr int kOthers = kSplits - 1;
    int const thread = threadIdx.x & 127;
    std::uint32_t const partials =
        memory.partials + warpgroup * (kPartials / kWarpgroups) + thread * 16;
    ptx::Barrier& full = memory.barriers->partials_full[warpgroup];
    // Every CTA's barriers are set up.
    __syncwarp();
    ptx::wait_cluster();
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      if (owner(group) == rank()) continue;
      int const from = rank() - (rank() > owner(group));
      int const at = (group - first_group(owner(group))) * kOthers + from;
      ptx::send(ptx::in_cta(partials + at * kPartial, owner(group)), accumulators + 4 * group,
                ptx::in_cta(ptx::shared_address(&full), owner(group)));
    }
    full.wait_for_cluster(0);
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      if (owner(group) != rank()) continue;
      std::uint32_t at = partials + (group - first_group(owner(group))) * kOthers * kPartial;
#pragma unroll
      for (int from = 0; from < kOthers; ++from, at += kPartial) {
        float values[4];
        ptx::load(at, values);
#pragma unroll
        for (int i = 0; i < 4; ++i) accumulators[4 * group + i] += values[i];
      }
    }
  }

  /// A split block's results into the slot of the cluster's first CTA. True where they all are.
  __device__ static __forceinline__ bool gather(Memory const& memory, int warpgroup,
                                                std::uint32_t slot, int slot_bytes) {
    if constexpr (kSplits == 1) return true;
    ptx::Barrier& full = memory.barriers->results_full[warpgroup];
    if (rank() == 0) {
      full.wait_for_cluster(0);
      return true;
    }
    int const first = first_group(rank()), groups = first_group(rank() + 1) - first;
    for (int tile = 0; tile < kStoredTiles && groups > 0; ++tile) {
      std::uint32_t const from = slot + tile * slot_bytes + first * kGroupBytes;
      ptx::copy(ptx::in_cta(from, 0), from, groups * kGroupBytes,
                ptx::in_cta(ptx::shared_address(&full), 0));
    }
    return false;
  }

  /// kTiles tiles of a slot, from kTile on, to an output by TMA, which leaves out what lies beyond
  /// it.
  template <int kTile, int kTiles>
  __device__ static __forceinline__ void leave(ptx::TensorMap const& output, Geometry const& g,
                                               Tile const& block, std::uint32_t slot) {
    for (int tile = 0; tile < kTiles; ++tile) {
      std::uint32_t const from = slot + (kTile + tile) * g.slot_bytes;
      int const channel = block.channel + tile * (kBlock / kTiles);
      for (int i = 0; i < g.stores; ++i) {
        ptx::store(output, from + i * g.store_bytes, channel, block.col, block.row + i,
                   block.image);
      }
    }
  }

  /// The epilogue of one part of a block, into a slot: [pixel][64 channels] with the 128-byte
  /// swizzle.
  template <int kPart>
  __device__ static __forceinline__ void fill(std::uint32_t slot, int slot_bytes,
                                              float (&accumulators)[kPixels / 2],
                                              float const (&columns)[2][array_size(kColumns)]) {
    int const thread = threadIdx.x & 127, lane = threadIdx.x & 31;
    // Lanes 8 i to 8 i + 7 hold the addresses of matrix i's rows: pixels, 128 bytes apart.
    int const pixel = (lane & 7) + (lane >> 4) * 8;
    int const sixteenth = thread / 32 * 2 + (lane >> 3 & 1);
    std::uint32_t const at = slot + pixel * 128 + ((sixteenth ^ (pixel & 7)) << 4);
    // ldmatrix and stmatrix of two take their addresses from lanes 0 to 15.
    std::uint32_t const at8 = slot + (lane & 7) * 128 + ((sixteenth ^ (lane & 7)) << 4);
    if constexpr (kSplits == 1) {
#pragma unroll
      for (int j = 0; j < kPartGroups / 2; ++j) {
        std::uint32_t const first = 2 * j * kGroupBytes;
        finish<4>(accumulators + 4 * (kPart * kPartGroups + 2 * j), columns, at + first,
                  slot + first, slot_bytes);
      }
      if constexpr (kGroups % 2 != 0) {
        std::uint32_t const first = (kGroups - 1) * kGroupBytes;
        finish<2>(accumulators + 4 * (kGroups - 1), columns, at8 + first, slot + first, slot_bytes);
      }
    } else {
#pragma unroll
      for (int j = 0; j < kGroups; ++j) {
        if (owner(j) != rank()) continue;
        std::uint32_t const first = j * kGroupBytes;
        finish<2>(accumulators + 4 * j, columns, at8 + first, slot + first, slot_bytes);
      }
    }
  }

  /// One part of a block: the epilogue into a slot, by way of the pool where there is one, and the
  /// slot to the outputs.
  template <int kPart>
  __device__ static __forceinline__ void store(Parameters const& p, Memory const& memory,
                                               Tile const& block, int warpgroup, Ring& ring,
                                               int& unreleased, float (&accumulators)[kPixels / 2],
                                               float const (&columns)[2][array_size(kColumns)]) {
    auto const& g = p.geometry;
    int const thread = threadIdx.x & 127;
    if constexpr (kSides > 0) {
      memory.barriers->sides_full[warpgroup][ring.stage].wait(ring.parity);
    } else {
      if (thread == 0) {
        if (g.store_stages == 1) {
          ptx::wait_for_stores<0>();
        } else {
          ptx::wait_for_stores<1>();
        }
      }
      ptx::sync(kStore + warpgroup, 128);
    }
    std::uint32_t const slot = memory.slot(g, warpgroup, ring.stage);
    if constexpr (kSplits > 1) combine(memory, warpgroup, accumulators);
    if constexpr (Pool::kPools && !Pool::kInPlace) {
      std::uint32_t const results = memory.results + warpgroup * g.results_bytes;
      fill<kPart>(results, g.results_bytes, accumulators, columns);
      ptx::sync(kStore + warpgroup, 128);
      Pool::template reduce<Output>(g, block.row, block.col, results, slot);
    } else {
      fill<kPart>(slot, g.slot_bytes, accumulators, columns);
      if constexpr (Pool::kInPlace) {
        // A warp's lanes left each other's channels, and no other warp's.
        __syncwarp();
        Pool::template reduce<Output>(g, slot);
      }
    }
    ptx::fence_async_proxy();
    ptx::sync(kStore + warpgroup, 128);
    if (thread == 0 && gather(memory, warpgroup, slot, g.slot_bytes)) {
      leave<0, kOutputTiles>(p.outputs[0], g, block, slot);
      for_each_index<kAuxiliary>([&](auto index) {
        constexpr int k = decltype(index)::value;
        leave<auxiliary_tile<k>(), auxiliary_tiles<k>()>(p.outputs[1 + k], g, block, slot);
      });
      ptx::commit_stores();
      if constexpr (kSides > 0) {
        // The block before this one has left its slot.
        ptx::wait_for_stores<1>();
        if (unreleased >= 0) memory.barriers->sides_empty[warpgroup][unreleased].arrive();
        unreleased = ring.stage;
      }
    }
    ring.advance(g.store_stages);
  }

  __device__ static void consume(Parameters const& p, Memory const& memory, int warpgroup) {
    Geometry const& g = p.geometry;
    Ring pixels;
    Ring filters;
    Ring slots;
    int const taps = count_taps(g);
    int unreleased = -1, turn = 0, channel = -1;
    Columns columns;
    // The first turn is warpgroup 0's.
    if (kPingPong && warpgroup == 1) ptx::arrive(kTurn, 256);
    for (int index = first_tile(); index < g.tiles; index += tile_step(), ++turn) {
      if (!takes(warpgroup, turn)) {
        pixels.skip(g.chunks * g.phases, g.pixel_stages);
        filters.skip(g.chunks * taps, g.filter_stages);
        continue;
      }
      Tile const tile(g, index);
      if (g.resident) filters = {};  // its first round, for every tile
      if (tile.channel != channel) load_columns(p.vectors, g.channels, tile, warpgroup, columns);
      channel = tile.channel;
      if (kPingPong) ptx::sync(kTurn + warpgroup, 256);
      Accumulators accumulators;
      int pixel_stage, filter_stage;
      multiply(g, memory, warpgroup, pixels, filters, accumulators, pixel_stage, filter_stage);
      if (kPingPong && index + tile_step() < g.tiles) ptx::arrive(kTurn + (warpgroup ^ 1), 256);
      settle(memory, accumulators, pixel_stage, filter_stage);
#pragma unroll
      for (int nb = 0; nb < kPixelBlocks; ++nb) {
#pragma unroll
        for (int mb = 0; mb < kChannelBlocks; ++mb) {
          Tile const block = part(g, tile, warpgroup, nb, mb);
          for_each_index<kParts>([&](auto index) {
            constexpr int i = decltype(index)::value;
            store<i>(p, memory, block.part(i), warpgroup, slots, unreleased, accumulators[nb][mb],
                     columns[mb]);
          });
        }
      }
    }
    // Shared memory must outlive the stores that read it, and the copies between CTAs.
    if ((threadIdx.x & 127) == 0) ptx::wait_for_stores<0>();
    if constexpr (kSplits > 1) {
      __syncwarp();
      ptx::arrive_cluster();
      ptx::wait_cluster();
    }
  }

  __device__ static void run(Parameters const& p) {
    extern __shared__ __align__(1024) std::uint8_t shared[];
    auto const& g = p.geometry;
    Memory const memory(shared, g);
    Barriers& barriers = *memory.barriers;
    int const warpgroup = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / 128), 0);
    if (warpgroup == kWarpgroups) {
      if constexpr (kWarpgroups > 1) ptx::keep_registers<40>();
      int const warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / 32), 0) & 3;
      // A pixel stage is read by all warps that multiply, or by one warpgroup's in its turn.
      constexpr int kReaders = kPingPong ? 4 : 4 * kWarpgroups;
      bool const elected = ptx::elect();
      if (elected) {
        if (warp == 0) {
          ptx::prefetch(p.pixels);
          set_up(barriers.pixels_full, barriers.pixels_empty, g.pixel_stages, kReaders);
        } else if (warp == 1) {
          ptx::prefetch(p.filters);
          set_up(barriers.filters_full, barriers.filters_empty, g.filter_stages, kReaders);
        } else if (kSides > 0 && warp - 2 < kWarpgroups) {
          set_up(barriers.sides_full[warp - 2], barriers.sides_empty[warp - 2], g.store_stages, 1);
        }
      }
      __syncwarp();
      ptx::arrive(kSetUp, kThreads);
      if constexpr (kSplits > 1) ptx::arrive_cluster();
      if (warp == 0) ptx::allow_next_kernel();
      if (elected) {
        if (warp > 1 || (warp == 1 && !g.held)) ptx::wait_for_earlier_kernels();
        if (warp == 0) {
          load_pixels(p, memory);
        } else if (warp == 1) {
          load_filters(p, memory);
        } else if (kSides > 0 && warp - 2 < kWarpgroups) {
          load_sides(p, memory, warp - 2);
        }
      }
      // The cluster's barrier wants all threads, twice.
      __syncwarp();
      if constexpr (kSplits > 1) {
        ptx::wait_cluster();
        ptx::arrive_cluster();
      }
    } else {
      if constexpr (kWarpgroups > 1) ptx::take_registers<232>();
      if ((threadIdx.x & 127) == 0) {
        for (ptx::TensorMap const& output : p.outputs) ptx::prefetch(output);
      }
      if constexpr (kSplits > 1) {
        if ((threadIdx.x & 127) == 0) set_up_exchange(barriers, warpgroup);
        __syncwarp();
        ptx::arrive_cluster();
      }
      clear_tails(g, memory, threadIdx.x);
      ptx::sync(kSetUp, kThreads);
      // For per-channel inputs: what is stored comes after pixels, which were waited for.
      if (!g.held) ptx::wait_for_earlier_kernels();
      consume(p, memory, warpgroup);
    }
  }
};

}  // namespace jax_bolt::implicit_gemm

#endif  // JAX_BOLT_IMPLICIT_GEMM_SM90_HPP_
