// The bf16 linear on AMX: products of 16 x 32 by 32 x 16 tiles.
//
// Activations are packed in groups of 32 rows: [K / 32, 2, 16, 32], each [16, 32] a tile. 2 x 2 tiles of sums stay in
// registers over all of K. A group with fewer rows configures lower tiles: a row is summed by the same instructions in the
// same order however many there are. An output is one chain over K in steps of 32, in each of which the hardware adds 16
// products of even and 16 of odd elements; subnormal inputs and results are zero.
#pragma once
#include "linear.h"

#if defined(__AMX_BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>

namespace tritium {

constexpr bool kHasAmx = true;
constexpr int64_t kGroup = 32, kTileRows = 16;

// The kernel grants the tiles' 8 KB of state on request, once per process.
inline bool amx_is_granted() {
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  return granted;
}

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {};
  uint8_t rows[16] = {};
};

// Sums in tiles 0 to 3, activations in 4 and 5, weights in 6 and 7.
inline void configure_tiles(int64_t num_rows) {
  const auto low = static_cast<uint8_t>(num_rows < kTileRows ? num_rows : kTileRows);
  const auto high = static_cast<uint8_t>(num_rows > kTileRows ? num_rows - kTileRows : 1);
  const uint8_t rows[8] = {low, low, high, high, low, high, 16, 16};
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) config.bytes_per_row[tile] = 64, config.rows[tile] = rows[tile];
  asm volatile("" : : "r"(&config) : "memory");  // GCC 12's intrinsic admits to reading the first 8 bytes only
  _tile_loadconfig(&config);
}

// Row `index` of a group into its place; what lies between num_in and `padded` is zero.
inline void amx_pack(const bf16* x, int64_t index, int64_t num_in, int64_t padded, bf16* to) {
  to += index * kTileK;  // the second tile of a step follows the first
  for (int64_t k = 0; k < padded; k += kTileK, to += kGroup * kTileK) {
    const int64_t count = std::min(kTileK, num_in - k);
    if (count < kTileK) std::memset(to, 0, kTileK * sizeof(bf16));
    std::memcpy(to, x + k, static_cast<size_t>(count) * sizeof(bf16));
  }
}

// The tiles of sums, [32, kPanel] of 32 bits each: from zero, from memory, to memory; the first 16 rows alone, or all.
inline void zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}
constexpr int64_t kSumStride = kPanel * 4, kTileSums = kTileRows * kSumStride;  // bytes
inline void load_sums(const void* sums, bool is_tall) {
  const char* from = static_cast<const char*>(sums);
  _tile_loadd(0, from, kSumStride);
  _tile_loadd(1, from + 64, kSumStride);
  if (is_tall) {
    _tile_loadd(2, from + kTileSums, kSumStride);
    _tile_loadd(3, from + kTileSums + 64, kSumStride);
  }
}
inline void store_sums(void* sums, bool is_tall) {
  char* to = static_cast<char*>(sums);
  _tile_stored(0, to, kSumStride);
  _tile_stored(1, to + 64, kSumStride);
  if (is_tall) {
    _tile_stored(2, to + kTileSums, kSumStride);
    _tile_stored(3, to + kTileSums + 64, kSumStride);
  }
}

// sums [num_rows, kPanel] of one group and one panel, continued over num_k more of K, or begun.
//
// Loads stand before products: in hours when a core does a product in 17 ns (7 in others; a neighbour is suspected), it does
// not load a tile meanwhile, and each change from loads to products and back costs 8 ns. Activations that pass by as a stream
// (kStreams) leave the piece of the panel in L1. beside(step, num_steps): other work, done between products.
struct Nothing { void operator()(int64_t, int64_t) const {} };
template <bool kStreams = false, class Beside = Nothing>
inline void amx_group(const bf16* panel, const bf16* x, int64_t num_k, bool is_tall, bool is_first, float* sums,
                      Ahead ahead, Beside beside = {}) {
  constexpr int64_t kStep = kTileK * kPanel, kTile = kTileRows * kTileK;
  constexpr int64_t kStride = kPanel * 2 * sizeof(bf16);
  const int64_t num_steps = num_k / kTileK, next_sums = parts_of(2 * kTileSums, num_steps);
  is_first ? zero_sums() : load_sums(sums, is_tall);
  for (int64_t step = 0; step < num_steps; ++step) {
    const bf16 *w = panel + step * kStep, *a = x + step * 2 * kTile;
    for (int64_t i = 0; i < ahead.per_k * kTileK; i += kLine)
      __builtin_prefetch(ahead.from + step * kTileK * ahead.per_k + i, 0, 2);
    const char* after = reinterpret_cast<const char*>(sums) + 2 * kTileSums + step * next_sums;
    for (int64_t i = 0; i < next_sums; i += kLine) __builtin_prefetch(after + i, 1);
    beside(step, num_steps);
    _tile_loadd(6, w, kStride);
    _tile_loadd(7, w + 32, kStride);
    if constexpr (kStreams) {
      _tile_stream_loadd(4, a, 64);
      if (is_tall) _tile_stream_loadd(5, a + kTile, 64);
    } else {
      _tile_loadd(4, a, 64);
      if (is_tall) _tile_loadd(5, a + kTile, 64);
    }
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (is_tall) {
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  store_sums(sums, is_tall);
}

}  // namespace tritium
#else
namespace tritium {
constexpr bool kHasAmx = false;
inline bool amx_is_granted() { return false; }
}  // namespace tritium
#endif
