// decode_attention's kernel of single products, for all sizes (see decode_attention.cu).
#pragma once
#include <algorithm>

#include "decode_tiles.cuh"

namespace hf_fuse {
namespace {

constexpr int kAloneTiles = 2;  // a warp, up to which a block is done sooner than a cluster
constexpr int kSplitTiles = 8;  // a warp, up to which a block for each query head is sooner done
// Of a block. Four find room beside two blocks of a projection. Over long caches of one query head
// a key head an odd number reads faster: the steps from tile to tile are no power of two.
constexpr int kFewWarps = 4, kOddWarps = 5;
constexpr int64_t kShortCache = 512;  // slots

template <typename L>
__device__ void attend_task(Shared<L>& shared, const DecodeAttention& p, const Task& task,
                            int head_dim, int64_t length, int64_t first, int64_t position) {
  using T = typename L::Element;
  const int num_slots = static_cast<int>(length - first);  // but for the new one
  const int num_tiles = (num_slots + L::kTile - 1) / L::kTile;
  if (task.blocks > 1) begin_cluster(&shared.barrier, cluster_bytes<L>(task.blocks));

  T* keys =
      cache_of<T>(p.key_cache, p.key_batch_stride, p.key_head_stride, task) + first * head_dim;
  T* values = cache_of<T>(p.value_cache, p.value_batch_stride, p.value_head_stride, task) +
              first * head_dim;
  // By a shuffle, so that the compiler knows that all lanes have the same and branch as one.
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / kWarpSize, 0);
  const int num_warps = blockDim.x / kWarpSize, step = num_warps * task.blocks;
  int tile = warp * task.blocks + task.rank;
  typename L::Row key[L::kBuffers][L::kSlots], value[L::kBuffers][L::kSlots];
#pragma unroll
  for (int b = 0; b < L::kBuffers; ++b) {
    if (tile + b * step >= num_tiles) break;
    load_tile<L>(key[b], keys, tile + b * step, num_slots, head_dim);
    load_tile<L>(value[b], values, tile + b * step, num_slots, head_dim);
  }
  take_input(shared, p, task, position);
  Attention<L> a;
  begin(a, shared, p.scaling * kLog2e, p.softcap * kLog2e);
  if (tile == 0) {
    const int64_t slot = int64_t{num_slots} * head_dim;
    attend_new(a, shared, head_dim, task.round == 0, keys + slot, values + slot);
  }
  while (tile < num_tiles) {
#pragma unroll
    for (int b = 0; b < L::kBuffers; ++b) {
      if (tile >= num_tiles) break;
      const int refill = tile + L::kBuffers * step;
      float scores[L::kSlots][L::kGroup];
      multiply<L, L::kSlots>(scores, a, key[b], tile * L::kTile + L::slot_group(), num_slots);
      if (refill < num_tiles) load_tile<L>(key[b], keys, refill, num_slots, head_dim);
      attend<L, L::kSlots>(a, scores, value[b]);
      if (refill < num_tiles) load_tile<L>(value[b], values, refill, num_slots, head_dim);
      tile += step;
    }
  }
  combine_warp(shared, a, warp);
  __syncthreads();
  finish(shared, p, task);
}

template <typename L>
__global__ void __launch_bounds__(kMaxWarps* kWarpSize, L::kGroup > 4 ? 1 : 2)
    decode_attention_kernel(const __grid_constant__ DecodeAttention p, const Split split) {
  using One = Layout<typename L::Element, L::kLanes, 1, L::kCapped>;
  __shared__ union {
    Shared<L> all;
    Shared<One> one;
  } shared;
  pdl_trigger();
  // The length and the slots below it are read before the wait. They are the previous step's, all
  // of which has ended: a step's first kernel triggers its dependents after its own wait.
  Task task = find_task<L>(split);
  const int64_t length = load_before_wait(p.length),
                start = load_before_wait(p.start + task.sequence);
  if (length >= p.capacity) __trap();  // the new slot would be another head's
  const int64_t first = first_slot(p, length, start);
  const int num_warps = blockDim.x / kWarpSize;
  const auto within = [&](int tiles, int blocks) {  // of each warp
    return length - first <= int64_t{tiles * L::kTile * num_warps * blocks};
  };
  const int blocks = split.cluster / L::kGroup;  // for each query head
  if (L::kGroup > 1 && !(blocks > 0 && within(kSplitTiles, blocks))) {
    return attend_task<L>(shared.all, p, task, split.head_dim, length, first, length - start);
  }
  // Few slots: the cluster's blocks are shared out among the query heads, to read them again.
  const int head = task.rank / blocks;
  task.blocks = within(kAloneTiles, 1) ? 1 : blocks;
  task.first_rank = head * blocks;
  task.rank -= task.first_rank;
  if (head >= task.num_heads || task.rank >= task.blocks) {
    if (task.blocks > 1) begin_cluster(&shared.one.barrier, 0), cluster_wait();
    return;
  }
  task.first_head += head;
  task.round += head;
  task.num_heads = 1;
  attend_task<One>(shared.one, p, task, split.head_dim, length, first, length - start);
}

template <typename T, int kLanes, int kGroup, bool kCapped>
void launch_layout(const DecodeAttention& p, void* stream) {
  using L = Layout<T, kLanes, kGroup, kCapped>;
  const int many = kGroup == 1 ? kOddWarps : kMaxWarps;
  const int warps = most_slots(p) > kLongCache ? many : kFewWarps;
  launch_attention<L>(decode_attention_kernel<L>, p, warps, warps * L::kTile, stream);
}

// Whether each query head has blocks of its own. A few sequences fill the GPU with them, and over
// short caches to read a slot again, from L2, costs less than to bring clusters of blocks together.
inline bool heads_apart(const DecodeAttention& p) {
  return p.batch > 1 && most_slots(p) <= kShortCache &&
         p.batch * p.num_heads <= 4 * device_info(kDecodeAttention).num_sms;
}

// As many query heads together as registers hold.
template <typename T, int kLanes, bool kCapped>
void launch_group(const DecodeAttention& p, void* stream) {
  const int64_t group = p.num_heads / p.num_kv_heads;
  if (group == 1 || heads_apart(p)) return launch_layout<T, kLanes, 1, kCapped>(p, stream);
  if (group == 2) return launch_layout<T, kLanes, 2, kCapped>(p, stream);
  if constexpr (kLanes < kWarpSize) {
    if (group > 4) return launch_layout<T, kLanes, 8, kCapped>(p, stream);
  }
  launch_layout<T, kLanes, 4, kCapped>(p, stream);
}

template <typename T, bool kCapped>
void launch_lanes(const DecodeAttention& p, void* stream) {
  if (p.batch == 0 || p.num_heads == 0) return;
  if (p.head_dim <= 64) return launch_group<T, 8, kCapped>(p, stream);
  if (p.head_dim <= 128) return launch_group<T, 16, kCapped>(p, stream);
  launch_group<T, 32, kCapped>(p, stream);
}

}  // namespace
}  // namespace hf_fuse
