// What plain and quantised linears share around their sums: which output lies where in a packed weight, and how a panel's
// sums become outputs.
//
// A gated linear has 2 num_out outputs, gates before the values they gate, and writes num_out. In its packed weight a panel
// holds half gates and half what they gate, so that a panel's sums are all that its outputs need.
#pragma once
#include <omp.h>

#include "activation.h"
#include "linear.h"

namespace tritium {

constexpr int64_t kHalf = kPanel / 2;

// Below about 50 us one thread is faster than a parallel region is safe (tritium.h).
inline bool is_worth_threads(int64_t weight_bytes, int64_t num_products) {
  return weight_bytes > (1 << 19) || num_products > (1 << 23);
}

// Runs of panels that threads take one after the other, so that one whose core does other work too takes fewer. Several a
// thread, for the last is waited for; none short, for rows and prefetching begin anew in each. Of 2 threads on a machine
// with nothing else to do this took 0.85 to 1.0 of the time of equal halves.
inline int64_t runs_of(int64_t num_panels, int64_t panel_bytes) {
  constexpr int64_t kRunsPerThread = 8, kFewestBytes = 1 << 18;
  const int64_t num_threads = omp_get_num_threads(), most = num_panels * panel_bytes / kFewestBytes;
  return num_threads == 1 ? 1 : std::min(num_panels, std::clamp(most, num_threads, kRunsPerThread * num_threads));
}

// Panels of a linear that writes num_out outputs.
inline int64_t panels_of(int64_t num_out, bool is_gated) {
  const int64_t in_panel = is_gated ? kHalf : kPanel;
  return (num_out + in_panel - 1) / in_panel;
}

// Panels of a weight, and the row of it that lies in place i of panel p; -1: none does. num_rows counts gates and what they
// gate.
inline int64_t panels_in(int64_t num_rows, bool is_gated) { return panels_of(is_gated ? num_rows / 2 : num_rows, is_gated); }
inline int64_t row_in(int64_t p, int64_t i, int64_t num_rows, bool is_gated) {
  if (!is_gated) return p * kPanel + i < num_rows ? p * kPanel + i : -1;
  const int64_t gate = p * kHalf + i % kHalf;
  return gate >= num_rows / 2 ? -1 : i < kHalf ? gate : num_rows / 2 + gate;
}

// One panel's outputs of `num_rows` rows, m the first, from their sums [num_rows, kPanel], each times row_scale(m + r);
// expect(out, width) is called before a row is written. What an activation reads is rounded first, as it would be in
// memory, and so is what a residual [rows, num_out] is added to: the bits are those of two steps.
template <class T, class Args, class RowScale, class Expect>
void finish_panel(const Args& a, int64_t p, int64_t m, int64_t num_rows, const float* sums, RowScale row_scale, Expect expect,
                  const T* residual = nullptr) {
  const int64_t in_panel = a.is_gated ? kHalf : kPanel, first = p * in_panel, width = std::min(in_panel, a.num_out - first);
  const T* bias = a.bias == nullptr ? nullptr : static_cast<const T*>(a.bias) + first;
  for (int64_t r = 0; r < num_rows; ++r, sums += kPanel) {
    T* out = static_cast<T*>(a.out) + (m + r) * a.num_out + first;
    const float scale = row_scale(m + r);
    expect(out, width);
    if (a.is_gated)
      for_vectors(width, [&](int64_t i, int64_t n) {
        f32x16 gate = load(sums + i, n) * scale, up = load(sums + kHalf + i, n) * scale;
        if (bias != nullptr) gate += load(bias + i, n), up += load(bias + a.num_out + i, n);
        store(out + i, round_to(apply(a.kind, round_to(gate, T{})), T{}) * round_to(up, T{}), n);
      });
    else
      for_vectors(width, [&](int64_t i, int64_t n) {
        f32x16 total = load16(sums + i) * scale;
        if (bias != nullptr) total += load(bias + i, n);
        if (residual != nullptr) total = round_to(total, T{}) + load(residual + (m + r) * a.num_out + first + i, n);
        store(out + i, a.kind < 0 ? total : apply(a.kind, round_to(total, T{})), n);
      });
  }
}

}  // namespace tritium
