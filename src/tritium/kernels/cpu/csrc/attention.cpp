// paged_attention: softmax(q k^T) v over a paged KV cache; one algorithm for prefill, chunks of it, and decode.
//
// A work item is (sequence, kv heads, a run of query tokens). Its rows under one kv head are those tokens x the query
// heads that share it. It walks the keys in tiles of 64 that start at multiples of 64 of the absolute position:
//   K of the tile is turned once into [H, 64], so that lanes are keys; scores = q k^T for up to 6 rows at a time;
//   softmax runs online, per row (running maximum and sum); V is added with lanes along H.
//
// Numbers. What is done to a row depends on its position, the window and the keys alone: a score is summed over H in
// order, the output over the tiles in order and over the keys of a tile in order. Rows computed together share loads,
// never sums; a key that a row may not see is left out, not multiplied by zero. So bits do not depend on chunking, on
// the number of rows, on the block size or on threads. With AVX512-BF16, bf16 scores are summed by its pair products; with
// AMX, bf16 goes by attention_amx.h, of which the same holds. A
// cache in int8 gives keys as its integers, and each score is then multiplied by its key's scale; values are multiplied by
// theirs, in fp32, before they are added.
//
// Memory. Keys at or past an item's last position and keys before its first row's window are never used: their slots
// may hold NaN, and their block table entries anything. (On AMX slots beside a seen key in its block are read.)
#include <omp.h>

#include "attention_amx.h"

namespace {
using namespace tritium;

struct PagedAttentionArgs {
  const void *q, *cache;  // [T, N, H] with strides; [num_blocks, 2, K, block_size, H], dense behind dimension 0, in the
                          // dtype of q, or in int8: of a block and head all rows, then their scales
  void* out;              // [T, N, H] with strides; rows past num_tokens stay as they are
  const int32_t *block_table, *cu_seqlens_q, *context_lens, *batch_counts;
  const float* alibi_slopes;  // one for each query head; null: none
  int64_t q_stride_token, q_stride_head, out_stride_token, out_stride_head, stride_block, table_stride;
  int64_t num_heads, num_kv_heads, head_size, block_size;
  int64_t item_rows;  // rows an item aims at: enough to pay for transposing a tile, few enough for L2; changes no bit
  int32_t window, is_int8;
  float scale, softcap;
};

template <class T, class C, class Tiles> class Batch {  // C: what the cache holds
 public:
  explicit Batch(const PagedAttentionArgs& args)
      : a(args), group_(a.num_heads / a.num_kv_heads), tokens_per_item_(std::max<int64_t>(1, args.item_rows / group_)) {
    // Neighbouring kv heads lie side by side in a block: an item that takes several reads long runs, at which the
    // hardware's prefetching is good. As many as leave each thread some items to choose from.
    const int64_t wanted = 4 * static_cast<int64_t>(omp_get_max_threads());
    const int64_t num_heads = num_tiles() * a.num_kv_heads;
    while (heads_per_item_ < a.num_kv_heads && num_heads / (heads_per_item_ + 1) >= wanted) ++heads_per_item_;
    while (a.num_kv_heads % heads_per_item_ != 0) --heads_per_item_;
  }

  int64_t num_items() const { return num_tiles() * (a.num_kv_heads / heads_per_item_); }

  void run(int64_t item, Scratch& memory) const {
    const int64_t head_parts = a.num_kv_heads / heads_per_item_, head = item % head_parts * heads_per_item_;
    const int64_t index = item / head_parts;
    int64_t s = 0;
    for (int64_t count = a.batch_counts[0]; count > 1;) {  // the last s with first(s) <= index
      const int64_t half = count / 2;
      if (first(s + half) <= index) s += half, count -= half; else count = half;
    }
    const int64_t query_len = a.cu_seqlens_q[s + 1] - a.cu_seqlens_q[s];
    const int64_t begin = (index - first(s)) * tokens_per_item_;
    if (begin >= query_len) return;
    const int64_t num_tokens = std::min(tokens_per_item_, query_len - begin);
    const int64_t together = num_tokens * group_ * heads_per_item_ <= std::max(a.item_rows, group_) ? heads_per_item_ : 1;
    for (int64_t h = 0; h < heads_per_item_; h += together)
      attend(s, head + h, together, begin, num_tokens, query_len, memory);
  }

 private:
  // Query tiles are numbered so that sequence s starts at first(s); some numbers in between stand for nothing.
  int64_t first(int64_t s) const { return a.cu_seqlens_q[s] / tokens_per_item_ + s; }
  int64_t num_tiles() const { return first(a.batch_counts[0]); }

  void attend(int64_t s, int64_t kv_head, int64_t num_kv_heads, int64_t begin, int64_t num_tokens, int64_t query_len,
              Scratch& memory) const {
    const int64_t token = a.cu_seqlens_q[s] + begin, position = a.context_lens[s] - query_len + begin;
    const int64_t H = a.head_size, rows_per_head = num_tokens * group_, num_rows = rows_per_head * num_kv_heads;
    const int64_t scale_bytes = std::is_same<C, int8_t>::value ? sizeof(float) : 0, plane = a.block_size * (H + scale_bytes);
    Tiles tile({H, a.num_kv_heads * plane, a.block_size, rows_per_head, std::max(a.item_rows, group_)}, memory);
    // Rows are numbered by kv head, then token, then query head of its group.
    const auto element = [&](int64_t row, int64_t stride_token, int64_t stride_head) {
      const int64_t h = row / rows_per_head, t = row % rows_per_head / group_, g = row % group_;
      return (token + t) * stride_token + ((kv_head + h) * group_ + g) * stride_head;
    };
    for (int64_t r = 0; r < num_rows; ++r)
      tile.set_query(r, static_cast<const T*>(a.q) + element(r, a.q_stride_token, a.q_stride_head));

    const int64_t key_begin = a.window > 0 ? std::max<int64_t>(0, position - a.window + 1) : 0;
    const int64_t key_end = position + num_tokens;
    const int32_t* table = a.block_table + s * a.table_stride;
    const C* cache = static_cast<const C*>(a.cache) + kv_head * plane;
    // Addresses of the keys of the tile at `base`, block by block: a division costs as much as a key's arithmetic.
    const auto find_keys = [&](int64_t base, int64_t h) {
      const int64_t end = std::min(base + kTile, key_end);
      for (int64_t key = std::max(base, key_begin), count; key < end; key += count) {
        const int64_t block = key / a.block_size, offset = key - block * a.block_size;
        count = std::min(a.block_size - offset, end - key);
        const C* rows = cache + table[block] * a.stride_block + h * plane;
        tile.set_keys(key - base, count, rows + offset * H, rows + a.block_size * H + offset * scale_bytes);
      }
    };
    const int64_t first_base = key_begin / kTile * kTile;
    find_keys(first_base, 0);
    for (int64_t base = first_base; base < key_end; base += kTile) {
      const int64_t low = std::max(base, key_begin), high = std::min(base + kTile, key_end);
      // Rows that see a key of this tile: those at or after its first key and with a window that reaches it.
      const int64_t row_begin = std::max<int64_t>(0, base - position) * group_;
      int64_t row_end = rows_per_head;
      if (a.window > 0) row_end = std::min(row_end, (base + kTile - 1 + a.window - position) * group_);
      const auto keys_of = [&](int64_t row) {
        const int64_t p = position + row % rows_per_head / group_, window_begin = a.window > 0 ? p - a.window + 1 : 0;
        return Range{static_cast<int>(std::max(window_begin - base, int64_t{0})),
                     static_cast<int>(std::min(p + 1 - base, int64_t{kTile}))};
      };
      const auto bias_of = [&](int64_t row) {
        if (a.alibi_slopes == nullptr) return Bias{0.0f, 0};
        const int64_t head = (kv_head + row / rows_per_head) * group_ + row % group_;
        return Bias{a.alibi_slopes[head], static_cast<int32_t>(base - position - row % rows_per_head / group_)};
      };
      for (int64_t h = 0; h < num_kv_heads; ++h) {
        tile.next();
        if (h + 1 < num_kv_heads) find_keys(base, h + 1);
        else if (base + kTile < key_end) find_keys(base + kTile, 0);
        tile.load(low - base, high - base);
        tile.attend(h * rows_per_head + row_begin, h * rows_per_head + row_end, keys_of, bias_of, a.scale, a.softcap);
      }
    }
    for (int64_t r = 0; r < num_rows; ++r)
      tile.finish(r, static_cast<T*>(a.out) + element(r, a.out_stride_token, a.out_stride_head));
  }

  const PagedAttentionArgs& a;
  const int64_t group_, tokens_per_item_;  // query heads per kv head; query tokens in a full item
  int64_t heads_per_item_ = 1;
};

// Multiply-adds of a batch. Below kSerialWork, about 50 us, one thread is faster than a parallel region is safe: its
// barrier costs microseconds, but milliseconds where something else runs on the machine.
int64_t work(const PagedAttentionArgs& a) {
  int64_t keys = 0;
  for (int64_t s = 0; s < a.batch_counts[0]; ++s) {
    const int64_t seen = a.window > 0 ? std::min(a.context_lens[s], a.window) : a.context_lens[s];
    keys += seen * (a.cu_seqlens_q[s + 1] - a.cu_seqlens_q[s]);
  }
  return keys * a.num_heads * a.head_size * 2;
}
constexpr int64_t kSerialWork = 1 << 20;

template <class T, class C, class Tiles> void attend(const PagedAttentionArgs& a) {
  const Batch<T, C, Tiles> batch(a);
  const int64_t num_items = batch.num_items();
#pragma omp parallel if (work(a) > kSerialWork)
  {
    static thread_local Scratch memory;
    // From the last item to the first: prefill chunks stand behind decodes, and the longest should start first.
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t i = num_items - 1; i >= 0; --i) batch.run(i, memory);
  }
}

template <class T, class C> void attend(const PagedAttentionArgs& a) {
#if defined(TRITIUM_AMX_ATTENTION)
  if constexpr (std::is_same<T, bf16>::value)
    if (amx_is_granted()) return attend<T, C, AmxTile<C>>(a);
#endif
  attend<T, C, Tile<T, C>>(a);
}

template <class T> void paged_attention(const PagedAttentionArgs& a) {
  if (a.batch_counts[0] <= 0) return;
  a.is_int8 ? attend<T, int8_t>(a) : attend<T, T>(a);
}

}  // namespace

TRITIUM_EXPORT(paged_attention, PagedAttentionArgs)
