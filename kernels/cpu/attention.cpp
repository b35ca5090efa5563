// Multi-head latent attention in the absorbed form over paged records; kernels/attention.py states the contract.
//
// Rows (token x head) are lanes in the scores and in the softmax, columns are lanes in the sum of the values, so that
// no sum crosses lanes and no row sees another:
//   S [key][row] = record (broadcast) * packed queries      O [row][column] += P (broadcast) * record
#include <algorithm>
#include <atomic>
#include <vector>

#include "attention.h"

namespace shoal {
namespace {

constexpr int64_t kBlockKeys = 64;  // part of the contract: where the online softmax rescales
constexpr int64_t kTileRows = 128;  // this and the rest only shape the work
constexpr int64_t kTileHeads = 64;
constexpr int64_t kStripPanels = 4;
constexpr int64_t kStrip = kStripPanels * kLanes;

template <typename T>
struct Attention {
  const T *q_latent, *q_rope;
  int64_t latent_token_stride, latent_head_stride, rope_token_stride, rope_head_stride;
  PagedRecords<T> paged;
  const int64_t* positions;
  int64_t num_heads, latent_dim, rope_dim;
  float scale;
  const int32_t* selected;  // [T, topk] or nullptr
  int64_t topk;
  T* out;  // [T, h, latent_dim]
};

// Neighbouring query tokens of a sequence, and some of their heads.
struct Tile {
  int64_t sequence, token, num_tokens, head, num_heads;
};

Vec exp_lanes(Vec x) {
  float lanes[kLanes];
  store_vec(lanes, x);
  for (int i = 0; i < kLanes; ++i) lanes[i] = exp_fixed(lanes[i]);
  return load_vec(lanes);
}

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Memory of one thread, reused by its tiles.
struct Scratch {
  std::vector<float> queries;  // packed panels of rows
  std::vector<float> keys;     // [key][key_width]: latent | rope | padding
  std::vector<float> output;   // [row][width]
  alignas(64) float scores[kBlockKeys * kTileRows];  // [key][row], then the weights
  alignas(64) float max[kTileRows], sum[kTileRows], rescale[kTileRows];
  alignas(64) int32_t context[kTileRows], limit[kTileRows];  // keys a row attends to: in all, in this block
};

template <typename T>
class TileAttention {
 public:
  TileAttention(const Attention<T>& args, const Tile& tile, Scratch& scratch)
      : a_(args),
        t_(tile),
        s_(scratch),
        rows_(tile.num_tokens * tile.num_heads),
        lanes_(round_up(rows_, kLanes)),
        key_dim_(args.latent_dim + args.rope_dim),
        width_(round_up(args.latent_dim, kStrip)),
        key_width_(std::max(key_dim_, width_)) {}

  Status run() {
    pack_queries();
    int64_t num_keys = 0;
    for (int64_t r = 0; r < lanes_; ++r) {
      s_.max[r] = -kInfinity;
      s_.sum[r] = 0.0f;
      s_.context[r] = r < rows_ ? int32_t(context_of(t_.token + r / t_.num_heads)) : 0;
      num_keys = std::max<int64_t>(num_keys, s_.context[r]);
    }
    s_.keys.resize(kBlockKeys * key_width_);
    s_.output.assign(rows_ * width_, 0.0f);
    for (int64_t begin = 0; begin < num_keys; begin += kBlockKeys) {
      const int64_t count = std::min(kBlockKeys, num_keys - begin);
      if (!gather_keys(begin, count, num_keys)) return kOutOfRange;
      dot_keys(s_.keys.data(), key_width_, round_up(count, kLanes), s_.queries.data(), lanes_ / kLanes, key_dim_, s_.scores);
      for (int64_t r = 0; r < lanes_; ++r) s_.limit[r] = int32_t(std::clamp<int64_t>(s_.context[r] - begin, 0, count));
      for (int64_t r = 0; r < lanes_; r += kLanes) softmax(r, count);
      add_values();
    }
    write();
    return kOk;
  }

 private:
  int64_t context_of(int64_t token) const {
    if (a_.selected == nullptr) return a_.positions[token] + 1;
    const int32_t* list = a_.selected + token * a_.topk;
    return std::find(list, list + a_.topk, -1) - list;
  }

  void pack_queries() {
    s_.queries.assign(lanes_ / kLanes * query_panel_size(key_dim_), 0.0f);
    for (int64_t r = 0; r < rows_; ++r) {
      const int64_t token = t_.token + r / t_.num_heads, head = t_.head + r % t_.num_heads;
      float* lane = s_.queries.data() + r / kLanes * query_panel_size(key_dim_) + r % kLanes;
      pack_query(a_.q_latent + token * a_.latent_token_stride + head * a_.latent_head_stride, a_.latent_dim, lane);
      pack_query(a_.q_rope + token * a_.rope_token_stride + head * a_.rope_head_stride, a_.rope_dim,
                 lane + query_panel_size(a_.latent_dim));
    }
  }

  const T* find_key(int64_t index) const {
    const int64_t position = a_.selected ? a_.selected[t_.token * a_.topk + index] : index;
    return a_.paged.find(t_.sequence, position);
  }

  bool gather_keys(int64_t begin, int64_t count, int64_t num_keys) {
    for (int64_t j = 0; j < count; ++j) {
      const T* record = find_key(begin + j);
      if (record == nullptr) return false;
      to_floats(record, key_dim_, s_.keys.data() + j * key_width_);
      if (const int64_t next = begin + j + kBlockKeys; next < num_keys) prefetch(find_key(next));
    }
    return true;
  }

  // Ask for a record of the next block while this one is computed.
  void prefetch(const T* record) const {
    if (record == nullptr) return;
    for (int64_t i = 0; i < key_dim_; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(record + i);
  }

  // Scores to weights for 16 rows; keys at or beyond a row's limit weigh exactly nothing.
  void softmax(int64_t row, int64_t count) {
    IntVec limit;
    std::memcpy(&limit, s_.limit + row, sizeof(limit));
    const Vec old_max = load_vec(s_.max + row);
    Vec max = old_max;
    for (int64_t j = 0; j < count; ++j) {
      float* scores = s_.scores + j * lanes_ + row;
      const Vec s = limit > int32_t(j) ? load_vec(scores) * a_.scale : splat(-kInfinity);
      max = s > max ? s : max;
      store_vec(scores, s);
    }
    const Vec base = max == -kInfinity ? Vec{} : max;
    const Vec rescale = exp_lanes(old_max - base);
    Vec sum = load_vec(s_.sum + row) * rescale;
    for (int64_t j = 0; j < count; ++j) {
      float* scores = s_.scores + j * lanes_ + row;
      const Vec p = exp_lanes(load_vec(scores) - base);
      sum += p;
      store_vec(scores, p);
    }
    store_vec(s_.max + row, max);
    store_vec(s_.sum + row, sum);
    store_vec(s_.rescale + row, rescale);
  }

  void add_values() {
    for (int64_t column = 0; column < width_; column += kStrip) {
      // neighbouring rows with the same limit go together
      for (int64_t begin = 0, end; begin < rows_; begin = end) {
        for (end = begin + 1; end < rows_ && s_.limit[end] == s_.limit[begin];) ++end;
        if (s_.limit[begin] > 0) add_rows(begin, end, s_.limit[begin], column);
      }
    }
  }

  void add_rows(int64_t begin, int64_t end, int64_t limit, int64_t column) {
    for (; begin + 6 <= end; begin += 6) add_block<6>(begin, limit, column);
    switch (end - begin) {
      case 5: return add_block<5>(begin, limit, column);
      case 4: return add_block<4>(begin, limit, column);
      case 3: return add_block<3>(begin, limit, column);
      case 2: return add_block<2>(begin, limit, column);
      case 1: return add_block<1>(begin, limit, column);
    }
  }

  template <int Rows>
  void add_block(int64_t row, int64_t limit, int64_t column) {
    Lanes acc[Rows][kStripPanels];
    float* output = s_.output.data() + row * width_ + column;
#pragma GCC unroll 6
    for (int r = 0; r < Rows; ++r) {
      const Lanes rescale = broadcast_lanes(s_.rescale[row + r]);
#pragma GCC unroll 4
      for (int p = 0; p < kStripPanels; ++p)
        acc[r][p] = fma_lanes(load_lanes(output + r * width_ + p * kLanes), rescale, broadcast_lanes(0.0f));
    }
    const float* key = s_.keys.data() + column;
    const float* weights = s_.scores + row;
    for (int64_t j = 0; j < limit; ++j, key += key_width_, weights += lanes_) {
      Lanes value[kStripPanels];
#pragma GCC unroll 4
      for (int p = 0; p < kStripPanels; ++p) value[p] = load_lanes(key + p * kLanes);
#pragma GCC unroll 6
      for (int r = 0; r < Rows; ++r) {
        const Lanes weight = broadcast_lanes(weights[r]);
#pragma GCC unroll 4
        for (int p = 0; p < kStripPanels; ++p) acc[r][p] = fma_lanes(weight, value[p], acc[r][p]);
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
      for (int p = 0; p < kStripPanels; ++p) store_lanes(output + r * width_ + p * kLanes, acc[r][p]);
  }

  void write() {
    for (int64_t r = 0; r < rows_; ++r) {
      const int64_t token = t_.token + r / t_.num_heads, head = t_.head + r % t_.num_heads;
      T* out = a_.out + (token * a_.num_heads + head) * a_.latent_dim;
      const float sum = s_.context[r] > 0 ? s_.sum[r] : 1.0f;
      for (int64_t c = 0; c < a_.latent_dim; ++c) out[c] = from_float<T>(s_.output[r * width_ + c] / sum);
    }
  }

  const Attention<T>& a_;
  const Tile& t_;
  Scratch& s_;
  const int64_t rows_, lanes_, key_dim_, width_, key_width_;
};

std::vector<Tile> make_tiles(const int32_t* cu_seqlens_q, int64_t num_sequences, int64_t num_heads, bool sparse) {
  std::vector<Tile> tiles;
  const int64_t heads = std::min(num_heads, kTileHeads);
  const int64_t tokens = sparse ? 1 : kTileRows / heads;
  for (int64_t b = 0; b < num_sequences; ++b)
    for (int64_t t = cu_seqlens_q[b]; t < cu_seqlens_q[b + 1]; t += tokens)
      for (int64_t h = 0; h < num_heads; h += heads)
        tiles.push_back({b, t, std::min(tokens, cu_seqlens_q[b + 1] - t), h, std::min(heads, num_heads - h)});
  return tiles;
}

template <typename T>
Status run_tiles(const Attention<T>& args, const std::vector<Tile>& tiles, int64_t num_threads) {
  std::atomic<int64_t> status{kOk};
#pragma omp parallel num_threads(int(num_threads))
  {
    const FlushDenormals flush;
    Scratch scratch;
#pragma omp for schedule(dynamic)
    for (int64_t i = int64_t(tiles.size()) - 1; i >= 0; --i) {  // the longest contexts first
      const Status result = TileAttention<T>(args, tiles[i], scratch).run();
      if (result != kOk) status = result;
    }
  }
  return Status(status.load());
}

}  // namespace
}  // namespace shoal

// Strides are in elements. Writes a shoal::Status.
extern "C" void shoal_mla_attention(int64_t dtype, const void* q_latent, int64_t latent_token_stride,
                                    int64_t latent_head_stride, const void* q_rope, int64_t rope_token_stride,
                                    int64_t rope_head_stride, const void* records, int64_t row_stride,
                                    int64_t num_slots, const int32_t* block_tables, int64_t max_blocks,
                                    int64_t block_size, const int32_t* cu_seqlens_q, int64_t num_sequences,
                                    const int64_t* positions, int64_t num_heads, int64_t latent_dim, int64_t rope_dim,
                                    float scale, const int32_t* selected, int64_t topk, void* out, int64_t num_threads,
                                    int64_t* status) {
  using namespace shoal;
  const std::vector<Tile> tiles = make_tiles(cu_seqlens_q, num_sequences, num_heads, selected != nullptr);
  const auto run = [&](auto element) {
    using T = decltype(element);
    const PagedRecords<T> paged{static_cast<const T*>(records), row_stride, num_slots, block_tables, max_blocks,
                                block_size};
    const Attention<T> args{static_cast<const T*>(q_latent),
                            static_cast<const T*>(q_rope),
                            latent_token_stride,
                            latent_head_stride,
                            rope_token_stride,
                            rope_head_stride,
                            paged,
                            positions,
                            num_heads,
                            latent_dim,
                            rope_dim,
                            scale,
                            selected,
                            topk,
                            static_cast<T*>(out)};
    *status = run_tiles(args, tiles, num_threads);
  };
  dtype == kBFloat16 ? run(bf16{}) : run(0.0f);
}
