// Weights in e4m3 with one scale for 128 terms of a row, and panels of them as gemm_panels reads them.
//
// A packed panel: 16 columns, their terms in the order of a panel of T, then their scales
//   [steps of k][16][width] e4m3 | [ceil(k/128)][16] fp32
#pragma once

#include <algorithm>
#include <array>

#include "vec.h"

namespace shoal {

struct e4m3 {
  uint8_t bits;
};

constexpr int64_t kScaleTerms = 128;

// 1 sign, 4 exponent (bias 7), 3 mantissa bits; no infinities, NaN is 0x7f.
inline float to_float(e4m3 x) {
  static const std::array<float, 256> values = [] {
    std::array<float, 256> table;
    for (int b = 0; b < 256; ++b) {
      const int exponent = b >> 3 & 15, mantissa = b & 7;
      const float magnitude = exponent == 0 ? std::ldexp(float(mantissa), -9) : std::ldexp(float(8 + mantissa), exponent - 10);
      table[b] = (b & 0x7f) == 0x7f ? std::numeric_limits<float>::quiet_NaN() : b & 0x80 ? -magnitude : magnitude;
    }
    return table;
  }();
  return values[x.bits];
}

// Bytes of a packed panel of k terms for GEMMs in T; its scales start at a multiple of 4.
template <typename T>
constexpr int64_t fp8_scales_offset(int64_t k) {
  return padded_terms<T>(k) * kPanel;
}
template <typename T>
constexpr int64_t fp8_panel_bytes(int64_t k) {
  return fp8_scales_offset<T>(k) + (k + kScaleTerms - 1) / kScaleTerms * kPanel * int64_t(sizeof(float));
}

// values: n rows of k terms, `stride` apart; scales: [n, ceil(k/128)]; out: panels.
template <typename T>
void pack_fp8(const e4m3* values, int64_t stride, const float* scales, int64_t n, int64_t k, uint8_t* out) {
  const int64_t blocks = (k + kScaleTerms - 1) / kScaleTerms;
  for (int64_t p = 0; p < num_panels(n); ++p, out += fp8_panel_bytes<T>(k)) {
    const int64_t columns = std::min(kPanel, n - p * kPanel);
    std::memset(out, 0, size_t(fp8_panel_bytes<T>(k)));
    for (int64_t j = 0; j < columns; ++j) {
      const e4m3* row = values + (p * kPanel + j) * stride;
      for (int64_t t = 0; t < k; ++t)
        out[t / Step<T>::width * Step<T>::step + j * Step<T>::width + place_in_step<T>(t)] = row[t].bits;
      float scale;
      for (int64_t b = 0; b < blocks; ++b) {
        scale = scales[(p * kPanel + j) * blocks + b];
        std::memcpy(out + fp8_scales_offset<T>(k) + (b * kPanel + j) * int64_t(sizeof(float)), &scale, sizeof(scale));
      }
    }
  }
}

// One step of 16 lanes times their scales, each rounded once to T: the bits of dequantising first.
inline void dequantize_step(const uint8_t* step, Vec scale, float* out) {
  Vec x;
  for (int j = 0; j < kLanes; ++j) x[j] = to_float(e4m3{step[j]});
  store_vec(out, x * scale);
}

inline void dequantize_step(const uint8_t* step, Vec scale, bf16* out) {
#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
  // e4m3 bits shifted to their places in fp16 are the value times 2^-8, exactly.
  const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(step));
  const __m256i sign = _mm256_set1_epi16(int16_t(0x8000)), rest = _mm256_set1_epi16(0x3f80);
  const __m256i upper = _mm256_or_si256(_mm256_and_si256(pairs, sign), _mm256_and_si256(_mm256_srli_epi16(pairs, 1), rest));
  const __m256i lower = _mm256_or_si256(_mm256_and_si256(_mm256_slli_epi16(pairs, 8), sign),
                                        _mm256_and_si256(_mm256_slli_epi16(pairs, 7), rest));
  const __m512 scale_256 = (__m512)(scale * 256.0f);
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(_mm512_mul_ps(_mm512_cvtph_ps(upper), scale_256),
                                                    _mm512_mul_ps(_mm512_cvtph_ps(lower), scale_256));
  // 16 lower, 16 upper ones -> alternating
  alignas(64) static const auto order = [] {
    std::array<uint16_t, 32> index;
    for (int i = 0; i < 32; ++i) index[i] = uint16_t(i / 2 + i % 2 * 16);
    return index;
  }();
  _mm512_storeu_si512(out, _mm512_permutexvar_epi16(_mm512_load_si512(order.data()), both));
#else
  for (int j = 0; j < kLanes; ++j)
    for (int i = 0; i < 2; ++i) out[2 * j + i] = from_float<bf16>(to_float(e4m3{step[2 * j + i]}) * scale[j]);
#endif
}

// Terms [begin, end) of a panel of k into a panel of T; `begin` is a multiple of kScaleTerms. Prefetches `ahead` bytes
// ahead, as panels come from memory.
template <typename T>
void dequantize_panel(const uint8_t* panel, int64_t k, int64_t begin, int64_t end, int64_t ahead, T* out) {
  constexpr int64_t width = Step<T>::width;
  for (int64_t first = begin; first < end; first += kScaleTerms) {
    Vec scale;
    std::memcpy(&scale, panel + fp8_scales_offset<T>(k) + first / kScaleTerms * int64_t(sizeof(Vec)), sizeof(scale));
    for (int64_t t = first; t < std::min(end, first + kScaleTerms); t += width, out += Step<T>::step) {
      __builtin_prefetch(panel + t * kPanel + ahead, 0, 2);
      dequantize_step(panel + t * kPanel, scale, out);
    }
  }
}

}  // namespace shoal
