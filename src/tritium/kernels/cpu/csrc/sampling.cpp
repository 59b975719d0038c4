// sampling: one token per row of logits, and log-probabilities. A row depends on its own logits and parameters alone.
//
// The rule. Logits count as fp32. Tokens are ordered by logit, largest first, equal ones by id, lowest first. Filters
// keep a front part of that order, each of what the one before left: top_k the first k; top_p the shortest part whose
// probability reaches p; min_p the tokens at least min_p times as likely as the first. Probabilities are of logits
// divided by temperature. A token is drawn from the kept ones by inverting their cumulative sum in the order of ids, at
// u = Philox4x32-10(seed, counter) in [0, 1). Temperature 0: the first token. A row's edits (logit_edits.h) come before
// all this. A forced token is taken as it is. A row with NaN or +inf, or with nothing but -inf, has no answer: token -1,
// logprob NaN. Logprobs are of the model's own logits.
#include "logit_edits.h"

namespace {
using namespace tritium;

struct SamplingArgs {
  const void* logits;                        // [R, V], rows `stride` elements apart
  const float *temperature, *top_p, *min_p;  // [R]
  const int32_t *top_k, *num_logprobs;  // [R]; 0: no limit; how many likeliest tokens are wanted, -1: no logprob at all
  const uint64_t *seed, *counter;            // [R]
  const LogitEdits* const* edits;            // [R]; null: none
  const int32_t* forced;                     // [R]; -1: choose
  int64_t *token_ids, *top_ids;    // [R], [R, top_width]
  float *logprobs, *top_logprobs;  // the same
  int64_t num_rows, vocab_size, stride, top_width;
};

constexpr float kGreedyTemperature = 1e-5f;  // below, 1 / temperature could overflow

// A uniform number in [0, 1) with 53 bits (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
double uniform(uint64_t seed, uint64_t counter) {
  uint32_t c[4] = {static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), 0, 0};
  uint32_t k[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * c[0], b = uint64_t{0xCD9E8D57} * c[2];
    const uint32_t next[4] = {static_cast<uint32_t>(b >> 32) ^ c[1] ^ k[0], static_cast<uint32_t>(b),
                              static_cast<uint32_t>(a >> 32) ^ c[3] ^ k[1], static_cast<uint32_t>(a)};
    std::copy_n(next, 4, c);
    k[0] += 0x9E3779B9, k[1] += 0xBB67AE85;
  }
  return static_cast<double>(((uint64_t{c[0]} << 32) | c[1]) >> 11) * 0x1.0p-53;
}

// The row's token; -1 if its edits leave none. `total`: what weighing it at temperature 1 gave; 0: that was not done.
int64_t choose(const SamplingArgs& a, int64_t r, SampledRow& row, double total) {
  if (const LogitEdits* edits = a.edits[r]; edits != nullptr) {
    total = 0;
    if (!apply(*edits, row) || row.is_empty()) return -1;
  }
  if (!(a.temperature[r] >= kGreedyTemperature)) return row.greedy();
  const float inverse = 1.0f / a.temperature[r];
  const double u = uniform(a.seed[r], a.counter[r]);
  return row.draw(inverse, a.top_k[r], a.top_p[r], a.min_p[r], inverse == 1.0f ? total : 0, u);
}

template <class T> void sample(const SamplingArgs& a, int64_t r, Scratch& memory) {
  SampledRow row(a.vocab_size, memory);
  const int64_t wanted = a.num_logprobs[r];
  int64_t* top_ids = a.top_ids + r * a.top_width;
  float* top_logprobs = a.top_logprobs + r * a.top_width;
  std::fill_n(top_ids, a.top_width, -1), std::fill_n(top_logprobs, a.top_width, -kInfinity);
  a.token_ids[r] = -1, a.logprobs[r] = std::numeric_limits<float>::quiet_NaN();
  const T* logits = static_cast<const T*>(a.logits) + r * a.stride;
  if (!row.load(logits) || row.is_empty()) return;

  double total = wanted >= 0 ? row.weigh(1.0f) : 0;
  const double log_total = row.max() + std::log(total);
  if (const int64_t count = std::min(wanted, a.top_width); count > 0) {
    const int64_t found = row.best(count, top_ids);
    for (int64_t i = 0; i < found; ++i) top_logprobs[i] = static_cast<float>(row.logit(top_ids[i]) - log_total);
  }
  const int64_t token = a.forced[r] >= 0 ? a.forced[r] : choose(a, r, row, total);
  if (token < 0) return;
  a.token_ids[r] = token;
  if (wanted >= 0) a.logprobs[r] = static_cast<float>(to_float(logits[token]) - log_total);
}

template <class T> void sampling(const SamplingArgs& a) {
#pragma omp parallel for schedule(dynamic, 1) if (a.num_rows > 1 && a.num_rows * a.vocab_size >= kParallelWork)
  for (int64_t r = 0; r < a.num_rows; ++r) {
    static thread_local Scratch memory;
    sample<T>(a, r, memory);
  }
}

}  // namespace

TRITIUM_EXPORT(sampling, SamplingArgs)
