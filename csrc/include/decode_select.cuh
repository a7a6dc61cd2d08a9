// What decode_select and decode_sample share: the order of candidates, and the end of a step.
#pragma once
#include "decode.cuh"
#include "decode.h"
#include "reduce.cuh"

namespace hf_fuse {

// Larger for a larger value, NaN above all, and for a lower index among equals. Never 0.
__device__ inline uint64_t key_of(float value, int64_t index) {
  const uint32_t bits = __float_as_uint(value + 0.f);  // -0 becomes 0, which it equals
  const uint32_t sortable = isnan(value)         ? 0xffffffffu
                            : bits & 0x80000000u ? ~bits
                                                 : bits | 0x80000000u;
  return uint64_t{sortable} << 32 | (0xffffffffu - static_cast<uint32_t>(index));
}

// -1 for 0, which no candidate has.
__device__ inline int64_t index_of(uint64_t key) {
  return static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(key));
}

__device__ inline uint64_t warp_max(uint64_t key) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    key = max(key, __shfl_xor_sync(0xffffffffu, key, offset));
  }
  return key;
}

// For thread 0.
template <int kThreads>
__device__ inline uint64_t block_max(uint64_t key) {
  constexpr int kWarps = kThreads / kWarpSize;
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

__device__ inline bool is_eos(const DecodeSelect& p, int64_t token) {
  bool found = false;
  for (int64_t i = 0; i < p.num_eos; ++i) found |= token == p.eos[i];
  return found;
}

constexpr int kMaxSelectBlocks = 64;  // a sequence's

// The blocks that have arrived (0 between calls), then a slot for each block of each sequence.
struct SelectWorkspace {
  unsigned long long arrived;
  uint64_t slots[];
};

// By the last block: a warp a sequence. What it reads beside the slots is asked for with them.
template <int kThreads>
__device__ void advance(const DecodeSelect& p, SelectWorkspace* workspace, int64_t step,
                        uint8_t* seen) {
  constexpr int kWarps = kThreads / kWarpSize;
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
    if (seen != nullptr && token >= 0 && token < p.vocab) seen[b * p.vocab + token] = 1;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  workspace->arrived = 0;
  *p.length += 1;
  *p.step = step + 1;
}

// By every block, gridDim.x of them a sequence, with its largest key in thread 0. Only maxima are
// taken, so the order of arrival changes nothing.
template <int kThreads>
__device__ void select_and_advance(const DecodeSelect& p, uint64_t key, int64_t step,
                                   uint8_t* seen = nullptr) {
  __shared__ bool last;
  auto* workspace = static_cast<SelectWorkspace*>(p.workspace);
  if (threadIdx.x == 0) {
    workspace->slots[int64_t{blockIdx.y} * gridDim.x + blockIdx.x] = key;
    __threadfence();
    last = atomicAdd(&workspace->arrived, 1ull) == uint64_t{gridDim.x} * gridDim.y - 1;
    __threadfence();
  }
  __syncthreads();
  if (last) advance<kThreads>(p, workspace, step, seen);
}

}  // namespace hf_fuse
