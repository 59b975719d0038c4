// One tile of 64 keys against the rows of a work item on AMX, in bf16: what attention_tile.h's Tile does there.
//
//   keys_     [H / 2, 64] pairs, as they are for dot products: a row of B tiles. Where a kv head has one row, none: 16 keys
//             as they lie in the cache are an A tile, and the query's pairs, one a row, a B tile
//   values_   [64 / 2, H] pairs of keys, in the place of staged_; zeros where the item has no key
//   up to 32 rows at once: scores_ [32, 64] in fp32, then probabilities_ [2, 32, 64] in bf16
//
// Numbers. A score is one chain over H in steps of 32, whichever of the two is A: products commute. The softmax is Tile's. A
// probability becomes two numbers of bf16, the nearest one and what is left: rounded to one alone it would cost more than the output's own rounding does, and these
// products are the smaller part of the time. The tile's share of the output is one chain over its 64 keys in steps of 32, the
// first numbers before the second, continued from the output so far. A cache in int8 gives values as its integers: a
// probability is then multiplied by its value's scale first. A key that a row does not see
// counts as zero times its value: where a value is not finite, rows that do not see all keys are computed by themselves, with
// zeros in place of the others'. So bits are a row's own, as in attention.cpp.
#pragma once
#include "attention_tile.h"
#include "linear_amx.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define TRITIUM_AMX_ATTENTION
namespace tritium {

template <class C> class AmxTile : public Tile<bf16, C> {
  using Base = Tile<bf16, C>;
  using Base::size_, Base::stride_, Base::keys_, Base::query_, Base::output_, Base::scores_, Base::state_, Base::staged_,
      Base::present_, Base::coming_, Base::value_offset_, Base::key_scales_, Base::rows_per_head_;
  static constexpr bool kIsInt8 = std::is_same<C, int8_t>::value;
  static constexpr int64_t kScoreStride = kTile * 4;  // bytes

 public:
  AmxTile(const TileShape& shape, Scratch& memory)
      : Base(shape, memory, 2 * kGroup), is_one_(shape.rows_per_head == 1),
        is_direct_(!kIsInt8 && size_ == stride_ && shape.block_size % kTileRows == 0),
        values_(reinterpret_cast<uint32_t*>(staged_)), probabilities_(reinterpret_cast<bf16*>(scores_ + kGroup * kTile)) {}
  AmxTile(const AmxTile&) = delete;
  ~AmxTile() { if (configured_ != 0) _tile_release(); }

  void load(int64_t begin, int64_t end) {
    all_ = {static_cast<int>(begin), static_cast<int>(end)};
    is_one_ ? find_key_rows() : this->load_keys(begin, end);
    pack_values(all_);
  }

  template <class F, class G> void attend(int64_t begin, int64_t end, F range, G bias, float scale, float softcap) {
    for (int64_t row = begin; row < end; row += kGroup) {
      const int64_t count = std::min(kGroup, end - row);
      configure(count);
      is_one_ ? multiply_key_rows(row) : multiply_keys(row, count > kTileRows);
      bool see_all = true;
      for (int64_t r = 0; r < count; ++r) {
        const Range seen = range(row + r);
        see_all &= seen.begin <= all_.begin && seen.end >= all_.end;
        probabilities(row, r, seen, bias(row + r), scale, softcap);
      }
      if (see_all || is_finite()) {
        add_values(row, 0, count > kTileRows);
        continue;
      }
      configure(1);
      for (int64_t r = 0; r < count; ++r) {
        pack_values(range(row + r));
        add_values(row, r, false);
      }
      pack_values(all_);
    }
  }

 private:
  void configure(int64_t count) {
    if (configured_ == count) return;
    configured_ = count;
    if (!is_one_) return configure_tiles(count);
    // Sums of outputs in tiles 0 and 1, of scores in 2 and 3, probabilities in 4, the query in 5, keys or values in 6 and 7.
    constexpr uint8_t rows[8] = {1, 1, 16, 16, 1, 16, 16, 16}, bytes[8] = {64, 64, 4, 4, 64, 4, 64, 64};
    TileConfig config;
    for (int tile = 0; tile < 8; ++tile) config.bytes_per_row[tile] = bytes[tile], config.rows[tile] = rows[tile];
    asm volatile("" : : "r"(&config) : "memory");
    _tile_loadconfig(&config);
  }

  // Where 16 keys at a time lie side by side: in the cache itself, or widened or padded.
  void find_key_rows() {
    for (int g = 0; g < kTile / kTileRows; ++g) {
      const int64_t first = std::max<int64_t>(all_.begin, g * kTileRows), end = std::min<int64_t>(all_.end, (g + 1) * kTileRows);
      key_rows_[g] = nullptr;
      if (first >= end) continue;
      if (is_direct_) {
        key_rows_[g] = reinterpret_cast<const bf16*>(present_[first]) - (first - g * kTileRows) * size_;
        continue;
      }
      bf16* staged = reinterpret_cast<bf16*>(keys_) + g * kTileRows * stride_;
      key_rows_[g] = staged;
      for (int64_t key = first; key < end; ++key) {
        if constexpr (kIsInt8) key_scales_[key] = this->scale_of(key, 0);
        this->stage(present_[key], staged + (key - g * kTileRows) * stride_);
      }
    }
  }

  // scores_ of one row; zeros where it sees none of 16 keys.
  void multiply_key_rows(int64_t row) const {
    asm volatile("" : : : "memory");
    for (int g = 0; g < kTile / kTileRows; g += 2) {
      const bf16 *low = key_rows_[g], *high = key_rows_[g + 1];
      _tile_zero(2);
      _tile_zero(3);
      for (int64_t unit = 0; unit < stride_ / 2; unit += kLanes) {
        prefetch_keys(g, unit);
        _tile_loadd(5, query_ + row * stride_ + unit, 4);
        if (low != nullptr) {
          _tile_loadd(6, low + 2 * unit, stride_ * 2);
          _tile_dpbf16ps(2, 6, 5);
        }
        if (high != nullptr) {
          _tile_loadd(7, high + 2 * unit, stride_ * 2);
          _tile_dpbf16ps(3, 7, 5);
        }
      }
      _tile_stored(2, scores_ + g * kTileRows, 4);
      _tile_stored(3, scores_ + (g + 1) * kTileRows, 4);
    }
    asm volatile("" : : : "memory");
  }

  // Of 32 keys, the lines of the coming tile that hold what `unit` is of this one.
  void prefetch_keys(int g, int64_t unit) const {
    if (kIsInt8 && 2 * unit % kLine != 0) return;
    for (int key = g * kTileRows; key < (g + 2) * kTileRows; ++key)
      __builtin_prefetch(coming_[key] + 2 * unit, 0, 2);
  }

  // scores_ of up to 32 rows.
  void multiply_keys(int64_t row, bool is_tall) const {
    asm volatile("" : : : "memory");  // GCC 12's intrinsics do not admit to reading
    const int64_t row_bytes = stride_ * 4, tile_rows = kTileRows * stride_;
    for (int64_t key = 0; key < kTile; key += 2 * kLanes) {
      zero_sums();
      for (int64_t unit = 0; unit < stride_ / 2; unit += kLanes) {
        const uint32_t *k = keys_ + unit * kTile + key, *q = query_ + row * stride_ + unit;
        _tile_loadd(6, k, kScoreStride);
        _tile_loadd(7, k + kLanes, kScoreStride);
        _tile_loadd(4, q, row_bytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (is_tall) {
          _tile_loadd(5, q + tile_rows, row_bytes);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
      }
      float *low = scores_ + key, *high = low + kTileRows * kTile;
      _tile_stored(0, low, kScoreStride);
      _tile_stored(1, low + kLanes, kScoreStride);
      if (is_tall) {
        _tile_stored(2, high, kScoreStride);
        _tile_stored(3, high + kLanes, kScoreStride);
      }
    }
    asm volatile("" : : : "memory");
  }

  // The scores of row + r become its probabilities, its output so far is scaled to their maximum.
  void probabilities(int64_t row, int64_t r, Range seen, Bias bias, float scale, float softcap) {
    float *scores = scores_ + r * kTile, *output = output_ + (row + r) * stride_;
    if constexpr (kIsInt8)
      for (int i = 0; i < kTile; i += kLanes) store16(scores + i, load16(scores + i) * load16(key_scales_ + i));
    const float factor = softmax(scores, seen, bias, state_[row + r], scale, softcap);
    if (factor != 1.0f)
      for (int64_t h = 0; h < stride_; h += kLanes) store16(output + h, load16(output + h) * factor);
    for (int i = 0; i < kTile; i += kLanes) {
      f32x16 p = load16(scores + i);
      if constexpr (kIsInt8) p = p != 0.0f ? p * load16(value_scales_ + i) : f32x16{};
      bf16* to = probabilities_ + r * kTile + i;
      store16(to, p);
      store16(to + kGroup * kTile, p - load16(to));
    }
  }

  // output_ of the rows from row + r on += their probabilities times the values.
  void add_values(int64_t row, int64_t r, bool is_tall) const {
    asm volatile("" : : : "memory");
    const int64_t row_bytes = stride_ * 4;
    for (int64_t h = 0; h < stride_; h += 2 * kLanes) {
      float *low = output_ + (row + r) * stride_ + h, *high = low + kTileRows * stride_;
      _tile_loadd(0, low, row_bytes);
      _tile_loadd(1, low + kLanes, row_bytes);
      if (is_tall) {
        _tile_loadd(2, high, row_bytes);
        _tile_loadd(3, high + kLanes, row_bytes);
      }
      for (int64_t key = 0; key < kTile; key += kTileK) {
        const uint32_t* v = values_ + key / 2 * stride_ + h;
        _tile_loadd(6, v, row_bytes);
        _tile_loadd(7, v + kLanes, row_bytes);
        for (int part = 0; part < 2; ++part) {
          const bf16* p = probabilities_ + (part * kGroup + r) * kTile + key;
          _tile_loadd(4, p, kTile * 2);
          _tile_dpbf16ps(0, 4, 6);
          _tile_dpbf16ps(1, 4, 7);
          if (is_tall) {
            _tile_loadd(5, p + kTileRows * kTile, kTile * 2);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
          }
        }
      }
      _tile_stored(0, low, row_bytes);
      _tile_stored(1, low + kLanes, row_bytes);
      if (is_tall) {
        _tile_stored(2, high, row_bytes);
        _tile_stored(3, high + kLanes, row_bytes);
      }
    }
    asm volatile("" : : : "memory");
  }

  // values_ of the keys in `seen`, and of an int8 cache their scales; zeros for the others.
  void pack_values(Range seen) {
    is_finite_ = -1;
    bf16* rows = reinterpret_cast<bf16*>(values_ + kTile / 2 * stride_);  // two, padded
    for (int key = 0; key < kTile; key += 2) {
      const bf16* even = value_row(key, seen, rows);
      pack_pair(even, value_row(key + 1, seen, rows + stride_), values_ + key / 2 * stride_);
    }
  }

  // Two rows of V as pairs.
  void pack_pair(const bf16* even_row, const bf16* odd_row, uint32_t* to) const {
    u16x32 low = {}, high = {};
    for (int i = 0; i < 32; ++i) low[i] = static_cast<uint16_t>(i / 2 + i % 2 * 32), high[i] = static_cast<uint16_t>(low[i] + 16);
    const __m512i first = bit_cast<__m512i>(low), second = bit_cast<__m512i>(high);
    for (int64_t h = 0; h < stride_; h += 2 * kLanes, to += 2 * kLanes) {
      const __m512i even = _mm512_loadu_si512(even_row + h), odd = _mm512_loadu_si512(odd_row + h);
      _mm512_store_si512(to, _mm512_permutex2var_epi16(even, first, odd));
      _mm512_store_si512(to + kLanes, _mm512_permutex2var_epi16(even, second, odd));
    }
  }

  // Whether all of values_ are; found out where somebody asks.
  bool is_finite() {
    if (is_finite_ >= 0) return is_finite_ != 0;
    const __m512i exponent = _mm512_set1_epi16(0x7f80);
    __mmask32 is_infinite = 0;
    for (int64_t i = 0; i < kTile / 2 * stride_; i += kLanes)
      is_infinite |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(_mm512_load_si512(values_ + i), exponent), exponent);
    return (is_finite_ = is_infinite == 0) != 0;
  }

  // A row of V that can be read in whole vectors: its own place, or `padded`; zeros when it is not seen.
  const bf16* value_row(int key, Range seen, bf16* padded) {
    if constexpr (kIsInt8) value_scales_[key] = 0.0f;
    if (key < seen.begin || key >= seen.end) {
      std::memset(padded, 0, static_cast<size_t>(stride_) * sizeof(bf16));
      return padded;
    }
    const C* from = present_[key] + value_offset_;
    const int64_t line = kLine / static_cast<int64_t>(sizeof(C));
    for (int64_t h = 0; h < size_; h += line) __builtin_prefetch(coming_[key] + value_offset_ + h, 0, 2);
    if constexpr (kIsInt8) value_scales_[key] = this->scale_of(key, value_offset_);
    else if (size_ == stride_) return from;
    this->stage(from, padded);
    return padded;
  }

  const bool is_one_, is_direct_;  // row of a head; 16 keys can be read where they lie
  uint32_t* values_;
  bf16* probabilities_;
  const bf16* key_rows_[kTile / kTileRows] = {};
  float value_scales_[kTile] = {};  // of a cache in int8
  Range all_{};                     // keys of the present tile
  int is_finite_ = -1;              // -1: not known yet
  int64_t configured_ = 0;  // rows that the tiles are set up for
};

}  // namespace tritium
#endif
