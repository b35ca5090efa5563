// The matrix product of every CPU kernel: fp32 rows of A times packed panels of B, in fp32.
//
// Contract. C[i][j] is one fp32 chain over k ascending that starts at 0 (or at C[i][j] when accumulating):
//   acc = fma(A[i][k], B[j][k], acc)        bf16 operands are widened to fp32, which is exact
// So an element's bits never depend on how many rows or columns there are, on tiling, on threads, on the type B is
// stored in, or on the instruction set. A product cut in two along k, the second part accumulating, equals the
// uncut one. (vdpbf16ps is not used: it rounds in another way, few CPUs have it, and on Sapphire Rapids it does 64
// operations every other cycle where fma does 64 in each.)
//
// Packed layout. B has n output columns and k terms each. 16 columns form a panel; a step is 64 bytes:
//   float [ceil(n/16)][k][16]              panel p, step k,   lane j      = B[16p + j][k]
//   bf16  [ceil(n/16)][ceil(k/2)][16][2]   panel p, step k/2, lane j, k%2 = B[16p + j][k]
// Missing columns and the missing odd term are zero. packed_size<T>(n, k) is the number of elements.
//
// Use: pack_rows / pack_columns once per B (bf16 sources may be packed as float: faster to multiply, twice the size),
// to_floats for a row of A, then gemm_panels. All are single-threaded and allocate nothing.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "types.h"

#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__))
#include <immintrin.h>
#endif

namespace shoal {

constexpr int64_t kPanel = 16;

// The 16 fp32 lanes of one row x one panel.
#if defined(__AVX512F__)
struct Lanes {
  __m512 v;
};
inline Lanes load_lanes(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store_lanes(float* p, Lanes x) { _mm512_storeu_ps(p, x.v); }
inline Lanes broadcast_lanes(float x) { return {_mm512_set1_ps(x)}; }
inline Lanes fma_lanes(Lanes a, Lanes b, Lanes c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
constexpr int kMaxRows = 8;
// Panels per tile: at most 24 accumulators, and at least 8 chains for few rows.
constexpr int max_panels(int rows) { return rows <= 3 ? 8 : rows <= 6 ? 4 : 3; }
#elif defined(__AVX2__) && defined(__FMA__)
struct Lanes {
  __m256 lo, hi;
};
inline Lanes load_lanes(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store_lanes(float* p, Lanes x) {
  _mm256_storeu_ps(p, x.lo);
  _mm256_storeu_ps(p + 8, x.hi);
}
inline Lanes broadcast_lanes(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Lanes fma_lanes(Lanes a, Lanes b, Lanes c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
constexpr int kMaxRows = 4;
constexpr int max_panels(int rows) { return rows <= 1 ? 4 : rows <= 2 ? 2 : 1; }
#else
struct Lanes {
  float v[16];
};
inline Lanes load_lanes(const float* p) {
  Lanes x;
  std::memcpy(x.v, p, sizeof(x.v));
  return x;
}
inline void store_lanes(float* p, Lanes x) { std::memcpy(p, x.v, sizeof(x.v)); }
inline Lanes broadcast_lanes(float value) {
  Lanes x;
  for (int j = 0; j < 16; ++j) x.v[j] = value;
  return x;
}
inline Lanes fma_lanes(Lanes a, Lanes b, Lanes c) {
  for (int j = 0; j < 16; ++j) c.v[j] = std::fma(a.v[j], b.v[j], c.v[j]);
  return c;
}
constexpr int kMaxRows = 4;
constexpr int max_panels(int) { return 1; }
#endif

// The terms of one 64-byte step of a panel: `width` of them, `step` packed elements.
template <typename T>
struct Step;

template <>
struct Step<float> {
  static constexpr int width = 1;
  static constexpr int step = 16;
  template <int>
  static Lanes load(const float* p) {
    return load_lanes(p);
  }
};

template <>
struct Step<bf16> {
  static constexpr int width = 2;
  static constexpr int step = 32;
  template <int term>
  static Lanes load(const bf16* p) {
#if defined(__AVX512F__)
    __m512i pairs = _mm512_loadu_si512(p);
    return {_mm512_castsi512_ps(term == 0 ? _mm512_slli_epi32(pairs, 16)
                                          : _mm512_and_si512(pairs, _mm512_set1_epi32(int32_t(0xffff0000u))))};
#else
    float lanes[16];
    for (int j = 0; j < 16; ++j) {
      uint32_t pair;
      std::memcpy(&pair, p + 2 * j, 4);
      lanes[j] = bits_to_float(term == 0 ? pair << 16 : pair & 0xffff0000u);
    }
    return load_lanes(lanes);
#endif
  }
};

// Elements of one packed panel of k terms.
template <typename T>
constexpr int64_t panel_size(int64_t k) {
  return (k + Step<T>::width - 1) / Step<T>::width * Step<T>::step;
}

constexpr int64_t num_panels(int64_t n) { return (n + kPanel - 1) / kPanel; }

// Elements of a packed [n, k] matrix.
template <typename T>
constexpr int64_t packed_size(int64_t n, int64_t k) {
  return num_panels(n) * panel_size<T>(k);
}

template <typename To, typename From>
inline To convert(From x) {
  return from_float<To>(to_float(x));
}

template <typename T>
inline void to_floats(const T* source, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = to_float(source[i]);
}

// Packs B[j][t] = rows[j * stride + t], j < n, t < k (each row of the source is an output column) into `out`.
template <typename T, typename Source>
void pack_rows(const Source* rows, int64_t stride, int64_t n, int64_t k, T* out) {
  constexpr int width = Step<T>::width;
  for (int64_t p = 0; p < num_panels(n); ++p, out += panel_size<T>(k)) {
    const Source* panel = rows + p * kPanel * stride;
    const int64_t columns = n - p * kPanel < kPanel ? n - p * kPanel : kPanel;
    if (columns < kPanel || k % width) std::memset(out, 0, panel_size<T>(k) * sizeof(T));
    int64_t t = 0;
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<T, Source>) {
      if (columns == kPanel && stride < (1 << 24)) {  // 32-bit offsets, a step of 16 words at once
        const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        const __m512i offsets = _mm512_mullo_epi32(lane, _mm512_set1_epi32(int32_t(stride * int64_t(sizeof(T)))));
        for (; t + width <= k; t += width)
          _mm512_storeu_si512(out + t / width * Step<T>::step, _mm512_i32gather_epi32(offsets, panel + t, 1));
      }
    }
#endif
    for (; t < k; ++t) {
      T* step = out + t / width * Step<T>::step + t % width;
      for (int64_t j = 0; j < columns; ++j) step[j * width] = convert<T>(panel[j * stride + t]);
    }
  }
}

// Packs B[j][t] = source[t * stride + j], j < n, t < k (each row of the source holds one term of all columns).
template <typename T, typename Source>
void pack_columns(const Source* source, int64_t stride, int64_t n, int64_t k, T* out) {
  constexpr int width = Step<T>::width;
  for (int64_t p = 0; p < num_panels(n); ++p, out += panel_size<T>(k)) {
    const int64_t columns = n - p * kPanel < kPanel ? n - p * kPanel : kPanel;
    if (columns < kPanel || k % width) std::memset(out, 0, panel_size<T>(k) * sizeof(T));
    for (int64_t t = 0; t < k; ++t) {
      const Source* row = source + t * stride + p * kPanel;
      T* step = out + t / width * Step<T>::step + t % width;
      for (int64_t j = 0; j < columns; ++j) step[j * width] = convert<T>(row[j]);
    }
  }
}

// The panels of one product, `stride` elements apart: more than panel_size(k) when k is part of a longer chain.
template <typename T>
struct Panels {
  const T* data;
  int64_t count;
  int64_t stride;
};

// acc[r][p] += one term of the chain, for all rows and panels of a tile.
template <typename T, int term, int MR, int NP>
inline void add_term(Lanes (&acc)[MR][NP], const float* a, int64_t lda, const T* step, int64_t stride) {
  Lanes b[NP];
#pragma GCC unroll 8
  for (int p = 0; p < NP; ++p) b[p] = Step<T>::template load<term>(step + p * stride);
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r) {
    const Lanes ar = broadcast_lanes(a[r * lda + term]);
#pragma GCC unroll 8
    for (int p = 0; p < NP; ++p) acc[r][p] = fma_lanes(ar, b[p], acc[r][p]);
  }
}

// What to bring into the cache while a tile is computed: `lines` cache lines in each step, from `next` on.
struct Prefetch {
  const char* next;
  int64_t lines;
};

// One register tile: MR rows x NP panels.
template <typename T, int MR, int NP>
void gemm_tile(const float* a, int64_t lda, const T* packed, int64_t stride, int64_t k, float* c, int64_t ldc,
               bool accumulate, Prefetch ahead) {
  constexpr int width = Step<T>::width;
  Lanes acc[MR][NP];
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 8
    for (int p = 0; p < NP; ++p)
      acc[r][p] = accumulate ? load_lanes(c + r * ldc + p * kPanel) : broadcast_lanes(0.0f);
  for (int64_t s = 0; s < k / width; ++s, a += width, packed += Step<T>::step) {
    for (int64_t line = 0; line < ahead.lines; ++line, ahead.next += 64)
      __builtin_prefetch(ahead.next, 0, 2);
    add_term<T, 0>(acc, a, lda, packed, stride);
    if constexpr (width == 2) add_term<T, 1>(acc, a, lda, packed, stride);
  }
  if (k % width) add_term<T, 0>(acc, a, lda, packed, stride);
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 8
    for (int p = 0; p < NP; ++p) store_lanes(c + r * ldc + p * kPanel, acc[r][p]);
}

// MR rows x all panels: as many NP-panel tiles as fit, then narrower ones.
template <typename T, int MR, int NP = max_panels(MR)>
void gemm_rows(const float* a, int64_t lda, Panels<T> b, int64_t k, float* c, int64_t ldc, bool accumulate,
               Prefetch ahead) {
  for (; b.count >= NP; b.count -= NP, b.data += NP * b.stride, c += NP * kPanel) {
    gemm_tile<T, MR, NP>(a, lda, b.data, b.stride, k, c, ldc, accumulate, ahead);
  }
  if constexpr (NP > 1) gemm_rows<T, MR, (NP > 4 ? 4 : NP - 1)>(a, lda, b, k, c, ldc, accumulate, ahead);
}

template <typename T, int MR = kMaxRows>
void gemm_row_tile(int64_t rows, const float* a, int64_t lda, Panels<T> b, int64_t k, float* c, int64_t ldc,
                   bool accumulate, Prefetch ahead) {
  if (rows == MR) return gemm_rows<T, MR>(a, lda, b, k, c, ldc, accumulate, ahead);
  if constexpr (MR > 1) gemm_row_tile<T, MR - 1>(rows, a, lda, b, k, c, ldc, accumulate, ahead);
}

// What is read only once comes from memory, and only a core that asks for it early computes meanwhile.
enum class Source { kCache, kMemory };

// Cache lines to ask for in each step of a tile, so that `tiles` passes over `panels` panels bring in as many again.
// None for up to 3 rows, where the hardware's prefetcher keeps up, nor for many tiles, where memory is far ahead.
constexpr int64_t prefetch_lines(int64_t rows, int64_t tiles, int64_t panels) {
  return rows <= 3 || tiles > 6 ? 0 : (panels + tiles - 1) / tiles;
}

// C[m][16 * b.count] = A[m][k] * B, or C += A * B when `accumulate`.
//
// a: fp32 rows, `lda` floats apart; nothing is read past term k. b: packed panels; b.data may point into a panel, at a
// step, to multiply part of a chain. c: fp32 rows, `ldc` floats apart; all 16 * b.count columns are written.
// With kMemory, b's panels follow each other, and what comes after them is likely to be needed next.
template <typename T>
void gemm_panels(const float* a, int64_t lda, int64_t m, Panels<T> b, int64_t k, float* c, int64_t ldc,
                 bool accumulate = false, Source source = Source::kCache) {
  if (m <= 0) return;
  const int64_t tiles = (m + kMaxRows - 1) / kMaxRows, steps = (k + Step<T>::width - 1) / Step<T>::width;
  // Few panels at a time stay in cache while all rows pass over them.
  const int64_t group = tiles == 1 ? max_panels(int(m)) : max_panels(kMaxRows);
  for (int64_t p = 0; p < b.count; p += group) {
    const Panels<T> part{b.data + p * b.stride, b.count - p < group ? b.count - p : group, b.stride};
    const T* next = part.data + part.count * part.stride;
    const int64_t lines = source == Source::kMemory ? prefetch_lines(m, tiles, part.count) : 0;
    for (int64_t tile = 0; tile < tiles; ++tile, next += lines * steps * Step<T>::step) {
      // Tiles of nearly equal height: m = 9 is 5 + 4, not 8 + 1.
      const int64_t first = m * tile / tiles, last = m * (tile + 1) / tiles;
      gemm_row_tile<T>(last - first, a + first * lda, lda, part, k, c + first * ldc + p * kPanel, ldc, accumulate,
                       {reinterpret_cast<const char*>(next), lines});
    }
  }
}

}  // namespace shoal
