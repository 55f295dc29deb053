// SPDX-License-Identifier: Apache-2.0
// The generated epilogue as a visitor of CUTLASS's sm90 TMA collective epilogue.
//
// One node does it all: at the start of a CTA tile its threads evaluate Epilogue::columns() once
// per channel into shared memory; then every fragment of accumulators goes through
// Epilogue::apply() with its channels' columns and its side inputs. Side 0 is the collective's
// source tensor (C), side 1 an auxiliary TMA load; both are children of the node.
#ifndef JAX_BOLT_EPILOGUE_SM90_HPP_
#define JAX_BOLT_EPILOGUE_SM90_HPP_

#include "cutlass/cutlass.h"
#include "cutlass/epilogue/fusion/callbacks.hpp"

// The primary template lives in an umbrella header that parses every architecture's epilogue;
// naming it is enough for the one specialisation used here, and takes seconds less.
namespace cutlass::epilogue::collective {
template <class DispatchPolicy, class... Args>
class CollectiveEpilogue;
}  // namespace cutlass::epilogue::collective

// The .inl files use what the headers before them define.
// clang-format off
#include "cutlass/epilogue/collective/sm90_epilogue_tma_warpspecialized.hpp"
#include "cutlass/epilogue/collective/builders/sm90_common.inl"
#include "cutlass/gemm/collective/builders/sm90_common.inl"
// clang-format on
#include "jax_bolt/epilogue/math.hpp"
#include "jax_bolt/epilogue/traits.hpp"

namespace jax_bolt {
namespace sm90 {

namespace fusion = cutlass::epilogue::fusion;

/// Shared memory of the hoisted columns: `kFloats` may be 0, and C++ has no empty arrays.
template <int kFloats>
struct ColumnStorage {
  alignas(16) float values[kFloats];
  CUTLASS_HOST_DEVICE float* data() const { return const_cast<float*>(values); }
};
template <>
struct ColumnStorage<0> {
  CUTLASS_HOST_DEVICE float* data() const { return nullptr; }
};

/// The visitor node: fragments of (accumulator, side 0, side 1) to fragments of the output.
template <class Epilogue, class TileShape>
struct EpilogueNode {
  static constexpr int kTileM = cute::size<0>(TileShape{});
  static constexpr int kTileN = cute::size<1>(TileShape{});
  static constexpr int kColumns = Epilogue::kColumns;
  // Registers hold a subtile's columns while the loop walks down the rows below it; past this
  // count they would crowd out the accumulators, and are read again for each subtile instead.
  static constexpr int kMaxHeldColumns = 4;
  using Output = Storage<typename Epilogue::Output>;

  using SharedStorage = ColumnStorage<kColumns * kTileN>;
  using Arguments = EpilogueParams<Epilogue>;
  using Params = Arguments;

  template <class ProblemShape>
  static constexpr Params to_underlying_arguments(ProblemShape const&, Arguments const& args,
                                                  void*) {
    return args;
  }
  template <class ProblemShape>
  static bool can_implement(ProblemShape const&, Arguments const&) {
    return true;
  }
  template <class ProblemShape>
  static size_t get_workspace_size(ProblemShape const&, Arguments const&) {
    return 0;
  }
  template <class ProblemShape>
  static cutlass::Status initialize_workspace(ProblemShape const&, Arguments const&, void*,
                                              cudaStream_t, cutlass::CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }

  CUTLASS_HOST_DEVICE EpilogueNode() {}
  CUTLASS_HOST_DEVICE EpilogueNode(Params const& params, SharedStorage const& storage)
      : params_(&params), columns_(storage.data()) {}

  Params const* params_ = nullptr;
  float* columns_ = nullptr;  // [kColumns][kTileN]

  CUTLASS_DEVICE bool is_producer_load_needed() const { return false; }
  CUTLASS_DEVICE bool is_C_load_needed() const { return false; }

  template <class... Args>
  CUTLASS_DEVICE auto get_producer_load_callbacks(
      fusion::detail::ProducerLoadArgs<Args...> const&) {
    return fusion::detail::EmptyProducerLoadCallbacks{};
  }

  /// Smem and Regs: (CPY,CPY_M,CPY_N,EPI_M,EPI_N,kColumns) and (CPY,CPY_M,CPY_N,kColumns).
  template <int kThreads, class Smem, class Regs>
  struct ConsumerStoreCallbacks : fusion::detail::EmptyConsumerStoreCallbacks {
    Params const* params;
    float* columns;
    int thread;
    int first_channel;
    int channels;  // of the problem
    Smem smem;
    Regs regs;

    CUTLASS_DEVICE ConsumerStoreCallbacks(Params const* params_, float* columns_, int thread_,
                                          int first_channel_, int channels_, Smem const& smem_,
                                          Regs const& regs_)
        : params(params_),
          columns(columns_),
          thread(thread_),
          first_channel(first_channel_),
          channels(channels_),
          smem(smem_),
          regs(regs_) {}

    // The collective synchronises its threads between the last read of one tile and the next
    // tile's begin(), and (begin_sync_needed) between begin() and the first read.
    CUTLASS_DEVICE void begin() {
      if constexpr (kColumns > 0) {
        CUTLASS_PRAGMA_UNROLL
        for (int j = thread; j < kTileN; j += kThreads) {
          float c[kColumns] = {};
          if (first_channel + j < channels) params->load_columns(first_channel + j, c);
          CUTLASS_PRAGMA_UNROLL
          for (int k = 0; k < kColumns; ++k) columns[k * kTileN + j] = c[k];
        }
      }
    }

    CUTLASS_DEVICE bool begin_sync_needed() const { return kColumns > 0; }

    CUTLASS_DEVICE void previsit(int epi_m, int epi_n, int, bool) {
      if constexpr (kColumns > 0) {
        // Subtiles are visited down the rows first: epi_m == 0 starts new channels.
        if (epi_m == 0 || kColumns > kMaxHeldColumns) {
          using cute::_;
          cute::copy_aligned(cute::filter_zeros(smem(_, _, _, epi_m, epi_n, _)),
                             cute::filter_zeros(regs));
        }
      }
    }

    template <class Accumulator, int kSize, class... Sides>
    CUTLASS_DEVICE cutlass::Array<Output, kSize> visit(
        cutlass::Array<Accumulator, kSize> const& acc, int epi_v, int, int,
        cutlass::Array<Sides, kSize> const&... sides) {
      static_assert(sizeof...(Sides) == Epilogue::kSides);
      cutlass::Array<float, kSize> wide[array_size(Epilogue::kSides)];
      int next = 0;
      ((wide[next++] = cutlass::NumericArrayConverter<float, Sides, kSize>{}(sides)), ...);

      cutlass::Array<float, kSize> result;
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kSize; ++i) {
        float c[array_size(kColumns)] = {};
        float s[array_size(Epilogue::kSides)] = {};
        if constexpr (kColumns > 0) {
          using cute::_;
          CUTLASS_PRAGMA_UNROLL
          for (int k = 0; k < kColumns; ++k) c[k] = regs(_, _, _, k)(epi_v * kSize + i);
        }
        CUTLASS_PRAGMA_UNROLL
        for (int k = 0; k < Epilogue::kSides; ++k) s[k] = wide[k][i];
        result[i] = Epilogue::apply(acc[i], c, s);
      }
      return cutlass::NumericArrayConverter<Output, float, kSize>{}(result);
    }
  };

  template <bool ReferenceSrc, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(
      fusion::detail::ConsumerStoreArgs<Args...> const& args) {
    using namespace cute;
    constexpr int kThreads = decltype(size(args.tiled_copy))::value;
    int const first_channel = get<1>(args.tile_coord_mnkl) * kTileN;
    int const channels = get<1>(args.problem_shape_mnkl);
    if constexpr (kColumns > 0) {
      Tensor tile = make_tensor(make_smem_ptr(columns_),
                                make_shape(Int<kTileM>{}, Int<kTileN>{}, Int<kColumns>{}),
                                make_stride(_0{}, _1{}, Int<kTileN>{}));
      Tensor smem = fusion::detail::sm90_partition_for_epilogue<ReferenceSrc>(
          tile, args.epi_tile, args.tiled_copy, args.thread_idx);
      Tensor regs = make_tensor_like<float>(smem(_, _, _, _0{}, _0{}, _));
      return ConsumerStoreCallbacks<kThreads, decltype(smem), decltype(regs)>(
          params_, columns_, args.thread_idx, first_channel, channels, smem, regs);
    } else {
      return ConsumerStoreCallbacks<kThreads, int, int>(params_, columns_, args.thread_idx,
                                                        first_channel, channels, 0, 0);
    }
  }
};

/// The collective epilogue for a functor, with what cutlass's builder would choose. The builder's
/// own header is the umbrella avoided above.
template <class Epilogue, class TileShape, bool kCooperative>
struct EpilogueBuilder {
  static constexpr int kSides = Epilogue::kSides;
  template <int I>
  using Side = Storage<TypeAt<I, typename Epilogue::Sides>>;

  using Output = Storage<typename Epilogue::Output>;
  // Row-major D and sides: [M, N, L], N contiguous.
  using Stride = cute::Stride<int64_t, cute::_1, int64_t>;
  using EpilogueTile = cute::Shape<cute::Int<kCooperative ? 128 : 64>, cute::_32>;

  static constexpr int kThreads = kCooperative ? 256 : 128;
  static constexpr int kTile = cute::size<0>(TileShape{}) * cute::size<1>(TileShape{});
  static constexpr int kSubtiles = kTile / cute::size(EpilogueTile{});
  static constexpr int kFragment = cute::size(EpilogueTile{}) / kThreads;

  template <class T>
  using SmemAtom = decltype(cutlass::gemm::collective::detail::ss_smem_selector<
                            cute::GMMA::Major::K, T, decltype(cute::get<0>(EpilogueTile{})),
                            decltype(cute::get<1>(EpilogueTile{}))>());
  template <class T>
  using SmemLoad = decltype(cutlass::epilogue::collective::detail::sm90_get_smem_load_op_for_source<
                            Stride, T, EpilogueTile>());
  template <class T>
  using SmemStore =
      decltype(cutlass::epilogue::collective::detail::sm90_get_smem_store_op_for_accumulator<
               Stride, T, EpilogueTile>());

  template <int kCount, class Unused = void>
  struct Sides;
  template <class Unused>
  struct Sides<0, Unused> {
    using Source = void;
    using SmemSource = Output;
    static constexpr bool kReuse = false;
  };
  template <class Unused>
  struct Sides<1, Unused> {
    using Source = Side<0>;
    using SmemSource = Source;
    // D overwrites the source's stage in shared memory when it fits exactly.
    static constexpr bool kReuse = sizeof(Source) == sizeof(Output) && sizeof(Output) > 1;
  };
  template <class Unused>
  struct Sides<2, Unused> : Sides<1, Unused> {};

  using Source = typename Sides<kSides>::Source;
  using SmemSource = typename Sides<kSides>::SmemSource;
  static constexpr bool kReuse = Sides<kSides>::kReuse;
  static constexpr bool kDelayStore = kSides == 0;
  static constexpr int kStagesD = cute::min(kSubtiles, 2);
  static constexpr int kStagesC =
      kReuse ? cute::max(cute::min(kSubtiles, 4), kStagesD + 1) : cute::min(kSubtiles, 4);
  using Policy =
      cutlass::epilogue::Sm90TmaWarpSpecialized<kStagesC, kStagesD, kFragment, kReuse, kDelayStore>;

  using Node = EpilogueNode<Epilogue, TileShape>;
  template <int kCount, class Unused = void>
  struct Tree;
  template <class Unused>
  struct Tree<0, Unused> {
    using Type = fusion::Sm90TreeVisitor<Node>;
    static typename Type::Arguments arguments(JaxBoltBuffers const& buffers, Stride) {
      return {EpilogueParams<Epilogue>::make(buffers)};
    }
  };
  template <class Unused>
  struct Tree<1, Unused> {
    using Type = fusion::Sm90TreeVisitor<Node, fusion::Sm90SrcFetch<Side<0>>>;
    static typename Type::Arguments arguments(JaxBoltBuffers const& buffers, Stride) {
      return {{}, EpilogueParams<Epilogue>::make(buffers)};
    }
  };
  template <class Unused>
  struct Tree<2, Unused> {
    using Second = Side<1>;
    using Load = fusion::Sm90AuxLoad<kStagesC, EpilogueTile, Second, Stride, SmemAtom<Second>,
                                     SmemLoad<Second>, 16 / sizeof(Second), false>;
    using Type = fusion::Sm90TreeVisitor<Node, fusion::Sm90SrcFetch<Side<0>>, Load>;
    static typename Type::Arguments arguments(JaxBoltBuffers const& buffers, Stride stride) {
      return {{},
              {static_cast<Second const*>(buffers.sides[1]), Second(0), stride},
              EpilogueParams<Epilogue>::make(buffers)};
    }
  };

  using Visitor = typename Tree<kSides>::Type;
  using Collective = cutlass::epilogue::collective::CollectiveEpilogue<
      Policy, TileShape, EpilogueTile, Source, Stride, Output, Stride, Visitor, cute::SM90_TMA_LOAD,
      SmemAtom<SmemSource>, SmemLoad<SmemSource>, cute::SM90_TMA_STORE, SmemAtom<Output>,
      SmemStore<Output>, cute::Copy_Atom<cute::SM90_U32x4_STSM_N, cutlass::half_t>, void>;

  /// `stride`: of D and of every side.
  static typename Collective::Arguments arguments(JaxBoltBuffers const& buffers, Stride stride) {
    return {Tree<kSides>::arguments(buffers, stride), static_cast<Source const*>(buffers.sides[0]),
            stride, static_cast<Output*>(buffers.d), stride};
  }
};

}  // namespace sm90
}  // namespace jax_bolt
#endif  // JAX_BOLT_EPILOGUE_SM90_HPP_
