// Sixteen lanes of plain fp32, and rows of fp32 or bf16 as 16-lane vectors: what norms, attention and indexer share.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>

#include "gemm.h"

namespace shoal {

constexpr int kLanes = 16;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Growable memory of one thread, uninitialised; growing discards its contents.
template <typename T>
class Buffer {
 public:
  T* reserve(int64_t n) {
    if (n > size_) {
      data_.reset(static_cast<T*>(std::aligned_alloc(64, round_up(n * int64_t(sizeof(T)), 64))));
      size_ = n;
    }
    return data_.get();
  }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T[], Free> data_;
  int64_t size_ = 0;
};

// Arithmetic, comparison and ?: work on all lanes.
typedef float Vec __attribute__((vector_size(64)));
typedef int32_t IntVec __attribute__((vector_size(64)));
typedef uint32_t UintVec __attribute__((vector_size(64)));
typedef uint16_t HalfVec __attribute__((vector_size(32)));

inline Vec splat(float x) { return Vec{} + x; }

inline IntVec lane_numbers() { return IntVec{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }

inline Vec fma_vec(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
  for (int i = 0; i < kLanes; ++i) c[i] = std::fma(a[i], b[i], c[i]);
  return c;
#endif
}

// Between 16 words and 16 halves; the compiler's own conversion takes many more instructions.
inline UintVec widen_halves(const uint16_t* p) {
#if defined(__AVX512F__)
  return (UintVec)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#else
  HalfVec half;
  std::memcpy(&half, p, sizeof(half));
  return __builtin_convertvector(half, UintVec);
#endif
}

inline HalfVec narrow_words(UintVec x) {
#if defined(__AVX512F__)
  return (HalfVec)_mm512_cvtepi32_epi16((__m512i)x);
#else
  return __builtin_convertvector(x, HalfVec);
#endif
}

// Loads 16 elements.
inline Vec load_vec(const float* p) {
  Vec x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}

inline Vec load_vec(const bf16* p) { return (Vec)(widen_halves(&p->bits) << 16); }

// Loads the first n (at most 16) elements; the other lanes are zero.
template <typename T>
inline Vec load_vec(const T* p, int64_t n) {
  if (n >= kLanes) return load_vec(p);
  T padded[kLanes] = {};
  std::memcpy(padded, p, size_t(n) * sizeof(T));
  return load_vec(padded);
}

inline void store_vec(float* p, Vec x, int64_t n = kLanes) { std::memcpy(p, &x, size_t(n) * sizeof(float)); }

// One rounding, as from_float<bf16>.
inline void store_vec(bf16* p, Vec x, int64_t n = kLanes) {
  const UintVec u = (UintVec)x;
  const UintVec rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const UintVec bits = x == x ? rounded : ((u >> 16) | 0x40u);
  const HalfVec half = narrow_words(bits);
  std::memcpy(p, &half, size_t(n) * sizeof(bf16));
}

// Rounds n fp32 values once to T.
template <typename T>
inline void round_row(const float* source, int64_t n, T* out) {
  for (int64_t i = 0; i < n; i += kLanes) store_vec(out + i, load_vec(source + i, n - i), n - i < kLanes ? n - i : kLanes);
}

// The sum of 16 lanes in a fixed tree: halves, quarters, eighths, pairs.
inline float sum_lanes(Vec x) {
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) x[i] += x[i + half];
  return x[0];
}

inline float max_lanes(Vec x) {
  float highest = x[0];
  for (int i = 1; i < kLanes; ++i) highest = x[i] > highest ? x[i] : highest;
  return highest;
}

// exp_fixed in every lane.
inline Vec exp_vec(Vec x) {
  const Vec shift = splat(12582912.0f);
  Vec y = x > 89.0f ? splat(89.0f) : x;
  y = y < -104.0f ? splat(-104.0f) : y;
  const Vec n = fma_vec(y, splat(1.44269504f), shift) - shift;
  Vec r = fma_vec(n, splat(-0.693359375f), y);
  r = fma_vec(n, splat(2.12194440e-4f), r);
  Vec p = splat(1.98412698e-4f);
  p = fma_vec(p, r, splat(1.38888889e-3f));
  p = fma_vec(p, r, splat(8.33333333e-3f));
  p = fma_vec(p, r, splat(4.16666667e-2f));
  p = fma_vec(p, r, splat(1.66666667e-1f));
  p = fma_vec(p, r, splat(0.5f));
  p = fma_vec(p, r, splat(1.0f));
  p = fma_vec(p, r, splat(1.0f));
  const IntVec exponent = __builtin_convertvector(n == n ? n : Vec{}, IntVec);
  const IntVec half = exponent >> 1;
  return p * (Vec)((half + 127) << 23) * (Vec)((exponent - half + 127) << 23);
}

// Transposes 16 x 16.
inline void transpose(Vec (&x)[kLanes]) {
#if defined(__AVX512F__)
  // In each pair of rows (i, i + step), the off-diagonal step x step blocks are swapped.
  const auto exchange = [&](auto constant) __attribute__((always_inline)) {
    constexpr int step = decltype(constant)::value;
    alignas(64) int32_t low[kLanes], high[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      low[lane] = (lane & step) ? kLanes + lane - step : lane;
      high[lane] = (lane & step) ? kLanes + lane : lane + step;
    }
    const __m512i low_index = _mm512_load_si512(low), high_index = _mm512_load_si512(high);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if (i & step) continue;
      const __m512 a = (__m512)x[i], b = (__m512)x[i + step];
      x[i] = (Vec)_mm512_permutex2var_ps(a, low_index, b);
      x[i + step] = (Vec)_mm512_permutex2var_ps(a, high_index, b);
    }
  };
  exchange(std::integral_constant<int, 1>{});
  exchange(std::integral_constant<int, 2>{});
  exchange(std::integral_constant<int, 4>{});
  exchange(std::integral_constant<int, 8>{});
#else
  for (int i = 0; i < kLanes; ++i)
    for (int j = 0; j < i; ++j) {
      const float upper = x[j][i];
      x[j][i] = x[i][j];
      x[i][j] = upper;
    }
#endif
}

// A row of A for gemm_panels.
inline void copy_terms(const bf16* source, int64_t k, bf16* out) { swap_pairs(source, k, out); }
inline void copy_terms(const float* source, int64_t k, float* out) { std::memcpy(out, source, size_t(k) * sizeof(float)); }

// Elements of a 64-byte vector; rows given to pack_panel and interleave are padded to a multiple of it.
template <typename T>
constexpr int64_t kVector = 64 / int64_t(sizeof(T));

// 16 rows of k terms, `stride` apart and readable up to round_up(k, kVector<T>), as one panel of columns.
template <typename T>
inline void pack_panel(const T* rows, int64_t stride, int64_t k, T* panel) {
  const int64_t steps = padded_terms<T>(k) / Step<T>::width;
  for (int64_t first = 0; first < steps; first += kLanes) {
    Vec words[kLanes];  // each a term, or two of bf16
    for (int i = 0; i < kLanes; ++i) std::memcpy(&words[i], rows + i * stride + first * Step<T>::width, sizeof(Vec));
    transpose(words);
    for (int64_t s = first; s < std::min<int64_t>(first + kLanes, steps); ++s) {
      UintVec word = (UintVec)words[s - first];
      if constexpr (Step<T>::width == 2) word = word << 16 | word >> 16;
      std::memcpy(panel + s * Step<T>::step, &word, sizeof(word));
    }
  }
}

// The rows of one step of a chain (one of fp32, two of bf16), each a term of `columns` columns, into panels `stride` apart.
// Rows are readable up to round_up(columns, 16).
inline void interleave(const float* const (&rows)[1], int64_t columns, float* panels, int64_t stride) {
  for (int64_t c = 0; c < columns; c += kPanel, panels += stride) std::memcpy(panels, rows[0] + c, sizeof(Vec));
}
inline void interleave(const bf16* const (&rows)[2], int64_t columns, bf16* panels, int64_t stride) {
  for (int64_t c = 0; c < columns; c += kPanel, panels += stride) {
    const UintVec pair = (UintVec)load_vec(rows[0] + c) | (UintVec)load_vec(rows[1] + c) >> 16;
    std::memcpy(panels, &pair, sizeof(pair));
  }
}

}  // namespace shoal
