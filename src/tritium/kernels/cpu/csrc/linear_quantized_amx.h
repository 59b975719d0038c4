// Quantised weights on AMX tiles: rows of activations 16 at a time, in the layout of linear_quantized.h with 16 rows in
// every group, so that [16, 64 bytes] of it are a tile.
//
// 8-bit weights with int8 activations are read as they are packed: 16 units of an output side by side with 15 others are a
// tile. All others are expanded, a block of a panel at a time, into what a tile reads: 4 bits into signed bytes; with
// bf16 activations, 4 and 8 bits into bf16, which holds their integers exactly. Blocks are small enough for L1, and what
// is expanded serves all rows.
//
// Numbers. Integers: the same sums as everywhere. bf16: K is cut into pieces that depend on K and the group alone; a piece
// is one chain of tiles in steps of 32, and its sum times its scale is added by a fused multiply-add, pieces in order. It
// is the only path for bf16 where it exists, whatever the number of rows.
#pragma once
#include "linear_amx.h"
#include "linear_quantized_rows.h"

#if defined(__AMX_INT8__) && defined(__AMX_BF16__) && defined(__AVX512BW__) && defined(__linux__)
#define TRITIUM_QUANTIZED_TILES
namespace tritium {

constexpr int64_t kTileBytes = 1024;
constexpr int64_t kRunTiles = 16;           // rows that share an expanded block: their activations stay in L2
constexpr int64_t kBytesInL2 = 4096;        // of a row of activations at once, for the same reason
constexpr int64_t kBytesExpanded = 512;    // of them at once in L1, beside as much of 16 outputs
static_assert(kPanel == 32, "two tiles of 16 outputs");

// Sums in tiles 0 to 3, activations in 4 and 5, expanded weights in 6 and 7; steps of 64 bytes of activations, or of 32.
inline void configure_steps(int64_t num_rows, int64_t bytes) {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) {
    config.bytes_per_row[tile] = static_cast<uint16_t>(tile == 4 || tile == 5 ? bytes : 64);
    config.rows[tile] = static_cast<uint8_t>(tile < 6 ? num_rows : bytes / 4);
  }
  asm volatile("" : : "r"(&config) : "memory");
  _tile_loadconfig(&config);
}

// sums [32, kPanel] of up to 32 rows (x0, and x1 if it is not null) and one panel of 8-bit weights over `num_steps` steps of
// 64, continued or begun. `lines` cache lines from `next` on are asked for in every step.
inline void integer_tiles(const uint32_t* panel, const char* x0, const char* x1, int64_t num_steps, bool is_first,
                          int32_t* sums, const char* next, int64_t lines) {
  constexpr int64_t kStride = kPanel * 4;
  is_first ? zero_sums() : load_sums(sums, x1 != nullptr);
  for (int64_t step = 0; step < num_steps; ++step) {
    const uint32_t* w = panel + step * 16 * kPanel;
    for (int64_t i = 0; i < lines; ++i, next += 64) __builtin_prefetch(next, 0, 2);
    _tile_loadd(6, w, kStride);
    _tile_loadd(4, x0 + step * kTileBytes, 64);
    _tile_dpbsud(0, 4, 6);
    _tile_loadd(7, w + 16, kStride);
    _tile_dpbsud(1, 4, 7);
    if (x1 != nullptr) {
      _tile_loadd(5, x1 + step * kTileBytes, 64);
      _tile_dpbsud(2, 5, 6);
      _tile_dpbsud(3, 5, 7);
    }
  }
  store_sums(sums, x1 != nullptr);
}

// ---- expansion of `num_units` units of a panel into two halves of 16 outputs, each [rows of a tile, 64 bytes]

typedef int8_t i8x64 __attribute__((vector_size(64)));
inline u32x16 units16(const uint32_t* p) { u32x16 x; std::memcpy(&x, p, sizeof(x)); return x; }
inline void keep(char* to, u32x16 x) { std::memcpy(to, &x, sizeof(x)); }

inline void expand_bytes4(const uint32_t* panel, int64_t num_units, char* to, int64_t half_size) {
  const auto less_offset = [](u32x16 x) { return bit_cast<u32x16>(bit_cast<i8x64>(x & 0x0f0f0f0fu) - 8); };
  for (int64_t u = 0; u < num_units; ++u, to += 128, panel += kPanel) {
    prefetch(reinterpret_cast<const float*>(panel));
    for (int half = 0; half < 2; ++half) {
      const u32x16 x = units16(panel + 16 * half);
      keep(to + half * half_size, less_offset(x));
      keep(to + half * half_size + 64, less_offset(x >> 4));
    }
  }
}

// Pairs of bf16. The words of a unit hold weights 0, 4, 1, 5 and 2, 6, 3, 7 from the low bits on: so inputs are to come in
// the order 0, 2, 1, 3, 4, 6, 5, 7 (`kPairOrder`, in bytes).
alignas(16) constexpr uint8_t kPairOrder[16] = {0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15};
inline void expand_pairs4(const uint32_t* panel, int64_t num_units, char* to, int64_t half_size) {
  u16x32 integers;  // looked up by the low five bits of a word; the fifth changes nothing
  for (int i = 0; i < 32; ++i) integers[i] = static_cast<uint16_t>(bit_cast<uint32_t>(static_cast<float>(i % 16 - 8)) >> 16);
  const auto look_up = [&](u32x16 x) {
    return bit_cast<u32x16>(_mm512_maskz_permutexvar_epi16(~0u, bit_cast<__m512i>(x), bit_cast<__m512i>(integers)));
  };
  for (int64_t u = 0; u < num_units; ++u, to += 256, panel += kPanel) {
    prefetch(reinterpret_cast<const float*>(panel));
    for (int half = 0; half < 2; ++half) {
      const u32x16 x = units16(panel + 16 * half);
      char* out = to + half * half_size;
      keep(out, look_up(x));
      keep(out + 64, look_up(bit_cast<u32x16>(bit_cast<u16x32>(x) >> 8)));
      keep(out + 128, look_up(bit_cast<u32x16>(bit_cast<u16x32>(x) >> 4)));
      keep(out + 192, look_up(bit_cast<u32x16>(bit_cast<u16x32>(x) >> 12)));
    }
  }
}

inline void expand_pairs8(const uint32_t* panel, int64_t num_units, char* to, int64_t half_size) {
  const auto number = [](u32x16 x) {  // 2^23 + the low byte, less 2^23 + 128
    return bit_cast<u32x16>(bit_cast<f32x16>((x & 255u) | 0x4b000000u) - 8388736.0f);
  };
  for (int64_t u = 0; u < num_units; ++u, to += 128, panel += kPanel) {
    prefetch(reinterpret_cast<const float*>(panel));
    for (int half = 0; half < 2; ++half) {
      const u32x16 x = units16(panel + 16 * half);
      keep(to + half * half_size, number(x) >> 16 | number(x >> 8));  // the lower 16 bits of such a number are zero
      keep(to + half * half_size + 64, number(x >> 16) >> 16 | number(x >> 24));
    }
  }
}

// ---- expanded weights times rows

// Pieces of K, of `size` bytes of activations, the last one perhaps of less; piece i has scales + i * scale_stride.
template <class S> struct Pieces {
  int64_t begin, end, size;  // bytes of a row of activations
  const S* scales;
  int64_t scale_stride;
};

#define TRITIUM_DOT(tile, a, b)                       \
  if constexpr (kIsInteger) _tile_dpbssd(tile, a, b); \
  else _tile_dpbf16ps(tile, a, b)

// Up to two tiles of rows (x0, and x1 if it is not null) by the whole panel: totals [num_rows, kPanel] += each piece's sums
// times its scales; signed bytes or pairs of bf16. x0, x1: the rows' activations from K = 0 on, w: expanded weights from
// `begin` on, the second half half_size bytes after the first. kStep: bytes of a row of x in a tile.
template <bool kIsInteger, int64_t kStep, class S>
void multiply_block(int64_t num_rows, const char* x0, const char* x1, const char* w, int64_t half_size,
                       const Pieces<S>& pieces, bool is_first, float* totals) {
  alignas(64) uint32_t sums[2 * kTileRows * kPanel];
  const S* scales = pieces.scales;
  for (int64_t at = pieces.begin; at < pieces.end;) {
    zero_sums();
    for (const int64_t end = std::min(pieces.end, at + pieces.size); at < end; at += kStep, w += 16 * kStep) {
      const int64_t step = (at >> 6) * kTileBytes + (at & 63);
      _tile_loadd(6, w, 64);
      _tile_loadd(4, x0 + step, 64);
      TRITIUM_DOT(0, 4, 6);
      _tile_loadd(7, w + half_size, 64);
      TRITIUM_DOT(1, 4, 7);
      if (x1 != nullptr) {
        _tile_loadd(5, x1 + step, 64);
        TRITIUM_DOT(2, 5, 6);
        TRITIUM_DOT(3, 5, 7);
      }
    }
    store_sums(sums, x1 != nullptr);
    const f32x16 scale[2] = {load16(scales), load16(scales + 16)};
    for (int64_t r = 0; r < num_rows; ++r)
      for (int i = 0; i < 2; ++i) {
        float* to = totals + r * kPanel + 16 * i;
        const u32x16 bits = units16(sums + r * kPanel + 16 * i);
        const f32x16 total = is_first ? f32x16{} : load16(to);
        // Fused where it may be: 32 products of int8 and 4 bits, 15 bits, times a bf16 of 8 bits are exact
        if constexpr (!kIsInteger) store16(to, fma(bit_cast<f32x16>(bits), scale[i], total));
        else if constexpr (kStep == 32) store16(to, fma(to_floats(bit_cast<i32x16>(bits)), scale[i], total));
        else store16(to, total + to_floats(bit_cast<i32x16>(bits)) * scale[i]);
      }
    is_first = false;
    scales += pieces.scale_stride;
  }
}
#undef TRITIUM_DOT

}  // namespace tritium
#endif
