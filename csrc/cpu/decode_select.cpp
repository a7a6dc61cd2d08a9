// decode_select on CPU: the logits are read once, a block at a time against the largest so far;
// only a block that holds a larger one is looked at element by element.
#include "cpu_vec.h"
#include "decode.h"

namespace hf_fuse {
namespace {

// Whether a logit is above `largest`, or a NaN.
bool any_above(const float* logits, int64_t n, float largest) {
  int_vec not_above = broadcast(largest) == broadcast(largest);
  int64_t i = 0;
  for (; i + kLanes<float> <= n; i += kLanes<float>)
    not_above &= load_vec(logits + i) <= broadcast(largest);
  bool all = true;
  for (int64_t lane = 0; lane < kLanes<float>; ++lane) all &= not_above[lane] != 0;
  for (; i < n; ++i) all &= logits[i] <= largest;
  return !all;
}

// The first index of the largest; of the first NaN, if there is one.
int64_t argmax(const float* logits, int64_t n) {
  constexpr int64_t kBlock = 512;
  int64_t best = 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = begin + kBlock < n ? begin + kBlock : n;
    if (!any_above(logits + begin, end - begin, logits[best])) continue;
    for (int64_t i = begin; i < end; ++i) {
      if (std::isnan(logits[i])) return i;
      if (logits[i] > logits[best]) best = i;
    }
  }
  return best;
}

bool contains(const int64_t* values, int64_t n, int64_t value) {
  for (int64_t i = 0; i < n; ++i)
    if (values[i] == value) return true;
  return false;
}

// The same without the tokens of eos, on a copy: a step of few, in most calls of none.
int64_t argmax_without_eos(const DecodeSelect& p, const float* logits) {
  std::vector<float> rest(logits, logits + p.vocab);
  for (int64_t i = 0; i < p.num_eos; ++i)
    if (p.eos[i] >= 0 && p.eos[i] < p.vocab) rest[p.eos[i]] = -INFINITY;
  return argmax(rest.data(), p.vocab);
}

void select(const DecodeSelect& p, int64_t sequence) {
  const bool had_finished = p.finished[sequence] != 0;
  const float* logits = p.logits + sequence * p.vocab;
  const int64_t best =
      *p.step < p.min_step ? argmax_without_eos(p, logits) : argmax(logits, p.vocab);
  const int64_t token = had_finished ? p.pad : best;
  p.token[sequence] = token;
  p.finished[sequence] = had_finished || contains(p.eos, p.num_eos, token);
  const int64_t step = *p.step;
  if (step >= 0 && step < p.max_steps) p.history[step * p.batch + sequence] = token;
}

}  // namespace

int64_t decode_select_workspace_size(int64_t) { return 0; }

void decode_select(const DecodeSelect& p, void*) {
  for_each_row(p.batch, p.vocab, [&](int64_t begin, int64_t end) {
    for (int64_t sequence = begin; sequence < end; ++sequence) select(p, sequence);
  });
  *p.length += 1;
  *p.step += 1;
}

}  // namespace hf_fuse
