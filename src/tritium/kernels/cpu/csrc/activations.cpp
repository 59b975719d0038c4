// activation, gated_activation: element-wise, over rows that may be views of a wider projection.
#include "tritium.h"

namespace {
using namespace tritium;

enum Kind : int64_t { kSilu, kGelu, kGeluTanh, kRelu, kQuickGelu };  // the order of ops.activations.KINDS

constexpr int64_t kCostOfExp = 3;  // measured: a silu of bf16 takes as long as 2 to 3 elements of a norm

struct ActivationArgs {
  const void* x;
  void* out;                                                       // dense
  int64_t num_outer, num_inner, stride_outer, stride_inner, size;  // of x
  int64_t kind;
};

struct GatedActivationArgs {
  const void *gate, *up;
  void* out;  // dense
  int64_t num_outer, num_inner, gate_stride_outer, gate_stride_inner, up_stride_outer, up_stride_inner, size;
  int64_t kind;
};

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

template <class T> void activation(const ActivationArgs& a) {
  for_rows(a.num_outer * a.num_inner, kCostOfExp * a.size, [&](int64_t row) {
    const T* x = static_cast<const T*>(a.x) + row / a.num_inner * a.stride_outer + row % a.num_inner * a.stride_inner;
    T* out = static_cast<T*>(a.out) + row * a.size;
    for_vectors(a.size, [&](int64_t i, int64_t count) { store(out + i, apply(a.kind, load(x + i, count)), count); });
  });
}

template <class T> void gated_activation(const GatedActivationArgs& a) {
  for_rows(a.num_outer * a.num_inner, kCostOfExp * a.size, [&](int64_t row) {
    const int64_t outer = row / a.num_inner, inner = row % a.num_inner;
    const T* gate = static_cast<const T*>(a.gate) + outer * a.gate_stride_outer + inner * a.gate_stride_inner;
    const T* up = static_cast<const T*>(a.up) + outer * a.up_stride_outer + inner * a.up_stride_inner;
    T* out = static_cast<T*>(a.out) + row * a.size;
    for_vectors(a.size, [&](int64_t i, int64_t count) {
      store(out + i, round_to(apply(a.kind, load(gate + i, count)), T{}) * load(up + i, count), count);
    });
  });
}

}  // namespace

TRITIUM_EXPORT(activation, ActivationArgs)
TRITIUM_EXPORT(gated_activation, GatedActivationArgs)
