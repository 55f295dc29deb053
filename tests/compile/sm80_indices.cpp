// SPDX-License-Identifier: Apache-2.0
// The index arithmetic of the sm80 kernels, run on the CPU thread by thread: every element of D is
// written once, from its accumulator, channel and side input; every access of the few-channels
// iterators is where the convolution's definition says. Prints a line and a count of errors for
// each case; built and read by test_kernels_sm80.py.
#undef __CUDACC_VER_MAJOR__  // nvcc runs this as C++, where there is no wmma for CUTLASS to use
#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstring>
#include <memory>
#include <vector>

// What CUTLASS's host compilation names and never runs here.
static void __syncthreads() {}
static dim3 blockIdx;

#include "cutlass/gemm/threadblock/default_mma_core_sm80.h"
#include "jax_bolt/conv/few_channels_sm80.hpp"
#include "jax_bolt/epilogue/sm80.hpp"

using cutlass::bfloat16_t;
using cutlass::half_t;
using cutlass::conv::Conv2dProblemSize;

template <class Element, class Tile, class Warp>
using Core = cutlass::gemm::threadblock::DefaultMmaCore<
    Tile, Warp,
    std::conditional_t<std::is_same_v<Element, float>, cutlass::gemm::GemmShape<16, 8, 8>,
                       cutlass::gemm::GemmShape<16, 8, 16>>,
    Element, cutlass::layout::RowMajor, Element, cutlass::layout::ColumnMajor, float,
    cutlass::layout::RowMajor, cutlass::arch::OpClassTensorOp, 3, cutlass::arch::OpMultiplyAdd>;

template <class Out, class Side, int kHoisted>
struct Functor {
  using Output = Out;
  static constexpr int kVectors = 2, kColumns = kHoisted, kSides = 1;
  using Vectors = jax_bolt::Types<jax_bolt::Column<float>, jax_bolt::Column<half_t>>;
  using Sides = jax_bolt::Types<Side>;
  static void columns(float const (&v)[2], float (&c)[kColumns]) {
    for (int k = 0; k < kColumns; ++k) c[k] = k + 1 < kColumns ? v[0] : v[1];
  }
  static float apply(float acc, float const (&c)[kColumns], float const (&s)[1]) {
    return acc + 2 * c[0] + c[kColumns - 1] + s[0];
  }
};

// The same, and its accumulator and side input as an auxiliary output.
template <class Out, class Side, int kHoisted, class Other>
struct Storing : Functor<Out, Side, kHoisted> {
  using Auxiliary = jax_bolt::Types<Other>;
  static float apply(float acc, float const (&c)[kHoisted], float const (&s)[1], float (&d)[1]) {
    d[0] = acc + s[0];
    return Functor<Out, Side, kHoisted>::apply(acc, c, s);
  }
};

static float value_at(int row, int column) { return float((row * 31 + column * 17) % 64 - 32); }

// One CTA's tile at (row, channel) of entry `batch` of a [batch + 1, rows, channels] D.
template <class F, class Element, int kM, int kN, int kK, int kWarpM, int kWarpN, int kAccess>
long epilogue(int rows, int channels, int row, int channel, int batch) {
  using Tile = cutlass::gemm::GemmShape<kM, kN, kK>;
  using Warp = cutlass::gemm::GemmShape<kWarpM, kWarpN, kK>;
  using WarpMma = typename Core<Element, Tile, Warp>::MmaPolicy::Operator;
  using Epilogue = jax_bolt::EpilogueSm80<F, Tile, WarpMma, kAccess>;
  using Output = jax_bolt::Storage<typename F::Output>;
  using Side = jax_bolt::Storage<jax_bolt::TypeAt<0, typename F::Sides>>;
  constexpr bool kBool = std::is_same_v<typename F::Output, bool>;
  constexpr float kUntouched = kBool ? 1.0f : 77.0f;

  std::int64_t const first = std::int64_t(batch) * rows * channels;
  std::int64_t const total = first + std::int64_t(rows) * channels;
  std::vector<float> vector0(channels);
  std::vector<half_t> vector1(channels);
  for (int j = 0; j < channels; ++j) vector0[j] = j * 7 % 13;
  for (int j = 0; j < channels; ++j) vector1[j] = half_t(float(j * 5 % 11));
  std::vector<Side> side(total);
  for (std::int64_t i = 0; i < total; ++i) side[i] = Side(float(i % 3 == 1));
  std::vector<Output> d(total + 64, Output(kUntouched));
  using Others = jax_bolt::AuxiliaryOf<F>;
  constexpr bool kStores = Others::kCount > 0;
  using Other = jax_bolt::Storage<
      jax_bolt::TypeAt<0, std::conditional_t<kStores, Others, jax_bolt::Types<float>>>>;
  std::vector<Other> other(total + 64, Other(77.0f));

  JaxBoltBuffers buffers{};
  buffers.d = d.data();
  buffers.auxiliary[0] = other.data();
  buffers.sides[0] = side.data();
  buffers.vectors[0] = vector0.data();
  buffers.vectors[1] = vector1.data();
  auto const params = jax_bolt::EpilogueParams<F>::make(buffers);
  auto storage = std::make_unique<typename Epilogue::SharedStorage>();
  auto columns = std::make_unique<typename Epilogue::ColumnStorage>();
  memset(static_cast<void*>(storage.get()), 0xff, sizeof(*storage));

  // mma.m16n8: a lane holds two neighbours of rows lane / 4 and lane / 4 + 8; tiles run down first.
  constexpr int kThreads = Epilogue::kThreads;
  std::vector<typename Epilogue::AccumulatorTile> accumulators(kThreads);
  for (int t = 0; t < kThreads; ++t) {
    int const warp_m = t / 32 % (kM / kWarpM), warp_n = t / 32 / (kM / kWarpM), lane = t % 32;
    for (int n = 0; n < kWarpN / 8; ++n) {
      for (int m = 0; m < kWarpM / 16; ++m) {
        for (int e = 0; e < 4; ++e) {
          int const r = warp_m * kWarpM + m * 16 + lane / 4 + e / 2 * 8;
          int const c = warp_n * kWarpN + n * 8 + lane % 4 * 2 + e % 2;
          accumulators[t][(m + n * (kWarpM / 16)) * 4 + e] = value_at(r, c);
        }
      }
    }
  }

  std::vector<std::unique_ptr<Epilogue>> threads;
  for (int t = 0; t < kThreads; ++t) {
    typename Epilogue::RawColumns raw;
    raw.load(params, channels, channel, t);
    raw.store(*columns, t);
    threads.push_back(std::make_unique<Epilogue>(params, *columns, *storage, rows, channels, row,
                                                 channel, first, t));
  }
  for (int t = 0; t < kThreads; ++t) threads[t]->put(accumulators[t], 0);
  for (auto& thread : threads) thread->load_columns();
  for (int step = 0; step < kWarpM / 8; ++step) {
    for (int t = 0; t < kThreads; ++t) {
      if (step + 1 < kWarpM / 8) threads[t]->put(accumulators[t], step + 1);
      typename Epilogue::StepSides sides;
      threads[t]->load_sides(step, sides);
      threads[t]->finish(step, sides);
    }
  }

  long errors = 0;
  for (std::int64_t i = 0; i < std::int64_t(d.size()); ++i) {
    int const r = i < first ? -1 : int((i - first) / channels) - row;
    int const c = i < first ? -1 : int((i - first) % channels) - channel;
    bool const inside = i < total && r >= 0 && r < kM && c >= 0 && c < kN;
    float want = kUntouched;
    if (inside) {
      want =
          value_at(r, c) + 2 * vector0[c + channel] + float(vector1[c + channel]) + float(side[i]);
      if (kBool) want = want != 0.0f;
    }
    errors += float(d[i]) != want;
    float const stored = inside && kStores ? value_at(r, c) + float(side[i]) : 77.0f;
    errors += float(other[i]) != stored;
  }
  return errors;
}

template <class F, class Element, int kM, int kN, int kK, int kWarpM, int kWarpN, int kAccess>
void tile_of() {
  constexpr auto run = epilogue<F, Element, kM, kN, kK, kWarpM, kWarpN, kAccess>;
  long const inner = run(kM + 5, kN * 2, 0, kN, 1);
  long const ragged = run(kM * 2 - 13, kN + 3 * kAccess, kM, 0, 1);
  long const small = run(3, 5 * kAccess, 0, 0, 0);
  printf("epilogue %dx%dx%d by %dx%d, access %d: %ld errors\n", kM, kN, kK, kWarpM, kWarpN, kAccess,
         inner + ragged + small);
}

template <class Out, class Side, class Element, int kM, int kN, int kK, int kWarpM, int kWarpN,
          int kAccess, int kHoisted = 2>
void tile() {
  tile_of<Functor<Out, Side, kHoisted>, Element, kM, kN, kK, kWarpM, kWarpN, kAccess>();
}

template <class Other, class Out, class Side, class Element, int kM, int kN, int kK, int kWarpM,
          int kWarpN, int kAccess>
void storing_tile() {
  tile_of<Storing<Out, Side, 2, Other>, Element, kM, kN, kK, kWarpM, kWarpN, kAccess>();
}

template <class Element, int kM, int kN, int kK, int kWarpM, int kWarpN, int kAlign, int kChannels>
void few_channels(Conv2dProblemSize size) {
  using Tile = cutlass::gemm::GemmShape<kM, kN, kK>;
  using Warp = cutlass::gemm::GemmShape<kWarpM, kWarpN, kK>;
  using MapA = typename Core<Element, Tile, Warp>::IteratorThreadMapA;
  using MapB = typename Core<Element, Tile, Warp>::IteratorThreadMapB;
  using IteratorA = jax_bolt::conv::FewChannelsActivations<Element, MapA, kAlign, kK, kChannels>;
  using IteratorB = jax_bolt::conv::FewChannelsFilter<Element, MapB, kAlign, kK, kChannels>;
  auto* const base = reinterpret_cast<Element*>(std::uintptr_t{1} << 32);  // never read
  int const depth = size.R * size.S * kChannels, rows = size.N * size.P * size.Q;
  int const k_tiles = (depth + kK - 1) / kK + 2;  // prologues run past the end
  long errors = 0, valid = 0;

  typename IteratorA::Params const params(size);
  for (int tile = 0; tile < (rows + kM - 1) / kM; ++tile) {
    for (int t = 0; t < MapA::kThreads; ++t) {
      IteratorA iterator(params, size, base, t, {tile * kM, 0});
      auto const start = MapA::initial_offset(t);
      for (int k_tile = 0; k_tile < k_tiles; ++k_tile, iterator.advance()) {
        iterator.set_iteration_index(0);
        for (int i = 0; i < MapA::Iterations::kCount; ++i) {
          for (int v = 0; v < IteratorA::kAccessesPerVector; ++v, ++iterator) {
            int const k = k_tile * kK + start.contiguous() + v * kAlign;
            int const row = tile * kM + start.strided() + i * MapA::Delta::kStrided;
            int const n = row / (size.P * size.Q), p = row / size.Q % size.P, q = row % size.Q;
            int const r = k / kChannels / size.S, s = k / kChannels % size.S;
            int const h = p * size.stride_h - size.pad_h + r * size.dilation_h;
            int const w = q * size.stride_w - size.pad_w + s * size.dilation_w;
            bool const inside =
                row < rows && k < depth && h >= 0 && h < size.H && w >= 0 && w < size.W;
            auto const* at =
                base + ((std::int64_t(n) * size.H + h) * size.W + w) * kChannels + k % kChannels;
            errors += iterator.valid() != inside ||
                      (inside && reinterpret_cast<Element const*>(iterator.get()) != at);
            valid += inside;
          }
        }
      }
    }
  }
  for (int tile = 0; tile < (size.K + kN - 1) / kN; ++tile) {
    for (int t = 0; t < MapB::kThreads; ++t) {
      IteratorB iterator(size, base, t, {0, tile * kN});
      auto const start = MapB::initial_offset(t);
      for (int k_tile = 0; k_tile < k_tiles; ++k_tile, iterator.advance()) {
        iterator.set_iteration_index(0);
        for (int i = 0; i < MapB::Iterations::kCount; ++i) {
          for (int v = 0; v < IteratorB::kAccessesPerVector; ++v, ++iterator) {
            int const k = k_tile * kK + start.contiguous() + v * kAlign;
            int const filter = tile * kN + start.strided() + i * MapB::Delta::kStrided;
            bool const inside = filter < size.K && k < depth;
            errors += iterator.valid() != inside ||
                      (inside && reinterpret_cast<Element const*>(iterator.get()) !=
                                     base + std::int64_t(filter) * depth + k);
            valid += inside;
          }
        }
      }
    }
  }
  printf("few channels C %d, %ld valid: %ld errors\n", kChannels, valid, errors + (valid == 0));
}

struct Axis {
  int size, taps, stride, before, after, dilation;
  int out() const { return (size + before + after - dilation * (taps - 1) - 1) / stride + 1; }
};

Conv2dProblemSize conv(int n, int c, int k, Axis h, Axis w) {
  return Conv2dProblemSize(n, h.size, w.size, c, k, h.taps, w.taps, h.out(), w.out(), h.before,
                           w.before, h.stride, w.stride, h.dilation, w.dilation,
                           cutlass::conv::Mode::kCrossCorrelation);
}

int main() {
  tile<bfloat16_t, bfloat16_t, bfloat16_t, 256, 128, 32, 64, 64, 8>();
  tile<bfloat16_t, float, bfloat16_t, 128, 256, 32, 64, 64, 8, 4>();
  tile<half_t, bool, half_t, 128, 64, 64, 64, 32, 8>();
  tile<bfloat16_t, bfloat16_t, bfloat16_t, 256, 64, 64, 64, 32, 8>();
  tile<bfloat16_t, half_t, bfloat16_t, 64, 64, 64, 32, 32, 4>();
  tile<half_t, half_t, half_t, 64, 128, 64, 32, 64, 2>();
  tile<bfloat16_t, bfloat16_t, bfloat16_t, 128, 128, 32, 64, 64, 1, 7>();
  tile<float, float, float, 128, 256, 16, 64, 64, 4>();
  tile<float, bfloat16_t, float, 128, 64, 32, 64, 32, 1>();
  tile<bool, bool, bfloat16_t, 64, 128, 64, 32, 64, 8>();
  storing_tile<bfloat16_t, bfloat16_t, bfloat16_t, bfloat16_t, 128, 128, 32, 64, 64, 8>();
  storing_tile<float, half_t, half_t, half_t, 64, 64, 64, 32, 32, 4>();
  storing_tile<bfloat16_t, float, float, bfloat16_t, 128, 64, 64, 64, 32, 4>();

  few_channels<bfloat16_t, 256, 64, 32, 64, 64, 8, 8>(
      conv(3, 8, 72, {15, 3, 1, 1, 1, 1}, {13, 3, 1, 1, 1, 1}));
  few_channels<bfloat16_t, 128, 64, 64, 64, 32, 8, 8>(
      conv(2, 8, 64, {23, 7, 2, 3, 3, 1}, {17, 7, 2, 2, 3, 1}));
  few_channels<bfloat16_t, 128, 128, 64, 64, 64, 8, 16>(
      conv(2, 16, 40, {19, 4, 1, 2, 1, 1}, {21, 4, 1, 2, 1, 1}));
  few_channels<half_t, 64, 64, 64, 32, 32, 4, 4>(
      conv(2, 4, 40, {19, 3, 2, 0, 1, 2}, {21, 5, 1, 2, 0, 2}));
  few_channels<float, 64, 64, 32, 32, 32, 1, 1>(
      conv(2, 1, 40, {19, 3, 3, 1, 1, 1}, {41, 40, 1, 20, 19, 1}));
}
