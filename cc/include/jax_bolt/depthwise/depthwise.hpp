// SPDX-License-Identifier: Apache-2.0
// Depthwise convs, directly: every output channel reads one input channel. On any architecture from
// sm_80 on.
//
// A block has some columns of outputs and some channels, and walks down a chunk of an image's rows.
// Input rows come through a ring in shared memory (cp.async; what lies outside of the image is
// zeros there). A thread has kOutputs neighbouring outputs of a row and kWidth channels. Of the
// output rows that the present input row counts for, one for each line of the filter, it has the
// sums in registers, so that an input is read and converted once for all of them. Each step the
// oldest row is finished, and the sums move on by one slot, which costs nothing: the first product
// of each is added to its neighbour's register.
//
// From load to store: Loader, multiply, Writer. jax_bolt/_src/kernels/depthwise.py has the sizes.
#ifndef JAX_BOLT_DEPTHWISE_DEPTHWISE_HPP_
#define JAX_BOLT_DEPTHWISE_DEPTHWISE_HPP_

#include <cstdint>

#include "jax_bolt/depthwise/instructions.hpp"
#include "jax_bolt/depthwise/sides.hpp"
#include "jax_bolt/depthwise/vector.hpp"
#include "jax_bolt/device_kernel.hpp"
#include "jax_bolt/epilogue/math.hpp"
#include "jax_bolt/epilogue/traits.hpp"

namespace jax_bolt::depthwise {

/// The sizes of a launch, in the order of the recipe's ints.
struct Sizes {
  std::int32_t height, width, channels;  // of the input
  std::int32_t multiplier;               // output channels of an input channel
  std::int32_t rows, cols;               // of the output
  std::int32_t pad_top, pad_left;
  std::int32_t chunk_rows;                        // output rows of a block
  std::int32_t chunks, col_tiles, channel_tiles;  // blocks of an image; channels vary fastest
  // 2^32 divided by some of them, rounded up, or 0 where a block's number needs a true division.
  std::uint32_t per_multiplier, per_chunks, per_col_tiles, per_channel_tiles;
};

/// The kernel's only parameter.
template <class Epilogue>
struct Params {
  void const* x;
  void const* filter;  // R S K
  EpilogueParams<Epilogue> epilogue;
  Sizes sizes;
};

/// kR x kS taps. kWidth channels and kOutputs outputs of a thread; kLanes threads side by side
/// along the channels, kStrips along the columns. A ring of kStages steps, in which a column of
/// pixels takes kPitch bytes and is copied in pieces of kPiece bytes; the filter in pieces of
/// kTapPiece. kResident: it is then in registers, not in shared memory. kCtas: blocks that an SM
/// should hold.
///
/// Of a thread's input columns those from kFrom to kUntil are read: all, but where it is known
/// which are padding, as a strip is a row or, kMirrors, half of it. The right half is then seen
/// from the right, with the filter to match, so that in both halves the first columns are padding.
template <class Epilogue_, class Element, int kR, int kS, int kStrideH, int kStrideW,
          int kDilationH, int kDilationW, int kWidth, int kOutputs, int kLanes, int kStrips,
          int kFrom, int kUntil, int kStages, int kPitch, int kPiece, int kTapPiece, bool kMirrors,
          bool kResident, int kCtas_>
struct Depthwise {
  using Epilogue = Epilogue_;
  using Parameters = Params<Epilogue>;
  using Output = typename Epilogue::Output;
  using Stored = Storage<Output>;
  using Auxiliary = AuxiliaryOf<Epilogue>;
  using Input = Vector<Element, kWidth>;
  using Sides = depthwise::Sides<Epilogue, kOutputs, kWidth>;

  static constexpr int kThreads = kLanes * kStrips;
  static constexpr int kCtas = kCtas_;
  static constexpr int kTaps = kR * kS;
  static constexpr int kReachH = (kR - 1) * kDilationH, kReachW = (kS - 1) * kDilationW;
  /// Output rows that one step's input rows count for.
  static constexpr int kSlots = kReachH / kStrideH + 1;
  /// Whether slots that are no row of the chunk are left out of its first and last steps. Not worth
  /// the code where slots are few.
  static constexpr bool kLeavesOut = kSlots >= 5;
  /// Whether rows that zeros below the image finish are stored from the slots where they are, each
  /// by code of its own. Else the sums move on as in other steps, which takes a move for each.
  static constexpr bool kEndsInPlace = kOutputs * kWidth <= 8;
  /// Input columns of a thread, and those of a block in the ring.
  static constexpr int kInputs = (kOutputs - 1) * kStrideW + kReachW + 1;
  static constexpr int kColumns = (kStrips - 1) * kOutputs * kStrideW + kUntil - kFrom;
  static constexpr int kTile = kLanes * kWidth;  // channels of a block
  static constexpr int kItem = sizeof(Element);
  static constexpr int kPieces = kTile * kItem / kPiece;  // of a column
  static constexpr int kAcross = kThreads / kPieces;      // columns that all threads copy at once
  static constexpr int kLoads = (kColumns + kAcross - 1) / kAcross;
  static constexpr int kRowBytes = kColumns * kPitch;
  static constexpr int kStepBytes = kStrideH * kRowBytes;       // input rows from step to step
  static constexpr int kTapPieces = kTile * kItem / kTapPiece;  // of a tap
  static constexpr int kTapsAcross = kThreads / kTapPieces;   // taps that all threads copy at once
  static constexpr int kStoredBytes = kTaps * kTile * kItem;  // of the filter, as it is stored
  /// Whether it is in shared memory as floats, too.
  static constexpr bool kConverts = !kResident && kItem < 4;
  static constexpr int kFilterBytes = kStoredBytes + (kConverts ? kTaps * kTile * 4 : 0);
  static_assert(kThreads % 32 == 0 && kStages >= 2);
  static_assert(0 <= kFrom && kFrom < kUntil && kUntil <= kInputs);
  static_assert(kStrips == 1 || kUntil - kFrom == kInputs, "strips have different neighbours");
  static_assert(!kMirrors || (kStrips == 1 && kResident));
  static_assert(kTile * kItem % kPiece == 0 && kPitch % kPiece == 0 && kPitch >= kTile * kItem);
  static_assert(kThreads % kPieces == 0 && kLoads <= 32, "a bit for each piece of a thread");
  static_assert(kTile * kItem % kTapPiece == 0 && kThreads % kTapPieces == 0);

  /// The line of the filter that a slot multiplies input row `row` of a step with, or -1.
  __device__ static constexpr int line(int slot, int row) {
    int const down = row + slot * kStrideH;
    return down % kDilationH == 0 && down / kDilationH < kR ? down / kDilationH : -1;
  }
  /// Whether any slot reads that row: a stride may skip some.
  __device__ static constexpr bool is_read(int row) {
    for (int slot = 0; slot < kSlots; ++slot) {
      if (line(slot, row) >= 0) return true;
    }
    return false;
  }

  /// Slot i is at i + 1; before the first are zeros, with which sums begin.
  using Sums = float[kSlots + 1][kOutputs][kWidth];
  using Columns = float[kWidth][array_size(Epilogue::kColumns)];

  /// Where a block's outputs begin and its rows; its first input row, column and channel; and which
  /// of the output channels that read an input channel it has. Columns are counted from the right
  /// where it is mirrored.
  struct Place {
    int image, row, col, rows;
    int input_row, input_col, channel, which;
    bool mirrored;

    __device__ explicit Place(Sizes const& z) {
      unsigned rest = blockIdx.x;
      channel = digit(rest, z.channel_tiles, z.per_channel_tiles) * kTile;
      which = digit(rest, z.multiplier, z.per_multiplier);
      int const tile = digit(rest, z.col_tiles, z.per_col_tiles);
      mirrored = kMirrors && tile == 1;
      col = kMirrors ? 0 : tile * (kStrips * kOutputs);
      row = digit(rest, z.chunks, z.per_chunks) * z.chunk_rows;
      image = rest;
      rows = min(z.chunk_rows, z.rows - row);
      input_row = row * kStrideH - z.pad_top;
      int const pad_right = (z.cols - 1) * kStrideW + kReachW - (z.width - 1) - z.pad_left;
      input_col = col * kStrideW - (mirrored ? pad_right : z.pad_left) + kFrom;
    }

    /// The last digit of `number`, of `base` values, which it loses. Nothing is asked for before
    /// these are known, and a true division takes as long as twenty products.
    __device__ static int digit(unsigned& number, unsigned base, unsigned per_base) {
      if (base == 1) return 0;
      unsigned const whole = number;
      number = per_base == 0 ? whole / base : __umulhi(whole, per_base);
      return whole - number * base;
    }
  };

  /// Copies input rows to the ring, a step at a time.
  struct Loader {
    char const* from;  // the thread's first piece in the next row; read only inside of the image
    std::int64_t row_bytes;
    int row, height;
    int across;                    // bytes from one piece to the next
    std::uint32_t inside;          // a bit for each of them that lies in the image
    std::uint32_t to, begin, end;  // in shared memory: the next step, and the ring

    __device__ Loader(Parameters const& p, Place const& at, char* ring) {
      Sizes const& z = p.sizes;
      int const piece = threadIdx.x % kPieces, first = threadIdx.x / kPieces;
      int const channel = at.channel + piece * (kPiece / kItem);
      row_bytes = std::int64_t(z.width) * z.channels * kItem;
      row = at.input_row;
      height = z.height;
      across = (at.mirrored ? -kAcross : kAcross) * z.channels * kItem;
      int const start = at.input_col + first;
      from =
          static_cast<char const*>(p.x) +
          (std::int64_t(at.image) * z.height + at.input_row) * row_bytes +
          (std::int64_t(at.mirrored ? z.width - 1 - start : start) * z.channels + channel) * kItem;
      inside = 0;
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        int const col = start + i * kAcross;
        bool const valid = channel < z.channels && col >= 0 && col < z.width;
        inside |= std::uint32_t(valid) << i;
      }
      begin = shared_address(ring) + first * kPitch + piece * kPiece;
      end = begin + kStages * kStepBytes;
      to = begin;
    }

    /// Leaves out some steps.
    __device__ void skip(int steps) {
      row += steps * kStrideH;
      from += steps * kStrideH * row_bytes;
    }

    /// Begins to copy the next step's rows, or zeros where no step `wants` them.
    __device__ void step(bool wants = true) {
#pragma unroll
      for (int k = 0; k < kStrideH; ++k) {
        if (!is_read(k)) continue;
        bool const valid = wants && unsigned(row + k) < unsigned(height);
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
          // The last columns are those of some threads only.
          bool const all = (i + 1) * kAcross <= kColumns;
          if (all || int(threadIdx.x) < (kColumns - i * kAcross) * kPieces) {
            copy_async<kPiece>(to + k * kRowBytes + i * kAcross * kPitch,
                               from + k * row_bytes + std::int64_t(i) * across,
                               valid && (inside >> i & 1));
          }
        }
      }
      skip(1);
      to += kStepBytes;
      if (to == end) to = begin;
    }
  };

  /// The filter of a thread's channels.
  struct Filter {
    float taps[kResident ? kTaps : 1][kWidth];
    float* shared;  // its first tap, where it is not resident

    /// Begins to copy what the block needs of it.
    __device__ static void copy(Parameters const& p, Place const& at, char* memory) {
      Sizes const& z = p.sizes;
      int const piece = threadIdx.x % kTapPieces, first = threadIdx.x / kTapPieces;
      int const channel = at.channel + piece * (kTapPiece / kItem);
      std::int64_t const row = std::int64_t(z.channels) * z.multiplier * kItem;
      char const* const from = static_cast<char const*>(p.filter) +
                               (std::int64_t(channel) * z.multiplier + at.which) * kItem +
                               first * row;
      std::uint32_t const to = shared_address(memory) + (first * kTapPieces + piece) * kTapPiece;
      constexpr int kCopies = (kTaps + kTapsAcross - 1) / kTapsAcross;
#pragma unroll(kCopies <= 16 ? kCopies : 4)
      for (int i = 0; i < kCopies; ++i) {
        // The last taps are those of some threads only.
        bool const all = (i + 1) * kTapsAcross <= kTaps;
        if (all || int(threadIdx.x) < (kTaps - i * kTapsAcross) * kTapPieces) {
          copy_async<kTapPiece>(to + i * kTapsAcross * kTile * kItem, from + i * kTapsAcross * row,
                                channel < z.channels);
        }
      }
    }

    /// Takes a thread's channels of it from there, lines from right to left where `mirrored`. Where
    /// they are not in registers, threads of several strips read what others take.
    __device__ void load(char* memory, bool mirrored) {
      int const lane = threadIdx.x % kLanes * kWidth;
      auto const* const stored = reinterpret_cast<Element const*>(memory) + lane;
      shared = reinterpret_cast<float*>(memory + (kConverts ? kStoredBytes : 0)) + lane;
      if constexpr (kResident) {
#pragma unroll
        for (int s = 0; s < kS; ++s) {
          Element const* const from = stored + (mirrored ? kS - 1 - s : s) * kTile;
#pragma unroll
          for (int r = 0; r < kR; ++r) {
            Input found;
            found.load(from + r * kS * kTile);
#pragma unroll
            for (int v = 0; v < kWidth; ++v) taps[r * kS + s][v] = computed_once(found.get(v));
          }
        }
      } else if constexpr (kConverts) {
#pragma unroll 1
        for (int tap = threadIdx.x / kLanes; tap < kTaps; tap += kStrips) {
          Input found;
          found.load(stored + tap * kTile);
          float values[kWidth];
#pragma unroll
          for (int v = 0; v < kWidth; ++v) values[v] = found.get(v);
          Vector<float, kWidth>::template rounded<float>(values).store(shared + tap * kTile);
        }
      }
    }
    __device__ void get(int tap, float (&values)[kWidth]) const {
      Vector<float, kWidth> found;
      if constexpr (!kResident) found.load(shared + tap * kTile);
#pragma unroll
      for (int v = 0; v < kWidth; ++v) values[v] = kResident ? taps[tap][v] : found.get(v);
    }
  };

  /// A line of the filter over the inputs `x`, added to `sums`.
  __device__ static void add(float const (&x)[kInputs][kWidth], Filter const& filter, int line,
                             float (&sums)[kOutputs][kWidth]) {
#pragma unroll
    for (int s = 0; s < kS; ++s) {
      float w[kWidth];
      filter.get(line * kS + s, w);
#pragma unroll
      for (int t = 0; t < kOutputs; ++t) {
        int const u = t * kStrideW + s * kDilationW;
        if (u < kFrom || u >= kUntil) continue;
#pragma unroll
        for (int v = 0; v < kWidth; ++v) sums[t][v] = fmaf(x[u][v], w[v], sums[t][v]);
      }
    }
  }

  __device__ static void copy(float const (&from)[kOutputs][kWidth],
                              float (&to)[kOutputs][kWidth]) {
#pragma unroll
    for (int t = 0; t < kOutputs; ++t) {
#pragma unroll
      for (int v = 0; v < kWidth; ++v) to[t][v] = from[t][v];
    }
  }

  /// Moves the sums on by a slot and adds a step's products; `inputs` is where the thread's first
  /// input of the step lies. The last slots come first: each leaves its register to the one before.
  /// Not kAll: slots outside of `first` to `last` are none of the block's rows; what they hold is
  /// not used, then or later.
  template <bool kAll>
  __device__ static void multiply(char const* inputs, Filter const& filter, Sums& sums, int first,
                                  int last) {
    bool moved = false;  // known when compiled
#pragma unroll
    for (int k = 0; k < kStrideH; ++k) {
      if (!is_read(k)) continue;
      float x[kInputs][kWidth];
#pragma unroll
      for (int u = kFrom; u < kUntil; ++u) {
        Input found;
        found.load(inputs + k * kRowBytes + (u - kFrom) * kPitch);
#pragma unroll
        for (int v = 0; v < kWidth; ++v) {
          // Else every slot's branch would convert them.
          x[u][v] = kAll ? found.get(v) : computed_once(found.get(v));
        }
      }
#pragma unroll
      for (int slot = kSlots - 1; slot >= 0; --slot) {
        if (!kAll && (slot < first || slot > last)) continue;
        if (!moved) copy(sums[slot], sums[slot + 1]);
        if (line(slot, k) >= 0) add(x, filter, line(slot, k), sums[slot + 1]);
      }
      moved = true;
    }
  }

  /// As `multiply`, where all inputs are zeros.
  __device__ static void move(Sums& sums) {
#pragma unroll
    for (int slot = kSlots - 1; slot >= 0; --slot) copy(sums[slot], sums[slot + 1]);
  }

  /// The epilogue of a thread's outputs, and where they go.
  struct Writer {
    EpilogueParams<Epilogue> const& epilogue;
    Columns columns;
    char* to;              // the first output
    std::int64_t at, row;  // its element; elements from row to row
    int next;              // elements from output to output
    std::uint32_t stored;  // a bit for each of the thread's outputs that is one

    __device__ Writer(Parameters const& p, Place const& place, int channel, bool stores)
        : epilogue(p.epilogue) {
      Sizes const& z = p.sizes;
      int const col = place.col + threadIdx.x / kLanes * kOutputs;
      int const channels = z.channels * z.multiplier;
      next = place.mirrored ? -channels : channels;
      row = std::int64_t(z.cols) * channels;
      at = (std::int64_t(place.image) * z.rows + place.row) * row;
      at += std::int64_t(place.mirrored ? z.cols - 1 - col : col) * channels + channel;
      to = reinterpret_cast<char*>(epilogue.d + at);
      // The left half has all of its outputs, the right one has the others.
      int const count = z.cols - (place.mirrored ? kOutputs : col);
      stored = stores ? (1u << max(0, min(count, kOutputs))) - 1 : 0;
#pragma unroll
      for (int v = 0; v < kWidth; ++v) epilogue.load_columns(channel + v, columns[v]);
    }

    __device__ void load(Sides& sides) const { sides.load(epilogue, at, next, stored); }

    /// A row, and on to the next.
    __device__ void finish(float const (&sums)[kOutputs][kWidth], Sides const& sides) {
      int const across = next * int(sizeof(Stored));
#pragma unroll
      for (int t = 0; t < kOutputs; ++t) {
        float values[kWidth], others[array_size(Auxiliary::kCount)][kWidth];
#pragma unroll
        for (int v = 0; v < kWidth; ++v) {
          float s[array_size(Epilogue::kSides)], d[array_size(Auxiliary::kCount)];
          sides.get(t, v, s);
          values[v] = apply<Epilogue>(sums[t][v], columns[v], s, d);
          for (int k = 0; k < Auxiliary::kCount; ++k) others[k][v] = d[k];
        }
        if (!(stored >> t & 1)) continue;
        Vector<Stored, kWidth>::template rounded<Output>(values).store(to +
                                                                       std::int64_t(t) * across);
        for_each_index<Auxiliary::kCount>([&](auto index) {
          constexpr int k = decltype(index)::value;
          using Type = TypeAt<k, Auxiliary>;
          Vector<Storage<Type>, kWidth>::template rounded<Type>(others[k]).store(
              epilogue.template output<k>() + at + std::int64_t(t) * next);
        });
      }
      at += row;
      to += row * int(sizeof(Stored));
    }
  };

  __device__ static void synchronize() {
    if constexpr (kThreads == 32) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }

  __device__ static void run(Parameters const& p) {
    extern __shared__ __align__(16) char memory[];
    Sizes const& z = p.sizes;
    Place const at(z);
    int const lane = threadIdx.x % kLanes, strip = threadIdx.x / kLanes;
    // Threads beyond the channels run along on the last ones and store nothing.
    int const wanted = at.channel + lane * kWidth;
    int const channel = min(wanted, z.channels - kWidth) * z.multiplier + at.which;

    // No step is spent on rows below the image, nor on those above it that only begin sums, but for
    // one where there are no others.
    int const steps = at.rows + kSlots - 1;
    int const begin = min(max(-at.input_row, 0) / kStrideH, kSlots - 1);
    int const below = (z.height - at.input_row + kStrideH - 1) / kStrideH;
    int const end = min(max(below, begin + 1), steps);

    char* const ring = memory + kFilterBytes;
    Loader loader(p, at, ring);
    loader.skip(begin);
    begin_after_earlier_kernels();
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) {
      // No branch: what is asked for after it would wait at it.
      loader.step(begin + i < end);
      if (i == 0) Filter::copy(p, at, memory);
      commit_copies();
    }
    Writer out(p, at, channel, wanted < z.channels);
    wait_for_copies<kStages - 2>();
    synchronize();
    Filter filter;
    filter.load(memory, at.mirrored);

    Sums sums = {};
    char const* const first = ring + strip * kOutputs * kStrideW * kPitch + lane * kWidth * kItem;
    char const* inputs = first;
    int step = begin;
#pragma unroll 1
    do {
      wait_for_copies<kStages - 2>();
      synchronize();
      if (step + kStages - 1 < end) loader.step();
      commit_copies();
      bool const finishes = step >= kSlots - 1;
      Sides sides;
      if (finishes) out.load(sides);
      // Slot i is the chunk's row `step - i`.
      int const row = step - at.rows;
      if (!kLeavesOut || (finishes && row < 0)) {
        multiply<true>(inputs, filter, sums, 0, kSlots - 1);
      } else {
        multiply<false>(inputs, filter, sums, row + 1, step);
      }
      if (finishes) out.finish(sums[kSlots], sides);
      inputs += kStepBytes;
      if (inputs == first + kStages * kStepBytes) inputs = first;
    } while (++step < end);
    auto const finish = [&](float const(&finished)[kOutputs][kWidth]) {
      if (step >= kSlots - 1) {
        Sides sides;
        out.load(sides);
        out.finish(finished, sides);
      }
    };
    if constexpr (kEndsInPlace) {
#pragma unroll
      for (int slot = kSlots - 1; slot > 0; --slot) {
        if (step >= steps) return;
        finish(sums[slot]);
        ++step;
      }
#pragma unroll 1
      for (; step < steps; ++step) finish(sums[0]);
    } else {
#pragma unroll 1
      for (; step < steps; ++step) {
        move(sums);
        finish(sums[kSlots]);
      }
    }
  }
};

}  // namespace jax_bolt::depthwise
#endif  // JAX_BOLT_DEPTHWISE_DEPTHWISE_HPP_
