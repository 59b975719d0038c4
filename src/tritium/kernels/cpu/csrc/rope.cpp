// rope_cos_sin: the angles of a step, once; rope: rotates the first 2P dimensions of each head, copies the rest;
// rope_kv_store: rope of the queries, and of the keys into the KV cache, with the values beside them.
#include <cmath>

#include "quantise_row.h"
#include "softmax.h"

namespace {
using namespace tritium;

struct RopeCosSinArgs {
  const int64_t* positions;
  const float* inv_freq;
  float* out;  // [num_tokens, 2 * num_pairs], cosines then sines
  int64_t num_tokens, num_pairs;
  float attention_scaling;
};

struct RopeArgs {
  const void* x;
  const float* cos_sin;  // dense [num_tokens, 2 * num_pairs]
  void* out;             // dense
  int64_t num_tokens, num_heads, head_size, num_pairs, stride_token, stride_head;  // strides of x
  int32_t interleaved;
};

struct RopeKvStoreArgs {
  const void *q, *k, *v;
  const float* cos_sin;  // dense [num_tokens, 2 * num_pairs]
  void *out, *cache;     // out: like q, dense. cache: [num_blocks, 2, num_kv_heads, block_size, head], dense in a block,
                         // in the dtype of k, or in int8 with the scales of a block and head behind its rows
  const int64_t* slots;
  int64_t num_tokens, num_heads, num_kv_heads, head_size, num_pairs, block_size, stride_block;
  int64_t q_stride_token, q_stride_head, k_stride_token, k_stride_head, v_stride_token, v_stride_head;
  int32_t interleaved, is_int8;
};

constexpr int64_t kCostOfAngle = 16;  // work of one pair: libm's sinf and cosf are scalar, right for any angle

void rope_cos_sin(const RopeCosSinArgs& a) {
  for_rows(a.num_tokens, a.num_pairs * kCostOfAngle, [&](int64_t token) {
    const float position = static_cast<float>(a.positions[token]);
    float* out = a.out + token * 2 * a.num_pairs;
    for (int64_t p = 0; p < a.num_pairs; ++p) {
      const float angle = position * a.inv_freq[p];
      out[p] = std::cos(angle) * a.attention_scaling;
      out[a.num_pairs + p] = std::sin(angle) * a.attention_scaling;
    }
  });
}

template <class T> void rotate_halves(const T* x, const float* cos, const float* sin, T* out, int64_t num_pairs) {
  for_vectors(num_pairs, [&](int64_t p, int64_t count) {
    const f32x16 first = load(x + p, count), second = load(x + num_pairs + p, count);
    const f32x16 c = load(cos + p, count), s = load(sin + p, count);
    store(out + p, first * c - second * s, count);
    store(out + num_pairs + p, second * c + first * s, count);
  });
}

template <class T> void rotate_pairs(const T* x, const float* cos, const float* sin, T* out, int64_t num_pairs) {
  for_vectors(num_pairs, [&](int64_t p, int64_t count) {
    T lanes[2 * kLanes] = {};
    std::memcpy(lanes, x + 2 * p, static_cast<size_t>(2 * count) * sizeof(T));
    const f32x16 low = load16(lanes), high = load16(lanes + kLanes);
    const f32x16 first = __builtin_shufflevector(low, high, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const f32x16 second = __builtin_shufflevector(low, high, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    const f32x16 c = load(cos + p, count), s = load(sin + p, count);
    const f32x16 a = first * c - second * s, b = second * c + first * s;
    store16(lanes, __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23));
    store16(lanes + kLanes, __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31));
    std::memcpy(out + 2 * p, lanes, static_cast<size_t>(2 * count) * sizeof(T));
  });
}

// One head of `size`, rotated by the angles of its token. `out` may be `x`.
template <class T>
void rotate_head(const T* x, const float* cos, T* out, int64_t num_pairs, int64_t size, bool interleaved) {
  const float* sin = cos + num_pairs;
  if (interleaved) rotate_pairs(x, cos, sin, out, num_pairs);
  else rotate_halves(x, cos, sin, out, num_pairs);
  const int64_t rotated = 2 * num_pairs;
  if (rotated < size && out != x) std::memcpy(out + rotated, x + rotated, static_cast<size_t>(size - rotated) * sizeof(T));
}

template <class T> void rope(const RopeArgs& a) {
  for_rows(a.num_tokens, a.num_heads * a.head_size, [&](int64_t token) {
    const float* cos = a.cos_sin + token * 2 * a.num_pairs;
    for (int64_t head = 0; head < a.num_heads; ++head) {
      const T* x = static_cast<const T*>(a.x) + token * a.stride_token + head * a.stride_head;
      T* out = static_cast<T*>(a.out) + (token * a.num_heads + head) * a.head_size;
      rotate_head(x, cos, out, a.num_pairs, a.head_size, a.interleaved);
    }
  });
}

template <class T> void rope_kv_store(const RopeKvStoreArgs& a) {
  const int64_t H = a.head_size, item = a.is_int8 ? 1 : sizeof(T), row = H * item;
  const int64_t part = a.block_size * (row + (a.is_int8 ? kScaleBytes : 0)), plane = a.num_kv_heads * part;  // to values
  for_rows(a.num_tokens, (a.num_heads + 2 * a.num_kv_heads) * H, [&](int64_t token) {
    const float* cos = a.cos_sin + token * 2 * a.num_pairs;
    const T* q = static_cast<const T*>(a.q) + token * a.q_stride_token;
    T* out = static_cast<T*>(a.out) + token * a.num_heads * H;
    for (int64_t head = 0; head < a.num_heads; ++head)
      rotate_head(q + head * a.q_stride_head, cos, out + head * H, a.num_pairs, H, a.interleaved);
    const int64_t slot = a.slots[token];
    if (slot < 0) return;  // a padded row
    const T *k = static_cast<const T*>(a.k) + token * a.k_stride_token;
    const T *v = static_cast<const T*>(a.v) + token * a.v_stride_token;
    const int64_t offset = slot % a.block_size;
    char* to = static_cast<char*>(a.cache) + slot / a.block_size * a.stride_block * item + offset * row;
    static thread_local Scratch memory;
    T* rotated = a.is_int8 ? reinterpret_cast<T*>(memory.reserve(static_cast<size_t>(H) * sizeof(T))) : nullptr;
    for (int64_t head = 0; head < a.num_kv_heads; ++head, to += part) {
      T* key = a.is_int8 ? rotated : reinterpret_cast<T*>(to);
      rotate_head(k + head * a.k_stride_head, cos, key, a.num_pairs, H, a.interleaved);
      if (a.is_int8) {
        char* scale = to + (a.block_size - offset) * row + offset * kScaleBytes;
        quantise_head(key, H, to, scale), quantise_head(v + head * a.v_stride_head, H, to + plane, scale + plane);
      } else {
        std::memcpy(to + plane, v + head * a.v_stride_head, static_cast<size_t>(row));
      }
    }
  });
}

}  // namespace

TRITIUM_EXPORT_ONE(rope_cos_sin, RopeCosSinArgs)
TRITIUM_EXPORT(rope, RopeArgs)
TRITIUM_EXPORT(rope_kv_store, RopeKvStoreArgs)
