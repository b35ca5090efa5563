// The lightning indexer: scores of all earlier positions and the exact top-k; kernels/indexer.py states the contract.
#include <algorithm>
#include <atomic>
#include <vector>

#include "ops.h"
#include "kv_format.h"
#include "vec.h"

namespace shoal {
namespace {

constexpr int64_t kTileTokens = 16;   // tokens that share packed keys
constexpr int64_t kKeysAhead = 32;    // prefetch distance
constexpr int64_t kChunkKeys = 1024;  // keys per task
constexpr int64_t kWaveTokens = 256;  // tokens whose scores are held at a time

// Index queries of T tokens.
template <typename T>
struct IndexQueries {
  const T* q;  // [T, heads, dim]
  int64_t token_stride, head_stride;
  const float* weights;  // [T, heads]
  int64_t num_heads, dim;

  const T* head(int64_t token, int64_t h) const { return q + token * token_stride + h * head_stride; }
};

// Scores of a tile of tokens for a chunk of keys, with 16 keys as the lanes of the sum over heads. The GEMM before
// it has packed keys as columns if several tokens share them; for one token its heads are packed, and the dots transposed.
template <typename T>
class Scorer {
 public:
  Scorer(const IndexQueries<T>& queries, const IndexKeys& keys) : q_(queries), keys_(keys) {}

  // find(s) returns the address of key s, s in [begin, end); row t of `scores`, `stride` apart, is written from column
  // `begin` on. False for a key without a slot.
  template <typename Find>
  bool score(int64_t token, int64_t num_tokens, int64_t begin, int64_t end, Find find, float* scores, int64_t stride) {
    return num_tokens == 1 ? score_one(token, begin, end, find, scores)
                           : score_many(token, num_tokens, begin, end, find, scores, stride);
  }

 private:
  static constexpr int64_t kPanelsAtOnce = 3;

  template <typename Find>
  bool score_many(int64_t token, int64_t num_tokens, int64_t begin, int64_t end, Find find, float* scores,
                  int64_t stride) {
    const int64_t terms = padded_terms<T>(q_.dim), count = end - begin, panels = num_panels(count);
    T* keys = packed_.reserve(packed_size<T>(kChunkKeys, q_.dim));
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t first = begin + p * kPanel, last = std::min(end, first + kPanel);
      if (!read_keys(first, last, find, read_index_key<T>)) return false;
      for (int64_t s = first; s < last && s + kKeysAhead < end; ++s) {
        const IndexKey key = find(s + kKeysAhead);
        prefetch(key.data, keys_.data_bytes);
        prefetch(key.scales, keys_.scale_bytes);
      }
      pack_panel(rows_.reserve(0), padded_dim(), q_.dim, keys + p * panel_size<T>(q_.dim));
    }
    T* queries = queries_.reserve(q_.num_heads * terms);
    float* dots = dots_.reserve(q_.num_heads * kPanelsAtOnce * kPanel);
    for (int64_t t = token; t < token + num_tokens; ++t, scores += stride) {
      for (int64_t h = 0; h < q_.num_heads; ++h) copy_terms(q_.head(t, h), q_.dim, queries + h * terms);
      for (int64_t p = 0; p < panels; p += kPanelsAtOnce) {
        const int64_t width = std::min(kPanelsAtOnce, panels - p);
        gemm_panels<T>(queries, terms, q_.num_heads, {keys + p * panel_size<T>(q_.dim), width, panel_size<T>(q_.dim)},
                       q_.dim, dots, width * kPanel);
        for (int64_t i = 0; i < width; ++i) {
          const int64_t key = (p + i) * kPanel;
          const Vec sum = sum_heads(t, dots + i * kPanel, width * kPanel);
          store_vec(scores + begin + key, sum, std::min(kPanel, count - key));
        }
      }
    }
    return true;
  }

  template <typename Find>
  bool score_one(int64_t token, int64_t begin, int64_t end, Find find, float* scores) {
    const int64_t panels = num_panels(q_.num_heads), width = panels * kPanel;
    pack_queries(token);
    float* dots = dots_.reserve(kPanel * width);
    for (int64_t s = begin; s < end; s += kPanel) {
      const int64_t count = std::min(kPanel, end - s);
      if (!read_keys(s, s + count, find, read_index_terms<T>)) return false;
      gemm_panels<T>(rows_.reserve(0), padded_dim(), count, {packed_.reserve(0), panels, panel_size<T>(q_.dim)}, q_.dim, dots, width,
                     false, Source::kCache, lines_of(s + kKeysAhead, std::min(end, s + kKeysAhead + kPanel), find));
      store_vec(scores + s, sum_heads(token, turn(dots, width), kPanel), count);
    }
    return true;
  }

  // A multiple of both kVector and padded_terms, so that rows may be packed and multiplied.
  int64_t padded_dim() const { return round_up(q_.dim, kVector<T>); }

  // 16 rows, padded with zeros.
  T* clear_rows() {
    T* rows = rows_.reserve(kPanel * padded_dim());
    if (padded_dim() > q_.dim) std::memset(static_cast<void*>(rows), 0, size_t(kPanel * padded_dim()) * sizeof(T));
    return rows;
  }

  // Loads keys [begin, end), at most 16, into rows_.
  template <typename Find, typename Read>
  bool read_keys(int64_t begin, int64_t end, Find find, Read read) {
    T* rows = clear_rows();
    for (int64_t s = begin; s < end; ++s, rows += padded_dim()) {
      const IndexKey key = find(s);
      if (key.data == nullptr) return false;
      read(key, keys_.fp8(), q_.dim, rows);
    }
    return true;
  }

  // Cache lines of keys [begin, end), at most 16.
  template <typename Find>
  Lines lines_of(int64_t begin, int64_t end, Find find) {
    const char** const lines = lines_.reserve(kPanel * (keys_.data_bytes / 64 + keys_.scale_bytes / 64 + 2));
    const char** line = lines;
    for (int64_t s = begin; s < end; ++s) {
      const IndexKey key = find(s);
      if (key.data == nullptr) continue;
      for (int64_t i = 0; i < keys_.data_bytes; i += 64) *line++ = key.data + i;
      for (int64_t i = 0; i < keys_.scale_bytes; i += 64) *line++ = key.scales + i;
    }
    return {lines, line};
  }

  // Packs all heads of a token as columns into packed_.
  void pack_queries(int64_t token) {
    T* packed = packed_.reserve(packed_size<T>(q_.num_heads, q_.dim));
    T* rows = clear_rows();
    for (int64_t h = 0; h < q_.num_heads; ++h) {
      std::copy_n(q_.head(token, h), q_.dim, rows + h % kPanel * padded_dim());
      if ((h + 1) % kPanel == 0 || h + 1 == q_.num_heads)
        pack_panel(rows, padded_dim(), q_.dim, packed + h / kPanel * panel_size<T>(q_.dim));
    }
  }

  // [16 keys, width] -> [width, 16 keys]
  const float* turn(const float* dots, int64_t width) {
    float* turned = turned_.reserve(width * kPanel);
    for (int64_t h = 0; h < width; h += kPanel) {
      Vec square[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) square[i] = load_vec(dots + i * width + h);
      transpose(square);
      for (int64_t i = 0; i < kLanes; ++i) store_vec(turned + (h + i) * kPanel, square[i]);
    }
    return turned;
  }

  // sum over heads ascending of weight * relu(dot), for 16 keys
  Vec sum_heads(int64_t token, const float* dots, int64_t stride) const {
    Vec total = {};
    for (int64_t h = 0; h < q_.num_heads; ++h) {
      const Vec dot = load_vec(dots + h * stride);
      total += q_.weights[token * q_.num_heads + h] * (dot < 0.0f ? Vec{} : dot);  // propagates NaN
    }
    return total;
  }

  const IndexQueries<T>& q_;
  const IndexKeys& keys_;
  Buffer<T> packed_, rows_, queries_;
  Buffer<float> dots_, turned_;
  Buffer<const char*> lines_;
};

// A float as an integer of the same order; -0 equals 0, and NaN is below -infinity.
inline uint32_t rank_of(float score) {
  const uint32_t bits = float_to_bits(score + 0.0f);
  const uint32_t rank = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return score == score ? rank : 0u;
}

// Exact selection by one thread: radix select of the k-th largest rank from the top digit down, where later digits
// consider only ranks whose first digit is large enough.
class TopK {
 public:
  // Positions of the `k` best of scores[0, n) by (score desc, position asc), ascending, then -1.
  void select(const float* scores, int64_t n, int64_t k, int32_t* out) {
    if (n <= k) return select_all(n, k, out);
    ranks_.resize(n);
    for (int64_t i = 0; i < n; ++i) ranks_[i] = rank_of(scores[i]);
    wanted_ = k;
    threshold_ = known_ = 0;
    find_digit(21, 11, [&](auto count) { for (const uint32_t rank : ranks_) count(rank); });
    candidates_.resize(n);
    int64_t num_candidates = 0;
    for (int64_t i = 0; i < n; ++i) {
      candidates_[num_candidates] = int32_t(i);
      num_candidates += ranks_[i] >= threshold_;
    }
    candidates_.resize(num_candidates);
    const auto among_candidates = [&](auto count) { for (const int32_t i : candidates_) count(ranks_[i]); };
    find_digit(10, 11, among_candidates);
    find_digit(0, 10, among_candidates);
    // all above the threshold, and the first `wanted_` equal to it
    int64_t found = 0;
    for (const int32_t i : candidates_)
      if (ranks_[i] > threshold_ || (ranks_[i] == threshold_ && wanted_-- > 0)) out[found++] = i;
  }

  static void select_all(int64_t n, int64_t k, int32_t* out) {
    for (int64_t i = 0; i < k; ++i) out[i] = i < n ? int32_t(i) : -1;
  }

 private:
  // Finds the digit of `bits` bits at `shift` of the wanted rank, among ranks with the known prefix.
  template <typename ForEach>
  void find_digit(int shift, int bits, ForEach for_each) {
    const uint32_t mask = (1u << bits) - 1;
    counts_.assign(size_t(1) << bits, 0);
    for_each([&](uint32_t rank) { counts_[rank >> shift & mask] += (rank & known_) == threshold_; });
    uint32_t digit = mask;
    while (counts_[digit] < wanted_) wanted_ -= counts_[digit--];
    threshold_ |= digit << shift;
    known_ |= mask << shift;
  }

  std::vector<uint32_t> ranks_;
  std::vector<int32_t> candidates_, counts_;
  uint32_t threshold_ = 0, known_ = 0;  // known prefix of the wanted rank, and its mask
  int64_t wanted_ = 0;                  // still to find among the ranks with that prefix
};

// Consecutive tokens of one sequence and a chunk of the context of the last of them.
struct ScoreTask {
  int64_t token, num_tokens, sequence, begin, end;
};

// Selects for tokens [first, last), whose contexts are longer than topk or are returned whole.
template <typename T>
class Wave {
 public:
  Wave(const LayoutArgs& layout, const IndexKeys& keys, int64_t topk, int64_t first, int64_t last, Buffer<float>& scores)
      : layout_(layout), keys_(keys), topk_(topk), first_(first) {
    for (int64_t t = first; t < last; ++t) stride_ = std::max(stride_, round_up(layout.positions[t] + 1, kLanes));
    scores_ = scores.reserve((last - first) * stride_);
    for (int64_t t = first, next; t < last; t = next) {
      const int64_t sequence = layout.sequence_of(t);
      next = std::min({last, t + kTileTokens, int64_t(layout.cu_seqlens_q[sequence + 1])});
      int64_t context = 0;
      for (int64_t i = t; i < next; ++i) context = std::max(context, layout.positions[i] + 1);
      for (int64_t begin = 0; begin < context && context > topk; begin += kChunkKeys)
        tasks_.push_back({t, next - t, sequence, begin, std::min(context, begin + kChunkKeys)});
    }
  }

  int64_t num_tasks() const { return int64_t(tasks_.size()); }

  bool score(int64_t i, Scorer<T>& scorer) {
    const ScoreTask& task = tasks_[i];
    const auto find = [&](int64_t s) { return keys_.find(layout_.find(task.sequence, s)); };
    return scorer.score(task.token, task.num_tokens, task.begin, task.end, find,
                        scores_ + (task.token - first_) * stride_, stride_);
  }

  void select(int64_t token, TopK& state, int32_t* out) const {
    state.select(scores_ + (token - first_) * stride_, layout_.positions[token] + 1, topk_, out);
  }

 private:
  const LayoutArgs& layout_;
  const IndexKeys& keys_;
  const int64_t topk_, first_;
  int64_t stride_ = 0;
  float* scores_;
  std::vector<ScoreTask> tasks_;
};

template <typename T>
Status index_topk(const IndexQueries<T>& queries, const LayoutArgs& layout, const IndexKeys& keys, int64_t topk,
                  int64_t num_tokens, int32_t* out, int64_t num_threads) {
  static thread_local Buffer<float> scores;
  std::atomic<int64_t> status{kOk};
  for (int64_t first = 0; first < num_tokens; first += kWaveTokens) {
    const int64_t last = std::min(num_tokens, first + kWaveTokens);
    Wave<T> wave(layout, keys, topk, first, last, scores);
#pragma omp parallel num_threads(int(num_threads))
    {
      const FlushDenormals flush;
      Scorer<T> scorer(queries, keys);
      TopK state;
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < wave.num_tasks(); ++i)
        if (!wave.score(i, scorer)) status = kOutOfRange;
      // The barrier at the end of the loop above completes the scores.
#pragma omp for schedule(dynamic)
      for (int64_t t = first; t < last; ++t) wave.select(t, state, out + t * topk);
    }
    if (status != kOk) break;
  }
  return Status(status.load());
}

}  // namespace
}  // namespace shoal

// Strides are in elements. Writes a shoal::Status.
extern "C" void shoal_index_topk(int64_t dtype, const void* q, int64_t token_stride, int64_t head_stride,
                                 const float* weights, int64_t num_tokens, int64_t num_heads, int64_t dim,
                                 const shoal::LayoutArgs* layout, const shoal::IndexKeys* keys, int64_t topk,
                                 int32_t* out, int64_t num_threads, int64_t* status) {
  using namespace shoal;
  with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    const IndexQueries<T> queries{static_cast<const T*>(q), token_stride, head_stride, weights, num_heads, dim};
    *status = index_topk(queries, *layout, *keys, topk, num_tokens, out, num_threads);
  });
}
SHOAL_EXPORT(shoal_index_topk)

// keys: [num_keys, dim] contiguous; q: [T, num_heads, dim] contiguous; out: [T, num_keys].
extern "C" void shoal_index_scores(int64_t dtype, const void* q, const float* weights, int64_t num_tokens,
                                   int64_t num_heads, int64_t dim, void* keys, int64_t num_keys, float* out,
                                   int64_t num_threads) {
  using namespace shoal;
  with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    const IndexQueries<T> queries{static_cast<const T*>(q), num_heads * dim, dim, weights, num_heads, dim};
    const IndexKeys one_page{static_cast<char*>(keys), 1, num_keys, dim * int64_t(sizeof(T)), 0};
    const auto find = [&](int64_t s) { return one_page.find({0, s}); };
#pragma omp parallel num_threads(int(num_threads))
    {
      const FlushDenormals flush;
      Scorer<T> scorer(queries, one_page);
#pragma omp for schedule(dynamic)
      for (int64_t begin = 0; begin < num_keys; begin += kChunkKeys)
        scorer.score(0, num_tokens, begin, std::min(num_keys, begin + kChunkKeys), find, out, num_keys);
    }
  });
}
SHOAL_EXPORT(shoal_index_scores)

// scores: [T, num_keys] with rows `row_stride` apart; of row t the first lengths[t] count.
extern "C" void shoal_topk_positions(const float* scores, int64_t row_stride, const int64_t* lengths,
                                     int64_t num_tokens, int64_t topk, int32_t* out, int64_t num_threads) {
  using namespace shoal;
#pragma omp parallel num_threads(int(num_threads))
  {
    TopK state;
#pragma omp for schedule(dynamic)
    for (int64_t t = 0; t < num_tokens; ++t) state.select(scores + t * row_stride, lengths[t], topk, out + t * topk);
  }
}
SHOAL_EXPORT(shoal_topk_positions)
