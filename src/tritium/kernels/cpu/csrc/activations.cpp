// activation, gated_activation: element-wise, over rows that may be views of a wider projection.
#include "activation.h"

namespace {
using namespace tritium;

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
