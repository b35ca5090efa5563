// Reads and writes KV cache entries and index keys; kernels/kv_format.py describes both formats.
#pragma once

#include "quant.h"
#include "paged.h"

namespace shoal {

// Bytes of n values, which the FP8 format quantises: codes | scales.
template <typename T>
constexpr int64_t field_bytes(bool fp8, int64_t n) {
  return fp8 ? n + (n + kScaleTerms - 1) / kScaleTerms * int64_t(sizeof(float)) : n * int64_t(sizeof(T));
}

// Bytes of an entry, latent | rope key.
template <typename T>
constexpr int64_t latent_bytes(bool fp8, int64_t latent_dim, int64_t rope_dim) {
  return field_bytes<T>(fp8, latent_dim) + rope_dim * int64_t(fp8 ? sizeof(bf16) : sizeof(T));
}

// Latent | rope key of an entry: a pointer into the entry, or to `row` after conversion from FP8.
template <typename T>
inline const T* read_latent(const char* entry, bool fp8, int64_t latent_dim, int64_t rope_dim, T* row) {
  if (!fp8) return reinterpret_cast<const T*>(entry);
  dequantize_row(entry, entry + latent_dim, latent_dim, row);
  const char* rope = entry + field_bytes<T>(fp8, latent_dim);
  if constexpr (std::is_same_v<T, bf16>) {
    std::memcpy(row + latent_dim, rope, size_t(rope_dim) * sizeof(bf16));
  } else {
    for (int64_t i = 0; i < rope_dim; ++i) {
      bf16 x;
      std::memcpy(&x, rope + i * int64_t(sizeof(x)), sizeof(x));
      row[latent_dim + i] = to_float(x);
    }
  }
  return row;
}

// Inverse of read_latent for the FP8 format.
template <typename T>
inline void write_latent(const T* row, int64_t latent_dim, int64_t rope_dim, char* entry) {
  quantize_row(row, latent_dim, entry, entry + latent_dim);
  char* rope = entry + field_bytes<T>(true, latent_dim);
  for (int64_t i = 0; i < rope_dim; ++i) {
    const bf16 x = convert<bf16>(row[latent_dim + i]);
    std::memcpy(rope + i * int64_t(sizeof(x)), &x, sizeof(x));
  }
}

// Copies an index key to `row`.
template <typename T>
inline void read_index_key(IndexKey key, bool fp8, int64_t dim, T* row) {
  if (fp8) return dequantize_row(key.data, key.scales, dim, row);
  std::copy_n(reinterpret_cast<const T*>(key.data), dim, row);
}

// Copies an index key to `row` in the layout of a row of A for gemm_panels.
template <typename T>
inline void read_index_terms(IndexKey key, bool fp8, int64_t dim, T* row) {
  if (!fp8) return copy_terms(reinterpret_cast<const T*>(key.data), dim, row);
  dequantize_row(key.data, key.scales, dim, row);
  if constexpr (std::is_same_v<T, bf16>) swap_pairs(row, dim, row);
}

}  // namespace shoal
