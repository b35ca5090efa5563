// Permutes token rows by expert on one rank, or packs one send buffer per rank; contracts in kernels/dispatch.py.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "ops.h"

namespace shoal {
namespace {

struct RowCopy {
  const char* from;
  char* to;
};

void copy_rows(const std::vector<RowCopy>& copies, int64_t row_bytes, int64_t num_threads) {
#pragma omp parallel for num_threads(int(num_threads))
  for (size_t i = 0; i < copies.size(); ++i) std::memcpy(copies[i].to, copies[i].from, size_t(row_bytes));
}

// starts[g] = the sum of the counts before g.
std::vector<int64_t> starts_of(const int64_t* counts, int64_t n) {
  std::vector<int64_t> starts(size_t(n), 0);
  for (int64_t g = 1; g < n; ++g) starts[g] = starts[g - 1] + counts[g - 1];
  return starts;
}

constexpr int64_t kHeadBytes = 2 * sizeof(int32_t);  // number of rows, number of pairs

}  // namespace
}  // namespace shoal

using namespace shoal;

extern "C" {

// counts[slot], row_of[token, k] and its inverse token_of[row], for pairs sorted by slot, (token, k) order within a slot.
void shoal_permute_by_expert(const int64_t* topk_idx, int64_t tokens, int64_t top_k, const int64_t* slot_of,
                       int64_t num_slots, int64_t* counts, int64_t* row_of, int64_t* token_of) {
  std::fill(counts, counts + num_slots, 0);
  for (int64_t i = 0; i < tokens * top_k; ++i)
    if (topk_idx[i] >= 0) ++counts[slot_of[topk_idx[i]]];
  std::vector<int64_t> next = starts_of(counts, num_slots);
  for (int64_t i = 0; i < tokens * top_k; ++i) {
    row_of[i] = topk_idx[i] < 0 ? -1 : next[slot_of[topk_idx[i]]]++;
    if (row_of[i] >= 0) token_of[row_of[i]] = i / top_k;
  }
}
SHOAL_EXPORT(shoal_permute_by_expert)

// One send buffer per rank, each starting at a multiple of 8 bytes:
//   int32 number of rows, number of pairs | int32 row of each pair | int32 local slot of each pair | rows
// A token is sent once per rank, its pairs point at that row. Writes the bytes and pairs of each buffer, and the index of
// each (token, k) among all pairs sorted by rank.
void shoal_pack_send_buffers(const char* x, int64_t stride, int64_t row_bytes, const int64_t* topk_idx, int64_t tokens,
                         int64_t top_k, const int64_t* rank_of, const int64_t* slot_of, int64_t num_ranks, char* out,
                         int64_t* buffer_bytes, int64_t* num_pairs, int64_t* row_of, int64_t num_threads) {
  std::vector<int64_t> num_rows(size_t(num_ranks), 0), last_token(size_t(num_ranks), -1);
  std::fill(num_pairs, num_pairs + num_ranks, 0);
  for (int64_t i = 0; i < tokens * top_k; ++i) {
    if (topk_idx[i] < 0) continue;
    const int64_t rank = rank_of[topk_idx[i]], token = i / top_k;
    ++num_pairs[rank];
    num_rows[rank] += last_token[rank] != token;
    last_token[rank] = token;
  }

  const std::vector<int64_t> first_pair = starts_of(num_pairs, num_ranks);
  std::vector<int32_t*> heads(static_cast<size_t>(num_ranks));
  std::vector<char*> rows(static_cast<size_t>(num_ranks));
  for (int64_t rank = 0; rank < num_ranks; ++rank) {
    heads[rank] = reinterpret_cast<int32_t*>(out);
    heads[rank][0] = int32_t(num_rows[rank]);
    heads[rank][1] = int32_t(num_pairs[rank]);
    rows[rank] = out + kHeadBytes + 2 * sizeof(int32_t) * num_pairs[rank];
    buffer_bytes[rank] = rows[rank] + num_rows[rank] * row_bytes - out;
    out += (buffer_bytes[rank] + 7) / 8 * 8;
  }

  std::vector<RowCopy> copies;
  std::vector<int64_t> pair(size_t(num_ranks), 0), row(size_t(num_ranks), -1);
  std::fill(last_token.begin(), last_token.end(), -1);
  for (int64_t i = 0; i < tokens * top_k; ++i) {
    if (topk_idx[i] < 0) {
      row_of[i] = -1;
      continue;
    }
    const int64_t rank = rank_of[topk_idx[i]], token = i / top_k;
    if (last_token[rank] != token) copies.push_back({x + token * stride, rows[rank] + ++row[rank] * row_bytes});
    last_token[rank] = token;
    row_of[i] = first_pair[rank] + pair[rank];
    heads[rank][2 + pair[rank]] = int32_t(row[rank]);
    heads[rank][2 + num_pairs[rank] + pair[rank]] = int32_t(slot_of[topk_idx[i]]);
    ++pair[rank];
  }
  copy_rows(copies, row_bytes, num_threads);
}
SHOAL_EXPORT(shoal_pack_send_buffers)

// Copies the buffers' rows into one matrix. x_row[i] is the row there of pair i, and arrival[i] the place among the
// arrivals of pair i, for pairs in slot order, arrival order within a slot. Sets `status` to 1, and does nothing else,
// when a pair names no row or no slot.
void shoal_unpack_recv_buffers(const char* const* recv_buffers, int64_t num_buffers, int64_t row_bytes, int64_t num_slots,
                               char* out, int64_t* counts, int64_t* x_row, int64_t* arrival, int64_t* status) {
  std::fill(counts, counts + num_slots, 0);
  const auto head = [&](int64_t s) { return reinterpret_cast<const int32_t*>(recv_buffers[s]); };
  for (int64_t s = 0; s < num_buffers; ++s)
    for (int64_t p = 0, pairs = head(s)[1]; p < pairs; ++p) {
      const int64_t row = head(s)[2 + p], slot = head(s)[2 + pairs + p];
      *status = row < 0 || row >= head(s)[0] || slot < 0 || slot >= num_slots;
      if (*status) return;
      ++counts[slot];
    }
  std::vector<int64_t> next = starts_of(counts, num_slots);
  int64_t arrived = 0, first_row = 0;
  for (int64_t s = 0; s < num_buffers; ++s) {
    const int64_t rows = head(s)[0], pairs = head(s)[1];
    for (int64_t p = 0; p < pairs; ++p, ++arrived) {
      const int64_t place = next[head(s)[2 + pairs + p]]++;
      arrival[place] = arrived;
      x_row[place] = first_row + head(s)[2 + p];
    }
    std::memcpy(out + first_row * row_bytes, recv_buffers[s] + kHeadBytes + 2 * sizeof(int32_t) * pairs,
                size_t(rows * row_bytes));
    first_row += rows;
  }
}
SHOAL_EXPORT(shoal_unpack_recv_buffers)

}  // extern "C"
