// The activation functions, on vectors: for the kernels of their own, and for those that apply one to what they have made.
#pragma once
#include "tritium.h"

namespace tritium {

enum Kind : int64_t { kSilu, kGelu, kGeluTanh, kRelu, kQuickGelu };  // the order of ops.activations.KINDS

inline f32x16 sigmoid_times(f32x16 x, f32x16 argument) { return x / (1.0f + exp16(-argument)); }

// erf to 1 ulp: a polynomial near 0, 1 - e^polynomial beyond (N. Juffa's coefficients).
inline f32x16 erf16(f32x16 x) {
  const f32x16 t = bit_cast<f32x16>(bit_cast<u32x16>(x) & 0x7fffffffu), s = x * x;
  f32x16 far = fma(splat(-1.72853470e-5f), t, splat(3.83197126e-4f));
  far = fma(far, s, fma(splat(-3.88396438e-3f), t, splat(2.42546219e-2f)));
  for (const float c : {-1.06777877e-1f, -6.34846687e-1f, -1.28717512e-1f}) far = fma(far, t, splat(c));
  far = 1.0f - exp16(fma(far, t, -t));
  far = bit_cast<f32x16>(bit_cast<u32x16>(far) | (bit_cast<u32x16>(x) & 0x80000000u));
  f32x16 near = splat(-5.96761703e-4f);
  for (const float c : {4.99119423e-3f, -2.67681349e-2f, 1.12819925e-1f, -3.76125336e-1f, 1.28379166e-1f})
    near = fma(near, s, splat(c));
  near = fma(near, x, x);
  return t > 0.927734375f ? far : near;
}

// The branch is the same for all vectors of a call: predicted, and a fifth of the code of a template per kind.
inline f32x16 apply(int64_t kind, f32x16 x) {
  switch (kind) {
    case kSilu: return sigmoid_times(x, x);
    case kGelu: return 0.5f * x * (1.0f + erf16(x * 0.70710678118654752f));
    // 0.5 (1 + tanh u) is the sigmoid of 2u: no cancellation for negative x
    case kGeluTanh: return sigmoid_times(x, 1.5957691216057308f * (x + 0.044715f * (x * x * x)));
    case kRelu: return x < 0.0f ? splat(0.0f) : x;
    default: return sigmoid_times(x, 1.702f * x);
  }
}

}  // namespace tritium
