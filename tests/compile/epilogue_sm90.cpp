// SPDX-License-Identifier: Apache-2.0
// Runs the sm90 epilogue node's device code on the CPU, one thread after another, and compares
// what Epilogue::apply() is given with the coordinates of the element it is given for.
//
// Built by a host compiler with -fpermissive: CUTLASS's headers then turn their device functions
// into ordinary ones, and name a few built-ins in code that this program does not reach.
#include <cuda_runtime.h>

// nvcc defines it for host compilers too; CUTLASS would include headers for device code alone.
#undef __CUDACC_VER_MAJOR__
static uint3 threadIdx;
static dim3 blockDim;
inline void __syncthreads() {}

#include <cstdio>
#include <vector>

#include "jax_bolt/epilogue/sm90.hpp"

namespace {

using namespace cute;
using bf16 = cutlass::bfloat16_t;
constexpr int kStep = 4096;  // an accumulator is row * kStep + channel, exact in f32

struct Seen {
  float acc;
  float c[3];
  float s[2];
};
std::vector<Seen> seen;
int evaluations = 0;

template <class... SideTypes>
struct Functor {
  using Output = float;
  static constexpr int kVectors = 3;
  static constexpr int kColumns = 3;
  static constexpr int kSides = sizeof...(SideTypes);
  using Vectors =
      jax_bolt::Types<jax_bolt::Column<float>, jax_bolt::Scalar<float>, jax_bolt::Column<bool>>;
  using Sides = jax_bolt::Types<SideTypes...>;
  static void columns(float const (&v)[3], float (&c)[3]) {
    ++evaluations;
    c[0] = v[0];
    c[1] = v[0] * v[1];
    c[2] = v[2];
  }
  static float apply(float acc, float const (&c)[3],
                     float const (&s)[jax_bolt::array_size(kSides)]) {
    Seen row{acc, {c[0], c[1], c[2]}, {s[0], kSides > 1 ? s[kSides - 1] : 0.0f}};
    seen.push_back(row);
    return acc;
  }
};

/// Number of errors for one CTA tile, the ragged last one in N. `Stored` decides how the
/// collective gives accumulators to threads.
template <class Epilogue, class Stored, int TileM, int TileN, bool kCooperative>
int errors() {
  using TileShape = Shape<Int<TileM>, Int<TileN>, _64>;
  using Builder = jax_bolt::sm90::EpilogueBuilder<Epilogue, TileShape, kCooperative>;
  using Node = typename Builder::Node;
  constexpr int kSides = Epilogue::kSides;
  auto tiled_mma = make_tiled_mma(
      GMMA::ss_op_selector<bf16, bf16, float, TileShape, GMMA::Major::K, GMMA::Major::MN>(),
      Layout<Shape<Int<kCooperative ? 2 : 1>, _1, _1>>{});
  int const rows = TileM * 3 - 5, channels = TileN * 2 - 24, tile_m = 1, tile_n = 1;

  std::vector<float> first(channels);
  std::vector<unsigned char> third(channels);
  float const second = 3.0f;
  for (int n = 0; n < channels; ++n) {
    first[n] = static_cast<float>(n + 1);
    third[n] = n % 3 == 0;
  }
  JaxBoltBuffers buffers{};
  buffers.vectors[0] = first.data();
  buffers.vectors[1] = &second;
  buffers.vectors[2] = third.data();
  auto const params = jax_bolt::EpilogueParams<Epilogue>::make(buffers);
  typename Node::SharedStorage storage;
  for (float& value : storage.values) value = -7.0f;
  Node node(params, storage);

  // As CollectiveEpilogue::store() does.
  typename Builder::EpilogueTile epilogue_tile;
  TiledCopy accumulators =
      make_tiled_copy_C_atom(Copy_Atom<SM90_U32x4_STSM_N, cutlass::half_t>{}, tiled_mma);
  TiledCopy tiled_copy = make_tiled_copy_S(
      Copy_Atom<typename Builder::template SmemStore<Stored>, Stored>{}, accumulators);
  Tensor whole = make_identity_tensor(make_shape(rows, channels));
  Tensor tile = local_tile(whole, take<0, 2>(TileShape{}), make_coord(tile_m, tile_n));
  auto const each_thread = [&](auto body) {
    for (int thread = 0; thread < Builder::kThreads; ++thread) {
      Tensor mine = tiled_copy.get_slice(thread).partition_S(flat_divide(tile, epilogue_tile));
      Tensor source = make_tensor<float>(make_layout(take<0, 3>(mine.shape())));
      auto const end = make_coord(rows, channels);
      cutlass::epilogue::fusion::detail::ConsumerStoreArgs args(
          make_shape(rows, channels, 64, 1), TileShape{}, make_coord(tile_m, tile_n, 0, 0),
          tiled_mma, epilogue_tile, tiled_copy, make_coord_tensor(tile.layout()), end - tile(_0{}),
          make_coord_tensor(mine.layout()), end - mine(_0{}), source, thread);
      body(node.template get_consumer_store_callbacks<true>(args), mine);
    }
  };

  evaluations = 0;
  int wrong = 0;
  each_thread([&](auto callbacks, auto const&) {
    callbacks.begin();
    wrong += !callbacks.begin_sync_needed();
  });
  std::vector<int> visits(TileM * TileN, 0);
  each_thread([&](auto callbacks, auto const& mine) {
    constexpr int kSize = Builder::kFragment;
    for (int epi_n = 0; epi_n < size<4>(mine); ++epi_n) {
      for (int epi_m = 0; epi_m < size<3>(mine); ++epi_m) {
        callbacks.begin_loop(epi_m, epi_n);
        callbacks.previsit(epi_m, epi_n, 0, kSides > 0);
        auto subtile = mine(_, _, _, epi_m, epi_n);
        for (int v = 0; v < static_cast<int>(size(subtile)) / kSize; ++v) {
          cutlass::Array<float, kSize> acc, one, two;
          for (int i = 0; i < kSize; ++i) {
            auto const at = subtile(v * kSize + i);
            acc[i] = static_cast<float>(get<0>(at) * kStep + get<1>(at));
            one[i] = acc[i] + 1.0f;
            two[i] = acc[i] + 2.0f;
          }
          seen.clear();
          if constexpr (kSides == 0) callbacks.visit(acc, v, epi_m, epi_n);
          if constexpr (kSides == 1) callbacks.visit(acc, v, epi_m, epi_n, one);
          if constexpr (kSides == 2) callbacks.visit(acc, v, epi_m, epi_n, one, two);
          for (Seen const& s : seen) {
            int const m = static_cast<int>(s.acc) / kStep, n = static_cast<int>(s.acc) % kStep;
            ++visits[(m - tile_m * TileM) * TileN + n - tile_n * TileN];
            bool const inside = n < channels;
            bool right = s.c[0] == (inside ? first[n] : 0.0f) &&
                         s.c[1] == (inside ? first[n] * second : 0.0f) &&
                         s.c[2] == (inside ? static_cast<float>(third[n]) : 0.0f);
            if (kSides > 0) right = right && s.s[0] == s.acc + 1.0f;
            if (kSides > 1) right = right && s.s[1] == s.acc + 2.0f;
            wrong += !right;
          }
        }
      }
    }
  });
  for (int count : visits) wrong += count != 1;
  wrong += evaluations != channels - tile_n * TileN;  // once for each channel of the tile
  std::printf("%dx%d %s %d sides: %d errors\n", TileM, TileN,
              kCooperative ? "cooperative" : "pingpong", kSides, wrong);
  return wrong;
}

}  // namespace

int main() {
  int wrong = 0;
  wrong += errors<Functor<>, bf16, 128, 128, false>();
  wrong += errors<Functor<float>, float, 64, 64, false>();
  wrong += errors<Functor<float>, bf16, 128, 192, true>();
  wrong += errors<Functor<float, float>, bf16, 256, 128, true>();
  return wrong != 0;
}
