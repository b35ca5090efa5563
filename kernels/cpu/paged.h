// The way from a token to its context's records.
#pragma once

#include <algorithm>
#include <cstdint>

#include "types.h"

namespace shoal {

// What an operation reports; kernels/attention.py turns it into an error.
enum Status : int64_t { kOk = 0, kOutOfRange = 1 };

// Records of a batch of sequences, in pages; a position outside the table or the cache has none.
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

// The tokens of a step and where their sequences' records are, as Python's PagedLayout and the records pass them.
struct PagedArgs {
  const void* records;
  int64_t row_stride, num_slots;
  const int32_t* block_tables;
  int64_t max_blocks, block_size;
  const int32_t* cu_seqlens_q;  // [B + 1]
  int64_t num_sequences;
  const int64_t* positions;  // [T]

  template <typename T>
  PagedRecords<T> paged() const {
    return {static_cast<const T*>(records), row_stride, num_slots, block_tables, max_blocks, block_size};
  }

  int64_t sequence_of(int64_t token) const {
    return std::upper_bound(cu_seqlens_q, cu_seqlens_q + num_sequences + 1, token) - cu_seqlens_q - 1;
  }
};

// Ask for n elements of a record that will be read soon.
template <typename T>
inline void prefetch_record(const T* record, int64_t n) {
  if (record == nullptr) return;
  for (int64_t i = 0; i < n; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(record + i);
}

}  // namespace shoal
