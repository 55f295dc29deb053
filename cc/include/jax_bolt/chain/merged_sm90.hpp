// SPDX-License-Identifier: Apache-2.0
// A shortcut's product and the one that it is added to, in one kernel for Hopper: two products over
// the same pixels, of which the first one's result is the second one's side input.
//
// It is the implicit GEMM of implicit_gemm/sm90.hpp with two main loops for a tile. The first one's
// epilogue leaves its results, rounded as they would be stored, in the slots where side inputs lie,
// in the places of the same threads: the second one's epilogue takes them from there. So the slots
// are no ring of loads here, and warps 2 and 3 of the last warpgroup have nothing to do.
#ifndef JAX_BOLT_CHAIN_MERGED_SM90_HPP_
#define JAX_BOLT_CHAIN_MERGED_SM90_HPP_

#include "jax_bolt/implicit_gemm/sm90.hpp"

namespace jax_bolt::chain {

/// The kernel's only parameter. The launcher fills it from a recipe, field by field. Both
/// geometries have the same tiles, rings, and stages.
template <class First, class Second>
struct MergedParams {
  implicit_gemm::ptx::TensorMap first_pixels, first_filters, pixels, filters, output;
  void const* first_vectors[array_size(First::kVectors)];
  void const* vectors[array_size(Second::kVectors)];
  implicit_gemm::Geometry first_geometry, geometry;
};

/// The parameters are those of implicit_gemm::Sm90. kLastSteps: as many as the last chunks of both
/// products need.
template <class First_, class Second_, class Element, implicit_gemm::Filters kFilters, int kPixels,
          int kPixelBlocks, int kChannelBlocks, int kWarpgroupsM, int kWarpgroupsN,
          implicit_gemm::Schedule kSchedule, int kLastSteps>
struct MergedSm90 {
  template <class Epilogue>
  using Product =
      implicit_gemm::Sm90<Epilogue, Element, kFilters, kPixels, kPixelBlocks, kChannelBlocks,
                          kWarpgroupsM, kWarpgroupsN, kSchedule, 1, 1, 4, kLastSteps>;
  using First = Product<First_>;
  using Second = Product<Second_>;
  using Parameters = MergedParams<First_, Second_>;
  using Geometry = implicit_gemm::Geometry;
  using Memory = typename Second::Memory;
  using Tile = typename Second::Tile;
  using Ring = implicit_gemm::Ring;

  static constexpr int kThreads = Second::kThreads;
  static constexpr int kCtas = Second::kCtas;
  static constexpr int kUnits = kPixelBlocks * kChannelBlocks;  // slots that a warpgroup fills
  static_assert(First::kSides == 0 && Second::kSides == 1);
  static_assert(First::kAuxiliary + Second::kAuxiliary == 0);
  static_assert(sizeof(typename First::Output) == sizeof(typename Second::Output) &&
                    Second::kSlotTiles == 1,
                "the first results lie where the second ones will");

  __device__ static void load_pixels(Parameters const& p, Memory const& memory) {
    Ring ring;
    bool waits = true;
    for (int index = Second::first_tile(); index < p.geometry.tiles; index += Second::tile_step()) {
      Tile const tile(p.geometry, index);
      Second::load_pixels(p.first_pixels, p.first_geometry, memory, tile, ring, waits);
      Second::load_pixels(p.pixels, p.geometry, memory, tile, ring, waits);
    }
  }

  __device__ static void load_filters(Parameters const& p, Memory const& memory) {
    Ring ring;
    for (int index = Second::first_tile(); index < p.geometry.tiles; index += Second::tile_step()) {
      Tile const tile(p.geometry, index);
      Second::load_filters(p.first_filters, p.first_geometry, memory, tile, ring);
      Second::load_filters(p.filters, p.geometry, memory, tile, ring);
    }
  }

  /// Waits until the slots of a tile have left.
  __device__ static __forceinline__ void wait_for_slots(Geometry const& g, int warpgroup) {
    if ((threadIdx.x & 127) == 0) {
      if (g.store_stages >= 2 * kUnits) {
        implicit_gemm::ptx::wait_for_stores<kUnits>();
      } else {
        implicit_gemm::ptx::wait_for_stores<0>();
      }
    }
    implicit_gemm::ptx::sync(Second::kStore + warpgroup, 128);
  }

  __device__ static void consume(Parameters const& p, Memory const& memory, int warpgroup) {
    namespace ptx = implicit_gemm::ptx;
    Geometry const &g = p.geometry, &first = p.first_geometry;
    int const steps = first.chunks * first.phases + g.chunks * g.phases;
    int const taps = first.chunks * Second::count_taps(first) + g.chunks * Second::count_taps(g);
    Ring pixels, filters, slots;
    int turn = 0, channel = -1;
    typename First::Columns first_columns;
    typename Second::Columns columns;
    // The first turn is warpgroup 0's.
    if (Second::kPingPong && warpgroup == 1) ptx::arrive(Second::kTurn, 256);
    for (int index = Second::first_tile(); index < g.tiles; index += Second::tile_step(), ++turn) {
      if (!Second::takes(warpgroup, turn)) {
        pixels.skip(steps, g.pixel_stages);
        filters.skip(taps, g.filter_stages);
        continue;
      }
      Tile const tile(g, index);
      if (tile.channel != channel) {
        First::load_columns(p.first_vectors, g.channels, typename First::Tile(g, index), warpgroup,
                            first_columns);
        Second::load_columns(p.vectors, g.channels, tile, warpgroup, columns);
      }
      channel = tile.channel;
      if (Second::kPingPong) ptx::sync(Second::kTurn + warpgroup, 256);
      typename Second::Accumulators accumulators;
      int pixel_stage, filter_stage;
      Second::multiply(first, memory, warpgroup, pixels, filters, accumulators, pixel_stage,
                       filter_stage);
      Second::settle(memory, accumulators, pixel_stage, filter_stage);
      wait_for_slots(g, warpgroup);
      Ring filled = slots;
#pragma unroll
      for (int nb = 0; nb < kPixelBlocks; ++nb) {
#pragma unroll
        for (int mb = 0; mb < kChannelBlocks; ++mb, filled.advance(g.store_stages)) {
          First::template fill<0>(memory.slot(g, warpgroup, filled.stage), g.slot_bytes,
                                  accumulators[nb][mb], first_columns[mb]);
        }
      }
      // A warp's lanes read what others of them wrote.
      __syncwarp();
      Second::multiply(g, memory, warpgroup, pixels, filters, accumulators, pixel_stage,
                       filter_stage);
      if (Second::kPingPong && index + Second::tile_step() < g.tiles) {
        ptx::arrive(Second::kTurn + (warpgroup ^ 1), 256);
      }
      Second::settle(memory, accumulators, pixel_stage, filter_stage);
#pragma unroll
      for (int nb = 0; nb < kPixelBlocks; ++nb) {
#pragma unroll
        for (int mb = 0; mb < kChannelBlocks; ++mb, slots.advance(g.store_stages)) {
          std::uint32_t const slot = memory.slot(g, warpgroup, slots.stage);
          Second::template fill<0>(slot, g.slot_bytes, accumulators[nb][mb], columns[mb]);
          ptx::fence_async_proxy();
          ptx::sync(Second::kStore + warpgroup, 128);
          if ((threadIdx.x & 127) == 0) {
            Second::template leave<0, 1>(p.output, g, Second::part(g, tile, warpgroup, nb, mb),
                                         slot);
            ptx::commit_stores();
          }
        }
      }
    }
    // Shared memory must outlive the stores that read it.
    if ((threadIdx.x & 127) == 0) ptx::wait_for_stores<0>();
  }

  __device__ static void run(Parameters const& p) {
    namespace ptx = implicit_gemm::ptx;
    extern __shared__ __align__(1024) std::uint8_t shared[];
    Geometry const& g = p.geometry;
    Memory const memory(shared, g);
    auto& barriers = *memory.barriers;
    constexpr int kWarpgroups = Second::kWarpgroups;
    int const warpgroup = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / 128), 0);
    if (warpgroup == kWarpgroups) {
      if constexpr (kWarpgroups > 1) ptx::keep_registers<40>();
      int const warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / 32), 0) & 3;
      // A stage is read by all warps that multiply, or by one warpgroup's in its turn.
      constexpr int kReaders = Second::kPingPong ? 4 : 4 * kWarpgroups;
      bool const elected = ptx::elect();
      if (elected && warp == 0) {
        ptx::prefetch(p.first_pixels);
        ptx::prefetch(p.pixels);
        Second::set_up(barriers.pixels_full, barriers.pixels_empty, g.pixel_stages, kReaders);
      } else if (elected && warp == 1) {
        ptx::prefetch(p.first_filters);
        ptx::prefetch(p.filters);
        Second::set_up(barriers.filters_full, barriers.filters_empty, g.filter_stages, kReaders);
      }
      __syncwarp();
      ptx::arrive(Second::kSetUp, kThreads);
      if (warp == 0) ptx::allow_next_kernel();
      if (elected && warp < 2) {
        if (warp == 0) {
          load_pixels(p, memory);
        } else {
          if (!g.held) ptx::wait_for_earlier_kernels();
          load_filters(p, memory);
        }
      }
    } else {
      if constexpr (kWarpgroups > 1) ptx::take_registers<232>();
      if ((threadIdx.x & 127) == 0) ptx::prefetch(p.output);
      ptx::sync(Second::kSetUp, kThreads);
      if (!g.held) ptx::wait_for_earlier_kernels();
      consume(p, memory, warpgroup);
    }
  }
};

}  // namespace jax_bolt::chain
#endif  // JAX_BOLT_CHAIN_MERGED_SM90_HPP_
