// Quantised weights on AMX tiles: rows of activations 16 at a time, in the layout of linear_quantized.h with 16 rows in
// every group, so that [16, 64 bytes] of it are a tile.
//
// 8-bit weights with int8 activations are read as they are packed: 16 units of an output side by side with 15 others are a
// tile. All others are expanded, a block of a panel at a time, and what is expanded serves all rows:
//   4 bits, int8 activations   integer x step, 16 bits, as an upper signed and a lower unsigned byte (+ 128): two tiles for
//                              16 outputs, whose products are summed apart over all of K and put together last;
//                              or, in groups of whole tiles, 16 x the integer in a signed byte: one tile for 16 outputs,
//                              and each group's sum is multiplied by its step as an integer
//   4 and 8 bits, bf16         the integers, which bf16 holds exactly: two tiles for 32 outputs
// For the first rows a step is expanded while the one before is multiplied: few rows wait for expansion more than for
// anything else.
//
// Numbers. Integers: the same sums as everywhere, either way. bf16: a group, or all of K of 8 bits, is one chain of tiles in steps of 32;
// a group's sum times its step is added by a fused multiply-add, groups in order. It is the only path for bf16 where it
// exists, whatever the number of rows.
#pragma once
#include "linear_amx.h"
#include "linear_quantized_rows.h"

#if defined(__AMX_INT8__) && defined(__AMX_BF16__) && defined(__AVX512BW__) && defined(__linux__)
#define TRITIUM_QUANTIZED_TILES
namespace tritium {

constexpr int64_t kTileBytes = 1024;
constexpr int64_t kStep = 64;           // bytes of a row of activations in a tile
constexpr int64_t kStepsInL1 = 8;       // that stay there once they are expanded
static_assert(kPanel == 32, "two tiles of 16 outputs");

// Sums in tiles 0 to 3, activations in 4 and 5, expanded weights in 6 and 7.
inline void configure_steps(int64_t num_rows) {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile)
    config.bytes_per_row[tile] = 64, config.rows[tile] = static_cast<uint8_t>(tile < 6 ? num_rows : 16);
  asm volatile("" : : "r"(&config) : "memory");
  _tile_loadconfig(&config);
}

// sums [32, kPanel] of up to 32 rows (x0, and x1 if it is not null) and one panel of 8-bit weights over `num_steps` steps of
// 64, continued or begun. `lines` cache lines from `next` on are asked for in every step.
inline void integer_tiles(const uint32_t* panel, const char* x0, const char* x1, int64_t num_steps, bool is_first,
                          float* sums, const char* next, int64_t lines) {
  constexpr int64_t kStride = kPanel * 4;
  is_first ? zero_sums() : load_sums(sums, x1 != nullptr);
  for (int64_t step = 0; step < num_steps; ++step) {
    const uint32_t* w = panel + step * 16 * kPanel;
    for (int64_t i = 0; i < lines; ++i, next += 64) __builtin_prefetch(next, 0, 2);
    _tile_loadd(6, w, kStride);  // loads before products: linear_amx.h
    _tile_loadd(7, w + 16, kStride);
    _tile_loadd(4, x0 + step * kTileBytes, 64);
    if (x1 != nullptr) _tile_loadd(5, x1 + step * kTileBytes, 64);
    _tile_dpbsud(0, 4, 6);
    _tile_dpbsud(1, 4, 7);
    if (x1 != nullptr) {
      _tile_dpbsud(2, 5, 6);
      _tile_dpbsud(3, 5, 7);
    }
  }
  store_sums(sums, x1 != nullptr);
}

// ---- expansion of one step of a panel into two tiles, each [16, 64 bytes]

inline u32x16 units16(const uint32_t* p) { u32x16 x; std::memcpy(&x, p, sizeof(x)); return x; }
inline void keep(char* to, u32x16 x) { std::memcpy(to, &x, sizeof(x)); }

// 32 inputs of 16 outputs, of one group, times its steps: the upper bytes, and the lower ones kTileBytes after them.
inline void expand_shorts4(const uint32_t* panel, const int16_t* steps, char* to) {
  const __m512i wide = _mm512_maskz_cvtepu16_epi32(kAll, *reinterpret_cast<const __m256i_u*>(steps));
  const u16x32 step = bit_cast<u16x32>(bit_cast<u32x16>(wide) | bit_cast<u32x16>(wide) << 16), rest = 128 - 8 * step;
  const auto product = [&](u32x16 nibbles) { return bit_cast<u32x16>(bit_cast<u16x32>(nibbles & 0x000f000fu) * step + rest); };
  const auto bytes = [](u32x16 even, u32x16 odd) {  // the lower bytes of words, the upper ones
    const __m512i lower = _mm512_set1_epi32(0x00ff00ff);
    return bit_cast<u32x16>(_mm512_ternarylogic_epi32(lower, bit_cast<__m512i>(even), bit_cast<__m512i>(odd), 0xca));
  };
  for (int u = 0; u < 4; ++u, panel += kPanel) {
    __builtin_prefetch(reinterpret_cast<const char*>(panel) + kAhead);
    const u32x16 x = units16(panel);
    for (int half = 0; half < 2; ++half, to += 64) {
      const u32x16 even = product(x >> (4 * half)), odd = product(x >> (4 * half + 8));  // 256 x upper + lower + 128
      keep(to, bytes(bit_cast<u32x16>(bit_cast<u16x32>(even) >> 8), odd));
      keep(to + kTileBytes, bytes(even, bit_cast<u32x16>(bit_cast<u16x32>(odd) << 8)));
    }
  }
}

// 64 inputs of 32 outputs as they are, 16 times: the four bits become the upper ones, and their offset the sign.
inline void expand_bytes4(const uint32_t* panel, char* to) {
  for (int u = 0; u < 8; ++u, panel += kPanel, to += 128)
    for (int half = 0; half < 2; ++half) {
      __builtin_prefetch(reinterpret_cast<const char*>(panel + 16 * half) + kAhead);
      const u32x16 x = units16(panel + 16 * half);
      keep(to + half * kTileBytes, ((x << 4) & 0xf0f0f0f0u) ^ 0x80808080u);
      keep(to + half * kTileBytes + 64, (x & 0xf0f0f0f0u) ^ 0x80808080u);
    }
}

// Pairs of bf16, 32 inputs of 32 outputs. The words of a unit hold weights 0, 4, 1, 5 and 2, 6, 3, 7 from the low bits on:
// so inputs are to come in the order 0, 2, 1, 3, 4, 6, 5, 7 (`kPairOrder`, in bytes).
alignas(16) constexpr uint8_t kPairOrder[16] = {0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15};
inline void expand_pairs4(const uint32_t* panel, char* to) {
  u16x32 integers;  // looked up by the low five bits of a word; the fifth changes nothing
  for (int i = 0; i < 32; ++i) integers[i] = static_cast<uint16_t>(bit_cast<uint32_t>(static_cast<float>(i % 16 - 8)) >> 16);
  const auto look_up = [&](u32x16 x) {
    return bit_cast<u32x16>(_mm512_maskz_permutexvar_epi16(~0u, bit_cast<__m512i>(x), bit_cast<__m512i>(integers)));
  };
  for (int64_t u = 0; u < 4; ++u, to += 256, panel += kPanel)
    for (int half = 0; half < 2; ++half) {
      __builtin_prefetch(reinterpret_cast<const char*>(panel + 16 * half) + kAhead);
      const u32x16 x = units16(panel + 16 * half);
      char* out = to + half * kTileBytes;
      keep(out, look_up(x));
      keep(out + 64, look_up(bit_cast<u32x16>(bit_cast<u16x32>(x) >> 8)));
      keep(out + 128, look_up(bit_cast<u32x16>(bit_cast<u16x32>(x) >> 4)));
      keep(out + 192, look_up(bit_cast<u32x16>(bit_cast<u16x32>(x) >> 12)));
    }
}

inline void expand_pairs8(const uint32_t* panel, char* to) {
  const auto number = [](u32x16 x) {  // 2^23 + the low byte, less 2^23 + 128
    return bit_cast<u32x16>(bit_cast<f32x16>((x & 255u) | 0x4b000000u) - 8388736.0f);
  };
  for (int64_t u = 0; u < 8; ++u, to += 128, panel += kPanel)
    for (int half = 0; half < 2; ++half) {
      __builtin_prefetch(reinterpret_cast<const char*>(panel + 16 * half) + kAhead);
      const u32x16 x = units16(panel + 16 * half);
      char* out = to + half * kTileBytes;
      keep(out, number(x) >> 16 | number(x >> 8));  // the lower 16 bits of such a number are zero
      keep(out + 64, number(x >> 16) >> 16 | number(x >> 24));
    }
}

// ---- expanded weights times rows

// Tiles 0 to 3 += up to two tiles of rows (x1 null: one) by the two of weights, over some steps, those of step s at place
// s % num_kept of w. expand(step, to): fills in the weights of a step; it is called for each, in order, one step ahead.
enum class Form { kPairs, kShorts, kBytes };  // of bf16; upper and lower bytes; signed bytes
#define TRITIUM_DOT(tile, x, w, dot_of_shorts)                            \
  if constexpr (kForm == Form::kPairs) _tile_dpbf16ps(tile, x, w);        \
  else if constexpr (kForm == Form::kBytes) _tile_dpbssd(tile, x, w);     \
  else dot_of_shorts(tile, x, w)
template <Form kForm, class Expand>
inline void add_steps(const char* x0, const char* x1, char* kept, int64_t num_kept, int64_t num_steps, Expand expand) {
  expand(0, kept);
  char *w = kept, *const end = kept + num_kept * 2 * kTileBytes;
  for (int64_t step = 0; step < num_steps; ++step, x0 += kTileBytes) {
    char* const following = w + 2 * kTileBytes < end ? w + 2 * kTileBytes : kept;
    if (step + 1 < num_steps) expand(step + 1, following);
    asm volatile("" : : : "memory");  // GCC 12's intrinsics do not admit to reading
    _tile_loadd(6, w, 64);
    _tile_loadd(7, w + kTileBytes, 64);
    _tile_loadd(4, x0, 64);
    if (x1 != nullptr) _tile_loadd(5, x1, 64);
    TRITIUM_DOT(0, 4, 6, _tile_dpbssd);
    TRITIUM_DOT(1, 4, 7, _tile_dpbsud);
    if (x1 != nullptr) {
      TRITIUM_DOT(2, 5, 6, _tile_dpbssd);
      TRITIUM_DOT(3, 5, 7, _tile_dpbsud);
      x1 += kTileBytes;
    }
    w = following;
  }
}
#undef TRITIUM_DOT

}  // namespace tritium
#endif
