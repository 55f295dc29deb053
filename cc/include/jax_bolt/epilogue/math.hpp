// SPDX-License-Identifier: Apache-2.0
// What the operations of an epilogue mean: f32 (or bool) in, f32 (or bool) out, as jax.lax defines
// them. No CUDA or CUTLASS header: the same functions run on a host, which is how they are tested.
//
// One name per entry of ir.ARITHMETIC; `and`, `or`, `xor`, `not` are C++ tokens, so those end in
// an underscore. The libm names (expf, ...) are CUDA's full-precision device functions in device
// code: at most 2 ulp unless said otherwise here.
#ifndef JAX_BOLT_EPILOGUE_MATH_HPP_
#define JAX_BOLT_EPILOGUE_MATH_HPP_

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "jax_bolt/epilogue/traits.hpp"

namespace jax_bolt {
namespace math {

JAX_BOLT_HOST_DEVICE float inf() { return __builtin_huge_valf(); }
JAX_BOLT_HOST_DEVICE float nan() { return __builtin_nanf(""); }

JAX_BOLT_HOST_DEVICE float to_float(bool x) { return x ? 1.0f : 0.0f; }
JAX_BOLT_HOST_DEVICE float to_float(float x) { return x; }

/// Rounded to bfloat16, to nearest even. On bits: no 16-bit type is needed here.
JAX_BOLT_HOST_DEVICE float to_bf16(float x) {
  if (x != x) return x;
  std::uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  bits = (bits + 0x7fffu + (bits >> 16 & 1u)) & 0xffff0000u;
  memcpy(&x, &bits, sizeof(bits));
  return x;
}

/// Rounded to float16, to nearest even; inf from 65520 on.
JAX_BOLT_HOST_DEVICE float to_f16(float x) {
  if (x != x) return x;
  float const size = ::fabsf(x);
  if (size >= 65520.0f) return ::copysignf(inf(), x);
  // Below the least normal number the values are multiples of 2^-24, as floats around 0.5 are.
  if (size < 0x1p-14f) return ::copysignf((size + 0.5f) - 0.5f, x);
  std::uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  bits = (bits + 0xfffu + (bits >> 13 & 1u)) & 0xffffe000u;
  memcpy(&x, &bits, sizeof(bits));
  return x;
}

// Arithmetic.
JAX_BOLT_HOST_DEVICE float neg(float x) { return -x; }
JAX_BOLT_HOST_DEVICE float abs(float x) { return ::fabsf(x); }
JAX_BOLT_HOST_DEVICE float square(float x) { return x * x; }
JAX_BOLT_HOST_DEVICE float add(float a, float b) { return a + b; }
JAX_BOLT_HOST_DEVICE float sub(float a, float b) { return a - b; }
JAX_BOLT_HOST_DEVICE float mul(float a, float b) { return a * b; }
/// On a device within 2 ulp: the rounded quotient takes some twenty instructions and a branch.
JAX_BOLT_HOST_DEVICE float div(float a, float b) {
#if defined(__CUDA_ARCH__)
  float r;
  asm("div.full.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
#else
  return a / b;
#endif
}
/// The remainder with the sign of `a`.
JAX_BOLT_HOST_DEVICE float rem(float a, float b) { return ::fmodf(a, b); }
/// Zeros keep their sign and NaN stays NaN.
JAX_BOLT_HOST_DEVICE float sign(float x) { return x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : x; }
JAX_BOLT_HOST_DEVICE float floor(float x) { return ::floorf(x); }
JAX_BOLT_HOST_DEVICE float ceil(float x) { return ::ceilf(x); }
JAX_BOLT_HOST_DEVICE float round_even(float x) { return ::rintf(x); }
JAX_BOLT_HOST_DEVICE float round_away(float x) { return ::roundf(x); }

/// The larger; NaN if either is, and +0 over -0. fmaxf would drop the NaN.
JAX_BOLT_HOST_DEVICE float max(float a, float b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
#else
  if (a != a || b != b) return nan();
  if (a == b) return ::copysignf(1.0f, a) < 0.0f ? b : a;
  return a > b ? a : b;
#endif
}

/// The smaller; NaN if either is, and -0 over +0.
JAX_BOLT_HOST_DEVICE float min(float a, float b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  float r;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
#else
  if (a != a || b != b) return nan();
  if (a == b) return ::copysignf(1.0f, a) < 0.0f ? a : b;
  return a < b ? a : b;
#endif
}

JAX_BOLT_HOST_DEVICE float clamp(float lo, float x, float hi) { return min(max(x, lo), hi); }

// Powers and roots.
JAX_BOLT_HOST_DEVICE float sqrt(float x) { return ::sqrtf(x); }
JAX_BOLT_HOST_DEVICE float cbrt(float x) { return ::cbrtf(x); }
JAX_BOLT_HOST_DEVICE float rsqrt(float x) {
#if defined(__CUDA_ARCH__)
  return ::rsqrtf(x);
#else
  return 1.0f / ::sqrtf(x);
#endif
}
JAX_BOLT_HOST_DEVICE float pow(float a, float b) { return ::powf(a, b); }

/// x to the N by repeated squaring, in the order lax.integer_pow multiplies.
template <int N>
JAX_BOLT_HOST_DEVICE float integer_pow(float x) {
  if constexpr (N == 0) {
    return 1.0f;
  } else if constexpr (N < 0) {
    // As unsigned, so that the most negative exponent has a magnitude too.
    float result = 1.0f;
    for (unsigned n = 0u - static_cast<unsigned>(N); n != 0; n >>= 1, x *= x) {
      if (n & 1u) result *= x;
    }
    return 1.0f / result;
  } else {
    float result = 1.0f;
    for (unsigned n = N; n != 0; n >>= 1, x *= x) {
      if (n & 1u) result *= x;
    }
    return result;
  }
}

// Exponentials and logarithms.
JAX_BOLT_HOST_DEVICE float exp(float x) { return ::expf(x); }
JAX_BOLT_HOST_DEVICE float exp2(float x) { return ::exp2f(x); }
JAX_BOLT_HOST_DEVICE float expm1(float x) { return ::expm1f(x); }
JAX_BOLT_HOST_DEVICE float log(float x) { return ::logf(x); }
JAX_BOLT_HOST_DEVICE float log1p(float x) { return ::log1pf(x); }

/// 1 / (1 + exp(-x)). On a device within 4 ulp, and 0 below x = -87.3 (exact: < 1.2e-38).
JAX_BOLT_HOST_DEVICE float logistic(float x) {
  float const e = ::expf(-x);
#if defined(__CUDA_ARCH__)
  // The approximate quotient costs a tenth of the rounded one, which dominated silu.
  return __fdividef(1.0f, 1.0f + e);
#else
  return 1.0f / (1.0f + e);
#endif
}

// Circular and hyperbolic functions.
JAX_BOLT_HOST_DEVICE float sin(float x) { return ::sinf(x); }
JAX_BOLT_HOST_DEVICE float cos(float x) { return ::cosf(x); }
JAX_BOLT_HOST_DEVICE float tan(float x) { return ::tanf(x); }
JAX_BOLT_HOST_DEVICE float asin(float x) { return ::asinf(x); }
JAX_BOLT_HOST_DEVICE float acos(float x) { return ::acosf(x); }
JAX_BOLT_HOST_DEVICE float atan(float x) { return ::atanf(x); }
JAX_BOLT_HOST_DEVICE float atan2(float a, float b) { return ::atan2f(a, b); }
JAX_BOLT_HOST_DEVICE float sinh(float x) { return ::sinhf(x); }
JAX_BOLT_HOST_DEVICE float cosh(float x) { return ::coshf(x); }
JAX_BOLT_HOST_DEVICE float tanh(float x) { return ::tanhf(x); }
JAX_BOLT_HOST_DEVICE float asinh(float x) { return ::asinhf(x); }
JAX_BOLT_HOST_DEVICE float acosh(float x) { return ::acoshf(x); }
JAX_BOLT_HOST_DEVICE float atanh(float x) { return ::atanhf(x); }

// The error function.
JAX_BOLT_HOST_DEVICE float erf(float x) { return ::erff(x); }

/// 1 - erf(x), what jax.nn.gelu is made of: relative error below 1e-6 for x < 3, 8e-6 beyond.
///
/// erfcf's cases cost a GELU three times this. Here t exp(p(t) - x^2), t = 2 / (2 + |x|), serves
/// all x; p is the minimax polynomial of log(erfc(x) / t) + x^2 for the degree.
JAX_BOLT_HOST_DEVICE float erfc(float x) {
  float const size = ::fabsf(x), t = div(2.0f, 2.0f + size);
  float p = 0.06917167454957962f;
  p = ::fmaf(p, t, -0.5107840299606323f);
  p = ::fmaf(p, t, 1.3870608806610107f);
  p = ::fmaf(p, t, -1.6858956813812256f);
  p = ::fmaf(p, t, 0.7896924018859863f);
  p = ::fmaf(p, t, -0.2110544741153717f);
  p = ::fmaf(p, t, 0.4332953691482544f);
  p = ::fmaf(p, t, 0.9937469363212585f);
  p = ::fmaf(p, t, -1.2652333974838257f);
  float const tail = t * ::expf(::fmaf(-size, size, p));
  return x < 0.0f ? 2.0f - tail : tail;
}

/// factor / (1 + 2^w), by instructions that are at most 2 ulp off.
JAX_BOLT_HOST_DEVICE float over_power(float factor, float w) {
#if defined(__CUDA_ARCH__)
  float e, r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(w));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(1.0f + e));
  return factor * r;
#else
  return factor / (1.0f + ::exp2f(w));
#endif
}

/// y p(y^2), where y = scale x. Of a constant scale, the coefficients are as constant.
template <int kCount>
JAX_BOLT_HOST_DEVICE float odd(float x, float scale, float const (&coefficients)[kCount]) {
  float const square = scale * scale;
  float scaled[kCount];
  for (int i = 0; i < kCount; ++i, scale *= square) scaled[i] = coefficients[i] * scale;
  float p = scaled[kCount - 1];
  for (int i = kCount - 2; i >= 0; --i) p = ::fmaf(p, x * x, scaled[i]);
  return x * p;
}

// What follows is for results of which 16 bits are kept: factor f(y), where y = scale x, in few
// instructions. Both factors are constants of moderate size (kernels/idioms.py).

/// Of 1 / (1 + exp(-y)), whose relative error is that of the exponential's rounded argument.
JAX_BOLT_HOST_DEVICE float logistic_narrow(float x, float scale, float factor) {
  return over_power(factor, (-1.44269504f * scale) * x);
}

/// Of erfc, for float16: relative error below 1.2e-4 for y < 3.6, an eighth of float16's spacing,
/// and below 1e-9 absolute beyond. As 2 / (1 + 2^w), w being y times the minimax polynomial in y^2
/// of log2((2 - erfc) / erfc) / y.
JAX_BOLT_HOST_DEVICE float erfc_f16(float x, float scale, float factor) {
  float const coefficients[] = {3.2548900f,     2.9902998e-01f,  -2.5787249e-03f, -1.0801989e-03f,
                                1.3389476e-04f, -7.0440483e-06f, 1.4365479e-07f};
  return over_power(2.0f * factor, odd(x, scale, coefficients));
}

/// The same for bfloat16: below 6e-4 for y < 3.2, a sixth of its spacing, and 2e-8 beyond.
JAX_BOLT_HOST_DEVICE float erfc_bf16(float x, float scale, float factor) {
  float const coefficients[] = {3.2516798f, 3.0558141e-01f, -6.5216103e-03f, -6.6425911e-05f,
                                9.6385581e-06f};
  return over_power(2.0f * factor, odd(x, scale, coefficients));
}

/// The x with erf(x) = y: +-inf at +-1, NaN beyond.
JAX_BOLT_HOST_DEVICE float erf_inv(float y) {
#if defined(__CUDA_ARCH__)
  return ::erfinvf(y);
#else
  double const z = y;
  if (!(z > -1.0 && z < 1.0)) {
    return z == 1.0 ? inf() : z == -1.0 ? -inf() : nan();
  }
  if (z == 0.0) return y;
  // Winitzki's closed form (2e-3 relative), then Newton steps in double.
  double const l = ::log1p(-z * z);
  double const t = 2.0 / (M_PI * 0.147) + 0.5 * l;
  // t + root has no cancellation, where root - t has it all for a small z.
  double const root = ::sqrt(t * t - l / 0.147);
  double x = ::sqrt(-l / 0.147 / (root + t));
  double const size = ::fabs(z);
  for (int i = 0; i < 4; ++i) {
    // erf(x) - |z|, without cancellation near 1.
    double const miss = size < 0.5 ? ::erf(x) - size : (1.0 - size) - ::erfc(x);
    x -= miss * 0.5 * ::sqrt(M_PI) * ::exp(x * x);
  }
  x = ::copysign(x, z);
  return static_cast<float>(x);
#endif
}

// Predicates. Comparisons with NaN are false, but for ne.
template <class T>
JAX_BOLT_HOST_DEVICE bool eq(T a, T b) {
  return a == b;
}
template <class T>
JAX_BOLT_HOST_DEVICE bool ne(T a, T b) {
  return a != b;
}
template <class T>
JAX_BOLT_HOST_DEVICE bool lt(T a, T b) {
  return a < b;
}
template <class T>
JAX_BOLT_HOST_DEVICE bool le(T a, T b) {
  return a <= b;
}
template <class T>
JAX_BOLT_HOST_DEVICE bool gt(T a, T b) {
  return a > b;
}
template <class T>
JAX_BOLT_HOST_DEVICE bool ge(T a, T b) {
  return a >= b;
}
JAX_BOLT_HOST_DEVICE bool and_(bool a, bool b) { return a && b; }
JAX_BOLT_HOST_DEVICE bool or_(bool a, bool b) { return a || b; }
JAX_BOLT_HOST_DEVICE bool xor_(bool a, bool b) { return a != b; }
JAX_BOLT_HOST_DEVICE bool not_(bool a) { return !a; }
JAX_BOLT_HOST_DEVICE bool is_finite(float x) { return ::fabsf(x) <= FLT_MAX; }

/// lax.select_n's order: the value where the predicate is false comes first.
template <class T>
JAX_BOLT_HOST_DEVICE T select(bool predicate, T where_false, T where_true) {
  return predicate ? where_true : where_false;
}

}  // namespace math
}  // namespace jax_bolt
#endif  // JAX_BOLT_EPILOGUE_MATH_HPP_
