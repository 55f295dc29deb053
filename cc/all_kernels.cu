// SPDX-License-Identifier: Apache-2.0
// One instantiation of every kernel template: what an IDE indexes, and a compile check without a
// GPU. A generated TU has one functor and one JAX_BOLT_KERNEL or JAX_BOLT_DEVICE_KERNEL instead.
// The sm90 template needs -gencode=arch=compute_90a,code=sm_90a.

#include "jax_bolt/cast/cast.hpp"
#include "jax_bolt/chain/merged_sm90.hpp"
#include "jax_bolt/chain/sm90.hpp"
#include "jax_bolt/conv/sm80.hpp"
#include "jax_bolt/depthwise/depthwise.hpp"
#include "jax_bolt/gemm/sm80.hpp"
#include "jax_bolt/implicit_gemm/sm90.hpp"

namespace all_kernels {

/// relu(acc * scale + shift + side), its scale from a variance as in a live BatchNorm.
struct Epilogue {
  using Output = cutlass::bfloat16_t;
  static constexpr int kVectors = 3;
  static constexpr int kColumns = 2;
  static constexpr int kSides = 1;
  using Vectors = jax_bolt::Types<jax_bolt::Column<float>, jax_bolt::Column<cutlass::bfloat16_t>,
                                  jax_bolt::Scalar<float>>;
  using Sides = jax_bolt::Types<cutlass::bfloat16_t>;
  JAX_BOLT_HOST_DEVICE static void columns(float const (&v)[3], float (&c)[2]) {
    c[0] = jax_bolt::math::rsqrt(v[0] + v[2]);
    c[1] = v[1];
  }
  JAX_BOLT_HOST_DEVICE static float apply(float acc, float const (&c)[2], float const (&s)[1]) {
    return jax_bolt::math::max(acc * c[0] + c[1] + s[0], 0.0f);
  }
};

/// acc * scale + shift.
struct Affine {
  using Output = cutlass::bfloat16_t;
  static constexpr int kVectors = 2;
  static constexpr int kColumns = 2;
  static constexpr int kSides = 0;
  using Vectors = jax_bolt::Types<jax_bolt::Column<float>, jax_bolt::Column<float>>;
  using Sides = jax_bolt::Types<>;
  JAX_BOLT_HOST_DEVICE static void columns(float const (&v)[2], float (&c)[2]) {
    c[0] = v[0];
    c[1] = v[1];
  }
  JAX_BOLT_HOST_DEVICE static float apply(float acc, float const (&c)[2], float const (&)[1]) {
    return acc * c[0] + c[1];
  }
};

using Element = cutlass::bfloat16_t;
using RowMajor = cutlass::layout::RowMajor;

}  // namespace all_kernels

template struct jax_bolt::cast::Cast<__nv_bfloat16>;
template class jax_bolt::gemm::Sm80<all_kernels::Epilogue, all_kernels::Element,
                                    all_kernels::RowMajor, all_kernels::RowMajor, 8, 8, 8, 128, 128,
                                    32, 64, 64, 32, 4>;
template class jax_bolt::conv::Fprop80<all_kernels::Epilogue, all_kernels::Element, 8, 8, 0, 128,
                                       128, 64, 64, 64, 64, 3>;
template class jax_bolt::conv::Fprop80<all_kernels::Epilogue, all_kernels::Element, 8, 8, 8, 128,
                                       64, 64, 64, 32, 64, 4>;
template struct jax_bolt::implicit_gemm::Sm90<
    all_kernels::Epilogue, all_kernels::Element, jax_bolt::implicit_gemm::Filters::kHwio, 104, 1, 1,
    1, 2, jax_bolt::implicit_gemm::Schedule::kCooperative, 3, 1, 4, 2>;
template struct jax_bolt::implicit_gemm::Sm90<all_kernels::Affine, all_kernels::Element,
                                              jax_bolt::implicit_gemm::Filters::kHwio, 256, 1, 1, 1,
                                              1, jax_bolt::implicit_gemm::Schedule::kPingPong, 1, 1,
                                              4, 4, jax_bolt::implicit_gemm::MaxPool<3, 3, 2, 2>>;
template struct jax_bolt::implicit_gemm::Sm90<all_kernels::Epilogue, all_kernels::Element,
                                              jax_bolt::implicit_gemm::Filters::kHwio, 104, 1, 1, 1,
                                              1, jax_bolt::implicit_gemm::Schedule::kPingPong, 1, 1,
                                              4, 4, jax_bolt::implicit_gemm::MeanPool>;
template struct jax_bolt::depthwise::Depthwise<all_kernels::Epilogue, all_kernels::Element, 5, 5, 2,
                                               2, 1, 1, 2, 4, 16, 8, 0, 11, 4, 64, 16, 16, false,
                                               true, 4>;
template struct jax_bolt::chain::Sm90<all_kernels::Epilogue, all_kernels::Epilogue,
                                      all_kernels::Element, jax_bolt::implicit_gemm::Filters::kHwio,
                                      jax_bolt::implicit_gemm::Filters::kKrsc, true, 64, 1, 1, 2, 4,
                                      4, 1, false, true>;
template struct jax_bolt::chain::Sm90<all_kernels::Epilogue, all_kernels::Affine,
                                      all_kernels::Element, jax_bolt::implicit_gemm::Filters::kHwio,
                                      jax_bolt::implicit_gemm::Filters::kHwio, true, 64, 1, 1, 3, 4,
                                      4, 2, true, false, all_kernels::Affine>;
template struct jax_bolt::chain::MergedSm90<all_kernels::Affine, all_kernels::Epilogue,
                                            all_kernels::Element,
                                            jax_bolt::implicit_gemm::Filters::kHwio, 128, 1, 1, 1,
                                            2, jax_bolt::implicit_gemm::Schedule::kCooperative, 4>;
