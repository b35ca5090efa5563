// Quantisation of rows to e4m3 with an fp32 scale per 128 values; contract in kernels/quant.py. All functions need
// FlushDenormals.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "fp8.h"
#include "vec.h"

namespace shoal {

typedef uint8_t ByteVec __attribute__((vector_size(16)));

// Loads the first n bytes, at most 16; the other lanes are zero.
inline ByteVec load_bytes(const char* p, int64_t n) {
  ByteVec x = {};
  n >= kLanes ? std::memcpy(&x, p, sizeof(x)) : std::memcpy(&x, p, size_t(n));
  return x;
}

inline void store_bytes(char* p, ByteVec x, int64_t n) {
  n >= kLanes ? std::memcpy(p, &x, sizeof(x)) : std::memcpy(p, &x, size_t(n));
}

// Magnitudes up to 448 -> e4m3, to nearest, ties to even; NaN stays NaN.
inline ByteVec to_e4m3(Vec x) {
  const UintVec bits = (UintVec)x, magnitude = bits & 0x7fffffffu;
  const UintVec normal = ((magnitude + 0x7ffffu + ((magnitude >> 20) & 1u)) >> 20) - (120u << 3);
  // below 2^-6 numbers are 2^-9 apart, as floats are from 2^14 on: adding it rounds
  const UintVec small = (UintVec)((Vec)magnitude + 16384.0f) - 0x46800000u;
  UintVec code = magnitude < 0x3c800000u ? small : normal;
  code = x == x ? code : UintVec{} + 0x7fu;
  return __builtin_convertvector(code | ((bits >> 24) & 0x80u), ByteVec);
}

inline Vec from_e4m3(ByteVec x) {
  const UintVec code = __builtin_convertvector(x, UintVec), magnitude = code & 0x7fu;
  const UintVec small = (UintVec)(__builtin_convertvector((IntVec)magnitude, Vec) * 0x1p-9f);
  UintVec bits = magnitude < 8u ? small : (magnitude << 20) + (120u << 23);
  bits = magnitude == 0x7fu ? UintVec{} + 0x7fc00000u : bits;
  return (Vec)(bits | ((code & 0x80u) << 24));
}

// The least power of two that is at least max(magnitude, 1e-4) / 448.
inline float fp8_scale(float magnitude) {
  const uint32_t bits = float_to_bits(std::max(magnitude, 1e-4f) / 448.0f);
  return bits_to_float(std::min(bits + 0x7fffffu, 254u << 23) & 0x7f800000u);
}

// n numbers -> n codes and ceil(n / 128) scales, which need not be aligned.
template <typename T>
inline void quantize_row(const T* x, int64_t n, char* codes, char* scales) {
  for (int64_t begin = 0; begin < n; begin += kScaleTerms, scales += sizeof(float)) {
    const int64_t end = std::min(n, begin + kScaleTerms);
    Vec highest = {};
    for (int64_t i = begin; i < end; i += kLanes) {
      const Vec magnitude = (Vec)((UintVec)load_vec(x + i, end - i) & 0x7fffffffu);
      highest = magnitude > highest ? magnitude : highest;  // ignores NaN
    }
    const float scale = fp8_scale(max_lanes(highest));
    std::memcpy(scales, &scale, sizeof(scale));
    for (int64_t i = begin; i < end; i += kLanes) {
      Vec scaled = load_vec(x + i, end - i) / scale;
      scaled = scaled > 448.0f ? splat(448.0f) : scaled;
      scaled = scaled < -448.0f ? splat(-448.0f) : scaled;
      store_bytes(codes + i, to_e4m3(scaled), end - i);
    }
  }
}

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
// Converts 32 codes at a time through fp16, which holds them times 2^-8; returns the number of converted codes.
inline int64_t dequantize_vectors(const char* codes, float scale, int64_t n, bf16* out) {
  if (!(scale < 0x1p118f)) return 0;  // the factor would overflow
  const __m512 factor = _mm512_set1_ps(scale * 256.0f);
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    const __m512i code = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i)));
    __m512i half = _mm512_and_si512(_mm512_slli_epi16(code, 7), _mm512_set1_epi16(int16_t(0xbf80)));
    const __m512i magnitude = _mm512_and_si512(half, _mm512_set1_epi16(0x3f80));
    const __mmask32 nan = _mm512_cmpeq_epi16_mask(magnitude, _mm512_set1_epi16(0x3f80));
    half = _mm512_or_si512(half, _mm512_maskz_set1_epi16(nan, 0x7e00));
    const __m512 low = _mm512_mul_ps(_mm512_cvtph_ps(_mm512_castsi512_si256(half)), factor);
    const __m512 high = _mm512_mul_ps(_mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1)), factor);
    _mm512_storeu_si512(out + i, (__m512i)_mm512_cvtne2ps_pbh(high, low));
  }
  return i;
}
#else
inline int64_t dequantize_vectors(const char*, float, int64_t, bf16*) { return 0; }
#endif
inline int64_t dequantize_vectors(const char*, float, int64_t, float*) { return 0; }

// n codes and their scales -> code * scale in fp32, rounded to T.
template <typename T>
inline void dequantize_row(const char* codes, const char* scales, int64_t n, T* out) {
  for (int64_t begin = 0; begin < n; begin += kScaleTerms, scales += sizeof(float)) {
    const int64_t end = std::min(n, begin + kScaleTerms);
    float scale;
    std::memcpy(&scale, scales, sizeof(scale));
    for (int64_t i = begin + dequantize_vectors(codes + begin, scale, end - begin, out + begin); i < end; i += kLanes) {
      const Vec x = from_e4m3(load_bytes(codes + i, end - i)) * scale;
      end - i >= kLanes ? store_vec(out + i, x) : store_vec(out + i, x, end - i);
    }
  }
}

}  // namespace shoal
