// linear: x weight^T + bias over a packed weight (linear.h), perhaps with an activation applied to it; and the packing.
//
// A gated linear has 2 num_out outputs, gates before the values they gate, and writes num_out. In its packed weight a panel
// holds half gates and half what they gate, so that a panel's sums are all that its outputs need.
#include <omp.h>

#include "activation.h"
#include "linear_amx.h"

namespace {
using namespace tritium;

struct LinearArgs {
  const void *x, *weight, *bias;  // weight packed; bias null or [num_out], [2 num_out] when gated
  void* out;                      // [rows, num_out], dense
  int64_t num_outer, num_inner, stride_outer, stride_inner;  // rows of x
  int64_t num_in, num_out;
  int64_t kind;  // of the activation; -1: none
  int32_t is_gated;
};

struct LinearPackArgs {
  const void* weight;  // [num_out, num_in], rows `stride` apart
  void* out;
  int64_t num_in, num_out, stride;
  int32_t is_gated;  // num_out counts gates and what they gate
};

constexpr int64_t kHalf = kPanel / 2;

template <class T> class Linear {
 public:
  explicit Linear(const LinearArgs& args)
      : a(args), num_rows_(a.num_outer * a.num_inner), padded_(padded_k<T>(a.num_in)),
        num_panels_(a.is_gated ? (a.num_out + kHalf - 1) / kHalf : (a.num_out + kPanel - 1) / kPanel) {}

  // Below about 50 us one thread is faster than a parallel region is safe (tritium.h).
  bool is_worth_threads() const {
    const int64_t num_weights = padded_ * a.num_out;
    return num_weights * static_cast<int64_t>(sizeof(T)) > (1 << 19) || num_weights * num_rows_ > (1 << 23);
  }

 protected:
  const T* row(int64_t m) const {
    return static_cast<const T*>(a.x) + m / a.num_inner * a.stride_outer + m % a.num_inner * a.stride_inner;
  }
  const T* panel(int64_t p) const { return static_cast<const T*>(a.weight) + p * kPanel * padded_; }

  // Rows [m, m + count) of one panel's outputs from their sums [count, kPanel]. What an activation reads is rounded first,
  // as it would be in memory: the bits are those of two steps.
  void finish(int64_t p, int64_t m, int64_t count, const float* sums) const {
    if (a.is_gated) return finish_gated(p, m, count, sums);
    const int64_t first = p * kPanel, width = std::min(kPanel, a.num_out - first);
    const T* bias = a.bias == nullptr ? nullptr : static_cast<const T*>(a.bias) + first;
    for (int64_t r = 0; r < count; ++r) {
      T* out = static_cast<T*>(a.out) + (m + r) * a.num_out + first;
      for_vectors(width, [&](int64_t i, int64_t n) {
        f32x16 total = load16(sums + r * kPanel + i);
        if (bias != nullptr) total += load(bias + i, n);
        store(out + i, a.kind < 0 ? total : apply(a.kind, round_to(total, T{})), n);
      });
    }
  }

  void finish_gated(int64_t p, int64_t m, int64_t count, const float* sums) const {
    const int64_t first = p * kHalf, width = std::min(kHalf, a.num_out - first);
    const T* bias = static_cast<const T*>(a.bias);
    for (int64_t r = 0; r < count; ++r) {
      T* out = static_cast<T*>(a.out) + (m + r) * a.num_out + first;
      for_vectors(width, [&](int64_t i, int64_t n) {
        f32x16 gate = load(sums + r * kPanel + i, n), up = load(sums + r * kPanel + kHalf + i, n);
        if (bias != nullptr) gate += load(bias + first + i, n), up += load(bias + a.num_out + first + i, n);
        store(out + i, round_to(apply(a.kind, round_to(gate, T{})), T{}) * round_to(up, T{}), n);
      });
    }
  }

  const LinearArgs& a;
  const int64_t num_rows_, padded_, num_panels_;
};

// Vector units: groups of up to kMostRows rows, packed as [K, rows of the group].
template <class T> class VectorLinear : public Linear<T> {
  using Base = Linear<T>;
  using Base::a, Base::num_panels_, Base::num_rows_, Base::padded_;
  using A = Activation<T>;

 public:
  VectorLinear(const LinearArgs& args, Scratch& memory)
      : Base(args), num_groups_((num_rows_ + kMostRows - 1) / kMostRows),
        packed_(reinterpret_cast<A*>(memory.reserve(static_cast<size_t>(num_rows_ * padded_) * sizeof(A)))) {}

  void operator()() const {
#pragma omp parallel if (this->is_worth_threads())
    {
#pragma omp for schedule(static)
      for (int64_t g = 0; g < num_groups_; ++g) pack(g);
      static thread_local Scratch memory;
      float* totals = reinterpret_cast<float*>(memory.reserve(static_cast<size_t>(num_rows_ * kPanel) * sizeof(float)));
#pragma omp for schedule(static) nowait
      for (int64_t p = 0; p < num_panels_; ++p) multiply(p, totals);
    }
  }

 private:
  int64_t first_row(int64_t g) const { return g * num_rows_ / num_groups_; }
  int64_t rows_in(int64_t g) const { return first_row(g + 1) - first_row(g); }

  void pack(int64_t g) const {
    const int64_t first = first_row(g), count = rows_in(g), units = padded_ / kPerUnit<T>, whole = a.num_in / kPerUnit<T>;
    A* to = packed_ + first * units;
    for (int64_t r = 0; r < count; ++r) {
      const T* x = this->row(first + r);
      for (int64_t k = 0; k < whole; ++k) to[k * count + r] = unit(x + k * kPerUnit<T>, kPerUnit<T>);
      for (int64_t k = whole; k < units; ++k)
        to[k * count + r] = unit(x + k * kPerUnit<T>, std::max<int64_t>(0, a.num_in - k * kPerUnit<T>));
    }
  }
  static A unit(const T* x, int64_t count) {
    if constexpr (std::is_same<A, float>::value) {
      return count > 0 ? to_float(*x) : 0.0f;
    } else {
      A pair = 0;
      std::memcpy(&pair, x, static_cast<size_t>(std::min<int64_t>(count, 2)) * sizeof(T));
      return pair;
    }
  }

  void multiply(int64_t p, float* totals) const {
    const T* panel = this->panel(p);
    std::fill_n(totals, num_rows_ * kPanel, 0.0f);
    for (int64_t k = 0; k < padded_; k += kBlock) {
      const int64_t num_k = std::min(kBlock, padded_ - k);
      for (int64_t g = 0; g < num_groups_; ++g) {
        const int64_t first = first_row(g), count = rows_in(g);
        add_block(static_cast<int>(count), panel + k * kPanel, packed_ + (first * padded_ + k * count) / kPerUnit<T>,
                  num_k, totals + first * kPanel);
      }
    }
    this->finish(p, 0, num_rows_, totals);
  }

  const int64_t num_groups_;
  A* packed_;
};

#if defined(__AMX_BF16__)
// Tiles. Rows go in runs of kRunGroups groups and K in blocks of kBlockK, so that a run's block of activations (1 MB)
// stays in L2 while the panels pass by; where K has several blocks, the sums wait in memory. That changes no bit: the
// next block continues the chain.
class AmxLinear : public Linear<bf16> {
 public:
  AmxLinear(const LinearArgs& args, Scratch& memory)
      : Linear(args), num_groups_((num_rows_ + kGroup - 1) / kGroup), block_k_(num_groups_ == 1 ? padded_ : kBlockK),
        packed_(reinterpret_cast<bf16*>(
            memory.reserve(static_cast<size_t>(num_groups_ * kGroup * padded_) * sizeof(bf16)))) {}

  void operator()() const {
#pragma omp parallel if (is_worth_threads())
    {
#pragma omp for schedule(static)
      for (int64_t m = 0; m < num_rows_; ++m) pack(m);
      const int64_t thread = omp_get_thread_num(), count = omp_get_num_threads();
      const int64_t begin = thread * num_panels_ / count, end = (thread + 1) * num_panels_ / count;
      static thread_local Scratch memory;
      const int64_t num_sums = kRunGroups * kGroup * kPanel * (padded_ > block_k_ ? std::max<int64_t>(1, end - begin) : 1);
      float* sums = reinterpret_cast<float*>(memory.reserve(static_cast<size_t>(num_sums) * sizeof(float)));
      for (int64_t g = 0; g < num_groups_; g += kRunGroups)
        for (int64_t k = 0; k < padded_; k += block_k_)
          for (int64_t p = begin; p < end; ++p)
            multiply(p, p + 1 < end, k, g, sums + (padded_ > block_k_ ? (p - begin) * kRunGroups * kGroup * kPanel : 0));
      _tile_release();
    }
  }

 private:
  static constexpr int64_t kRunGroups = 8, kBlockK = 2048;

  // Group by group: [K / 32, 2, 16, 32], each [16, 32] a tile.
  void pack(int64_t m) const {
    const int64_t group = m / kGroup, tile = m % kGroup / kTileRows, r = m % kTileRows;
    bf16* to = packed_ + group * kGroup * padded_ + (tile * kTileRows + r) * kTileK;
    const bf16* x = row(m);
    for (int64_t k = 0; k < padded_; k += kTileK, to += kGroup * kTileK) {
      const int64_t count = std::min(kTileK, a.num_in - k);
      if (count < kTileK) std::memset(to, 0, kTileK * sizeof(bf16));
      std::memcpy(to, x + k, static_cast<size_t>(count) * sizeof(bf16));
    }
  }

  // One panel, one block of K, one run of groups from g on. sums [kRunGroups, kGroup, kPanel].
  void multiply(int64_t p, bool has_next, int64_t k, int64_t g, float* sums) const {
    const int64_t num_k = std::min(block_k_, padded_ - k), num_groups = std::min(kRunGroups, num_groups_ - g);
    const bf16* weights = panel(p) + k * kPanel;
    const char* next = reinterpret_cast<const char*>(panel(p + 1) + k * kPanel);
    const int64_t bytes_per_step = kTileK * kPanel * static_cast<int64_t>(sizeof(bf16));
    const int64_t lines = has_next && num_groups > 1 ? bytes_per_step / 64 / num_groups : 0;
    for (int64_t i = 0; i < num_groups; ++i, sums += kGroup * kPanel) {
      const int64_t first = (g + i) * kGroup, count = std::min(kGroup, num_rows_ - first);
      if (i == 0 || count < kGroup) configure_tiles(count);
      amx_group(weights, packed_ + first * padded_ + k * kGroup, num_k, count > kTileRows, k == 0, sums, next, lines);
      next += lines * 64 * (num_k / kTileK);
      if (k + num_k == padded_) finish(p, first, count, sums);
    }
  }

  const int64_t num_groups_, block_k_;
  bf16* packed_;
};
#endif

template <class T> void linear(const LinearArgs& a) {
  static thread_local Scratch memory;
#if defined(__AMX_BF16__)
  if constexpr (kIsBf16<T>)
    if (amx_is_granted()) return AmxLinear(a, memory)();
#endif
  VectorLinear<T>(a, memory)();
}

template <class T> void linear_pack(const LinearPackArgs& a) {
  const int64_t padded = padded_k<T>(a.num_in), num_gates = a.num_out / 2;
  const int64_t num_panels = a.is_gated ? (num_gates + kHalf - 1) / kHalf : (a.num_out + kPanel - 1) / kPanel;
  constexpr int64_t kRun = kIsBf16<T> ? 2 : 1;  // elements of K side by side
#pragma omp parallel for schedule(static)
  for (int64_t p = 0; p < num_panels; ++p) {
    T* to = static_cast<T*>(a.out) + p * kPanel * padded;
    for (int64_t k = 0; k < padded; ++k)
      for (int64_t i = 0; i < kPanel; ++i) {
        const int64_t gate = p * kHalf + i % kHalf;
        const int64_t n = !a.is_gated ? p * kPanel + i : i < kHalf ? gate : num_gates + gate;
        const bool is_inside = (a.is_gated ? gate < num_gates : n < a.num_out) && k < a.num_in;
        to[k / kRun * kRun * kPanel + i * kRun + k % kRun] =
            is_inside ? static_cast<const T*>(a.weight)[n * a.stride + k] : T{};
      }
  }
}

}  // namespace

TRITIUM_EXPORT(linear, LinearArgs)
TRITIUM_EXPORT(linear_pack, LinearPackArgs)

// Elements a packed weight takes: what `linear_pack` writes.
TRITIUM_SYMBOL int64_t tritium_linear_packed_size(int64_t num_out, int64_t num_in, int32_t is_bf16, int32_t is_gated) {
  return (is_gated ? 2 * round_up(num_out / 2, kHalf) : round_up(num_out, kPanel)) * (is_bf16 ? padded_k<bf16>(num_in) : num_in);
}
