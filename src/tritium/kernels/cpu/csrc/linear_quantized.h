// Quantised weights: their packed layouts, and the inner loops over them.
//
// As in linear.h a weight is cut into panels of kPanel outputs, K goes first in a panel, and a unit is 32 bits:
//   8 bits  [K / 4, kPanel] units of 4 bytes along K, each the weight + 128
//   4 bits  [K / 8, kPanel] units of 8 weights along K, each + 8: byte j holds weight j low and weight 4 + j high
// A weight is integer x step x unit: a unit for each output in fp32, and with 4 bits a step for each group, an integer up to
// kMostSteps. They lie as [kPanel] and [groups, kPanel] in a panel.
//
// Numbers. With int8 activations the products of integer, step and activation are summed as integers, exactly, whatever the
// instruction, over all of K; the sum is rounded to fp32 and multiplied by the unit, then by the row's scale: so the bits
// are the same on every instruction set. Unsigned weights times signed activations is what dot product instructions take:
// their sums begin at -offset x sum(activations). With float activations the products are fused multiply-adds in fp32
// in chains of kChain, as in linear.h, or, of bf16 on AMX, as in linear_quantized_amx.h; a chain's sum times the group's
// step is added to the total, and the unit comes last.
//
// Rows of int8 activations are computed several at a time and lie in groups: [K / 64, rows of the group, 64].
#pragma once
#include "linear.h"

namespace tritium {

template <int kBits> constexpr int kOffset = 1 << (kBits - 1);
template <int kBits> constexpr int64_t kUnit = 32 / kBits;  // weights in a unit
constexpr int32_t kMostSteps = 2048;  // a power of two: the largest scale of an output stays as it was
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

// sums + a . b, where each number fits 16 bits.
inline i32xw add_short_products(i32xw sums, i32xw a, i32xw b) {
#if defined(__AVX512VNNI__) && defined(__AVX512F__)
  const __m512i low = bit_cast<__m512i>(b & 0xffff);  // the high word of a then meets a zero
  return bit_cast<i32xw>(_mm512_dpwssd_epi32(bit_cast<__m512i>(sums), bit_cast<__m512i>(a), low));
#else
  return sums + a * b;
#endif
}

// kWide steps of a group.
inline i32xw load_steps(const int16_t* p) {
  typedef int16_t i16xw __attribute__((vector_size(kWide * 2)));
  i16xw steps;
  std::memcpy(&steps, p, sizeof(steps));
  return __builtin_convertvector(steps, i32xw);
}

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

// What one call of the loops below works on: R rows, one panel, all of K.
template <int kBits> struct Work {
  const uint32_t* panel;
  const void* x;           // int8 [K / 64, R, 64], or floats [K, R]
  const int16_t* steps;    // [groups, kPanel] of 4 bits
  const float* units;      // [kPanel]
  const int32_t* offsets;  // [R, num_offsets], one for every offset_size inputs: -offset x sum(activations); null for floats
  int64_t num_groups, units_per_group, num_offsets;  // offsets of a row
  float* totals;  // [R, kPanel], written
};
// Inputs that an offset stands for.
template <int kBits> inline int64_t offset_size(int64_t padded) { return kBits == 8 ? padded : kPiece; }

template <int R> void run_integers(const Work<8>& work) {
  const int8_t* x = static_cast<const int8_t*>(work.x);
  const int64_t size = work.units_per_group * kUnit<8>;
  i32xw sums[R][kAcross];
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < kAcross; ++i) sums[r][i] = i32xw{} + work.offsets[r];
  for (int64_t k = 0; k < size; k += kPiece)
    dot_piece<8, R>(work.panel + k / kUnit<8> * kPanel, x + k / 64 * 64 * R + k % 64, sums);
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < kAcross; ++i)
      store_wide(work.totals + r * kPanel + i * kWide, to_floats(sums[r][i]) * load_wide(work.units + i * kWide));
}

// A piece's sum fits 16 bits, its product with a step 27: kPiecesInTotal of these fit 32, of which the upper and the lower
// 16 are then added up apart. Both are exact as floats, and so is the one times 65536.
constexpr int64_t kPiecesInTotal = 32;
inline f32xw rounded(i32xw high, i32xw low) { return fma(to_floats(high), splat_wide(65536.0f), to_floats(low)); }

template <int R> void run_integers(const Work<4>& work) {
  const int8_t* x = static_cast<const int8_t*>(work.x);
  const uint32_t* panel = work.panel;
  const int64_t in_group = work.units_per_group * kUnit<4> / kPiece, num_pieces = work.num_groups * in_group;
  alignas(64) int32_t halves[2][R][kPanel] = {};
  int64_t piece = 0, in_turn = 0;
  const int16_t* steps = work.steps;
  while (piece < num_pieces) {
    i32xw totals[R][kAcross] = {};
    for (const int64_t end = std::min(piece + kPiecesInTotal, num_pieces); piece < end; ++piece) {
      i32xw sums[R][kAcross];
      for (int r = 0; r < R; ++r)
        for (int i = 0; i < kAcross; ++i) sums[r][i] = i32xw{} + work.offsets[r * work.num_offsets + piece];
      dot_piece<4, R>(panel + piece * (kPiece / kUnit<4>) * kPanel, x + piece / 2 * 64 * R + piece % 2 * 32, sums);
      for (int i = 0; i < kAcross; ++i) {
        const i32xw step = load_steps(steps + i * kWide);
        for (int r = 0; r < R; ++r) totals[r][i] = add_short_products(totals[r][i], sums[r][i], step);
      }
      if (++in_turn == in_group) in_turn = 0, steps += kPanel;
    }
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < kAcross; ++i) {
        int32_t *high = halves[0][r] + i * kWide, *low = halves[1][r] + i * kWide;
        const i32xw new_high = load_ints(high) + (totals[r][i] >> 16), new_low = load_ints(low) + (totals[r][i] & 0xffff);
        std::memcpy(high, &new_high, sizeof(new_high)), std::memcpy(low, &new_low, sizeof(new_low));
      }
  }
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < kAcross; ++i) {
      const f32xw total = rounded(load_ints(halves[0][r] + i * kWide), load_ints(halves[1][r] + i * kWide));
      store_wide(work.totals + r * kPanel + i * kWide, total * load_wide(work.units + i * kWide));
    }
}

template <int R, int kBits> void run_floats(const Work<kBits>& work) {
  const float* x = static_cast<const float*>(work.x);
  constexpr int64_t kUnits = kChain / kUnit<kBits>;
  for (int64_t g = 0, unit = 0; g < work.num_groups; ++g) {
    f32xw steps[kAcross];
    for (int i = 0; i < kAcross; ++i)
      steps[i] = kBits == 8 ? splat_wide(1.0f) : to_floats(load_steps(work.steps + g * kPanel + i * kWide));
    for (const int64_t end = unit + work.units_per_group; unit < end;) {
      const int64_t count = std::min(kUnits, end - unit);
      f32xw sums[R][kAcross] = {};
      chain_units<kBits, R>(work.panel + unit * kPanel, x + unit * kUnit<kBits> * R, count, sums);
      for (int r = 0; r < R; ++r)
        for (int i = 0; i < kAcross; ++i) {
          float* total = work.totals + r * kPanel + i * kWide;
          store_wide(total, unit == 0 ? sums[r][i] * steps[i] : fma(sums[r][i], steps[i], load_wide(total)));
        }
      unit += count;
    }
  }
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < kAcross; ++i) {
      float* total = work.totals + r * kPanel + i * kWide;
      store_wide(total, load_wide(total) * load_wide(work.units + i * kWide));
    }
}

template <int kBits, int... R>
inline void run(int num_rows, bool is_integer, const Work<kBits>& work, std::integer_sequence<int, R...>) {
  using Function = void (*)(const Work<kBits>&);
  static constexpr Function integers[] = {run_integers<R + 1>...}, floats[] = {run_floats<R + 1, kBits>...};
  (is_integer ? integers : floats)[num_rows - 1](work);
}

}  // namespace tritium
