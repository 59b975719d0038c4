// Attention of one sequence and kv head on AMX tiles, bf16: what varlen_attention.cpp does there.
//
//   scores = q k^T   products of 32 rows by 32 keys: keys are packed as a linear's outputs are, [H / 2, 32 keys, 2]
//   softmax          over all keys of a row at once, in fp32; what comes out is rounded to bf16 and packed for the tiles
//   out = p v        products over all keys, in tiles all the time; packed as [keys / 2, 32 of H, 2]; divided by the sums last
//
// Numbers. A row's scores, its softmax and its sum over the keys, in steps of 32, are its own, whichever rows share a group.
// Keys behind the sequence count as zeros in the products and are left out of the softmax.
#pragma once
#include <limits>

#include "linear_amx.h"

#if defined(__AMX_BF16__) && defined(__linux__)
namespace tritium {

class AmxSequence {
 public:
  AmxSequence(int64_t head_size, int64_t num_keys, Scratch& memory)
      : size_(head_size), padded_(round_up(head_size, kTileK)), num_keys_(num_keys), padded_keys_(round_up(num_keys, kTileK)) {
    const int64_t per_key = 2 * padded_ + 3 * kGroup;  // keys, values, scores in fp32, probabilities; in bf16
    const int64_t count = padded_keys_ * per_key + 3 * kGroup * padded_;
    bf16* p = reinterpret_cast<bf16*>(memory.reserve(static_cast<size_t>(count) * sizeof(bf16)));
    const auto take = [&p](int64_t size) { bf16* taken = p; p += size; return taken; };
    keys_ = take(padded_keys_ * padded_), values_ = take(padded_keys_ * padded_);
    scores_ = reinterpret_cast<float*>(take(2 * padded_keys_ * kGroup)), probabilities_ = take(padded_keys_ * kGroup);
    query_ = take(kGroup * padded_), output_ = reinterpret_cast<float*>(take(2 * kGroup * padded_));
  }
  AmxSequence(const AmxSequence&) = delete;

  // The keys and values, rows of H `stride` apart.
  void load(const bf16* keys, const bf16* values, int64_t stride) {
    for (int64_t key = 0; key < padded_keys_; key += kLanes)
      for (int64_t h = 0; h < padded_; h += 2 * kLanes) pack_keys(keys, stride, key, h);
    for (int64_t key = 0; key < padded_keys_; key += 2) {
      const bf16* even = key < num_keys_ ? values + key * stride : nullptr;
      const bf16* odd = key + 1 < num_keys_ ? values + (key + 1) * stride : nullptr;
      for (int64_t h = 0; h < padded_; h += kLanes) {
        const u32x16 pairs = extend(part(even, h)) | extend(part(odd, h)) << 16;
        // [panel of 32 of H, pair of keys, 32]
        std::memcpy(values_ + h / kPanel * kPanel * padded_keys_ + key * kPanel + h % kPanel * 2, &pairs, sizeof(pairs));
      }
    }
  }

  // Up to 32 rows: query(r) has H elements, as out(r) will. `configured`: the rows that the tiles are set up for.
  template <class Q, class O> void attend(int64_t num_rows, Q query, O out, float scale, float softcap, int64_t& configured) {
    if (configured != num_rows) configure_tiles(configured = num_rows);
    const bool is_tall = num_rows > kTileRows;
    for (int64_t r = 0; r < num_rows; ++r) amx_pack(query(r), r, size_, padded_, query_);
    for (int64_t key = 0; key < padded_keys_; key += kPanel)
      amx_group(keys_ + key * padded_, query_, padded_, is_tall, true, scores_ + key * kGroup, Ahead{});
    float sums[kGroup];
    for (int64_t r = 0; r < num_rows; ++r) sums[r] = softmax(r, scale, softcap);
    for (int64_t h = 0; h < padded_; h += kPanel)
      amx_group(values_ + h * padded_keys_, probabilities_, padded_keys_, is_tall, true, output_ + h * kGroup, Ahead{});
    for (int64_t r = 0; r < num_rows; ++r) {
      bf16* to = out(r);
      for_vectors(size_, [&](int64_t h, int64_t count) {
        store(to + h, load16(output_ + (h / kPanel * kGroup + r) * kPanel + h % kPanel) / sums[r], count);
      });
    }
  }

 private:
  // 16 elements from `h` on of a row; zeros where there are none.
  u16x16 part(const bf16* row, int64_t h) const {
    u16x16 found = {};
    const int64_t count = row == nullptr ? 0 : std::min(kLanes, size_ - h);
    if (count == kLanes) std::memcpy(&found, row + h, sizeof(found));
    else if (count > 0) std::memcpy(&found, row + h, static_cast<size_t>(count) * sizeof(bf16));
    return found;
  }

  // 16 keys times 32 of H into [panel of 32 keys, pair of H, 32].
  void pack_keys(const bf16* keys, int64_t stride, int64_t key, int64_t h) {
    u32xw x[kWide];
    for (int64_t i = 0; i < kLanes; ++i) {
      const bf16* row = key + i < num_keys_ ? keys + (key + i) * stride : nullptr;
      const u16x16 halves[2] = {part(row, h), part(row, h + kLanes)};
      std::memcpy(&x[i], halves, sizeof(x[i]));
    }
    transpose(x);
    bf16* to = keys_ + (key / kPanel * padded_ + h) * kPanel + key % kPanel * 2;
    for (int64_t i = 0; i < kLanes; ++i) std::memcpy(to + i * 2 * kPanel, &x[i], sizeof(x[i]));
  }

  // Scores of row r to probabilities, not yet divided by their sum, which is returned.
  float softmax(int64_t r, float scale, float softcap) {
    const auto row = [&](int64_t key) { return scores_ + (key / kPanel * kGroup + r) * kPanel + key % kPanel; };
    const float lowest = -std::numeric_limits<float>::infinity();
    f32x16 largest = splat(lowest), total = {};
    for (int64_t key = 0; key < padded_keys_; key += kLanes) {
      f32x16 x = load16(row(key)) * scale;
      if (softcap > 0.0f) x = softcap * tanh_wide(x / softcap);
      const int64_t count = num_keys_ - key;
      if (count < kLanes) {
        const i32x16 lane = lanes_from(0);
        x = lane < static_cast<int32_t>(count) ? x : splat(lowest);
      }
      store16(row(key), x);
      largest = x > largest ? x : largest;
    }
    const f32xw all[kParts] = {largest};
    const float max = max_lane(all);
    for (int64_t key = 0; key < padded_keys_; key += kLanes) {
      const f32x16 p = exp_nonpositive(load16(row(key)) - max);
      total += p;
      store16(probabilities_ + (key / kTileK * kGroup + r) * kTileK + key % kTileK, p);
    }
    return sum(total);
  }

  const int64_t size_, padded_, num_keys_, padded_keys_;
  bf16 *keys_, *values_, *probabilities_, *query_;
  float *scores_, *output_;
};

}  // namespace tritium
#endif
