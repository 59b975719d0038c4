// Packing a weight: the rows of a panel, cut into 32-bit units along K, become columns, kWide x kWide units at a time.
#pragma once
#include "linear_outputs.h"
#include "transpose.h"

namespace tritium {

using PanelRows = const char* [kPanel];  // where each row of a panel begins; null: it has none, and is filled with zeros

inline void find_rows(const void* weight, int64_t p, int64_t num_out, bool is_gated, int64_t row_bytes, PanelRows& rows) {
  for (int64_t i = 0; i < kPanel; ++i) {
    const int64_t n = row_in(p, i, num_out, is_gated);
    rows[i] = n < 0 ? nullptr : static_cast<const char*>(weight) + n * row_bytes;
  }
}

// to[u * kPanel + i] = change(unit u of row i) for the first units of `num_units`; returns how many, a multiple of kWide.
template <class F> int64_t pack_units(const PanelRows& rows, int64_t num_units, uint32_t* to, F change) {
  constexpr int64_t kUnitBytes = 4;
  int64_t u = 0;
  for (; u + kWide <= num_units; u += kWide)
    for (int64_t first = 0; first < kPanel; first += kWide) {
      u32xw x[kWide] = {};
      for (int64_t i = 0; i < kWide; ++i) {
        const char* row = rows[first + i];
        if (row == nullptr) continue;
        std::memcpy(&x[i], row + u * kUnitBytes, sizeof(x[i]));
        x[i] = change(x[i]);
      }
      transpose(x);
      for (int64_t k = 0; k < kWide; ++k) std::memcpy(to + (u + k) * kPanel + first, &x[k], sizeof(x[k]));
    }
  return u;
}

}  // namespace tritium
