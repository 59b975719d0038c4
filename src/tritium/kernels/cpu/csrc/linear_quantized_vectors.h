// A quantised linear on the vector units: rows in groups of up to kMostRows.
#pragma once
#include "linear_quantized_rows.h"

namespace tritium {

template <int kBits> class VectorQuantized : Quantized<kBits> {
  using Base = Quantized<kBits>;
  using Base::a, Base::typed, Base::num_rows_, Base::num_panels_, Base::units_, Base::padded_;

 public:
  VectorQuantized(const QuantizedLinearArgs& args, const RowFunctions& functions, Scratch& memory)
      : Base(args, functions), num_row_groups_((num_rows_ + kMostRows - 1) / kMostRows),
        num_offsets_(a.int8_activations ? padded_ / offset_size<kBits>(padded_) : 0) {
    const int64_t bytes_per_row = padded_ * (a.int8_activations ? 1 : 4);
    packed_ = memory.reserve(static_cast<size_t>(num_rows_ * (bytes_per_row + 4 + 4 * num_offsets_)));
    row_scales_ = reinterpret_cast<float*>(packed_ + num_rows_ * bytes_per_row);
    offsets_ = reinterpret_cast<int32_t*>(row_scales_ + num_rows_);
  }

  void operator()() const {
#pragma omp parallel if (this->is_parallel())
    {
      static thread_local Scratch memory;
      float* buffer = reinterpret_cast<float*>(
          memory.reserve(static_cast<size_t>(std::max(kMostRows * kPanel * 4, padded_ + 64))));
#pragma omp for schedule(static)
      for (int64_t m = 0; m < num_rows_; ++m) arrange(m, buffer);
      const int64_t num_runs = runs_of(num_panels_, this->panel_bytes());
#pragma omp for schedule(dynamic, 1) nowait
      for (int64_t i = 0; i < num_runs; ++i)
        for (int64_t p = i * num_panels_ / num_runs; p < (i + 1) * num_panels_ / num_runs; ++p) multiply(p, buffer);
    }
  }

 private:
  int64_t first_row(int64_t g) const { return g * num_rows_ / num_row_groups_; }

  void arrange(int64_t m, void* buffer) const {
    int64_t g = m * num_row_groups_ / num_rows_;
    while (first_row(g + 1) <= m) ++g;
    const int64_t first = first_row(g), count = first_row(g + 1) - first, r = m - first;
    if (a.int8_activations)
      return this->quantise(m, static_cast<int8_t*>(buffer), packed_ + first * padded_ + 64 * r, 64 * count,
                            row_scales_[m], offsets_ + m * num_offsets_, offset_size<kBits>(padded_), kOffset<kBits>);
    float* to = reinterpret_cast<float*>(packed_) + first * padded_ + r;
    typed.widen(this->row(m), a.num_in, to, count);
    for (int64_t k = a.num_in; k < padded_; ++k) to[k * count] = 0.0f;
  }

  void multiply(int64_t p, float* totals) const {
    for (int64_t g = 0; g < num_row_groups_; ++g) {
      const int64_t first = first_row(g), count = first_row(g + 1) - first;
      const Work<kBits> work{this->panel(p), packed_ + first * padded_ * (a.int8_activations ? 1 : 4), this->steps(p),
                             this->units(p), offsets_ + first * num_offsets_, a.num_groups, units_ / a.num_groups, num_offsets_, totals};
      run(static_cast<int>(count), a.int8_activations, work, std::make_integer_sequence<int, kMostRows>{});
      this->finish(p, first, count, totals, row_scales_);
    }
  }

  const int64_t num_row_groups_, num_offsets_;  // offsets: of a row
  char* packed_;       // row group by row group: int8 [K / 64, rows, 64], or floats [K, rows]
  float* row_scales_;  // [rows]
  int32_t* offsets_;   // [rows, num_offsets_]
};

}  // namespace tritium
