// What a quantised linear does in the dtype of its activations: rows of them become int8 or fp32, and sums become outputs.
// The rest of it knows no dtype: it calls these through `RowFunctions`.
#pragma once
#include "linear_quantized.h"

namespace tritium {

struct QuantizedLinearArgs {
  const void *x, *weight, *scales, *bias;  // packed; bias [num_out] in x's dtype, or null
  void* out;                               // [rows, num_out], dense
  int64_t num_outer, num_inner, stride_outer, stride_inner;  // rows of x
  int64_t num_in, num_out, num_groups;
  int32_t bits, int8_activations;
};

typedef int8_t i8x16 __attribute__((vector_size(16)));
typedef uint16_t u16x32 __attribute__((vector_size(64)));
constexpr float kTiny = 1e-30f;  // rows with no larger element count as zero: 127 / max would not be finite

// The bits of the largest magnitude of a row, as fp32; magnitudes are ordered like their bits, NaN last.
inline uint32_t largest_magnitude(const float* x, int64_t count) {
  i32x16 largest = {};
  for_vectors(count, [&](int64_t i, int64_t n) {
    const i32x16 magnitude = bit_cast<i32x16>(load(x + i, n)) & 0x7fffffff;
    largest = magnitude > largest ? magnitude : largest;
  });
  int32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits = std::max<int32_t>(bits, largest[i]);
  return static_cast<uint32_t>(bits);
}
template <class T> inline uint32_t largest_magnitude(const T* x, int64_t count) {
  u16x32 largest = {};
  int64_t i = 0;
  for (; i + 32 <= count; i += 32) {
    u16x32 magnitude;
    std::memcpy(&magnitude, x + i, sizeof(magnitude));
    magnitude &= 0x7fff;
    largest = magnitude > largest ? magnitude : largest;
  }
  T most{};
  for (int lane = 0; lane < 32; ++lane) most.bits = std::max<uint16_t>(most.bits, largest[lane]);
  for (; i < count; ++i) most.bits = std::max<uint16_t>(most.bits, x[i].bits & 0x7fff);
  return bit_cast<uint32_t>(to_float(most)) & 0x7fffffffu;
}

// A row to int8 by its largest element: round(x * 127 / max), to nearest even; zeros up to `padded`. Returns its scale, NaN
// for a row that is not finite.
template <class T> float quantise_row(const void* row, int64_t count, int64_t padded, int8_t* to) {
  const T* x = static_cast<const T*>(row);
  const uint32_t bits = largest_magnitude(x, count);
  const bool is_finite = bits < 0x7f800000;
  std::memset(to + count, 0, static_cast<size_t>(padded - count));
  if (!is_finite) {
    std::memset(to, 0, static_cast<size_t>(count));
    return bit_cast<float>(0x7fc00000);
  }
  const float max = bit_cast<float>(bits), inverse = max >= kTiny ? 127.0f / max : 0.0f;
  for_vectors(count, [&](int64_t i, int64_t n) {
    const i32x16 q = bit_cast<i32x16>(load(x + i, n) * inverse + 12582912.0f) - 0x4b400000;  // 1.5 * 2^23 rounds
    const auto narrowed = __builtin_convertvector(q, i8x16);
    std::memcpy(to + i, &narrowed, static_cast<size_t>(n));
  });
  return max * (1.0f / 127.0f);
}

// A row as fp32, `stride` numbers apart.
template <class T> void widen_row(const void* row, int64_t count, float* to, int64_t stride) {
  for (int64_t k = 0; k < count; ++k) to[k * stride] = to_float(static_cast<const T*>(row)[k]);
}

// Rows of outputs from `first` on, as many as a panel has, from their totals [num_rows, kPanel]; row_scales null: 1.
template <class T>
void finish_rows(const QuantizedLinearArgs& a, int64_t first, int64_t m, int64_t num_rows, const float* totals,
                 const float* row_scales) {
  const int64_t width = std::min(kPanel, a.num_out - first);
  const T* bias = a.bias == nullptr ? nullptr : static_cast<const T*>(a.bias) + first;
  for (int64_t r = 0; r < num_rows; ++r) {
    T* out = static_cast<T*>(a.out) + (m + r) * a.num_out + first;
    const float scale = row_scales == nullptr ? 1.0f : row_scales[m + r];
    for_vectors(width, [&](int64_t i, int64_t n) {
      const f32x16 y = load16(totals + r * kPanel + i) * scale;
      store(out + i, bias == nullptr ? y : y + load(bias + i, n), n);
    });
  }
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
      : a(args), typed(functions), num_rows_(a.num_outer * a.num_inner), num_panels_((a.num_out + kPanel - 1) / kPanel),
        units_(padded_units<kBits>(a.num_in)), padded_(round_up(a.num_in, kPadK)) {}

 protected:
  bool is_worth_threads() const {
    const int64_t num_weights = padded_ * a.num_out;
    return num_weights * kBits / 8 > (1 << 19) || num_weights * num_rows_ > (1 << 23);
  }
  const void* row(int64_t m) const {
    const int64_t index = m / a.num_inner * a.stride_outer + m % a.num_inner * a.stride_inner;
    return static_cast<const char*>(a.x) + index * typed.item_size;
  }
  const uint32_t* panel(int64_t p) const { return static_cast<const uint32_t*>(a.weight) + p * units_ * kPanel; }
  const Scale<kBits>* scales(int64_t p) const {
    return static_cast<const Scale<kBits>*>(a.scales) + p * a.num_groups * kPanel;
  }

  // Row m as int8: every 64 numbers go `stride` bytes further. offsets [num_groups] of the row, perhaps null.
  void quantise(int64_t m, int8_t* bytes, char* to, int64_t stride, float& scale, int32_t* offsets) const {
    scale = typed.quantise(row(m), a.num_in, padded_, bytes);
    const int64_t group = units_ * kUnit<kBits> / a.num_groups;
    for (int64_t j = 0; offsets != nullptr && j < a.num_groups; ++j) {
      int32_t total = 0;
      for (int64_t k = j * group; k < (j + 1) * group; ++k) total += bytes[k];
      offsets[j] = total * kOffset<kBits>;
    }
    for (int64_t k = 0; k < padded_; k += 64, to += stride) std::memcpy(to, bytes + k, 64);
  }

  void finish(int64_t p, int64_t m, int64_t num_rows, const float* totals, const float* row_scales) const {
    typed.finish(a, p * kPanel, m, num_rows, totals, a.int8_activations ? row_scales : nullptr);
  }

  const QuantizedLinearArgs& a;
  const RowFunctions& typed;
  const int64_t num_rows_, num_panels_, units_, padded_;
};

}  // namespace tritium
