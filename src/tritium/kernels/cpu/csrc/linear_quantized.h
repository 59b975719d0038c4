// Quantised weights: their packed layouts, and the inner loops over them.
//
// As in linear.h a weight is cut into panels of kPanel outputs, K goes first in a panel, and a unit is 32 bits:
//   8 bits  [K / 4, kPanel] units of 4 bytes along K, each the weight + 128
//   4 bits  [K / 8, kPanel] units of 8 weights along K, each + 8: byte j holds weight j low and weight 4 + j high
// Scales lie as [groups, kPanel] in a panel: fp32 for 8 bits (one group, all of K), bf16 for 4 bits.
//
// Numbers. With int8 activations the products of a group are summed as integers, exactly, whatever the instruction; a
// group's sum times its scale is added to the total in fp32, groups in order, and the total is multiplied by the row's
// scale. Multiplied and added, not fused: so the bits are the same on every instruction set. Unsigned weights times signed
// activations is what dot product instructions take; the offset's share, offset x sum(activations), comes off the sum.
// With float activations the products are fused multiply-adds in fp32 in chains of kChain, as in linear.h, or, of bf16 on
// AMX, as in linear_quantized_amx.h.
//
// Rows of int8 activations are computed several at a time and lie in groups: [K / 64, rows of the group, 64].
#pragma once
#include "linear.h"

namespace tritium {

template <int kBits> constexpr int kOffset = 1 << (kBits - 1);
template <int kBits> constexpr int64_t kUnit = 32 / kBits;  // weights in a unit
template <int kBits> using Scale = std::conditional_t<kBits == 8, float, bf16>;
constexpr int64_t kPadK = 64;  // K of an 8-bit weight is padded to whole AMX tiles; a 4-bit one has whole groups of 32

template <int kBits> inline int64_t padded_units(int64_t k) { return round_up(k, kBits == 8 ? kPadK : 32) / kUnit<kBits>; }

inline u32xw load_units(const uint32_t* p) { u32xw x; std::memcpy(&x, p, sizeof(x)); return x; }
inline i32xw load_ints(const int32_t* p) { i32xw x; std::memcpy(&x, p, sizeof(x)); return x; }
inline f32xw to_floats(i32xw x) { return __builtin_convertvector(x, f32xw); }

// Four signed bytes of activations, as the instruction set wants them beside a vector of units.
#if defined(__AVX512VNNI__) && defined(__AVX512F__)
struct Quad { __m512i x; };
inline Quad quad(uint32_t x) { return {_mm512_set1_epi32(static_cast<int>(x))}; }
inline i32xw dot(i32xw sum, u32xw w, Quad q) {
  return bit_cast<i32xw>(_mm512_dpbusd_epi32(bit_cast<__m512i>(sum), bit_cast<__m512i>(w), q.x));
}
#elif defined(__AVXVNNI__) && defined(__AVX2__) && !defined(__AVX512F__)
struct Quad { __m256i x; };
inline Quad quad(uint32_t x) { return {_mm256_set1_epi32(static_cast<int>(x))}; }
inline i32xw dot(i32xw sum, u32xw w, Quad q) {
  return bit_cast<i32xw>(_mm256_dpbusd_avx_epi32(bit_cast<__m256i>(sum), bit_cast<__m256i>(w), q.x));
}
#elif defined(__AVX2__) && !defined(__AVX512F__)
// Bytes 0 and 2, and bytes 1 and 3, as 16-bit numbers: vpmaddubsw would saturate.
struct Quad { __m256i even, odd; };
inline Quad quad(uint32_t x) {
  const __m256i all = _mm256_set1_epi32(static_cast<int>(x));
  return {_mm256_srai_epi16(_mm256_slli_epi16(all, 8), 8), _mm256_srai_epi16(all, 8)};
}
inline i32xw dot(i32xw sum, u32xw w, Quad q) {
  const __m256i units = bit_cast<__m256i>(w);
  const __m256i even = _mm256_madd_epi16(_mm256_and_si256(units, _mm256_set1_epi16(0xff)), q.even);
  const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(units, 8), q.odd);
  return sum + bit_cast<i32xw>(_mm256_add_epi32(even, odd));
}
#else
struct Quad { int32_t x[4]; };
inline Quad quad(uint32_t x) {
  Quad q;
  for (int i = 0; i < 4; ++i) q.x[i] = static_cast<int8_t>(x >> 8 * i);
  return q;
}
inline i32xw dot(i32xw sum, u32xw w, const Quad& q) {
  for (int i = 0; i < 4; ++i) sum += bit_cast<i32xw>((w >> (8 * i)) & 0xff) * q.x[i];
  return sum;
}
#endif

inline uint32_t quad_at(const int8_t* x) { uint32_t q; std::memcpy(&q, x, 4); return q; }

// sums[r] += the integer products of kPiece inputs: x holds row r's 64 * r further on.
constexpr int64_t kPiece = 32;
template <int kBits, int R> inline void dot_piece(const uint32_t* panel, const int8_t* x, i32xw (&sums)[R][kAcross]) {
#pragma GCC unroll 1
  for (int64_t u = 0; u < kPiece / kUnit<kBits>; ++u, panel += kPanel, x += kUnit<kBits>) {
    prefetch(reinterpret_cast<const float*>(panel));
    u32xw w[kAcross];
    for (int i = 0; i < kAcross; ++i) w[i] = load_units(panel + i * kWide);
    if constexpr (kBits == 8) {
      for (int r = 0; r < R; ++r) {
        const Quad q = quad(quad_at(x + 64 * r));
        for (int i = 0; i < kAcross; ++i) sums[r][i] = dot(sums[r][i], w[i], q);
      }
    } else {
#pragma GCC unroll 1
      for (int half = 0; half < 2; ++half)
        for (int r = 0; r < R; ++r) {
          const Quad q = quad(quad_at(x + 64 * r + 4 * half));
          for (int i = 0; i < kAcross; ++i) sums[r][i] = dot(sums[r][i], (w[i] >> (4 * half)) & 0x0f0f0f0fu, q);
        }
    }
  }
}

// sums[r] += weights x activations in fp32, in the order of K; x lies as [K, R].
template <int kBits, int R>
inline void chain_units(const uint32_t* panel, const float* x, int64_t num_units, f32xw (&sums)[R][kAcross]) {
  constexpr uint32_t kMask = (1u << kBits) - 1;
  for (int64_t u = 0; u < num_units; ++u, x += kUnit<kBits> * R) {
    prefetch(reinterpret_cast<const float*>(panel + u * kPanel));
    for (int i = 0; i < kAcross; ++i) {
      const u32xw unit = load_units(panel + u * kPanel + i * kWide);
#pragma GCC unroll 1
      for (int k = 0; k < kUnit<kBits>; ++k) {
        const int shift = kBits == 8 ? 8 * k : k % 4 * 8 + k / 4 * 4;
        const f32xw w = to_floats(bit_cast<i32xw>((unit >> shift) & kMask) - kOffset<kBits>);
        for (int r = 0; r < R; ++r) sums[r][i] = fma(splat_wide(x[k * R + r]), w, sums[r][i]);
      }
    }
  }
}

inline void load_scales(const float* p, f32xw (&s)[kAcross]) { load_panel(p, s); }
inline void load_scales(const bf16* p, f32xw (&s)[kAcross]) {
  for (int i = 0; i < kAcross; ++i) s[i] = load_wide(p + i * kWide);
}

// What one call of the loops below works on: R rows, one panel, all of K.
template <int kBits> struct Work {
  const uint32_t* panel;
  const void* x;              // int8 [K / 64, R, 64], or floats [K, R]
  const Scale<kBits>* scales;  // [groups, kPanel]
  const int32_t* offsets;     // [R, groups]: offset x sum(activations); null for floats
  int64_t num_groups, units_per_group;
  float* totals;  // [R, kPanel], written
};

template <int R, int kBits> void run_integers(const Work<kBits>& work) {
  const int8_t* x = static_cast<const int8_t*>(work.x);
  const uint32_t* panel = work.panel;
  const int64_t size = work.units_per_group * kUnit<kBits>;
  for (int64_t g = 0, k = 0; g < work.num_groups; ++g) {
    i32xw sums[R][kAcross] = {};
    for (const int64_t end = k + size; k < end; k += kPiece, panel += kPiece / kUnit<kBits> * kPanel)
      dot_piece<kBits, R>(panel, x + k / 64 * 64 * R + k % 64, sums);
    f32xw scales[kAcross];
    load_scales(work.scales + g * kPanel, scales);
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < kAcross; ++i) {
        float* total = work.totals + r * kPanel + i * kWide;
        const f32xw part = to_floats(sums[r][i] - work.offsets[r * work.num_groups + g]) * scales[i];
        store_wide(total, g == 0 ? part : load_wide(total) + part);
      }
  }
}

template <int R, int kBits> void run_floats(const Work<kBits>& work) {
  const float* x = static_cast<const float*>(work.x);
  constexpr int64_t kUnits = kChain / kUnit<kBits>;
  for (int64_t g = 0, unit = 0; g < work.num_groups; ++g) {
    f32xw scales[kAcross];
    load_scales(work.scales + g * kPanel, scales);
    for (const int64_t end = unit + work.units_per_group; unit < end;) {
      const int64_t count = std::min(kUnits, end - unit);
      f32xw sums[R][kAcross] = {};
      chain_units<kBits, R>(work.panel + unit * kPanel, x + unit * kUnit<kBits> * R, count, sums);
      for (int r = 0; r < R; ++r)
        for (int i = 0; i < kAcross; ++i) {
          float* total = work.totals + r * kPanel + i * kWide;
          const f32xw part = sums[r][i] * scales[i];
          store_wide(total, unit == 0 ? part : load_wide(total) + part);
        }
      unit += count;
    }
  }
}

template <int kBits, int... R>
inline void run(int num_rows, bool is_integer, const Work<kBits>& work, std::integer_sequence<int, R...>) {
  using Function = void (*)(const Work<kBits>&);
  static constexpr Function integers[] = {run_integers<R + 1, kBits>...}, floats[] = {run_floats<R + 1, kBits>...};
  (is_integer ? integers : floats)[num_rows - 1](work);
}

}  // namespace tritium
