// quantized_linear: x times a packed weight of 8 or 4 bits (linear_quantized.h), activations in int8 or as they are; and
// the packing of weights and scales.
#include "linear_quantized_tiles.h"
#include "linear_quantized_vectors.h"
#include "pack.h"

namespace {
using namespace tritium;

struct QuantizedPackArgs {
  const void* weight;  // int8 [num_out, num_in], or two weights + 8 a byte, the even one low
  void* out;
  int64_t num_in, num_out;  // num_out counts gates and what they gate
  int32_t bits, is_gated;
};

struct ScalesPackArgs {
  const void* scales;  // units or steps, [num_out, num_groups]
  void* out;           // [panels, num_groups, kPanel]
  int64_t num_out, num_groups, item_size;
  int32_t is_gated;
};

template <int kBits> void multiply(const QuantizedLinearArgs& a, const RowFunctions& functions) {
  static thread_local Scratch memory;
#if defined(TRITIUM_QUANTIZED_TILES)
  if (TiledQuantized<kBits>::is_for(a, functions.is_bf16)) return TiledQuantized<kBits>(a, functions, memory)();
#endif
  VectorQuantized<kBits>(a, functions, memory)();
}

template <class T> void quantized_linear(const QuantizedLinearArgs& a) {
  if (a.num_outer * a.num_inner == 0) return;  // threads would share no rows
  (a.bits == 8 ? multiply<8> : multiply<4>)(a, kRowFunctions<T>);
}

// kWide units of weights as they are given, as they are packed.
template <int kBits> u32xw as_packed(u32xw x) {
  if constexpr (kBits == 8) return x ^ 0x80808080u;
  const auto bytes = [](u32xw four) {  // 4 bits each, side by side -> a byte each
    four = (four | four << 8) & 0x00ff00ffu;
    return (four | four << 4) & 0x0f0f0f0fu;
  };
  return bytes(x & 0xffffu) | bytes(x >> 16) << 4;
}

template <int kBits> void pack_panels(const QuantizedPackArgs& a) {
  const int64_t units = padded_units<kBits>(a.num_in), num_panels = panels_in(a.num_out, a.is_gated);
  const uint8_t* weight = static_cast<const uint8_t*>(a.weight);
#pragma omp parallel for schedule(static)
  for (int64_t p = 0; p < num_panels; ++p) {
    uint32_t* to = static_cast<uint32_t*>(a.out) + p * units * kPanel;
    PanelRows rows;
    find_rows(weight, p, a.num_out, a.is_gated, a.num_in * kBits / 8, rows);
    const bool has_whole_rows = a.num_in * kBits % 8 == 0;
    const int64_t done = has_whole_rows ? pack_units(rows, a.num_in / kUnit<kBits>, to, as_packed<kBits>) : 0;
    for (int64_t u = done; u < units; ++u)
      for (int64_t i = 0; i < kPanel; ++i) {
        const int64_t n = row_in(p, i, a.num_out, a.is_gated);
        uint32_t unit = 0;
        for (int64_t j = 0; n >= 0 && j < kUnit<kBits>; ++j) {
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
  for (int64_t p = 0; p < panels_in(a.num_out, a.is_gated); ++p)
    for (int64_t g = 0; g < a.num_groups; ++g)
      for (int64_t i = 0; i < kPanel; ++i, to += size) {
        const int64_t n = row_in(p, i, a.num_out, a.is_gated);
        if (n >= 0) std::memcpy(to, from + static_cast<size_t>(n * a.num_groups + g) * size, size);
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

// Whether quantised linears have more than one path in this process.
TRITIUM_SYMBOL int32_t tritium_has_tiles() {
#if defined(TRITIUM_QUANTIZED_TILES)
  return amx_is_granted();
#else
  return 0;
#endif
}
