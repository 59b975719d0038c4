// paged_attention: softmax(q k^T) v over a paged KV cache; one algorithm for prefill, chunks of it, and decode.
//
// A work item is (sequence, kv head, a run of query tokens); its rows are those tokens x the query heads that share the kv
// head, token-major. It walks the keys in tiles of 64 that start at multiples of 64 of the absolute position:
//   K of the tile is turned once into [H, 64], so that lanes are keys; scores = q k^T for up to 6 rows at a time;
//   softmax runs online, per row (running maximum and sum); V is added with lanes along H.
//
// Numbers. What is done to a row depends on its position, the window and the keys alone: over H in order for a score,
// over the tiles in order and over the keys of a tile in order for the output. Rows computed together share loads, never
// sums; a tile or key that a row may not see is left out, not multiplied by zero. So bits do not depend on chunking, on
// the number of rows, on the block size or on threads. With AVX512-BF16, bf16 scores are summed by its pair products.
//
// Memory. Keys at or past an item's last position and keys before its first row's window are never read: their slots
// may hold NaN, and their block table entries anything.
#include "attention_tile.h"

namespace {
using namespace tritium;

struct PagedAttentionArgs {
  const void *q, *cache;  // [T, N, H] with strides; [num_blocks, 2, K, block_size, H], dense behind dimension 0
  void* out;              // [T, N, H] with strides; rows past num_tokens stay as they are
  const int32_t *block_table, *cu_seqlens_q, *context_lens, *batch_counts;
  int64_t q_stride_token, q_stride_head, out_stride_token, out_stride_head, stride_block, table_stride;
  int64_t num_heads, num_kv_heads, head_size, block_size;
  int32_t window;
  float scale, softcap;
};

constexpr int64_t kItemRows = 64;  // rows an item aims at: enough to pay for the tile's transposition, small enough for L2

template <class T> struct Item {
  const PagedAttentionArgs& a;
  int64_t group, tokens_per_item;  // query heads per kv head; query tokens in a full item

  explicit Item(const PagedAttentionArgs& args)
      : a(args), group(a.num_heads / a.num_kv_heads), tokens_per_item(std::max<int64_t>(1, kItemRows / group)) {}

  // Items are numbered so that sequence s starts at first(s); some numbers in between stand for nothing.
  int64_t first(int64_t s) const { return a.cu_seqlens_q[s] / tokens_per_item + s; }

  void run(int64_t index, int64_t num_sequences, Scratch& memory) const {
    const int64_t kv_head = index % a.num_kv_heads;
    index /= a.num_kv_heads;
    int64_t s = 0;
    for (int64_t count = num_sequences; count > 1;) {  // the last s with first(s) <= index
      const int64_t half = count / 2;
      if (first(s + half) <= index) s += half, count -= half; else count = half;
    }
    const int64_t query_len = a.cu_seqlens_q[s + 1] - a.cu_seqlens_q[s];
    const int64_t begin = (index - first(s)) * tokens_per_item;
    if (begin < query_len) run(s, kv_head, begin, std::min(tokens_per_item, query_len - begin), query_len, memory);
  }

  void run(int64_t s, int64_t kv_head, int64_t begin, int64_t num_tokens, int64_t query_len, Scratch& memory) const {
    const int64_t token = a.cu_seqlens_q[s] + begin, position = a.context_lens[s] - query_len + begin;
    const int64_t H = a.head_size, num_rows = num_tokens * group;
    Tile<T> tile(H, std::max(kItemRows, group), memory);
    const T* q = static_cast<const T*>(a.q) + token * a.q_stride_token + kv_head * group * a.q_stride_head;
    for (int64_t r = 0; r < num_rows; ++r)
      tile.set_query(r, q + r / group * a.q_stride_token + r % group * a.q_stride_head);

    const int64_t key_begin = a.window > 0 ? std::max<int64_t>(0, position - a.window + 1) : 0;
    const int64_t key_end = position + num_tokens;
    const int32_t* table = a.block_table + s * a.table_stride;
    const int64_t plane = a.block_size * H, v_offset = a.num_kv_heads * plane;
    const T* cache = static_cast<const T*>(a.cache) + kv_head * plane;
    for (int64_t base = key_begin / kTile * kTile; base < key_end; base += kTile) {
      const int64_t low = std::max(base, key_begin), high = std::min(base + kTile, key_end);
      for (int64_t key = low; key < high; ++key) {
        const T* k = cache + table[key / a.block_size] * a.stride_block + key % a.block_size * H;
        tile.set_key(key - base, k, k + v_offset);
      }
      tile.load(low - base, high - base, num_rows);
      // Rows that see a key of this tile: those at or after its first key and with a window that reaches it.
      const int64_t row_begin = std::max<int64_t>(0, base - position) * group;
      int64_t row_end = num_rows;
      if (a.window > 0) row_end = std::min(num_rows, (base + kTile - 1 + a.window - position) * group);
      tile.attend(row_begin, row_end, [&](int64_t row) {
        const int64_t p = position + row / group;
        const int64_t first_key = a.window > 0 ? std::max<int64_t>(0, p - a.window + 1) : 0;
        return Range{static_cast<int>(std::max(first_key, base) - base), static_cast<int>(std::min(p + 1, base + kTile) - base)};
      }, a.scale, a.softcap);
    }
    T* out = static_cast<T*>(a.out) + token * a.out_stride_token + kv_head * group * a.out_stride_head;
    for (int64_t r = 0; r < num_rows; ++r)
      tile.finish(r, out + r / group * a.out_stride_token + r % group * a.out_stride_head);
  }
};

template <class T> void paged_attention(const PagedAttentionArgs& a) {
  const int64_t num_sequences = a.batch_counts[0];
  if (num_sequences <= 0) return;
  const Item<T> item(a);
  const int64_t num_items = item.first(num_sequences) * a.num_kv_heads;
#pragma omp parallel
  {
    static thread_local Scratch memory;
    // From the last item to the first: prefill chunks stand behind decodes, and the longest should start first.
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t i = 0; i < num_items; ++i) item.run(num_items - 1 - i, num_sequences, memory);
  }
}

}  // namespace

TRITIUM_EXPORT(paged_attention, PagedAttentionArgs)
