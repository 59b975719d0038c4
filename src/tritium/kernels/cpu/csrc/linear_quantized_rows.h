// What a quantised linear does in the dtype of its activations: rows of them become int8 or fp32, and sums become outputs.
// The rest of it knows no dtype: it calls these through `RowFunctions`.
#pragma once
#include "linear_outputs.h"
#include "linear_quantized.h"
#include "quantise_row.h"

namespace tritium {

struct QuantizedLinearArgs {
  const void *x, *weight, *bias;  // packed; bias [num_out], [2 num_out] when gated, in x's dtype, or null
  const float* units;             // [panels, kPanel]
  const int16_t* steps;           // [panels, num_groups, kPanel]; of 4 bits
  void* out;                               // [rows, num_out], dense
  int64_t num_outer, num_inner, stride_outer, stride_inner;  // rows of x
  int64_t num_in, num_out, num_groups;
  int64_t kind;  // of the activation; -1: none
  int32_t bits, int8_activations, is_gated;
  const void* residual;  // [rows, num_out], dense, added to the rounded result; null: none
  int64_t has_rows;      // rows of x are int8 already, each with its scale behind it
  int32_t path;          // a `Path`
};
// How sums of int8 activations are made, all with the same bits; with others the machine has one path, whatever stands here.
enum Path : int32_t { kAuto, kVectors, kTiles, kGroups };

// A row as fp32, `stride` numbers apart.
template <class T> void widen_row(const void* row, int64_t count, float* to, int64_t stride) {
  for (int64_t k = 0; k < count; ++k) to[k * stride] = to_float(static_cast<const T*>(row)[k]);
}

// One panel's outputs of some rows from their totals [num_rows, kPanel]; row_scales null: 1.
template <class T>
void finish_rows(const QuantizedLinearArgs& a, int64_t panel, int64_t m, int64_t num_rows, const float* totals,
                 const float* row_scales) {
  const auto scale = [=](int64_t row) { return row_scales == nullptr ? 1.0f : row_scales[row]; };
  finish_panel<T>(a, panel, m, num_rows, totals, scale, [](const T*, int64_t) {}, static_cast<const T*>(a.residual));
}

struct RowFunctions {
  int64_t item_size;
  bool is_bf16;
  float (*quantise)(const void*, int64_t, int64_t, int8_t*);
  void (*widen)(const void*, int64_t, float*, int64_t);
  void (*finish)(const QuantizedLinearArgs&, int64_t, int64_t, int64_t, const float*, const float*);
};
template <class T>
constexpr RowFunctions kRowFunctions{sizeof(T), kIsBf16<T>, quantise_row<T>, widen_row<T>, finish_rows<T>};

// What both ways to compute a quantised linear know.
template <int kBits> class Quantized {
 public:
  Quantized(const QuantizedLinearArgs& args, const RowFunctions& functions)
      : a(args), typed(functions), num_rows_(a.num_outer * a.num_inner), num_panels_(panels_of(a.num_out, a.is_gated)),
        units_(padded_units<kBits>(a.num_in)), padded_(round_up(a.num_in, kPadK)) {}

 protected:
  bool is_parallel() const {
    const int64_t num_weights = padded_ * a.num_out;
    return is_worth_threads(num_weights * kBits / 8, num_weights * num_rows_);
  }
  const void* row(int64_t m) const {
    const int64_t index = m / a.num_inner * a.stride_outer + m % a.num_inner * a.stride_inner;
    return static_cast<const char*>(a.x) + index * (a.has_rows ? 1 : typed.item_size);
  }
  const uint32_t* panel(int64_t p) const { return static_cast<const uint32_t*>(a.weight) + p * units_ * kPanel; }
  int64_t panel_bytes() const { return units_ * kPanel * static_cast<int64_t>(sizeof(uint32_t)); }
  const int16_t* steps(int64_t p) const { return a.steps + p * a.num_groups * kPanel; }
  const float* units(int64_t p) const { return a.units + p * kPanel; }

  // Row m as int8: every 64 numbers go `stride` bytes further. offsets: one for every `size` inputs of the row.
  void quantise(int64_t m, int8_t* bytes, char* to, int64_t stride, float& scale, int32_t* offsets, int64_t size,
                int32_t offset) const {
    if (a.has_rows) {
      std::memcpy(bytes, row(m), static_cast<size_t>(a.num_in));
      std::memcpy(&scale, static_cast<const char*>(row(m)) + a.num_in, sizeof(scale));
      std::memset(bytes + a.num_in, 0, static_cast<size_t>(padded_ - a.num_in));
    } else {
      scale = typed.quantise(row(m), a.num_in, padded_, bytes);
    }
    for (int64_t k = 0; k < padded_; k += size) {
      int32_t total = 0;
      for (int64_t i = k; i < std::min(k + size, padded_); ++i) total += bytes[i];
      *offsets++ = -offset * total;
    }
    for (int64_t k = 0; k < padded_; k += 64, to += stride) std::memcpy(to, bytes + k, 64);
  }

  void finish(int64_t p, int64_t m, int64_t num_rows, const float* totals, const float* row_scales) const {
    typed.finish(a, p, m, num_rows, totals, a.int8_activations ? row_scales : nullptr);
  }

  const QuantizedLinearArgs& a;
  const RowFunctions& typed;
  const int64_t num_rows_, num_panels_, units_, padded_;
};

}  // namespace tritium
