// Halves of a decoder layer in one call each, to minimise the time between the GEMMs of a step; kernels/fused.py declares
// the same structures. Every operation is one of ops.h, in the order of runtime/models.
#include <algorithm>

#include "ops.h"
#include "vec.h"

namespace shoal {

// Number of threads of an operation of `work` multiply-adds; kernels/cpu_library.py has the same rule.
struct Threads {
  static constexpr const char* abi_name = "Threads";
  int64_t count, min_parallel_work;
  int64_t operator()(int64_t work) const { return work >= min_parallel_work ? count : 1; }
};

// A packed weight and the code of its format.
struct PackedWeightArgs {
  static constexpr const char* abi_name = "PackedWeightArgs";
  const void* data;
  int64_t format;
};

// Sizes and weights of one layer's attention, including the norm before it.
struct FusedAttention {
  static constexpr const char* abi_name = "FusedAttention";
  int64_t dtype, hidden_size, num_heads, q_lora_rank, kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim;
  // q_lora_rank 0: w_a is kv_a alone, w_q applies to the hidden states and there is no q_a_norm
  int64_t rope_interleave, rope_rows;
  const float *input_norm, *q_a_norm, *kv_a_norm, *rope_table;
  PackedWeightArgs w_a, w_q, w_uk, w_uk_absorbed, w_uv, w_o;  // w_a: q_a over kv_a; uk and uv are of `dtype`
  int64_t index_n_heads, index_head_dim, index_topk, index_rope_interleave;  // no heads: no indexer
  PackedWeightArgs index_wq_b, index_wk;
  const float *index_k_norm, *index_k_norm_bias, *index_weights_proj;
  float index_weight_scale, rms_norm_eps, latent_norm_eps, scale;
};

// Arguments that change per step. Tokens of the MHA form come first.
struct StepArgs {
  static constexpr const char* abi_name = "StepArgs";
  int64_t num_tokens, num_mha_tokens;
  const int64_t *positions, *slots;
  LayoutArgs mha, mqa;
  Threads threads;
};

struct FusedMoE {
  static constexpr const char* abi_name = "FusedMoE";
  int64_t dtype, hidden_size, moe_intermediate_size, n_routed_experts, num_slots, n_group, topk_group, num_experts_per_tok,
      norm_topk_prob, shared_intermediate_size;  // 0: no shared expert
  const float *post_attention_norm, *gate, *bias;
  const int64_t* slot_of;
  PackedWeightArgs gate_up, down, shared_gate_up, shared_down;
  float rms_norm_eps, routed_scaling_factor;
};

namespace {

// Intermediate results of one thread's steps, sized for the largest step so far and shared by the two halves of a layer.
struct Scratch {
  Buffer<char> x, large[2], a, q_latent, absorbed, attended, index_k, index_q;
  Buffer<float> wide, logits, weights;
  Buffer<int64_t> topk_idx, row_of, token_of, counts;
};

Scratch& scratch() {
  static thread_local Scratch instance;
  return instance;
}

template <typename T>
T* reserve(Buffer<char>& buffer, int64_t n) {
  return reinterpret_cast<T*>(buffer.reserve(n * int64_t(sizeof(T))));
}

constexpr int64_t kWideRows = 256;

// out [t, n] = x [t, k] w in fp32: few rows are widened at a time.
template <typename T>
void linear_fp32(const T* x, const float* w, float* out, int64_t t, int64_t n, int64_t k, const Threads& threads,
                 Buffer<float>& buffer) {
  for (int64_t first = 0; first < t; first += kWideRows, x += kWideRows * k, out += kWideRows * n) {
    const int64_t rows = std::min(kWideRows, t - first);
    float* wide = buffer.reserve(rows * k);
    for (int64_t i = 0; i < rows * k; ++i) wide[i] = to_float(x[i]);
    shoal_linear(kFloat32, kFloat32, wide, 0, k, w, kFloat32, out, 0, n, 1, rows, n, k, threads(rows * n * k));
  }
}

template <typename T>
class AttentionStep {
 public:
  AttentionStep(const FusedAttention& block, const StepArgs& step, const KVCacheArgs& kv_cache, const IndexKeys* index_keys)
      : b_(block), s_(step), mha_{kv_cache, step.mha}, mqa_{kv_cache, step.mqa}, index_keys_(index_keys) {}

  // hidden, residual (or nullptr), new_residual and out: [T, hidden_size]; topk_indices: [MQA tokens, index_topk].
  // new_residual may be residual, out may be hidden.
  Status run(const T* hidden, const T* residual, T* new_residual, int32_t* topk_indices, T* out) {
    const int64_t t = s_.num_tokens, h = b_.hidden_size, first = s_.num_mha_tokens;
    const T* x = normalise(hidden, residual, new_residual);
    const int64_t width = b_.q_lora_rank + b_.kv_lora_rank + b_.qk_rope_head_dim;
    T* a = reserve<T>(memory_.a, t * width);
    linear(x, h, b_.w_a, a, t, width, h);
    const T* q_latent = b_.q_lora_rank > 0 ? query_latents(a, width) : x;
    if (!write_latents(x, a + b_.q_lora_rank, width)) return kOutOfRange;
    const T* q = queries(q_latent);
    T* heads = reserve<T>(memory_.large[1], t * b_.num_heads * b_.v_head_dim);
    if (first > 0 && !attend_mha(q, heads)) return kOutOfRange;
    if (first < t) {
      if (b_.index_n_heads > 0 && !select(x + first * h, q_latent + first * b_.q_lora_rank, topk_indices)) return kOutOfRange;
      const int64_t head_dim = b_.qk_nope_head_dim + b_.qk_rope_head_dim;
      if (!attend_mqa(q + first * b_.num_heads * head_dim, topk_indices, heads + first * b_.num_heads * b_.v_head_dim))
        return kOutOfRange;
    }
    linear(heads, b_.num_heads * b_.v_head_dim, b_.w_o, out, t, h, b_.num_heads * b_.v_head_dim);
    return kOk;
  }

 private:
  const T* normalise(const T* hidden, const T* residual, T* new_residual) {
    const int64_t t = s_.num_tokens, h = b_.hidden_size, threads = s_.threads(t * h);
    T* x = reserve<T>(memory_.x, t * h);
    if (residual == nullptr) {
      std::copy_n(hidden, t * h, new_residual);
      shoal_rms_norm(b_.dtype, hidden, h, t, h, b_.input_norm, b_.rms_norm_eps, x, threads);
    } else {
      shoal_add_rms_norm(b_.dtype, b_.dtype, hidden, h, residual, t, h, b_.input_norm, b_.rms_norm_eps, x, new_residual,
                         threads);
    }
    return x;
  }

  void linear(const T* x, int64_t x_row, PackedWeightArgs w, T* out, int64_t m, int64_t n, int64_t k) const {
    shoal_linear(b_.dtype, b_.dtype, x, 0, x_row, w.data, w.format, out, 0, n, 1, m, n, k, s_.threads(m * n * k));
  }

  // y[:, b] = x[:, b] w[b] for all heads b; x's rows are `x_head` apart.
  void batched_linear(const T* x, int64_t x_head, PackedWeightArgs w, T* out, int64_t m, int64_t n, int64_t k) const {
    const int64_t heads = b_.num_heads;
    shoal_linear(b_.dtype, b_.dtype, x, x_head, heads * x_head, w.data, w.format, out, n, heads * n, heads, m, n, k,
                 s_.threads(heads * m * n * k));
  }

  bool rotate(T* x, int64_t tokens, const int64_t* positions, int64_t heads, int64_t head_stride, int64_t interleaved) const {
    int64_t status = kOk;
    shoal_apply_rope(b_.dtype, x, heads * head_stride, head_stride, tokens, heads, b_.qk_rope_head_dim, b_.rope_table,
                     b_.rope_rows, positions, interleaved, x, heads * head_stride, head_stride,
                     s_.threads(tokens * heads * b_.qk_rope_head_dim), &status);
    return status == kOk;
  }

  bool write_latents(const T* x, const T* kv, int64_t stride) {
    int64_t status = kOk;
    const int64_t t = s_.num_tokens, dim = b_.index_head_dim;
    shoal_write_latents(b_.dtype, kv, stride, t, b_.kv_lora_rank, b_.qk_rope_head_dim, b_.kv_a_norm, b_.latent_norm_eps,
                        b_.rope_table, b_.rope_rows, s_.positions, b_.rope_interleave, &mqa_.kv_cache, s_.slots,
                        s_.threads(t * b_.kv_lora_rank), &status);
    if (b_.index_n_heads == 0 || status != kOk) return status == kOk;
    T* k = reserve<T>(memory_.index_k, t * dim);
    linear(x, b_.hidden_size, b_.index_wk, k, t, dim, b_.hidden_size);
    shoal_write_index_keys(b_.dtype, k, dim, t, dim, b_.qk_rope_head_dim, b_.index_k_norm, b_.index_k_norm_bias,
                           b_.latent_norm_eps, b_.rope_table, b_.rope_rows, s_.positions, b_.index_rope_interleave,
                           index_keys_, s_.slots, s_.threads(t * dim), &status);
    return status == kOk;
  }

  // a: [T, width], q_lora_rank columns first.
  const T* query_latents(const T* a, int64_t width) {
    const int64_t t = s_.num_tokens, rank = b_.q_lora_rank;
    T* q_latent = reserve<T>(memory_.q_latent, t * rank);
    shoal_rms_norm(b_.dtype, a, width, t, rank, b_.q_a_norm, b_.latent_norm_eps, q_latent, s_.threads(t * rank));
    return q_latent;
  }

  // q_latent: [T, q_lora_rank], or the hidden states [T, hidden_size] where that is 0.
  const T* queries(const T* q_latent) {
    const int64_t in = b_.q_lora_rank > 0 ? b_.q_lora_rank : b_.hidden_size;
    const int64_t t = s_.num_tokens, head_dim = b_.qk_nope_head_dim + b_.qk_rope_head_dim, n = b_.num_heads * head_dim;
    T* q = reserve<T>(memory_.large[0], t * n);
    linear(q_latent, in, b_.w_q, q, t, n, in);
    rotate(q + b_.qk_nope_head_dim, t, s_.positions, b_.num_heads, head_dim, b_.rope_interleave);
    return q;
  }

  bool attend_mha(const T* q, T* heads) const {
    int64_t status = kOk;
    const int64_t head_dim = b_.qk_nope_head_dim + b_.qk_rope_head_dim, tokens = s_.num_mha_tokens;
    shoal_mha_attention(b_.dtype, q, b_.num_heads * head_dim, head_dim, &mha_, b_.w_uk.data, b_.w_uv.data, b_.num_heads,
                        b_.kv_lora_rank, b_.qk_nope_head_dim, b_.qk_rope_head_dim, b_.v_head_dim, b_.scale, heads,
                        s_.threads(64 * tokens * b_.num_heads * head_dim), &status);
    return status == kOk;
  }

  bool attend_mqa(const T* q, const int32_t* topk_indices, T* heads) {
    int64_t status = kOk;
    const int64_t tokens = s_.num_tokens - s_.num_mha_tokens, latent = b_.kv_lora_rank, n = b_.num_heads;
    const int64_t head_dim = b_.qk_nope_head_dim + b_.qk_rope_head_dim;
    T* q_latent = reserve<T>(memory_.absorbed, tokens * n * latent);
    T* attended = reserve<T>(memory_.attended, tokens * n * latent);
    batched_linear(q, head_dim, b_.w_uk_absorbed, q_latent, tokens, latent, b_.qk_nope_head_dim);
    shoal_mla_attention(b_.dtype, q_latent, n * latent, latent, q + b_.qk_nope_head_dim, n * head_dim, head_dim, &mqa_,
                        n, latent, b_.qk_rope_head_dim, b_.scale, b_.index_topk > 0 ? topk_indices : nullptr, b_.index_topk,
                        attended, s_.threads(64 * tokens * n * latent), &status);
    batched_linear(attended, latent, b_.w_uv, heads, tokens, b_.v_head_dim, latent);
    return status == kOk;
  }

  bool select(const T* x, const T* q_latent, int32_t* topk_indices) {
    int64_t status = kOk;
    const int64_t tokens = s_.num_tokens - s_.num_mha_tokens, heads = b_.index_n_heads, dim = b_.index_head_dim;
    T* q = reserve<T>(memory_.index_q, tokens * heads * dim);
    linear(q_latent, b_.q_lora_rank, b_.index_wq_b, q, tokens, heads * dim, b_.q_lora_rank);
    rotate(q, tokens, s_.mqa.positions, heads, dim, b_.index_rope_interleave);
    float* weights = memory_.weights.reserve(tokens * heads);
    linear_fp32(x, b_.index_weights_proj, weights, tokens, heads, b_.hidden_size, s_.threads, memory_.wide);
    for (int64_t i = 0; i < tokens * heads; ++i) weights[i] *= b_.index_weight_scale;
    shoal_index_topk(b_.dtype, q, heads * dim, dim, weights, tokens, heads, dim, &s_.mqa, index_keys_,
                     b_.index_topk, topk_indices, s_.threads(tokens * heads * dim * b_.index_topk), &status);
    return status == kOk;
  }

  const FusedAttention& b_;
  const StepArgs& s_;
  const PagedArgs mha_, mqa_;
  const IndexKeys* index_keys_;
  Scratch& memory_ = scratch();
};

// attended, residual, new_residual and x: [T, hidden_size], the third may be the second; topk_idx and topk_weights: [T, num_experts_per_tok].
template <typename T>
void fused_moe_route(const FusedMoE& b, const Threads& threads, int64_t t, const T* attended, const T* residual, T* new_residual,
               T* x, int64_t* topk_idx, float* topk_weights) {
  Scratch& memory = scratch();
  const int64_t h = b.hidden_size, experts = b.n_routed_experts;
  shoal_add_rms_norm(b.dtype, b.dtype, attended, h, residual, t, h, b.post_attention_norm, b.rms_norm_eps, x, new_residual,
                     threads(t * h));
  float* logits = memory.logits.reserve(t * experts);
  linear_fp32(x, b.gate, logits, t, experts, h, threads, memory.wide);
  shoal_route(logits, t, experts, b.bias, b.n_group, b.topk_group, b.num_experts_per_tok, b.norm_topk_prob,
              b.routed_scaling_factor, topk_idx, topk_weights, threads(t * experts * (b.num_experts_per_tok + 16)));
}

// All experts are on this rank. attended, residual, new_residual and out: [T, hidden_size]; new_residual may be residual,
// out may be attended.
template <typename T>
void fused_moe(const FusedMoE& b, const Threads& threads, int64_t t, const T* attended, const T* residual, T* new_residual,
               T* out) {
  Scratch& memory = scratch();
  const int64_t h = b.hidden_size, top_k = b.num_experts_per_tok, inner = b.moe_intermediate_size;
  const int64_t pairs = t * top_k;
  int64_t *topk_idx = memory.topk_idx.reserve(pairs), *row_of = memory.row_of.reserve(pairs);
  int64_t *token_of = memory.token_of.reserve(pairs), *counts = memory.counts.reserve(b.num_slots);
  float* weights = memory.weights.reserve(pairs);
  T* x = reserve<T>(memory.x, t * h);
  fused_moe_route(b, threads, t, attended, residual, new_residual, x, topk_idx, weights);
  T* y = reserve<T>(memory.large[0], pairs * h);
  T* hidden = reserve<T>(memory.large[1], std::max(pairs * inner, t * b.shared_intermediate_size));
  shoal_permute_by_expert(topk_idx, t, top_k, b.slot_of, b.num_slots, counts, row_of, token_of);
  shoal_experts_mlp(b.dtype, x, h, token_of, counts, b.num_slots, b.gate_up.data, b.gate_up.format, b.down.data,
                    b.down.format, hidden, y, nullptr, h, inner, threads(3 * pairs * inner * h));
  T* shared = nullptr;
  if (b.shared_intermediate_size > 0) {
    shared = reserve<T>(memory.a, t * h);
    shoal_experts_mlp(b.dtype, x, h, nullptr, &t, 1, b.shared_gate_up.data, b.shared_gate_up.format, b.shared_down.data,
                      b.shared_down.format, hidden, shared, nullptr, h, b.shared_intermediate_size,
                      threads(3 * t * b.shared_intermediate_size * h));
  }
  shoal_combine_topk(b.dtype, y, h, row_of, weights, shared, out, t, top_k, h, threads(top_k * t * h));
}

}  // namespace
}  // namespace shoal

// hidden, residual (or nullptr), new_residual, out: [T, hidden_size] contiguous. index_keys: nullptr without an indexer.
// Writes a shoal::Status.
extern "C" void shoal_fused_attention(const shoal::FusedAttention* block, const shoal::StepArgs* step, const void* hidden,
                                      const void* residual, const shoal::KVCacheArgs* kv_cache,
                                      const shoal::IndexKeys* index_keys, void* new_residual, int32_t* topk_indices,
                                      void* out, int64_t* status) {
  using namespace shoal;
  with_dtype(block->dtype, [&](auto element) {
    using T = decltype(element);
    *status = AttentionStep<T>(*block, *step, *kv_cache, index_keys)
                  .run(static_cast<const T*>(hidden), static_cast<const T*>(residual), static_cast<T*>(new_residual),
                       topk_indices, static_cast<T*>(out));
  });
}
SHOAL_EXPORT(shoal_fused_attention)

extern "C" void shoal_fused_moe_route(const shoal::FusedMoE* block, const shoal::Threads* threads, int64_t num_tokens,
                                const void* attended, const void* residual, void* new_residual, void* x,
                                int64_t* topk_idx, float* topk_weights) {
  using namespace shoal;
  with_dtype(block->dtype, [&](auto element) {
    using T = decltype(element);
    fused_moe_route(*block, *threads, num_tokens, static_cast<const T*>(attended), static_cast<const T*>(residual),
              static_cast<T*>(new_residual), static_cast<T*>(x), topk_idx, topk_weights);
  });
}
SHOAL_EXPORT(shoal_fused_moe_route)

extern "C" void shoal_fused_moe(const shoal::FusedMoE* block, const shoal::Threads* threads, int64_t num_tokens,
                                const void* attended, const void* residual, void* new_residual, void* out) {
  using namespace shoal;
  with_dtype(block->dtype, [&](auto element) {
    using T = decltype(element);
    fused_moe(*block, *threads, num_tokens, static_cast<const T*>(attended), static_cast<const T*>(residual),
              static_cast<T*>(new_residual), static_cast<T*>(out));
  });
}
SHOAL_EXPORT(shoal_fused_moe)

SHOAL_STRUCT(Threads, FIELD(count), FIELD(min_parallel_work))
SHOAL_STRUCT(PackedWeightArgs, FIELD(data), FIELD(format))
SHOAL_STRUCT(FusedAttention, FIELD(dtype), FIELD(hidden_size), FIELD(num_heads), FIELD(q_lora_rank), FIELD(kv_lora_rank),
             FIELD(qk_nope_head_dim), FIELD(qk_rope_head_dim), FIELD(v_head_dim), FIELD(rope_interleave), FIELD(rope_rows),
             FIELD(input_norm), FIELD(q_a_norm), FIELD(kv_a_norm), FIELD(rope_table), FIELD(w_a), FIELD(w_q), FIELD(w_uk),
             FIELD(w_uk_absorbed), FIELD(w_uv), FIELD(w_o), FIELD(index_n_heads), FIELD(index_head_dim),
             FIELD(index_topk), FIELD(index_rope_interleave), FIELD(index_wq_b), FIELD(index_wk), FIELD(index_k_norm),
             FIELD(index_k_norm_bias), FIELD(index_weights_proj), FIELD(index_weight_scale), FIELD(rms_norm_eps),
             FIELD(latent_norm_eps), FIELD(scale))
SHOAL_STRUCT(StepArgs, FIELD(num_tokens), FIELD(num_mha_tokens), FIELD(positions), FIELD(slots), FIELD(mha), FIELD(mqa),
             FIELD(threads))
SHOAL_STRUCT(FusedMoE, FIELD(dtype), FIELD(hidden_size), FIELD(moe_intermediate_size), FIELD(n_routed_experts),
             FIELD(num_slots), FIELD(n_group), FIELD(topk_group), FIELD(num_experts_per_tok), FIELD(norm_topk_prob),
             FIELD(shared_intermediate_size), FIELD(post_attention_norm), FIELD(gate), FIELD(bias), FIELD(slot_of),
             FIELD(gate_up), FIELD(down), FIELD(shared_gate_up), FIELD(shared_down), FIELD(rms_norm_eps),
             FIELD(routed_scaling_factor))
