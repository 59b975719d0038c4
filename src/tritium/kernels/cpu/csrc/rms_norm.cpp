// rms_norm: each row divided by its root mean square, times a weight. Rows lie in two levels of strides, so that a view
// of a fused qkv projection needs no copy. The order of a sum: 4 vectors of 16 lanes in turn, pairwise, then `sum`.
#include <cmath>

#include "tritium.h"

namespace {
using namespace tritium;

struct RmsNormArgs {
  const void *x, *weight;
  void* out;
  int64_t num_outer, num_inner, stride_outer, stride_inner;  // of x; out is dense
  int64_t size;                                              // elements in a row
  float eps, weight_offset;
  int32_t cast_before_weight;
};

template <class T> float mean_square(const T* x, int64_t size) {
  f32x16 sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= size; i += 4 * kLanes)
    for (int k = 0; k < 4; ++k) {
      f32x16 v = load16(x + i + k * kLanes);
      sums[k] += v * v;
    }
  for_vectors(size - i, [&](int64_t j, int64_t count) {
    f32x16 v = load(x + i + j, count);
    sums[0] += v * v;
  });
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3])) / static_cast<float>(size);
}

template <class T> void rms_norm(const RmsNormArgs& a) {
  const T* weight = static_cast<const T*>(a.weight);
  for_rows(a.num_outer * a.num_inner, a.size, [&](int64_t row) {
    const T* x = static_cast<const T*>(a.x) + row / a.num_inner * a.stride_outer + row % a.num_inner * a.stride_inner;
    T* out = static_cast<T*>(a.out) + row * a.size;
    const float scale = 1.0f / std::sqrt(mean_square(x, a.size) + a.eps);
    for_vectors(a.size, [&](int64_t i, int64_t count) {
      f32x16 w = load(weight + i, count), y = load(x + i, count) * scale;
      if (a.cast_before_weight) {
        y = round_to(y, T{});
        if (a.weight_offset != 0) w = round_to(w + a.weight_offset, T{});
      } else {
        w += a.weight_offset;
      }
      store(out + i, y * w, count);
    });
  });
}

}  // namespace

TRITIUM_EXPORT(rms_norm, RmsNormArgs)
