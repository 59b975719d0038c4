// One row of logits on its way to a token: the work behind the rule that sampling.cpp states.
//
// No sort of the vocabulary. The maxima of blocks of 128 bound from below what is kept, so that mostly a few hundred
// candidates need a closer look. A flat row, where they do not suffice, is cut by a histogram of its logits, whose
// deciding bin is cut again. Sums run in fixed orders: lanes, then blocks or tokens in turn in double.
// One core of Zen 4, V = 128k, fp32: greedy 20 us, temperature 60, with top_p 67 for a row as models make them, 170-210
// for a flat or random one (a vectorised guess of the cut by a sample, tried instead of the histogram, was no faster).
#pragma once
#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <utility>
#if defined(__AVX__)
#include <immintrin.h>
#endif

#include "softmax.h"

namespace tritium {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kBlock = 128, kBins = 256, kSortable = 128;

// A number that orders tokens as the rule does: larger comes first.
inline uint64_t rank(float x, int32_t id) {
  const uint32_t bits = bit_cast<uint32_t>(x + 0.0f);  // -0 becomes 0
  const uint32_t ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return (uint64_t{ordered} << 32) | ~static_cast<uint32_t>(id);
}

inline int32_t rank_id(uint64_t rank) { return static_cast<int32_t>(~static_cast<uint32_t>(rank)); }
inline float rank_logit(uint64_t rank) {
  const uint32_t ordered = static_cast<uint32_t>(rank >> 32);
  return bit_cast<float>(ordered & 0x80000000u ? ordered & 0x7fffffffu : ~ordered);
}

// Calls f(lane) for each lane of a comparison that holds.
template <class F> inline void for_lanes(i32xw holds, F f) {
#if defined(__AVX512F__)
  uint32_t bits = _mm512_test_epi32_mask((__m512i)holds, (__m512i)holds);
#elif defined(__AVX__)
  uint32_t bits = static_cast<uint32_t>(_mm256_movemask_ps((__m256)holds));
#else
  uint32_t bits = 0;
  for (int lane = 0; lane < kWide; ++lane) bits |= (static_cast<uint32_t>(holds[lane]) & 1) << lane;
#endif
  for (; bits != 0; bits &= bits - 1) f(__builtin_ctz(bits));
}

// Tokens in the order of their ids, with the weights that a cut adds up.
struct List {
  float *x, *w;
  int32_t* id;
  int64_t size = 0;
  void push(float logit, float weight, int32_t token) { x[size] = logit, w[size] = weight, id[size++] = token; }
};

class SampledRow {
 public:
  SampledRow(int64_t vocab_size, Scratch& memory) : size_(vocab_size), num_blocks_((vocab_size + kBlock - 1) / kBlock) {
    const int64_t padded = num_blocks_ * kBlock, words = 8 * padded + 5 * num_blocks_;
    float* p = reinterpret_cast<float*>(memory.reserve(static_cast<size_t>(words) * sizeof(float)));
    const auto take = [&p](int64_t count) { float* taken = p; p += count; return taken; };
    x_ = take(padded), w_ = take(padded);
    for (List* list : {&candidates_, &undecided_})
      list->x = take(padded), list->w = take(padded), list->id = reinterpret_cast<int32_t*>(take(padded));
    block_max_ = take(num_blocks_), block_copy_ = take(num_blocks_);
    block_sum_ = reinterpret_cast<double*>(take(2 * num_blocks_));
    is_stale_ = reinterpret_cast<uint8_t*>(take(num_blocks_));
    std::fill_n(is_stale_, num_blocks_, 0);
  }

  // Takes the row in. False when a logit is NaN or +inf.
  template <class T> bool load(const T* logits) {
    i32xw is_nan = {};
    f32xw smallest[kParts];
    std::fill_n(smallest, kParts, splat_wide(kInfinity));
    for (int64_t b = 0; b < num_blocks_; ++b) {
      f32xw largest[kParts];
      std::fill_n(largest, kParts, splat_wide(-kInfinity));
      const auto take = [&](int64_t i, int part, f32xw x) {
        is_nan |= x != x;
        largest[part] = x > largest[part] ? x : largest[part];
        smallest[part] = (x < smallest[part]) & (x > -kInfinity) ? x : smallest[part];
        store_wide(x_ + i, x);
      };
      if ((b + 1) * kBlock <= size_) {
        for_block(b, [&](int64_t i, int part) { take(i, part, load_wide(logits + i)); });
      } else {
        float tail[kBlock];
        std::fill_n(tail, kBlock, -kInfinity);
        for (int64_t i = b * kBlock; i < size_; ++i) tail[i - b * kBlock] = to_float(logits[i]);
        for_block(b, [&](int64_t i, int part) { take(i, part, load_wide(tail + i - b * kBlock)); });
      }
      block_max_[b] = max_lane(largest);
    }
    find_max();
    for (auto& part : smallest) part = -part;
    min_ = -max_lane(smallest);
    for (int lane = 0; lane < kWide; ++lane)
      if (is_nan[lane]) return false;
    return max_ < kInfinity;
  }

  // Changes of single logits: any number of `set` and `keep_only`, then `settle` before anything else.
  bool has(int64_t id) const { return id >= 0 && id < size_; }
  void set(int64_t id, float x) {
    x_[id] = x;
    min_ = x > -kInfinity && x < min_ ? x : min_;
    is_stale_[id / kBlock] = 1;
  }
  // Every other token's logit becomes -inf.
  void keep_only(const int32_t* ids, int64_t count) {
    candidates_.size = 0;
    for (int64_t i = 0; i < count; ++i)
      if (has(ids[i])) candidates_.push(x_[ids[i]], 0, ids[i]);
    std::fill_n(x_, num_blocks_ * kBlock, -kInfinity);
    std::fill_n(block_max_, num_blocks_, -kInfinity);
    for (int64_t i = 0; i < candidates_.size; ++i) set(candidates_.id[i], candidates_.x[i]);
  }
  void settle() {
    for (int64_t b = 0; b < num_blocks_; ++b) {
      if (!is_stale_[b]) continue;
      block_max_[b] = *std::max_element(x_ + b * kBlock, x_ + (b + 1) * kBlock);
      is_stale_[b] = 0;
    }
    find_max();
  }

  bool is_empty() const { return max_ == -kInfinity; }
  float max() const { return max_; }
  float logit(int64_t id) const { return x_[id]; }

  // The first token of the order.
  int64_t greedy() const {
    const int64_t b = std::find(block_max_, block_max_ + num_blocks_, max_) - block_max_;
    return std::find(x_ + b * kBlock, x_ + size_, max_) - x_;
  }

  // The first tokens of the order with a finite logit, best first; returns how many there are, `count` at most.
  int64_t best(int64_t count, int64_t* ids) {
    collect(count);
    count = std::min(count, candidates_.size);
    uint64_t* ranks = reinterpret_cast<uint64_t*>(undecided_.x);  // its x and w lie side by side: room for all
    for (int64_t i = 0; i < candidates_.size; ++i) ranks[i] = rank(candidates_.x[i], candidates_.id[i]);
    std::partial_sort(ranks, ranks + count, ranks + candidates_.size, std::greater<uint64_t>());
    for (int64_t i = 0; i < count; ++i) ids[i] = rank_id(ranks[i]);
    return count;
  }

  // Weighs each token e^((x - max) / temperature); returns the sum.
  double weigh(float inverse_temperature) {
    double total = 0;
    for (int64_t b = 0; b < num_blocks_; ++b) {
      f32xw sums[kParts] = {};
      for_block(b, [&](int64_t i, int part) {
        const f32xw w = exp_nonpositive((load_wide(x_ + i) - max_) * inverse_temperature);
        store_wide(w_ + i, w);
        sums[part] += w;
      });
      total += block_sum_[b] = static_cast<double>(sum(sums));
    }
    return total;
  }

  // The token drawn at u. `total` is what weigh(inverse_temperature) returned if that was the last call of it, else 0.
  int64_t draw(float inverse_temperature, int64_t top_k, float top_p, float min_p, double total, double u) {
    const bool has_top_p = top_p < 1.0f;
    if (top_k > 0 && top_k < size_) {
      keep_first(top_k);
      total = weigh_candidates(inverse_temperature);
      return draw_from_candidates(has_top_p ? cut(candidates_, top_p * total, 0) : 0, min_p, u);
    }
    if (total == 0) total = weigh(inverse_temperature);
    if (!has_top_p && min_p <= 0) return draw_from_blocks(0, 0, u);
    uint64_t last = 0;
    if (has_top_p) {
      collect(kTopBlocks);
      double found = 0;
      for (int64_t i = 0; i < candidates_.size; ++i) found += candidates_.w[i] = w_[candidates_.id[i]];
      if (found >= top_p * total) return draw_from_candidates(cut(candidates_, top_p * total, 0), min_p, u);
      last = cut_all(top_p * total, inverse_temperature);
    }
    sum_blocks(last, min_p);
    return draw_from_blocks(last, min_p, u);
  }

 private:
  static constexpr int64_t kTopBlocks = 64;

  struct Bins {  // equal parts of the logits from `high` down, the last without a lower end
    double high, scale;
    int64_t operator()(float x) const { return static_cast<int64_t>(std::min((high - x) * scale, kBins - 1.0)); }
  };

  // Calls f(index, part) for each vector of block b; parts come in turn.
  template <class F> static void for_block(int64_t b, F f) {
    for (int64_t i = b * kBlock; i < (b + 1) * kBlock; i += kLanes)
      for (int part = 0; part < kParts; ++part) f(i + part * kWide, part);
  }

  void find_max() { max_ = *std::max_element(block_max_, block_max_ + num_blocks_); }

  // Lists at least the first `count` tokens of the order, or all with a finite logit if they are fewer. Weights are 1.
  void collect(int64_t count) {
    float bound = std::numeric_limits<float>::lowest();
    if (count < num_blocks_) {
      std::copy_n(block_max_, num_blocks_, block_copy_);
      std::nth_element(block_copy_, block_copy_ + count - 1, block_copy_ + num_blocks_, std::greater<float>());
      bound = std::max(bound, block_copy_[count - 1]);  // that many blocks have a token as large
    }
    candidates_.size = 0;
    for (int64_t b = 0; b < num_blocks_; ++b) {
      if (block_max_[b] < bound) continue;
      for (int64_t i = b * kBlock; i < (b + 1) * kBlock; ++i)
        if (x_[i] >= bound) candidates_.push(x_[i], 1.0f, static_cast<int32_t>(i));
    }
  }

  // Lists the first k tokens of the order.
  void keep_first(int64_t k) {
    collect(k);
    const uint64_t last = cut(candidates_, static_cast<double>(k), 0);
    const int64_t size = candidates_.size;
    candidates_.size = 0;
    for (int64_t i = 0; i < size; ++i)
      if (rank(candidates_.x[i], candidates_.id[i]) >= last)
        candidates_.push(candidates_.x[i], 1.0f, candidates_.id[i]);
  }

  double weigh_candidates(float inverse_temperature) {
    for (int64_t i = 0; i < candidates_.size; i += kWide)  // there is room for whole vectors
      store_wide(candidates_.w + i, exp_nonpositive((load_wide(candidates_.x + i) - max_) * inverse_temperature));
    double total = 0;
    for (int64_t i = 0; i < candidates_.size; ++i) total += candidates_.w[i];
    return total;
  }

  // The rank of the last token of the shortest front part of the list that weighs `target`, `before` included; the
  // list's last token if all of it weighs less. Uses `undecided_`, which may be the list.
  uint64_t cut(const List& list, double target, double before) {
    if (list.size <= kSortable) return cut_sorted(list, target, before);
    const auto [low, high] = std::minmax_element(list.x, list.x + list.size);
    if (*low == *high) {  // in the order of ids already
      int64_t i = 0;
      while (i + 1 < list.size && (before += list.w[i]) < target) ++i;
      return rank(list.x[i], list.id[i]);
    }
    const Bins bins{*high, (kBins - 1) / (static_cast<double>(*high) - *low)};
    double weights[kBins] = {};
    for (int64_t i = 0; i < list.size; ++i) weights[bins(list.x[i])] += list.w[i];
    const int64_t bin = find_bin(weights, target, before), size = list.size;
    undecided_.size = 0;  // filled behind where the list is read, if it is the list
    for (int64_t i = 0; i < size; ++i)
      if (bins(list.x[i]) == bin) undecided_.push(list.x[i], list.w[i], list.id[i]);
    return cut(undecided_, target, before);
  }

  static uint64_t cut_sorted(const List& list, double target, double before) {
    std::pair<uint64_t, float> tokens[kSortable];
    for (int64_t i = 0; i < list.size; ++i) tokens[i] = {rank(list.x[i], list.id[i]), list.w[i]};
    std::sort(tokens, tokens + list.size, std::greater<>());
    int64_t i = 0;
    while (i + 1 < list.size && (before += tokens[i].second) < target) ++i;
    return tokens[i].first;
  }

  // The bin in which the weight from the first bin on reaches `target`, else the last that weighs anything. Adds to
  // `before` what lies in front of it.
  static int64_t find_bin(const double* weights, double target, double& before) {
    int64_t last = kBins - 1;
    while (last > 0 && weights[last] == 0) --last;
    int64_t bin = 0;
    while (bin < last && before + weights[bin] < target) before += weights[bin++];
    return bin;
  }

  // `cut` of all tokens by their weights.
  uint64_t cut_all(double target, float inverse_temperature) {
    // What is less likely than e^-17 times the first shares a bin: 262,144 such tokens weigh 1 % of it.
    const float scale = (kBins - 1) / std::max(std::min(max_ - min_, 17.0f / inverse_temperature), 1e-30f);
    const auto bins_of = [&](int64_t i) {
      const f32xw place = (max_ - load_wide(x_ + i)) * scale;
      return __builtin_convertvector(place < kBins - 1.0f ? place : splat_wide(kBins - 1.0f), i32xw);
    };
    constexpr int kTables = 4;  // as equal bins in a row would wait for each other
    double weights[kTables][kBins] = {};
    for (int64_t b = 0; b < num_blocks_; ++b) {
      int32_t bins[kBlock];
      for_block(b, [&](int64_t i, int) {
        const i32xw x = bins_of(i);
        std::memcpy(bins + i - b * kBlock, &x, sizeof(x));
      });
      const float* w = w_ + b * kBlock;
      for (int64_t i = 0; i < kBlock; i += kTables)
        for (int table = 0; table < kTables; ++table) weights[table][bins[i + table]] += w[i + table];
    }
    for (int table = 1; table < kTables; ++table)
      for (int64_t bin = 0; bin < kBins; ++bin) weights[0][bin] += weights[table][bin];
    double before = 0;
    const int32_t bin = static_cast<int32_t>(find_bin(weights[0], target, before));
    undecided_.size = 0;
    for (int64_t i = 0; i < num_blocks_ * kBlock; i += kWide)
      for_lanes((bins_of(i) == bin) & (load_wide(x_ + i) > -kInfinity), [&](int64_t lane) {
        undecided_.push(x_[i + lane], w_[i + lane], static_cast<int32_t>(i + lane));
      });
    return cut(undecided_, target, before);
  }

  // Kept are tokens up to rank `last` that weigh at least min_p, as the first token weighs 1.
  int64_t draw_from_candidates(uint64_t last, float min_p, double u) {
    double total = 0;
    for (int64_t i = 0; i < candidates_.size; ++i) {
      if (rank(candidates_.x[i], candidates_.id[i]) < last || candidates_.w[i] < min_p) candidates_.w[i] = 0;
      total += candidates_.w[i];
    }
    return candidates_.id[pick(candidates_.w, candidates_.size, u * total)];
  }

  // Calls f(index, part, weight) for each vector of block b; what is not kept weighs 0.
  template <class F> void for_kept(int64_t b, uint64_t last, float min_p, F f) const {
    const float bound = last ? rank_logit(last) : -kInfinity;
    const int32_t last_id = last ? rank_id(last) : static_cast<int32_t>(size_);
    for_block(b, [&](int64_t i, int part) {
      const f32xw x = load_wide(x_ + i), w = load_wide(w_ + i);
      const i32xw is_in_front = (x > bound) | ((x == bound) & (lanes_from(static_cast<int>(i)) <= last_id));
      f(i, part, (w >= min_p) & is_in_front ? w : f32xw{});
    });
  }

  void sum_blocks(uint64_t last, float min_p) {
    for (int64_t b = 0; b < num_blocks_; ++b) {
      f32xw sums[kParts] = {};
      for_kept(b, last, min_p, [&](int64_t, int part, f32xw w) { sums[part] += w; });
      block_sum_[b] = static_cast<double>(sum(sums));
    }
  }

  // `block_sum_` holds what the kept tokens weigh.
  int64_t draw_from_blocks(uint64_t last, float min_p, double u) const {
    double total = 0, before = 0;
    for (int64_t b = 0; b < num_blocks_; ++b) total += block_sum_[b];
    const int64_t drawn = pick(block_sum_, num_blocks_, u * total);
    for (int64_t b = 0; b < drawn; ++b) before += block_sum_[b];
    float weights[kBlock];
    for_kept(drawn, last, min_p, [&](int64_t i, int, f32xw w) { store_wide(weights + i - drawn * kBlock, w); });
    return drawn * kBlock + pick(weights, kBlock, u * total - before);
  }

  // The first index at which the running sum passes `target`; the last with any weight if rounding hides it.
  template <class W> static int64_t pick(const W* weights, int64_t count, double target) {
    int64_t last = 0;
    double passed = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (!(weights[i] > 0)) continue;
      last = i;
      if ((passed += weights[i]) > target) break;
    }
    return last;
  }

  const int64_t size_, num_blocks_;
  float *x_, *w_, *block_max_, *block_copy_, max_ = -kInfinity, min_ = 0;  // of finite logits
  double* block_sum_;
  uint8_t* is_stale_;  // blocks whose maximum is to be found again
  List candidates_, undecided_;
};

}  // namespace tritium
