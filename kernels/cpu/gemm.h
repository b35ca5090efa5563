// The GEMM of every CPU kernel: rows of A times packed panels of B, both fp32 or both bf16, accumulated in fp32.
//
// Contract. C[i][j] is one fp32 chain over k ascending that starts at 0 (or at C[i][j] when accumulating):
//   acc = fma(A[i][k], B[j][k], acc)        bf16 operands are widened to fp32, which is exact; subnormals are zero
// So an element's bits never depend on how many rows or columns there are, on tiling, on threads or on the instruction
// set, and bf16 gives the bits that fp32 gives for the same numbers. A GEMM split in two along k, at an even term, the
// second part accumulating, equals the whole one.
//
// Packed layout. B has n output columns and k terms each. 16 columns form a panel; a step is 64 bytes:
//   float [ceil(n/16)][k][16]              panel p, step k,   lane j          = B[16p + j][k]
//   bf16  [ceil(n/16)][ceil(k/2)][16][2]   panel p, step k/2, lane j, 1 - k%2 = B[16p + j][k]
// Rows of bf16 A have the terms of each pair swapped in the same way (swap_pairs): vdpbf16ps adds the product of the upper
// halves first, so the chain ascends. Missing columns and the missing odd term are zero. packed_size<T>(n, k) is the
// number of elements.
//
// Use: pack_rows once per B, swap_pairs for bf16 rows of A, then gemm_panels. All are single-threaded,
// allocate nothing and need FlushDenormals.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "types.h"

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
constexpr int kMaxRowsOfOnePanel = 16;
// Panels per tile: at most 24 accumulators, and at least 8 chains for few rows.
constexpr int max_panels(int rows) { return rows <= 3 ? 8 : rows <= 6 ? 4 : rows <= 8 ? 3 : 1; }
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
constexpr int kMaxRowsOfOnePanel = 4;
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
constexpr int kMaxRowsOfOnePanel = 4;
constexpr int max_panels(int) { return 1; }
#endif

// One 64-byte step of a chain: `width` terms, `step` packed elements. `fma` adds them to 16 lanes in order.
template <typename T>
struct Step;

template <>
struct Step<float> {
  static constexpr int width = 1;
  static constexpr int step = 16;
  using Terms = Lanes;
  static Terms load(const float* p) { return load_lanes(p); }
  static Terms broadcast(const float* p) { return broadcast_lanes(*p); }
  static Lanes fma(Terms a, Terms b, Lanes acc) { return fma_lanes(a, b, acc); }
};

template <>
struct Step<bf16> {
  static constexpr int width = 2;
  static constexpr int step = 32;
#if defined(__AVX512BF16__)
  using Terms = __m512i;
  static Terms load(const bf16* p) { return _mm512_loadu_si512(p); }
  static Terms broadcast(const bf16* p) { return _mm512_set1_epi32(pair_at(p)); }
  static Lanes fma(Terms a, Terms b, Lanes acc) { return {_mm512_dpbf16_ps(acc.v, (__m512bh)a, (__m512bh)b)}; }
#else
  struct Terms {
    Lanes first, second;
  };
  static Terms load(const bf16* p) {
#if defined(__AVX512F__)
    const __m512i pairs = _mm512_loadu_si512(p);
    return {{_mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(int32_t(0xffff0000u))))},
            {_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16))}};
#else
    float first[16], second[16];
    for (int j = 0; j < 16; ++j) {
      first[j] = to_float(p[2 * j + 1]);
      second[j] = to_float(p[2 * j]);
    }
    return {load_lanes(first), load_lanes(second)};
#endif
  }
  static Terms broadcast(const bf16* p) { return {broadcast_lanes(to_float(p[1])), broadcast_lanes(to_float(p[0]))}; }
  static Lanes fma(Terms a, Terms b, Lanes acc) {
    return fma_lanes(a.second, b.second, fma_lanes(a.first, b.first, acc));
  }
#endif

 private:
  static int32_t pair_at(const bf16* p) {
    int32_t pair;
    std::memcpy(&pair, p, sizeof(pair));
    return pair;
  }
};

// Where term t of a packed column is within its step; swapped pairs for bf16.
template <typename T>
constexpr int64_t place_in_step(int64_t t) {
  return Step<T>::width == 1 ? 0 : 1 - t % 2;
}

// Terms that a row of A takes up: k, or the next even number for bf16.
template <typename T>
constexpr int64_t padded_terms(int64_t k) {
  return (k + Step<T>::width - 1) / Step<T>::width * Step<T>::width;
}

// A row of A as gemm_panels reads it: k terms in swapped pairs, padded with a zero to an even number.
inline void swap_pairs(const bf16* source, int64_t k, bf16* out) {
  typedef uint32_t Pairs __attribute__((vector_size(64)));
  const auto swap = [](const bf16* from, int64_t terms, bf16* to) {
    Pairs pairs = {};
    std::memcpy(&pairs, from, size_t(terms) * sizeof(bf16));
    pairs = pairs << 16 | pairs >> 16;
    std::memcpy(to, &pairs, size_t(terms + terms % 2) * sizeof(bf16));
  };
  for (; k >= 32; k -= 32, source += 32, out += 32) swap(source, 32, out);
  if (k > 0) swap(source, k, out);
}

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
        for (; t + width <= k; t += width) {
          const __m512i words = _mm512_i32gather_epi32(offsets, panel + t, 1);
          _mm512_storeu_si512(out + t / width * Step<T>::step, width == 1 ? words : _mm512_rol_epi32(words, 16));
        }
      }
    }
#endif
    for (; t < k; ++t) {
      T* step = out + t / width * Step<T>::step + place_in_step<T>(t);
      for (int64_t j = 0; j < columns; ++j) step[j * width] = convert<T>(panel[j * stride + t]);
    }
  }
}

// The panels of one GEMM, `stride` elements apart: more than panel_size(k) when k is part of a longer chain.
template <typename T>
struct Panels {
  const T* data;
  int64_t count;
  int64_t stride;
};

// Scattered cache lines to prefetch, one per step of a GEMM.
struct Lines {
  const char* const* begin = nullptr;
  const char* const* end = nullptr;
};

// Prefetch policy while a tile is computed: its own panels kStreamSteps ahead, `per_step` cache lines per step starting
// at `next`, or scattered lines.
struct Prefetch {
  bool stream = false;
  const char* next = nullptr;
  int64_t per_step = 0;
  Lines lines;

  bool any() const { return stream || per_step > 0 || lines.begin != lines.end; }
};
constexpr int64_t kStreamSteps = 32;

// One register tile: MR rows x NP panels.
template <typename T, int MR, int NP>
void gemm_tile(const T* a, int64_t lda, const T* packed, int64_t stride, int64_t k, float* c, int64_t ldc,
               bool accumulate, Prefetch ahead) {
  using S = Step<T>;
  Lanes acc[MR][NP];
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 8
    for (int p = 0; p < NP; ++p)
      acc[r][p] = accumulate ? load_lanes(c + r * ldc + p * kPanel) : broadcast_lanes(0.0f);
  // A pointer for every four rows, so that registers hold all the addresses.
  const T* rows[(MR + 3) / 4];
  for (int r = 0; r < MR; r += 4) rows[r / 4] = a + r * lda;
  const auto chain = [&](auto fetches) __attribute__((always_inline)) {
    for (int64_t t = 0; t < k; t += S::width, packed += S::step) {
      if constexpr (decltype(fetches)::value) {
        for (int p = 0; ahead.stream && p < NP; ++p)
          __builtin_prefetch(packed + p * stride + kStreamSteps * S::step, 0, 3);
        for (int64_t line = 0; line < ahead.per_step; ++line, ahead.next += 64) __builtin_prefetch(ahead.next, 0, 2);
        if (ahead.lines.begin != ahead.lines.end) __builtin_prefetch(*ahead.lines.begin++, 0, 0);
      }
      typename S::Terms b[NP];
#pragma GCC unroll 8
      for (int p = 0; p < NP; ++p) b[p] = S::load(packed + p * stride);
#pragma GCC unroll 16
      for (int r = 0; r < MR; ++r) {
        const typename S::Terms row = S::broadcast(rows[r / 4] + r % 4 * lda);
#pragma GCC unroll 8
        for (int p = 0; p < NP; ++p) acc[r][p] = S::fma(row, b[p], acc[r][p]);
      }
#pragma GCC unroll 4
      for (const T*& row : rows) row += S::width;
    }
  };
  if (ahead.any()) {
    chain(std::true_type{});
  } else {
    chain(std::false_type{});
  }
  // or the compiler keeps the address of every row of C in a register that the loop needs
  asm("" : "+r"(c), "+r"(ldc));
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 8
    for (int p = 0; p < NP; ++p) store_lanes(c + r * ldc + p * kPanel, acc[r][p]);
}

// MR rows x all panels: as many NP-panel tiles as fit, then narrower ones.
template <typename T, int MR, int NP = max_panels(MR)>
void gemm_rows(const T* a, int64_t lda, Panels<T> b, int64_t k, float* c, int64_t ldc, bool accumulate,
               Prefetch ahead) {
  for (; b.count >= NP; b.count -= NP, b.data += NP * b.stride, c += NP * kPanel) {
    gemm_tile<T, MR, NP>(a, lda, b.data, b.stride, k, c, ldc, accumulate, ahead);
  }
  if constexpr (NP > 1) gemm_rows<T, MR, (NP > 4 ? 4 : NP - 1)>(a, lda, b, k, c, ldc, accumulate, ahead);
}

template <typename T, int MR = kMaxRowsOfOnePanel>
void gemm_row_tile(int64_t rows, const T* a, int64_t lda, Panels<T> b, int64_t k, float* c, int64_t ldc,
                   bool accumulate, Prefetch ahead) {
  if (rows == MR) return gemm_rows<T, MR>(a, lda, b, k, c, ldc, accumulate, ahead);
  if constexpr (MR > 1) gemm_row_tile<T, MR - 1>(rows, a, lda, b, k, c, ldc, accumulate, ahead);
}

// Panels that are read once come from memory, so they are prefetched early.
enum class Source { kCache, kMemory };

// With one pass over the panels, each line is prefetched shortly before its use, except for up to kRowsKeptUp rows, where
// the hardware prefetcher keeps up. With a few passes, they prefetch the next group of panels together; with many, memory
// keeps up anyway.
constexpr int64_t kRowsKeptUp = 3;
constexpr int64_t kMostPassesAhead = 6;

// C[m][16 * b.count] = A[m][k] * B, or C += A * B when `accumulate`.
//
// a: rows `lda` elements apart, of padded_terms<T>(k) terms (bf16 in swapped pairs). b: packed panels; b.data may point
// into a panel, at a step, to multiply part of a chain. c: fp32 rows, `ldc` floats apart; all 16 * b.count columns are
// written.
// With kMemory, b's panels are contiguous, and the memory after them is likely to be needed next. `lines` are prefetched,
// one per step.
template <typename T>
void gemm_panels(const T* a, int64_t lda, int64_t m, Panels<T> b, int64_t k, float* c, int64_t ldc,
                 bool accumulate = false, Source source = Source::kCache, Lines lines = {}) {
  if (m <= 0) return;
  const int64_t highest = b.count == 1 ? kMaxRowsOfOnePanel : kMaxRows;
  const int64_t tiles = (m + highest - 1) / highest, steps = (k + Step<T>::width - 1) / Step<T>::width;
  // Few panels at a time stay in cache while all rows pass over them: groups of nearly equal width.
  const int64_t widest = max_panels(int(tiles == 1 ? m : highest));
  const int64_t groups = (b.count + widest - 1) / widest;
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t p = b.count * group / groups;
    const Panels<T> part{b.data + p * b.stride, b.count * (group + 1) / groups - p, b.stride};
    const T* next = part.data + part.count * part.stride;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      Prefetch ahead;
      ahead.lines = lines;
      lines.begin += std::min(steps, int64_t(lines.end - lines.begin));
      if (source == Source::kMemory) {
        ahead.stream = tiles == 1 && m > kRowsKeptUp;
        ahead.next = reinterpret_cast<const char*>(next);
        if (tiles > 1 && tiles <= kMostPassesAhead)
          ahead.per_step = part.count * (tile + 1) / tiles - part.count * tile / tiles;
      }
      // Tiles of nearly equal height: m = 9 is 5 + 4, not 8 + 1.
      const int64_t first = m * tile / tiles, last = m * (tile + 1) / tiles;
      gemm_row_tile<T>(last - first, a + first * lda, lda, part, k, c + first * ldc + p * kPanel, ldc, accumulate, ahead);
      next += ahead.per_step * steps * Step<T>::step;
    }
  }
}

}  // namespace shoal
