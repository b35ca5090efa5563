// Linear layers, experts and the weighted sum of their outputs. gemm.h fixes the order of operations; this file only
// distributes elements over threads.
#include "fp8.h"
#include "ops.h"

#include <algorithm>
#include <vector>

namespace shoal {
namespace {

constexpr int64_t kRowBlock = 64;
constexpr int64_t kFp8RowBlock = 256;  // rows per dequantisation of a panel

// A packed matrix [n, k] for GEMMs in T: panels of T, or of e4m3 with scales.
template <typename T>
struct Matrix {
  const char* data;
  bool is_fp8;
  int64_t n, k;

  int64_t panel_bytes() const { return is_fp8 ? fp8_panel_bytes<T>(k) : panel_size<T>(k) * int64_t(sizeof(T)); }
  const char* panel(int64_t p) const { return data + p * panel_bytes(); }
  // Matrix i of several contiguous ones.
  Matrix at(int64_t i) const { return {data + i * num_panels(n) * panel_bytes(), is_fp8, n, k}; }
  int64_t row_block() const { return is_fp8 ? kFp8RowBlock : kRowBlock; }
};

template <typename T>
Matrix<T> matrix(const void* data, int64_t format, int64_t n, int64_t k) {
  return {static_cast<const char*>(data), format == kFp8, n, k};
}

// Panels per task: a multiple of the register tile that `rows` rows use.
int64_t panels_per_task(int64_t rows) { return rows > kMaxRows ? 6 : 2 * max_panels(int(rows)); }

// Number of consecutive tasks that a thread takes at a time: one run per thread where several passes prefetch the panels
// after their own, so that these are the thread's next ones.
int64_t run_length(int64_t rows, int64_t num_tasks, int64_t threads) {
  const bool ahead = rows > kMaxRows && rows <= kMaxRows * kMostPassesAhead;
  return ahead ? std::max<int64_t>(1, (num_tasks + threads - 1) / threads) : 1;
}

// A thread's copy of a block of input rows, bf16 in swapped pairs; contiguous fp32 rows are read in place.
template <typename T>
struct RowBlock {
  Buffer<T>& copy;
  int64_t loaded = -1;
  const T* data = nullptr;
  int64_t stride = 0;

  // Rows 0, 1, .. of `rows`, `ld` apart, or those listed in `which`. `id` names the block within this GEMM, so that
  // consecutive tasks on one block copy it once.
  void load(int64_t id, const T* rows, int64_t ld, int64_t count, int64_t k, const int64_t* which = nullptr) {
    if (id == loaded) return;
    loaded = id;
    if (std::is_same_v<T, float> && which == nullptr) {
      data = rows;
      stride = ld;
      return;
    }
    stride = padded_terms<T>(k);
    T* copies = copy.reserve(count * stride);
    for (int64_t r = 0; r < count; ++r) copy_terms(rows + (which == nullptr ? r : which[r]) * ld, k, copies + r * stride);
    data = copies;
  }
};

// Scratch memory of a thread's GEMMs, kept from one to the next.
template <typename T>
struct GemmMemory {
  Buffer<T> rows;
  Buffer<float> tile, second_tile;

  static GemmMemory& of_thread() {
    static thread_local GemmMemory memory;
    return memory;
  }
};

// Dequantises parts of the panels into the cache, one after another along k.
template <typename T>
void gemm_tile_fp8(const RowBlock<T>& a, int64_t rows, const Matrix<T>& w, int64_t first_panel, int64_t count, float* tile) {
  const int64_t part = rows <= kMaxRows ? kScaleTerms : 4 * kScaleTerms, stride = panel_size<T>(part);
  static thread_local Buffer<T> buffer;
  T* panels = buffer.reserve(count * stride);
  for (int64_t begin = 0; begin < w.k; begin += part) {
    const int64_t end = std::min(w.k, begin + part);
    // The next part of these panels, or the first part of the next panels.
    const int64_t ahead = end < w.k ? part * kPanel : count * w.panel_bytes() - begin * kPanel;
    for (int64_t p = 0; p < count; ++p)
      dequantize_panel(reinterpret_cast<const uint8_t*>(w.panel(first_panel + p)), w.k, begin, end, ahead,
                       panels + p * stride);
    gemm_panels<T>(a.data + begin, a.stride, rows, {panels, count, stride}, end - begin, tile, count * kPanel, begin > 0);
  }
}

// One output tile: rows of an input block times `count` panels.
template <typename T>
const float* gemm_tile(const RowBlock<T>& a, int64_t rows, const Matrix<T>& w, int64_t first_panel, int64_t count,
                      Buffer<float>& memory) {
  float* tile = memory.reserve(rows * count * kPanel);
  if (w.is_fp8) {
    gemm_tile_fp8(a, rows, w, first_panel, count, tile);
  } else {
    const T* panels = reinterpret_cast<const T*>(w.panel(first_panel));
    gemm_panels<T>(a.data, a.stride, rows, {panels, count, panel_size<T>(w.k)}, w.k, tile, count * kPanel, false,
                   Source::kMemory);
  }
  return tile;
}

template <typename Out>
void store_row(const float* row, int64_t columns, Out* out) {
  for (int64_t j = 0; j < columns; ++j) out[j] = from_float<Out>(row[j]);
}

template <typename T>
void pack_weight(const T* w, int64_t batch_stride, int64_t stride, T* out, int64_t batch, int64_t n, int64_t k,
                 int threads) {
  const int64_t panels = num_panels(n);
#pragma omp parallel for num_threads(threads)
  for (int64_t i = 0; i < batch * panels; ++i) {
    const int64_t first = i % panels * kPanel;
    pack_rows(w + i / panels * batch_stride + first * stride, stride, std::min(kPanel, n - first), k,
              out + i * panel_size<T>(k));
  }
}

// out[b][i][j] = x[b][i] . w[b][j]; strides in elements, the last dimensions contiguous.
template <typename T, typename Out>
void linear(const T* x, int64_t x_batch, int64_t x_row, const Matrix<T>& w, Out* out, int64_t out_batch,
            int64_t out_row, int64_t batch, int64_t m, int threads) {
  const int64_t n = w.n, block = w.row_block(), panels = num_panels(n), row_blocks = (m + block - 1) / block;
  const int64_t group = panels_per_task(m), groups = (panels + group - 1) / group;
  const int64_t num_tasks = batch * row_blocks * groups;
  const int64_t chunk = run_length(m, num_tasks, threads);
#pragma omp parallel num_threads(threads)
  {
    const FlushDenormals flush;
    GemmMemory<T>& memory = GemmMemory<T>::of_thread();
    RowBlock<T> a{memory.rows};
#pragma omp for schedule(dynamic, chunk)
    for (int64_t task = 0; task < num_tasks; ++task) {
      const int64_t b = task / groups / row_blocks, row = task / groups % row_blocks * block;
      const int64_t rows = std::min(block, m - row);
      const int64_t panel = task % groups * group, count = std::min(group, panels - panel);
      a.load(task / groups, x + b * x_batch + row * x_row, x_row, rows, w.k);
      const float* tile = gemm_tile(a, rows, w.at(b), panel, count, memory.tile);
      for (int64_t r = 0; r < rows; ++r)
        store_row(tile + r * count * kPanel, std::min(count * kPanel, n - panel * kPanel),
                  out + b * out_batch + (row + r) * out_row + panel * kPanel);
    }
  }
}

// silu(gate) * up in fp32, with silu(g) = g / (1 + e^-g), rounded once.
template <typename T>
T swiglu_one(T gate, T up) {
  const float g = to_float(gate);
  return from_float<T>(g / (1.0f + exp_fixed(-g)) * to_float(up));
}

template <typename T>
void swiglu(const T* gate_up, int64_t row_stride, T* out, int64_t rows, int64_t intermediate, int threads) {
#pragma omp parallel num_threads(threads)
  {
    const FlushDenormals flush;
#pragma omp for
    for (int64_t r = 0; r < rows; ++r) {
      const T* gate = gate_up + r * row_stride;
      for (int64_t j = 0; j < intermediate; ++j)
        out[r * intermediate + j] = swiglu_one(gate[j], gate[intermediate + j]);
    }
  }
}

// One tile of an expert's work: rows [row, row + rows) of the grouped input, output panels [panel, panel + count).
struct ExpertTask {
  int64_t expert, row, rows, panel, count;
};

// Expert-major, then row blocks, then panels: an expert's weights stay in cache while all its rows pass over them.
std::vector<ExpertTask> expert_tasks(const int64_t* num_tokens, int64_t experts, int64_t panels, int64_t block) {
  std::vector<ExpertTask> tasks;
  int64_t begin = 0;
  for (int64_t e = 0; e < experts; begin += num_tokens[e++]) {
    const int64_t end = begin + num_tokens[e], group = panels_per_task(num_tokens[e]);
    for (int64_t row = begin; row < end; row += block)
      for (int64_t panel = 0; panel < panels; panel += group)
        tasks.push_back({e, row, std::min(block, end - row), panel, std::min(group, panels - panel)});
  }
  return tasks;
}

// hidden = swiglu(x gate_up), out = hidden down, per expert; the same bits as linear, swiglu, linear. Input row r is row
// rows_of_x[r] of x, or row r without rows_of_x; its output is row rows_of_out[r] or r in the same way.
template <typename T>
void experts_mlp(const T* x, int64_t x_row, const int64_t* rows_of_x, const int64_t* num_tokens, int64_t experts,
                 const Matrix<T>& gate_up, const Matrix<T>& down, T* hidden, T* out, const int64_t* rows_of_out,
                 int threads) {
  const int64_t h = gate_up.k, intermediate = down.k;
  const auto first = expert_tasks(num_tokens, experts, num_panels(intermediate), gate_up.row_block());
  const auto second = expert_tasks(num_tokens, experts, num_panels(h), down.row_block());
  const int64_t most_rows = experts > 0 ? *std::max_element(num_tokens, num_tokens + experts) : 0;
#pragma omp parallel num_threads(threads)
  {
    const FlushDenormals flush;
    GemmMemory<T>& memory = GemmMemory<T>::of_thread();
    RowBlock<T> a{memory.rows};
#pragma omp for schedule(dynamic, run_length(most_rows, first.size(), threads))
    for (size_t i = 0; i < first.size(); ++i) {
      const ExpertTask t = first[i];
      const Matrix<T> w = gate_up.at(t.expert);
      const int64_t column = t.panel * kPanel, columns = std::min(t.count * kPanel, intermediate - column);
      // The up half starts at column `intermediate`, which may lie inside a panel.
      const int64_t up_panel = (intermediate + column) / kPanel, shift = (intermediate + column) % kPanel;
      const int64_t up_count = num_panels(shift + columns);
      rows_of_x == nullptr ? a.load(t.row, x + t.row * x_row, x_row, t.rows, h)
                           : a.load(t.row, x, x_row, t.rows, h, rows_of_x + t.row);
      const float* gate = gemm_tile(a, t.rows, w, t.panel, t.count, memory.tile);
      const float* up = gemm_tile(a, t.rows, w, up_panel, up_count, memory.second_tile);
      for (int64_t r = 0; r < t.rows; ++r) {
        const float* g = gate + r * t.count * kPanel;
        const float* u = up + r * up_count * kPanel + shift;
        T* row = hidden + (t.row + r) * intermediate + column;
        for (int64_t j = 0; j < columns; ++j) row[j] = swiglu_one(from_float<T>(g[j]), from_float<T>(u[j]));
      }
    }
    // The barrier at the end of the loop above completes `hidden`.
    RowBlock<T> b{memory.rows};
#pragma omp for schedule(dynamic, run_length(most_rows, second.size(), threads))
    for (size_t i = 0; i < second.size(); ++i) {
      const ExpertTask t = second[i];
      b.load(t.row, hidden + t.row * intermediate, intermediate, t.rows, intermediate);
      const float* tile = gemm_tile(b, t.rows, down.at(t.expert), t.panel, t.count, memory.tile);
      for (int64_t r = 0; r < t.rows; ++r)
        store_row(tile + r * t.count * kPanel, std::min(t.count * kPanel, h - t.panel * kPanel),
                  out + (rows_of_out == nullptr ? t.row + r : rows_of_out[t.row + r]) * h + t.panel * kPanel);
    }
  }
}

// out[t] = sum over slots k ascending of weights[t][k] * y[row_of[t][k]], then + shared[t] if there is one, each operation
// rounded to fp32, the result to T; row -1 adds nothing.
template <typename T>
void combine_topk(const T* y, int64_t y_row, const int64_t* row_of, const float* weights, const T* shared, T* out,
                  int64_t tokens, int64_t top_k, int64_t h, int threads) {
#pragma omp parallel num_threads(threads)
  {
    const FlushDenormals flush;
    float* acc = GemmMemory<T>::of_thread().tile.reserve(h);
#pragma omp for
    for (int64_t t = 0; t < tokens; ++t) {
      std::fill_n(acc, h, 0.0f);
      for (int64_t k = 0; k < top_k; ++k) {
        const int64_t row = row_of[t * top_k + k];
        if (row < 0) continue;
        const float weight = weights[t * top_k + k];
        for (int64_t j = 0; j < h; ++j) acc[j] = acc[j] + weight * to_float(y[row * y_row + j]);
      }
      if (shared != nullptr)
        for (int64_t j = 0; j < h; ++j) acc[j] = acc[j] + to_float(shared[t * h + j]);
      for (int64_t j = 0; j < h; ++j) out[t * h + j] = from_float<T>(acc[j]);
    }
  }
}

}  // namespace
}  // namespace shoal

using namespace shoal;

extern "C" {

void shoal_pack_weight(int64_t dtype, const void* w, int64_t batch_stride, int64_t stride, void* out, int64_t batch,
                       int64_t n, int64_t k, int64_t threads) {
  with_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    pack_weight((const T*)w, batch_stride, stride, (T*)out, batch, n, k, int(threads));
  });
}
SHOAL_EXPORT(shoal_pack_weight)

// out: panels as fp8.h says, of e4m3 values [n, k] and their scales [n, ceil(k/128)], both contiguous.
void shoal_pack_fp8(int64_t dtype, const void* values, const float* scales, void* out, int64_t n, int64_t k,
                    int64_t threads) {
  with_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    const int64_t blocks = (k + kScaleTerms - 1) / kScaleTerms;
#pragma omp parallel for num_threads(int(threads))
    for (int64_t p = 0; p < num_panels(n); ++p)
      pack_fp8<T>((const e4m3*)values + p * kPanel * k, k, scales + p * kPanel * blocks, std::min(kPanel, n - p * kPanel), k,
                  (uint8_t*)out + p * fp8_panel_bytes<T>(k));
  });
}
SHOAL_EXPORT(shoal_pack_fp8)

void shoal_linear(int64_t dtype, int64_t out_dtype, const void* x, int64_t x_batch, int64_t x_row, const void* w,
                  int64_t w_format, void* out, int64_t out_batch, int64_t out_row, int64_t batch, int64_t m, int64_t n,
                  int64_t k, int64_t threads) {
  with_dtype(dtype, [&](auto t) {
    with_dtype(out_dtype, [&](auto o) {
      using T = decltype(t);
      using Out = decltype(o);
      linear((const T*)x, x_batch, x_row, matrix<T>(w, w_format, n, k), (Out*)out, out_batch, out_row, batch, m,
             int(threads));
    });
  });
}
SHOAL_EXPORT(shoal_linear)

void shoal_swiglu(int64_t dtype, const void* gate_up, int64_t row_stride, void* out, int64_t rows, int64_t intermediate,
                  int64_t threads) {
  with_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    swiglu((const T*)gate_up, row_stride, (T*)out, rows, intermediate, int(threads));
  });
}
SHOAL_EXPORT(shoal_swiglu)

void shoal_experts_mlp(int64_t dtype, const void* x, int64_t x_row, const int64_t* rows_of_x, const int64_t* num_tokens,
                       int64_t experts, const void* gate_up, int64_t gate_up_format, const void* down,
                       int64_t down_format, void* hidden, void* out, const int64_t* rows_of_out, int64_t h,
                       int64_t intermediate, int64_t threads) {
  with_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    experts_mlp((const T*)x, x_row, rows_of_x, num_tokens, experts, matrix<T>(gate_up, gate_up_format, 2 * intermediate, h),
                matrix<T>(down, down_format, h, intermediate), (T*)hidden, (T*)out, rows_of_out, int(threads));
  });
}
SHOAL_EXPORT(shoal_experts_mlp)

void shoal_combine_topk(int64_t dtype, const void* y, int64_t y_row, const int64_t* row_of, const float* weights,
                        const void* shared, void* out, int64_t tokens, int64_t top_k, int64_t h, int64_t threads) {
  with_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    combine_topk((const T*)y, y_row, row_of, weights, (const T*)shared, (T*)out, tokens, top_k, h, int(threads));
  });
}
SHOAL_EXPORT(shoal_combine_topk)

}  // extern "C"
