// The lightning indexer: scores of all earlier positions and the exact top-k; kernels/indexer.py states the contract.
#include <algorithm>
#include <atomic>
#include <utility>
#include <vector>

#include "attention.h"

namespace shoal {
namespace {

// Scores of one token: heads are lanes of the dots, which are then transposed so that keys are lanes of the sum.
class Scorer {
 public:
  Scorer(int64_t num_heads, int64_t dim)
      : num_heads_(num_heads),
        dim_(dim),
        lanes_((num_heads + kLanes - 1) / kLanes * kLanes),
        queries_(lanes_ / kLanes * query_panel_size(dim)),
        keys_(kLanes * dim),
        dots_(kLanes * lanes_) {}

  template <typename T>
  void set_query(const T* q, int64_t head_stride, const float* weights) {
    weights_ = weights;
    for (int64_t h = 0; h < num_heads_; ++h)
      pack_query(q + h * head_stride, dim_, queries_.data() + h / kLanes * query_panel_size(dim_) + h % kLanes);
  }

  // Scores of keys [0, n), find(s) giving key s; false when one cannot be found.
  template <typename Find>
  bool score(int64_t n, Find find, float* scores) {
    for (int64_t s = 0; s < n; s += kLanes) {
      const int64_t count = std::min<int64_t>(kLanes, n - s);
      for (int64_t i = 0; i < count; ++i) {
        const auto* key = find(s + i);
        if (key == nullptr) return false;
        to_floats(key, dim_, keys_.data() + i * dim_);
      }
      dot_keys(keys_.data(), dim_, kLanes, queries_.data(), lanes_ / kLanes, dim_, dots_.data());
      store_vec(scores + s, sum_heads(), count);
    }
    return true;
  }

 private:
  // sum over heads ascending of weight * relu(dot), for 16 keys
  Vec sum_heads() const {
    Vec total = {};
    for (int64_t head = 0; head < num_heads_; head += kLanes) {
      Vec dots[kLanes];
      for (int i = 0; i < kLanes; ++i) dots[i] = load_vec(dots_.data() + i * lanes_ + head);
      transpose(dots);
      for (int64_t h = 0; h < std::min<int64_t>(kLanes, num_heads_ - head); ++h)
        total += weights_[head + h] * (dots[h] < 0.0f ? Vec{} : dots[h]);  // NaN passes
    }
    return total;
  }

  const int64_t num_heads_, dim_, lanes_;
  const float* weights_ = nullptr;
  std::vector<float> queries_, keys_, dots_;
};

// A float as an integer of the same order; -0 equals 0, and NaN is below -infinity.
inline uint32_t rank_of(float score) {
  const uint32_t bits = float_to_bits(score + 0.0f);
  const uint32_t rank = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return score == score ? rank : 0u;
}

// Exact selection in one thread's memory: the k-th largest rank is found digit by digit from the top.
class TopK {
 public:
  // The `k` best of scores[0, n) by (score desc, position asc), ascending, then -1 up to `k`.
  void select(const float* scores, int64_t n, int64_t k, int32_t* out) {
    if (n <= k) return select_all(n, k, out);
    ranks_.resize(n);
    for (int64_t i = 0; i < n; ++i) ranks_[i] = rank_of(scores[i]);
    uint32_t threshold = 0;
    int64_t wanted = k;  // still to find among the ranks that begin with the digits found so far
    uint32_t known = 0;
    for (const auto& [shift, bits] : {std::pair{21, 11}, std::pair{10, 11}, std::pair{0, 10}}) {
      counts_.assign(size_t(1) << bits, 0);
      const uint32_t mask = (1u << bits) - 1;
      for (int64_t i = 0; i < n; ++i) {
        if ((ranks_[i] & known) == threshold) ++counts_[ranks_[i] >> shift & mask];
      }
      uint32_t digit = mask;
      while (counts_[digit] < wanted) wanted -= counts_[digit--];
      threshold |= digit << shift;
      known |= mask << shift;
    }
    // all above the threshold, and the first `wanted` that equal it
    for (int64_t i = 0, found = 0; found < k; ++i) {
      if (ranks_[i] > threshold || (ranks_[i] == threshold && wanted-- > 0)) out[found++] = int32_t(i);
    }
  }

  static void select_all(int64_t n, int64_t k, int32_t* out) {
    for (int64_t i = 0; i < k; ++i) out[i] = i < n ? int32_t(i) : -1;
  }

 private:
  std::vector<uint32_t> ranks_;
  std::vector<int64_t> counts_;
};

// Calls body(token, thread's own state) for all tokens, the last first: contexts grow within a sequence.
template <typename State, typename Make, typename Body>
void for_tokens(int64_t num_tokens, int64_t num_threads, Make make, Body body) {
#pragma omp parallel num_threads(int(num_threads))
  {
    const FlushDenormals flush;
    State state = make();
#pragma omp for schedule(dynamic)
    for (int64_t t = num_tokens - 1; t >= 0; --t) body(t, state);
  }
}

struct IndexState {
  Scorer scorer;
  TopK topk;
  std::vector<float> scores;
};

}  // namespace
}  // namespace shoal

// Strides are in elements; the index key is `key_offset` into a record. Writes a shoal::Status.
extern "C" void shoal_index_topk(int64_t dtype, const void* q, int64_t token_stride, int64_t head_stride,
                                 const float* weights, int64_t num_tokens, int64_t num_heads, int64_t dim,
                                 const void* records, int64_t row_stride, int64_t num_slots, int64_t key_offset,
                                 const int32_t* block_tables, int64_t max_blocks, int64_t block_size,
                                 const int32_t* cu_seqlens_q, int64_t num_sequences, const int64_t* positions,
                                 int64_t topk, int32_t* out, int64_t num_threads, int64_t* status) {
  using namespace shoal;
  const auto run = [&](auto element) {
    using T = decltype(element);
    const PagedRecords<T> paged{static_cast<const T*>(records), row_stride, num_slots, block_tables, max_blocks,
                                block_size};
    std::atomic<int64_t> result{kOk};
    const auto make = [&] { return IndexState{Scorer(num_heads, dim), {}, {}}; };
    for_tokens<IndexState>(num_tokens, num_threads, make, [&](int64_t t, IndexState& state) {
      const int64_t context = positions[t] + 1;
      if (context <= topk) return TopK::select_all(context, topk, out + t * topk);
      const int64_t sequence = std::upper_bound(cu_seqlens_q, cu_seqlens_q + num_sequences + 1, t) - cu_seqlens_q - 1;
      state.scorer.set_query(static_cast<const T*>(q) + t * token_stride, head_stride, weights + t * num_heads);
      state.scores.resize(context);
      const auto find = [&](int64_t s) {
        const T* record = paged.find(sequence, s);
        return record == nullptr ? record : record + key_offset;
      };
      if (!state.scorer.score(context, find, state.scores.data())) {
        result = kOutOfRange;
        return;
      }
      state.topk.select(state.scores.data(), context, topk, out + t * topk);
    });
    *status = result;
  };
  dtype == kBFloat16 ? run(bf16{}) : run(0.0f);
}

// keys: [num_keys, dim] contiguous; q: [T, num_heads, dim] contiguous; out: [T, num_keys].
extern "C" void shoal_index_scores(int64_t dtype, const void* q, const float* weights, int64_t num_tokens,
                                   int64_t num_heads, int64_t dim, const void* keys, int64_t num_keys, float* out,
                                   int64_t num_threads) {
  using namespace shoal;
  const auto run = [&](auto element) {
    using T = decltype(element);
    for_tokens<Scorer>(
        num_tokens, num_threads, [&] { return Scorer(num_heads, dim); },
        [&](int64_t t, Scorer& scorer) {
          scorer.set_query(static_cast<const T*>(q) + t * num_heads * dim, dim, weights + t * num_heads);
          scorer.score(num_keys, [&](int64_t s) { return static_cast<const T*>(keys) + s * dim; }, out + t * num_keys);
        });
  };
  dtype == kBFloat16 ? run(bf16{}) : run(0.0f);
}

// scores: [T, num_keys] with rows `row_stride` apart; of row t the first lengths[t] count.
extern "C" void shoal_topk_positions(const float* scores, int64_t row_stride, const int64_t* lengths,
                                     int64_t num_tokens, int64_t topk, int32_t* out, int64_t num_threads) {
  using namespace shoal;
  for_tokens<TopK>(num_tokens, num_threads, [] { return TopK(); }, [&](int64_t t, TopK& state) {
    state.select(scores + t * row_stride, lengths[t], topk, out + t * topk);
  });
}
