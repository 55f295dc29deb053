// SPDX-License-Identifier: Apache-2.0
// GEMM on sm80 tensor cores (mma.sync, cp.async); runs on every later architecture too.
#ifndef JAX_BOLT_GEMM_SM80_HPP_
#define JAX_BOLT_GEMM_SM80_HPP_

#include "cutlass/transform/threadblock/predicated_tile_access_iterator.h"
#include "jax_bolt/export.hpp"
#include "jax_bolt/kernel_sm80.hpp"

namespace jax_bolt {
namespace gemm {

/// LayoutA and LayoutB: cutlass::layout::RowMajor or ColumnMajor of the M by K and K by N operands.
template <class Element, class LayoutA, class LayoutB, int kAlignA, int kAlignB, class Tile,
          class Warp, int kStages>
struct MainloopSm80 {
  using CoreImpl = sm80::MmaCore<Element, LayoutA, LayoutB, kAlignA, kAlignB, Tile, Warp, kStages>;
  using Core = typename CoreImpl::Type;

  using IteratorA = cutlass::transform::threadblock::PredicatedTileAccessIterator<
      cutlass::MatrixShape<Tile::kM, Tile::kK>, Element, LayoutA, 1,
      typename Core::IteratorThreadMapA, cutlass::Array<Element, kAlignA>>;
  using IteratorB = cutlass::transform::threadblock::PredicatedTileAccessIterator<
      cutlass::MatrixShape<Tile::kK, Tile::kN>, Element, LayoutB, 0,
      typename Core::IteratorThreadMapB, cutlass::Array<Element, kAlignB>>;
  using Mma = cutlass::gemm::threadblock::MmaMultistage<
      typename Core::Shape, IteratorA, typename Core::SmemIteratorA, CoreImpl::kCacheA, IteratorB,
      typename Core::SmemIteratorB, CoreImpl::kCacheB, float, cutlass::layout::RowMajor,
      typename Core::MmaPolicy, kStages>;

  struct Params {
    int m, n, k;
    typename IteratorA::Params iterator_a;
    typename IteratorB::Params iterator_b;
    Element const* a;
    Element const* b;
  };

  JAX_BOLT_DEVICE static void run(Params const& params, int tile_m, int tile_n, int batch,
                                  typename Mma::SharedStorage& storage,
                                  typename Mma::FragmentC& accumulators) {
    int const thread = threadIdx.x;
    auto* a = const_cast<Element*>(params.a) + std::int64_t(batch) * params.m * params.k;
    auto* b = const_cast<Element*>(params.b) + std::int64_t(batch) * params.k * params.n;
    IteratorA iterator_a(params.iterator_a, a, {params.m, params.k}, thread,
                         {tile_m * Tile::kM, 0});
    IteratorB iterator_b(params.iterator_b, b, {params.k, params.n}, thread,
                         {0, tile_n * Tile::kN});
    Mma mma(storage, thread, cutlass::canonical_warp_idx_sync(), thread % 32);
    mma((params.k + Tile::kK - 1) / Tile::kK, accumulators, iterator_a, iterator_b, accumulators);
  }
};

/// D[l] = epilogue(A[l] @ B[l]). kAlign*: elements that divide the contiguous dimension.
template <class Functor, class Element, class LayoutA, class LayoutB, int kAlignA, int kAlignB,
          int kAlignD, int kTileM, int kTileN, int kTileK, int kWarpM, int kWarpN, int kWarpK,
          int kStages>
class Sm80 {
  using Mainloop = MainloopSm80<Element, LayoutA, LayoutB, kAlignA, kAlignB,
                                cutlass::gemm::GemmShape<kTileM, kTileN, kTileK>,
                                cutlass::gemm::GemmShape<kWarpM, kWarpN, kWarpK>, kStages>;
  using Kernel = sm80::Kernel<Functor, Mainloop, kAlignD>;

  static constexpr bool kRowA = std::is_same_v<LayoutA, cutlass::layout::RowMajor>;
  static constexpr bool kRowB = std::is_same_v<LayoutB, cutlass::layout::RowMajor>;

 public:
  static JaxBoltStatus check(JaxBoltProblem const& problem) {
    if (problem.kind != JAX_BOLT_GEMM || problem.num_dims != JAX_BOLT_GEMM_DIMS) {
      return JAX_BOLT_WRONG_KIND;
    }
    auto const [m, n, k, batch] = sizes(problem);
    // Coordinates are 32-bit, and those of the last tile reach past the problem.
    constexpr std::int64_t kMax = std::numeric_limits<int>::max() - 1024;
    if (m < 1 || n < 1 || k < 1 || m > kMax || n > kMax || k > kMax) return JAX_BOLT_UNSUPPORTED;
    if (batch < 1 || batch > 65535) return JAX_BOLT_UNSUPPORTED;
    if ((kRowA ? k : m) % kAlignA != 0 || (kRowB ? n : k) % kAlignB != 0 || n % kAlignD != 0) {
      return JAX_BOLT_UNSUPPORTED;
    }
    sm80::Raster raster;
    std::int64_t blocks;
    return sm80::Raster::make(m, n, kTileM, kTileN, raster, blocks) ? JAX_BOLT_OK
                                                                    : JAX_BOLT_UNSUPPORTED;
  }

  static std::int64_t workspace_bytes(JaxBoltProblem const&, JaxBoltDevice const&) { return 0; }

  static JaxBoltStatus launch(JaxBoltProblem const& problem, JaxBoltBuffers const& buffers,
                              JaxBoltDevice const& device, cudaStream_t stream) {
    if (!is_aligned(buffers.a, kAlignA * sizeof(Element)) ||
        !is_aligned(buffers.b, kAlignB * sizeof(Element)) ||
        !epilogue_is_aligned<Functor>(buffers, kAlignD)) {
      return JAX_BOLT_MISALIGNED;
    }
    auto const [m, n, k, batch] = sizes(problem);
    typename Kernel::Params params{};
    std::int64_t blocks;
    sm80::Raster::make(m, n, kTileM, kTileN, params.raster, blocks);
    params.rows = int(m);
    params.channels = int(n);
    params.mainloop.m = int(m);
    params.mainloop.n = int(n);
    params.mainloop.k = int(k);
    params.mainloop.iterator_a = LayoutA(kRowA ? k : m);
    params.mainloop.iterator_b = LayoutB(kRowB ? n : k);
    params.mainloop.a = static_cast<Element const*>(buffers.a);
    params.mainloop.b = static_cast<Element const*>(buffers.b);
    params.epilogue = EpilogueParams<Functor>::make(buffers);
    return sm80::launch<Kernel>(params, blocks, int(batch), device, stream);
  }

 private:
  struct Sizes {
    std::int64_t m, n, k, batch;
  };
  static Sizes sizes(JaxBoltProblem const& problem) {
    return {problem.dims[0], problem.dims[1], problem.dims[2], problem.dims[3]};
  }
};

}  // namespace gemm
}  // namespace jax_bolt
#endif  // JAX_BOLT_GEMM_SM80_HPP_
