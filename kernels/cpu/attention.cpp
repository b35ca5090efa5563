// Multi-head latent attention in the absorbed form over a paged KV cache; mla_attention in kernels/attention.py states the
// contract.
//
// A task is one token and one split of its keys. Lanes are heads in the scores and the softmax, and columns in the sum of
// the values, so no sum crosses lanes:
//   S [key][head] = latents x packed queries      O [head][column] += P [head][key] x interleaved latents
#include <atomic>
#include <vector>

#include "ops.h"
#include "kv_format.h"
#include "vec.h"

namespace shoal {
namespace {

constexpr int64_t kBlockKeys = 64;   // part of the contract: where the online softmax rescales
constexpr int64_t kSplitKeys = 512;  // part of the contract: where a row's keys are split

template <typename T>
struct AbsorbedAttention {
  const T *q_latent, *q_rope;
  int64_t latent_token_stride, latent_head_stride, rope_token_stride, rope_head_stride;
  const PagedArgs& paged;
  int64_t num_heads, latent_dim, rope_dim;
  float scale;
  const int32_t* selected;  // [T, topk] or nullptr
  int64_t topk;
  T* out;  // [T, h, latent_dim]

  int64_t key_dim() const { return latent_dim + rope_dim; }
  int64_t width() const { return round_up(latent_dim, kPanel); }
  int64_t head_groups() const { return (num_heads + kLanes - 1) / kLanes; }
  int64_t padded_heads() const { return head_groups() * kLanes; }
};

// Keys [begin, end) of a token's list.
struct Split {
  int64_t token, sequence, begin, end;
  bool whole;  // the only split of this token
};

// Partial result of a split, per head: maximum, sum and unnormalised output.
struct Partial {
  float *max, *sum, *output;  // [heads], [heads], [heads, width]
};

// Memory of one thread, reused by its tasks.
template <typename T>
struct Workspace {
  Buffer<T> queries;  // packed panels of heads
  Buffer<T> keys;     // [key][key_dim] as rows of A
  Buffer<T> values;   // [panel of columns][key step][16]
  Buffer<T> weights;  // [head][key] as rows of A
  Buffer<T> rows;     // 16 padded rows to pack
  Buffer<T> latents;  // of a step, where the cache does not hold rows of T
  Buffer<float> scores;
  Buffer<float> state;
};

template <typename T>
class SplitAttention {
 public:
  // `next`: the split after this one, on this thread or another, or nullptr.
  SplitAttention(const AbsorbedAttention<T>& args, const Split& split, const Split* next, Workspace<T>& w)
      : a_(args), s_(split), next_(next), w_(w), key_stride_(padded_terms<T>(args.key_dim())) {}

  // Fills `to`; false for a key without a slot.
  bool run(const Partial& to) {
    pack_queries();
    keys_ = w_.keys.reserve(kBlockKeys * key_stride_);
    values_ = w_.values.reserve(a_.width() / kPanel * kValueStride);
    std::fill(to.max, to.max + a_.padded_heads(), -kInfinity);
    std::fill(to.sum, to.sum + a_.padded_heads(), 0.0f);
    std::fill(to.output, to.output + a_.num_heads * a_.width(), 0.0f);
    for (int64_t begin = s_.begin; begin < s_.end; begin += kBlockKeys) {
      const int64_t count = std::min(kBlockKeys, s_.end - begin);
      if (!gather(begin, count)) return false;
      for (int64_t group = 0; group < a_.head_groups(); ++group) add_block(group, count, to);
    }
    return true;
  }

 private:
  // Stride of a panel of values, in elements. Padded by one cache line: a pair of keys writes one line of every panel, and
  // with a power-of-two stride those lines would map to few cache sets.
  static constexpr int64_t kValueStride = panel_size<T>(kBlockKeys) + Step<T>::step;

  void pack_queries() {
    const int64_t padded = round_up(a_.key_dim(), kVector<T>);
    queries_ = w_.queries.reserve(a_.head_groups() * panel_size<T>(a_.key_dim()));
    T* rows = w_.rows.reserve(kLanes * padded);
    for (int64_t group = 0; group < a_.head_groups(); ++group) {
      std::memset(static_cast<void*>(rows), 0, size_t(kLanes * padded) * sizeof(T));
      for (int64_t i = 0; i < std::min<int64_t>(kLanes, a_.num_heads - group * kLanes); ++i) {
        const int64_t head = group * kLanes + i;
        std::copy_n(a_.q_latent + s_.token * a_.latent_token_stride + head * a_.latent_head_stride, a_.latent_dim,
                    rows + i * padded);
        std::copy_n(a_.q_rope + s_.token * a_.rope_token_stride + head * a_.rope_head_stride, a_.rope_dim,
                    rows + i * padded + a_.latent_dim);
      }
      pack_panel(rows, padded, a_.key_dim(), queries_ + group * panel_size<T>(a_.key_dim()));
    }
  }

  const char* find_key(const Split& split, int64_t index) const {
    const int64_t position = a_.selected ? a_.selected[split.token * a_.topk + index] : index;
    return a_.paged.find(split.sequence, position);
  }

  // The key one block after this one; nullptr for none.
  const char* find_ahead(int64_t index) const {
    index += kBlockKeys;
    if (index < s_.end) return find_key(s_, index);
    if (next_ == nullptr || (index += next_->begin - s_.end) >= next_->end) return nullptr;
    return find_key(*next_, index);
  }

  // Loads keys as rows, and interleaves their latents as terms of the sum over keys.
  bool gather(int64_t begin, int64_t count) {
    constexpr int64_t width = Step<T>::width;
    const bool fp8 = a_.paged.kv_cache.fp8;
    const int64_t num_bytes = latent_bytes<T>(fp8, a_.latent_dim, a_.rope_dim);
    T* zero = w_.rows.reserve(a_.width());
    T* rows = w_.latents.reserve(width * a_.key_dim());
    std::fill_n(zero, a_.width(), T{});
    for (int64_t j = 0; j < count; j += width) {
      const T* latents[width];
      for (int64_t i = 0; i < width; ++i) {
        latents[i] = zero;
        if (j + i >= count) continue;
        const char* entry = find_key(s_, begin + j + i);
        if (entry == nullptr) return false;
        latents[i] = read_latent(entry, fp8, a_.latent_dim, a_.rope_dim, rows + i * a_.key_dim());
        copy_terms(latents[i], a_.key_dim(), keys_ + (j + i) * key_stride_);
        prefetch(find_ahead(begin + j + i), num_bytes);
      }
      interleave_latents(latents, j / width);
    }
    return true;
  }

  void interleave_latents(const T* const (&latents)[Step<T>::width], int64_t step) {
    T* values = values_ + step * Step<T>::step;
    const int64_t full = a_.latent_dim / kPanel * kPanel;
    interleave(latents, full, values, kValueStride);
    if (full == a_.latent_dim) return;
    T last[Step<T>::width][kPanel] = {};  // nothing is read past the latent
    const T* rows[Step<T>::width];
    for (int64_t i = 0; i < Step<T>::width; ++i) {
      std::copy_n(latents[i] + full, a_.latent_dim - full, last[i]);
      rows[i] = last[i];
    }
    interleave(rows, kPanel, values + full / kPanel * kValueStride, kValueStride);
  }

  // Scores of the next 64 keys for 16 heads.
  void add_block(int64_t group, int64_t count, const Partial& to) {
    const int64_t first = group * kLanes, heads = std::min<int64_t>(kLanes, a_.num_heads - first);
    float* scores = w_.scores.reserve(kBlockKeys * kLanes);
    gemm_panels<T>(keys_, key_stride_, count, {queries_ + group * panel_size<T>(a_.key_dim()), 1, 0}, a_.key_dim(), scores,
                   kLanes);
    const Vec rescale = softmax(scores, count, to.max + first, to.sum + first);
    const T* weights = transpose_weights(scores, count, heads);
    float* output = to.output + first * a_.width();
    for (int64_t h = 0; h < heads; ++h) {
      if (rescale[h] == 1.0f) continue;
      for (int64_t c = 0; c < a_.width(); c += kLanes)
        store_vec(output + h * a_.width() + c, load_vec(output + h * a_.width() + c) * rescale[h]);
    }
    gemm_panels<T>(weights, kBlockKeys, heads, {values_, a_.width() / kPanel, kValueStride}, count, output,
                   a_.width(), true);
  }

  // Turns scores into softmax weights for 16 heads; returns the rescaling factor of the previous sums.
  Vec softmax(float* scores, int64_t count, float* max, float* sum) const {
    const Vec old_max = load_vec(max);
    Vec new_max = old_max;
    for (int64_t j = 0; j < count; ++j) {
      const Vec s = load_vec(scores + j * kLanes) * a_.scale;
      new_max = s > new_max ? s : new_max;
      store_vec(scores + j * kLanes, s);
    }
    const Vec base = new_max == -kInfinity ? Vec{} : new_max;
    const Vec rescale = exp_vec(old_max - base);
    Vec total = load_vec(sum) * rescale;
    for (int64_t j = 0; j < count; ++j) {
      const Vec p = exp_vec(load_vec(scores + j * kLanes) - base);
      total += p;
      store_vec(scores + j * kLanes, p);
    }
    store_vec(max, new_max);
    store_vec(sum, total);
    return rescale;
  }

  // [key][head] fp32 -> [head][key] rows of A.
  const T* transpose_weights(const float* scores, int64_t count, int64_t heads) {
    T* weights = w_.weights.reserve(kLanes * kBlockKeys);
    T rows[kLanes][kBlockKeys];  // zero from `count` up to an even number
    for (int64_t j = 0; j < count; j += kLanes) {
      Vec block[kLanes] = {};
      for (int64_t i = 0; i < std::min<int64_t>(kLanes, count - j); ++i) block[i] = load_vec(scores + (j + i) * kLanes);
      transpose(block);
      for (int64_t h = 0; h < heads; ++h) store_vec(rows[h] + j, block[h]);
    }
    for (int64_t h = 0; h < heads; ++h) copy_terms(rows[h], kBlockKeys, weights + h * kBlockKeys);
    return weights;
  }

  const AbsorbedAttention<T>& a_;
  const Split& s_;
  const Split* next_;
  Workspace<T>& w_;
  const int64_t key_stride_;
  T *queries_ = nullptr, *keys_ = nullptr, *values_ = nullptr;
};

// Merges the next split: the online-softmax step, with a split in place of a block.
template <typename T>
void merge(const AbsorbedAttention<T>& a, const Partial& next, const Partial& to) {
  for (int64_t h = 0; h < a.num_heads; ++h) {
    const float max = next.max[h] > to.max[h] ? next.max[h] : to.max[h], base = max == -kInfinity ? 0.0f : max;
    const float old_factor = exp_fixed(to.max[h] - base), new_factor = exp_fixed(next.max[h] - base);
    to.max[h] = max;
    to.sum[h] = to.sum[h] * old_factor + next.sum[h] * new_factor;
    float *output = to.output + h * a.width(), *added = next.output + h * a.width();
    for (int64_t c = 0; c < a.width(); c += kLanes)
      store_vec(output + c, load_vec(output + c) * old_factor + load_vec(added + c) * new_factor);
  }
}

template <typename T>
void write(const AbsorbedAttention<T>& a, int64_t token, bool empty, const Partial& from) {
  for (int64_t h = 0; h < a.num_heads; ++h) {
    T* out = a.out + (token * a.num_heads + h) * a.latent_dim;
    const Vec sum = splat(empty ? 1.0f : from.sum[h]);
    for (int64_t c = 0; c < a.latent_dim; c += kLanes)
      store_vec(out + c, load_vec(from.output + h * a.width() + c) / sum, std::min<int64_t>(kLanes, a.latent_dim - c));
  }
}

template <typename T>
std::vector<Split> make_splits(const AbsorbedAttention<T>& a, const LayoutArgs& layout) {
  std::vector<Split> splits;
  for (int64_t b = 0; b < layout.num_sequences; ++b)
    for (int64_t t = layout.cu_seqlens_q[b]; t < layout.cu_seqlens_q[b + 1]; ++t) {
      int64_t keys = layout.positions[t] + 1;
      if (a.selected) keys = std::find(a.selected + t * a.topk, a.selected + (t + 1) * a.topk, -1) - (a.selected + t * a.topk);
      const bool whole = keys <= kSplitKeys;
      for (int64_t begin = 0; begin == 0 || begin < keys; begin += kSplitKeys)
        splits.push_back({t, b, begin, std::min(keys, begin + kSplitKeys), whole});
    }
  return splits;
}

template <typename T>
Partial partial_at(const AbsorbedAttention<T>& a, float* memory) {
  return {memory, memory + a.padded_heads(), memory + 2 * a.padded_heads()};
}

template <typename T>
Status mla_attention(const AbsorbedAttention<T>& a, int64_t num_threads) {
  const std::vector<Split> splits = make_splits(a, a.paged.layout);
  const int64_t partial_size = 2 * a.padded_heads() + a.num_heads * a.width();
  const bool any_cut = std::any_of(splits.begin(), splits.end(), [](const Split& s) { return !s.whole; });
  std::vector<float> partials(any_cut ? splits.size() * size_t(partial_size) : 0);
  std::atomic<int64_t> status{kOk};
#pragma omp parallel num_threads(int(num_threads))
  {
    const FlushDenormals flush;
    static thread_local Workspace<T> workspace;
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < int64_t(splits.size()); ++i) {
      const Split& s = splits[i];
      float* memory = s.whole ? workspace.state.reserve(partial_size) : partials.data() + i * partial_size;
      const Partial partial = partial_at(a, memory);
      const int64_t ahead = i + num_threads;
      const Split* next = ahead < int64_t(splits.size()) ? &splits[ahead] : nullptr;
      if (!SplitAttention<T>(a, s, next, workspace).run(partial)) status = kOutOfRange;
      if (s.whole) write(a, s.token, s.end == 0, partial);
    }
    // The barrier at the end of the loop above completes the partials.
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < int64_t(splits.size()); ++i) {
      if (splits[i].whole || splits[i].begin > 0) continue;
      const Partial total = partial_at(a, partials.data() + i * partial_size);
      for (size_t j = size_t(i) + 1; j < splits.size() && splits[j].token == splits[i].token; ++j)
        merge(a, partial_at(a, partials.data() + j * partial_size), total);
      write(a, splits[i].token, false, total);
    }
  }
  return Status(status.load());
}

}  // namespace
}  // namespace shoal

// Strides are in elements. Writes a shoal::Status.
extern "C" void shoal_mla_attention(int64_t dtype, const void* q_latent, int64_t latent_token_stride,
                                    int64_t latent_head_stride, const void* q_rope, int64_t rope_token_stride,
                                    int64_t rope_head_stride, const shoal::PagedArgs* paged, int64_t num_heads,
                                    int64_t latent_dim, int64_t rope_dim, float scale, const int32_t* selected,
                                    int64_t topk, void* out, int64_t num_threads, int64_t* status) {
  using namespace shoal;
  with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    const AbsorbedAttention<T> attention{static_cast<const T*>(q_latent),
                                         static_cast<const T*>(q_rope),
                                         latent_token_stride,
                                         latent_head_stride,
                                         rope_token_stride,
                                         rope_head_stride,
                                         *paged,
                                         num_heads,
                                         latent_dim,
                                         rope_dim,
                                         scale,
                                         selected,
                                         topk,
                                         static_cast<T*>(out)};
    *status = mla_attention(attention, num_threads);
  });
}
SHOAL_EXPORT(shoal_mla_attention)
