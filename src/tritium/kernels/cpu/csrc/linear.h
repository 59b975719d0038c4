// What the linear kernels share: the packed weight, the packed activations, and the inner loops for vector units.
//
// A weight [N, K] is cut into panels of kPanel outputs. In a panel, K goes first and the outputs lie side by side:
//   float, f16   [K, kPanel]
//   bf16         [K / 2, kPanel, 2]   pairs along K, which is what dot product instructions and AMX tiles read;
//                                     K is padded with zeros to whole AMX tiles of 32
// The last panel is filled up with zeros. One layout serves every number of rows.
//
// Numbers. An output is a sum over K in an order that depends on K alone: pieces of kChain, in each piece one chain of
// fused multiply-adds from zero, the pieces added in order. AMX has one chain over all of K in steps of 32 (linear_amx.h).
// Rows are computed several at a time and share the loads of the weight, never a sum.
#pragma once
#include <algorithm>
#include <type_traits>

#include "transpose.h"

namespace tritium {

constexpr int64_t kPanel = 2 * kWide > 16 ? 2 * kWide : 16;  // outputs side by side: 32 with AVX-512
constexpr int kAcross = static_cast<int>(kPanel) / kWide;    // vectors in it
constexpr int kMostRows = kWide == 16 ? 14 : kWide == 8 ? 6 : 3;  // rows x kAcross sums fill the registers
constexpr int64_t kChain = 64;   // of K: longer chains round away more than torch's sums do, shorter ones cost time
constexpr int64_t kTileK = 32;   // bf16 along K in an AMX tile

#if defined(__AVX512BF16__)
constexpr bool kHasDot = true;
#else
constexpr bool kHasDot = false;
#endif

inline int64_t parts_of(int64_t size, int64_t most) { return (size + most - 1) / most; }
inline int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }
template <class T> constexpr bool kIsBf16 = std::is_same<T, bf16>::value;
template <class T> inline int64_t padded_k(int64_t k) { return kIsBf16<T> ? round_up(k, kTileK) : k; }

// What a row's packed activations are made of: bf16 pairs where there is a dot product for them, else floats.
template <class T> using Activation = std::conditional_t<kIsBf16<T> && kHasDot, uint32_t, float>;
template <class T> constexpr int64_t kPerUnit = std::is_same<Activation<T>, float>::value ? 1 : 2;  // elements of K

// ---- kAcross vectors of weights for one step along K

inline void load_panel(const float* p, f32xw (&w)[kAcross]) {
  for (int i = 0; i < kAcross; ++i) w[i] = load_wide(p + i * kWide);
}
inline void load_panel(const f16* p, f32xw (&w)[kAcross]) {
#if defined(__AVX512F__)
  for (int i = 0; i < kAcross; ++i) w[i] = load16(p + i * kWide);
#elif defined(__F16C__)
  for (int i = 0; i < kAcross; ++i)
    w[i] = bit_cast<f32xw>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i * kWide))));
#else
  for (int i = 0; i < kAcross; i += kParts) {
    const f32x16 all = load16(p + i * kWide);
    std::memcpy(&w[i], &all, sizeof(all));
  }
#endif
}

// Asks for the weights of some steps on: the hardware's prefetching alone leaves a core at 9 of 13 GB/s with 8 rows.
constexpr int64_t kAhead = 4096;  // bytes
template <class T> inline void prefetch(const T* panel) {
  for (int64_t i = 0; i < kPanel * static_cast<int64_t>(sizeof(T)); i += kLine)
    __builtin_prefetch(reinterpret_cast<const char*>(panel) + kAhead + i);
}

// What to ask for during a chain: from `from` on, `per_k` bytes further with each element of K.
struct Ahead { const char* from; int64_t per_k; };
template <class T> inline void prefetch(Ahead ahead, int64_t k) {
  for (int64_t i = 0; i < kPanel * static_cast<int64_t>(sizeof(T)); i += kLine)
    __builtin_prefetch(ahead.from + k * ahead.per_k + i, 0, 2);
}

// sums[r] += x[r] . panel over [begin, end) of K; x lies as [K, R]. Two steps of K at once for a pair of bf16.
template <int R, class T>
inline void chain(const T* panel, const float* x, int64_t num_k, Ahead ahead, f32xw (&sums)[R][kAcross]) {
#pragma GCC unroll 4  // the loop's own instructions would take some of the turns of a multiply-add's port
  for (int64_t k = 0; k < num_k; ++k) {
    f32xw w[kAcross];
    load_panel(panel + k * kPanel, w);
    prefetch<T>(ahead, k);
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < kAcross; ++i) sums[r][i] = fma(splat_wide(x[k * R + r]), w[i], sums[r][i]);
  }
}
template <int R>
inline void chain(const bf16* panel, const float* x, int64_t num_k, Ahead ahead, f32xw (&sums)[R][kAcross]) {
  for (int64_t k = 0; k < num_k; k += 2) {
    prefetch<bf16>(ahead, k), prefetch<bf16>(ahead, k + 1);
    for (int i = 0; i < kAcross; ++i) {
      u32xw pairs;
      std::memcpy(&pairs, panel + k * kPanel + i * 2 * kWide, sizeof(pairs));
      const f32xw even = bit_cast<f32xw>(pairs << 16), odd = bit_cast<f32xw>(pairs & 0xffff0000u);
      for (int r = 0; r < R; ++r) {
        sums[r][i] = fma(splat_wide(x[k * R + r]), even, sums[r][i]);
        sums[r][i] = fma(splat_wide(x[(k + 1) * R + r]), odd, sums[r][i]);
      }
    }
  }
}
#if defined(__AVX512BF16__)
template <int R>
inline void chain(const bf16* panel, const uint32_t* x, int64_t num_k, Ahead ahead, f32xw (&sums)[R][kAcross]) {
  for (int64_t pair = 0; pair < num_k / 2; ++pair) {
    prefetch<bf16>(ahead, 2 * pair), prefetch<bf16>(ahead, 2 * pair + 1);
    __m512bh w[kAcross];
    for (int i = 0; i < kAcross; ++i) w[i] = (__m512bh)_mm512_loadu_si512(panel + 2 * (pair * kPanel + i * kWide));
    for (int r = 0; r < R; ++r) {
      const __m512bh both = (__m512bh)_mm512_set1_epi32(static_cast<int>(x[pair * R + r]));
      for (int i = 0; i < kAcross; ++i)
        sums[r][i] = bit_cast<f32xw>(_mm512_dpbf16_ps(bit_cast<__m512>(sums[r][i]), both, w[i]));
    }
  }
}
#endif

// totals [R, kPanel], zero at first, += each of a block's chains.
template <int R, class T, class A>
void add_block(const T* panel, const A* x, int64_t num_k, bool is_first, Ahead ahead, float* totals) {
  for (int64_t k = 0; k < num_k; k += kChain) {
    f32xw sums[R][kAcross] = {};
    chain<R>(panel + k * kPanel, x + k * R / kPerUnit<T>, std::min(kChain, num_k - k),
             Ahead{ahead.from + k * ahead.per_k, ahead.per_k}, sums);
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < kAcross; ++i) {
        float* total = totals + r * kPanel + i * kWide;
        store_wide(total, is_first && k == 0 ? sums[r][i] : load_wide(total) + sums[r][i]);
      }
  }
}

template <class T, class A, int... R>
inline void add_block(int num_rows, const T* panel, const A* x, int64_t num_k, bool is_first, Ahead ahead, float* totals,
                      std::integer_sequence<int, R...>) {
  using Function = void (*)(const T*, const A*, int64_t, bool, Ahead, float*);
  static constexpr Function functions[] = {add_block<R + 1, T, A>...};
  functions[num_rows - 1](panel, x, num_k, is_first, ahead, totals);
}
template <class T, class A>
inline void add_block(int num_rows, const T* panel, const A* x, int64_t num_k, bool is_first, Ahead ahead, float* totals) {
  add_block(num_rows, panel, x, num_k, is_first, ahead, totals, std::make_integer_sequence<int, kMostRows>{});
}

// ---- activations of one group, packed as [K, rows] in units

// kWide units of a row.
inline u32xw load_units(const float* x) { return bit_cast<u32xw>(load_wide(x)); }
inline u32xw load_units(const f16* x) { return bit_cast<u32xw>(load_wide(x)); }
inline u32xw load_units(const bf16* x) {
  if constexpr (!kHasDot) return bit_cast<u32xw>(load_wide(x));
  u32xw pairs;
  std::memcpy(&pairs, x, sizeof(pairs));
  return pairs;
}

// rows[r]: `num_in` elements each. What lies between num_in and `padded` is zero.
template <class T> void pack_group(const T* const* rows, int64_t count, int64_t num_in, int64_t padded, Activation<T>* to) {
  using A = Activation<T>;
  constexpr int64_t kRun = kPerUnit<T>;
  const int64_t num_units = padded / kRun;
  int64_t u = 0;
  for (; (u + kWide) * kRun <= num_in; u += kWide) {
    u32xw x[kWide] = {};
    for (int64_t r = 0; r < count; ++r) x[r] = load_units(rows[r] + u * kRun);
    transpose(x);
    for (int i = 0; i < kWide; ++i) {  // whole vectors: what one writes behind its rows, the next one overwrites
      A* at = to + (u + i) * count;
      const bool is_inside = (u + i) * count + kWide <= num_units * count;
      std::memcpy(at, &x[i], is_inside ? sizeof(x[i]) : static_cast<size_t>(count) * sizeof(A));
    }
  }
  for (; u < num_units; ++u)
    for (int64_t r = 0; r < count; ++r) {
      const T* x = rows[r] + u * kRun;
      if constexpr (std::is_same<A, float>::value) {
        to[u * count + r] = u < num_in ? to_float(*x) : 0.0f;
      } else {
        A pair = 0;
        if (u * kRun < num_in) std::memcpy(&pair, x, static_cast<size_t>(std::min(kRun, num_in - u * kRun)) * sizeof(T));
        to[u * count + r] = pair;
      }
    }
}

}  // namespace tritium
