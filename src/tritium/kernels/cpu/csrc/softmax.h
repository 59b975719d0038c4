// What attention and sampling share: vectors of the machine's own width, a fast e^x, the thread's scratch memory.
#pragma once
#include <cstdlib>
#include <new>

#include "tritium.h"

namespace tritium {

// ---- vectors of the own width of the machine. A 16-lane vector is kParts of them; compilers keep a wider one than the
// machine has in memory, at a tenth of the speed. Lanes do not meet in them: the width changes no bit.

#if defined(__AVX512F__)
constexpr int kWide = 16;
#elif defined(__AVX__)
constexpr int kWide = 8;
#else
constexpr int kWide = 4;
#endif
constexpr int kParts = 16 / kWide;
typedef float f32xw __attribute__((vector_size(kWide * 4)));
typedef int32_t i32xw __attribute__((vector_size(kWide * 4)));
typedef uint32_t u32xw __attribute__((vector_size(kWide * 4)));
typedef uint16_t u16xw __attribute__((vector_size(kWide * 2)));

#if !defined(__AVX512F__)  // there the type is tritium.h's own
inline f32xw fma(f32xw a, f32xw b, f32xw c) {
#if defined(__FMA__)
  return bit_cast<f32xw>(_mm256_fmadd_ps(bit_cast<__m256>(a), bit_cast<__m256>(b), bit_cast<__m256>(c)));
#elif defined(__aarch64__)
  return bit_cast<f32xw>(vfmaq_f32(bit_cast<float32x4_t>(c), bit_cast<float32x4_t>(a), bit_cast<float32x4_t>(b)));
#else
  return a * b + c;
#endif
}
#endif
inline f32xw splat_wide(float x) { return x - f32xw{}; }
inline f32xw load_wide(const float* p) { f32xw x; std::memcpy(&x, p, sizeof(x)); return x; }
inline f32xw load_wide(const bf16* p) {
  u16xw h;
  std::memcpy(&h, p, sizeof(h));
  return bit_cast<f32xw>(__builtin_convertvector(h, u32xw) << 16);
}
inline f32xw load_wide(const f16* p) {
  f32xw x;
  const f32x16 all = load_part(p, kWide);
  std::memcpy(&x, &all, sizeof(x));
  return x;
}
inline void store_wide(float* p, f32xw x) { std::memcpy(p, &x, sizeof(x)); }
inline i32xw lanes_from(int first) {
  constexpr int32_t lanes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  i32xw x;
  std::memcpy(&x, lanes, sizeof(x));
  return x + first;
}

// Over the lanes of 16, given as kParts vectors: the sum in the order of `sum`, and the largest number (which one NaN
// lanes give is unspecified).
inline float sum(const f32xw (&parts)[kParts]) {
  f32x16 x;
  std::memcpy(&x, parts, sizeof(x));
  return sum(x);
}
inline float max_lane(const f32xw (&parts)[kParts]) {
#if defined(__AVX512F__)
  return _mm512_mask_reduce_max_ps(0xffff, bit_cast<__m512>(parts[0]));
#endif
  float s[16];
  std::memcpy(s, parts, sizeof(s));
  for (int half = 8; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) s[i] = s[i] > s[i + half] ? s[i] : s[i + half];
  return s[0];
}

// e^x for x <= 0, to 1 ulp: 0 below -87.3 (no subnormal results), 1 at 0, NaN stays. Half the work of `exp16`, whose
// range it does not need; Cephes' polynomial.
inline f32xw exp_nonpositive(f32xw x) {
  f32xw shifted = fma(x, splat_wide(1.44269504088896341f), splat_wide(12582912.0f));  // 1.5 * 2^23: rounds to an integer in the low bits
  f32xw n = shifted - 12582912.0f;
  f32xw r = fma(n, splat_wide(-0.693145751953125f), x);
  r = fma(n, splat_wide(-1.42860682030941723212e-6f), r);
  f32xw p = splat_wide(1.9875691500e-4f);
  for (const float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    p = fma(p, r, splat_wide(c));
  p = fma(p, r * r, r) + 1.0f;
  f32xw power = bit_cast<f32xw>((bit_cast<u32xw>(shifted) << 23) + 0x3f800000u);  // the integer's low 9 bits count
  return x < -87.33654f ? f32xw{} : p * power;
}
inline float exp_nonpositive(float x) { return exp_nonpositive(splat_wide(x))[0]; }

// Memory of one thread that grows to the largest call it has seen and is never given back to the system in between.
class Scratch {
 public:
  ~Scratch() { std::free(data_); }
  // At least `size` bytes, aligned to a cache line, with undefined contents.
  char* reserve(size_t size) {
    if (size > size_) {
      std::free(data_);
      size_ = (size + 4095) & ~size_t{4095};
      data_ = static_cast<char*>(std::aligned_alloc(64, size_));
      if (data_ == nullptr) throw std::bad_alloc();
    }
    return data_;
  }

 private:
  char* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace tritium
