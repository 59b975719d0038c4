// What attention and sampling share: a fast e^x for arguments that are never positive, and the thread's scratch memory.
#pragma once
#include <cstdlib>
#include <new>

#include "tritium.h"

namespace tritium {

// e^x for x <= 0, to 1 ulp: 0 below -87.3 (no subnormal results), 1 at 0, NaN stays. Half the work of `exp16`, whose
// range it does not need; Cephes' polynomial.
inline f32x16 exp_nonpositive(f32x16 x) {
  f32x16 shifted = x * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer in the low bits
  f32x16 n = shifted - 12582912.0f;
  f32x16 r = x - n * 0.693145751953125f;
  r = r - n * 1.42860682030941723212e-6f;
  f32x16 p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  f32x16 power = bit_cast<f32x16>((bit_cast<i32x16>(shifted) << 23) + 0x3f800000);  // the integer's low 9 bits count
  return x < -87.33654f ? f32x16{} : p * power;
}

inline float exp_nonpositive(float x) { return exp_nonpositive(splat(x))[0]; }

// The largest lane of numbers; which one NaN lanes give is unspecified.
inline float max_lane(f32x16 x) {
  const auto larger = [](float a, float b) { return a > b ? a : b; };
  float s[8];
  for (int i = 0; i < 8; ++i) s[i] = larger(x[i], x[i + 8]);
  for (int half = 4; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) s[i] = larger(s[i], s[i + half]);
  return s[0];
}

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
