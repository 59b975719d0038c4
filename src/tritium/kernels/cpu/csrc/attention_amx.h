// One tile of 64 keys against the rows of a work item on AMX, in bf16: what attention_tile.h's Tile does there.
//
//   keys_     [H / 2, 64] pairs, as they are for dot products: a row of B tiles
//   values_   [64 / 2, H] pairs of keys, in the place of staged_; zeros where the item has no key
//   up to 32 rows at once: scores_ [32, 64] in fp32, then probabilities_ [2, 32, 64] in bf16
//
// Numbers. A score is one chain over H in steps of 32. The softmax is Tile's. A probability becomes two numbers of bf16, the
// nearest one and what is left: rounded to one alone it would cost more than the output's own rounding does, and these
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
      Base::present_, Base::coming_, Base::value_offset_, Base::key_scales_;
  static constexpr bool kIsInt8 = std::is_same<C, int8_t>::value;
  static constexpr int64_t kScoreStride = kTile * 4;  // bytes

 public:
  AmxTile(int64_t head_size, int64_t value_offset, int64_t max_rows, Scratch& memory)
      : Base(head_size, value_offset, max_rows, memory, 2 * kGroup), values_(reinterpret_cast<uint32_t*>(staged_)),
        probabilities_(reinterpret_cast<bf16*>(scores_ + kGroup * kTile)) {}
  AmxTile(const AmxTile&) = delete;
  ~AmxTile() { if (configured_ != 0) _tile_release(); }

  void load(int64_t begin, int64_t end, int64_t) {
    this->load_keys(begin, end);
    all_ = {static_cast<int>(begin), static_cast<int>(end)};
    is_finite_ = pack_values(all_);
  }

  template <class F, class G> void attend(int64_t begin, int64_t end, F range, G bias, float scale, float softcap) {
    for (int64_t row = begin; row < end; row += kGroup) {
      const int64_t count = std::min(kGroup, end - row);
      configure(count);
      multiply_keys(row, count > kTileRows);
      bool see_all = true;
      for (int64_t r = 0; r < count; ++r) {
        const Range seen = range(row + r);
        see_all &= seen.begin <= all_.begin && seen.end >= all_.end;
        probabilities(row, r, seen, bias(row + r), scale, softcap);
      }
      if (see_all || is_finite_) {
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
    if (configured_ != count) configure_tiles(configured_ = count);
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

  // values_ of the keys in `seen`, and of an int8 cache their scales; zeros for the others. True when all are finite.
  bool pack_values(Range seen) {
    u16x32 low = {}, high = {};
    for (int i = 0; i < 32; ++i) low[i] = static_cast<uint16_t>(i / 2 + i % 2 * 32), high[i] = static_cast<uint16_t>(low[i] + 16);
    const __m512i first = bit_cast<__m512i>(low), second = bit_cast<__m512i>(high), exponent = _mm512_set1_epi16(0x7f80);
    __mmask32 is_infinite = 0;
    bf16* rows = reinterpret_cast<bf16*>(values_ + kTile / 2 * stride_);  // two, padded
    for (int key = 0; key < kTile; key += 2) {
      const bf16* pair[2];
      for (int i = 0; i < 2; ++i) pair[i] = value_row(key + i, seen, rows + i * stride_);
      for (int64_t h = 0; h < stride_; h += 2 * kLanes) {
        const __m512i even = part(pair[0], h), odd = part(pair[1], h);
        is_infinite |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(even, exponent), exponent) |
                       _mm512_cmpeq_epi16_mask(_mm512_and_si512(odd, exponent), exponent);
        uint32_t* to = values_ + key / 2 * stride_ + h;
        _mm512_store_si512(to, _mm512_permutex2var_epi16(even, first, odd));
        _mm512_store_si512(to + kLanes, _mm512_permutex2var_epi16(even, second, odd));
      }
    }
    return is_infinite == 0;
  }

  static __m512i part(const bf16* row, int64_t h) {
    return row == nullptr ? _mm512_setzero_si512() : _mm512_loadu_si512(row + h);
  }

  // A row of V that can be read in whole vectors: its own place, or `padded`; null when it is not seen.
  const bf16* value_row(int key, Range seen, bf16* padded) {
    if constexpr (kIsInt8) value_scales_[key] = 0.0f;
    if (key < seen.begin || key >= seen.end) return nullptr;
    const C* from = present_[key] + value_offset_;
    const int64_t line = kLine / static_cast<int64_t>(sizeof(C));
    for (int64_t h = 0; h < size_; h += line) __builtin_prefetch(coming_[key] + value_offset_ + h, 0, 2);
    if constexpr (kIsInt8) std::memcpy(&value_scales_[key], from + size_, sizeof(float));
    else if (size_ == stride_) return from;
    this->stage(from, padded);
    return padded;
  }

  uint32_t* values_;
  bf16* probabilities_;
  float value_scales_[kTile] = {};  // of a cache in int8
  Range all_{};                     // keys of the present tile
  bool is_finite_ = true;
  int64_t configured_ = 0;  // rows that the tiles are set up for
};

}  // namespace tritium
#endif
