// SPDX-License-Identifier: Apache-2.0
// D[l] = epilogue(A[l] @ B[l]) on sm_90a: TMA and wgmma through CUTLASS's collectives, persistent,
// f32 accumulation. f16, bf16, and f32 rounded to TF32 by the TMA unit.
//
// Not to be included together with CUTLASS's 3.x conv headers (ambiguous specialisations).
#ifndef JAX_BOLT_GEMM_SM90_HPP_
#define JAX_BOLT_GEMM_SM90_HPP_

#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

// The pieces of CUTLASS's umbrella headers that this kernel needs, declarations first.
// clang-format off
#include "jax_bolt/epilogue/sm90.hpp"
#include "cutlass/gemm/collective/collective_mma_decl.hpp"
#include "cutlass/gemm/collective/collective_builder_decl.hpp"
#include "cutlass/gemm/collective/sm90_mma_tma_gmma_ss_warpspecialized.hpp"
#include "cutlass/gemm/collective/builders/sm90_gmma_builder.inl"
#include "cutlass/gemm/kernel/sm90_gemm_tma_warpspecialized_cooperative.hpp"
#include "cutlass/gemm/kernel/sm90_gemm_tma_warpspecialized_pingpong.hpp"
// clang-format on
#include "jax_bolt/abi.h"
#include "jax_bolt/export.hpp"
#include "jax_bolt/launch.hpp"

namespace jax_bolt {
namespace gemm {

/// Two consumer warpgroups on alternate tiles, one's epilogue under the other's products.
struct Pingpong {
  using Mainloop = cutlass::gemm::KernelTmaWarpSpecializedPingpong;
  static constexpr bool kCooperative = false;
};

/// Two consumer warpgroups on halves of one tile: tiles of 128 rows and more.
struct Cooperative {
  using Mainloop = cutlass::gemm::KernelTmaWarpSpecializedCooperative;
  static constexpr bool kCooperative = true;
};

/// The kernel's entry. Its body is for the device alone: without it the host compiler need not
/// instantiate the collectives, which would take as long as compiling them.
template <class Kernel>
__global__ void __launch_bounds__(Kernel::MaxThreadsPerBlock, 1)
    sm90_entry(__grid_constant__ typename Kernel::Params const params) {
#if defined(__CUDA_ARCH__)
  extern __shared__ char shared_memory[];
  Kernel kernel;
  kernel(params, shared_memory);
#endif
}

/// LayoutA, LayoutB: cutlass::layout::RowMajor or ColumnMajor of A [M, K] and B [K, N].
/// D and the sides are row-major. TMA asks 16 bytes of every base and row stride.
template <class Epilogue, class Element, class LayoutA, class LayoutB, int TileM, int TileN,
          int TileK, int ClusterM, int ClusterN, class Schedule>
class Sm90 {
  static constexpr bool kRowA = std::is_same_v<LayoutA, cutlass::layout::RowMajor>;
  static constexpr bool kRowB = std::is_same_v<LayoutB, cutlass::layout::RowMajor>;
  static_assert(sizeof(Element) == 2 || (kRowA && !kRowB),
                "TF32 wgmma takes operands whose K is contiguous only");
  static_assert(!Schedule::kCooperative || TileM >= 128, "half a tile is at least 64 rows");

  static constexpr int kTmaBytes = 16;
  static constexpr int kAlign = kTmaBytes / static_cast<int>(sizeof(Element));
  // Tile counts are rounded up in 32-bit arithmetic.
  static constexpr int64_t kMaxExtent = std::numeric_limits<int32_t>::max() - 4096;

  using TileShape = cute::Shape<cute::Int<TileM>, cute::Int<TileN>, cute::Int<TileK>>;
  using ClusterShape = cute::Shape<cute::Int<ClusterM>, cute::Int<ClusterN>, cute::_1>;
  using ProblemShape = cute::Shape<int, int, int, int>;
  using EpilogueBuilder = sm90::EpilogueBuilder<Epilogue, TileShape, Schedule::kCooperative>;
  using CollectiveEpilogue = typename EpilogueBuilder::Collective;
  using CollectiveMainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, LayoutA, kAlign, Element,
      LayoutB, kAlign, float, TileShape, ClusterShape,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
          sizeof(typename CollectiveEpilogue::SharedStorage))>,
      typename Schedule::Mainloop>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<ProblemShape, CollectiveMainloop,
                                                      CollectiveEpilogue, void>;
  static_assert(Kernel::SharedStorageSize <=
                    cutlass::gemm::collective::detail::sm90_smem_capacity_bytes,
                "the tile does not fit into shared memory");

 public:
  static JaxBoltStatus check(JaxBoltProblem const& problem) {
    if (problem.kind != JAX_BOLT_GEMM || problem.num_dims != JAX_BOLT_GEMM_DIMS) {
      return JAX_BOLT_WRONG_KIND;
    }
    Dims const d(problem);
    int64_t const extents[] = {d.m, d.n, d.k, d.batch};
    for (int64_t extent : extents) {
      if (extent < 1 || extent > kMaxExtent) return JAX_BOLT_UNSUPPORTED;
    }
    bool strided = is_tma_row<Element>(kRowA ? d.k : d.m) &&
                   is_tma_row<Element>(kRowB ? d.n : d.k) &&
                   is_tma_row<typename EpilogueBuilder::Output>(d.n);
    for_each_index<Epilogue::kSides>([&](auto index) {
      using Side = typename EpilogueBuilder::template Side<decltype(index)::value>;
      strided = strided && is_tma_row<Side>(d.n);
    });
    // The scheduler counts tiles in an int.
    double const tiles =
        double(blocks(d.m, TileM, ClusterM)) * blocks(d.n, TileN, ClusterN) * d.batch;
    bool const counted = tiles < double(std::numeric_limits<int32_t>::max());
    return strided && counted ? JAX_BOLT_OK : JAX_BOLT_UNSUPPORTED;
  }

  static int64_t workspace_bytes(JaxBoltProblem const& problem, JaxBoltDevice const& device) {
    return static_cast<int64_t>(Kernel::get_workspace_size(arguments(problem, {}, device)));
  }

  static JaxBoltStatus launch(JaxBoltProblem const& problem, JaxBoltBuffers const& buffers,
                              JaxBoltDevice const& device, cudaStream_t stream) {
    if (!is_aligned(buffers.a, kTmaBytes) || !is_aligned(buffers.b, kTmaBytes) ||
        !epilogue_is_aligned<Epilogue>(buffers, kTmaBytes)) {
      return JAX_BOLT_MISALIGNED;
    }
    typename Kernel::Params params =
        Kernel::to_underlying_arguments(arguments(problem, buffers, device), buffers.workspace);
    if (!is_encoded(params)) return JAX_BOLT_INTERNAL;
    constexpr int kSharedBytes = Kernel::SharedStorageSize;
    cudaError_t error = allow_shared_memory<&sm90_entry<Kernel>>(kSharedBytes, device.ordinal);
    if (error == cudaSuccess) error = enqueue(params, kSharedBytes, stream);
    // Launch failures stay in the runtime until someone reads them.
    if (error != cudaSuccess) static_cast<void>(cudaGetLastError());
    return static_cast<JaxBoltStatus>(error);
  }

 private:
  struct Dims {
    int64_t m, n, k, batch;
    explicit Dims(JaxBoltProblem const& p)
        : m(p.dims[0]), n(p.dims[1]), k(p.dims[2]), batch(p.dims[3]) {}
  };

  template <class T>
  static bool is_tma_row(int64_t elements) {
    return elements * static_cast<int64_t>(sizeof(T)) % kTmaBytes == 0;
  }

  static int64_t blocks(int64_t extent, int tile, int cluster) {
    int64_t const step = int64_t{tile} * cluster;
    return (extent + step - 1) / step * cluster;
  }

  /// CUTLASS leaves a tensor map that the driver refused zeroed; a launch would hang on it.
  static bool is_encoded(typename Kernel::Params const& params) {
    auto const encoded = [](auto const& copy) {
      cute::TmaDescriptor const zero{};
      return std::memcmp(copy.get_tma_descriptor(), &zero, sizeof zero) != 0;
    };
    bool all = encoded(params.mainloop.tma_load_a) && encoded(params.mainloop.tma_load_b) &&
               encoded(params.epilogue.tma_store_d);
    if constexpr (Epilogue::kSides > 0) all = all && encoded(params.epilogue.tma_load_c);
    if constexpr (Epilogue::kSides > 1) {
      all = all && encoded(params.epilogue.thread.op_1.tma_load_aux);
    }
    return all;
  }

  /// The stride of a packed operand whose contiguous mode Stride knows. One batch has none.
  template <class Stride>
  static Stride packed(int64_t row, int64_t matrix, int64_t batch) {
    Stride stride{};
    if constexpr (std::is_same_v<std::decay_t<decltype(cute::get<0>(stride))>, int64_t>) {
      cute::get<0>(stride) = row;
    } else {
      cute::get<1>(stride) = row;
    }
    cute::get<2>(stride) = batch > 1 ? matrix : 0;
    return stride;
  }

  static typename Kernel::Arguments arguments(JaxBoltProblem const& problem,
                                              JaxBoltBuffers const& buffers,
                                              JaxBoltDevice const& device) {
    auto const [m, n, k, batch] = Dims(problem);
    using StrideA = typename Kernel::StrideA;
    using StrideB = typename Kernel::StrideB;
    using StrideD = typename Kernel::StrideD;
    typename Kernel::Arguments args{};
    args.mode = cutlass::gemm::GemmUniversalMode::kGemm;
    args.problem_shape = {static_cast<int>(m), static_cast<int>(n), static_cast<int>(k),
                          static_cast<int>(batch)};
    args.mainloop.ptr_A = static_cast<Element const*>(buffers.a);
    args.mainloop.dA = packed<StrideA>(kRowA ? k : m, m * k, batch);
    args.mainloop.ptr_B = static_cast<Element const*>(buffers.b);
    args.mainloop.dB = packed<StrideB>(kRowB ? n : k, k * n, batch);
    args.epilogue = EpilogueBuilder::arguments(buffers, packed<StrideD>(n, m * n, batch));
    args.hw_info.device_id = device.ordinal;
    args.hw_info.sm_count = device.sm_count;
    return args;
  }

  static cudaError_t enqueue(typename Kernel::Params& params, int shared_bytes,
                             cudaStream_t stream) {
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = ClusterM;
    cluster.val.clusterDim.y = ClusterN;
    cluster.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = Kernel::get_grid_shape(params);
    config.blockDim = Kernel::get_block_shape();
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    config.stream = stream;
    config.attrs = &cluster;
    config.numAttrs = ClusterM * ClusterN > 1 ? 1 : 0;
    void* kernel_params[] = {&params};
    return cudaLaunchKernelExC(&config, reinterpret_cast<void const*>(&sm90_entry<Kernel>),
                               kernel_params);
  }
};

}  // namespace gemm
}  // namespace jax_bolt
#endif  // JAX_BOLT_GEMM_SM90_HPP_
