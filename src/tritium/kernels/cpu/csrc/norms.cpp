// rms_norm and layer_norm, alone or after an addition. Rows lie in two levels of strides, so that a view of a fused qkv
// projection needs no copy; outputs are dense. quantized_...: a row is rounded to its dtype as ever, then it becomes int8 with
// its scale behind it. The order of a sum: 4 vectors of 16 lanes in turn, the pairs of them, then `sum`.
#include <cmath>

#include "quantise_row.h"
#include "softmax.h"

namespace {
using namespace tritium;

struct RmsNormArgs {
  const void *x, *weight;
  void* out;
  int64_t num_outer, num_inner, stride_outer, stride_inner;  // of x
  int64_t size;                                              // elements in a row
  float eps, weight_offset;
  int32_t cast_before_weight;
};

struct LayerNormArgs {
  const void *x, *weight, *bias;  // bias may be null
  void* out;
  int64_t num_outer, num_inner, stride_outer, stride_inner, size;
  float eps;
};

// x + residual, rounded to T, then the norm of that. `sum` may lie where x or residual does: an element is read before it
// is written, and the norm reads the sum.
struct AddRmsNormArgs {
  const void *x, *residual, *weight;
  void *out, *sum;  // dense
  int64_t num_outer, num_inner, x_stride_outer, x_stride_inner, residual_stride_outer, residual_stride_inner, size;
  float eps, weight_offset;
  int32_t cast_before_weight;
};

struct AddLayerNormArgs {
  const void *x, *residual, *weight, *bias;  // bias may be null
  void *out, *sum;
  int64_t num_outer, num_inner, x_stride_outer, x_stride_inner, residual_stride_outer, residual_stride_inner, size;
  float eps;
};

// The mean over a row of term(x), computed on vectors; lanes behind the row's end are left out.
template <class T, class Term> float mean_of(const T* x, int64_t size, Term term) {
  f32x16 sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= size; i += 4 * kLanes)
    for (int k = 0; k < 4; ++k) sums[k] += term(load16(x + i + k * kLanes));
  for_vectors(size - i, [&](int64_t j, int64_t count) {
    f32x16 t = term(load(x + i + j, count));
    sums[0] += count == kLanes ? t : first_lanes(t, count);
  });
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3])) / static_cast<float>(size);
}

template <class T, class Args> const T* row_of(const Args& a, int64_t row) {
  return static_cast<const T*>(a.x) + row / a.num_inner * a.stride_outer + row % a.num_inner * a.stride_inner;
}

// One row of a norm; `weight`, `bias` and the numbers are those of `a`.
template <class T, class Args> void rms_norm_row(const T* x, T* out, const Args& a) {
  const T* weight = static_cast<const T*>(a.weight);
  const float scale = 1.0f / std::sqrt(mean_of(x, a.size, [](f32x16 v) { return v * v; }) + a.eps);
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
}

template <class T, class Args> void layer_norm_row(const T* x, T* out, const Args& a) {
  const T *weight = static_cast<const T*>(a.weight), *bias = static_cast<const T*>(a.bias);
  const float mean = mean_of(x, a.size, [](f32x16 v) { return v; });
  const float variance = mean_of(x, a.size, [mean](f32x16 v) { return (v - mean) * (v - mean); });
  const float scale = 1.0f / std::sqrt(variance + a.eps);
  for_vectors(a.size, [&](int64_t i, int64_t count) {
    f32x16 y = (load(x + i, count) - mean) * scale * load(weight + i, count);
    if (bias) y += load(bias + i, count);
    store(out + i, y, count);
  });
}

template <class T> void rms_norm(const RmsNormArgs& a) {
  for_rows(a.num_outer * a.num_inner, a.size, [&](int64_t row) {
    rms_norm_row(row_of<T>(a, row), static_cast<T*>(a.out) + row * a.size, a);
  });
}

template <class T> void layer_norm(const LayerNormArgs& a) {
  for_rows(a.num_outer * a.num_inner, a.size, [&](int64_t row) {
    layer_norm_row(row_of<T>(a, row), static_cast<T*>(a.out) + row * a.size, a);
  });
}

// Writes row `row` of the sum and returns it.
template <class T, class Args> const T* add_row(const Args& a, int64_t row) {
  const int64_t outer = row / a.num_inner, inner = row % a.num_inner;
  const T* x = static_cast<const T*>(a.x) + outer * a.x_stride_outer + inner * a.x_stride_inner;
  const T* residual =
      static_cast<const T*>(a.residual) + outer * a.residual_stride_outer + inner * a.residual_stride_inner;
  T* sum = static_cast<T*>(a.sum) + row * a.size;
  for_vectors(a.size, [&](int64_t i, int64_t count) {
    store(sum + i, load(x + i, count) + load(residual + i, count), count);
  });
  return sum;
}

template <class T> void add_rms_norm(const AddRmsNormArgs& a) {
  for_rows(a.num_outer * a.num_inner, 2 * a.size, [&](int64_t row) {
    rms_norm_row(add_row<T>(a, row), static_cast<T*>(a.out) + row * a.size, a);
  });
}

template <class T> void add_layer_norm(const AddLayerNormArgs& a) {
  for_rows(a.num_outer * a.num_inner, 2 * a.size, [&](int64_t row) {
    layer_norm_row(add_row<T>(a, row), static_cast<T*>(a.out) + row * a.size, a);
  });
}

// Calls norm(row, to) for all rows, `to` a row of the thread's own, which then becomes int8 in `out`.
template <class T, class Args, class Norm> void quantise_norms(const Args& a, int64_t work_per_row, Norm norm) {
  for_rows(a.num_outer * a.num_inner, work_per_row, [&](int64_t row) {
    static thread_local Scratch memory;
    T* normed = reinterpret_cast<T*>(memory.reserve(static_cast<size_t>(a.size) * sizeof(T)));
    norm(row, normed);
    char* to = static_cast<char*>(a.out) + row * (a.size + kScaleBytes);
    quantise_head(normed, a.size, to, to + a.size);
  });
}

template <class T> void quantized_rms_norm(const RmsNormArgs& a) {
  quantise_norms<T>(a, 2 * a.size, [&](int64_t row, T* to) { rms_norm_row(row_of<T>(a, row), to, a); });
}

template <class T> void quantized_layer_norm(const LayerNormArgs& a) {
  quantise_norms<T>(a, 2 * a.size, [&](int64_t row, T* to) { layer_norm_row(row_of<T>(a, row), to, a); });
}

template <class T> void quantized_add_rms_norm(const AddRmsNormArgs& a) {
  quantise_norms<T>(a, 3 * a.size, [&](int64_t row, T* to) { rms_norm_row(add_row<T>(a, row), to, a); });
}

template <class T> void quantized_add_layer_norm(const AddLayerNormArgs& a) {
  quantise_norms<T>(a, 3 * a.size, [&](int64_t row, T* to) { layer_norm_row(add_row<T>(a, row), to, a); });
}

}  // namespace

TRITIUM_EXPORT(rms_norm, RmsNormArgs)
TRITIUM_EXPORT(layer_norm, LayerNormArgs)
TRITIUM_EXPORT(add_rms_norm, AddRmsNormArgs)
TRITIUM_EXPORT(add_layer_norm, AddLayerNormArgs)
TRITIUM_EXPORT(quantized_rms_norm, RmsNormArgs)
TRITIUM_EXPORT(quantized_layer_norm, LayerNormArgs)
TRITIUM_EXPORT(quantized_add_rms_norm, AddRmsNormArgs)
TRITIUM_EXPORT(quantized_add_layer_norm, AddLayerNormArgs)
