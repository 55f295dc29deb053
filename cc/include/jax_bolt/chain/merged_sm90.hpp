// SPDX-License-Identifier: Apache-2.0
// A shortcut's product and the one that it is added to, in one kernel for Hopper: two products over
// the same pixels, of which the first one's result is the second one's side input.
//
// It is the implicit GEMM of implicit_gemm/sm90.hpp with two main loops for a tile. The first one's
// epilogue keeps its results, rounded as they would be stored, in the registers of the threads
// whose accumulators they were, for the second one's epilogue; or, where these are too few, in the
// slots from which the second one's will leave, in the places of the same threads. Warpgroups that
// take turns do so at every product: one's products run during the other one's epilogues, of which
// a tile has two. The slots are no ring of loads here, and warps 2 and 3 of the last warpgroup have
// nothing to do.
#ifndef JAX_BOLT_CHAIN_MERGED_SM90_HPP_
#define JAX_BOLT_CHAIN_MERGED_SM90_HPP_

#include <cstdint>

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
                "the first results can lie where the second ones will");

  // Whether a thread has registers for the first product's results beside its accumulators and the
  // values of its channels.
  static constexpr int kAccumulated = kUnits * kPixels / 2;
  static constexpr int kColumns = 2 * kChannelBlocks * (First::kColumns + Second::kColumns);
  static constexpr bool kParks =
      kAccumulated + kAccumulated / 2 + kColumns <= (Second::kWarpgroups == 1 ? 80 : 204);
  using Parked = std::uint32_t[kParks ? kUnits : 1][kPixels / 4];

  /// Whether warpgroups take turns, and the other one has the next tile or had the one before: the
  /// first products of both tiles come first, then the second ones.
  __device__ static __forceinline__ bool is_paired(Geometry const& g, int warpgroup, int index) {
    return Second::kPingPong && (warpgroup == 1 || index + Second::tile_step() < g.tiles);
  }

  /// All tiles' products, in the order in which they are multiplied: `load` takes a tile and
  /// whether the product is the second one.
  template <class Load>
  __device__ static __forceinline__ void in_order(Geometry const& g, Load const& load) {
    int const step = Second::tile_step();
    for (int index = Second::first_tile(); index < g.tiles;) {
      int const tiles = is_paired(g, 0, index) ? 2 : 1;
      for (int product = 0; product < 2; ++product) {
        for (int i = 0; i < tiles; ++i) load(Tile(g, index + i * step), product == 1);
      }
      index += tiles * step;
    }
  }

  __device__ static void load_pixels(Parameters const& p, Memory const& memory) {
    Ring ring;
    bool waits = true;
    in_order(p.geometry, [&](Tile const& tile, bool second) {
      Second::load_pixels(second ? p.pixels : p.first_pixels,
                          second ? p.geometry : p.first_geometry, memory, tile, ring, waits);
    });
  }

  __device__ static void load_filters(Parameters const& p, Memory const& memory) {
    Ring ring;
    in_order(p.geometry, [&](Tile const& tile, bool second) {
      Second::load_filters(second ? p.filters : p.first_filters,
                           second ? p.geometry : p.first_geometry, memory, tile, ring);
    });
  }

  /// The first product's results, each two pixels of a channel in a register.
  __device__ static __forceinline__ void park(
      float const (&accumulators)[kPixels / 2],
      float const (&columns)[2][array_size(First::kColumns)],
      std::uint32_t (&parked)[kPixels / 4]) {
    float const none[1] = {};
#pragma unroll
    for (int i = 0; i < kPixels / 4; ++i) {
      float const left = First_::apply(accumulators[2 * i], columns[i & 1], none);
      float const right = First_::apply(accumulators[2 * i + 1], columns[i & 1], none);
      parked[i] = implicit_gemm::ptx::Pair<typename First::Output>::pack(left, right);
    }
  }

  /// The second one's epilogue into a slot, as Second::fill, of what is parked.
  __device__ static __forceinline__ void fill(
      float const (&accumulators)[kPixels / 2],
      float const (&columns)[2][array_size(Second::kColumns)],
      std::uint32_t const (&parked)[kPixels / 4], std::uint32_t slot) {
    namespace ptx = implicit_gemm::ptx;
    int const lane = threadIdx.x & 31;
    // Lanes 8 i to 8 i + 7 hold the addresses of matrix i's rows: pixels, 128 bytes apart. Those of
    // two matrices come from lanes 0 to 15.
    int const sixteenth = (threadIdx.x & 127) / 32 * 2 + (lane >> 3 & 1);
    int const pixel = (lane & 7) + (lane >> 4) * 8;
    std::uint32_t const at = slot + pixel * 128 + ((sixteenth ^ (pixel & 7)) << 4);
#pragma unroll
    for (int j = 0; j < kPixels / 16; ++j) {
      std::uint32_t results[4];
      finish(accumulators + 8 * j, columns, parked + 4 * j, results);
      ptx::store_transposed(at + j * 2048, results);
    }
    if constexpr (kPixels % 16 != 0) {
      std::uint32_t const at8 = slot + (lane & 7) * 128 + ((sixteenth ^ (lane & 7)) << 4);
      std::uint32_t results[2];
      finish(accumulators + kPixels / 2 - 4, columns, parked + kPixels / 4 - 2, results);
      ptx::store_transposed(at8 + (kPixels / 8 - 1) * 1024, results);
    }
  }

  template <int kCount>
  __device__ static __forceinline__ void finish(
      float const* accumulators, float const (&columns)[2][array_size(Second::kColumns)],
      std::uint32_t const* parked, std::uint32_t (&results)[kCount]) {
    using Side = implicit_gemm::ptx::Pair<TypeAt<0, typename Second_::Sides>>;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      float const low[1] = {Side::low(parked[i])}, high[1] = {Side::high(parked[i])};
      float const left = Second_::apply(accumulators[2 * i], columns[i & 1], low);
      float const right = Second_::apply(accumulators[2 * i + 1], columns[i & 1], high);
      results[i] = implicit_gemm::ptx::Pair<typename Second::Output>::pack(left, right);
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
    int const taps = Second::count_taps(g), first_taps = Second::count_taps(first);
    Ring pixels, filters, slots;
    int turn = 0, channel = -1;
    typename First::Columns first_columns;
    typename Second::Columns columns;
    // Products of the other warpgroup's tile.
    auto const pass = [&](Geometry const& of, int of_taps) {
      pixels.skip(of.chunks * of.phases, g.pixel_stages);
      filters.skip(of.chunks * of_taps, g.filter_stages);
    };
    // The first turn is warpgroup 0's.
    if (Second::kPingPong && warpgroup == 1) ptx::arrive(Second::kTurn, 256);
    for (int index = Second::first_tile(); index < g.tiles; index += Second::tile_step(), ++turn) {
      if (!Second::takes(warpgroup, turn)) continue;
      Tile const tile(g, index);
      bool const paired = is_paired(g, warpgroup, index);
      if (tile.channel != channel) {
        First::load_columns(p.first_vectors, g.channels, typename First::Tile(g, index), warpgroup,
                            first_columns);
        Second::load_columns(p.vectors, g.channels, tile, warpgroup, columns);
      }
      channel = tile.channel;
      typename Second::Accumulators accumulators;
      Parked parked;
      int pixel_stage, filter_stage;

      // Beside the other one's products, not between theirs and these.
      if (paired && warpgroup == 1) pass(first, first_taps);
      if (Second::kPingPong) ptx::sync(Second::kTurn + warpgroup, 256);
      Second::multiply(first, memory, warpgroup, pixels, filters, accumulators, pixel_stage,
                       filter_stage);
      if (paired) ptx::arrive(Second::kTurn + (warpgroup ^ 1), 256);
      if (paired && warpgroup == 0) pass(first, first_taps);
      Second::settle(memory, accumulators, pixel_stage, filter_stage);
      if constexpr (!kParks) wait_for_slots(g, warpgroup);
      Ring filled = slots;
#pragma unroll
      for (int nb = 0; nb < kPixelBlocks; ++nb) {
#pragma unroll
        for (int mb = 0; mb < kChannelBlocks; ++mb) {
          if constexpr (kParks) {
            park(accumulators[nb][mb], first_columns[mb], parked[nb * kChannelBlocks + mb]);
          } else {
            First::template fill<0>(memory.slot(g, warpgroup, filled.stage), g.slot_bytes,
                                    accumulators[nb][mb], first_columns[mb]);
            filled.advance(g.store_stages);
          }
        }
      }
      // A warp's lanes read what others of them wrote.
      if constexpr (!kParks) __syncwarp();

      if (paired && warpgroup == 1) pass(g, taps);
      if (paired) ptx::sync(Second::kTurn + warpgroup, 256);
      Second::multiply(g, memory, warpgroup, pixels, filters, accumulators, pixel_stage,
                       filter_stage);
      bool const other_is_next = warpgroup == 0 ? paired : index + Second::tile_step() < g.tiles;
      if (Second::kPingPong && other_is_next) ptx::arrive(Second::kTurn + (warpgroup ^ 1), 256);
      if (paired && warpgroup == 0) pass(g, taps);
      Second::settle(memory, accumulators, pixel_stage, filter_stage);
      if constexpr (kParks) wait_for_slots(g, warpgroup);
#pragma unroll
      for (int nb = 0; nb < kPixelBlocks; ++nb) {
#pragma unroll
        for (int mb = 0; mb < kChannelBlocks; ++mb, slots.advance(g.store_stages)) {
          std::uint32_t const slot = memory.slot(g, warpgroup, slots.stage);
          if constexpr (kParks) {
            fill(accumulators[nb][mb], columns[mb], parked[nb * kChannelBlocks + mb], slot);
          } else {
            Second::template fill<0>(slot, g.slot_bytes, accumulators[nb][mb], columns[mb]);
          }
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
