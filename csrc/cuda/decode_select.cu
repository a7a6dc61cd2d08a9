// The next token of each sequence, the first of its largest logits, and a step forward.
//
// Bytes: batch * vocab fp32 logits, which the kernel before left in L2. Several blocks share a
// sequence; each leaves its largest logit in a slot, and the last block to arrive compares those
// and advances the state. Only maxima are taken, so the order of arrival changes nothing.
#include <algorithm>

#include "../include/decode.cuh"
#include "../include/decode.h"
#include "../include/reduce.cuh"

namespace hf_fuse {
namespace {

constexpr const char* kOp = "decode_select";
constexpr int kThreads = 256, kWarps = kThreads / kWarpSize;
constexpr int kMaxBlocks = 64;         // a sequence's; the workspace has a slot for each
constexpr int kBlocks = 256;           // of the whole batch, unless it has more sequences
constexpr int kLogitsPerBlock = 2048;  // at least, of 8 a thread

// The workspace: the blocks that have arrived (0 between calls), then the slots.
struct Workspace {
  unsigned long long arrived;
  uint64_t slots[];
};

// Larger for a larger logit, NaN above all, and for a lower index among equals. Never 0.
__device__ uint64_t key_of(float logit, int64_t index) {
  const uint32_t bits = __float_as_uint(logit + 0.f);  // -0 becomes 0, which it equals
  const uint32_t sortable = isnan(logit)         ? 0xffffffffu
                            : bits & 0x80000000u ? ~bits
                                                 : bits | 0x80000000u;
  return uint64_t{sortable} << 32 | (0xffffffffu - static_cast<uint32_t>(index));
}

__device__ int64_t index_of(uint64_t key) { return 0xffffffffu - static_cast<uint32_t>(key); }

__device__ uint64_t warp_max(uint64_t key) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    key = max(key, __shfl_xor_sync(0xffffffffu, key, offset));
  }
  return key;
}

// For thread 0.
__device__ uint64_t block_max(uint64_t key) {
  __shared__ uint64_t shared[kWarps];
  key = warp_max(key);
  if (threadIdx.x % kWarpSize == 0) shared[threadIdx.x / kWarpSize] = key;
  __syncthreads();
  if (threadIdx.x == 0) {
#pragma unroll
    for (int warp = 1; warp < kWarps; ++warp) key = max(key, shared[warp]);
  }
  return key;
}

__device__ bool is_eos(const DecodeSelect& p, int64_t token) {
  bool found = false;
  for (int64_t i = 0; i < p.num_eos; ++i) found |= token == p.eos[i];
  return found;
}

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

// By the last block: a warp a sequence. What it reads beside the slots is asked for with them.
__device__ void advance(const DecodeSelect& p, Workspace* workspace, int64_t step) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  for (int64_t b = warp; b < p.batch; b += kWarps) {
    const bool finished = p.finished[b] != 0;
    const int64_t eos = lane < p.num_eos ? p.eos[lane] : INT64_MIN;
    uint64_t key = 0;
    for (int i = lane; i < int(gridDim.x); i += kWarpSize) {
      key = max(key, __ldcg(&workspace->slots[b * gridDim.x + i]));
    }
    const int64_t token = finished ? p.pad : index_of(warp_max(key));
    bool ends = __any_sync(0xffffffffu, token == eos);
    for (int64_t i = kWarpSize; i < p.num_eos; ++i) ends |= token == p.eos[i];
    if (lane != 0) continue;
    p.token[b] = token;
    p.finished[b] = finished || ends;
    if (step < p.max_steps) p.history[step * p.batch + b] = token;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  workspace->arrived = 0;
  *p.length += 1;
  *p.step = step + 1;
}

template <typename V>
__global__ void __launch_bounds__(kThreads) decode_select_kernel(const DecodeSelect p) {
  __shared__ bool last;
  pdl_trigger();
  pdl_wait();
  auto* workspace = static_cast<Workspace*>(p.workspace);
  const int64_t b = blockIdx.y;
  const float* logits = p.logits + b * p.vocab;
  const int64_t step = *p.step;
  const uint64_t key = block_max(step < p.min_step ? largest_of<V, true>(p, logits)
                                                   : largest_of<V, false>(p, logits));
  if (threadIdx.x == 0) {
    workspace->slots[b * gridDim.x + blockIdx.x] = key;
    __threadfence();
    last = atomicAdd(&workspace->arrived, 1ull) == uint64_t{gridDim.x} * gridDim.y - 1;
    __threadfence();
  }
  __syncthreads();
  if (last) advance(p, workspace, step);
}

}  // namespace

int64_t decode_select_workspace_size(int64_t batch) {
  return static_cast<int64_t>(sizeof(uint64_t)) * (1 + batch * kMaxBlocks);
}

void decode_select(const DecodeSelect& p, void* stream) {
  if (p.batch == 0) return;
  const int64_t blocks = std::min(std::clamp<int64_t>(kBlocks / p.batch, 1, kMaxBlocks),
                                  ceil_div(p.vocab, kLogitsPerBlock));
  const auto run = [&](auto width) {
    launch(kOp, decode_select_kernel<decltype(width)>, step_grid(blocks, p.batch), kThreads, 0,
           stream, p);
  };
  const bool vectors = p.vocab % 4 == 0 && rows_aligned({{p.logits}}, 1, sizeof(float));
  vectors ? run(Vec<float, 4>()) : run(Vec<float, 1>());
}

}  // namespace hf_fuse
