// What one request changes about its logits before a token is chosen (kernels/logit_edits.py says who fills it in).
//
// In this order: `processed` takes the place of the row; bias is added; a token of prompt or output is divided by the
// repetition penalty when its logit is positive, else multiplied, then loses frequency * (its count in the output) and,
// if that is not zero, presence; what is not allowed becomes -inf; what is banned becomes -inf. A token's sum is made in
// double and rounded once; one that is finite stays finite. Work is proportional to the tokens named.
#pragma once
#include "sampling_row.h"

namespace tritium {

struct LogitEdits {
  const int32_t *bias_ids, *allowed_ids, *seen_ids, *banned_ids;
  const float* bias_values;
  const int32_t* seen_counts;
  const float* processed;  // [V]; null: the row as it is
  int64_t num_bias, num_allowed, num_seen, num_banned;  // num_allowed 0: all are
  float repetition, frequency, presence;
};

inline float rounded(double x) {
  constexpr double largest = std::numeric_limits<float>::max();
  if (std::isinf(x)) return static_cast<float>(x);
  return static_cast<float>(std::min(std::max(x, -largest), largest));
}

// False when `processed` holds NaN or +inf.
inline bool apply(const LogitEdits& e, SampledRow& row) {
  if (e.processed != nullptr && !row.load(e.processed)) return false;
  for (int64_t i = 0; i < e.num_bias; ++i)
    if (const int64_t id = e.bias_ids[i]; row.has(id)) row.set(id, rounded(double{row.logit(id)} + e.bias_values[i]));
  for (int64_t i = 0; i < e.num_seen; ++i) {
    const int64_t id = e.seen_ids[i], count = e.seen_counts[i];
    if (!row.has(id)) continue;
    double x = row.logit(id);
    x = x > 0 ? x / e.repetition : x * e.repetition;
    if (count > 0) x -= double{e.frequency} * static_cast<double>(count) + e.presence;
    row.set(id, rounded(x));
  }
  if (e.num_allowed > 0) row.keep_only(e.allowed_ids, e.num_allowed);
  for (int64_t i = 0; i < e.num_banned; ++i)
    if (row.has(e.banned_ids[i])) row.set(e.banned_ids[i], -kInfinity);
  row.settle();
  return true;
}

}  // namespace tritium
