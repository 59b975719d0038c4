// gather_rows (also the embedding lookup) and kv_store: copies of rows of bytes, whatever their dtype; kv_store_int8, which
// quantises them, and quantized_embedding, whose rows are. Strides are bytes.
#include "quantise_row.h"

namespace {
using namespace tritium;

struct GatherRowsArgs {
  const char* x;
  const int64_t* rows;
  char* out;  // dense
  int64_t num_rows, stride_row, row_bytes, num_source_rows;
};

struct QuantizedEmbeddingArgs {
  const int8_t* weight;
  const float* scales;  // one a row
  const int64_t* ids;
  void* out;  // dense
  int64_t num_tokens, stride_row, row_size, num_rows;
};

struct KVStoreArgs {
  const char *k, *v;
  char* cache;  // [num_blocks, 2, num_heads, block_size, head], dense but for stride_block
  const int64_t* slots;
  int64_t num_tokens, num_heads, block_size, head_bytes;
  int64_t k_stride_token, k_stride_head, v_stride_token, v_stride_head, stride_block;
};

constexpr int64_t kBytesPerWork = 4;  // a copy is bound by memory: count it as fp32 elements

void gather_rows(const GatherRowsArgs& a) {
  for_rows(a.num_rows, a.row_bytes / kBytesPerWork, [&](int64_t row) {
    const int64_t source = a.rows[row];
    char* to = a.out + row * a.row_bytes;
    const auto size = static_cast<size_t>(a.row_bytes);
    // A row that is not there (a position past a learned table) is NaN in every float type: it ends its own request.
    if (source < 0 || source >= a.num_source_rows) std::memset(to, 0xff, size);
    else std::memcpy(to, a.x + source * a.stride_row, size);
  });
}

// Bit for bit ops.quantized.quantized_embedding: one product in fp32 an element, then one rounding.
template <class T> void quantized_embedding(const QuantizedEmbeddingArgs& a) {
  for_rows(a.num_tokens, a.row_size, [&](int64_t token) {
    const int64_t row = a.ids[token];
    T* to = static_cast<T*>(a.out) + token * a.row_size;
    if (row < 0 || row >= a.num_rows) {  // NaN, as in gather_rows
      std::memset(to, 0xff, static_cast<size_t>(a.row_size) * sizeof(T));
      return;
    }
    const int8_t* from = a.weight + row * a.stride_row;
    const float scale = a.scales[row];
    for_vectors(a.row_size, [&](int64_t i, int64_t n) {
      i8x16 q = {};
      std::memcpy(&q, from + i, static_cast<size_t>(n));
      store(to + i, __builtin_convertvector(__builtin_convertvector(q, i32x16), f32x16) * scale, n);
    });
  });
}

void kv_store(const KVStoreArgs& a) {
  const int64_t plane = a.num_heads * a.block_size * a.head_bytes;  // bytes from a block's keys to its values
  for_rows(a.num_tokens, 2 * a.num_heads * a.head_bytes / kBytesPerWork, [&](int64_t token) {
    const int64_t slot = a.slots[token];
    if (slot < 0) return;  // a padded row
    char* to = a.cache + slot / a.block_size * a.stride_block + slot % a.block_size * a.head_bytes;
    const char *k = a.k + token * a.k_stride_token, *v = a.v + token * a.v_stride_token;
    for (int64_t head = 0; head < a.num_heads; ++head, to += a.block_size * a.head_bytes) {
      std::memcpy(to, k + head * a.k_stride_head, static_cast<size_t>(a.head_bytes));
      std::memcpy(to + plane, v + head * a.v_stride_head, static_cast<size_t>(a.head_bytes));
    }
  });
}

// The cache is int8: of a block and head all rows, then their scales. head_bytes counts those of k and v.
template <class T> void kv_store_int8(const KVStoreArgs& a) {
  const int64_t size = a.head_bytes / static_cast<int64_t>(sizeof(T)), part = a.block_size * (size + kScaleBytes);
  const int64_t plane = a.num_heads * part;
  for_rows(a.num_tokens, 4 * a.num_heads * size, [&](int64_t token) {
    const int64_t slot = a.slots[token];
    if (slot < 0) return;  // a padded row
    char* rows = a.cache + slot / a.block_size * a.stride_block;
    const char *k = a.k + token * a.k_stride_token, *v = a.v + token * a.v_stride_token;
    for (int64_t head = 0; head < a.num_heads; ++head, rows += part) {
      char *to = rows + slot % a.block_size * size, *scale = rows + a.block_size * size + slot % a.block_size * kScaleBytes;
      quantise_head(reinterpret_cast<const T*>(k + head * a.k_stride_head), size, to, scale);
      quantise_head(reinterpret_cast<const T*>(v + head * a.v_stride_head), size, to + plane, scale + plane);
    }
  });
}

}  // namespace

TRITIUM_EXPORT_ONE(gather_rows, GatherRowsArgs)
TRITIUM_EXPORT_ONE(kv_store, KVStoreArgs)
TRITIUM_EXPORT(quantized_embedding, QuantizedEmbeddingArgs)
TRITIUM_EXPORT(kv_store_int8, KVStoreArgs)
