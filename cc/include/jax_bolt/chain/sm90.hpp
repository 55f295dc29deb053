// SPDX-License-Identifier: Apache-2.0
// Two products back to back in one kernel for Hopper: an implicit GEMM, its epilogue, and a product
// over the channels that it made, with an epilogue of its own. What is between them is stored where
// something else needs it, and is never read back. A shortcut's product may be merged into the
// first one: a third product over the same pixels, whose result is the first one's side input.
//
// Operands are swapped as in implicit_gemm/sm90.hpp: filters are wgmma's A, pixels its B. So a
// block of the first result, [pixel][64 channels] with the 128-byte swizzle as the epilogue leaves
// it for TMA, is where the second product reads it, too: nothing is moved between the products.
//
// A warpgroup that multiplies has tiles of its own, of kPixels pixels and all channels. It walks
// the first result's channels in blocks: multiply_first, finish into a slot, store, and
// multiply_second from the same slot, which goes on while the next block's products begin. Then the
// second result's blocks leave through the same slots. A shortcut's group of blocks comes ahead of
// the first product's, is rounded as it would be stored, and stays in the registers of the threads
// whose accumulators it was (park). The warpgroups share filters alone, and so do those
// of a cluster's CTAs: each CTA loads its part of a unit for all of them. Last is one warpgroup
// that loads: warp 0 pixels, warp 1 filters, warp 2 the side inputs of the first warpgroup and warp
// 3 those of the others, into the slots that their results leave from.
//
// With kAhead a block's first products are given out ahead of the epilogue of the block before
// (run_ahead), into accumulators of their own, so that a warpgroup's tensor cores and its epilogues
// work at the same time.
//
// Why nothing waits for ever. Every ring is filled and freed in one order, which its readers share.
// - Filters: a unit is freed once the products that read it are done. A warpgroup that waits for
//   units holds at most those of the products before, and filter_stages has room for both: with
//   kAhead for a block's first products and for its second ones.
// - Pixels: a tile's stages are freed by its last group of blocks. Where it has several, the ring
//   holds a whole tile. The loader goes by stages, then by warpgroups: no warpgroup lacks a stage
//   that another one has, so that it frees the filters that the other one waits for.
// - Slots: one is free once the block after it has been stored; there are two or more.
// A phase of a full barrier is awaited by all its readers before they free what it guards, so that
// parities never lag by two.
#ifndef JAX_BOLT_CHAIN_SM90_HPP_
#define JAX_BOLT_CHAIN_SM90_HPP_

#include <cstdint>
#include <type_traits>
#include <utility>

#include "jax_bolt/device_kernel.hpp"
#include "jax_bolt/epilogue/math.hpp"
#include "jax_bolt/epilogue/traits.hpp"
#include "jax_bolt/implicit_gemm/geometry.hpp"
#include "jax_bolt/implicit_gemm/ptx.hpp"
#include "jax_bolt/implicit_gemm/sm90.hpp"
#include "jax_bolt/implicit_gemm/wgmma.hpp"

namespace jax_bolt::chain {

namespace gmma = implicit_gemm::gmma;
namespace ptx = implicit_gemm::ptx;
using implicit_gemm::descriptor;
using implicit_gemm::Filters;
using implicit_gemm::Geometry;
using implicit_gemm::moved;
using implicit_gemm::Ring;

inline constexpr int kMaxPixelStages = 16;
inline constexpr int kMaxFilterStages = 32;
inline constexpr int kMaxSlots = 8;
inline constexpr int kMaxWarpgroups = 3;  // that multiply

/// What chain_tiles.py says beside the first product's geometry, whose `channels` are those between
/// the products and whose `tiles` have all of them.
struct Joint {
  std::int32_t blocks;    // of 64 channels between the products
  std::int32_t channels;  // of the second result
};

/// In the place of the epilogue of a shortcut, where there is none.
struct NoShortcut {};

/// The kernel's only parameter. The launcher fills it from a recipe, field by field. Both
/// geometries have the same tiles, rings, and stages.
template <class First, class Second, class Shortcut>
struct Params {
  ptx::TensorMap pixels, filters, second_filters;
  ptx::TensorMap between, output;  // `between` counts only where it is stored
  ptx::TensorMap shortcut_pixels, shortcut_filters;
  void const* vectors[array_size(First::kVectors)];
  void const* second_vectors[array_size(Second::kVectors)];
  void const* shortcut_vectors[array_size(Shortcut::kVectors)];
  Geometry geometry;
  Joint joint;
  Geometry shortcut;
};

template <class First, class Second>
struct Params<First, Second, NoShortcut> {
  ptx::TensorMap pixels, filters, second_filters;
  ptx::TensorMap between, output;
  ptx::TensorMap sides[2];  // of the first product, and of the second
  void const* vectors[array_size(First::kVectors)];
  void const* second_vectors[array_size(Second::kVectors)];
  Geometry geometry;
  Joint joint;
};

/// kStored: the first result is an output. kGroup: blocks of it that are accumulated side by side.
/// kOutputs: blocks of the second result. kSteps, kSecondSteps: products in a unit of filters, of
/// 16 input channels each; the shortcut's has as many as the first one's. kCluster: CTAs that share
/// filters. kAhead: see above; a group is one block then. kResident: the filters' ring holds a
/// whole tile's, which are loaded once (Geometry::resident says the same).
template <class First_, class Second_, class Element, Filters kFilters, Filters kSecondFilters,
          bool kStored, int kPixels, int kGroup, int kOutputs, int kWarpgroups, int kSteps,
          int kSecondSteps, int kCluster = 1, bool kAhead = false, bool kResident = false,
          class Shortcut_ = NoShortcut>
struct Sm90 {
  using First = First_;
  using Second = Second_;
  using Shortcut = Shortcut_;
  using Parameters = Params<First, Second, Shortcut>;

  static constexpr int kThreads = 128 * (kWarpgroups + 1);
  // One warpgroup that multiplies leaves room for a second CTA beside this one.
  static constexpr int kCtas = kWarpgroups == 1 ? 2 : 1;
  static constexpr bool kMerges = !std::is_same_v<Shortcut, NoShortcut>;
  static constexpr bool kLoadsSides = !kMerges && First::kSides + Second::kSides > 0;
  static_assert(!kMerges || (First::kSides == 1 && Second::kSides == 0),
                "the shortcut is the only side input");
  static_assert(sizeof(Element) == 2 && sizeof(typename First::Output) == 2 &&
                    sizeof(typename Second::Output) == 2,
                "a slot has 128 bytes for 64 channels");
  static_assert(First::kSides <= 1 && Second::kSides <= 1,
                "a side input lies in its result's slot");
  static_assert(AuxiliaryOf<First>::kCount + AuxiliaryOf<Second>::kCount == 0);
  static_assert(1 <= kWarpgroups && kWarpgroups <= kMaxWarpgroups);
  static_assert(!kAhead || kGroup == 1);
  // What a thread that loads keeps, and one that multiplies takes: with those of a CTA's other
  // threads, all that there are.
  static constexpr int kKept = kWarpgroups == 2 ? 40 : 32;
  static constexpr int kTaken = kWarpgroups == 2 ? 232 : 160;

  static constexpr int kBlock = 64;                    // output channels
  static constexpr int kChunk = 64;                    // input channels: the widest swizzle
  static constexpr int kUnit = kBlock * 128;           // bytes of one block's filter for one chunk
  static constexpr int kPartRows = kBlock / kCluster;  // of 128 bytes, that one CTA loads of it
  static_assert(kPartRows % 8 == 0, "a part begins where the swizzle does");
  // From one K step to the next: 32 bytes along a row of a K-major filter, 16 rows down an M-major
  // one.
  static constexpr int kStep = kFilters == Filters::kKrsc ? 32 : 2048;
  static constexpr int kSecondStep = kSecondFilters == Filters::kKrsc ? 32 : 2048;
  template <Filters kOf>
  using Mma =
      typename implicit_gemm::Wgmma<Element, kPixels,
                                    kOf == Filters::kKrsc ? gmma::Major::K : gmma::Major::MN>::Op;
  using Accumulators = float[kPixels / 2];
  using Parked = std::uint32_t[kPixels / 4];  // a block's results: two pixels in a register

  // Named barriers; 0 is __syncthreads'.
  static constexpr int kSetUp = 1, kColumns = 2, kStore = 3;

  struct Barriers {
    ptx::Barrier filters_full[kMaxFilterStages], filters_empty[kMaxFilterStages];
    ptx::Barrier pixels_full[kMaxWarpgroups][kMaxPixelStages];
    ptx::Barrier pixels_empty[kMaxWarpgroups][kMaxPixelStages];
    ptx::Barrier slots_full[kMaxWarpgroups][kMaxSlots], slots_empty[kMaxWarpgroups][kMaxSlots];
  };

  /// Where things lie in shared memory.
  struct Memory {
    std::uint32_t filters, pixels, slots;
    // [channel][Epilogue::kColumns], of all channels.
    float *columns, *second_columns, *shortcut_columns;
    Barriers* barriers;

    __device__ __forceinline__ Memory(std::uint8_t* base, Geometry const& g, Joint const& joint) {
      std::uint32_t const address = ptx::shared_address(base);
      filters = address;
      pixels = filters + g.filter_stages * kUnit;
      slots = pixels + kWarpgroups * g.pixel_stages * g.stage_bytes;
      std::uint32_t const end = slots + kWarpgroups * g.store_stages * g.slot_bytes;
      columns = reinterpret_cast<float*>(base + (end - address));
      second_columns = columns + joint.blocks * kBlock * First::kColumns;
      shortcut_columns = second_columns + kOutputs * kBlock * Second::kColumns;
      float* last = shortcut_columns;
      if constexpr (kMerges) last += joint.blocks * kBlock * Shortcut::kColumns;
      barriers = reinterpret_cast<Barriers*>(last);
    }
    __device__ __forceinline__ std::uint32_t pixel_stage(Geometry const& g, int warpgroup,
                                                         int stage) const {
      return pixels + (warpgroup * g.pixel_stages + stage) * g.stage_bytes;
    }
    __device__ __forceinline__ std::uint32_t slot(Geometry const& g, int warpgroup,
                                                  int stage) const {
      return slots + (warpgroup * g.store_stages + stage) * g.slot_bytes;
    }
  };

  /// The first output pixel of a tile.
  struct Tile {
    int image, row, col;

    __device__ __forceinline__ Tile(Geometry const& g, int index) {
      int const strip = index / g.col_tiles;
      col = (index - strip * g.col_tiles) * g.tile_cols;
      int const group = strip / g.row_tiles;
      row = (strip - group * g.row_tiles) * g.tile_rows;
      image = group * g.tile_images;
    }
  };

  /// A warpgroup's tile of a turn. Of the last turn's, every CTA's first warpgroup gets one first.
  __device__ static __forceinline__ int tile_index(int turn, int warpgroup) {
    return (turn * kWarpgroups + warpgroup) * gridDim.x + blockIdx.x;
  }

  __device__ static __forceinline__ int rank() { return kCluster == 1 ? 0 : blockIdx.x % kCluster; }

  /// Whether a CTA of the cluster has a tile in this turn: all of them pass its filters on.
  __device__ static __forceinline__ bool any_tile(Geometry const& g, int turn) {
    return tile_index(turn, 0) - rank() < g.tiles;
  }

  __device__ static __forceinline__ int count_taps(Geometry const& g) {
    int taps = 0;
    for (int phase = 0; phase < g.phases; ++phase) taps += g.phase_taps[phase];
    return taps;
  }

  // Producers --------------------------------------------------------------------------------

  __device__ static __forceinline__ void set_up(ptx::Barrier* full, ptx::Barrier* empty, int stages,
                                                int readers) {
    for (int i = 0; i < stages; ++i) {
      full[i].init(1);
      empty[i].init(readers);
    }
  }

  /// The warpgroups whose side inputs warp 2 or 3 loads.
  __device__ static __forceinline__ int first_side(int warp) { return warp - 2; }
  __device__ static __forceinline__ int end_side(int warp) { return warp == 2 ? 1 : kWarpgroups; }

  /// Sets up the barriers that a warp of the loading warpgroup waits for: it may start at once.
  __device__ static void set_up(Parameters const& p, Barriers& barriers, int warp) {
    Geometry const& g = p.geometry;
    if (warp == 0) {
      if constexpr (kMerges) ptx::prefetch(p.shortcut_pixels);
      ptx::prefetch(p.pixels);
      for (int i = 0; i < kWarpgroups; ++i) {
        set_up(barriers.pixels_full[i], barriers.pixels_empty[i], g.pixel_stages, 4);
      }
    } else if (warp == 1) {
      if constexpr (kMerges) ptx::prefetch(p.shortcut_filters);
      ptx::prefetch(p.filters);
      ptx::prefetch(p.second_filters);
      set_up(barriers.filters_full, barriers.filters_empty, g.filter_stages,
             4 * kWarpgroups * kCluster);
    } else {
      for (int i = first_side(warp); i < end_side(warp); ++i) {
        set_up(barriers.slots_full[i], barriers.slots_empty[i], g.store_stages, 1);
      }
    }
    ptx::fence_barrier_init();
    ptx::fence_async_proxy();
  }

  __device__ static void load_pixels(Parameters const& p, Memory const& memory) {
    Ring ring;
    for (int turn = 0; tile_index(turn, 0) < p.geometry.tiles; ++turn) {
      if constexpr (kMerges) load_pixels(p.shortcut_pixels, p.shortcut, memory, turn, ring);
      load_pixels(p.pixels, p.geometry, memory, turn, ring);
    }
  }

  /// What a product reads of the tiles of a turn.
  __device__ static __forceinline__ void load_pixels(ptx::TensorMap const& map, Geometry const& g,
                                                     Memory const& memory, int turn, Ring& ring) {
    for (int chunk = 0; chunk < g.chunks; ++chunk) {
      for (int phase = 0; phase < g.phases; ++phase) {
        for (int i = 0; i < kWarpgroups; ++i) {
          int const index = tile_index(turn, i);
          if (index < g.tiles) {
            load_pixels(map, g, memory, Tile(g, index), i, ring, chunk, phase);
          }
        }
        ring.advance(g.pixel_stages);
      }
    }
  }

  /// The pixels that one phase of a tile reads of a chunk, as one box.
  __device__ static __forceinline__ void load_pixels(ptx::TensorMap const& map, Geometry const& g,
                                                     Memory const& memory, Tile const& tile,
                                                     int warpgroup, Ring const& ring, int chunk,
                                                     int phase) {
    ptx::Barrier& full = memory.barriers->pixels_full[warpgroup][ring.stage];
    memory.barriers->pixels_empty[warpgroup][ring.stage].wait(ring.parity ^ 1);
    full.arrive_and_expect(g.load_bytes);
    std::uint32_t const to = memory.pixel_stage(g, warpgroup, ring.stage);
    if (g.image_cols > 0) {
      int const line = tile.col / g.image_cols, image = line / g.image_rows;
      int const col = tile.col - line * g.image_cols, row = line - image * g.image_rows;
      ptx::gather(map, full, to, chunk * kChunk, col * g.step_cols + g.first_col,
                  row * g.step_rows + g.first_row, image, g.phase_col[phase], g.phase_row[phase]);
    } else {
      ptx::load(map, full, to, chunk * kChunk + g.phase_channel[phase],
                tile.col * g.step_cols + g.phase_col[phase], g.phase_parity[phase],
                tile.row * g.step_rows + g.phase_row[phase], tile.image);
    }
  }

  /// The filters of a tile, in the order in which all warpgroups read them; resident ones once.
  __device__ static void load_filters(Parameters const& p, Memory const& memory) {
    Geometry const& g = p.geometry;
    Ring ring;
    for (int turn = 0; any_tile(g, turn); ++turn) {
      if (kAhead) load_firsts(p, memory, ring, 0);
      for (int first = 0; first < p.joint.blocks; first += kGroup) {
        int const group = kAhead ? first + 1 : first;
        if (group < p.joint.blocks) load_firsts(p, memory, ring, group);
        for (int i = 0; i < kGroup; ++i) {
          for (int output = 0; output < kOutputs; ++output) {
            load_unit<kSecondFilters>(p.second_filters, g, memory, ring, output, first + i, 0);
          }
        }
      }
      if constexpr (kResident) return;
    }
  }

  /// A group of blocks' filters of the first product and the shortcut's.
  __device__ static __forceinline__ void load_firsts(Parameters const& p, Memory const& memory,
                                                     Ring& ring, int first) {
    if constexpr (kMerges) load_group(p.shortcut_filters, p.shortcut, memory, ring, first);
    load_group(p.filters, p.geometry, memory, ring, first);
  }

  /// A group of blocks' filters of one of them.
  __device__ static __forceinline__ void load_group(ptx::TensorMap const& map, Geometry const& g,
                                                    Memory const& memory, Ring& ring, int first) {
    int const taps = count_taps(g);
    for (int chunk = 0; chunk < g.chunks; ++chunk) {
      for (int tap = 0; tap < taps; ++tap) {
        for (int i = 0; i < kGroup; ++i) {
          load_unit<kFilters>(map, g, memory, ring, first + i, chunk, g.tap_filter[tap]);
        }
      }
    }
  }

  /// A block of output channels' filter for a chunk of input channels and a tap: this CTA's part of
  /// its rows.
  template <Filters kOf>
  __device__ static __forceinline__ void load_unit(ptx::TensorMap const& map, Geometry const& g,
                                                   Memory const& memory, Ring& ring, int block,
                                                   int chunk, int tap) {
    ptx::Barrier& full = memory.barriers->filters_full[ring.stage];
    memory.barriers->filters_empty[ring.stage].wait(ring.parity ^ 1);
    full.arrive_and_expect(kUnit);
    int const row = rank() * kPartRows;
    std::uint32_t const to = memory.filters + ring.stage * kUnit + row * 128;
    if constexpr (kOf == Filters::kKrsc) {
      load_part(map, full, to, chunk * kChunk, tap, block * kBlock + row);
    } else {
      load_part(map, full, to, block * kBlock, chunk * kChunk + row, tap);
    }
    ring.advance(g.filter_stages);
  }

  __device__ static __forceinline__ void load_part(ptx::TensorMap const& map, ptx::Barrier& full,
                                                   std::uint32_t to, int c0, int c1, int c2) {
    if constexpr (kCluster == 1) {
      ptx::load(map, full, to, c0, c1, c2, 0);
    } else {
      ptx::load_to_all((1 << kCluster) - 1, map, full, to, c0, c1, c2, 0);
    }
  }

  /// Side inputs of the warpgroups from `first` to `end`, block by block: one that is behind waits
  /// for no other's.
  __device__ static void load_sides(Parameters const& p, ptx::TensorMap const* sides,
                                    Memory const& memory, int first, int end) {
    Geometry const& g = p.geometry;
    Ring ring;
    for (int turn = 0; tile_index(turn, first) < g.tiles; ++turn) {
      for (int block = 0; block < p.joint.blocks + kOutputs; ++block) {
        for (int i = first; i < end && tile_index(turn, i) < g.tiles; ++i) {
          load_side(p, sides, memory, Tile(g, tile_index(turn, i)), i, ring.stage, ring.parity,
                    block);
        }
        ring.advance(g.store_stages);
      }
    }
  }

  /// A block's side input. A slot that gets none passes through here, too, so that its barriers
  /// keep step with the ring.
  __device__ static __forceinline__ void load_side(Parameters const& p, ptx::TensorMap const* sides,
                                                   Memory const& memory, Tile const& tile,
                                                   int warpgroup, int stage, std::uint32_t parity,
                                                   int block) {
    Geometry const& g = p.geometry;
    bool const first = block < p.joint.blocks;
    ptx::Barrier& full = memory.barriers->slots_full[warpgroup][stage];
    memory.barriers->slots_empty[warpgroup][stage].wait(parity ^ 1);
    if (first ? First::kSides > 0 : Second::kSides > 0) {
      full.arrive_and_expect(g.stores * g.side_bytes);
      ptx::TensorMap const& map = sides[first ? 0 : 1];
      int const channel = (first ? block : block - p.joint.blocks) * kBlock;
      std::uint32_t const slot = memory.slot(g, warpgroup, stage);
      for (int i = 0; i < g.stores; ++i) {
        ptx::load(map, full, slot + i * g.store_bytes, channel, tile.col, tile.row + i, tile.image);
      }
    } else {
      full.arrive();
    }
  }

  // Consumers --------------------------------------------------------------------------------

  /// Zeros after the boxes of a warpgroup's pixel stages: the padding after a tile's last row.
  __device__ static void clear_tails(Geometry const& g, Memory const& memory, int warpgroup) {
    for (int stage = 0; stage < g.pixel_stages; ++stage) {
      std::uint32_t const base = memory.pixel_stage(g, warpgroup, stage);
      for (int at = g.load_bytes + (threadIdx.x & 127) * 16; at < g.stage_bytes; at += 128 * 16) {
        asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(base + at), "r"(0)
                     : "memory");
      }
    }
    ptx::fence_async_proxy();
  }

  /// The per-channel values of an epilogue, for all `blocks` of its channels.
  template <class Epilogue>
  __device__ static void tabulate(void const* const* vectors, int channels, int blocks,
                                  float* table) {
    if constexpr (Epilogue::kColumns > 0) {
      for (int at = threadIdx.x; at < blocks * kBlock; at += 128 * kWarpgroups) {
        int const channel = min(at, channels - 1);
        float values[array_size(Epilogue::kVectors)] = {};
        for_each_index<Epilogue::kVectors>([&](auto index) {
          constexpr int i = decltype(index)::value;
          using Vector = TypeAt<i, typename Epilogue::Vectors>;
          auto const* base = static_cast<Storage<typename Vector::Element> const*>(vectors[i]);
          values[i] = to_float(base[Vector::kScalar ? 0 : channel]);
        });
        float columns[Epilogue::kColumns];
        Epilogue::columns(values, columns);
        for (int i = 0; i < Epilogue::kColumns; ++i)
          table[at * Epilogue::kColumns + i] = columns[i];
      }
    }
  }

  /// As below, to every CTA that loads a part of it.
  __device__ static __forceinline__ void release_unit(ptx::Barrier& empty) {
    if constexpr (kCluster == 1) {
      release(empty);
    } else {
      int const lane = threadIdx.x & 31;
      if (lane < kCluster) {
        ptx::arrive_in_cluster(ptx::in_cta(ptx::shared_address(&empty), lane));
      }
    }
  }

  /// One warp's word that it has read a stage.
  __device__ static __forceinline__ void release(ptx::Barrier& empty) {
    if ((threadIdx.x & 31) == 0) empty.arrive();
  }

  /// A warpgroup that multiplies, and where it is in its rings.
  struct Consumer {
    Parameters const& p;
    Memory const& memory;
    int const warpgroup;
    Ring pixels = {}, filters = {}, slots = {};
    // Units of filters that products under way may read, up to the ring's next one.
    int held = 0, oldest = 0;
    int leaving = -1;  // the slot of the block before

    /// The next unit of filters, as an operand.
    __device__ __forceinline__ std::uint64_t next_unit() {
      Geometry const& g = p.geometry;
      std::uint32_t const parity = kResident ? 0 : filters.parity;
      memory.barriers->filters_full[filters.stage].wait(parity);
      std::uint64_t const unit = descriptor(memory.filters + filters.stage * kUnit);
      filters.advance(g.filter_stages);
      ++held;
      return unit;
    }

    /// Frees all units but the latest `kept`, whose products are under way.
    __device__ __forceinline__ void release_units(int kept) {
      if constexpr (!kResident) {
        for (; held > kept; --held) {
          release_unit(memory.barriers->filters_empty[oldest]);
          if (++oldest == p.geometry.filter_stages) oldest = 0;
        }
      }
    }

    /// Units of a block's first products.
    __device__ __forceinline__ int first_units() const {
      int units = p.geometry.chunks * count_taps(p.geometry);
      if constexpr (kMerges) units += p.shortcut.chunks * count_taps(p.shortcut);
      return units;
    }

    /// A tile's units without a tile: other warpgroups' last ones need them alone.
    __device__ void drain() {
      if constexpr (!kResident) {
        int const units = p.joint.blocks * (first_units() + kOutputs);
        for (int i = 0; i < units; ++i) {
          next_unit();
          release_units(0);
        }
      }
    }

    /// A group of the first product's blocks, or of the shortcut's. Its tile's pixels, from `ring`
    /// on, come with the first group, and are freed by the last. With kAhead nothing is waited for
    /// or freed: the products are left under way.
    __device__ __forceinline__ void multiply_first(Geometry const& g, bool is_first, bool is_last,
                                                   Ring& ring,
                                                   Accumulators (&accumulators)[kGroup]) {
      Barriers& barriers = *memory.barriers;
      gmma::ScaleOut scale = gmma::ScaleOut::Zero;
      int read = -1;  // the stage that only products under way need yet
      for (int chunk = 0; chunk < g.chunks; ++chunk) {
        int tap = 0;
        for (int phase = 0; phase < g.phases; ++phase) {
          if (is_first) barriers.pixels_full[warpgroup][ring.stage].wait(ring.parity);
          std::uint64_t const stage = descriptor(memory.pixel_stage(g, warpgroup, ring.stage));
          for (int left = g.phase_taps[phase]; left > 0; --left, ++tap) {
            std::uint64_t a[kGroup];
#pragma unroll
            for (int i = 0; i < kGroup; ++i) a[i] = next_unit();
            std::uint64_t const b = stage + moved(g.tap_offset[tap]);
            cute::warpgroup_arrive();
#pragma unroll
            for (int k = 0; k < kSteps; ++k) {
#pragma unroll
              for (int i = 0; i < kGroup; ++i) {
                implicit_gemm::wgmma<Mma<kFilters>>(a[i] + moved(k * kStep), b + moved(k * 32),
                                                    accumulators[i], scale,
                                                    std::make_index_sequence<kPixels / 2>{});
              }
              scale = gmma::ScaleOut::One;
            }
            cute::warpgroup_commit_batch();
            if constexpr (kAhead) continue;
            // All but the products just issued are done, the second ones of the block before, too.
            cute::warpgroup_wait<1>();
            release_units(kGroup);
            if (read >= 0) release(barriers.pixels_empty[warpgroup][read]);
            read = -1;
          }
          if (is_last) read = ring.stage;
          ring.advance(g.pixel_stages);
        }
      }
      if constexpr (kAhead) return;
      cute::warpgroup_wait<0>();
      fence(accumulators);
      release_units(0);
      if (is_last) release(barriers.pixels_empty[warpgroup][read]);
    }

    // First products of a block, which are given out together: the first one's, and the shortcut's.
    using Group = Accumulators[kGroup];
    using Firsts = Group[kMerges ? 2 : 1];

    __device__ __forceinline__ void give_out(bool is_first, Firsts& firsts) {
      Ring ring = pixels;
      if constexpr (kMerges) multiply_first(p.shortcut, is_first, false, ring, firsts[1]);
      multiply_first(p.geometry, is_first, false, ring, firsts[0]);
    }

    /// The tile's pixels have been read.
    __device__ __forceinline__ void free_pixels() {
      int boxes = p.geometry.chunks * p.geometry.phases;
      if constexpr (kMerges) boxes += p.shortcut.chunks * p.shortcut.phases;
      for (int i = 0; i < boxes; ++i) {
        release(memory.barriers->pixels_empty[warpgroup][pixels.stage]);
        pixels.advance(p.geometry.pixel_stages);
      }
    }

    /// Adds the second product over the channels of a slot; leaves it under way.
    __device__ __forceinline__ void multiply_second(std::uint32_t slot,
                                                    Accumulators (&accumulators)[kOutputs],
                                                    gmma::ScaleOut& scale) {
      std::uint64_t a[kOutputs];
#pragma unroll
      for (int i = 0; i < kOutputs; ++i) a[i] = next_unit();
      std::uint64_t const b = descriptor(slot);
      cute::warpgroup_arrive();
#pragma unroll
      for (int k = 0; k < kSecondSteps; ++k) {
#pragma unroll
        for (int i = 0; i < kOutputs; ++i) {
          implicit_gemm::wgmma<Mma<kSecondFilters>>(a[i] + moved(k * kSecondStep),
                                                    b + moved(k * 32), accumulators[i], scale,
                                                    std::make_index_sequence<kPixels / 2>{});
        }
        scale = gmma::ScaleOut::One;
      }
      cute::warpgroup_commit_batch();
    }

    /// The next slot, once it is free and its side input is there.
    __device__ __forceinline__ std::uint32_t next_slot() const {
      Barriers& barriers = *memory.barriers;
      if constexpr (kLoadsSides) {
        barriers.slots_full[warpgroup][slots.stage].wait(slots.parity);
      } else {
        barriers.slots_empty[warpgroup][slots.stage].wait(slots.parity ^ 1);
      }
      return memory.slot(p.geometry, warpgroup, slots.stage);
    }

    /// The per-channel values of a thread's two channels, of a block's `table`.
    template <class Epilogue>
    using Columns = float[2][array_size(Epilogue::kColumns)];
    template <class Epilogue>
    __device__ static __forceinline__ void load_columns(float const* table,
                                                        Columns<Epilogue>& columns) {
      int const channel = first_channel();
#pragma unroll
      for (int i = 0; i < Epilogue::kColumns; ++i) {
        columns[0][i] = table[channel * Epilogue::kColumns + i];
        columns[1][i] = table[(channel + 8) * Epilogue::kColumns + i];
      }
    }
    /// Of a block's, a thread's first one; its second one is 8 further on.
    __device__ static __forceinline__ int first_channel() {
      return (threadIdx.x & 127) / 32 * 16 + (threadIdx.x & 31) / 4;
    }

    /// A block of the shortcut, for the epilogue of the first product's. `table` is of the block's
    /// channels. Of those that do not exist nothing is used.
    __device__ static __forceinline__ void park(Accumulators const& accumulators,
                                                float const* table, Parked& parked) {
      if constexpr (kMerges) {
        Columns<Shortcut> columns = {};
        load_columns<Shortcut>(table, columns);
        float const none[1] = {};
#pragma unroll
        for (int i = 0; i < kPixels / 4; ++i) {
          float const left = Shortcut::apply(accumulators[2 * i], columns[i & 1], none);
          float const right = Shortcut::apply(accumulators[2 * i + 1], columns[i & 1], none);
          parked[i] = ptx::Pair<typename Shortcut::Output>::pack(left, right);
        }
      }
    }

    /// kCount 8 x 8 matrices of a block (4: 16 channels by 16 pixels; 2: by 8): epilogue, and into
    /// the slot. `at` is this lane's row of a matrix there, where a side input lies, too, unless it
    /// is `parked`. Channels that do not exist become zeros: the second product reads them.
    template <class Epilogue, int kCount>
    __device__ static __forceinline__ void finish(float const* accumulators,
                                                  Columns<Epilogue> const& columns,
                                                  bool const (&exists)[2], std::uint32_t at,
                                                  std::uint32_t const* parked) {
      std::uint32_t sides[kCount] = {}, results[kCount];
      if constexpr (Epilogue::kSides > 0 && !kMerges) ptx::load_transposed(at, sides);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        float low[1] = {}, high[1] = {};
        if constexpr (Epilogue::kSides > 0) {
          using Side = ptx::Pair<TypeAt<0, typename Epilogue::Sides>>;
          std::uint32_t const side = kMerges ? parked[i] : sides[i];
          low[0] = Side::low(side);
          high[0] = Side::high(side);
        }
        // Matrices 0 and 2 are the thread's first channel, 1 and 3 its second, 8 further on.
        float const left = Epilogue::apply(accumulators[2 * i], columns[i & 1], low);
        float const right = Epilogue::apply(accumulators[2 * i + 1], columns[i & 1], high);
        std::uint32_t const pair = ptx::Pair<typename Epilogue::Output>::pack(left, right);
        results[i] = exists[i & 1] ? pair : 0;
      }
      ptx::store_transposed(at, results);
    }

    /// A block's epilogue, into a slot: [pixel][64 channels] with the 128-byte swizzle. `table` is
    /// of the block's channels, of which `channels` exist; `parked` is its side input, where that
    /// is the shortcut.
    template <class Epilogue>
    __device__ __forceinline__ void finish(Accumulators const& accumulators, float const* table,
                                           int channels, std::uint32_t slot, Parked const& parked) {
      int const lane = threadIdx.x & 31, warp = (threadIdx.x & 127) / 32;
      int const channel = first_channel();
      bool const exists[2] = {channel < channels, channel + 8 < channels};
      Columns<Epilogue> columns = {};
      load_columns<Epilogue>(table, columns);
      // Lanes 8 i to 8 i + 7 hold the addresses of matrix i's rows: pixels, 128 bytes apart.
      int const pixel = (lane & 7) + (lane >> 4) * 8;
      int const sixteenth = warp * 2 + (lane >> 3 & 1);
      std::uint32_t const at = slot + pixel * 128 + ((sixteenth ^ (pixel & 7)) << 4);
#pragma unroll
      for (int i = 0; i < kPixels / 16; ++i) {
        finish<Epilogue, 4>(accumulators + 8 * i, columns, exists, at + i * 2048, parked + 4 * i);
      }
      if constexpr (kPixels % 16 != 0) {
        // ldmatrix and stmatrix of two take their addresses from lanes 0 to 15.
        std::uint32_t const at8 = slot + (lane & 7) * 128 + ((sixteenth ^ (lane & 7)) << 4);
        finish<Epilogue, 2>(accumulators + kPixels / 2 - 4, columns, exists,
                            at8 + (kPixels / 8 - 1) * 1024, parked + kPixels / 4 - 2);
      }
    }

    /// After `finish`: the slot is the second product's and TMA's to read, the one before is no
    /// product's any more.
    __device__ __forceinline__ void hand_over() {
      ptx::fence_async_proxy();
      cute::warpgroup_wait<0>();
      release_units(0);
      ptx::sync(kStore + warpgroup, 128);
    }

    __device__ __forceinline__ bool is_leader() const { return (threadIdx.x & 127) == 0; }

    /// A slot to an output by TMA, which leaves out what lies beyond it; the leader does so.
    __device__ __forceinline__ void store(ptx::TensorMap const& output, Tile const& tile,
                                          int channel, std::uint32_t slot) {
      Geometry const& g = p.geometry;
      for (int i = 0; i < g.stores; ++i) {
        ptx::store(output, slot + i * g.store_bytes, channel, tile.col, tile.row + i, tile.image);
      }
    }

    /// Goes on to the next slot, and frees the one before this once it has been read. All warps
    /// have seen the products that read it end: that was before `hand_over` of this one.
    __device__ __forceinline__ void advance() {
      if (is_leader()) {
        ptx::wait_for_stores<1>();
        if (leaving >= 0) memory.barriers->slots_empty[warpgroup][leaving].arrive();
        leaving = slots.stage;
      }
      slots.advance(p.geometry.store_stages);
    }

    /// A block whose first products are under way in `firsts`; those of the next one into `next`,
    /// which go on until that block's turn, as the second products of this one do.
    __device__ __forceinline__ void run_ahead(Tile const& tile, int block, Firsts& firsts,
                                              Firsts& next, Accumulators (&outputs)[kOutputs],
                                              gmma::ScaleOut& scale) {
      Geometry const& g = p.geometry;
      bool const is_last = block + 1 == p.joint.blocks;
      cute::warpgroup_wait<0>();
      fence(firsts[0]);
      if constexpr (kMerges) fence(firsts[1]);
      release_units(0);
      if (is_last) {
        free_pixels();
      } else {
        give_out(false, next);
      }
      int const channel = block * kBlock;
      Parked parked;
      if constexpr (kMerges) {
        park(firsts[1][0], memory.shortcut_columns + channel * Shortcut::kColumns, parked);
      }
      std::uint32_t const slot = next_slot();
      finish<First>(firsts[0][0], memory.columns + channel * First::kColumns, g.channels - channel,
                    slot, parked);
      // As hand_over, but that the second products of the block before have ended already.
      ptx::fence_async_proxy();
      ptx::sync(kStore + warpgroup, 128);
      leave_between(tile, channel, slot);
      multiply_second(slot, outputs, scale);
      advance();
    }

    /// What the accumulators hold is not read earlier.
    template <int kCount>
    __device__ static __forceinline__ void fence(Accumulators (&accumulators)[kCount]) {
#pragma unroll
      for (int i = 0; i < kCount * kPixels / 2; ++i) {
        cute::warpgroup_fence_operand(accumulators[i / (kPixels / 2)][i % (kPixels / 2)]);
      }
    }

    /// A block of the first result leaves, where it is an output.
    __device__ __forceinline__ void leave_between(Tile const& tile, int channel,
                                                  std::uint32_t slot) {
      if (is_leader()) {
        if constexpr (kStored) store(p.between, tile, channel, slot);
        ptx::commit_stores();  // of nothing, where it is only kept
      }
    }

    __device__ __forceinline__ void run_tile(Tile const& tile) {
      Geometry const& g = p.geometry;
      Accumulators outputs[kOutputs];
      gmma::ScaleOut scale = gmma::ScaleOut::Zero;
      if constexpr (kResident) filters = {};  // its first round, for every tile
      if constexpr (kAhead) {
        Firsts even, odd;
        give_out(true, even);
        for (int block = 0; block < p.joint.blocks;) {
          run_ahead(tile, block, even, odd, outputs, scale);
          if (++block == p.joint.blocks) break;
          run_ahead(tile, block, odd, even, outputs, scale);
          ++block;
        }
      } else {
        run_groups(tile, outputs, scale);
      }
      cute::warpgroup_wait<0>();
      fence(outputs);
      release_units(0);
#pragma unroll
      for (int i = 0; i < kOutputs; ++i) {
        int const channel = i * kBlock;
        std::uint32_t const slot = next_slot();
        finish<Second>(outputs[i], memory.second_columns + channel * Second::kColumns,
                       p.joint.channels - channel, slot, Parked{});
        hand_over();
        if (is_leader()) {
          store(p.output, tile, channel, slot);
          ptx::commit_stores();
        }
        advance();
      }
    }

    /// All blocks, group by group, one thing after the other.
    __device__ __forceinline__ void run_groups(Tile const& tile, Accumulators (&outputs)[kOutputs],
                                               gmma::ScaleOut& scale) {
      Geometry const& g = p.geometry;
      for (int first = 0; first < p.joint.blocks; first += kGroup) {
        bool const is_first = first == 0, is_last = first + kGroup == p.joint.blocks;
        Accumulators accumulators[kGroup];
        Parked parked[kGroup];
        Ring ring = pixels;
        if constexpr (kMerges) {
          multiply_first(p.shortcut, is_first, is_last, ring, accumulators);
#pragma unroll
          for (int i = 0; i < kGroup; ++i) {
            int const channel = (first + i) * kBlock;
            park(accumulators[i], memory.shortcut_columns + channel * Shortcut::kColumns,
                 parked[i]);
          }
        }
        multiply_first(g, is_first, is_last, ring, accumulators);
        if (is_last) pixels = ring;
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
          int const channel = (first + i) * kBlock;
          std::uint32_t const slot = next_slot();
          finish<First>(accumulators[i], memory.columns + channel * First::kColumns,
                        g.channels - channel, slot, parked[i]);
          hand_over();
          leave_between(tile, channel, slot);
          multiply_second(slot, outputs, scale);
          advance();
        }
      }
    }
  };

  __device__ static void consume(Parameters const& p, Memory const& memory, int warpgroup) {
    Consumer consumer{p, memory, warpgroup};
    for (int turn = 0; any_tile(p.geometry, turn); ++turn) {
      int const index = tile_index(turn, warpgroup);
      if (index < p.geometry.tiles) {
        consumer.run_tile(Tile(p.geometry, index));
      } else {
        consumer.drain();
      }
    }
    // Shared memory must outlive the stores that read it.
    if (consumer.is_leader()) ptx::wait_for_stores<0>();
  }

  __device__ static void run(Parameters const& p) {
    extern __shared__ __align__(1024) std::uint8_t shared[];
    Geometry const& g = p.geometry;
    Memory const memory(shared, g, p.joint);
    int const warpgroup = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / 128), 0);
    if (warpgroup == kWarpgroups) {
      if constexpr (kWarpgroups > 1) ptx::keep_registers<kKept>();
      int const warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / 32), 0) & 3;
      bool const elected = ptx::elect();
      if (elected) set_up(p, *memory.barriers, warp);
      __syncwarp();
      ptx::arrive(kSetUp, kThreads);
      meet_cluster();
      if (warp == 0) ptx::allow_next_kernel();
      if (elected) {
        if (warp != 1 || !g.held) ptx::wait_for_earlier_kernels();
        if (warp == 0) {
          load_pixels(p, memory);
        } else if (warp == 1) {
          load_filters(p, memory);
        } else if (first_side(warp) < end_side(warp)) {
          if constexpr (kLoadsSides) {
            load_sides(p, p.sides, memory, first_side(warp), end_side(warp));
          }
        }
      }
      meet_cluster();
    } else {
      if constexpr (kWarpgroups > 1) ptx::take_registers<kTaken>();
      if ((threadIdx.x & 127) == 0) {
        if (kStored) ptx::prefetch(p.between);
        ptx::prefetch(p.output);
      }
      clear_tails(g, memory, warpgroup);
      ptx::sync(kSetUp, kThreads);
      meet_cluster();
      if (!g.held) ptx::wait_for_earlier_kernels();
      tabulate<First>(p.vectors, g.channels, p.joint.blocks, memory.columns);
      tabulate<Second>(p.second_vectors, p.joint.channels, kOutputs, memory.second_columns);
      if constexpr (kMerges) {
        tabulate<Shortcut>(p.shortcut_vectors, g.channels, p.joint.blocks, memory.shortcut_columns);
      }
      ptx::sync(kColumns, 128 * kWarpgroups);
      consume(p, memory, warpgroup);
      meet_cluster();
    }
  }

  /// Every CTA's barriers are set up; or no CTA has anything to write to another one's memory.
  __device__ static __forceinline__ void meet_cluster() {
    if constexpr (kCluster > 1) {
      __syncwarp();
      ptx::arrive_cluster();
      ptx::wait_cluster();
    }
  }
};

}  // namespace jax_bolt::chain

#endif  // JAX_BOLT_CHAIN_SM90_HPP_
