// What every kernel of the library shares: 16-lane vectors, the storage types, the export macro, the row loop.
//
// Numbers. A kernel computes in fp32, 16 lanes at a time, and the lane an element falls in depends on its index in its
// row alone. A row's tail is padded into a full vector and takes the same path. So a row's bits depend neither on how
// many rows there are, nor on their addresses, nor on the threads. No ATen, no -ffast-math.
//
// ABI. A kernel is `void tritium_<name>_<f32|bf16|f16>(const <Name>Args*)`: TRITIUM_EXPORT defines the three, and
// TRITIUM_EXPORT_ONE a `tritium_<name>` without dtype, and both `tritium_<name>_args_size`, which Python compares with its
// own. Pointers and int64 come first in a struct, 4-byte fields last. Strides count elements unless a kernel says so, and
// its tensors do not overlap.
#pragma once
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include <cstdint>
#include <cstring>
#include <initializer_list>

namespace tritium {

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef uint16_t u16x32 __attribute__((vector_size(64)));
constexpr int64_t kLanes = 16;
constexpr int64_t kLine = 64;  // bytes of a cache line

// Storage types: two bytes that no arithmetic is done on.
struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

template <class To, class From> inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

inline f32x16 splat(float x) { return x - f32x16{}; }  // x - 0 is x for every x, so a compiler drops it; x + 0 is not

// a * b + c rounded once where the machine can, else twice. The library is compiled with -ffp-contract=off: what is fused
// is fused here, by name, and not where a compiler's version happens to see a product beside a sum.
inline f32x16 fma(f32x16 a, f32x16 b, f32x16 c) {
#if defined(__AVX512F__)
  return bit_cast<f32x16>(_mm512_fmadd_ps(bit_cast<__m512>(a), bit_cast<__m512>(b), bit_cast<__m512>(c)));
#elif defined(__FMA__)
  struct Halves { __m256 low, high; };
  const Halves x = bit_cast<Halves>(a), y = bit_cast<Halves>(b), z = bit_cast<Halves>(c);
  return bit_cast<f32x16>(Halves{_mm256_fmadd_ps(x.low, y.low, z.low), _mm256_fmadd_ps(x.high, y.high, z.high)});
#elif defined(__aarch64__)
  struct Quarters { float32x4_t part[4]; };
  const Quarters x = bit_cast<Quarters>(a), y = bit_cast<Quarters>(b);
  Quarters z = bit_cast<Quarters>(c);
  for (int i = 0; i < 4; ++i) z.part[i] = vfmaq_f32(z.part[i], x.part[i], y.part[i]);
  return bit_cast<f32x16>(z);
#else
  return a * b + c;
#endif
}

// ---- storage <-> fp32, 16 at a time; casts round to nearest even and keep NaN, as torch does

// GCC 12 splits these two conversions into 256-bit halves, at twice the instructions. (Masked, because the plain forms make
// it warn of uninitialised values; an all-ones mask costs nothing.)
#ifdef __AVX512F__
constexpr __mmask16 kAll = 0xffff;
inline u32x16 extend(u16x16 h) { return bit_cast<u32x16>(_mm512_maskz_cvtepu16_epi32(kAll, bit_cast<__m256i>(h))); }
inline u16x16 truncate(u32x16 w) { return bit_cast<u16x16>(_mm512_maskz_cvtepi32_epi16(kAll, bit_cast<__m512i>(w))); }
#else
inline u32x16 extend(u16x16 h) { return __builtin_convertvector(h, u32x16); }
inline u16x16 truncate(u32x16 w) { return __builtin_convertvector(w, u16x16); }
#endif

inline f32x16 widen(u16x16 h, bf16) { return bit_cast<f32x16>(extend(h) << 16); }

inline u16x16 narrow(f32x16 x, bf16) {
#if defined(__AVX512BF16__) && defined(__AVX512DQ__)
  // The instruction takes subnormals for zero and keeps what NaN says: it is for the others.
  if (__builtin_expect(_mm512_fpclass_ps_mask(bit_cast<__m512>(x), 0x81 | 0x20) == 0, 1))
    return bit_cast<u16x16>(_mm512_cvtneps_pbh(bit_cast<__m512>(x)));
#endif
  u32x16 w = bit_cast<u32x16>(x);
  u32x16 rounded = (w + 0x7fff + ((w >> 16) & 1)) >> 16;
  u32x16 result = (w & 0x7fffffff) > 0x7f800000 ? u32x16{} + 0x7fc0 : rounded;
  return truncate(result);
}

#ifdef __AVX512F__
inline f32x16 widen(u16x16 h, f16) { return bit_cast<f32x16>(_mm512_maskz_cvtph_ps(kAll, bit_cast<__m256i>(h))); }
inline u16x16 narrow(f32x16 x, f16) {
  return bit_cast<u16x16>(_mm512_maskz_cvtps_ph(kAll, bit_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#else
inline f32x16 widen(u16x16 h, f16) {  // subnormals by a magic add, the rest by a scale: no branch
  u32x16 w = extend(h) << 16, two_w = w + w;
  f32x16 normal = bit_cast<f32x16>((two_w >> 4) + (0xe0u << 23)) * 0x1.0p-112f;
  f32x16 subnormal = bit_cast<f32x16>((two_w >> 17) | (126u << 23)) - 0.5f;
  u32x16 magnitude = two_w < (1u << 27) ? bit_cast<u32x16>(subnormal) : bit_cast<u32x16>(normal);
  return bit_cast<f32x16>((w & 0x80000000u) | magnitude);
}

inline u16x16 narrow(f32x16 x, f16) {  // the add of a power of two chosen by the exponent does the rounding
  u32x16 w = bit_cast<u32x16>(x), two_w = w + w, bias = two_w & 0xff000000u;
  f32x16 base = (bit_cast<f32x16>(w & 0x7fffffffu) * 0x1.0p+112f) * 0x1.0p-110f;
  bias = bias < 0x71000000u ? u32x16{} + 0x71000000u : bias;
  u32x16 bits = bit_cast<u32x16>(bit_cast<f32x16>((bias >> 1) + 0x07800000u) + base);
  u32x16 magnitude = ((bits >> 13) & 0x7c00u) + (bits & 0x0fffu);
  magnitude = two_w > 0xff000000u ? u32x16{} + 0x7e00u : magnitude;
  return truncate((w >> 16 & 0x8000u) | magnitude);
}
#endif

inline f32x16 load16(const float* p) { f32x16 x; std::memcpy(&x, p, sizeof(x)); return x; }
inline void store16(float* p, f32x16 x) { std::memcpy(p, &x, sizeof(x)); }
template <class T> inline f32x16 load16(const T* p) { u16x16 h; std::memcpy(&h, p, sizeof(h)); return widen(h, T{}); }
template <class T> inline void store16(T* p, f32x16 x) { u16x16 h = narrow(x, T{}); std::memcpy(p, &h, sizeof(h)); }

// The first `count` (1 to 16) elements; the lanes behind them read as zero and are not written.
template <class T> inline f32x16 load_part(const T* p, int64_t count) {
  T lanes[kLanes] = {};
  std::memcpy(lanes, p, static_cast<size_t>(count) * sizeof(T));
  return load16(lanes);
}
template <class T> inline void store_part(T* p, f32x16 x, int64_t count) {
  T lanes[kLanes];
  store16(lanes, x);
  std::memcpy(p, lanes, static_cast<size_t>(count) * sizeof(T));
}

// x with the lanes from `count` on set to zero.
inline f32x16 first_lanes(f32x16 x, int64_t count) {
  const i32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return lane < static_cast<int32_t>(count) ? x : f32x16{};
}

// fp32 -> T -> fp32: what a cast in the middle of a formula does to the value.
inline f32x16 round_to(f32x16 x, float) { return x; }
inline f32x16 round_to(f32x16 x, f16) { return widen(narrow(x, f16{}), f16{}); }
inline f32x16 round_to(f32x16 x, bf16) {
  u32x16 w = bit_cast<u32x16>(x);
  u32x16 rounded = (w + 0x7fff + ((w >> 16) & 1)) & 0xffff0000u;
  return bit_cast<f32x16>((w & 0x7fffffff) > 0x7f800000 ? w | 0x00400000u : rounded);
}

// One element.
inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(f16 x) { return widen(u16x16{} + x.bits, f16{})[0]; }

// ---- the order of a sum: 16 lanes, then this tree

inline float sum(f32x16 x) {
  float s[8];
  for (int i = 0; i < 8; ++i) s[i] = x[i] + x[i + 8];
  return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
}

// Calls f(index, count) for each vector of a row; count is 16, less in the last one. Load and store through these.
template <class F> inline void for_vectors(int64_t size, F f) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) f(i, kLanes);
  if (i < size) f(i, size - i);
}
template <class T> inline f32x16 load(const T* p, int64_t count) {
  return count == kLanes ? load16(p) : load_part(p, count);
}
template <class T> inline void store(T* p, f32x16 x, int64_t count) {
  if (count == kLanes) store16(p, x); else store_part(p, x, count);
}

// ---- e^x, to about 1 ulp; 0 below -104, inf above 88.8, NaN stays (Cody-Waite reduction, degree-6 polynomial)

inline f32x16 exp16(f32x16 x) {
  f32x16 clamped = x < -104.0f ? splat(-104.0f) : (x > 89.0f ? splat(89.0f) : x);
  // 1.5 * 2^23: rounds to an integer in the low bits
  f32x16 shifted = fma(clamped, splat(1.44269504088896341f), splat(12582912.0f));
  f32x16 n = shifted - 12582912.0f;
  f32x16 r = fma(n, splat(-0.693145751953125f), clamped);
  r = fma(n, splat(-1.42860682030941723212e-6f), r);
  f32x16 p = splat(1.3981999e-3f);
  for (const float c : {8.3334519e-3f, 4.1665795e-2f, 1.6666666e-1f, 0.5f}) p = fma(p, r, splat(c));
  p = fma(p * r, r, r) + 1.0f;
#ifdef __AVX512F__
  const f32x16 result = bit_cast<f32x16>(_mm512_scalef_ps(bit_cast<__m512>(p), bit_cast<__m512>(n)));  // p 2^n
#else
  i32x16 k = bit_cast<i32x16>(shifted) - bit_cast<int32_t>(12582912.0f);
  i32x16 half = k >> 1;  // two steps, of which one rounds: 2^k itself may be subnormal or too large
  f32x16 low = bit_cast<f32x16>((half + 127) << 23), high = bit_cast<f32x16>((k - half + 127) << 23);
  const f32x16 result = p * low * high;
#endif
  return x != x ? x : result;
}

// ---- rows over threads. Work is counted in elements of a norm (about 0.4 ns each). A parallel region costs 2-5 us on an
// idle machine, but 4-12 ms (measured) when another process holds a core and the barrier waits for it: only work of more
// than 50 us is worth it.

constexpr int64_t kParallelWork = 1 << 17;
template <class F> inline void for_rows(int64_t num_rows, int64_t work_per_row, F f) {
  if (num_rows == 1 || num_rows * work_per_row < kParallelWork) {
    for (int64_t row = 0; row < num_rows; ++row) f(row);
    return;
  }
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < num_rows; ++row) f(row);
}

}  // namespace tritium

#define TRITIUM_SYMBOL extern "C" __attribute__((visibility("default")))
#define TRITIUM_SIZE(name, Args) TRITIUM_SYMBOL int64_t tritium_##name##_args_size() { return sizeof(Args); }
#define TRITIUM_EXPORT(name, Args)                                                                          \
  TRITIUM_SIZE(name, Args)                                                                                  \
  TRITIUM_SYMBOL void tritium_##name##_f32(const Args* args) { name<float>(*args); }                        \
  TRITIUM_SYMBOL void tritium_##name##_bf16(const Args* args) { name<tritium::bf16>(*args); }               \
  TRITIUM_SYMBOL void tritium_##name##_f16(const Args* args) { name<tritium::f16>(*args); }
#define TRITIUM_EXPORT_ONE(name, Args)                                                                      \
  TRITIUM_SIZE(name, Args)                                                                                  \
  TRITIUM_SYMBOL void tritium_##name(const Args* args) { name(*args); }
