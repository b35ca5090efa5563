// Element types and scalar functions shared by the CPU kernels.
//
// Everything here is one fixed sequence of correctly rounded operations per element, so a loop over it gives the same
// bits whether the compiler vectorises it or not, wherever the element sits.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__SSE__)
#include <immintrin.h>
#endif

namespace shoal {

// Flushes denormals to zero during its lifetime: threads inherit different modes, and bits must not depend on the thread.
class FlushDenormals {
#if defined(__SSE__)
 public:
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80 | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(saved_); }
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;

 private:
  unsigned saved_;
#else
 public:
  FlushDenormals() {}
#endif
};

struct bf16 {
  uint16_t bits;
};

// Dtype codes of the C interface.
enum DType : int64_t { kFloat32 = 0, kBFloat16 = 1, kFp8 = 2 };  // kFp8: weights only, see fp8.h

// Calls f with a value of the element type that `code` names.
template <typename F>
void with_dtype(int64_t code, F f) {
  code == kBFloat16 ? f(bf16{}) : f(float{});
}

inline float bits_to_float(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

inline uint32_t float_to_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return bits_to_float(uint32_t(x.bits) << 16); }

// One rounding from fp32: to nearest, ties to even; NaN stays NaN; subnormal numbers are kept.
template <typename T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline bf16 from_float<bf16>(float x) {
  uint32_t u = float_to_bits(x);
  uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  uint32_t quiet_nan = (u >> 16) | 0x40u;
  return {uint16_t((u & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded)};
}

// e^x in fp32: x = n ln2 + r with |r| <= ln2/2, a polynomial of degree 7 in r, scaled by 2^n. Within 2 ulp; 0 below
// -104, infinity above 88.8, NaN for NaN.
inline float exp_fixed(float x) {
  const float round_shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
  float y = x > 89.0f ? 89.0f : x;
  y = y < -104.0f ? -104.0f : y;
  float n = std::fma(y, 1.44269504f, round_shift) - round_shift;
  float r = std::fma(n, -0.693359375f, y);
  r = std::fma(n, 2.12194440e-4f, r);
  float p = 1.98412698e-4f;
  p = std::fma(p, r, 1.38888889e-3f);
  p = std::fma(p, r, 8.33333333e-3f);
  p = std::fma(p, r, 4.16666667e-2f);
  p = std::fma(p, r, 1.66666667e-1f);
  p = std::fma(p, r, 0.5f);
  p = std::fma(p, r, 1.0f);
  p = std::fma(p, r, 1.0f);
  // 2^n in two factors, because n runs from -150 to 128 and a float's exponent does not.
  float whole = n == n ? n : 0.0f;
  int32_t exponent = int32_t(whole);
  int32_t half = exponent >> 1;
  return p * bits_to_float(uint32_t(half + 127) << 23) * bits_to_float(uint32_t(exponent - half + 127) << 23);
}

}  // namespace shoal
