// The next token of each sequence, the first of its largest logits, and a step forward.
//
// Bytes: batch * vocab fp32 logits, which the kernel before left in L2. Several blocks share a
// sequence; each leaves its largest logit in a slot, and the last block to arrive compares those
// and advances the state.
#include <algorithm>

#include "../include/decode_select.cuh"

namespace hf_fuse {
namespace {

constexpr const char* kOp = "decode_select";
constexpr int kThreads = 256;
constexpr int kBlocks = 256;           // of the whole batch, unless it has more sequences
constexpr int kLogitsPerBlock = 2048;  // at least, of 8 a thread

template <typename V, bool kWithoutEos>
__device__ uint64_t largest_of(const DecodeSelect& p, const float* logits) {
  const int64_t vocab = p.vocab;
  uint64_t key = 0;
  const int64_t step = int64_t{gridDim.x} * kThreads * V::kSize;
  int64_t i = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * V::kSize;
#pragma unroll 2
  for (; i < vocab; i += step) {
    const auto x = load<V>(logits + i).floats();
#pragma unroll
    for (int j = 0; j < V::kSize; ++j) {
      const bool out = kWithoutEos && is_eos(p, i + j);
      key = max(key, key_of(out ? -INFINITY : x[j], i + j));
    }
  }
  return key;
}

template <typename V>
__global__ void __launch_bounds__(kThreads) decode_select_kernel(const DecodeSelect p) {
  pdl_trigger();
  pdl_wait();
  const float* logits = p.logits + blockIdx.y * p.vocab;
  const int64_t step = *p.step;
  const uint64_t key = block_max<kThreads>(step < p.min_step ? largest_of<V, true>(p, logits)
                                                             : largest_of<V, false>(p, logits));
  select_and_advance<kThreads>(p, key, step);
}

}  // namespace

int64_t decode_select_workspace_size(int64_t batch) {
  return static_cast<int64_t>(sizeof(uint64_t)) * (1 + batch * kMaxSelectBlocks);
}

void decode_select(const DecodeSelect& p, void* stream) {
  if (p.batch == 0) return;
  const int64_t blocks = std::min(std::clamp<int64_t>(kBlocks / p.batch, 1, kMaxSelectBlocks),
                                  ceil_div(p.vocab, kLogitsPerBlock));
  const auto run = [&](auto width) {
    launch(kOp, decode_select_kernel<decltype(width)>, step_grid(p.batch, blocks, p.batch),
           kThreads, 0, stream, p);
  };
  const bool vectors = p.vocab % 4 == 0 && rows_aligned({{p.logits}}, 1, sizeof(float));
  vectors ? run(Vec<float, 4>()) : run(Vec<float, 1>());
}

}  // namespace hf_fuse
