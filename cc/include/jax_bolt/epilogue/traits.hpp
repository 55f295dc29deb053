// SPDX-License-Identifier: Apache-2.0
// The types a generated epilogue functor is written in, and how its inputs are read.
//
// A functor (`struct Epilogue` of a generated TU) has Output, kVectors, kColumns, kSides, Vectors,
// Sides, columns() and apply(). One with auxiliary outputs also has Auxiliary, their types, and
// apply() takes an array for them. This header needs neither CUDA nor CUTLASS, so that the same
// functor compiles with a host compiler.
#ifndef JAX_BOLT_EPILOGUE_TRAITS_HPP_
#define JAX_BOLT_EPILOGUE_TRAITS_HPP_

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "jax_bolt/abi.h"

#if defined(__CUDACC__)
#define JAX_BOLT_HOST_DEVICE __forceinline__ __host__ __device__
#define JAX_BOLT_DEVICE __forceinline__ __device__
#else
#define JAX_BOLT_HOST_DEVICE inline
#define JAX_BOLT_DEVICE inline
#endif

// A functor only names these; a kernel's headers complete them.
namespace cutlass {
struct bfloat16_t;
struct half_t;
}  // namespace cutlass

namespace jax_bolt {

/// A list of types.
template <class... Ts>
struct Types {
  static constexpr int kCount = sizeof...(Ts);
};

template <int I, class List>
struct TypeAtImpl;
template <class T, class... Ts>
struct TypeAtImpl<0, Types<T, Ts...>> {
  using Type = T;
};
template <int I, class T, class... Ts>
struct TypeAtImpl<I, Types<T, Ts...>> : TypeAtImpl<I - 1, Types<Ts...>> {};

/// The I-th type of a Types<...>.
template <int I, class List>
using TypeAt = typename TypeAtImpl<I, List>::Type;

/// A per-channel input: one T for each of the N (or K) output channels.
template <class T>
struct Column {
  using Element = T;
  static constexpr bool kScalar = false;
};

/// One T that all channels share.
template <class T>
struct Scalar {
  using Element = T;
  static constexpr bool kScalar = true;
};

template <class Epilogue, class = void>
struct AuxiliaryOfImpl {
  using Type = Types<>;
};
template <class Epilogue>
struct AuxiliaryOfImpl<Epilogue, std::void_t<typename Epilogue::Auxiliary>> {
  using Type = typename Epilogue::Auxiliary;
};

/// The types of a functor's auxiliary outputs, as Types<...>.
template <class Epilogue>
using AuxiliaryOf = typename AuxiliaryOfImpl<Epilogue>::Type;

/// A compile-time index; for_each_index hands these out.
template <int I>
struct Index {
  static constexpr int value = I;
};

namespace detail {
template <int I, int N, class F>
JAX_BOLT_HOST_DEVICE void for_each_index(F& f) {
  if constexpr (I < N) {
    f(Index<I>{});
    for_each_index<I + 1, N>(f);
  }
}
}  // namespace detail

/// f(Index<0>{}), ..., f(Index<N - 1>{}), unrolled.
template <int N, class F>
JAX_BOLT_HOST_DEVICE void for_each_index(F f) {
  detail::for_each_index<0, N>(f);
}

/// The length of an array that has `count` elements: C++ has no empty arrays.
constexpr int array_size(int count) { return count > 0 ? count : 1; }

/// How a T lies in memory. XLA's PRED is a byte, 0 or 1.
template <class T>
struct StorageImpl {
  using Type = T;
};
template <>
struct StorageImpl<bool> {
  using Type = std::uint8_t;
};
template <class T>
using Storage = typename StorageImpl<T>::Type;

/// A stored value as the functor sees it: bool becomes 0 or 1.
template <class T>
JAX_BOLT_HOST_DEVICE float to_float(T const& stored) {
  return static_cast<float>(stored);
}

template <int kBytes>
struct BitsImpl;
template <>
struct BitsImpl<1> {
  using Type = std::uint8_t;
};
template <>
struct BitsImpl<2> {
  using Type = std::uint16_t;
};
template <>
struct BitsImpl<4> {
  using Type = std::uint32_t;
};

/// A stored value as untyped bits, and back. Loading the bits leaves nothing to compute, so that a
/// value can be on its way from memory while other work goes on.
template <class T>
JAX_BOLT_HOST_DEVICE std::uint32_t load_bits(T const* stored) {
  using Bits = typename BitsImpl<sizeof(T)>::Type;
  return *reinterpret_cast<Bits const*>(stored);
}
template <class T>
JAX_BOLT_HOST_DEVICE float float_of_bits(std::uint32_t bits) {
  using Bits = typename BitsImpl<sizeof(T)>::Type;
  Bits const narrow = static_cast<Bits>(bits);
  T value;
  memcpy(&value, &narrow, sizeof(T));
  return to_float(value);
}

/// A functor's result as it is stored, rounded to nearest even; T is `bool` for a PRED output.
template <class T>
JAX_BOLT_HOST_DEVICE Storage<T> from_float(float value) {
  return static_cast<Storage<T>>(value);
}
template <>
JAX_BOLT_HOST_DEVICE std::uint8_t from_float<bool>(float value) {
  return value != 0.0f;
}

/// The functor's result, and its auxiliary outputs into `auxiliary`.
template <class Epilogue, int kColumns, int kSides, int kAuxiliary>
JAX_BOLT_HOST_DEVICE float apply(float acc, float const (&c)[kColumns], float const (&s)[kSides],
                                 float (&auxiliary)[kAuxiliary]) {
  if constexpr (AuxiliaryOf<Epilogue>::kCount == 0) {
    return Epilogue::apply(acc, c, s);
  } else {
    return Epilogue::apply(acc, c, s, auxiliary);
  }
}

/// Device pointers of the epilogue's operands; what a kernel gets as its parameter.
template <class Epilogue>
struct EpilogueParams {
  using Vectors = typename Epilogue::Vectors;
  using Sides = typename Epilogue::Sides;
  using Output = Storage<typename Epilogue::Output>;
  using Auxiliary = AuxiliaryOf<Epilogue>;
  static constexpr int kAuxiliary = Auxiliary::kCount;
  static constexpr int kVectors = Epilogue::kVectors;
  static constexpr int kColumns = Epilogue::kColumns;
  static constexpr int kSides = Epilogue::kSides;
  static_assert(kVectors <= JAX_BOLT_MAX_VECTORS && kVectors == Vectors::kCount,
                "Vectors must list kVectors types, at most JAX_BOLT_MAX_VECTORS");
  static_assert(kSides <= JAX_BOLT_MAX_SIDES && kSides == Sides::kCount,
                "Sides must list kSides types, at most JAX_BOLT_MAX_SIDES");
  static_assert(kAuxiliary <= JAX_BOLT_MAX_AUXILIARY, "at most JAX_BOLT_MAX_AUXILIARY");

  Output* d;
  void const* sides[array_size(kSides)];
  void const* vectors[array_size(kVectors)];
  void* auxiliary[array_size(kAuxiliary)];

  static EpilogueParams make(JaxBoltBuffers const& buffers) {
    EpilogueParams params{};
    params.d = static_cast<Output*>(buffers.d);
    for (int i = 0; i < kAuxiliary; ++i) params.auxiliary[i] = buffers.auxiliary[i];
    for (int i = 0; i < kSides; ++i) params.sides[i] = buffers.sides[i];
    for (int i = 0; i < kVectors; ++i) params.vectors[i] = buffers.vectors[i];
    return params;
  }

  /// Moves the outputs and the side inputs on by `elements`.
  void advance(std::int64_t elements) {
    d += elements;
    for_each_index<kAuxiliary>([&](auto index) {
      constexpr int i = decltype(index)::value;
      auxiliary[i] = this->template output<i>() + elements;
    });
    for_each_index<kSides>([&](auto index) {
      constexpr int i = decltype(index)::value;
      sides[i] = this->template side<i>() + elements;
    });
  }

  /// The I-th auxiliary output, of type Storage<TypeAt<I, Auxiliary>>.
  template <int I>
  JAX_BOLT_HOST_DEVICE Storage<TypeAt<I, Auxiliary>>* output() const {
    return static_cast<Storage<TypeAt<I, Auxiliary>>*>(auxiliary[I]);
  }

  /// The I-th side input, of type Storage<TypeAt<I, Sides>>.
  template <int I>
  JAX_BOLT_HOST_DEVICE Storage<TypeAt<I, Sides>> const* side() const {
    return static_cast<Storage<TypeAt<I, Sides>> const*>(sides[I]);
  }

  /// The vectors of one channel as they are stored. The caller keeps `channel` inside the problem.
  JAX_BOLT_HOST_DEVICE void load_raw_vectors(int channel,
                                             std::uint32_t (&raw)[array_size(kVectors)]) const {
    raw[0] = 0;
    for_each_index<kVectors>([&](auto index) {
      constexpr int i = decltype(index)::value;
      using Vector = TypeAt<i, Vectors>;
      auto const* base = static_cast<Storage<typename Vector::Element> const*>(vectors[i]);
      raw[i] = load_bits(base + (Vector::kScalar ? 0 : channel));
    });
  }

  /// The hoisted values, which apply() reads, of the channel whose vectors are `raw`.
  JAX_BOLT_HOST_DEVICE static void columns(std::uint32_t const (&raw)[array_size(kVectors)],
                                           float (&c)[array_size(kColumns)]) {
    float v[array_size(kVectors)];
    v[0] = 0.0f;
    for_each_index<kVectors>([&](auto index) {
      constexpr int i = decltype(index)::value;
      v[i] = float_of_bits<Storage<typename TypeAt<i, Vectors>::Element>>(raw[i]);
    });
    c[0] = 0.0f;
    if constexpr (kColumns > 0) Epilogue::columns(v, c);
  }

  /// Both at once: the hoisted values of one channel.
  JAX_BOLT_HOST_DEVICE void load_columns(int channel, float (&c)[array_size(kColumns)]) const {
    std::uint32_t raw[array_size(kVectors)];
    load_raw_vectors(channel, raw);
    columns(raw, c);
  }
};

}  // namespace jax_bolt
#endif  // JAX_BOLT_EPILOGUE_TRAITS_HPP_
