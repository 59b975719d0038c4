// A quantised linear on AMX tiles: who computes which rows and panels when. The arithmetic is in linear_quantized_amx.h.
#pragma once
#include "linear_quantized_amx.h"
#include "linear_quantized_rows.h"

#if defined(TRITIUM_QUANTIZED_TILES)
#include <omp.h>

namespace tritium {

constexpr int64_t kBytesInL2 = 4096;   // of a row of activations at once
constexpr int64_t kRunBytes = 1 << 20;  // of activations that stay in L2 while panels pass by
constexpr int64_t kMostRunTiles = 64;   // 16 rows each

// Rows go in runs and K in blocks, so that a run's block of activations stays in L2 while the panels pass by; where K has
// several blocks, sums wait in memory. With int8 activations few rows are faster on the vector units, which give the same
// bits.
template <int kBits> class TiledQuantized : Quantized<kBits> {
  using Base = Quantized<kBits>;
  using Base::a, Base::typed, Base::num_rows_, Base::num_panels_, Base::units_, Base::padded_;

 public:
  static bool is_for(const QuantizedLinearArgs& a, bool is_bf16) {
    const int64_t num_rows = a.num_outer * a.num_inner;
    if (!amx_is_granted()) return false;
    if (a.int8_activations) return a.path == kAuto ? num_rows >= fewest_rows(a) : a.path != kVectors;
    return is_bf16 && (kBits == 8 || a.num_in / a.num_groups <= kMostInGroup);
  }

  TiledQuantized(const QuantizedLinearArgs& args, const RowFunctions& functions, Scratch& memory)
      : Base(args, functions), item_size_(a.int8_activations ? 1 : 2), row_bytes_(padded_ * item_size_),
        num_tiles_((num_rows_ + kTileRows - 1) / kTileRows), is_direct_(kBits == 8 && a.int8_activations),
        is_grouped_(kBits == 4 && (!a.int8_activations || scales_groups(a))),
        sums_per_row_(kBits == 4 && a.int8_activations ? 2 * kPanel : kPanel),
        group_bytes_(a.num_in / a.num_groups * item_size_), pair_size_(2 * kTileRows * sums_per_row_) {
    // Where all rows are one pair nothing is read twice, and K needs no blocks.
    expanded_ = num_tiles_ <= 2 ? row_bytes_ : std::min(row_bytes_, kBytesInL2);
    if (is_grouped_) expanded_ = std::max<int64_t>(1, kStepsInL1 * kStep / group_bytes_) * group_bytes_;
    block_ = std::max<int64_t>(kBytesInL2 / expanded_, 1) * expanded_;
    run_tiles_ = std::clamp(kRunBytes / (kTileRows * std::min(row_bytes_, block_)), int64_t{2}, kMostRunTiles) / 2 * 2;
    num_kept_ = is_grouped_ ? (expanded_ + kStep - 1) / kStep : num_tiles_ <= 2 ? kStepsInL1 : block_ / kStep;
    num_halves_ = is_grouped_ ? 1 : sums_per_row_ / kPanel;
    expanded_bytes_ = is_direct_ ? 0 : num_kept_ * 2 * kTileBytes * num_halves_;
    is_one_block_ = row_bytes_ <= block_ && !is_grouped_;
    packed_ = memory.reserve(static_cast<size_t>(num_tiles_ * kTileRows * (row_bytes_ + 8)));
    row_scales_ = reinterpret_cast<float*>(packed_ + num_tiles_ * kTileRows * row_bytes_);
    offsets_ = reinterpret_cast<int32_t*>(row_scales_ + num_tiles_ * kTileRows);
  }

  void operator()() const {
#pragma omp parallel if (this->is_parallel())
    {
      const int64_t num_runs = runs_of(num_panels_, this->panel_bytes());
      const int64_t num_bytes = expanded_bytes_ + 4 * num_sums((num_panels_ + num_runs - 1) / num_runs);
      static thread_local Scratch memory;
      char* buffer = memory.reserve(static_cast<size_t>(std::max(padded_ + 64, num_bytes)));
#pragma omp for schedule(static)
      for (int64_t m = 0; m < num_tiles_ * kTileRows; ++m) arrange(m, reinterpret_cast<int8_t*>(buffer));
      configure_steps(std::min(num_rows_, kTileRows));
#pragma omp for schedule(dynamic, 1) nowait
      for (int64_t i = 0; i < num_runs; ++i)
        multiply_all(i * num_panels_ / num_runs, (i + 1) * num_panels_ / num_runs, buffer);
      _tile_release();
    }
  }

 private:
  static constexpr int64_t kMostInGroup = 512, kFewestInGroup = 128;
  // Measured on Emerald Rapids, 8192 x 2048, time on vectors over time on tiles: 8 bits 1.12 at 8 rows, 1.22 at 12; groups of 32
  // 0.84 at 14 rows, 0.95 at 16, 1.5 at 32. Groups of 128, which go group by group, take 0.73 to 0.80 of the time of other
  // tiles, and at 12 rows 0.94 of that on vectors.
  static int64_t fewest_rows(const QuantizedLinearArgs& a) { return kBits == 8 ? 8 : scales_groups(a) ? 13 : kTileRows + 1; }

  // 4 bits with int8 activations: where nothing else is asked for, groups of whole steps that are long enough.
  static bool scales_groups(const QuantizedLinearArgs& a) {
    const int64_t group = a.num_in / a.num_groups;
    const bool is_fit = group % kStep == 0 && group >= kFewestInGroup && group <= kMostInGroup;
    return a.path == kGroups || (a.path == kAuto && is_fit);
  }

  // Of a run of tiles; numbers of 32 bits that wait for more of K, or for the end of their pair, with so many panels.
  int64_t run_sums() const { return (std::min(run_tiles_, num_tiles_) + 1) / 2 * pair_size_; }
  int64_t num_sums(int64_t num_panels) const {
    return is_one_block_ ? pair_size_ : (row_bytes_ > block_ ? num_panels : 1) * run_sums();
  }

  // All rows of the panels from `begin` to `end`.
  void multiply_all(int64_t begin, int64_t end, char* buffer) const {
    float* sums = reinterpret_cast<float*>(buffer + expanded_bytes_);
    for (int64_t t = 0; t < num_tiles_; t += run_tiles_)
      for (int64_t k = 0; k < row_bytes_; k += block_)
        for (int64_t p = begin; p < end; ++p) {
          float* to = sums + (row_bytes_ > block_ ? (p - begin) * run_sums() : 0);
          const int64_t last = std::min(num_tiles_, t + run_tiles_);
          is_direct_ ? multiply(p, p + 1 < end, k, t, last, to) : expand_and_multiply(p, k, t, last, buffer, to);
        }
  }

  char* tile(int64_t t) const { return packed_ + t * kTileRows * row_bytes_; }
  int64_t rows_in(int64_t t) const { return std::min(kTileRows, num_rows_ - t * kTileRows); }

  // Row m of the tiles, zeros behind the last one.
  void arrange(int64_t m, int8_t* bytes) const {
    char* to = tile(m / kTileRows) + m % kTileRows * 64;
    if (m >= num_rows_) {
      for (int64_t k = 0; k < row_bytes_; k += 64, to += kTileBytes) std::memset(to, 0, 64);
    } else if (a.int8_activations) {
      this->quantise(m, bytes, to, kTileBytes, row_scales_[m], offsets_ + m, padded_, 128);
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

  // The place of a pair's sums: one for all where none wait for more of K.
  float* place(float* sums, int64_t pair) const { return sums + (is_one_block_ ? 0 : pair * pair_size_); }

  // One panel, one block of K, one run of tiles from `first` to `last`. sums: of the panel, pair by pair [rows, kPanel].
  void multiply(int64_t p, bool has_next, int64_t k, int64_t first, int64_t last, float* sums) const {
    const int64_t end = std::min(row_bytes_, k + block_), num_steps = (end - k) / 64;
    const int64_t num_pairs = (last - first + 1) / 2;
    const uint32_t* weights = this->panel(p) + k / 4 * kPanel;
    const char* next = reinterpret_cast<const char*>(num_pairs == 1 ? weights + 2048 : this->panel(p + 1) + k / 4 * kPanel);
    const int64_t lines = num_pairs == 1 || has_next ? 32 / num_pairs : 0;
    for (int64_t t = first; t < last; t += 2) {
      const bool is_pair = t + 1 < last;
      const int64_t at = k * kTileRows, count = rows_in(t) + (is_pair ? rows_in(t + 1) : 0);
      float* to = place(sums, (t - first) / 2);
      integer_tiles(weights, tile(t) + at, is_pair ? tile(t + 1) + at : nullptr, num_steps, k == 0, to, next, lines);
      next += lines * 64 * num_steps;
      if (end == row_bytes_) finish_pair(p, t * kTileRows, count, is_pair, to);
    }
  }

  // The same, expanding weights first. sums of 4 bits with int8 activations: two times [rows, kPanel], of two halves of the
  // panel one after the other; group by group, of the upper and the lower 16 bits.
  void expand_and_multiply(int64_t p, int64_t k, int64_t first, int64_t last, char* expanded, float* sums) const {
    const int64_t block_end = std::min(row_bytes_, k + block_);
    for (; k < block_end; k += expanded_) {
      const int64_t end = std::min(block_end, k + expanded_);
      for (int64_t t = first; t < last; t += 2) {
        const bool is_pair = t + 1 < last;
        const int64_t count = rows_in(t) + (is_pair ? rows_in(t + 1) : 0);
        float* const pair_sums = place(sums, (t - first) / 2);
        for (int64_t half = 0; half < num_halves_; ++half) {
          float* to = pair_sums + half * (is_pair ? 2 : 1) * kTileRows * kPanel;
          const auto add = [&](int64_t from, int64_t to, auto form) {
            const char *x0 = tile(t) + from * kTileRows, *x1 = is_pair ? tile(t + 1) + from * kTileRows : nullptr;
            char* w = expanded + (half * num_kept_ + (from - k) / kStep % num_kept_) * 2 * kTileBytes;
            const auto expand = [&](int64_t step, char* at) { expand_step(p, half, from + step * kStep, at); };
            const int64_t num_steps = (to - from + kStep - 1) / kStep;
            t == first ? add_steps<form>(x0, x1, w, num_kept_, num_steps, expand)
                       : add_steps<form>(x0, x1, w, num_kept_, num_steps, [](int64_t, char*) {});
          };
          if (is_grouped_) {
            const int64_t groups_end = std::min(end, a.num_in * item_size_);
            a.int8_activations ? add_integer_groups(p, is_pair, count, k, groups_end, to, add)
                               : add_groups(p, is_pair, count, k, groups_end, to, add);
          } else {
            k == 0 ? zero_sums() : load_sums(to, is_pair);
            add(k, end, std::integral_constant<Form, kBits == 4 ? Form::kShorts : Form::kPairs>{});
            store_sums(to, is_pair);
          }
        }
        if (end == row_bytes_) finish_pair(p, t * kTileRows, count, is_pair, pair_sums);
      }
    }
  }

  // Sums of a pair of tiles to outputs.
  void finish_pair(int64_t p, int64_t m, int64_t count, bool is_pair, float* sums) const {
    const float* units = this->units(p);
    for (int64_t r = 0; r < count; ++r) {
      float* to = sums + r * kPanel;
      f32x16 totals[2] = {load16(to), load16(to + kLanes)};
      if (is_direct_) {
        for (f32x16& total : totals) total = to_floats(bit_cast<i32x16>(total) + offsets_[m + r]);
      } else if (kBits == 4 && a.int8_activations) {
        const float* other = to + (is_pair ? 2 : 1) * kTileRows * kPanel;
        const f32x16 others[2] = {load16(other), load16(other + kLanes)};
        if (is_grouped_) {
          for (int i = 0; i < 2; ++i) totals[i] = rounded(bit_cast<i32x16>(totals[i]), bit_cast<i32x16>(others[i]));
        } else {
          totals[0] = put_together(totals[0], totals[1], m + r);
          totals[1] = put_together(others[0], others[1], m + r);
        }
      }
      for (int i = 0; i < 2; ++i) store16(to + i * kLanes, totals[i] * load16(units + i * kLanes));
    }
    this->finish(p, m, count, sums, row_scales_);
  }
  // 256 x upper + lower + the row's offset, rounded once.
  f32x16 put_together(f32x16 upper, f32x16 lower, int64_t m) const {
    const i32x16 high = bit_cast<i32x16>(upper), low = ((high & 255) << 8) + bit_cast<i32x16>(lower) + offsets_[m];
    return rounded((high >> 8) + (low >> 16), low & 0xffff);
  }

  // The step of K at `k` (bytes of a row) into two tiles.
  void expand_step(int64_t p, int64_t half, int64_t k, char* to) const {
    const uint32_t* panel = this->panel(p) + k / item_size_ / kUnit<kBits> * kPanel;
    if constexpr (kBits == 8) {
      expand_pairs8(panel, to);
    } else if (is_grouped_) {
      a.int8_activations ? expand_bytes4(panel, to) : expand_pairs4(panel, to);
    } else {
      const int64_t in_group = a.num_in / a.num_groups;
      for (int64_t piece = 0; piece < 2 && k < a.num_in; ++piece, k += kPiece, panel += 4 * kPanel, to += 512)
        expand_shorts4(panel + 16 * half, this->steps(p) + k / in_group * kPanel + 16 * half, to);
    }
  }

  // Whole groups from `k` to `end`: scale(at, sums) for each, beside the products of the one after it.
  template <Form kForm, class Add, class Scale>
  void for_groups(int64_t k, int64_t end, bool is_pair, Add add, Scale scale) const {
    alignas(64) int32_t sums[2 * kTileRows * kPanel];
    for (int64_t at = k; at < end; at += group_bytes_) {
      zero_sums();
      add(at, at + group_bytes_, std::integral_constant<Form, kForm>{});
      if (at > k) scale(at - group_bytes_, sums);
      store_sums(sums, is_pair);
    }
    scale(end - group_bytes_, sums);
  }

  // totals [count, kPanel] += each group's sums times its steps.
  template <class Add>
  void add_groups(int64_t p, bool is_pair, int64_t count, int64_t k, int64_t end, float* totals, Add add) const {
    for_groups<Form::kPairs>(k, end, is_pair, add, [&](int64_t at, const int32_t* sums) {
      const int16_t* steps = this->steps(p) + at / group_bytes_ * kPanel;
      const f32x16 step[2] = {to_floats(load_steps(steps)), to_floats(load_steps(steps + kLanes))};
      for (int64_t r = 0; r < count; ++r)
        for (int i = 0; i < 2; ++i) {
          float* to = totals + r * kPanel + i * kLanes;
          const f32x16 sum = bit_cast<f32x16>(load_ints(sums + r * kPanel + i * kLanes));
          store16(to, fma(sum, step[i], at == 0 ? f32x16{} : load16(to)));
        }
    });
  }

  // The same in integers. Up to kMostInGroup inputs, times a step, fit 32 bits; then the upper and the lower 16 are added to
  // totals, [count, kPanel] each, the lower ones a pair of tiles (or one) behind the upper ones.
  template <class Add>
  void add_integer_groups(int64_t p, bool is_pair, int64_t count, int64_t k, int64_t end, float* totals, Add add) const {
    alignas(64) int32_t products[2 * kTileRows * kPanel];
    for_groups<Form::kBytes>(k, end, is_pair, add, [&](int64_t at, const int32_t* sums) {
      const int16_t* steps = this->steps(p) + at / group_bytes_ * kPanel;
      const i32x16 step[2] = {load_steps(steps), load_steps(steps + kLanes)};
      for (int64_t r = 0; r < count; ++r)
        for (int i = 0; i < 2; ++i) {
          int32_t* to = products + r * kPanel + i * kLanes;
          keep_ints(to, (load_ints(sums + r * kPanel + i * kLanes) >> 4) * step[i] + (at == k ? i32x16{} : load_ints(to)));
        }
    });
    int32_t *upper = reinterpret_cast<int32_t*>(totals), *lower = upper + (is_pair ? 2 : 1) * kTileRows * kPanel;
    for (int64_t i = 0; i < count * kPanel; i += kLanes) {
      const i32x16 product = load_ints(products + i);
      keep_ints(upper + i, (product >> 16) + (k == 0 ? i32x16{} : load_ints(upper + i)));
      keep_ints(lower + i, (product & 0xffff) + (k == 0 ? i32x16{} : load_ints(lower + i)));
    }
  }
  static void keep_ints(int32_t* to, i32x16 x) { std::memcpy(to, &x, sizeof(x)); }

  const int64_t item_size_, row_bytes_, num_tiles_;
  const bool is_direct_, is_grouped_;  // read as they are packed; sums of a group wait for its step, not for the end of K
  const int64_t sums_per_row_, group_bytes_, pair_size_;  // numbers of a pair of tiles
  int64_t expanded_, block_, run_tiles_;  // bytes of a row of activations twice; tiles of rows
  int64_t num_kept_, num_halves_, expanded_bytes_;  // steps of expanded weights, of a half of the outputs; all of them
  bool is_one_block_;                     // of K: no sums wait for more
  char* packed_;                      // tile by tile: [row_bytes_ / 64, 16, 64]
  float* row_scales_;                 // [rows]
  int32_t* offsets_;                  // [rows]: -128 x sum(activations)
};

}  // namespace tritium
#endif
