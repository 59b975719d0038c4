// varlen_attention: softmax(q k^T) v inside each sequence of a packed batch, every token seeing every other.
//
// A work item is (sequence, kv head, a run of query tokens); it walks the sequence's keys in tiles of 64, as
// attention.cpp does, and with the same arithmetic (attention_tile.h). Tiles start at multiples of 64 of the place in the
// sequence, so what is done to a row depends on its sequence alone: bits do not depend on the batch or on threads.
//
// Memory. k and v are read where the projections left them, by one stride; v lies at a constant distance from k.
#include <algorithm>

#include "attention_tile.h"

namespace {
using namespace tritium;

struct VarlenAttentionArgs {
  const void *q, *k, *v;  // [T, N, H], [T, K, H] twice, with strides; k and v have equal ones
  void* out;              // [T, N, H] with strides; rows past num_tokens stay as they are
  const int32_t *cu_seqlens_q, *batch_counts;
  int64_t q_stride_token, q_stride_head, k_stride_token, k_stride_head, out_stride_token, out_stride_head;
  int64_t num_heads, num_kv_heads, head_size;
  float scale, softcap;
};

// Rows an item aims at: a tile of keys is turned once for all of them, and queries and outputs still fit in L2 (BERT-base,
// 32 sequences of 8 to 256 tokens).
constexpr int64_t kItemRows = 128;

template <class T> class Sequences {
 public:
  explicit Sequences(const VarlenAttentionArgs& args)
      : a(args), group_(a.num_heads / a.num_kv_heads), tokens_per_item_(std::max<int64_t>(1, kItemRows / group_)) {}

  int64_t num_items() const { return first(a.batch_counts[0]) * a.num_kv_heads; }

  void run(int64_t item, Scratch& memory) const {
    const int64_t kv_head = item % a.num_kv_heads, index = item / a.num_kv_heads;
    int64_t s = 0;
    for (int64_t count = a.batch_counts[0]; count > 1;) {  // the last s with first(s) <= index
      const int64_t half = count / 2;
      if (first(s + half) <= index) s += half, count -= half; else count = half;
    }
    const int64_t length = a.cu_seqlens_q[s + 1] - a.cu_seqlens_q[s];
    const int64_t begin = (index - first(s)) * tokens_per_item_;
    if (begin < length) attend(s, kv_head, begin, std::min(tokens_per_item_, length - begin), length, memory);
  }

 private:
  // Runs of query tokens are numbered so that sequence s starts at first(s); some numbers in between stand for nothing.
  int64_t first(int64_t s) const { return a.cu_seqlens_q[s] / tokens_per_item_ + s; }

  void attend(int64_t s, int64_t kv_head, int64_t begin, int64_t num_tokens, int64_t length, Scratch& memory) const {
    const int64_t start = a.cu_seqlens_q[s], num_rows = num_tokens * group_;
    const T* keys = static_cast<const T*>(a.k) + start * a.k_stride_token + kv_head * a.k_stride_head;
    Tile<T> tile(a.head_size, static_cast<const T*>(a.v) - static_cast<const T*>(a.k), std::max(kItemRows, group_), memory);
    const auto element = [&](int64_t row, int64_t stride_token, int64_t stride_head) {
      return (start + begin + row / group_) * stride_token + (kv_head * group_ + row % group_) * stride_head;
    };
    for (int64_t r = 0; r < num_rows; ++r)
      tile.set_query(r, static_cast<const T*>(a.q) + element(r, a.q_stride_token, a.q_stride_head));
    const auto find_keys = [&](int64_t base) {
      for (int64_t key = base; key < std::min(base + kTile, length); ++key)
        tile.set_keys(key - base, 1, keys + key * a.k_stride_token);
    };
    find_keys(0);
    for (int64_t base = 0; base < length; base += kTile) {
      const int end = static_cast<int>(std::min(length - base, int64_t{kTile}));
      tile.next();
      if (base + kTile < length) find_keys(base + kTile);
      tile.load(0, end, num_rows);
      const auto keys_of = [end](int64_t) { return Range{0, end}; };
      tile.attend(0, num_rows, keys_of, [](int64_t) { return Bias{0.0f, 0}; }, a.scale, a.softcap);
    }
    for (int64_t r = 0; r < num_rows; ++r)
      tile.finish(r, static_cast<T*>(a.out) + element(r, a.out_stride_token, a.out_stride_head));
  }

  const VarlenAttentionArgs& a;
  const int64_t group_, tokens_per_item_;  // query heads per kv head; query tokens in a full item
};

// Multiply-adds of a batch; below kSerialWork one thread is faster than a parallel region is safe (attention.cpp).
int64_t work(const VarlenAttentionArgs& a) {
  int64_t pairs = 0;
  for (int64_t s = 0; s < a.batch_counts[0]; ++s) {
    const int64_t length = a.cu_seqlens_q[s + 1] - a.cu_seqlens_q[s];
    pairs += length * length;
  }
  return pairs * a.num_heads * a.head_size * 2;
}
constexpr int64_t kSerialWork = 1 << 20;

template <class T> void varlen_attention(const VarlenAttentionArgs& a) {
  if (a.batch_counts[0] <= 0) return;
  const Sequences<T> batch(a);
  const int64_t num_items = batch.num_items();
#pragma omp parallel if (work(a) > kSerialWork)
  {
    static thread_local Scratch memory;
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t i = 0; i < num_items; ++i) batch.run(i, memory);
  }
}

}  // namespace

TRITIUM_EXPORT(varlen_attention, VarlenAttentionArgs)
