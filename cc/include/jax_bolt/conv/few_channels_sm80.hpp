// SPDX-License-Identifier: Apache-2.0
// Global-memory iterators of an implicit GEMM whose K runs densely over (r, s, c).
//
// CUTLASS's optimized iterators give every filter tap its own K tile, which wastes a half to seven
// eighths of the products where C is below the tile's depth (an RGB stem padded to 8 channels). Its
// few-channels iterators multiply what lies past the last tap by zero, so that an Inf in x spoils
// outputs that never read it. These do neither.
#ifndef JAX_BOLT_CONV_FEW_CHANNELS_SM80_HPP_
#define JAX_BOLT_CONV_FEW_CHANNELS_SM80_HPP_

#include <cstdint>

#include "cutlass/array.h"
#include "cutlass/conv/conv2d_problem_size.h"
#include "cutlass/cutlass.h"
#include "cutlass/fast_math.h"
#include "cutlass/matrix_coord.h"
#include "jax_bolt/epilogue/traits.hpp"

namespace jax_bolt {
namespace conv {

/// What both iterators share: which of a thread's accesses is meant. ThreadMap: contiguous is K,
/// strided is rows.
template <class Element_, class ThreadMap_, int kAlign>
class AccessCounter {
 public:
  using Element = Element_;
  using ThreadMap = ThreadMap_;
  using AccessType = cutlass::AlignedArray<Element, kAlign>;
  static constexpr int kAccessesPerVector = ThreadMap::kElementsPerAccess / kAlign;
  static_assert(ThreadMap::Iterations::kContiguous == 1, "a thread's rows all start at one k");

  CUTLASS_HOST_DEVICE void set_iteration_index(int index) {
    vector_ = index % kAccessesPerVector;
    row_ = index / kAccessesPerVector;
  }

 protected:
  static constexpr int kRows = ThreadMap::Iterations::kStrided;

  CUTLASS_HOST_DEVICE void next() {
    if (++vector_ < kAccessesPerVector) return;
    vector_ = 0;
    if (++row_ == kRows) row_ = 0;
  }

  int vector_ = 0;
  int row_ = 0;
};

/// The activations, as an N*P*Q by R*S*kChannels matrix. kChannels is the problem's C.
template <class Element, class ThreadMap, int kAlign, int kTileK, int kChannels>
class FewChannelsActivations : public AccessCounter<Element, ThreadMap, kAlign> {
  using Base = AccessCounter<Element, ThreadMap, kAlign>;
  static_assert(kTileK % kChannels == 0 && kChannels % kAlign == 0,
                "a K tile holds whole taps, a tap whole accesses");

 public:
  using AccessType = typename Base::AccessType;

  struct Params {
    cutlass::FastDivmod divide_pq;
    cutlass::FastDivmod divide_q;
    cutlass::FastDivmod divide_s;

    Params() = default;
    explicit Params(cutlass::conv::Conv2dProblemSize const& size)
        : divide_pq(size.P * size.Q), divide_q(size.Q), divide_s(size.S) {}
  };

  CUTLASS_HOST_DEVICE
  FewChannelsActivations(Params const& params, cutlass::conv::Conv2dProblemSize const& size,
                         Element const* x, int thread, cutlass::MatrixCoord offset)
      : params_(params), size_(size), x_(x) {
    auto const start = ThreadMap::initial_offset(thread);
    k_ = offset.column() + start.contiguous();
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < Base::kRows; ++i) {
      int n, p, q, residual;
      int const npq = offset.row() + start.strided() + i * ThreadMap::Delta::kStrided;
      params.divide_pq(n, residual, npq);
      params.divide_q(p, q, residual);
      image_[i] = n < size.N ? n : -1;
      h_[i] = p * size.stride_h - size.pad_h;
      w_[i] = q * size.stride_w - size.pad_w;
    }
    locate_taps();
  }

  CUTLASS_HOST_DEVICE void advance() {
    k_ += kTileK;
    locate_taps();
  }

  CUTLASS_HOST_DEVICE bool valid() const {
    // As unsigned, what lies before the first row or column is past the last one.
    return image_[this->row_] >= 0 && r_[this->vector_] < size_.R &&
           unsigned(h()) < unsigned(size_.H) && unsigned(w()) < unsigned(size_.W);
  }

  CUTLASS_HOST_DEVICE AccessType const* get() const {
    std::int64_t const pixel = (std::int64_t(image_[this->row_]) * size_.H + h()) * size_.W + w();
    int const c = (k_ + this->vector_ * kAlign) % kChannels;
    return reinterpret_cast<AccessType const*>(x_ + pixel * kChannels + c);
  }

  CUTLASS_HOST_DEVICE FewChannelsActivations& operator++() {
    this->next();
    return *this;
  }

 private:
  CUTLASS_HOST_DEVICE int h() const {
    return h_[this->row_] + r_[this->vector_] * size_.dilation_h;
  }
  CUTLASS_HOST_DEVICE int w() const {
    return w_[this->row_] + s_[this->vector_] * size_.dilation_w;
  }

  CUTLASS_HOST_DEVICE void locate_taps() {
    CUTLASS_PRAGMA_UNROLL
    for (int v = 0; v < Base::kAccessesPerVector; ++v) {
      params_.divide_s(r_[v], s_[v], (k_ + v * kAlign) / kChannels);
    }
  }

  Params const& params_;
  cutlass::conv::Conv2dProblemSize const& size_;
  Element const* x_;
  int k_;
  int r_[Base::kAccessesPerVector];
  int s_[Base::kAccessesPerVector];
  int image_[Base::kRows];
  int h_[Base::kRows];
  int w_[Base::kRows];
};

/// The packed filter, as an R*S*kChannels by K matrix stored with its rows contiguous.
template <class Element, class ThreadMap, int kAlign, int kTileK, int kChannels>
class FewChannelsFilter : public AccessCounter<Element, ThreadMap, kAlign> {
  using Base = AccessCounter<Element, ThreadMap, kAlign>;

 public:
  using AccessType = typename Base::AccessType;

  CUTLASS_HOST_DEVICE
  FewChannelsFilter(cutlass::conv::Conv2dProblemSize const& size, Element const* filter, int thread,
                    cutlass::MatrixCoord offset)
      : filter_(filter), depth_(size.R * size.S * kChannels), filters_(size.K) {
    auto const start = ThreadMap::initial_offset(thread);
    k_ = offset.row() + start.contiguous();
    first_ = offset.column() + start.strided();
  }

  CUTLASS_HOST_DEVICE void advance() { k_ += kTileK; }

  CUTLASS_HOST_DEVICE bool valid() const { return k() < depth_ && filter() < filters_; }

  CUTLASS_HOST_DEVICE AccessType const* get() const {
    return reinterpret_cast<AccessType const*>(filter_ + std::int64_t(filter()) * depth_ + k());
  }

  CUTLASS_HOST_DEVICE FewChannelsFilter& operator++() {
    this->next();
    return *this;
  }

 private:
  CUTLASS_HOST_DEVICE int k() const { return k_ + this->vector_ * kAlign; }
  CUTLASS_HOST_DEVICE int filter() const {
    return first_ + this->row_ * ThreadMap::Delta::kStrided;
  }

  Element const* filter_;
  int depth_;
  int filters_;
  int k_;
  int first_;
};

}  // namespace conv
}  // namespace jax_bolt
#endif  // JAX_BOLT_CONV_FEW_CHANNELS_SM80_HPP_
