// The matrix product of every CPU kernel: rows of A times packed panels of B, in fp32.
//
// Contract. C[i][j] is one fp32 chain over k ascending that starts at 0 (or at C[i][j] when accumulating):
//   float: acc = fma(A[i][k], B[j][k], acc)
//   bf16:  with AVX512-BF16, acc = dpbf16(A[i][k..k+1], B[j][k..k+1], acc) for k = 0, 2, 4, ... (K padded to even with
//          zeros); otherwise the operands are widened to fp32 and acc = fma(A[i][k], B[j][k], acc) for every k.
// So an element's bits never depend on how many rows or columns there are, on tiling or on threads. A product cut in two
// along k (at an even k for bf16), the second part accumulating, equals the uncut product.
//
// Packed layout. B has n output columns and k terms each. 16 columns form a panel; a step is 64 bytes:
//   float [ceil(n/16)][k][16]              panel p, step k,   lane j      = B[16p + j][k]
//   bf16  [ceil(n/16)][ceil(k/2)][16][2]   panel p, step k/2, lane j, k%2 = B[16p + j][k]
// Missing columns and the missing odd term are zero. packed_size<T>(n, k) is the number of elements.
//
// Use: pack_rows / pack_columns once per B, then gemm_panels. All three are single-threaded and allocate nothing.
#pragma once

#include <cstdint>
#include <cstring>

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

// One step of the chain per element type: `width` terms of k, `step` packed elements (64 bytes).
template <typename T>
struct Chain;

template <>
struct Chain<float> {
  static constexpr int width = 1;
  static constexpr int step = 16;
  using A = Lanes;
  using B = Lanes;
  static A load_a(const float* a) { return broadcast_lanes(*a); }
  static A load_last_a(const float* a) { return load_a(a); }
  static B load_b(const float* b) { return load_lanes(b); }
  static Lanes add(Lanes acc, A a, B b) { return fma_lanes(a, b, acc); }
};

template <>
struct Chain<bf16> {
  static constexpr int width = 2;
  static constexpr int step = 32;
  static uint32_t pair(const bf16* a) {
    uint32_t u;
    std::memcpy(&u, a, 4);
    return u;
  }
#if defined(__AVX512BF16__)
  static constexpr const char* isa = "avx512_bf16";
  using A = __m512i;
  using B = __m512i;
  static A broadcast(uint32_t u) { return _mm512_set1_epi32(int32_t(u)); }
  static B load_b(const bf16* b) { return _mm512_loadu_si512(b); }
  static Lanes add(Lanes acc, A a, B b) { return {_mm512_dpbf16_ps(acc.v, (__m512bh)a, (__m512bh)b)}; }
#else
  static constexpr const char* isa = "portable";
  struct A {
    Lanes even, odd;
  };
  using B = A;
  static A broadcast(uint32_t u) {
    return {broadcast_lanes(bits_to_float(u << 16)), broadcast_lanes(bits_to_float(u & 0xffff0000u))};
  }
  static B load_b(const bf16* b) {
    float even[16], odd[16];
    for (int j = 0; j < 16; ++j) {
      uint32_t u = pair(b + 2 * j);
      even[j] = bits_to_float(u << 16);
      odd[j] = bits_to_float(u & 0xffff0000u);
    }
    return {load_lanes(even), load_lanes(odd)};
  }
  static Lanes add(Lanes acc, A a, B b) { return fma_lanes(a.odd, b.odd, fma_lanes(a.even, b.even, acc)); }
#endif
  static A load_a(const bf16* a) { return broadcast(pair(a)); }
  // The last term of an odd K: its partner is zero, and nothing is read past the row.
  static A load_last_a(const bf16* a) { return broadcast(a->bits); }
};

template <typename T>
constexpr int64_t panel_size(int64_t k) {
  return (k + Chain<T>::width - 1) / Chain<T>::width * Chain<T>::step;
}

constexpr int64_t num_panels(int64_t n) { return (n + kPanel - 1) / kPanel; }

// Elements of a packed [n, k] matrix.
template <typename T>
constexpr int64_t packed_size(int64_t n, int64_t k) {
  return num_panels(n) * panel_size<T>(k);
}

// Packs B[j][t] = rows[j * stride + t], j < n, t < k (each row of the source is an output column) into `out`.
template <typename T>
void pack_rows(const T* rows, int64_t stride, int64_t n, int64_t k, T* out) {
  constexpr int width = Chain<T>::width;
  for (int64_t p = 0; p < num_panels(n); ++p, out += panel_size<T>(k)) {
    const T* panel = rows + p * kPanel * stride;
    int64_t columns = n - p * kPanel < kPanel ? n - p * kPanel : kPanel;
    if (columns < kPanel || k % width) std::memset(out, 0, panel_size<T>(k) * sizeof(T));
    for (int64_t t = 0; t + width <= k; t += width)
      for (int64_t j = 0; j < columns; ++j) std::memcpy(out + t * kPanel + j * width, panel + j * stride + t, 4);
    if (k % width)
      for (int64_t j = 0; j < columns; ++j) out[(k - 1) * kPanel + j * width] = panel[j * stride + k - 1];
  }
}

// Packs B[j][t] = source[t * stride + j], j < n, t < k (each row of the source holds one term of all columns).
template <typename T>
void pack_columns(const T* source, int64_t stride, int64_t n, int64_t k, T* out) {
  constexpr int width = Chain<T>::width;
  for (int64_t p = 0; p < num_panels(n); ++p, out += panel_size<T>(k)) {
    int64_t columns = n - p * kPanel < kPanel ? n - p * kPanel : kPanel;
    if (columns < kPanel || k % width) std::memset(out, 0, panel_size<T>(k) * sizeof(T));
    for (int64_t t = 0; t < k; ++t) {
      const T* row = source + t * stride + p * kPanel;
      T* step = out + t / width * Chain<T>::step + t % width;
      for (int64_t j = 0; j < columns; ++j) step[j * width] = row[j];
    }
  }
}

// One register tile: MR rows x NP panels.
template <typename T, int MR, int NP>
inline void gemm_tile(const T* a, int64_t lda, const T* packed, int64_t k, float* c, int64_t ldc, bool accumulate) {
  using D = Chain<T>;
  const int64_t stride = panel_size<T>(k);
  Lanes acc[MR][NP];
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 8
    for (int p = 0; p < NP; ++p)
      acc[r][p] = accumulate ? load_lanes(c + r * ldc + p * kPanel) : broadcast_lanes(0.0f);
  const int64_t steps = k / D::width;
  for (int64_t s = 0; s < steps; ++s) {
    typename D::B b[NP];
#pragma GCC unroll 8
    for (int p = 0; p < NP; ++p) b[p] = D::load_b(packed + p * stride + s * D::step);
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) {
      typename D::A av = D::load_a(a + r * lda + s * D::width);
#pragma GCC unroll 8
      for (int p = 0; p < NP; ++p) acc[r][p] = D::add(acc[r][p], av, b[p]);
    }
  }
  if (k % D::width) {
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) {
      typename D::A av = D::load_last_a(a + r * lda + k - 1);
#pragma GCC unroll 8
      for (int p = 0; p < NP; ++p)
        acc[r][p] = D::add(acc[r][p], av, D::load_b(packed + p * stride + steps * D::step));
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 8
    for (int p = 0; p < NP; ++p) store_lanes(c + r * ldc + p * kPanel, acc[r][p]);
}

// MR rows x `panels` panels: as many NP-panel tiles as fit, then narrower ones.
template <typename T, int MR, int NP = max_panels(MR)>
inline void gemm_rows(const T* a, int64_t lda, const T* packed, int64_t panels, int64_t k, float* c, int64_t ldc,
                      bool accumulate) {
  for (; panels >= NP; panels -= NP, packed += NP * panel_size<T>(k), c += NP * kPanel)
    gemm_tile<T, MR, NP>(a, lda, packed, k, c, ldc, accumulate);
  if constexpr (NP > 4)
    gemm_rows<T, MR, 4>(a, lda, packed, panels, k, c, ldc, accumulate);
  else if constexpr (NP > 1)
    gemm_rows<T, MR, NP - 1>(a, lda, packed, panels, k, c, ldc, accumulate);
}

template <typename T, int MR = kMaxRows>
inline void gemm_rows_of(int64_t rows, const T* a, int64_t lda, const T* packed, int64_t panels, int64_t k, float* c,
                         int64_t ldc, bool accumulate) {
  if (rows == MR) return gemm_rows<T, MR>(a, lda, packed, panels, k, c, ldc, accumulate);
  if constexpr (MR > 1) gemm_rows_of<T, MR - 1>(rows, a, lda, packed, panels, k, c, ldc, accumulate);
}

// C[m][16 * panels] = A[m][k] * B, or C += A * B when `accumulate`.
//
// a: rows of T, `lda` elements apart (any alignment; nothing is read past k). packed: `panels` panels as described above.
// c: fp32 rows, `ldc` floats apart; all 16 * panels columns of each row are written, padded columns too.
template <typename T>
void gemm_panels(const T* a, int64_t lda, int64_t m, const T* packed, int64_t panels, int64_t k, float* c, int64_t ldc,
                 bool accumulate = false) {
  if (m <= 0) return;
  const int64_t tiles = (m + kMaxRows - 1) / kMaxRows;
  // Few panels at a time stay in cache while all rows pass over them.
  const int64_t group = tiles == 1 ? panels : max_panels(kMaxRows);
  for (int64_t p = 0; p < panels; p += group) {
    const int64_t count = panels - p < group ? panels - p : group;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      // Tiles of nearly equal height: m = 9 is 5 + 4, not 8 + 1.
      const int64_t first = m * tile / tiles, last = m * (tile + 1) / tiles;
      gemm_rows_of<T>(last - first, a + first * lda, lda, packed + p * panel_size<T>(k), count, k,
                      c + first * ldc + p * kPanel, ldc, accumulate);
    }
  }
}

}  // namespace shoal
