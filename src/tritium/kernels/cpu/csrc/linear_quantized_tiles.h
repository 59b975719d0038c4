// A quantised linear on AMX tiles: who computes which rows and panels when. The arithmetic is in linear_quantized_amx.h.
#pragma once
#include "linear_quantized_amx.h"
#include "linear_quantized_rows.h"

#if defined(TRITIUM_QUANTIZED_TILES)
#include <omp.h>

namespace tritium {

// Rows go in runs of kRunTiles tiles and K in blocks of kBytesInL2, so that a run's block of activations stays in L2 while
// the panels pass by; where K has several blocks, sums wait in memory. With int8 activations few rows are faster on the
// vector units, which give the same bits.
template <int kBits> class TiledQuantized : Quantized<kBits> {
  using Base = Quantized<kBits>;
  using Base::a, Base::typed, Base::num_rows_, Base::num_panels_, Base::units_, Base::padded_;

 public:
  static bool is_for(const QuantizedLinearArgs& a, bool is_bf16) {
    const int64_t num_rows = a.num_outer * a.num_inner, group = a.num_in / a.num_groups;
    if (kBits == 4 && (group > kMostInGroup || (a.int8_activations && group % 64 != 0 && group != 32))) return false;
    return (a.int8_activations ? num_rows >= kFewestRows : is_bf16) && amx_is_granted();
  }

  TiledQuantized(const QuantizedLinearArgs& args, const RowFunctions& functions, Scratch& memory)
      : Base(args, functions), item_size_(a.int8_activations ? 1 : 2), row_bytes_(padded_ * item_size_),
        num_tiles_((num_rows_ + kTileRows - 1) / kTileRows), is_direct_(kBits == 8 && a.int8_activations) {
    const int64_t group = kBits == 8 ? kMostInGroup : a.num_in / a.num_groups;
    piece_ = group * item_size_;
    expanded_ = std::max<int64_t>(1, kBytesExpanded / piece_) * piece_;
    block_ = is_direct_ ? kBytesInL2 : kBytesInL2 / expanded_ * expanded_;
    packed_ = memory.reserve(static_cast<size_t>(num_tiles_ * kTileRows * (row_bytes_ + 8)));
    row_scales_ = reinterpret_cast<float*>(packed_ + num_tiles_ * kTileRows * row_bytes_);
    offsets_ = reinterpret_cast<int32_t*>(row_scales_ + num_tiles_ * kTileRows);
  }

  void operator()() const {
#pragma omp parallel if (this->is_parallel())
    {
      const int64_t thread = omp_get_thread_num(), count = omp_get_num_threads();
      const int64_t begin = thread * num_panels_ / count, end = (thread + 1) * num_panels_ / count;
      const int64_t run_size = std::min(kRunTiles, num_tiles_) * kTileRows * kPanel;  // sums
      const int64_t num_waiting = row_bytes_ > block_ ? std::max<int64_t>(1, end - begin) : 1;
      static thread_local Scratch memory;
      char* buffer = memory.reserve(static_cast<size_t>(std::max(padded_ + 64, kPanel * expanded_ + num_waiting * run_size * 4)));
      float* sums = reinterpret_cast<float*>(buffer + kPanel * expanded_);
#pragma omp for schedule(static)
      for (int64_t m = 0; m < num_tiles_ * kTileRows; ++m) arrange(m, reinterpret_cast<int8_t*>(buffer));
      configure_steps(std::min(num_rows_, kTileRows), piece_ % 64 == 0 ? 64 : 32);
      for (int64_t t = 0; t < num_tiles_; t += kRunTiles)
        for (int64_t k = 0; k < row_bytes_; k += block_)
          for (int64_t p = begin; p < end; ++p) {
            float* to = sums + (num_waiting > 1 ? (p - begin) * run_size : 0);
            is_direct_ ? multiply(p, p + 1 < end, k, t, to) : expand_and_multiply(p, k, t, buffer, to);
          }
      _tile_release();
    }
  }

 private:
  static constexpr int64_t kMostInGroup = 512;
  // Measured on Emerald Rapids, 2048 x 2048, time on vectors over time on tiles: 8 bits 0.89 at 12 rows, 1.26 at 16; 4 bits
  // 0.63 (groups of 32) and 0.89 (128) at 8 rows, 1.4 at 12.
  static constexpr int64_t kFewestRows = kBits == 8 ? 13 : 9;

  char* tile(int64_t t) const { return packed_ + t * kTileRows * row_bytes_; }
  int64_t rows_in(int64_t t) const { return std::min(kTileRows, num_rows_ - t * kTileRows); }

  // Row m of the tiles, zeros behind the last one.
  void arrange(int64_t m, int8_t* bytes) const {
    char* to = tile(m / kTileRows) + m % kTileRows * 64;
    if (m >= num_rows_) {
      for (int64_t k = 0; k < row_bytes_; k += 64, to += kTileBytes) std::memset(to, 0, 64);
    } else if (a.int8_activations) {
      this->quantise(m, bytes, to, kTileBytes, row_scales_[m], is_direct_ ? offsets_ + m : nullptr);
    } else {
      const __m512i order = _mm512_maskz_broadcast_i32x4(kAll, *reinterpret_cast<const __m128i*>(kPairOrder));
      const uint16_t* x = static_cast<const uint16_t*>(this->row(m));
      for (int64_t k = 0; k < padded_; k += 32, to += kTileBytes) {
        const int64_t count = std::min<int64_t>(32, a.num_in - k);
        const __mmask32 mask = count >= 32 ? ~0u : count > 0 ? (1u << count) - 1 : 0;
        const __m512i numbers = _mm512_maskz_loadu_epi16(mask, x + k);
        _mm512_store_si512(to, kBits == 4 ? _mm512_shuffle_epi8(numbers, order) : numbers);
      }
    }
  }

  // One panel, one block of K, one run of tiles from t on. sums [rows of the run, kPanel].
  void multiply(int64_t p, bool has_next, int64_t k, int64_t t, float* sums) const {
    const int64_t end = std::min(row_bytes_, k + block_), num_steps = (end - k) / 64;
    const int64_t last = std::min(num_tiles_, t + kRunTiles), num_pairs = (last - t + 1) / 2;
    const uint32_t* weights = this->panel(p) + k / 4 * kPanel;
    const char* next = reinterpret_cast<const char*>(num_pairs == 1 ? weights + 2048 : this->panel(p + 1) + k / 4 * kPanel);
    const int64_t lines = num_pairs == 1 || has_next ? 32 / num_pairs : 0;
    for (; t < last; t += 2, sums += 2 * kTileRows * kPanel) {
      const bool is_pair = t + 1 < last;
      const int64_t at = k * kTileRows, count = rows_in(t) + (is_pair ? rows_in(t + 1) : 0);
      integer_tiles(weights, tile(t) + at, is_pair ? tile(t + 1) + at : nullptr, num_steps, k == 0,
                    reinterpret_cast<int32_t*>(sums), next, lines);
      next += lines * 64 * num_steps;
      if (end == row_bytes_) finish_integers(p, t * kTileRows, count, sums);
    }
  }

  void finish_integers(int64_t p, int64_t m, int64_t count, float* sums) const {
    const float* scales = reinterpret_cast<const float*>(this->scales(p));
    for (int64_t r = 0; r < count; ++r)
      for (int64_t i = 0; i < kPanel; i += kLanes) {
        float* at = sums + r * kPanel + i;
        const i32x16 sum = bit_cast<i32x16>(load16(at)) - offsets_[m + r];
        store16(at, __builtin_convertvector(sum, f32x16) * load16(scales + i));
      }
    this->finish(p, m, count, sums, row_scales_);
  }

  void expand_and_multiply(int64_t p, int64_t k, int64_t first, char* expanded, float* totals) const {
    const int64_t last = std::min(num_tiles_, first + kRunTiles), block_end = std::min(row_bytes_, k + block_);
    for (; k < block_end; k += expanded_) {
      const int64_t end = std::min(block_end, k + expanded_), half_size = (end - k) * 16;
      const int64_t unit = k / item_size_ / kUnit<kBits>, num_units = std::min((end - k) / item_size_ / kUnit<kBits>, units_ - unit);
      const uint32_t* weights = this->panel(p) + unit * kPanel;
      if (a.int8_activations) expand_bytes4(weights, num_units, expanded, half_size);
      else if (kBits == 4) expand_pairs4(weights, num_units, expanded, half_size);
      else expand_pairs8(weights, num_units, expanded, half_size);
      asm volatile("" : : : "memory");  // GCC 12's intrinsics do not admit to reading
      const int64_t real_end = k + num_units * kUnit<kBits> * item_size_;  // a row of 4-bit weights may end within a step
      const int64_t index = kBits == 8 ? 0 : k / piece_;
      const Pieces<Scale<kBits>> pieces{k, real_end, piece_, this->scales(p) + index * kPanel, kBits == 8 ? 0 : kPanel};
      for (int64_t t = first; t < last; t += 2)
        multiply_expanded(t, t + 1 < last, expanded, half_size, pieces,
                          totals + (t - first) * kTileRows * kPanel);
    }
    if (block_end == row_bytes_)
      for (int64_t t = first; t < last; ++t)
        this->finish(p, t * kTileRows, rows_in(t), totals + (t - first) * kTileRows * kPanel, row_scales_);
  }

  // One or two tiles of rows by one panel's block. totals [their rows, kPanel].
  void multiply_expanded(int64_t t, bool is_pair, const char* w, int64_t half_size, const Pieces<Scale<kBits>>& pieces,
                         float* totals) const {
    const int64_t num_rows = rows_in(t) + (is_pair ? rows_in(t + 1) : 0);
    const char *x0 = tile(t), *x1 = is_pair ? tile(t + 1) : nullptr;
    const bool is_first = pieces.begin == 0;
    if (!a.int8_activations) multiply_block<false, 64>(num_rows, x0, x1, w, half_size, pieces, is_first, totals);
    else if (piece_ == 32) multiply_block<true, 32>(num_rows, x0, x1, w, half_size, pieces, is_first, totals);
    else multiply_block<true, 64>(num_rows, x0, x1, w, half_size, pieces, is_first, totals);
  }

  const int64_t item_size_, row_bytes_, num_tiles_;
  const bool is_direct_;
  int64_t piece_, expanded_, block_;  // bytes of a row of activations
  char* packed_;                      // tile by tile: [row_bytes_ / 64, 16, 64]
  float* row_scales_;                 // [rows]
  int32_t* offsets_;                  // [rows], of 8-bit weights
};

}  // namespace tritium
#endif
