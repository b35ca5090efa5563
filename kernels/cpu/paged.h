// Addressing of the paged KV cache: from a token to the entries of its context.
#pragma once

#include <algorithm>
#include <cstdint>

#include "types.h"

namespace shoal {

// Status of an operation; kernels/attention.py raises an error for it.
enum Status : int64_t { kOk = 0, kOutOfRange = 1 };

// KV cache of a layer: one entry per slot, `stride` bytes apart, in the compute dtype or in the FP8 format.
struct KVCacheArgs {
  static constexpr const char* abi_name = "KVCacheArgs";
  char* data;
  int64_t stride, num_slots, fp8;

  // nullptr for a slot outside the cache
  char* find(int64_t slot) const { return slot < 0 || slot >= num_slots ? nullptr : data + slot * stride; }
};

// A block of the cache and an offset in it; a negative number is no block.
struct Place {
  int64_t block, offset;
};

// Tokens of a step and cache blocks of their sequences, passed by PagedLayout in Python.
struct LayoutArgs {
  static constexpr const char* abi_name = "LayoutArgs";
  const int32_t* block_tables;  // [B, max_blocks]
  int64_t max_blocks, block_size;
  const int32_t* cu_seqlens_q;  // [B + 1]
  int64_t num_sequences;
  const int64_t* positions;  // [T]

  // Block and offset of a position; no block outside the table.
  Place find(int64_t sequence, int64_t position) const {
    const int64_t index = position / block_size;
    if (position < 0 || index >= max_blocks) return {-1, 0};
    return {block_tables[sequence * max_blocks + index], position % block_size};
  }

  int64_t sequence_of(int64_t token) const {
    return std::upper_bound(cu_seqlens_q, cu_seqlens_q + num_sequences + 1, token) - cu_seqlens_q - 1;
  }
};

// LayoutArgs with the KV cache of a layer.
struct PagedArgs {
  static constexpr const char* abi_name = "PagedArgs";
  KVCacheArgs kv_cache;
  LayoutArgs layout;

  // Entry of a position; nullptr outside the table or the cache.
  const char* find(int64_t sequence, int64_t position) const {
    const Place place = layout.find(sequence, position);
    return kv_cache.find(place.block * layout.block_size + place.offset);
  }
};

// Addresses of an index key's values and, in FP8, scales; nullptr for no key.
struct IndexKey {
  char *data, *scales;
};

// Index keys of a layer: a page per block, values then scales; no scales in the compute dtype.
struct IndexKeys {
  static constexpr const char* abi_name = "IndexKeys";
  char* pages;
  int64_t num_blocks, block_size, data_bytes, scale_bytes;  // the last two per key

  bool fp8() const { return scale_bytes > 0; }

  IndexKey find(Place place) const {
    if (place.block < 0 || place.block >= num_blocks) return {};
    char* page = pages + place.block * block_size * (data_bytes + scale_bytes);
    return {page + place.offset * data_bytes, page + block_size * data_bytes + place.offset * scale_bytes};
  }

  IndexKey find_slot(int64_t slot) const { return slot < 0 ? IndexKey{} : find({slot / block_size, slot % block_size}); }
};

// Prefetches n bytes.
inline void prefetch(const char* bytes, int64_t n) {
  if (bytes == nullptr) return;
  for (int64_t i = 0; i < n; i += 64) __builtin_prefetch(bytes + i);
}

}  // namespace shoal
