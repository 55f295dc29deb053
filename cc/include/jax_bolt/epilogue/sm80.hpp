// SPDX-License-Identifier: Apache-2.0
// The epilogue of the sm80 kernels (CUTLASS 2.x mainloops): accumulators of one CTA's tile to D.
//
// Accumulators change hands through shared memory, 8 rows of every warp's tile at a time (a step),
// so that each thread ends up with kAccess neighbouring elements of a row: one vector access for
// each output and for each side input. The functor sees f32 values only.
#ifndef JAX_BOLT_EPILOGUE_SM80_HPP_
#define JAX_BOLT_EPILOGUE_SM80_HPP_

#include <type_traits>

#include "cutlass/array.h"
#include "cutlass/cutlass.h"
#include "cutlass/epilogue/threadblock/default_epilogue_tensor_op.h"
#include "cutlass/numeric_conversion.h"
#include "jax_bolt/epilogue/math.hpp"
#include "jax_bolt/epilogue/traits.hpp"

namespace jax_bolt {

/// N elements of T that one thread moves together, in accesses of up to 16 bytes.
template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Packet {
  T data[N];
};

/// N packets, one of every side input of a functor.
template <class Sides, int N>
struct SidePackets;
template <int N>
struct SidePackets<Types<>, N> {};
template <class Head, class... Tail, int N>
struct SidePackets<Types<Head, Tail...>, N> {
  Packet<Storage<Head>, N> head;
  SidePackets<Types<Tail...>, N> tail;

  template <int I>
  JAX_BOLT_HOST_DEVICE auto& get() {
    if constexpr (I == 0) {
      return head;
    } else {
      return tail.template get<I - 1>();
    }
  }
};

/// f32 to the stored type, two at a time where the hardware can.
template <class Output, int N>
JAX_BOLT_DEVICE Packet<Storage<Output>, N> to_packet(cutlass::Array<float, N> const& values) {
  Packet<Storage<Output>, N> packet;
  if constexpr (std::is_same_v<Output, bool> || std::is_same_v<Output, float>) {
    for (int i = 0; i < N; ++i) packet.data[i] = from_float<Output>(values[i]);
  } else {
    auto const converted = cutlass::NumericArrayConverter<Output, float, N>::convert(values);
    for (int i = 0; i < N; ++i) packet.data[i] = converted[i];
  }
  return packet;
}

/// Functor: the generated epilogue. TileShape: the CTA's tile. WarpMma: the mainloop's warp-level
/// operator. kAccess: elements of a row one thread handles at once; it must divide N.
template <class Functor, class TileShape, class WarpMma, int kAccess>
class EpilogueSm80 {
  using WarpShape = typename WarpMma::Shape;
  using Output = Storage<typename Functor::Output>;
  using Auxiliary = AuxiliaryOf<Functor>;
  static constexpr int kAuxiliary = Auxiliary::kCount;

  // CUTLASS takes a conflict-free exchange for half_t, and only the width of D matters to it.
  using Exchange = std::conditional_t<sizeof(Output) == 2, cutlass::half_t, float>;
  static_assert(sizeof(Output) != 2 || kAccess != 8 || WarpShape::kN == 64 || WarpShape::kN == 32,
                "CUTLASS's mixed-width exchange covers 32 or 64 columns of a warp");
  static_assert(WarpShape::kK == TileShape::kK, "warps that split K are not supported");

  struct OutputOp {
    using ElementOutput = Exchange;
  };
  using Parts = cutlass::epilogue::threadblock::DefaultEpilogueTensorOp<TileShape, WarpMma, 1,
                                                                        OutputOp, kAccess>;
  using ThreadMap = typename Parts::OutputTileThreadMap;
  using FragmentIterator = typename Parts::AccumulatorFragmentIterator;
  using WarpTileIterator = typename Parts::WarpTileIterator;
  using SharedLoadIterator = typename Parts::SharedLoadIterator;
  using Base =
      cutlass::epilogue::threadblock::EpilogueBase<TileShape, WarpShape, 1, FragmentIterator,
                                                   WarpTileIterator, typename Parts::Padding>;

  static constexpr int kTileN = TileShape::kN;
  static constexpr int kSteps = ThreadMap::Count::kTile;
  static constexpr int kStepRows = ThreadMap::Shape::kRow;
  static constexpr int kAccesses = ThreadMap::Iterations::kCount;
  static constexpr int kColumnAccesses = ThreadMap::Iterations::kColumn;
  static_assert(kSteps == FragmentIterator::kIterations, "a step is 8 rows of a warp's tile");

  static constexpr int kColumns = Functor::kColumns;
  static constexpr int kSides = Functor::kSides;
  using Sides = SidePackets<typename Functor::Sides, kAccess>;

  // Side inputs come from device memory, hundreds of cycles away, and a step takes about a hundred:
  // as many steps ahead as 48 registers hold, 4 at most.
  static constexpr int ahead(int bytes) {
    int steps = kSides == 0 ? 1 : 4;
    while (steps > 1 && (steps * bytes > 48 * 4 || kSteps % steps != 0)) steps /= 2;
    return steps;
  }
  static constexpr int kAhead = ahead(kAccesses * int(sizeof(Sides)));

  // Above this many, hoisted values are read again from shared memory at every step.
  static constexpr int kMaxResident = 48;
  static constexpr bool kResident = kColumnAccesses * kAccess * kColumns <= kMaxResident;

 public:
  using AccumulatorTile = typename Base::AccumulatorTile;
  /// One thread's side inputs of a step.
  using StepSides = Sides[kAccesses];
  static constexpr int kThreads = ThreadMap::kThreads;

  /// The hoisted values of the tile's columns. Not part of SharedStorage, which the caller overlays
  /// on the mainloop's.
  struct alignas(16) ColumnStorage {
    float values[array_size(kColumns)][kTileN];
  };
  struct SharedStorage {
    typename Base::SharedStorage exchange[2];
  };

  /// rows, channels: the extent of D (of one batch entry). row, channel: the tile's first.
  /// offset: of the batch entry's D and side inputs, in elements.
  JAX_BOLT_DEVICE EpilogueSm80(EpilogueParams<Functor> const& params, ColumnStorage& columns,
                               SharedStorage& storage, int rows, int channels, int row, int channel,
                               std::int64_t offset, int thread)
      : params_(params),
        columns_(columns),
        base_(storage.exchange[0], thread, thread / 32, thread % 32),
        loader_(storage.exchange[0].reference(), thread),
        rows_(rows),
        channels_(channels),
        tile_column_(ThreadMap::initial_offset(thread).column()),
        row_(row + ThreadMap::initial_offset(thread).row()),
        channel_(channel + tile_column_),
        offset_(offset) {}

  /// The per-channel inputs of a tile as one CTA's threads hold them between load and store.
  struct RawColumns {
    static constexpr int kChannels = (kTileN + kThreads - 1) / kThreads;
    std::uint32_t raw[kChannels][array_size(Functor::kVectors)];

    /// Starts loading. Before the mainloop, so that memory's latency hides behind it.
    JAX_BOLT_DEVICE void load(EpilogueParams<Functor> const& params, int channels, int channel,
                              int thread) {
      if constexpr (kColumns > 0) {
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < kChannels; ++i) {
          int const column = thread + i * kThreads;
          for (auto& bits : raw[i]) bits = 0;
          if (column < kTileN && channel + column < channels) {
            params.load_raw_vectors(channel + column, raw[i]);
          }
        }
      }
    }

    /// Computes the hoisted values, once for each column of the tile. Sync after.
    JAX_BOLT_DEVICE void store(ColumnStorage& columns, int thread) const {
      if constexpr (kColumns > 0) {
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < kChannels; ++i) {
          int const column = thread + i * kThreads;
          if (column < kTileN) {
            float c[array_size(kColumns)];
            EpilogueParams<Functor>::columns(raw[i], c);
            for (int k = 0; k < kColumns; ++k) columns.values[k][column] = c[k];
          }
        }
      }
    }
  };

  /// Writes the tile. All threads of the CTA call it, after a sync that ends the mainloop's use of
  /// the overlaid storage.
  JAX_BOLT_DEVICE void run(AccumulatorTile const& accumulators) {
    StepSides ring[kAhead];
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kAhead; ++i) load_sides(i, ring[i]);
    put(accumulators, 0);
    __syncthreads();
    load_columns();

    // Rolled up by `ahead`: an activation's code is long, and 128 copies of it overflow the
    // instruction cache (and nvcc's patience).
    CUTLASS_PRAGMA_NO_UNROLL
    for (int first = 0; first < kSteps; first += kAhead) {
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kAhead; ++i) {
        int const step = first + i;
        // The other buffer: its readers finished before the last sync.
        if (step + 1 < kSteps) put(accumulators, step + 1);
        finish(step, ring[i]);
        if (step + kAhead < kSteps) load_sides(step + kAhead, ring[i]);
        if (step + 1 < kSteps) __syncthreads();
      }
    }
  }

  // The parts of run(), public so that a host test can drive them thread by thread.

  /// Stores this warp's fragment of `step` to the exchange buffer whose turn it is.
  JAX_BOLT_DEVICE void put(AccumulatorTile const& accumulators, int step) {
    put_from<0>(accumulators, step);
    base_.warp_tile().add_pointer_offset(step % 2 ? -kBufferElements : kBufferElements);
  }

  JAX_BOLT_DEVICE void load_columns() {
    if constexpr (kResident) {
      CUTLASS_PRAGMA_UNROLL
      for (int a = 0; a < kColumnAccesses; ++a) read_columns(a, resident_[a]);
    }
  }

  JAX_BOLT_DEVICE void load_sides(int step, StepSides& sides) const {
    if constexpr (kSides > 0) {
      CUTLASS_PRAGMA_UNROLL
      for (int a = 0; a < kAccesses; ++a) {
        Place const place = locate(step, a);
        for_each_index<kSides>([&](auto index) {
          constexpr int i = decltype(index)::value;
          auto& packet = sides[a].template get<i>();
          using Loaded = std::remove_reference_t<decltype(packet)>;
          packet = Loaded{};
          if (place.inside) {
            packet = *reinterpret_cast<Loaded const*>(params_.template side<i>() + place.offset);
          }
        });
      }
    }
  }

  /// Applies the functor to the elements of `step` and stores them.
  JAX_BOLT_DEVICE void finish(int step, StepSides& sides) {
    typename SharedLoadIterator::Fragment fragment;
    loader_.load(fragment);
    loader_.add_pointer_offset(step % 2 ? -kBufferElements : kBufferElements);

    CUTLASS_PRAGMA_UNROLL
    for (int a = 0; a < kAccesses; ++a) {
      ColumnValues reread;
      if constexpr (!kResident) read_columns(a % kColumnAccesses, reread);
      ColumnValues const& columns = kResident ? resident_[a % kColumnAccesses] : reread;
      cutlass::Array<float, kAccess> values, auxiliary[array_size(kAuxiliary)];
      CUTLASS_PRAGMA_UNROLL
      for (int e = 0; e < kAccess; ++e) {
        float s[array_size(kSides)] = {};
        if constexpr (kSides > 0) {
          for_each_index<kSides>([&](auto index) {
            constexpr int i = decltype(index)::value;
            s[i] = to_float(sides[a].template get<i>().data[e]);
          });
        }
        float others[array_size(kAuxiliary)];
        values[e] = apply<Functor>(fragment[a * kAccess + e], columns.values[e], s, others);
        for (int i = 0; i < kAuxiliary; ++i) auxiliary[i][e] = others[i];
      }
      Place const place = locate(step, a);
      auto const packet = to_packet<typename Functor::Output, kAccess>(values);
      if (place.inside) {
        *reinterpret_cast<Packet<Output, kAccess>*>(params_.d + place.offset) = packet;
      }
      for_each_index<kAuxiliary>([&](auto index) {
        constexpr int i = decltype(index)::value;
        using Type = TypeAt<i, Auxiliary>;
        auto const other = to_packet<Type, kAccess>(auxiliary[i]);
        if (place.inside) {
          auto* to = params_.template output<i>() + place.offset;
          *reinterpret_cast<Packet<Storage<Type>, kAccess>*>(to) = other;
        }
      });
    }
  }

 private:
  // EpilogueBase keeps its iterator to itself and its heirs.
  struct Exchanger : Base {
    using Base::Base;
    JAX_BOLT_DEVICE WarpTileIterator& warp_tile() { return this->warp_tile_iterator_; }
  };

  struct ColumnValues {
    float values[kAccess][array_size(kColumns)];
  };

  struct Place {
    std::int64_t offset;
    bool inside;
  };

  static constexpr int kBufferElements = int(sizeof(typename Base::SharedStorage) / sizeof(float));

  /// Where access `a` of `step` lies in D. N is a multiple of kAccess, so an access that begins
  /// inside a row ends inside it.
  JAX_BOLT_DEVICE Place locate(int step, int a) const {
    auto const delta = ThreadMap::iteration_offset(a);
    int const row = row_ + step * kStepRows + delta.row();
    int const channel = channel_ + delta.column();
    return {offset_ + std::int64_t(row) * channels_ + channel, row < rows_ && channel < channels_};
  }

  JAX_BOLT_DEVICE void read_columns(int access, ColumnValues& out) const {
    if constexpr (kColumns == 0) {
      for (int e = 0; e < kAccess; ++e) out.values[e][0] = 0.0f;
    } else {
      int const column = tile_column_ + access * ThreadMap::Delta::kColumn;
      CUTLASS_PRAGMA_UNROLL
      for (int k = 0; k < kColumns; ++k) {
        auto const packet =
            *reinterpret_cast<Packet<float, kAccess> const*>(&columns_.values[k][column]);
        CUTLASS_PRAGMA_UNROLL
        for (int e = 0; e < kAccess; ++e) out.values[e][k] = packet.data[e];
      }
    }
  }

  // Accumulators are registers, which have no run-time index: a chain of uniform branches instead.
  template <int kStep>
  JAX_BOLT_DEVICE void put_from(AccumulatorTile const& accumulators, int step) {
    if constexpr (kStep < kSteps) {
      if (step == kStep) {
        FragmentIterator iterator(accumulators);
        typename FragmentIterator::Fragment fragment;
        iterator.load(fragment, kStep);
        base_.warp_tile().store(fragment);
      } else {
        put_from<kStep + 1>(accumulators, step);
      }
    }
  }

  EpilogueParams<Functor> const& params_;
  ColumnStorage& columns_;
  Exchanger base_;
  SharedLoadIterator loader_;
  int rows_;
  int channels_;
  int tile_column_;
  int row_;
  int channel_;
  std::int64_t offset_;
  ColumnValues resident_[kResident ? kColumnAccesses : 1];
};

}  // namespace jax_bolt
#endif  // JAX_BOLT_EPILOGUE_SM80_HPP_
