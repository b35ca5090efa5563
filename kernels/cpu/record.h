// What a token leaves in the cache of a layer, a record and an index key; kernels/records.py describes both formats.
#pragma once

#include "quant.h"
#include "paged.h"

namespace shoal {

// Bytes of n numbers that are quantised in the FP8 format: codes | scales.
template <typename T>
constexpr int64_t field_bytes(bool fp8, int64_t n) {
  return fp8 ? n + (n + kScaleTerms - 1) / kScaleTerms * int64_t(sizeof(float)) : n * int64_t(sizeof(T));
}

// Bytes of a record, latent | rope key.
template <typename T>
constexpr int64_t latent_bytes(bool fp8, int64_t latent_dim, int64_t rope_dim) {
  return field_bytes<T>(fp8, latent_dim) + rope_dim * int64_t(fp8 ? sizeof(bf16) : sizeof(T));
}

// Latent | rope key of a record: in the record itself, or made in `row`.
template <typename T>
inline const T* read_latent(const char* record, bool fp8, int64_t latent_dim, int64_t rope_dim, T* row) {
  if (!fp8) return reinterpret_cast<const T*>(record);
  dequantize_row(record, record + latent_dim, latent_dim, row);
  const char* rope = record + field_bytes<T>(fp8, latent_dim);
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

// What read_latent makes in `row`, into a record of the FP8 format.
template <typename T>
inline void write_latent(const T* row, int64_t latent_dim, int64_t rope_dim, char* record) {
  quantize_row(row, latent_dim, record, record + latent_dim);
  char* rope = record + field_bytes<T>(true, latent_dim);
  for (int64_t i = 0; i < rope_dim; ++i) {
    const bf16 x = convert<bf16>(row[latent_dim + i]);
    std::memcpy(rope + i * int64_t(sizeof(x)), &x, sizeof(x));
  }
}

// An index key, copied to `row`.
template <typename T>
inline void read_index_key(IndexKey key, bool fp8, int64_t dim, T* row) {
  if (fp8) return dequantize_row(key.data, key.scales, dim, row);
  std::copy_n(reinterpret_cast<const T*>(key.data), dim, row);
}

// The same as a row of A for gemm_panels.
template <typename T>
inline void read_index_terms(IndexKey key, bool fp8, int64_t dim, T* row) {
  if (!fp8) return copy_terms(reinterpret_cast<const T*>(key.data), dim, row);
  dequantize_row(key.data, key.scales, dim, row);
  if constexpr (std::is_same_v<T, bf16>) swap_pairs(row, dim, row);
}

}  // namespace shoal
