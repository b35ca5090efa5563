// Norms, rotary embedding, quantisation and routing: every row on its own. kernels/norm.py, rope.py, kv_format.py,
// quant.py and topk_router.py state the contracts.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "ops.h"
#include "kv_format.h"
#include "vec.h"

namespace shoal {
namespace {

template <typename Body>
void for_rows(int64_t num_rows, int64_t num_threads, Body body) {
#pragma omp parallel num_threads(int(num_threads))
  {
    const FlushDenormals flush;
#pragma omp for schedule(static)
    for (int64_t r = 0; r < num_rows; ++r) body(r);
  }
}

// sum of f(x[i]): lane j adds elements j, j + 16, .. in order, then the lanes add up in a tree
template <typename T, typename F>
float sum_row(const T* x, int64_t n, F f) {
  Vec total = {};
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec part = load_vec(x + i, n - i);
    const int64_t count = std::min<int64_t>(kLanes, n - i);
    Vec terms = f(part);
    for (int64_t lane = count; lane < kLanes; ++lane) terms[lane] = 0.0f;
    total += terms;
  }
  return sum_lanes(total);
}

template <typename T>
void rms_norm_row(const T* x, const float* weight, int64_t n, float eps, T* out) {
  const float mean = sum_row(x, n, [](Vec v) { return v * v; }) / float(n);
  const float factor = 1.0f / std::sqrt(mean + eps);
  for (int64_t i = 0; i < n; ++i) out[i] = from_float<T>(to_float(x[i]) * factor * weight[i]);
}

template <typename T>
void layer_norm_row(const T* x, const float* weight, const float* bias, int64_t n, float eps, T* out) {
  const float mean = sum_row(x, n, [](Vec v) { return v; }) / float(n);
  const float variance = sum_row(x, n, [=](Vec v) { return (v - mean) * (v - mean); }) / float(n);
  const float factor = 1.0f / std::sqrt(variance + eps);
  for (int64_t i = 0; i < n; ++i) out[i] = from_float<T>((to_float(x[i]) - mean) * factor * weight[i] + bias[i]);
}

template <typename T>
void rotate_row(const T* x, const float* cos, int64_t dim, bool interleaved, T* out) {
  const int64_t half = dim / 2;
  const float* sin = cos + half;
  for (int64_t i = 0; i < half; ++i) {
    const int64_t first = interleaved ? 2 * i : i, second = interleaved ? 2 * i + 1 : i + half;
    const float a = to_float(x[first]), b = to_float(x[second]);
    out[first] = from_float<T>(a * cos[i] - b * sin[i]);
    out[second] = from_float<T>(b * cos[i] + a * sin[i]);
  }
}

// Scratch memory of this thread for n values; previous contents are lost.
template <typename T>
T* row_memory(int64_t n) {
  static thread_local Buffer<T> memory;
  return memory.reserve(n);
}

inline bool in_range(int64_t i, int64_t n) { return i >= 0 && i < n; }

// NaN is below everything, also below -infinity.
inline bool above(float a, float b) { return a > b || (a == a && b != b); }

struct RouterConfig {
  int64_t num_experts, n_group, topk_group, top_k;
  bool norm_topk_prob;
  float routed_scaling_factor;
};

// Moves the `k` best of values[candidates] to the front, best first, ties to the earlier candidate.
void select_best(const std::vector<float>& values, std::vector<int64_t>& candidates, int64_t k) {
  for (int64_t slot = 0; slot < k; ++slot) {
    auto best = candidates.begin() + slot;
    for (auto it = best; it != candidates.end(); ++it)
      if (above(values[*it], values[*best])) best = it;
    std::rotate(candidates.begin() + slot, best, best + 1);  // the others stay in order
  }
}

class Router {
 public:
  explicit Router(const RouterConfig& config) : c_(config), probs_(config.num_experts), scores_(config.num_experts) {}

  void route(const float* logits, const float* bias, int64_t* topk_idx, float* topk_weights) {
    for (int64_t e = 0; e < c_.num_experts; ++e) {
      probs_[e] = 1.0f / (1.0f + exp_fixed(-logits[e]));
      scores_[e] = probs_[e] + bias[e];
    }
    find_candidates();
    select_best(scores_, candidates_, c_.top_k);
    float sum = 0.0f;
    for (int64_t k = 0; k < c_.top_k; ++k) {
      topk_idx[k] = candidates_[k];
      topk_weights[k] = probs_[candidates_[k]];
      sum += topk_weights[k];
    }
    for (int64_t k = 0; k < c_.top_k; ++k) {
      const float weight = c_.norm_topk_prob ? topk_weights[k] / (sum + 1e-20f) : topk_weights[k];
      topk_weights[k] = weight * c_.routed_scaling_factor;
    }
  }

 private:
  // Experts of the groups with the highest sums of their two best scores, ascending.
  void find_candidates() {
    const int64_t size = c_.num_experts / c_.n_group;
    groups_.resize(c_.n_group);
    group_scores_.resize(c_.n_group);
    for (int64_t g = 0; g < c_.n_group; ++g) {
      groups_[g] = g;
      members_.resize(size);
      for (int64_t i = 0; i < size; ++i) members_[i] = g * size + i;
      if (c_.n_group > 1) select_best(scores_, members_, std::min<int64_t>(2, size));
      group_scores_[g] = size > 1 ? scores_[members_[0]] + scores_[members_[1]] : scores_[members_[0]];
    }
    select_best(group_scores_, groups_, c_.topk_group);
    std::sort(groups_.begin(), groups_.begin() + c_.topk_group);
    candidates_.clear();
    for (int64_t g = 0; g < c_.topk_group; ++g)
      for (int64_t i = 0; i < size; ++i) candidates_.push_back(groups_[g] * size + i);
  }

  const RouterConfig& c_;
  std::vector<float> probs_, scores_, group_scores_;
  std::vector<int64_t> groups_, members_, candidates_;
};

}  // namespace
}  // namespace shoal

// x: rows `stride` elements apart; out: [rows, n] contiguous.
extern "C" void shoal_rms_norm(int64_t dtype, const void* x, int64_t stride, int64_t rows, int64_t n,
                               const float* weight, float eps, void* out, int64_t num_threads) {
  using namespace shoal;
  with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    for_rows(rows, num_threads, [&](int64_t r) {
      rms_norm_row(static_cast<const T*>(x) + r * stride, weight, n, eps, static_cast<T*>(out) + r * n);
    });
  });
}
SHOAL_EXPORT(shoal_rms_norm)

extern "C" void shoal_layer_norm(int64_t dtype, const void* x, int64_t stride, int64_t rows, int64_t n,
                                 const float* weight, const float* bias, float eps, void* out, int64_t num_threads) {
  using namespace shoal;
  with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    for_rows(rows, num_threads, [&](int64_t r) {
      layer_norm_row(static_cast<const T*>(x) + r * stride, weight, bias, n, eps, static_cast<T*>(out) + r * n);
    });
  });
}
SHOAL_EXPORT(shoal_layer_norm)

// residual and both outputs: `dtype`, [rows, n] contiguous; x: `x_dtype`, rows `stride` elements apart.
extern "C" void shoal_add_rms_norm(int64_t x_dtype, int64_t dtype, const void* x, int64_t stride, const void* residual,
                                   int64_t rows, int64_t n, const float* weight, float eps, void* normed,
                                   void* new_residual, int64_t num_threads) {
  using namespace shoal;
  const auto run = [&](auto x_element, auto element) {
    using X = decltype(x_element);
    using T = decltype(element);
    for_rows(rows, num_threads, [&](int64_t r) {
      const X* row = static_cast<const X*>(x) + r * stride;
      const T* before = static_cast<const T*>(residual) + r * n;
      T* after = static_cast<T*>(new_residual) + r * n;
      for (int64_t i = 0; i < n; ++i) after[i] = from_float<T>(to_float(row[i]) + to_float(before[i]));
      rms_norm_row(after, weight, n, eps, static_cast<T*>(normed) + r * n);
    });
  };
  if (x_dtype == kBFloat16) return run(bf16{}, bf16{});
  dtype == kBFloat16 ? run(0.0f, bf16{}) : run(0.0f, 0.0f);
}
SHOAL_EXPORT(shoal_add_rms_norm)

// x and out: [T, h, dim] with strides in elements, separate or in place; table: [table_rows, dim] = [cos | sin]. Writes a
// shoal::Status.
extern "C" void shoal_apply_rope(int64_t dtype, const void* x, int64_t token_stride, int64_t head_stride,
                                 int64_t num_tokens, int64_t num_heads, int64_t dim, const float* table,
                                 int64_t table_rows, const int64_t* positions, int64_t interleaved, void* out,
                                 int64_t out_token_stride, int64_t out_head_stride, int64_t num_threads,
                                 int64_t* status) {
  using namespace shoal;
  std::atomic<int64_t> result{kOk};
  with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    for_rows(num_tokens, num_threads, [&](int64_t t) {
      if (!in_range(positions[t], table_rows)) {
        result = kOutOfRange;
        return;
      }
      for (int64_t h = 0; h < num_heads; ++h)
        rotate_row(static_cast<const T*>(x) + t * token_stride + h * head_stride, table + positions[t] * dim, dim,
                   interleaved != 0, static_cast<T*>(out) + t * out_token_stride + h * out_head_stride);
    });
  });
  *status = result;
}
SHOAL_EXPORT(shoal_apply_rope)

// kv: rows [latent | rope key], `stride` elements apart; fills the tokens' KV cache entries. Writes a
// shoal::Status.
extern "C" void shoal_write_latents(int64_t dtype, const void* kv, int64_t stride, int64_t num_tokens,
                                    int64_t latent_dim, int64_t rope_dim, const float* weight, float eps,
                                    const float* table, int64_t table_rows, const int64_t* positions,
                                    int64_t interleaved, const shoal::KVCacheArgs* kv_cache, const int64_t* slots,
                                    int64_t num_threads, int64_t* status) {
  using namespace shoal;
  std::atomic<int64_t> result{kOk};
  with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    for_rows(num_tokens, num_threads, [&](int64_t t) {
      char* entry = kv_cache->find(slots[t]);
      if (!in_range(positions[t], table_rows) || entry == nullptr) {
        result = kOutOfRange;
        return;
      }
      const T* row = static_cast<const T*>(kv) + t * stride;
      T* made = kv_cache->fp8 ? row_memory<T>(latent_dim + rope_dim) : reinterpret_cast<T*>(entry);
      rms_norm_row(row, weight, latent_dim, eps, made);
      rotate_row(row + latent_dim, table + positions[t] * rope_dim, rope_dim, interleaved != 0, made + latent_dim);
      if (kv_cache->fp8) write_latent(made, latent_dim, rope_dim, entry);
    });
  });
  *status = result;
}
SHOAL_EXPORT(shoal_write_latents)

// k: rows of `dim`, `stride` elements apart, whose first rope_dim columns rotate; fills the tokens' index keys. Writes a
// shoal::Status.
extern "C" void shoal_write_index_keys(int64_t dtype, const void* k, int64_t stride, int64_t num_tokens, int64_t dim,
                                       int64_t rope_dim, const float* weight, const float* bias, float eps,
                                       const float* table, int64_t table_rows, const int64_t* positions,
                                       int64_t interleaved, const shoal::IndexKeys* keys, const int64_t* slots,
                                       int64_t num_threads, int64_t* status) {
  using namespace shoal;
  std::atomic<int64_t> result{kOk};
  with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    for_rows(num_tokens, num_threads, [&](int64_t t) {
      const IndexKey key = keys->find_slot(slots[t]);
      if (!in_range(positions[t], table_rows) || key.data == nullptr) {
        result = kOutOfRange;
        return;
      }
      T* made = keys->fp8() ? row_memory<T>(dim) : reinterpret_cast<T*>(key.data);
      layer_norm_row(static_cast<const T*>(k) + t * stride, weight, bias, dim, eps, made);
      rotate_row(made, table + positions[t] * rope_dim, rope_dim, interleaved != 0, made);
      if (keys->fp8()) quantize_row(made, dim, key.data, key.scales);
    });
  });
  *status = result;
}
SHOAL_EXPORT(shoal_write_index_keys)

// x: rows `stride` elements apart; codes: [rows, n] contiguous; scales: [rows, ceil(n / 128)] contiguous.
extern "C" void shoal_quantize_rows(int64_t dtype, const void* x, int64_t stride, int64_t rows, int64_t n, char* codes,
                                    float* scales, int64_t num_threads) {
  using namespace shoal;
  const int64_t groups = (n + kScaleTerms - 1) / kScaleTerms;
  with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    for_rows(rows, num_threads, [&](int64_t r) {
      quantize_row(static_cast<const T*>(x) + r * stride, n, codes + r * n, reinterpret_cast<char*>(scales + r * groups));
    });
  });
}
SHOAL_EXPORT(shoal_quantize_rows)

// Inverse of shoal_quantize_rows, up to rounding; out: [rows, n] contiguous.
extern "C" void shoal_dequantize_rows(int64_t dtype, const char* codes, const float* scales, int64_t rows, int64_t n,
                                      void* out, int64_t num_threads) {
  using namespace shoal;
  const int64_t groups = (n + kScaleTerms - 1) / kScaleTerms;
  with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    for_rows(rows, num_threads, [&](int64_t r) {
      dequantize_row(codes + r * n, reinterpret_cast<const char*>(scales + r * groups), n, static_cast<T*>(out) + r * n);
    });
  });
}
SHOAL_EXPORT(shoal_dequantize_rows)

extern "C" void shoal_route(const float* logits, int64_t num_tokens, int64_t num_experts, const float* bias,
                            int64_t n_group, int64_t topk_group, int64_t top_k, int64_t norm_topk_prob,
                            float routed_scaling_factor, int64_t* topk_idx, float* topk_weights, int64_t num_threads) {
  using namespace shoal;
  const RouterConfig config{num_experts, n_group, topk_group, top_k, norm_topk_prob != 0, routed_scaling_factor};
  for_rows(num_tokens, num_threads, [&](int64_t t) {
    Router(config).route(logits + t * num_experts, bias, topk_idx + t * top_k, topk_weights + t * top_k);
  });
}
SHOAL_EXPORT(shoal_route)
