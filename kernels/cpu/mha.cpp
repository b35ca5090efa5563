// Attention of prompt tokens in the MHA form, with keys and values per head computed from the latents; mha_attention in
// kernels/attention.py states the contract.
//
// A task is one head of one sequence. It processes the context in segments whose keys and values stay in cache, and the
// tokens in tiles; the state of a token (maximum, sum, output) is kept between segments, exactly, in fp32.
//   S [token][key] = queries x packed keys      O [token][column] += P [token][key] x interleaved values
#include <atomic>
#include <vector>

#include "ops.h"
#include "kv_format.h"
#include "vec.h"

namespace shoal {
namespace {

constexpr int64_t kBlockKeys = 64;       // part of the contract: where the online softmax rescales
constexpr int64_t kSegmentBlocks = 16;   // this and the next affect speed only
constexpr int64_t kTileTokens = 64;

template <typename T>
struct HeadAttention {
  const T* q;  // [T, h, key_dim]: nope | rope
  int64_t token_stride, head_stride;
  const PagedArgs& paged;
  const T *w_uk, *w_uv;  // packed, per head: [nope_dim, latent_dim], [v_dim, latent_dim]
  int64_t num_heads, latent_dim, nope_dim, rope_dim, v_dim;
  float scale;
  T* out;  // [T, h, v_dim]

  int64_t key_dim() const { return nope_dim + rope_dim; }
  int64_t width() const { return round_up(v_dim, kPanel); }
};

struct Head {
  int64_t sequence, head, first_token, last_token;
};

// Memory of one thread, reused by its tasks.
template <typename T>
struct Workspace {
  Buffer<T> keys;      // [block][4 panels of keys]
  Buffer<T> values;    // [block][panel of columns][key step][16]
  Buffer<T> latents;   // 64 rows of A
  Buffer<T> rows;      // 64 padded keys or values
  Buffer<T> latent;    // of one position, where the cache does not hold rows of T
  Buffer<T> queries;   // 64 rows of A
  Buffer<T> weights;   // 64 rows of A
  Buffer<float> projected, scores, max, sum, output;
};

template <typename T>
class HeadTask {
 public:
  HeadTask(const HeadAttention<T>& args, const Head& head, Workspace<T>& w)
      : a_(args),
        h_(head),
        w_(w),
        tokens_(head.last_token - head.first_token),
        context_(args.paged.layout.positions[head.last_token - 1] + 1),
        query_stride_(padded_terms<T>(args.key_dim())),
        key_block_(kBlockKeys / kPanel * panel_size<T>(args.key_dim())),
        value_block_(args.width() / kPanel * panel_size<T>(kBlockKeys)) {}

  // False for a key without a slot.
  bool run() {
    w_.keys.reserve(kSegmentBlocks * key_block_);
    w_.values.reserve(kSegmentBlocks * value_block_);
    std::fill_n(w_.max.reserve(tokens_), tokens_, -kInfinity);
    std::fill_n(w_.sum.reserve(tokens_ * kLanes), tokens_ * kLanes, 0.0f);
    std::fill_n(w_.output.reserve(tokens_ * a_.width()), tokens_ * a_.width(), 0.0f);
    constexpr int64_t segment_keys = kSegmentBlocks * kBlockKeys;
    for (int64_t begin = 0; begin < context_; begin += segment_keys) {
      const int64_t end = std::min(context_, begin + segment_keys);
      for (int64_t block = begin; block < end; block += kBlockKeys)
        if (!expand((block - begin) / kBlockKeys, block, std::min(kBlockKeys, end - block))) return false;
      for (int64_t t = 0; t < tokens_; t += kTileTokens) attend(t, std::min(kTileTokens, tokens_ - t), begin, end);
    }
    write();
    return true;
  }

 private:
  int64_t context_of(int64_t t) const { return a_.paged.layout.positions[h_.first_token + t] + 1; }

  // Keys and values of up to 64 positions.
  bool expand(int64_t block, int64_t position, int64_t count) {
    const int64_t latent_stride = padded_terms<T>(a_.latent_dim);
    const int64_t key_stride = round_up(a_.key_dim(), kVector<T>), value_stride = a_.width();
    T* latents = w_.latents.reserve(kBlockKeys * latent_stride);
    T* rows = w_.rows.reserve(kBlockKeys * std::max(key_stride, value_stride));
    T* row = w_.latent.reserve(a_.latent_dim + a_.rope_dim);
    std::memset(static_cast<void*>(rows), 0, size_t(kBlockKeys * key_stride) * sizeof(T));
    for (int64_t j = 0; j < count; ++j) {
      const char* entry = a_.paged.find(h_.sequence, position + j);
      if (entry == nullptr) return false;
      const T* latent = read_latent(entry, a_.paged.kv_cache.fp8, a_.latent_dim, a_.rope_dim, row);
      copy_terms(latent, a_.latent_dim, latents + j * latent_stride);
      std::copy_n(latent + a_.latent_dim, a_.rope_dim, rows + j * key_stride + a_.nope_dim);
    }
    project(latents, latent_stride, count, a_.w_uk, a_.nope_dim, rows, key_stride);
    for (int64_t j = 0; j < kBlockKeys; j += kPanel)
      pack_panel(rows + j * key_stride, key_stride, a_.key_dim(),
                 w_.keys.reserve(0) + block * key_block_ + j / kPanel * panel_size<T>(a_.key_dim()));

    std::memset(static_cast<void*>(rows), 0, size_t(kBlockKeys * value_stride) * sizeof(T));
    project(latents, latent_stride, count, a_.w_uv, a_.v_dim, rows, value_stride);
    for (int64_t j = 0; j < kBlockKeys; j += Step<T>::width) {
      const T* terms[Step<T>::width];
      for (int64_t i = 0; i < Step<T>::width; ++i) terms[i] = rows + (j + i) * value_stride;
      interleave(terms, a_.width(), w_.values.reserve(0) + block * value_block_ + j / Step<T>::width * Step<T>::step,
                 panel_size<T>(kBlockKeys));
    }
    return true;
  }

  // rows[j][0, n) = latents[j] . w[head], rounded to T
  void project(const T* latents, int64_t stride, int64_t count, const T* w, int64_t n, T* rows, int64_t row_stride) {
    const int64_t columns = round_up(n, kPanel);
    float* projected = w_.projected.reserve(kBlockKeys * columns);
    const Panels<T> panels{w + h_.head * packed_size<T>(n, a_.latent_dim), columns / kPanel, panel_size<T>(a_.latent_dim)};
    gemm_panels<T>(latents, stride, count, panels, a_.latent_dim, projected, columns);
    for (int64_t j = 0; j < count; ++j) round_row(projected + j * columns, n, rows + j * row_stride);
  }

  // The keys [begin, end) for tokens [first, first + count).
  void attend(int64_t first, int64_t count, int64_t begin, int64_t end) {
    if (context_of(first + count - 1) <= begin) return;
    T* queries = w_.queries.reserve(kTileTokens * query_stride_);
    for (int64_t i = 0; i < count; ++i)
      copy_terms(a_.q + (h_.first_token + first + i) * a_.token_stride + h_.head * a_.head_stride, a_.key_dim(),
                 queries + i * query_stride_);
    for (int64_t block = begin; block < end; block += kBlockKeys) {
      // Contexts grow with the tokens: they contain nothing or part of the block | all of it
      int64_t seeing = 0, whole = 0;
      while (seeing < count && context_of(first + seeing) <= block) ++seeing;
      while (whole < count && context_of(first + whole) < block + kBlockKeys) ++whole;
      if (seeing == count) continue;
      add_block((block - begin) / kBlockKeys, block, first, seeing, whole, count);
    }
  }

  void add_block(int64_t block, int64_t position, int64_t first, int64_t seeing, int64_t whole, int64_t count) {
    const T* queries = w_.queries.reserve(0);
    T* weights = w_.weights.reserve(kTileTokens * kBlockKeys);
    float* scores = w_.scores.reserve(kTileTokens * kBlockKeys);
    const Panels<T> keys{w_.keys.reserve(0) + block * key_block_, kBlockKeys / kPanel, panel_size<T>(a_.key_dim())};
    const Panels<T> values{w_.values.reserve(0) + block * value_block_, a_.width() / kPanel, panel_size<T>(kBlockKeys)};
    gemm_panels<T>(queries + seeing * query_stride_, query_stride_, count - seeing, keys, a_.key_dim(),
                   scores + seeing * kBlockKeys, kBlockKeys);
    float* output = w_.output.reserve(0) + first * a_.width();
    for (int64_t i = seeing; i < count; ++i) {
      const int64_t limit = std::min(kBlockKeys, context_of(first + i) - position);
      softmax(first + i, scores + i * kBlockKeys, limit, weights + i * kBlockKeys);
      if (i < whole) add_some(weights + i * kBlockKeys, values, limit, output + i * a_.width());
    }
    whole = std::max(whole, seeing);
    gemm_panels<T>(weights + whole * kBlockKeys, kBlockKeys, count - whole, values, kBlockKeys, output + whole * a_.width(),
                   a_.width(), true);
  }

  // Adds the first `limit` keys of a block; the others contribute no term, not even zero.
  void add_some(const T* weights, Panels<T> values, int64_t limit, float* output) {
    const int64_t pairs = limit / Step<T>::width * Step<T>::width;
    gemm_panels<T>(weights, kBlockKeys, 1, values, pairs, output, a_.width(), true);
    if (pairs == limit) return;
    const int64_t place = pairs + place_in_step<T>(pairs);
    const Vec weight = splat(to_float(weights[place]));
    for (int64_t p = 0; p < values.count; ++p) {
      Vec value;
      const T* step = values.data + p * values.stride + pairs / Step<T>::width * Step<T>::step;
      for (int lane = 0; lane < kLanes; ++lane)
        value[lane] = to_float(step[lane * Step<T>::width + place_in_step<T>(pairs)]);
      store_vec(output + p * kPanel, fma_vec(weight, value, load_vec(output + p * kPanel)));
    }
  }

  // Turns scores of 64 keys, of which `limit` count, into softmax weights, and rescales the state of token t.
  void softmax(int64_t t, float* scores, int64_t limit, T* weights) {
    float& old_max = w_.max.reserve(0)[t];
    float* sums = w_.sum.reserve(0) + t * kLanes;
    Vec highest = splat(old_max);
    for (int64_t j = 0; j < kBlockKeys; j += kLanes) {
      const Vec s = lane_numbers() < int32_t(limit - j) ? load_vec(scores + j) * a_.scale : splat(-kInfinity);
      highest = s > highest ? s : highest;
      store_vec(scores + j, s);
    }
    const float new_max = max_lanes(highest), base = new_max == -kInfinity ? 0.0f : new_max;
    const float factor = exp_fixed(old_max - base);
    Vec sum = load_vec(sums) * factor;
    T row[kBlockKeys];
    for (int64_t j = 0; j < kBlockKeys; j += kLanes) {
      const Vec p = exp_vec(load_vec(scores + j) - base);
      sum += p;
      store_vec(row + j, p);
    }
    copy_terms(row, kBlockKeys, weights);
    store_vec(sums, sum);
    old_max = new_max;
    if (factor == 1.0f) return;
    float* output = w_.output.reserve(0) + t * a_.width();
    for (int64_t c = 0; c < a_.width(); c += kLanes) store_vec(output + c, load_vec(output + c) * factor);
  }

  void write() {
    for (int64_t t = 0; t < tokens_; ++t) {
      T* out = a_.out + ((h_.first_token + t) * a_.num_heads + h_.head) * a_.v_dim;
      const Vec sum = splat(sum_lanes(load_vec(w_.sum.reserve(0) + t * kLanes)));
      for (int64_t c = 0; c < a_.v_dim; c += kLanes)
        store_vec(out + c, load_vec(w_.output.reserve(0) + t * a_.width() + c) / sum,
                  std::min<int64_t>(kLanes, a_.v_dim - c));
    }
  }

  const HeadAttention<T>& a_;
  const Head& h_;
  Workspace<T>& w_;
  const int64_t tokens_, context_, query_stride_, key_block_, value_block_;
};

template <typename T>
Status mha_attention(const HeadAttention<T>& a, int64_t num_threads) {
  const LayoutArgs& layout = a.paged.layout;
  std::vector<Head> heads;
  for (int64_t b = 0; b < layout.num_sequences; ++b)
    for (int64_t h = 0; h < a.num_heads && layout.cu_seqlens_q[b] < layout.cu_seqlens_q[b + 1]; ++h)
      heads.push_back({b, h, layout.cu_seqlens_q[b], layout.cu_seqlens_q[b + 1]});
  std::atomic<int64_t> status{kOk};
#pragma omp parallel num_threads(int(num_threads))
  {
    const FlushDenormals flush;
    static thread_local Workspace<T> workspace;
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < int64_t(heads.size()); ++i)
      if (!HeadTask<T>(a, heads[i], workspace).run()) status = kOutOfRange;
  }
  return Status(status.load());
}

}  // namespace
}  // namespace shoal

// Strides are in elements. Writes a shoal::Status.
extern "C" void shoal_mha_attention(int64_t dtype, const void* q, int64_t token_stride, int64_t head_stride,
                                    const shoal::PagedArgs* paged, const void* w_uk, const void* w_uv, int64_t num_heads,
                                    int64_t latent_dim, int64_t nope_dim, int64_t rope_dim, int64_t v_dim, float scale,
                                    void* out, int64_t num_threads, int64_t* status) {
  using namespace shoal;
  with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    const HeadAttention<T> attention{static_cast<const T*>(q),
                                     token_stride,
                                     head_stride,
                                     *paged,
                                     static_cast<const T*>(w_uk),
                                     static_cast<const T*>(w_uv),
                                     num_heads,
                                     latent_dim,
                                     nope_dim,
                                     rope_dim,
                                     v_dim,
                                     scale,
                                     static_cast<T*>(out)};
    *status = mha_attention(attention, num_threads);
  });
}
SHOAL_EXPORT(shoal_mha_attention)
