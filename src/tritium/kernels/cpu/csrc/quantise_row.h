// A row of numbers as int8 and a scale, by its largest element: round(x * 127 / max), halves to even; the scale is max / 127.
// Bit for bit ops.quantized.quantize_rows.
#pragma once
#include <algorithm>

#include "tritium.h"

namespace tritium {

typedef int8_t i8x16 __attribute__((vector_size(16)));
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

// Returns the row's scale, NaN for a row that is not finite; zeros up to `padded`.
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

// A head's row of int8: `size` numbers to one place, the scale, which need not be aligned, to another.
constexpr int64_t kScaleBytes = sizeof(float);
template <class T> inline void quantise_head(const T* x, int64_t size, char* to, char* scale_to) {
  const float scale = quantise_row<T>(x, size, size, reinterpret_cast<int8_t*>(to));
  std::memcpy(scale_to, &scale, sizeof(scale));
}

}  // namespace tritium
