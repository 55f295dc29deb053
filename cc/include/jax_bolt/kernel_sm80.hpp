// SPDX-License-Identifier: Apache-2.0
// The kernel that the sm80 gemm and conv share: a tile's place, a mainloop, our epilogue.
#ifndef JAX_BOLT_KERNEL_SM80_HPP_
#define JAX_BOLT_KERNEL_SM80_HPP_

#include <cstdint>
#include <limits>
#include <type_traits>

#include "cutlass/arch/arch.h"
#include "cutlass/gemm/gemm.h"
#include "cutlass/gemm/threadblock/default_mma_core_sm80.h"
#include "cutlass/layout/matrix.h"
#include "jax_bolt/epilogue/sm80.hpp"
#include "jax_bolt/launch.hpp"

namespace jax_bolt {
namespace sm80 {

/// The shared-memory side of a multistage mainloop: f32 accumulators; f32 operands run as TF32.
template <class Element, class LayoutA, class LayoutB, int kAlignA, int kAlignB, class TileShape,
          class WarpShape, int kStages>
struct MmaCore {
  static constexpr bool kIsF32 = std::is_same_v<Element, float>;
  using Instruction = std::conditional_t<kIsF32, cutlass::gemm::GemmShape<16, 8, 8>,
                                         cutlass::gemm::GemmShape<16, 8, 16>>;
  static_assert(kAlignA * sizeof(Element) >= 4 && kAlignB * sizeof(Element) >= 4,
                "cp.async copies at least 4 bytes");
  static_assert(kStages >= 3, "the multistage mainloop needs three stages or more");

  // Only 16-byte copies can pass by L1.
  static constexpr auto cache(int align) {
    return align * sizeof(Element) == 16 ? cutlass::arch::CacheOperation::Global
                                         : cutlass::arch::CacheOperation::Always;
  }
  static constexpr auto kCacheA = cache(kAlignA);
  static constexpr auto kCacheB = cache(kAlignB);

  using Type = cutlass::gemm::threadblock::DefaultMmaCore<
      TileShape, WarpShape, Instruction, Element, LayoutA, Element, LayoutB, float,
      cutlass::layout::RowMajor, cutlass::arch::OpClassTensorOp, kStages,
      cutlass::arch::OpMultiplyAdd, false, kCacheA, kCacheB>;
};

/// How blockIdx.x becomes a tile: columns of up to 8 tiles of N, N fastest, so that CTAs running at
/// the same time share operands in L2.
struct Raster {
  int tiles_m;
  int log_width;

  /// False where the grid would be too large. blocks: gridDim.x.
  static bool make(std::int64_t rows, std::int64_t channels, int tile_m, int tile_n, Raster& raster,
                   std::int64_t& blocks) {
    std::int64_t const tiles_m = (rows + tile_m - 1) / tile_m;
    std::int64_t const tiles_n = (channels + tile_n - 1) / tile_n;
    int const log_width = tiles_n >= 6 ? 3 : tiles_n >= 3 ? 2 : tiles_n >= 2 ? 1 : 0;
    std::int64_t const width = std::int64_t{1} << log_width;
    blocks = tiles_m * ((tiles_n + width - 1) / width * width);
    raster = {static_cast<int>(tiles_m), log_width};
    return blocks <= std::numeric_limits<int>::max();
  }

  JAX_BOLT_HOST_DEVICE void locate(int block, int& tile_m, int& tile_n) const {
    int const strip = block >> log_width;
    tile_m = strip % tiles_m;
    tile_n = (strip / tiles_m << log_width) + (block & ((1 << log_width) - 1));
  }
};

/// Mainloop: has Mma, Params, and run(params, tile_m, tile_n, batch, storage, accumulators).
template <class Functor, class Mainloop_, int kAlignD>
struct Kernel {
  using Mainloop = Mainloop_;
  using Mma = typename Mainloop::Mma;
  using Shape = typename Mma::Shape;
  using Epilogue = EpilogueSm80<Functor, Shape, typename Mma::Operator, kAlignD>;
  static constexpr int kThreads = 32 * Mma::WarpCount::kCount;
  static_assert(kThreads == Epilogue::kThreads, "mainloop and epilogue use the same threads");

  struct Params {
    Raster raster;
    int rows;
    int channels;
    typename Mainloop::Params mainloop;
    EpilogueParams<Functor> epilogue;
  };

  struct SharedStorage {
    union {
      typename Mma::SharedStorage mainloop;
      typename Epilogue::SharedStorage epilogue;
    };
    typename Epilogue::ColumnStorage columns;
  };

  JAX_BOLT_DEVICE static void run(Params const& params, SharedStorage& storage) {
    int tile_m, tile_n;
    params.raster.locate(blockIdx.x, tile_m, tile_n);
    int const channel = tile_n * Shape::kN;
    if (channel >= params.channels) return;  // N's tiles are rounded up to the raster's width

    int const thread = threadIdx.x;
    typename Epilogue::RawColumns raw;
    raw.load(params.epilogue, params.channels, channel, thread);

    typename Mma::FragmentC accumulators;
    accumulators.clear();
    // Ends with a sync, after which its storage is free.
    Mainloop::run(params.mainloop, tile_m, tile_n, blockIdx.z, storage.mainloop, accumulators);

    raw.store(storage.columns, thread);
    std::int64_t const offset = std::int64_t(blockIdx.z) * params.rows * params.channels;
    Epilogue epilogue(params.epilogue, storage.columns, storage.epilogue, params.rows,
                      params.channels, tile_m * Shape::kM, channel, offset, thread);
    epilogue.run(accumulators);
  }
};

// Without the guard the host compiler would instantiate the mainloop and epilogue, for nothing.
template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, 1)
    entry(const __grid_constant__ typename Kernel::Params params) {
#if defined(__CUDA_ARCH__)
  extern __shared__ __align__(16) unsigned char memory[];
  Kernel::run(params, *reinterpret_cast<typename Kernel::SharedStorage*>(memory));
#endif
}

template <class Kernel>
JaxBoltStatus launch(typename Kernel::Params const& params, std::int64_t blocks, int batch,
                     JaxBoltDevice const& device, cudaStream_t stream) {
  constexpr int kBytes = int(sizeof(typename Kernel::SharedStorage));
  cudaError_t const error = allow_shared_memory<entry<Kernel>>(kBytes, device.ordinal);
  if (error != cudaSuccess) return error;
  dim3 const grid(static_cast<unsigned>(blocks), 1, static_cast<unsigned>(batch));
  entry<Kernel><<<grid, Kernel::kThreads, kBytes, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace sm80
}  // namespace jax_bolt
#endif  // JAX_BOLT_KERNEL_SM80_HPP_
