// Transposition of kWide x kWide 32-bit units: 4 x 4 inside each 128-bit lane, then the lanes among each other.
#pragma once
#include <utility>

#include "softmax.h"

namespace tritium {

template <int... kFrom> inline u32xw pick(u32xw a, u32xw b, std::integer_sequence<int, kFrom...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, kFrom...);
#else
  return __builtin_shuffle(a, b, u32xw{static_cast<uint32_t>(kFrom)...});
#endif
}
// Each takes indices of the 2 * kWide units of a and b; i runs over the result.
constexpr int low_units(int i) { return i / 4 * 4 + i % 4 / 2 + i % 2 * kWide; }  // a0 b0 a1 b1 of each lane
constexpr int low_pairs(int i) { return i / 4 * 4 + i % 2 + i % 4 / 2 * kWide; }  // a0 a1 b0 b1 of each lane
constexpr int even_lanes(int i) { return i / 4 * 8 + i % 4; }                     // lanes 0, 2, .. of a, then of b
template <int (*index)(int), int kOffset, int... I>
inline u32xw pick(u32xw a, u32xw b, std::integer_sequence<int, I...>, int) {
  return pick(a, b, std::integer_sequence<int, (index(I) + kOffset)...>{});
}
template <int (*index)(int), int kOffset> inline void pick_both(u32xw& a, u32xw& b) {
  const auto all = std::make_integer_sequence<int, kWide>{};
  const u32xw low = pick<index, 0>(a, b, all, 0), high = pick<index, kOffset>(a, b, all, 0);
  a = low, b = high;
}
inline void transpose(u32xw (&x)[kWide]) {
  for (int i = 0; i < kWide; i += 4) {
    pick_both<low_units, 2>(x[i], x[i + 1]), pick_both<low_units, 2>(x[i + 2], x[i + 3]);
    pick_both<low_pairs, 2>(x[i], x[i + 2]), pick_both<low_pairs, 2>(x[i + 1], x[i + 3]);
    std::swap(x[i + 1], x[i + 2]);  // now lane l of x[i + k] is column 4 l + k of rows i to i + 3
  }
  for (int k = 0; k < 4; ++k) {
    if constexpr (kWide == 8) pick_both<even_lanes, 4>(x[k], x[4 + k]);
    if constexpr (kWide == 16) {
      pick_both<even_lanes, 4>(x[k], x[4 + k]), pick_both<even_lanes, 4>(x[8 + k], x[12 + k]);
      pick_both<even_lanes, 4>(x[k], x[8 + k]), pick_both<even_lanes, 4>(x[4 + k], x[12 + k]);
    }
  }
}

}  // namespace tritium
