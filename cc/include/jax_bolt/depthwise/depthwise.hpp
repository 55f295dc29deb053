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
/// pixels takes kPitch bytes and is copied in pieces of kPiece bytes. kResident: the filter is in
/// registers, not in shared memory. kCtas: blocks that an SM should hold.
template <class Epilogue_, class Element, int kR, int kS, int kStrideH, int kStrideW,
          int kDilationH, int kDilationW, int kWidth, int kOutputs, int kLanes, int kStrips,
          int kStages, int kPitch, int kPiece, bool kResident, int kCtas_>
struct Depthwise {
  using Epilogue = Epilogue_;
  using Parameters = Params<Epilogue>;
  using Output = typename Epilogue::Output;
  using Stored = Storage<Output>;
  using Auxiliary = AuxiliaryOf<Epilogue>;
  using Input = Vector<Element, kWidth>;

  static constexpr int kThreads = kLanes * kStrips;
  static constexpr int kCtas = kCtas_;
  static constexpr int kTaps = kR * kS;
  static constexpr int kReachH = (kR - 1) * kDilationH, kReachW = (kS - 1) * kDilationW;
  /// Output rows that one step's input rows count for.
  static constexpr int kSlots = kReachH / kStrideH + 1;
  /// Steps at a chunk's beginning and end in which only as many first and last slots count. Not
  /// worth their code where slots are few.
  static constexpr int kEdge = kSlots >= 5 ? kSlots / 2 : 0;
  /// Input columns of a thread and of a block.
  static constexpr int kInputs = (kOutputs - 1) * kStrideW + kReachW + 1;
  static constexpr int kColumns = (kStrips * kOutputs - 1) * kStrideW + kReachW + 1;
  static constexpr int kTile = kLanes * kWidth;  // channels of a block
  static constexpr int kItem = sizeof(Element);
  static constexpr int kPieces = kTile * kItem / kPiece;  // of a column
  static constexpr int kAcross = kThreads / kPieces;      // columns that all threads copy at once
  static constexpr int kLoads = (kColumns + kAcross - 1) / kAcross;
  static constexpr int kRowBytes = kColumns * kPitch;
  static constexpr int kStepBytes = kStrideH * kRowBytes;  // input rows from step to step
  static constexpr int kFilterBytes = kResident ? 0 : kTaps * kTile * 4;
  static_assert(kThreads % 32 == 0 && kStages >= 2);
  static_assert(kTile * kItem % kPiece == 0 && kPitch % kPiece == 0 && kPitch >= kTile * kItem);
  static_assert(kThreads % kPieces == 0 && kLoads <= 32, "a bit for each piece of a thread");

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
  /// of the output channels that read an input channel it has.
  struct Place {
    int image, row, col, rows;
    int input_row, input_col, channel, which;

    __device__ explicit Place(Sizes const& z) {
      int rest = blockIdx.x;
      channel = rest % z.channel_tiles * kTile;
      rest /= z.channel_tiles;
      which = rest % z.multiplier;
      rest /= z.multiplier;
      col = rest % z.col_tiles * (kStrips * kOutputs);
      rest /= z.col_tiles;
      row = rest % z.chunks * z.chunk_rows;
      image = rest / z.chunks;
      rows = min(z.chunk_rows, z.rows - row);
      input_row = row * kStrideH - z.pad_top;
      input_col = col * kStrideW - z.pad_left;
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
      across = kAcross * z.channels * kItem;
      from = static_cast<char const*>(p.x) +
             (std::int64_t(at.image) * z.height + at.input_row) * row_bytes +
             (std::int64_t(at.input_col + first) * z.channels + channel) * kItem;
      inside = 0;
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        int const col = at.input_col + first + i * kAcross;
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

    /// Begins to copy the next step's rows.
    __device__ void step() {
#pragma unroll
      for (int k = 0; k < kStrideH; ++k) {
        if (!is_read(k)) continue;
        bool const valid = row + k >= 0 && row + k < height;
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

    __device__ void load(Parameters const& p, int channels, int channel, char* memory) {
      shared = reinterpret_cast<float*>(memory) + threadIdx.x % kLanes * kWidth;
      auto const* from = static_cast<Element const*>(p.filter) + channel;
      // Else each strip has some of the taps; threads of several strips read them.
      int const first = kResident ? 0 : threadIdx.x / kLanes;
#pragma unroll(kResident ? kTaps : 1)
      for (int tap = first; tap < kTaps; tap += kResident ? 1 : kStrips) {
        Input found;
        found.load(from + std::int64_t(tap) * channels);
        float values[kWidth];
#pragma unroll
        for (int v = 0; v < kWidth; ++v) values[v] = found.get(v);
        if constexpr (kResident) {
#pragma unroll
          for (int v = 0; v < kWidth; ++v) taps[tap][v] = computed_once(values[v]);
        } else {
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

  /// A line of the filter over the inputs `x`, added to `from`.
  __device__ static void add(float const (&x)[kInputs][kWidth], Filter const& filter, int line,
                             float const (&from)[kOutputs][kWidth], float (&to)[kOutputs][kWidth]) {
#pragma unroll
    for (int s = 0; s < kS; ++s) {
      float w[kWidth];
      filter.get(line * kS + s, w);
#pragma unroll
      for (int t = 0; t < kOutputs; ++t) {
#pragma unroll
        for (int v = 0; v < kWidth; ++v) {
          float const before = s == 0 ? from[t][v] : to[t][v];
          to[t][v] = fmaf(x[t * kStrideW + s * kDilationW][v], w[v], before);
        }
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
  /// Slots outside of kFirst to kLast are none of the block's rows, and what they hold is not used.
  template <int kFirst, int kLast>
  __device__ static void multiply(char const* inputs, Filter const& filter, Sums& sums) {
    bool moved = false;  // known when compiled
#pragma unroll
    for (int k = 0; k < kStrideH; ++k) {
      if (!is_read(k)) continue;
      float x[kInputs][kWidth];
#pragma unroll
      for (int u = 0; u < kInputs; ++u) {
        Input found;
        found.load(inputs + k * kRowBytes + u * kPitch);
#pragma unroll
        for (int v = 0; v < kWidth; ++v) x[u][v] = found.get(v);
      }
#pragma unroll
      for (int slot = kLast; slot >= kFirst; --slot) {
        auto const& from = sums[moved ? slot + 1 : slot];
        if (line(slot, k) >= 0) {
          add(x, filter, line(slot, k), from, sums[slot + 1]);
        } else if (!moved) {
          copy(from, sums[slot + 1]);
        }
      }
      moved = true;
    }
  }

  /// As `multiply`, where all inputs are zeros.
  __device__ static void move(Sums& sums) {
#pragma unroll
    for (int slot = kSlots - 1; slot >= 0; --slot) copy(sums[slot], sums[slot + 1]);
  }

  /// The side inputs of a thread's outputs in one row, as they are stored.
  struct Sides {
    template <int kSide>
    using Type = Storage<TypeAt<kSide, typename Epilogue::Sides>>;
    std::uint32_t words[array_size(Epilogue::kSides)][kOutputs][kWidth];  // enough for f32

    __device__ void load(EpilogueParams<Epilogue> const& epilogue, std::int64_t at, int channels,
                         int count) {
      for_each_index<Epilogue::kSides>([&](auto index) {
        constexpr int i = decltype(index)::value;
        auto const* const from = epilogue.template side<i>() + at;
#pragma unroll
        for (int t = 0; t < kOutputs; ++t) {
          Vector<Type<i>, kWidth> found = {};
          if (t < count) found.load(from + std::int64_t(t) * channels);
#pragma unroll
          for (int w = 0; w < found.kWords; ++w) words[i][t][w] = found.words[w];
        }
      });
    }
    __device__ void get(int t, int v, float (&s)[array_size(Epilogue::kSides)]) const {
      s[0] = 0.0f;
      for_each_index<Epilogue::kSides>([&](auto index) {
        constexpr int i = decltype(index)::value;
        Vector<Type<i>, kWidth> found;
#pragma unroll
        for (int w = 0; w < found.kWords; ++w) found.words[w] = words[i][t][w];
        s[i] = found.get(v);
      });
    }
  };

  /// The epilogue of a thread's outputs, and where they go.
  struct Writer {
    EpilogueParams<Epilogue> const& epilogue;
    Columns columns;
    char* to;              // the first output
    std::int64_t at, row;  // its element; elements from row to row
    int channels, count;   // of the output; the thread's outputs

    __device__ Writer(Parameters const& p, Place const& place, int channel, bool stores)
        : epilogue(p.epilogue) {
      Sizes const& z = p.sizes;
      int const col = place.col + threadIdx.x / kLanes * kOutputs;
      channels = z.channels * z.multiplier;
      row = std::int64_t(z.cols) * channels;
      at = (std::int64_t(place.image) * z.rows + place.row) * row;
      at += std::int64_t(col) * channels + channel;
      to = reinterpret_cast<char*>(epilogue.d + at);
      count = stores ? z.cols - col : 0;
#pragma unroll
      for (int v = 0; v < kWidth; ++v) epilogue.load_columns(channel + v, columns[v]);
    }

    __device__ void load(Sides& sides) const { sides.load(epilogue, at, channels, count); }

    /// A row, and on to the next.
    __device__ void finish(float const (&sums)[kOutputs][kWidth], Sides const& sides) {
      int const across = channels * int(sizeof(Stored));
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
        if (t >= count) continue;
        Vector<Stored, kWidth>::template rounded<Output>(values).store(to +
                                                                       std::int64_t(t) * across);
        for_each_index<Auxiliary::kCount>([&](auto index) {
          constexpr int k = decltype(index)::value;
          using Type = TypeAt<k, Auxiliary>;
          Vector<Storage<Type>, kWidth>::template rounded<Type>(others[k]).store(
              epilogue.template output<k>() + at + std::int64_t(t) * channels);
        });
      }
      at += row;
      to += row * int(sizeof(Stored));
    }
  };

  __device__ static void run(Parameters const& p) {
    extern __shared__ __align__(16) char memory[];
    Sizes const& z = p.sizes;
    Place const at(z);
    int const lane = threadIdx.x % kLanes, strip = threadIdx.x / kLanes;
    // Threads beyond the channels run along on the last ones and store nothing.
    int const wanted = at.channel + lane * kWidth;
    int const channel = min(wanted, z.channels - kWidth) * z.multiplier + at.which;

    // No step is spent on rows below the image, nor on those above it that only begin sums.
    int const steps = at.rows + kSlots - 1;
    int const begin = min(max(-at.input_row, 0) / kStrideH, kSlots - 1);
    int const below = (z.height - at.input_row + kStrideH - 1) / kStrideH;
    int const end = min(max(below, begin), steps);

    char* const ring = memory + kFilterBytes;
    Loader loader(p, at, ring);
    loader.skip(begin);
    begin_after_earlier_kernels();
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) {
      if (begin + i < end) loader.step();
      commit_copies();
    }
    Filter filter;
    filter.load(p, z.channels * z.multiplier, channel, memory);
    Writer out(p, at, channel, wanted < z.channels);

    Sums sums = {};
    char const* const first = ring + strip * kOutputs * kStrideW * kPitch + lane * kWidth * kItem;
    char const* inputs = first;
    int step = begin;
    auto const run_until = [&](int limit, auto first_slot, auto last_slot) {
      constexpr int kFirst = decltype(first_slot)::value, kLast = decltype(last_slot)::value;
#pragma unroll 1
      for (; step < limit; ++step) {
        wait_for_copies<kStages - 2>();
        __syncthreads();
        if (step + kStages - 1 < end) loader.step();
        commit_copies();
        bool const finishes = kLast == kSlots - 1 && step >= kSlots - 1;
        Sides sides;
        if (finishes) out.load(sides);
        multiply<kFirst, kLast>(inputs, filter, sums);
        if (finishes) out.finish(sums[kSlots], sides);
        inputs += kStepBytes;
        if (inputs == first + kStages * kStepBytes) inputs = first;
      }
    };
    if constexpr (kEdge > 0) run_until(min(kEdge, end), Index<0>{}, Index<kEdge - 1>{});
    run_until(min(steps - kEdge, end), Index<0>{}, Index<kSlots - 1>{});
    if constexpr (kEdge > 0) run_until(end, Index<kSlots - kEdge>{}, Index<kSlots - 1>{});
#pragma unroll 1
    for (; step < steps; ++step) {
      move(sums);
      if (step < kSlots - 1) continue;
      Sides sides;
      out.load(sides);
      out.finish(sums[kSlots], sides);
    }
  }
};

}  // namespace jax_bolt::depthwise
#endif  // JAX_BOLT_DEPTHWISE_DEPTHWISE_HPP_
