// What the attention, indexer, norm and router kernels share: 16 lanes of plain fp32, queries as
// packed panels, and the way from a position to its record.
#pragma once

#include <cstring>
#include <limits>
#include <type_traits>
#if defined(__SSE__)
#include <immintrin.h>
#endif

#include "gemm.h"

namespace shoal {

constexpr int kLanes = 16;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// What an operation reports; kernels/attention.py turns it into an error.
enum Status : int64_t { kOk = 0, kOutOfRange = 1 };

// Denormals are zero while it lives: threads inherit different modes, and bits must not depend on the thread.
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

// One vector of fp32; arithmetic, comparison and ?: work on all lanes.
typedef float Vec __attribute__((vector_size(64)));
typedef int32_t IntVec __attribute__((vector_size(64)));

inline Vec splat(float x) { return Vec{} + x; }

// The first n (at most 16) elements; the other lanes are zero.
template <typename T>
inline Vec load_vec(const T* p, int64_t n = kLanes) {
  float lanes[kLanes];
  if (n >= kLanes) {
    for (int i = 0; i < kLanes; ++i) lanes[i] = to_float(p[i]);
  } else {
    for (int i = 0; i < kLanes; ++i) lanes[i] = i < n ? to_float(p[i]) : 0.0f;
  }
  Vec x;
  std::memcpy(&x, lanes, sizeof(x));
  return x;
}

inline void store_vec(float* p, Vec x, int64_t n = kLanes) { std::memcpy(p, &x, n * sizeof(float)); }

// The sum of 16 lanes in a fixed tree: halves, quarters, eighths, pairs.
inline float sum_lanes(Vec x) {
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) x[i] += x[i + half];
  return x[0];
}

// 16 x 16: rows become columns.
inline void transpose(Vec (&x)[kLanes]) {
#if defined(__AVX512F__)
  // In each pair of rows (i, i + step), the step x step squares off the diagonal change places.
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

// Elements of 16 queries of k terms side by side: [k][16].
constexpr int64_t query_panel_size(int64_t k) { return k * kLanes; }

// `k` terms of one query as one lane of a panel, from term 0 of `lane` on.
template <typename T>
inline void pack_query(const T* query, int64_t k, float* lane) {
  for (int64_t t = 0; t < k; ++t) lane[t * kLanes] = to_float(query[t]);
}

// Dots of `Keys` keys with `Panels` panels of queries; each is one fma chain over ascending terms that starts at 0.
template <int Keys, int Panels>
inline void dot_block(const float* keys, int64_t key_stride, const float* queries, int64_t k, float* dots, int64_t stride) {
  Lanes acc[Keys][Panels];
#pragma GCC unroll 16
  for (int i = 0; i < Keys; ++i)
#pragma GCC unroll 2
    for (int p = 0; p < Panels; ++p) acc[i][p] = broadcast_lanes(0.0f);
  for (int64_t t = 0; t < k; ++t) {
    Lanes q[Panels];
#pragma GCC unroll 2
    for (int p = 0; p < Panels; ++p) q[p] = load_lanes(queries + p * query_panel_size(k) + t * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < Keys; ++i) {
      const Lanes key = broadcast_lanes(keys[i * key_stride + t]);
#pragma GCC unroll 2
      for (int p = 0; p < Panels; ++p) acc[i][p] = fma_lanes(key, q[p], acc[i][p]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < Keys; ++i)
#pragma GCC unroll 2
    for (int p = 0; p < Panels; ++p) store_lanes(dots + i * stride + p * kLanes, acc[i][p]);
}

// dots[key][lane of all panels] for `num_keys` keys, a multiple of 16.
inline void dot_keys(const float* keys, int64_t key_stride, int64_t num_keys, const float* queries, int64_t panels,
                     int64_t k, float* dots) {
  const int64_t stride = panels * kLanes;
  for (; panels >= 2; panels -= 2, queries += 2 * query_panel_size(k), dots += 2 * kLanes)
    for (int64_t i = 0; i < num_keys; i += 8)
      dot_block<8, 2>(keys + i * key_stride, key_stride, queries, k, dots + i * stride, stride);
  if (panels == 1)
    for (int64_t i = 0; i < num_keys; i += 16)
      dot_block<16, 1>(keys + i * key_stride, key_stride, queries, k, dots + i * stride, stride);
}

// Where the records of a batch of sequences are; a position outside the table or the cache has none.
template <typename T>
struct PagedRecords {
  const T* records;
  int64_t row_stride, num_slots;
  const int32_t* block_tables;  // [B, max_blocks]
  int64_t max_blocks, block_size;

  const T* find(int64_t sequence, int64_t position) const {
    const int64_t index = position / block_size;
    if (position < 0 || index >= max_blocks) return nullptr;
    const int64_t slot = block_tables[sequence * max_blocks + index] * block_size + position % block_size;
    return slot < 0 || slot >= num_slots ? nullptr : records + slot * row_stride;
  }
};

}  // namespace shoal
