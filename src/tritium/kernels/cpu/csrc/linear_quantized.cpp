// quantized_linear: x times a packed weight of 8 or 4 bits (linear_quantized.h), activations in int8 or as they are; and
// the packing of weights and scales.
#include "linear_quantized.h"

namespace {
using namespace tritium;

struct QuantizedLinearArgs {
  const void *x, *weight, *scales, *bias;  // packed; bias [num_out] in x's dtype, or null
  void* out;                               // [rows, num_out], dense
  int64_t num_outer, num_inner, stride_outer, stride_inner;  // rows of x
  int64_t num_in, num_out, num_groups;
  int32_t bits, int8_activations;
};

struct QuantizedPackArgs {
  const void* weight;  // int8 [num_out, num_in], or two weights + 8 a byte, the even one low
  void* out;
  int64_t num_in, num_out;
  int32_t bits;
};

struct ScalesPackArgs {
  const void* scales;  // [num_out, num_groups]
  void* out;           // [panels, num_groups, kPanel]
  int64_t num_out, num_groups, item_size;
};

typedef int8_t i8x16 __attribute__((vector_size(16)));
constexpr float kTiny = 1e-30f;  // rows with no larger element count as zero: 127 / max would not be finite

template <class T, int kBits> class Quantized {
 public:
  Quantized(const QuantizedLinearArgs& args, Scratch& memory)
      : a(args), num_rows_(a.num_outer * a.num_inner), num_panels_((a.num_out + kPanel - 1) / kPanel),
        units_(padded_units<kBits>(a.num_in)), padded_(units_ * kUnit<kBits>),
        num_row_groups_((num_rows_ + kMostRows - 1) / kMostRows) {
    const int64_t bytes_per_row = padded_ * (a.int8_activations ? 1 : 4);
    char* p = memory.reserve(static_cast<size_t>(num_rows_ * (bytes_per_row + 4 + 4 * a.num_groups)));
    packed_ = p, row_scales_ = reinterpret_cast<float*>(p + num_rows_ * bytes_per_row);
    offsets_ = reinterpret_cast<int32_t*>(row_scales_ + num_rows_);
  }

  void operator()() const {
    const int64_t num_weights = padded_ * a.num_out;
#pragma omp parallel if (num_weights * kBits / 8 > (1 << 19) || num_weights * num_rows_ > (1 << 23))
    {
      static thread_local Scratch memory;
      float* buffer = reinterpret_cast<float*>(
          memory.reserve(static_cast<size_t>(std::max(kMostRows * kPanel * 4, padded_ + 64))));
#pragma omp for schedule(static)
      for (int64_t g = 0; g < num_row_groups_; ++g) a.int8_activations ? quantise(g, buffer) : widen(g);
#pragma omp for schedule(static) nowait
      for (int64_t p = 0; p < num_panels_; ++p) multiply(p, buffer);
    }
  }

 private:
  int64_t first_row(int64_t g) const { return g * num_rows_ / num_row_groups_; }
  const T* row(int64_t m) const {
    return static_cast<const T*>(a.x) + m / a.num_inner * a.stride_outer + m % a.num_inner * a.stride_inner;
  }

  void widen(int64_t g) const {
    const int64_t first = first_row(g), count = first_row(g + 1) - first;
    float* to = reinterpret_cast<float*>(packed_) + first * padded_;
    for (int64_t r = 0; r < count; ++r) {
      const T* x = row(first + r);
      for (int64_t k = 0; k < a.num_in; ++k) to[k * count + r] = to_float(x[k]);
      for (int64_t k = a.num_in; k < padded_; ++k) to[k * count + r] = 0.0f;
    }
  }

  // Rows to int8 by their largest element: round(x * 127 / max), to nearest even. A row that is not finite gets the scale
  // NaN.
  void quantise(int64_t g, void* buffer) const {
    const int64_t first = first_row(g), count = first_row(g + 1) - first, quads = padded_ / 4;
    uint32_t* to = reinterpret_cast<uint32_t*>(packed_) + first * quads;
    int8_t* bytes = static_cast<int8_t*>(buffer);
    for (int64_t r = 0; r < count; ++r) {
      const T* x = row(first + r);
      i32x16 largest = {};
      for_vectors(a.num_in, [&](int64_t i, int64_t n) {
        const i32x16 magnitude = bit_cast<i32x16>(load(x + i, n)) & 0x7fffffff;  // ordered like the floats, NaN last
        largest = magnitude > largest ? magnitude : largest;
      });
      int32_t bits = 0;
      for (int i = 0; i < kLanes; ++i) bits = std::max<int32_t>(bits, largest[i]);
      const bool is_finite = bits < 0x7f800000;
      const float max = bit_cast<float>(bits), inverse = is_finite && max >= kTiny ? 127.0f / max : 0.0f;
      row_scales_[first + r] = is_finite ? max * (1.0f / 127.0f) : bit_cast<float>(0x7fc00000);
      std::memset(bytes + a.num_in / kLanes * kLanes, 0, static_cast<size_t>(padded_ - a.num_in / kLanes * kLanes));
      if (is_finite) {
        for_vectors(a.num_in, [&](int64_t i, int64_t n) {
          const i32x16 q = bit_cast<i32x16>(load(x + i, n) * inverse + 12582912.0f) - 0x4b400000;  // 1.5 * 2^23 rounds
          const auto narrowed = __builtin_convertvector(q, i8x16);
          std::memcpy(bytes + i, &narrowed, static_cast<size_t>(n));
        });
      } else {
        std::memset(bytes, 0, static_cast<size_t>(padded_));
      }
      const int64_t group = padded_ / a.num_groups;
      for (int64_t j = 0; j < a.num_groups; ++j) {
        int32_t total = 0;
        for (int64_t k = j * group; k < (j + 1) * group; ++k) total += bytes[k];
        offsets_[(first + r) * a.num_groups + j] = total * kOffset<kBits>;
      }
      for (int64_t u = 0; u < quads; ++u) std::memcpy(to + u * count + r, bytes + 4 * u, 4);
    }
  }

  void multiply(int64_t p, float* totals) const {
    const Scale<kBits>* scales = static_cast<const Scale<kBits>*>(a.scales) + p * a.num_groups * kPanel;
    const uint32_t* panel = static_cast<const uint32_t*>(a.weight) + p * units_ * kPanel;
    for (int64_t g = 0; g < num_row_groups_; ++g) {
      const int64_t first = first_row(g), count = first_row(g + 1) - first;
      const Work<kBits> work{panel, packed_ + first * padded_ * (a.int8_activations ? 1 : 4), scales,
                             offsets_ + first * a.num_groups, a.num_groups, units_ / a.num_groups, totals};
      run(static_cast<int>(count), a.int8_activations, work, std::make_integer_sequence<int, kMostRows>{});
      finish(p, first, count, totals);
    }
  }

  void finish(int64_t p, int64_t m, int64_t count, const float* totals) const {
    const int64_t first = p * kPanel, width = std::min(kPanel, a.num_out - first);
    const T* bias = a.bias == nullptr ? nullptr : static_cast<const T*>(a.bias) + first;
    for (int64_t r = 0; r < count; ++r) {
      T* out = static_cast<T*>(a.out) + (m + r) * a.num_out + first;
      const float scale = a.int8_activations ? row_scales_[m + r] : 1.0f;
      for_vectors(width, [&](int64_t i, int64_t n) {
        const f32x16 y = load16(totals + r * kPanel + i) * scale;
        store(out + i, bias == nullptr ? y : y + load(bias + i, n), n);
      });
    }
  }

  const QuantizedLinearArgs& a;
  const int64_t num_rows_, num_panels_, units_, padded_, num_row_groups_;
  char* packed_;        // row group by row group: quads [K / 4, rows], or floats [K, rows]
  float* row_scales_;   // [rows]
  int32_t* offsets_;    // [rows, groups]
};

template <class T> void quantized_linear(const QuantizedLinearArgs& a) {
  static thread_local Scratch memory;
  if (a.bits == 8) Quantized<T, 8>(a, memory)();
  else Quantized<T, 4>(a, memory)();
}

template <int kBits> void pack_panels(const QuantizedPackArgs& a) {
  const int64_t units = padded_units<kBits>(a.num_in), num_panels = (a.num_out + kPanel - 1) / kPanel;
  const uint8_t* weight = static_cast<const uint8_t*>(a.weight);
#pragma omp parallel for schedule(static)
  for (int64_t p = 0; p < num_panels; ++p) {
    uint32_t* to = static_cast<uint32_t*>(a.out) + p * units * kPanel;
    for (int64_t u = 0; u < units; ++u)
      for (int64_t i = 0; i < kPanel; ++i) {
        const int64_t n = p * kPanel + i;
        uint32_t unit = 0;
        for (int64_t j = 0; n < a.num_out && j < kUnit<kBits>; ++j) {
          const int64_t k = u * kUnit<kBits> + j;
          if (k >= a.num_in) break;
          if (kBits == 8) unit |= static_cast<uint32_t>(weight[n * a.num_in + k] ^ 0x80) << 8 * j;
          else unit |= static_cast<uint32_t>(weight[(n * a.num_in + k) / 2] >> k % 2 * 4 & 15) << (j % 4 * 8 + j / 4 * 4);
        }
        to[u * kPanel + i] = unit;
      }
  }
}

void quantized_pack(const QuantizedPackArgs& a) { a.bits == 8 ? pack_panels<8>(a) : pack_panels<4>(a); }

void scales_pack(const ScalesPackArgs& a) {
  const char* from = static_cast<const char*>(a.scales);
  char* to = static_cast<char*>(a.out);
  const size_t size = static_cast<size_t>(a.item_size);
  for (int64_t p = 0; p < (a.num_out + kPanel - 1) / kPanel; ++p)
    for (int64_t g = 0; g < a.num_groups; ++g)
      for (int64_t i = 0; i < kPanel; ++i, to += size) {
        const int64_t n = p * kPanel + i;
        if (n < a.num_out) std::memcpy(to, from + static_cast<size_t>(n * a.num_groups + g) * size, size);
        else std::memset(to, 0, size);
      }
}

}  // namespace

TRITIUM_EXPORT(quantized_linear, QuantizedLinearArgs)
TRITIUM_EXPORT_ONE(quantized_pack, QuantizedPackArgs)
TRITIUM_EXPORT_ONE(scales_pack, ScalesPackArgs)

// 32-bit units that a packed weight takes.
TRITIUM_SYMBOL int64_t tritium_quantized_units(int64_t num_out, int64_t num_in, int32_t bits) {
  return round_up(num_out, kPanel) * (bits == 8 ? padded_units<8>(num_in) : padded_units<4>(num_in));
}
TRITIUM_SYMBOL int64_t tritium_panel_outputs() { return kPanel; }
