// SPDX-License-Identifier: Apache-2.0
// The side inputs of a depthwise conv's epilogue, loaded ahead of it.
#ifndef JAX_BOLT_DEPTHWISE_SIDES_HPP_
#define JAX_BOLT_DEPTHWISE_SIDES_HPP_

#include <cstdint>

#include "jax_bolt/depthwise/vector.hpp"
#include "jax_bolt/epilogue/traits.hpp"

namespace jax_bolt::depthwise {

/// The side inputs of a thread's outputs in one row, as they are stored.
template <class Epilogue, int kOutputs, int kWidth>
struct Sides {
  template <int kSide>
  using Type = Storage<TypeAt<kSide, typename Epilogue::Sides>>;
  std::uint32_t words[array_size(Epilogue::kSides)][kOutputs][kWidth];  // enough for f32

  __device__ void load(EpilogueParams<Epilogue> const& epilogue, std::int64_t at, int next,
                       std::uint32_t stored) {
    for_each_index<Epilogue::kSides>([&](auto index) {
      constexpr int i = decltype(index)::value;
      auto const* const from = epilogue.template side<i>() + at;
#pragma unroll
      for (int t = 0; t < kOutputs; ++t) {
        Vector<Type<i>, kWidth> found = {};
        if (stored >> t & 1) found.load(from + std::int64_t(t) * next);
#pragma unroll
        for (int w = 0; w < found.kWords; ++w) words[i][t][w] = found.words[w];
      }
    });
  }
  __device__ void get(int t, int v, float (&s)[array_size(Epilogue::kSides)]) const {
    s[0] = 0.0f;
    for_each_index<Epilogue::kSides>([&](auto index) {
      constexpr int i = decltype(index)::value;
      Vector<Type<i>, kWidth> found;
#pragma unroll
      for (int w = 0; w < found.kWords; ++w) found.words[w] = words[i][t][w];
      s[i] = found.get(v);
    });
  }
};

}  // namespace jax_bolt::depthwise
#endif  // JAX_BOLT_DEPTHWISE_SIDES_HPP_
