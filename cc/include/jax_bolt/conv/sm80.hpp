// SPDX-License-Identifier: Apache-2.0
// 2-D conv fprop as an implicit GEMM on sm80 tensor cores: NHWC x KRSC -> NPQK, any stride, padding
// and dilation. Runs on every later architecture too.
#ifndef JAX_BOLT_CONV_SM80_HPP_
#define JAX_BOLT_CONV_SM80_HPP_

#include <algorithm>

#include "cutlass/arch/mma.h"
// clang-format off
#include "cutlass/conv/threadblock/conv2d_fprop_activation_tile_access_iterator_optimized.h"
#include "cutlass/conv/threadblock/conv2d_fprop_filter_tile_access_iterator_optimized.h"
// clang-format on
#include "cutlass/conv/threadblock/implicit_gemm_multistage.h"
#include "jax_bolt/conv/few_channels_sm80.hpp"
#include "jax_bolt/export.hpp"
#include "jax_bolt/kernel_sm80.hpp"

namespace jax_bolt {
namespace conv {

/// How operands are fetched. kFewChannels = 0: CUTLASS's optimized iterators, any C that kAlign
/// divides, R and S up to 32. Otherwise kFewChannels is C, a divisor of the tile's depth.
template <class Element, int kAlign, int kFewChannels, class Tile, class Core>
struct Operands {
  using ThreadMapA = typename Core::IteratorThreadMapA;
  using ThreadMapB = typename Core::IteratorThreadMapB;
  using Size = cutlass::conv::Conv2dProblemSize;
  using IteratorA = FewChannelsActivations<Element, ThreadMapA, kAlign, Tile::kK, kFewChannels>;
  using IteratorB = FewChannelsFilter<Element, ThreadMapB, kAlign, Tile::kK, kFewChannels>;

  struct Params {
    typename IteratorA::Params a;
  };
  static Params make(Size const& size) { return {typename IteratorA::Params(size)}; }

  JAX_BOLT_DEVICE static IteratorA a(Params const& params, Size const& size, Element const* x,
                                     int thread, int row) {
    return IteratorA(params.a, size, x, thread, {row, 0});
  }
  JAX_BOLT_DEVICE static IteratorB b(Params const&, Size const& size, Element const* filter,
                                     int thread, int column) {
    return IteratorB(size, filter, thread, {0, column});
  }
  static int k_tiles(Size const& size) {
    return (size.R * size.S * kFewChannels + Tile::kK - 1) / Tile::kK;
  }
  static bool supports(int channels, int, int) { return channels == kFewChannels; }
};

template <class Element, int kAlign, class Tile, class Core>
struct Operands<Element, kAlign, 0, Tile, Core> {
  using Layout = cutlass::layout::TensorNHWC;
  using Access = cutlass::AlignedArray<Element, kAlign>;
  using Size = cutlass::conv::Conv2dProblemSize;
  using IteratorA = cutlass::conv::threadblock::Conv2dFpropActivationTileAccessIteratorOptimized<
      cutlass::MatrixShape<Tile::kM, Tile::kK>, Element, Layout, typename Core::IteratorThreadMapA,
      Access>;
  using IteratorB = cutlass::conv::threadblock::Conv2dFpropFilterTileAccessIteratorOptimized<
      cutlass::MatrixShape<Tile::kK, Tile::kN>, Element, Layout, typename Core::IteratorThreadMapB,
      Access>;

  struct Params {
    typename IteratorA::Params a;
    typename IteratorB::Params b;
  };
  static Params make(Size const& size) {
    return {
        IteratorA::getParams(size, Layout::packed({size.N, size.H, size.W, size.C})),
        typename IteratorB::Params(size, Layout::packed({size.K, size.R, size.S, size.C})),
    };
  }

  JAX_BOLT_DEVICE static IteratorA a(Params const& params, Size const& size, Element const* x,
                                     int thread, int row) {
    return IteratorA(params.a, size, x, thread, {row, 0});
  }
  JAX_BOLT_DEVICE static IteratorB b(Params const& params, Size const& size, Element const* filter,
                                     int thread, int column) {
    return IteratorB(params.b, size, filter, thread, {0, column});
  }
  static int k_tiles(Size const& size) {
    return size.R * size.S * ((size.C + Tile::kK - 1) / Tile::kK);
  }
  // The iterators keep a bit for every filter row and column.
  static bool supports(int, int r, int s) { return r <= 32 && s <= 32; }
};

template <class Element, int kAlign, int kFewChannels, class Tile, class Warp, int kStages>
struct MainloopSm80 {
  using CoreImpl = sm80::MmaCore<Element, cutlass::layout::RowMajor, cutlass::layout::ColumnMajor,
                                 kAlign, kAlign, Tile, Warp, kStages>;
  using Core = typename CoreImpl::Type;
  using Operands = conv::Operands<Element, kAlign, kFewChannels, Tile, Core>;
  using Mma = cutlass::conv::threadblock::ImplicitGemmMultistage<
      Tile, typename Operands::IteratorA, typename Core::SmemIteratorA, CoreImpl::kCacheA,
      typename Operands::IteratorB, typename Core::SmemIteratorB, CoreImpl::kCacheB,
      typename Core::MmaPolicy, kStages>;

  struct Params {
    cutlass::conv::Conv2dProblemSize size;
    typename Operands::Params operands;
    int k_tiles;
    Element const* x;
    Element const* filter;
  };

  JAX_BOLT_DEVICE static void run(Params const& params, int tile_m, int tile_n, int,
                                  typename Mma::SharedStorage& storage,
                                  typename Mma::FragmentC& accumulators) {
    int const thread = threadIdx.x;
    auto iterator_a =
        Operands::a(params.operands, params.size, params.x, thread, tile_m * Tile::kM);
    auto iterator_b =
        Operands::b(params.operands, params.size, params.filter, thread, tile_n * Tile::kN);
    Mma mma(storage, thread, cutlass::canonical_warp_idx_sync(), thread % 32);
    mma(params.k_tiles, accumulators, iterator_a, iterator_b, accumulators);
  }
};

/// y = epilogue(conv(x, filter)). kAlignC and kAlignD: elements that divide C and K.
template <class Functor, class Element, int kAlignC, int kAlignD, int kFewChannels, int kTileM,
          int kTileN, int kTileK, int kWarpM, int kWarpN, int kWarpK, int kStages>
class Fprop80 {
  using Mainloop =
      MainloopSm80<Element, kAlignC, kFewChannels, cutlass::gemm::GemmShape<kTileM, kTileN, kTileK>,
                   cutlass::gemm::GemmShape<kWarpM, kWarpN, kWarpK>, kStages>;
  using Kernel = sm80::Kernel<Functor, Mainloop, kAlignD>;
  using Operands = typename Mainloop::Operands;

  struct Dims {
    std::int64_t n, h, w, c, k, r, s, p, q, stride_h, stride_w, top, left, dilation_h, dilation_w;

    explicit Dims(std::int64_t const* d)
        : n(d[0]),
          h(d[1]),
          w(d[2]),
          c(d[3]),
          k(d[4]),
          r(d[5]),
          s(d[6]),
          p(d[7]),
          q(d[8]),
          stride_h(d[9]),
          stride_w(d[10]),
          top(d[11]),
          left(d[12]),
          dilation_h(d[13]),
          dilation_w(d[14]) {}

    /// CUTLASS computes offsets into one tensor in 32 bits; longer batches take several launches.
    std::int64_t images_per_launch() const {
      std::int64_t const image = std::max(h * w * c, p * q);
      return std::min(n, kMax / image);
    }

    cutlass::conv::Conv2dProblemSize size(std::int64_t images) const {
      return cutlass::conv::Conv2dProblemSize(
          int(images), int(h), int(w), int(c), int(k), int(r), int(s), int(p), int(q), int(top),
          int(left), int(stride_h), int(stride_w), int(dilation_h), int(dilation_w),
          cutlass::conv::Mode::kCrossCorrelation);
    }
  };

  // Less than a tile below the largest int: coordinates of the last tile reach past the problem.
  static constexpr std::int64_t kMax = std::numeric_limits<int>::max() - 1024;

 public:
  static JaxBoltStatus check(JaxBoltProblem const& problem) {
    if (problem.kind != JAX_BOLT_CONV_FPROP || problem.num_dims != JAX_BOLT_CONV_DIMS) {
      return JAX_BOLT_WRONG_KIND;
    }
    Dims const d(problem.dims);
    for (int i = 0; i < JAX_BOLT_CONV_DIMS; ++i) {
      bool const is_padding = i == 11 || i == 12;
      if (problem.dims[i] < (is_padding ? 0 : 1) || problem.dims[i] > kMax) {
        return JAX_BOLT_UNSUPPORTED;
      }
    }
    if (d.c % kAlignC != 0 || d.k % kAlignD != 0) return JAX_BOLT_UNSUPPORTED;
    if (!Operands::supports(int(d.c), int(d.r), int(d.s))) return JAX_BOLT_UNSUPPORTED;
    // Stepwise, since the product of three dims may pass 64 bits.
    if (d.h * d.w > kMax / d.c || d.r * d.s > kMax / d.c || d.r * d.s * d.c > kMax / d.k ||
        d.p * d.q > kMax || (d.r - 1) * d.dilation_h > kMax || (d.s - 1) * d.dilation_w > kMax) {
      return JAX_BOLT_UNSUPPORTED;
    }
    sm80::Raster raster;
    std::int64_t blocks;
    bool const fits =
        sm80::Raster::make(d.images_per_launch() * d.p * d.q, d.k, kTileM, kTileN, raster, blocks);
    return fits ? JAX_BOLT_OK : JAX_BOLT_UNSUPPORTED;
  }

  static std::int64_t workspace_bytes(JaxBoltProblem const&, JaxBoltDevice const&) { return 0; }

  static JaxBoltStatus launch(JaxBoltProblem const& problem, JaxBoltBuffers const& buffers,
                              JaxBoltDevice const& device, cudaStream_t stream) {
    if (!is_aligned(buffers.a, kAlignC * sizeof(Element)) ||
        !is_aligned(buffers.b, kAlignC * sizeof(Element)) ||
        !epilogue_is_aligned<Functor>(buffers, kAlignD)) {
      return JAX_BOLT_MISALIGNED;
    }
    Dims const d(problem.dims);
    std::int64_t const step = d.images_per_launch();
    for (std::int64_t first = 0; first < d.n; first += step) {
      std::int64_t const images = std::min(step, d.n - first);
      std::int64_t const rows = images * d.p * d.q;
      typename Kernel::Params params{};
      std::int64_t blocks;
      sm80::Raster::make(rows, d.k, kTileM, kTileN, params.raster, blocks);
      params.rows = int(rows);
      params.channels = int(d.k);
      params.mainloop.size = d.size(images);
      params.mainloop.operands = Operands::make(params.mainloop.size);
      params.mainloop.k_tiles = Operands::k_tiles(params.mainloop.size);
      params.mainloop.x = static_cast<Element const*>(buffers.a) + first * d.h * d.w * d.c;
      params.mainloop.filter = static_cast<Element const*>(buffers.b);
      params.epilogue = EpilogueParams<Functor>::make(buffers);
      params.epilogue.advance(first * d.p * d.q * d.k);
      JaxBoltStatus const status = sm80::launch<Kernel>(params, blocks, 1, device, stream);
      if (status != JAX_BOLT_OK) return status;
    }
    return JAX_BOLT_OK;
  }
};

}  // namespace conv
}  // namespace jax_bolt
#endif  // JAX_BOLT_CONV_SM80_HPP_
