// One tile of 64 keys against the rows of a work item: the arithmetic of attention.cpp, without its bookkeeping.
//
// Layouts (fp32 unless said otherwise), all in the thread's scratch memory:
//   keys_   [H, 64]   lanes are keys; for bf16 on AVX512-BF16: [H / 2, 64] pairs of bf16
//   staged_ [64, H]   rows widened and padded with zeros, where the cache's own rows cannot be used as they are
//   query_  [rows, H] padded like keys_   scores_ [6, 64]   output_ [rows, H] padded to whole vectors
// The loops that take the time use the machine's own vector width; a lane never meets another one in them, so the width
// does not change a bit. Sums over lanes go through f32x16 in one fixed order.
#pragma once
#include <algorithm>
#include <limits>
#include <type_traits>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include "transpose.h"

namespace tritium {

constexpr int kTile = 64;  // keys
constexpr int kRows = 6;   // rows computed together at most

struct Range { int begin, end; };  // keys of the tile that a row sees
struct Bias { float slope; int32_t first; };  // a row adds slope * (first + i) to the score of the tile's key i

constexpr int kScoreVectors = kWide == 16 ? 4 : 2;  // sums in registers: 6 x 4 of AVX-512's 32, else 6 x 2 of 16
constexpr int kValueVectors = kScoreVectors;

// ---- scores: R rows x 64 keys, each score one chain over H

template <int R> inline void scores(const float* keys, int64_t size, const float* query, int64_t stride, float* out) {
  for (int part = 0; part < kTile; part += kScoreVectors * kWide) {
    f32xw sums[R][kScoreVectors] = {};
    for (int64_t h = 0; h < size; ++h) {
      f32xw k[kScoreVectors];  // all first: a row's factor then needs one register, not a row each
      for (int i = 0; i < kScoreVectors; ++i) k[i] = load_wide(keys + h * kTile + part + i * kWide);
      for (int r = 0; r < R; ++r)
        for (int i = 0; i < kScoreVectors; ++i) sums[r][i] = fma(splat_wide(query[r * stride + h]), k[i], sums[r][i]);
    }
    for (int r = 0; r < R; ++r) std::memcpy(out + r * kTile + part, sums[r], sizeof(sums[r]));
  }
}

#if defined(__AVX512BF16__)
constexpr bool kHasPairs = true;
template <int R>
inline void scores(const uint32_t* keys, int64_t size, const uint32_t* query, int64_t stride, float* out) {
  __m512 sums[R][4] = {};
  for (int64_t h = 0; h < size; ++h)
    for (int i = 0; i < 4; ++i) {
      const __m512bh k = (__m512bh)_mm512_load_si512(keys + h * kTile + i * 16);
      for (int r = 0; r < R; ++r) {
        const __m512bh q = (__m512bh)_mm512_set1_epi32(static_cast<int>(query[r * stride + h]));
        sums[r][i] = _mm512_dpbf16_ps(sums[r][i], k, q);
      }
    }
  std::memcpy(out, sums, sizeof(sums));
}
#else
constexpr bool kHasPairs = false;
#endif

// ---- output += probabilities . values, R rows x C vectors of H, over the keys in order

// C vectors of a row. bf16 come in twos, as one load makes two: the even elements, then the odd ones (see `finish`).
template <int C> inline void load_values(const float* from, f32xw (&v)[C]) {
  for (int i = 0; i < C; ++i) v[i] = load_wide(from + i * kWide);
}
template <int C> inline void load_values(const bf16* from, f32xw (&v)[C]) {
  for (int i = 0; i < C; i += 2) {
    u32xw pairs;
    std::memcpy(&pairs, from + i * kWide, sizeof(pairs));
    v[i] = bit_cast<f32xw>(pairs << 16), v[i + 1] = bit_cast<f32xw>(pairs & 0xffff0000u);
  }
}

// values[key] + offset is a row of V. Rows at the same offset from `next`, unless null, are brought into L2 meanwhile.
template <int R, int C, class V>
inline void add_values(const V* const* values, const V* const* next, int64_t offset, int begin, int end, const float* p,
                       float* out, int64_t stride) {
  f32xw sums[R][C];
  for (int r = 0; r < R; ++r) std::memcpy(sums[r], out + r * stride, sizeof(sums[r]));
  for (int key = begin; key < end; ++key) {
    if (next != nullptr)
      for (int i = 0; i < C * kWide; i += kLine / sizeof(V)) __builtin_prefetch(next[key] + offset + i, 0, 2);
    f32xw v[C];
    load_values(values[key] + offset, v);
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < C; ++i) sums[r][i] = fma(splat_wide(p[r * kTile + key]), v[i], sums[r][i]);
  }
  for (int r = 0; r < R; ++r) std::memcpy(out + r * stride, sums[r], sizeof(sums[r]));
}

template <int R, class V>
void add_values(const V* const* values, const V* const* next, int64_t offset, int64_t size, Range keys, const float* p,
                float* out, int64_t stride) {
  int64_t h = 0;
  for (; h + kValueVectors * kWide <= size; h += kValueVectors * kWide)
    add_values<R, kValueVectors>(values, next, offset + h, keys.begin, keys.end, p, out + h, stride);
  constexpr int rest = sizeof(float) / sizeof(V);
  for (; h < size; h += rest * kWide)
    add_values<R, rest>(values, next, offset + h, keys.begin, keys.end, p, out + h, stride);
}

// Calls f(std::integral_constant<int, n>) for n from 1 to kRows.
template <class F> inline void with_rows(int n, F f) {
  switch (n) {
    case 1: return f(std::integral_constant<int, 1>{});
    case 2: return f(std::integral_constant<int, 2>{});
    case 3: return f(std::integral_constant<int, 3>{});
    case 4: return f(std::integral_constant<int, 4>{});
    case 5: return f(std::integral_constant<int, 5>{});
    case 6: return f(std::integral_constant<int, 6>{});
  }
}

struct RowState { float max, sum; };

// tanh to about 2 ulp: an odd polynomial near 0, else by e^-2|x| (Cephes).
inline f32xw tanh_wide(f32xw x) {
  f32xw magnitude = x < 0.0f ? -x : x, square = x * x;
  f32xw p = splat_wide(-5.70498872745e-3f);
  for (const float c : {2.06390887954e-2f, -5.37397155531e-2f, 1.33314422036e-1f, -3.33332819422e-1f})
    p = fma(p, square, splat_wide(c));
  f32xw small = fma(p * square, x, x), e = exp_nonpositive(magnitude * -2.0f), large = (1.0f - e) / (1.0f + e);
  return magnitude < 0.625f ? small : (x < 0.0f ? -large : large);
}

// The 64 lanes of a tile folded to 16: lane i meets lane i + 32, then i + 16.
template <class F> inline void fold(const f32xw (&x)[kTile / kWide], f32xw (&out)[kParts], F f) {
  for (int i = 0; i < kParts; ++i) out[i] = f(f(x[i], x[i + 2 * kParts]), f(x[i + kParts], x[i + 3 * kParts]));
}

// Turns the scores of one row into e^(score - max) in place; what lies outside the range becomes 0. Updates the row's
// running maximum and sum. Returns the factor by which the row's output so far has to be scaled: 1 if max stays.
inline float softmax(float* scores, Range range, Bias bias, RowState& state, float scale, float softcap) {
  f32xw x[kTile / kWide], lanes[kParts];
  for (int i = 0; i < kTile / kWide; ++i) x[i] = load_wide(scores + i * kWide) * scale;
  if (softcap > 0.0f)
    for (auto& v : x) v = tanh_wide(v / softcap) * softcap;
  if (bias.slope != 0.0f)
    for (int i = 0; i < kTile / kWide; ++i)
      x[i] = fma(__builtin_convertvector(lanes_from(i * kWide) + bias.first, f32xw), splat_wide(bias.slope), x[i]);
  if (range.begin > 0 || range.end < kTile)
    for (int i = 0; i < kTile / kWide; ++i) {
      const i32xw key = lanes_from(i * kWide);
      x[i] = (key >= range.begin) & (key < range.end) ? x[i] : splat_wide(-std::numeric_limits<float>::infinity());
    }
  fold(x, lanes, [](f32xw a, f32xw b) { return a > b ? a : b; });
  const float tile_max = max_lane(lanes), max = tile_max > state.max ? tile_max : state.max;
  for (auto& v : x) v = exp_nonpositive(v - max);
  for (int i = 0; i < kTile / kWide; ++i) store_wide(scores + i * kWide, x[i]);
  fold(x, lanes, [](f32xw a, f32xw b) { return a + b; });
  const float factor = max == state.max ? 1.0f : exp_nonpositive(state.max - max);
  const float tile_sum = sum(lanes), scaled_sum = state.sum * factor;
  state = {max, scaled_sum + tile_sum};
  return factor;
}

// What a tile is made for. rows_per_head: rows that share a kv head; max_rows: of all heads that go together.
struct TileShape { int64_t head_size, value_offset, block_size, rows_per_head, max_rows; };

template <class T, class C = T> class Tile {
  static constexpr bool kIsInt8 = std::is_same<C, int8_t>::value;
  static constexpr bool kIsBf16 = std::is_same<T, bf16>::value, kPairs = kIsBf16 && kHasPairs;
  using Unit = std::conditional_t<kPairs, uint32_t, float>;  // what one lane of keys_ holds
  using Query = std::conditional_t<kPairs, bf16, float>;     // what query_ holds
  using Staged = std::conditional_t<kIsBf16, bf16, float>;   // what keys_ is made of, in units of 4 bytes
  static constexpr int64_t kPerUnit = sizeof(float) / sizeof(Staged);

 public:
  // rows_together: as many have room for their scores.
  Tile(const TileShape& shape, Scratch& memory, int64_t rows_together = kRows)
      : size_(shape.head_size), value_offset_(shape.value_offset), rows_per_head_(shape.rows_per_head),
        stride_((size_ + 31) / 32 * 32), num_units_((size_ + kPerUnit - 1) / kPerUnit) {
    const int64_t max_rows = shape.max_rows, floats = stride_ * (2 * kTile + 2 * max_rows) + rows_together * kTile + 2 * max_rows;
    float* p = reinterpret_cast<float*>(memory.reserve(static_cast<size_t>(floats) * sizeof(float)));
    const auto take = [&p](int64_t count) { float* taken = p; p += count; return taken; };
    keys_ = reinterpret_cast<Unit*>(take(stride_ * kTile)), staged_ = take(stride_ * kTile);
    query_ = reinterpret_cast<Unit*>(take(stride_ * max_rows)), output_ = take(stride_ * max_rows);
    scores_ = take(rows_together * kTile), state_ = reinterpret_cast<RowState*>(take(2 * max_rows));
    for (int64_t key = 0; key < kTile; ++key) staged_rows_[key] = staged_ + key * stride_;
  }

  void set_query(int64_t row, const T* q) {
    stage(q, reinterpret_cast<Query*>(query_ + row * stride_));
    std::fill_n(output_ + row * stride_, stride_, 0.0f);
    state_[row] = {-std::numeric_limits<float>::infinity(), 0.0f};
  }

  // Where `count` adjacent keys of the coming tile are. While the present one is computed they are brought into L2,
  // line by line: runs of 2 KB are too short for the hardware's prefetching, and asking for all at once fills its
  // buffers (Zen 4, bf16 decode, long context, GB/s a core: none 5.9, all at once 6.8, line by line 11.2, into L1 6.8).
  // scales: of the first of them, in int8; asked for at once, for they are few lines.
  void set_keys(int64_t index, int64_t count, const C* k, const C* scales = nullptr) {
    for (int64_t i = 0; i < count; ++i) coming_[index + i] = k + i * size_;
    if constexpr (kIsInt8) {
      constexpr int64_t bytes = sizeof(float);
      for (int64_t i = 0; i < count; ++i) coming_scales_[index + i] = scales + i * bytes;
      for (int64_t at = 0; at < count * bytes; at += kLine) {
        __builtin_prefetch(scales + at, 0, 2);
        __builtin_prefetch(scales + at + value_offset_, 0, 2);
      }
    }
  }

  // The coming tile becomes the present one, and its own successor until another is set: fetching it is free.
  void next() {
    std::swap(present_, coming_);
    std::copy_n(present_, kTile, coming_);
    if constexpr (kIsInt8) std::copy_n(coming_scales_, kTile, present_scales_);
  }

  // Takes in the keys [begin, end) of the present tile, whose addresses were set; no other slot is read.
  void load(int64_t begin, int64_t end) {
    load_keys(begin, end);
    load_values(begin, end);
  }

  // Rows [begin, end), each of which sees the keys range(row), at least one, with bias(row) added to their scores. Where
  // a group's ranges differ, at the causal diagonal and at the window's edge, the keys that only some rows see are added
  // row by row.
  template <class F, class G> void attend(int64_t begin, int64_t end, F range, G bias, float scale, float softcap) {
    int64_t groups = (end - begin + kRows - 1) / kRows;
    for (int64_t row = begin, count; row < end; row += count, --groups) {
      count = (end - row + groups - 1) / groups;
      const Unit* query = query_ + row * stride_;
      const int64_t length = kPairs ? num_units_ : size_;
      with_rows(static_cast<int>(count), [&](auto R) { scores<R()>(keys_, length, query, stride_, scores_); });
      Range ranges[kRows], common{0, kTile};
      for (int r = 0; r < count; ++r) {
        ranges[r] = range(row + r);
        if constexpr (kIsInt8)
          for (int i = 0; i < kTile; ++i) scores_[r * kTile + i] *= key_scales_[i];
        common = {std::max(common.begin, ranges[r].begin), std::min(common.end, ranges[r].end)};
        const float factor = softmax(scores_ + r * kTile, ranges[r], bias(row + r), state_[row + r], scale, softcap);
        if (factor != 1.0f) {
          float* o = output_ + (row + r) * stride_;
          for (int64_t h = 0; h < stride_; ++h) o[h] *= factor;
        }
      }
      if (common.begin >= common.end) common = {kTile, kTile};
      for (int r = 0; r < count; ++r) values(row, r, 1, {ranges[r].begin, std::min(common.begin, ranges[r].end)});
      values(row, 0, static_cast<int>(count), common);
      for (int r = 0; r < count; ++r) values(row, r, 1, {common.end, ranges[r].end});
    }
  }

  void finish(int64_t row, T* out) const {
    const float* o = output_ + row * stride_;
    if (kIsBf16 && direct_) {  // even and odd elements back into their places
      for (int64_t h = 0; h < size_; h += 2 * kWide)
        for (int64_t i = 0; i < kWide; ++i) staged_[h + 2 * i] = o[h + i], staged_[h + 2 * i + 1] = o[h + kWide + i];
      o = staged_;
    }
    const float total = state_[row].sum;
    for_vectors(size_, [&](int64_t h, int64_t count) { store(out + h, load16(o + h) / total, count); });
  }

 protected:
  void load_keys(int64_t begin, int64_t end) {
    const int64_t first = begin / kWide * kWide, last = (end + kWide - 1) / kWide * kWide;
    std::fill(present_ + first, present_ + begin, present_[begin]);  // lanes that no row sees still need an address
    std::fill(present_ + end, present_ + last, present_[begin]);
    if (std::is_same<C, Staged>::value && size_ % (kWide * kPerUnit) == 0) {
      transpose_keys(reinterpret_cast<const Staged* const*>(present_), first, end);
    } else {
      Staged* staged = reinterpret_cast<Staged*>(staged_);
      const Staged* rows[kTile];
      for (int64_t key = first; key < last; ++key) {
        rows[key] = staged + key * stride_;
        if constexpr (kIsInt8) key_scales_[key] = scale_of(std::clamp(key, begin, end - 1), 0);
        stage(present_[key], staged + key * stride_);
      }
      transpose_keys(rows, first, end);
    }
  }

  void load_values(int64_t begin, int64_t end) {
    // The cache's own rows of V serve as they are if they are whole vectors and are widened once, or need no widening.
    const bool is_cheap = std::is_same<C, float>::value || (std::is_same<C, bf16>::value && rows_per_head_ <= kRows);
    direct_ = size_ % (kWide * kPerUnit) == 0 && is_cheap;
    if (direct_) return;
    for (int64_t key = begin; key < end; ++key) {
      if constexpr (kIsInt8) __builtin_prefetch(coming_[key] + value_offset_, 0, 2);
      stage(present_[key] + value_offset_, staged_ + key * stride_);
      if constexpr (kIsInt8) scale_values(scale_of(key, value_offset_), staged_ + key * stride_);
    }
  }

  // One row, widened or copied, then zeros up to the stride.
  void stage(const int8_t* from, float* to) const {
    for (int64_t h = 0; h < size_; ++h) to[h] = static_cast<float>(from[h]);
    for (int64_t h = size_; h < stride_; ++h) to[h] = 0.0f;
  }
  void stage(const int8_t* from, bf16* to) const {  // exact: eight bits of mantissa hold them
    for (int64_t h = 0; h < size_; ++h) to[h].bits = static_cast<uint16_t>(bit_cast<uint32_t>(static_cast<float>(from[h])) >> 16);
    for (int64_t h = size_; h < stride_; ++h) to[h].bits = 0;
  }
  // Of a key of the present tile, or, `offset` further, of its value.
  float scale_of(int64_t key, int64_t offset) const {
    float scale;
    std::memcpy(&scale, present_scales_[key] + offset, sizeof(scale));
    return scale;
  }
  void scale_values(float scale, float* to) const {
    for (int64_t h = 0; h < stride_; ++h) to[h] *= scale;
  }
  template <class U> void stage(const U* from, float* to) const {
    int64_t h = 0;
    for (; h + kWide <= size_; h += kWide) store_wide(to + h, load_wide(from + h));
    for (; h < size_; ++h) to[h] = to_float(from[h]);
    for (; h < stride_; ++h) to[h] = 0.0f;
  }
  void stage(const bf16* from, bf16* to) const {
    std::memcpy(to, from, static_cast<size_t>(size_) * sizeof(bf16));
    std::memset(to + size_, 0, static_cast<size_t>(stride_ - size_) * sizeof(bf16));
  }

  void transpose_keys(const Staged* const* rows, int64_t begin, int64_t end) {
    for (int64_t key = begin; key < end; key += kWide)
      for (int64_t unit = 0; unit < num_units_; unit += kWide) {
        u32xw x[kWide];
        for (int i = 0; i < kWide; ++i) {
          std::memcpy(&x[i], rows[key + i] + unit * kPerUnit, sizeof(x[i]));
          __builtin_prefetch(coming_[key + i] + unit * kPerUnit, 0, 2);
        }
        transpose(x);
        Unit* to = keys_ + unit * (kPairs ? 1 : kPerUnit) * kTile + key;
        for (int i = 0; i < kWide; ++i) {
          if constexpr (kIsBf16 && !kPairs) {  // a pair becomes two rows
            const u32xw even = x[i] << 16, odd = x[i] & 0xffff0000u;
            std::memcpy(to + 2 * i * kTile, &even, sizeof(even));
            std::memcpy(to + (2 * i + 1) * kTile, &odd, sizeof(odd));
          } else {
            std::memcpy(to + i * kTile, &x[i], sizeof(x[i]));
          }
        }
      }
  }

  void values(int64_t row, int r, int count, Range keys) {
    if (keys.begin >= keys.end) return;
    const float* p = scores_ + r * kTile;
    float* out = output_ + (row + r) * stride_;
    const int64_t size = (size_ + kWide - 1) / kWide * kWide;
    with_rows(count, [&](auto R) {
      if constexpr (std::is_same<C, float>::value || std::is_same<C, bf16>::value)
        if (direct_) return add_values<R()>(present_, coming_, value_offset_, size, keys, p, out, stride_);
      const float* const* none = nullptr;
      add_values<R()>(staged_rows_, none, 0, size, keys, p, out, stride_);
    });
  }

  const int64_t size_, value_offset_, rows_per_head_, stride_, num_units_;
  Unit *keys_, *query_;
  float *staged_, *output_, *scores_;
  RowState* state_;
  bool direct_ = false;
  const C *addresses_[2][kTile] = {}, **present_ = addresses_[0], **coming_ = addresses_[1];
  const float* staged_rows_[kTile];
  const C *present_scales_[kTile] = {}, *coming_scales_[kTile] = {};  // of a cache in int8
  float key_scales_[kTile] = {};
};

}  // namespace tritium
