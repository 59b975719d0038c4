// moe: a mixture of experts. Every expert's rows are gathered and multiplied by its packed weights (linear.h).
//
//   route     each token chooses its experts, or brings its choice; slots (token, choice) are sorted by expert, in the
//             order of tokens
//   gate, up  an expert's slots in groups of rows x panels of outputs; the gated activation at once
//   down      the same over the results
//   combine   a token's choices added up in their order, the likeliest first
//
// Numbers. A row's products are those of the linear kernels: a sum over K in an order that depends on K alone, whichever
// rows share the group. What is added to a token's output, and in which order, is the token's own choice. So a row's bits
// do not depend on who else chose an expert, nor on threads.
#include <omp.h>

#include <limits>

#include "activation.h"
#include "linear_amx.h"

namespace {
using namespace tritium;

struct MoeArgs {
  const void *x, *router;           // [T, D] and [T, E]; rows `stride` apart
  const void *gate, *up, *down;     // packed by expert, one after the other: [F, D], [F, D], [D, F]
  void* out;                        // [T, D], dense
  const int64_t* chosen;            // [T, top_k], dense: experts that tokens bring; null: the router says which
  const void* chosen_weights;       // [T, top_k], dense, in fp32 or in x's type
  int64_t num_tokens, x_stride, router_stride, num_in, num_hidden, num_experts, top_k, is_normed, kind;
  int64_t has_wide_weights;         // chosen_weights are in fp32
};

constexpr int64_t kMostExperts = 1024;

// Rows of one expert that are multiplied together: slots [first, first + count).
struct Group { int64_t expert, first, count; };

#if defined(__AMX_BF16__)
template <class T> inline bool is_on_amx() { return kIsBf16<T> && amx_is_granted(); }
constexpr int64_t kMostGrouped = kGroup > kMostRows ? kGroup : kMostRows;
#else
template <class T> inline bool is_on_amx() { return false; }
constexpr int64_t kMostGrouped = kMostRows;
#endif

// Products of groups of packed rows with one weight of every expert.
template <class T> class Product {
  using A = Activation<T>;

 public:
  Product(const void* weights, int64_t num_in, int64_t num_out, char* packed)
      : weights_(static_cast<const T*>(weights)), num_in_(num_in), padded_(padded_k<T>(num_in)),
        num_panels_((num_out + kPanel - 1) / kPanel), packed_(packed) {}

  // Bytes that the packed rows take: AMX wants whole groups.
  static size_t packed_bytes(int64_t num_slots, int64_t num_groups, int64_t num_in) {
    const int64_t rows = is_on_amx<T>() ? num_groups * kMostGrouped : num_slots;
    return static_cast<size_t>(rows * padded_k<T>(num_in)) * std::max(sizeof(A), sizeof(T));
  }

  int64_t num_panels() const { return num_panels_; }

  // row(slot): its elements. `index` is the group's number.
  template <class F> void pack(const Group& g, [[maybe_unused]] int64_t index, F row) const {
#if defined(__AMX_BF16__)
    if constexpr (kIsBf16<T>)
      if (is_on_amx<T>()) {
        for (int64_t r = 0; r < g.count; ++r) amx_pack(row(g.first + r), r, num_in_, padded_, tiles(index));
        return;
      }
#endif
    const T* rows[kMostRows];
    for (int64_t r = 0; r < g.count; ++r) rows[r] = row(g.first + r);
    pack_group(rows, g.count, num_in_, padded_, units(g));
  }

  // sums [g.count, kPanel] of one panel of the expert's outputs. configured: for how many rows AMX's tiles are set up.
  void multiply(const Group& g, [[maybe_unused]] int64_t index, int64_t p, float* sums,
                [[maybe_unused]] int64_t& configured) const {
    const T* panel = weights_ + (g.expert * num_panels_ + p) * kPanel * padded_;
    const Ahead ahead{reinterpret_cast<const char*>(panel) + kAhead, kPanel * static_cast<int64_t>(sizeof(T))};
#if defined(__AMX_BF16__)
    if constexpr (kIsBf16<T>)
      if (is_on_amx<T>()) {
        if (configured != g.count) configure_tiles(configured = g.count);
        return amx_group(panel, tiles(index), padded_, g.count > kTileRows, true, sums, ahead);
      }
#endif
    add_block(static_cast<int>(g.count), panel, units(g), padded_, true, ahead, sums);
  }

 private:
  A* units(const Group& g) const { return reinterpret_cast<A*>(packed_) + g.first * padded_ / kPerUnit<T>; }
#if defined(__AMX_BF16__)
  bf16* tiles(int64_t index) const { return reinterpret_cast<bf16*>(packed_) + index * kGroup * padded_; }
#endif
  const T* weights_;
  const int64_t num_in_, padded_, num_panels_;
  char* packed_;
};

// A token's experts, the likeliest first, of equal ones the lower number, and their weights.
template <class T> void route(const MoeArgs& a, int64_t token, int32_t* experts, float* weights) {
  const T* router = static_cast<const T*>(a.router) + token * a.router_stride;
  float logits[kMostExperts];
  bool is_taken[kMostExperts] = {};
  for (int64_t e = 0; e < a.num_experts; ++e) logits[e] = to_float(router[e]);
  for (int64_t j = 0; j < a.top_k; ++j) {
    int64_t best = -1;  // with NaN some expert is taken all the same: the weights then are NaN
    for (int64_t e = 0; e < a.num_experts; ++e)
      if (!is_taken[e] && (best < 0 || logits[e] > logits[best])) best = e;
    is_taken[best] = true;
    experts[j] = static_cast<int32_t>(best);
  }
  const float max = logits[experts[0]];
  float total = 0.0f;
  for (int64_t j = 0; j < a.top_k; ++j) {
    weights[j] = exp16(splat(logits[experts[j]] - max))[0];
    total += weights[j];
  }
  if (!a.is_normed) {
    total = 0.0f;
    for (int64_t e = 0; e < a.num_experts; ++e) total += exp16(splat(logits[e] - max))[0];
  }
  for (int64_t j = 0; j < a.top_k; ++j) weights[j] /= total;
}

// The experts that a token brings. One that there is not gives a row of NaN.
template <class T> void take(const MoeArgs& a, int64_t token, int32_t* experts, float* weights) {
  for (int64_t j = 0, i = token * a.top_k; j < a.top_k; ++j, ++i) {
    const bool is_known = a.chosen[i] >= 0 && a.chosen[i] < a.num_experts;
    const float weight = a.has_wide_weights ? static_cast<const float*>(a.chosen_weights)[i]
                                            : to_float(static_cast<const T*>(a.chosen_weights)[i]);
    experts[j] = is_known ? static_cast<int32_t>(a.chosen[i]) : 0;
    weights[j] = is_known ? weight : std::numeric_limits<float>::quiet_NaN();
  }
}

template <class T> class Moe {
 public:
  // Each memory is of one thread and grows to the largest batch.
  Moe(const MoeArgs& args, Scratch& lists, Scratch& rows) : a(args), num_slots_(a.num_tokens * a.top_k), rows_(rows) {
    const int64_t most_groups = std::min(num_slots_, num_slots_ / kMostRows + a.num_experts);
    const int64_t bytes = num_slots_ * (2 * 4 + 2 * 8) + (a.num_experts + 1) * 8 +
                          most_groups * static_cast<int64_t>(sizeof(Group));
    int64_t* p = reinterpret_cast<int64_t*>(lists.reserve(static_cast<size_t>(bytes)));
    const auto take = [&p](int64_t count) { int64_t* taken = p; p += count; return taken; };
    places_ = take(num_slots_), tokens_ = take(num_slots_), starts_ = take(a.num_experts + 1);
    groups_ = reinterpret_cast<Group*>(take(most_groups * 3));
    experts_ = reinterpret_cast<int32_t*>(p), weights_ = reinterpret_cast<float*>(p) + num_slots_;
  }

  void operator()() {
    // As for a linear: below about 50 us one thread is faster than a parallel region is safe.
    const bool is_large = num_slots_ * a.num_in * a.num_hidden * 3 > (1 << 22);
#pragma omp parallel for schedule(static) if (is_large)
    for (int64_t t = 0; t < a.num_tokens; ++t)
      (a.chosen == nullptr ? route<T> : take<T>)(a, t, experts_ + t * a.top_k, weights_ + t * a.top_k);
    sort();
    char* packed = reserve_rows();
    const Product<T> gate(a.gate, a.num_in, a.num_hidden, packed), up(a.up, a.num_in, a.num_hidden, packed);
    const Product<T> down(a.down, a.num_hidden, a.num_in, packed);
    const T* x = static_cast<const T*>(a.x);
#pragma omp parallel if (is_large)
    {
      alignas(64) float sums[kMostGrouped * kPanel], more[kMostGrouped * kPanel];
      int64_t configured = 0;
#pragma omp for schedule(static)
      for (int64_t g = 0; g < num_groups_; ++g)
        gate.pack(groups_[g], g, [&](int64_t slot) { return x + tokens_[slot] * a.x_stride; });
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < a.num_experts * gate.num_panels(); ++i) {
        const int64_t p = i % gate.num_panels();
        for (int64_t g = first_group(i / gate.num_panels()); g < first_group(i / gate.num_panels() + 1); ++g) {
          gate.multiply(groups_[g], g, p, sums, configured);
          up.multiply(groups_[g], g, p, more, configured);
          activate(groups_[g], p, sums, more);
        }
      }
#pragma omp for schedule(static)
      for (int64_t g = 0; g < num_groups_; ++g)
        down.pack(groups_[g], g, [&](int64_t slot) { return hidden_ + slot * a.num_hidden; });
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < a.num_experts * down.num_panels(); ++i) {
        const int64_t p = i % down.num_panels();
        for (int64_t g = first_group(i / down.num_panels()); g < first_group(i / down.num_panels() + 1); ++g) {
          down.multiply(groups_[g], g, p, sums, configured);
          keep(groups_[g], p, sums);
        }
      }
#if defined(__AMX_BF16__)
      if (is_on_amx<T>()) _tile_release();
#endif
#pragma omp for schedule(static)
      for (int64_t t = 0; t < a.num_tokens; ++t) combine(t);
    }
  }

 private:
  // Memory for packed rows, which is returned, for hidden_ and for results_.
  char* reserve_rows() {
    const auto round = [](size_t bytes) { return (bytes + 63) / 64 * 64; };
    const size_t hidden = round(static_cast<size_t>(num_slots_ * a.num_hidden) * sizeof(T));
    const size_t results = round(static_cast<size_t>(num_slots_ * a.num_in) * sizeof(T));
    const size_t packed = Product<T>::packed_bytes(num_slots_, num_groups_, std::max(a.num_in, a.num_hidden));
    char* base = rows_.reserve(hidden + results + packed);
    hidden_ = reinterpret_cast<T*>(base), results_ = reinterpret_cast<T*>(base + hidden);
    return base + hidden + results;
  }

  // Slots by expert: places_[token, choice] is a slot, tokens_[slot] its token; groups_ cut each expert's into parts.
  void sort() {
    std::fill_n(starts_, a.num_experts + 1, 0);
    for (int64_t i = 0; i < num_slots_; ++i) ++starts_[experts_[i] + 1];
    for (int64_t e = 0; e < a.num_experts; ++e) starts_[e + 1] += starts_[e];
    num_groups_ = 0;
    const int64_t most = is_on_amx<T>() ? kMostGrouped : kMostRows;
    for (int64_t e = 0; e < a.num_experts; ++e) {
      const int64_t count = starts_[e + 1] - starts_[e], parts = (count + most - 1) / most;
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t first = is_on_amx<T>() ? part * most : part * count / parts;
        const int64_t end = is_on_amx<T>() ? std::min(first + most, count) : (part + 1) * count / parts;
        groups_[num_groups_++] = {e, starts_[e] + first, end - first};
      }
    }
    for (int64_t i = 0; i < num_slots_; ++i) {
      const int64_t slot = starts_[experts_[i]]++;
      places_[i] = slot, tokens_[slot] = i / a.top_k;
    }
    // starts_[e] is now the end of e; from here on it holds the first group of e.
    int64_t g = 0;
    for (int64_t e = 0; e <= a.num_experts; ++e) {
      while (g < num_groups_ && groups_[g].expert < e) ++g;
      starts_[e] = g;
    }
  }
  int64_t first_group(int64_t expert) const { return starts_[expert]; }

  void activate(const Group& g, int64_t p, const float* gate, const float* up) const {
    const int64_t first = p * kPanel, width = std::min(kPanel, a.num_hidden - first);
    for (int64_t r = 0; r < g.count; ++r) {
      T* out = hidden_ + (g.first + r) * a.num_hidden + first;
      for_vectors(width, [&](int64_t i, int64_t n) {  // rounded as linear and gated_activation round
        const f32x16 u = round_to(load16(up + r * kPanel + i), T{});
        store(out + i, round_to(apply(a.kind, round_to(load16(gate + r * kPanel + i), T{})), T{}) * u, n);
      });
    }
  }

  void keep(const Group& g, int64_t p, const float* sums) const {
    const int64_t first = p * kPanel, width = std::min(kPanel, a.num_in - first);
    for (int64_t r = 0; r < g.count; ++r) {
      T* out = results_ + (g.first + r) * a.num_in + first;
      for_vectors(width, [&](int64_t i, int64_t n) { store(out + i, load16(sums + r * kPanel + i), n); });
    }
  }

  void combine(int64_t token) const {
    T* out = static_cast<T*>(a.out) + token * a.num_in;
    for_vectors(a.num_in, [&](int64_t i, int64_t n) {
      f32x16 total = splat(0.0f);
      for (int64_t j = 0; j < a.top_k; ++j) {
        const int64_t choice = token * a.top_k + j;
        total = fma(splat(weights_[choice]), load(results_ + places_[choice] * a.num_in + i, n), total);
      }
      store(out + i, total, n);
    });
  }

  const MoeArgs& a;
  const int64_t num_slots_;
  Scratch& rows_;
  int64_t num_groups_ = 0;
  int32_t* experts_;
  float* weights_;
  int64_t *places_, *tokens_, *starts_;
  Group* groups_;
  T *hidden_ = nullptr, *results_ = nullptr;
};

template <class T> void moe(const MoeArgs& a) {
  static thread_local Scratch lists, rows;
  if (a.num_tokens > 0) Moe<T>(a, lists, rows)();
}

}  // namespace

TRITIUM_EXPORT(moe, MoeArgs)
