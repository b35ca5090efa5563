// The operations of the C interface that fused.cpp is made of; the files that define them say what they do.
#pragma once

#include "abi.h"
#include "paged.h"

extern "C" {

void shoal_linear(int64_t dtype, int64_t out_dtype, const void* x, int64_t x_batch, int64_t x_row, const void* w,
                  int64_t w_format, void* out, int64_t out_batch, int64_t out_row, int64_t batch, int64_t m, int64_t n,
                  int64_t k, int64_t threads);
void shoal_experts_mlp(int64_t dtype, const void* x, int64_t x_row, const int64_t* rows_of_x, const int64_t* num_tokens,
                       int64_t experts, const void* gate_up, int64_t gate_up_format, const void* down,
                       int64_t down_format, void* hidden, void* out, const int64_t* rows_of_out, int64_t h,
                       int64_t intermediate, int64_t threads);
void shoal_combine_topk(int64_t dtype, const void* y, int64_t y_row, const int64_t* row_of, const float* weights,
                        const void* shared, void* out, int64_t tokens, int64_t top_k, int64_t h, int64_t threads);
void shoal_permute_by_expert(const int64_t* topk_idx, int64_t tokens, int64_t top_k, const int64_t* slot_of,
                       int64_t num_slots, int64_t* counts, int64_t* row_of, int64_t* token_of);
void shoal_rms_norm(int64_t dtype, const void* x, int64_t stride, int64_t rows, int64_t n, const float* weight,
                    float eps, void* out, int64_t num_threads);
void shoal_add_rms_norm(int64_t x_dtype, int64_t dtype, const void* x, int64_t stride, const void* residual,
                        int64_t rows, int64_t n, const float* weight, float eps, void* normed, void* new_residual,
                        int64_t num_threads);
void shoal_apply_rope(int64_t dtype, const void* x, int64_t token_stride, int64_t head_stride, int64_t num_tokens,
                      int64_t num_heads, int64_t dim, const float* table, int64_t table_rows, const int64_t* positions,
                      int64_t interleaved, void* out, int64_t out_token_stride, int64_t out_head_stride,
                      int64_t num_threads, int64_t* status);
void shoal_write_latents(int64_t dtype, const void* kv, int64_t stride, int64_t num_tokens, int64_t latent_dim,
                         int64_t rope_dim, const float* weight, float eps, const float* table, int64_t table_rows,
                         const int64_t* positions, int64_t interleaved, const shoal::KVCacheArgs* kv_cache,
                         const int64_t* slots, int64_t num_threads, int64_t* status);
void shoal_write_index_keys(int64_t dtype, const void* k, int64_t stride, int64_t num_tokens, int64_t dim,
                            int64_t rope_dim, const float* weight, const float* bias, float eps, const float* table,
                            int64_t table_rows, const int64_t* positions, int64_t interleaved,
                            const shoal::IndexKeys* keys, const int64_t* slots, int64_t num_threads, int64_t* status);
void shoal_route(const float* logits, int64_t num_tokens, int64_t num_experts, const float* bias, int64_t n_group,
                 int64_t topk_group, int64_t top_k, int64_t norm_topk_prob, float routed_scaling_factor,
                 int64_t* topk_idx, float* topk_weights, int64_t num_threads);
void shoal_mla_attention(int64_t dtype, const void* q_latent, int64_t latent_token_stride, int64_t latent_head_stride,
                         const void* q_rope, int64_t rope_token_stride, int64_t rope_head_stride,
                         const shoal::PagedArgs* paged, int64_t num_heads, int64_t latent_dim, int64_t rope_dim,
                         float scale, const int32_t* selected, int64_t topk, void* out, int64_t num_threads,
                         int64_t* status);
void shoal_mha_attention(int64_t dtype, const void* q, int64_t token_stride, int64_t head_stride,
                         const shoal::PagedArgs* paged, const void* w_uk, const void* w_uv, int64_t num_heads,
                         int64_t latent_dim, int64_t nope_dim, int64_t rope_dim, int64_t v_dim, float scale, void* out,
                         int64_t num_threads, int64_t* status);
void shoal_index_topk(int64_t dtype, const void* q, int64_t token_stride, int64_t head_stride, const float* weights,
                      int64_t num_tokens, int64_t num_heads, int64_t dim, const shoal::LayoutArgs* layout,
                      const shoal::IndexKeys* keys, int64_t topk, int32_t* out, int64_t num_threads, int64_t* status);

}  // extern "C"
