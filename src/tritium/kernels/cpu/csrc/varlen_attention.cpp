// varlen_attention: softmax(q k^T) v inside each sequence of a packed batch, every token seeing every other.
//
// A work item is (sequence, kv head, a run of query tokens); it walks the sequence's keys in tiles of 64, as
// attention.cpp does, and with the same arithmetic (attention_tile.h). Tiles start at multiples of 64 of the place in the
// sequence, so what is done to a row depends on its sequence alone: bits do not depend on the batch or on threads.
// bf16 on a CPU with AMX goes by varlen_amx.h, of which the same holds.
//
// Memory. k and v are read where the projections left them, by one stride; v lies at a constant distance from k.
#include <algorithm>

#include "attention_tile.h"
#include "varlen_amx.h"

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
constexpr int64_t kItemRows = 256;

template <class T> class Sequences {
 public:
  explicit Sequences(const VarlenAttentionArgs& args)
      : a(args), group_(a.num_heads / a.num_kv_heads), tokens_per_item_(std::max<int64_t>(1, kItemRows / group_)) {}

  int64_t num_items() const { return first(a.batch_counts[0]) * a.num_kv_heads; }

  // configured: what the thread's AMX tiles are set up for, 0 when they are not.
  void run(int64_t item, Scratch& memory, int64_t& configured) const {
    const int64_t kv_head = item % a.num_kv_heads, index = item / a.num_kv_heads;
    int64_t s = 0;
    for (int64_t count = a.batch_counts[0]; count > 1;) {  // the last s with first(s) <= index
      const int64_t half = count / 2;
      if (first(s + half) <= index) s += half, count -= half; else count = half;
    }
    const int64_t length = a.cu_seqlens_q[s + 1] - a.cu_seqlens_q[s];
    const int64_t begin = (index - first(s)) * tokens_per_item_;
    if (begin >= length) return;
    const int64_t num_tokens = std::min(tokens_per_item_, length - begin);
    if (!attend_on_amx(s, kv_head, begin, num_tokens, length, memory, configured))
      attend(s, kv_head, begin, num_tokens, length, memory);
  }

 private:
  // Runs of query tokens are numbered so that sequence s starts at first(s); some numbers in between stand for nothing.
  int64_t first(int64_t s) const { return a.cu_seqlens_q[s] / tokens_per_item_ + s; }

  // Rows are numbered by token, then by query head of the kv head's group. `token`: of the batch.
  int64_t element(int64_t token, int64_t kv_head, int64_t row, int64_t stride_token, int64_t stride_head) const {
    return (token + row / group_) * stride_token + (kv_head * group_ + row % group_) * stride_head;
  }
  const T* query(int64_t token, int64_t kv_head, int64_t row) const {
    return static_cast<const T*>(a.q) + element(token, kv_head, row, a.q_stride_token, a.q_stride_head);
  }
  T* out(int64_t token, int64_t kv_head, int64_t row) const {
    return static_cast<T*>(a.out) + element(token, kv_head, row, a.out_stride_token, a.out_stride_head);
  }

  // False where there is no AMX for it, and nothing done.
  bool attend_on_amx([[maybe_unused]] int64_t s, [[maybe_unused]] int64_t kv_head, [[maybe_unused]] int64_t begin,
                     [[maybe_unused]] int64_t num_tokens, [[maybe_unused]] int64_t length, [[maybe_unused]] Scratch& memory,
                     [[maybe_unused]] int64_t& configured) const {
#if defined(__AMX_BF16__) && defined(__linux__)
    if constexpr (std::is_same<T, bf16>::value)
      if (amx_is_granted()) {
        const int64_t start = a.cu_seqlens_q[s], num_rows = num_tokens * group_;
        const int64_t first = start * a.k_stride_token + kv_head * a.k_stride_head;
        AmxSequence sequence(a.head_size, length, memory);
        sequence.load(static_cast<const T*>(a.k) + first, static_cast<const T*>(a.v) + first, a.k_stride_token);
        for (int64_t row = 0; row < num_rows; row += kGroup)
          sequence.attend(
              std::min(kGroup, num_rows - row), [&](int64_t r) { return query(start + begin, kv_head, row + r); },
              [&](int64_t r) { return out(start + begin, kv_head, row + r); }, a.scale, a.softcap, configured);
        return true;
      }
#endif
    return false;
  }

  void attend(int64_t s, int64_t kv_head, int64_t begin, int64_t num_tokens, int64_t length, Scratch& memory) const {
    const int64_t start = a.cu_seqlens_q[s], num_rows = num_tokens * group_;
    const T* keys = static_cast<const T*>(a.k) + start * a.k_stride_token + kv_head * a.k_stride_head;
    const int64_t value_offset = static_cast<const T*>(a.v) - static_cast<const T*>(a.k);
    Tile<T> tile({a.head_size, value_offset, 1, num_rows, std::max(kItemRows, group_)}, memory);
    for (int64_t r = 0; r < num_rows; ++r) tile.set_query(r, query(start + begin, kv_head, r));
    const auto find_keys = [&](int64_t base) {
      for (int64_t key = base; key < std::min(base + kTile, length); ++key)
        tile.set_keys(key - base, 1, keys + key * a.k_stride_token);
    };
    find_keys(0);
    for (int64_t base = 0; base < length; base += kTile) {
      const int end = static_cast<int>(std::min(length - base, int64_t{kTile}));
      tile.next();
      if (base + kTile < length) find_keys(base + kTile);
      tile.load(0, end);
      const auto keys_of = [end](int64_t) { return Range{0, end}; };
      tile.attend(0, num_rows, keys_of, [](int64_t) { return Bias{0.0f, 0}; }, a.scale, a.softcap);
    }
    for (int64_t r = 0; r < num_rows; ++r) tile.finish(r, out(start + begin, kv_head, r));
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
    int64_t configured = 0;
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t i = 0; i < num_items; ++i) batch.run(i, memory, configured);
#if defined(__AMX_BF16__) && defined(__linux__)
    if (configured != 0) _tile_release();
#endif
  }
}

}  // namespace

TRITIUM_EXPORT(varlen_attention, VarlenAttentionArgs)
