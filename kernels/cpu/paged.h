// The way from a token to its context in the cache.
#pragma once

#include <algorithm>
#include <cstdint>

#include "types.h"

namespace shoal {

// What an operation reports; kernels/attention.py turns it into an error.
enum Status : int64_t { kOk = 0, kOutOfRange = 1 };

// The records of a layer, rows `stride` bytes apart: rows of the dtype that is computed in, or in the FP8 format.
struct Records {
  static constexpr const char* abi_name = "Records";
  char* data;
  int64_t stride, num_slots, fp8;

  // nullptr where there is no such slot
  char* find(int64_t slot) const { return slot < 0 || slot >= num_slots ? nullptr : data + slot * stride; }
};

// A block of the cache and a place in it; the number of no block is negative.
struct Place {
  int64_t block, offset;
};

// The tokens of a step and where their sequences' blocks are, as Python's PagedLayout passes them.
struct LayoutArgs {
  static constexpr const char* abi_name = "LayoutArgs";
  const int32_t* block_tables;  // [B, max_blocks]
  int64_t max_blocks, block_size;
  const int32_t* cu_seqlens_q;  // [B + 1]
  int64_t num_sequences;
  const int64_t* positions;  // [T]

  // Where a position is: outside the table in no block.
  Place find(int64_t sequence, int64_t position) const {
    const int64_t index = position / block_size;
    if (position < 0 || index >= max_blocks) return {-1, 0};
    return {block_tables[sequence * max_blocks + index], position % block_size};
  }

  int64_t sequence_of(int64_t token) const {
    return std::upper_bound(cu_seqlens_q, cu_seqlens_q + num_sequences + 1, token) - cu_seqlens_q - 1;
  }
};

// The same with the records of a layer.
struct PagedArgs {
  static constexpr const char* abi_name = "PagedArgs";
  Records records;
  LayoutArgs layout;

  // The record of a position; a position outside the table or the cache has none.
  const char* find(int64_t sequence, int64_t position) const {
    const Place place = layout.find(sequence, position);
    return records.find(place.block * layout.block_size + place.offset);
  }
};

// Where an index key is: its numbers, and in FP8 its scales; nullptr where there is none.
struct IndexKey {
  char *data, *scales;
};

// The index keys of a layer, a page of numbers and then scales for each block; without scales in the dtype that is
// computed in.
struct IndexKeys {
  static constexpr const char* abi_name = "IndexKeys";
  char* pages;
  int64_t num_blocks, block_size, data_bytes, scale_bytes;  // the last two of a key

  bool fp8() const { return scale_bytes > 0; }

  IndexKey find(Place place) const {
    if (place.block < 0 || place.block >= num_blocks) return {};
    char* page = pages + place.block * block_size * (data_bytes + scale_bytes);
    return {page + place.offset * data_bytes, page + block_size * data_bytes + place.offset * scale_bytes};
  }

  IndexKey find_slot(int64_t slot) const { return slot < 0 ? IndexKey{} : find({slot / block_size, slot % block_size}); }
};

// Ask for n bytes that will be read soon.
inline void prefetch(const char* bytes, int64_t n) {
  if (bytes == nullptr) return;
  for (int64_t i = 0; i < n; i += 64) __builtin_prefetch(bytes + i);
}

}  // namespace shoal
